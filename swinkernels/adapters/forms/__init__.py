"""Forms describe, in terms of the op, the forward of modules unlike Microsoft's block. Each is tried before use."""
