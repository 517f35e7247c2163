// The bias from decomposed relative positions, as in SAM and ViTDet. window_attention.inl includes this file.
//
// Maths     score(i, j) += sum over axes a of q_i . table_a[i_a - j_a + window_a - 1], with the unscaled q
//           backward  per axis: dG[r, i] = sum of dS(i, j) over the keys j with i_a - j_a + window_a - 1 = r;
//                     dtable = dG q, dq += dG^T table
// Tiling    Each block of queries is multiplied by the table rows that it needs; the products are (table rows,
//           queries). From these the values (key coordinate, queries) of each axis are selected, and the bias of a key
//           is the sum of its values on all axes, at one addition per score. The products take a quarter of the work of
//           q k^T in windows of 14 x 14 tokens, and a twentieth in windows of 64 x 64.

class AxisTables {
 public:
  AxisTables(const WindowAttentionForwardParams& p, const Sizes& sizes, Arena& arena) : sizes_(sizes) {
    if (p.axis_tables == nullptr) return;
    const float* table = p.axis_tables;
    int64_t coordinates = 0;
    for (int axis = 0; axis < 3; ++axis) {
      window_[axis] = p.geometry.window[axis];
      if (p.axis_rows[axis] == 0) continue;
      Axis& a = axes_[axis];
      a.first_row = rows_;
      a.first_coordinate = coordinates;
      a.rows = p.axis_rows[axis];
      rows_ += a.rows;
      coordinates += window_[axis];
    }
    tables_ = arena.take<float>(rows_ * sizes.row);
    products_ = arena.take<float>(rows_ * sizes.block);
    by_coordinate_ = arena.take<float>(coordinates * sizes.block);
    if (tables_ == nullptr) return;
    for (int64_t r = 0; r < rows_; ++r) load_row<Float32>(table + r * sizes.dim, sizes.dim, tables_ + r * sizes.row);
  }

  bool given() const { return rows_ > 0; }
  int64_t rows() const { return rows_; }

  // Computes the bias (keys, queries) of query block b from its unscaled queries q_t (row, block).
  __attribute__((noinline)) void write_bias(int64_t b, const float* q_t, float* bias) {
    const int64_t width = round_up(sizes_.queries(b), kLanes);
    for (int axis = 0; axis < 3; ++axis) {
      const Axis& a = axes_[axis];
      if (a.rows == 0) continue;
      const Span span = span_of(axis, b);
      const int64_t first = a.first_row + span.first;
      matmul<false>(span.count, width, sizes_.dim, tables_ + first * sizes_.row, sizes_.row, q_t, sizes_.block, nullptr,
                    products_ + first * sizes_.block, sizes_.block);
      for_each_place(axis, b, [&](int64_t product, int64_t place) { by_coordinate_[place] = products_[product]; });
    }
    for (int64_t i = 0; i < width; i += kLanes) {
      float* to = bias + i;
      for (int64_t c0 = 0; c0 < window_[0]; ++c0) {
        for (int64_t c1 = 0; c1 < window_[1]; ++c1) {
          Vec outer = load(coordinate(1, c1) + i);
          if (axes_[0].rows > 0) outer += load(coordinate(0, c0) + i);
          for (int64_t c2 = 0; c2 < window_[2]; ++c2, to += sizes_.block)
            store(to, outer + load(coordinate(2, c2) + i));
        }
      }
    }
  }

  // Adds the contribution of query block b to dq (queries, row) and dtables (rows, row). dscores (keys, queries) is the
  // gradient of the block's scores.
  __attribute__((noinline)) void add_gradients(int64_t b, const float* dscores, const float* q, float* dq,
                                               float* dtables) {
    const int64_t queries = sizes_.queries(b);
    sum_by_coordinate(round_up(queries, kLanes), dscores);
    for (int axis = 0; axis < 3; ++axis) {
      const Axis& a = axes_[axis];
      if (a.rows == 0) continue;
      const Span span = span_of(axis, b);
      const int64_t first = a.first_row + span.first;
      float* dproducts = products_ + first * sizes_.block;
      for (int64_t i = 0; i < span.count * sizes_.block; i += kLanes) store(dproducts + i, Vec{});
      for_each_place(axis, b, [&](int64_t product, int64_t place) { products_[product] = by_coordinate_[place]; });
      float* dtable = dtables + first * sizes_.row;
      matmul<false>(span.count, sizes_.row, queries, dproducts, sizes_.block, q, sizes_.row, dtable, dtable,
                    sizes_.row);
      matmul<true>(queries, sizes_.row, span.count, dproducts, sizes_.block, tables_ + first * sizes_.row, sizes_.row,
                   dq, dq, sizes_.row);
    }
  }

 private:
  struct Axis {
    int64_t rows = 0;  // 0 if the map does not have this axis
    int64_t first_row = 0, first_coordinate = 0;
  };
  struct Span {
    int64_t first, count;
  };

  float* coordinate(int axis, int64_t c) const {
    return by_coordinate_ + (axes_[axis].first_coordinate + c) * sizes_.block;
  }

  int64_t coordinate_of(int axis, int64_t query) const {
    for (int i = 2; i > axis; --i) query /= window_[i];
    return query % window_[axis];
  }

  // Returns the range of table rows that the queries of block b need on one axis.
  Span span_of(int axis, int64_t b) const {
    int64_t lowest = window_[axis], highest = 0;
    for (int64_t i = 0; i < sizes_.queries(b); ++i) {
      const int64_t at = coordinate_of(axis, b * sizes_.block + i);
      lowest = smaller(lowest, at);
      highest = at > highest ? at : highest;
    }
    return {lowest, highest - lowest + window_[axis]};
  }

  // Calls action(index in products_, index in by_coordinate_) for each query of block b and each key coordinate on the
  // axis.
  template <class Action>
  SWINKERNELS_INLINE void for_each_place(int axis, int64_t b, Action action) const {
    const Axis& a = axes_[axis];
    const int64_t queries = sizes_.queries(b);
    for (int64_t first = 0; first < queries;) {
      const int64_t at = coordinate_of(axis, b * sizes_.block + first);
      int64_t last = first + 1;
      if (axis < 2) {  // the tokens of a window's row share this coordinate
        while (last < queries && coordinate_of(axis, b * sizes_.block + last) == at) ++last;
      }
      for (int64_t c = 0; c < window_[axis]; ++c) {
        const int64_t product = (a.first_row + at - c + window_[axis] - 1) * sizes_.block;
        const int64_t place = (a.first_coordinate + c) * sizes_.block;
        for (int64_t i = first; i < last; ++i) action(product + i, place + i);
      }
      first = last;
    }
  }

  // For each axis, sums dscores over the keys with the same coordinate.
  void sum_by_coordinate(int64_t width, const float* dscores) {
    for (int64_t i = 0; i < width; i += kLanes) {
      for (int axis = 0; axis < 3; ++axis) {
        for (int64_t c = 0; axes_[axis].rows > 0 && c < window_[axis]; ++c) store(coordinate(axis, c) + i, Vec{});
      }
      const float* from = dscores + i;
      for (int64_t c0 = 0; c0 < window_[0]; ++c0) {
        Vec of_plane = {};
        for (int64_t c1 = 0; c1 < window_[1]; ++c1) {
          Vec of_row = {};
          for (int64_t c2 = 0; c2 < window_[2]; ++c2, from += sizes_.block) {
            const Vec x = load(from);
            of_row += x;
            store(coordinate(2, c2) + i, load(coordinate(2, c2) + i) + x);
          }
          store(coordinate(1, c1) + i, load(coordinate(1, c1) + i) + of_row);
          of_plane += of_row;
        }
        if (axes_[0].rows > 0) store(coordinate(0, c0) + i, of_plane);
      }
    }
  }

  const Sizes& sizes_;
  Axis axes_[3];
  int64_t window_[3] = {1, 1, 1};
  int64_t rows_ = 0;                // rows of all tables
  float* tables_ = nullptr;         // (rows, row)
  float* products_ = nullptr;       // (rows, block), or their gradients
  float* by_coordinate_ = nullptr;  // (coordinates of all axes, block), or their gradients
};
