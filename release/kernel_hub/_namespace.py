"""NAMESPACE: where the ops are in torch.ops. kernel-builder gives every build a namespace of its own."""

from ._ops import add_op_namespace_prefix

NAMESPACE = add_op_namespace_prefix("").removesuffix("::")
