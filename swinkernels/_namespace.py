"""Defines NAMESPACE, the ops' namespace in torch.ops, for Python and, through setup.py, for the compiled library.

A copy of the package under another name needs another namespace: change it here, then build.
"""

NAMESPACE = "swinkernels"
