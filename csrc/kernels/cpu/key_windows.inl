// The gradients of keys and values of overlapping windows (HAT). window_attention.inl includes this file.
//
// A token is a key of several windows. The backward pass stores each window's contribution to the gradients of its keys
// in the workspace; then the contributions to each token are summed, always in the same order.

// The windows whose keys include a token, on one axis: their range, and the token's key coordinate in the first of
// them. From each window to the next, the key coordinate decreases by `window`.
struct KeyOf {
  int64_t first_window, windows, first_key;

  KeyOf(const WindowGeometry& g, int axis, int64_t frame) {
    const int64_t window = g.window[axis], margin = g.key_margin[axis];
    const int64_t last = (frame + margin) / window, beyond = frame - window - margin;
    first_window = beyond < 0 ? 0 : beyond / window + 1;
    windows = smaller(last + 1, g.num_windows[axis]) - first_window;
    first_key = frame - first_window * window + margin;
  }
};

// Runs the tasks [begin, end), where task = window * num_heads + head. A task sums dk and dv for the tokens of its
// window, without the margin.
void sum_key_gradients(const WindowAttentionBackwardParams& params, const BackwardPartition& partition, int64_t begin,
                       int64_t end, void* scratch) {
  const WindowAttentionForwardParams& p = params.forward;
  const WindowGeometry& g = p.geometry;
  const Sizes sizes(p);
  Arena arena(scratch);
  float* const sum = arena.take<float>(sizes.row);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t head = task % p.num_heads;
    int64_t number[3], index = task / p.num_heads;
    for (int axis = 2; axis >= 0; --axis) {
      number[axis] = index % g.num_windows[axis];
      index /= g.num_windows[axis];
    }
    for (int64_t token = 0; token < sizes.tokens; ++token) {
      const int64_t coordinate[3] = {token / (g.window[1] * g.window[2]), token / g.window[2] % g.window[1],
                                     token % g.window[2]};
      int64_t frame[3], source[3];
      bool is_pad = false;
      for (int axis = 0; axis < 3; ++axis) {
        frame[axis] = number[axis] * g.window[axis] + coordinate[axis];
        source[axis] = frame[axis] - g.pad_before[axis];
        is_pad = is_pad || source[axis] < 0 || source[axis] >= g.size[axis];
      }
      if (is_pad) continue;
      const KeyOf of[3] = {{g, 0, frame[0]}, {g, 1, frame[1]}, {g, 2, frame[2]}};
      for (int64_t part = 0; part < 2; ++part) {
        for (int64_t c = 0; c < sizes.row; ++c) sum[c] = 0.0f;
        for (int64_t a = 0; a < of[0].windows; ++a) {
          for (int64_t b = 0; b < of[1].windows; ++b) {
            for (int64_t c = 0; c < of[2].windows; ++c) {
              const int64_t window =
                  ((index * g.num_windows[0] + of[0].first_window + a) * g.num_windows[1] + of[1].first_window + b) *
                      g.num_windows[2] +
                  of[2].first_window + c;
              const int64_t key =
                  ((of[0].first_key - a * g.window[0]) * sizes.key_window[1] + of[1].first_key - b * g.window[1]) *
                      sizes.key_window[2] +
                  of[2].first_key - c * g.window[2];
              const float* from =
                  partition.dkv + (((window * p.num_heads + head) * 2 + part) * sizes.keys + key) * sizes.dim;
              for (int64_t i = 0; i < sizes.dim; ++i) sum[i] += from[i];
            }
          }
        }
        const TokenMap& map = part == 0 ? params.dk : params.dv;
        const int64_t offset = index * map.batch_stride + source[0] * map.axis_stride[0] +
                               source[1] * map.axis_stride[1] + source[2] * map.axis_stride[2] + head * map.head_stride;
        with_format(p.dtype, [&](auto format) {
          using Format = decltype(format);
          store_row<Format>(sum, sizes.dim, 1.0f, static_cast<typename Format::Element*>(map.data) + offset);
        });
      }
    }
  }
}
