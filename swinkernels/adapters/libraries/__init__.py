"""Adapters for known libraries. Each library has a module or package here, which is imported only after the library."""
