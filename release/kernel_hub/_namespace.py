"""Defines NAMESPACE, the namespace of the ops in torch.ops. Every build by kernel-builder has a different one."""

from ._ops import add_op_namespace_prefix

NAMESPACE = add_op_namespace_prefix("").removesuffix("::")
