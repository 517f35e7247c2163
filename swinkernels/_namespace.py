"""Defines NAMESPACE, the namespace of the ops in torch.ops; setup.py passes it to the compiled library.

To install a copy of the package under another name, change NAMESPACE here before building.
"""

NAMESPACE = "swinkernels"
