"""Creates adapters at run time for unknown classes that copy Microsoft's block or attention."""
