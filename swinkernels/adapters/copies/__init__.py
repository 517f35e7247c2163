"""Adapters made at run time for unknown classes that have the form of Microsoft's block or attention."""
