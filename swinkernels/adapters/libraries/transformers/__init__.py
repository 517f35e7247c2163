"""Runs transformers' Swin Transformers with this package's ops. There is one module for each family of models.

A transformers layer pads its map, rolls it, partitions it into windows, runs an attention module inside them and undoes
all of this. Linear layers process each token separately, so the layers for query, key, value and projection run on the
map in image order, and the op addresses the windows. A pad token is a row of zeros, so its q, k and v are the layers'
biases.

The layers of Swin, Donut and CLAP permanently change their ``window_size`` and ``shift_size`` when called on a map that
one window covers; the accelerated layers do so too.

If attention weights are requested, transformers' own code runs: with ``output_attentions``, and in Swin if
``config._attn_implementation`` is not "sdpa".

Source: transformers 5 (models/swin, swinv2, swin2sr, donut, maskformer, clap).
"""
