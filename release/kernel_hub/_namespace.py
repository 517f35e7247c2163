"""NAMESPACE: the ops' namespace in torch.ops. kernel-builder gives every build its own."""

from ._ops import add_op_namespace_prefix

NAMESPACE = add_op_namespace_prefix("").removesuffix("::")
