"""Adapters of known libraries, a module or a package for each, imported only after its library."""
