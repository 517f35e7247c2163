"""Modules of other forms than Microsoft's block: descriptions of their forward in terms of the op, tried before use."""
