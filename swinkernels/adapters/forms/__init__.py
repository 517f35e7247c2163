"""Modules of other forms than Microsoft's block: each a description of its forward in terms of the op, tried before use."""
