"""Runs Swin and other models of transformers with this package's ops. There is one module for each family of models.

A Swin layer in transformers pads its map, rolls it, partitions it into windows, runs an attention module inside them
and undoes all of this. Linear layers process each token separately, so the query, key, value and output projections run
on the map in image order, and the op addresses the windows. A pad token is a row of zeros, so its q, k and v are the
biases of these projections.

The layers of Swin, Donut and CLAP permanently change their ``window_size`` and ``shift_size`` when called on a map
whose shorter side is no longer than the window; the accelerated layers do so too.

If attention weights are requested, transformers' own code runs: with ``output_attentions``, and in Swin if
``config._attn_implementation`` is not "sdpa".

Source: transformers 5 (models/swin, swinv2, swin2sr, donut, maskformer, clap).
"""
