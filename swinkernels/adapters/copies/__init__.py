"""Creates adapters at run time for unknown classes whose code was copied from Microsoft's block or attention."""
