"""Forms of modules that differ from Microsoft's block. A form computes a forward with the op, and must pass a trial."""
