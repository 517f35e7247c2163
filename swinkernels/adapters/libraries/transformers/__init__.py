"""transformers' Swin Transformers, a module for each family of models.

Layers. A layer pads its map, rolls it, cuts it into windows, runs an attention module inside them and undoes it all.
Linear layers act on tokens one by one, so query, key, value and the projection run on the map in image order, and the
op addresses the windows. They stay separate layers. A pad token, a zero row, has their biases as its q, k and v.

The layers of Swin, Donut and CLAP permanently change their own ``window_size`` and ``shift_size`` when they meet a map
that one window covers; so do the accelerated ones.

Attention weights need transformers' own code: with ``output_attentions``, and in Swin, which decides it by
``config._attn_implementation``, for any value but "sdpa".

Source: transformers 5 (models/swin, swinv2, swin2sr, donut, maskformer, clap).
"""
