"""Adapters of known libraries, a module or a package for each. Imported only once the library has been."""
