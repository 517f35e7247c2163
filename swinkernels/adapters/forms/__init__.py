"""Describes modules that differ from Microsoft's block: their forward in terms of the op, tried before use."""
