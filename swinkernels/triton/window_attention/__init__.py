"""Window attention in Triton; in 2D a map has a leading axis of length one.

From the bottom up: ``call`` (the kernels' arguments), ``windows`` (the windows of a program), ``rows`` (reading and
writing tokens), ``key_windows`` (keys from a larger window), ``mask`` (the shift's seam), ``scores``, ``gradients``,
``axis_tables`` (decomposed relative position), ``forward``, ``backward``, ``backward_tables``, ``backward_keys``,
``tuning``, ``launch``.

Maths     S = scale q k^T + bias + mask, P = softmax(S), out = P v, lse = log sum exp S, per window and head. Backward,
          with P recomputed from lse: dv = P^T dout, dP = dout v^T, delta = rowsum(P dP), dS = P (dP - delta),
          dq = scale dS k, dk = scale dS^T q, dbias = dS summed over windows, folded onto the table's rows. In float32
          and float16 delta is rowsum(P dP) / rowsum(P): lse is rounded, so a row of P sums only nearly to one, and the
          error would have the same sign in all of the row's dS. In bfloat16 other rounding errors exceed it.
Range     float16 results are finite if the exact ones are: sums and softmax are in float32, P is at most one, and dS is
          divided by a factor that brings it into range before it is multiplied by q or k. P's relative error is about
          |lse| * 2^-22.
Cosine    v2, if logit_scale is not None: with u = q / |q|, w = k / |k| and f = exp(min(logit_scale, ln 100)), the first
          term of S is f q k^T / (|q| |k|): products of the original q and k, divided in float32, since f would multiply
          the error of rounded unit vectors. Backward: du = f dS w, dq = (du - u (u du)) / |q|, dk likewise, and
          dlogit_scale = sum of dS f u w, in float32.
Dropout   out = (D P) v with D = 0 or 1 / (1 - p), so dv = (D P)^T dout and dP = D (dout v^T); D comes from Philox with
          the key dropout_seed, a tensor in the GPU's memory, and is generated again in the backward pass.
Tiling    N <= 64 (N <= 32 in float32): a program owns one head and walks over several windows; a window is one tile,
          and the bias and dbias tiles stay in registers for all windows. Larger N: query tiles by key tiles, a program
          per tile row, online softmax; backward in three kernels (dq and delta; dk and dv; dbias), without atomics.
          Windows with axis_tables or a key_window are processed by the kernels for larger N.
Order     the head varies fastest over programs: adjacent programs read adjacent parts of the same token rows, so whole
          cache lines are used even if a head's row is half a line. If window types have separate biases, a program
          walks over windows of one type, image by image.
Bias      gathered from the table in the kernel. The table (2 KB at window 7 and 3 heads) stays in L1; building a dense
          fp32 bias (heads, N, N) would cost one more launch. A given dense bias is read directly.
Traffic   forward 4 and backward 7 maps of B * S * C elements, each read or written once if a window is one tile
          (backward in v2 reads q and k twice, the second time from the cache). Partial sums: one dbias per group of
          windows, at most 16 MB plus one dbias.
Limits    N <= 1024, with axis_tables N <= 4096; fewer than 2^31 tiles of 16 keys in a call; tile sizes are powers of
          two, which costs a factor of 64/49 at window 7.
"""
