"""Defines NAMESPACE, the namespace of the ops in torch.ops, which differs between builds by kernel-builder."""

from ._ops import add_op_namespace_prefix

NAMESPACE = add_op_namespace_prefix("").removesuffix("::")
