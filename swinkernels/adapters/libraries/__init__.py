"""Adapters for known libraries. Each library has a module or a package, imported only after the library itself."""
