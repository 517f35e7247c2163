"""NAMESPACE: the ops' namespace in torch.ops, which kernel-builder makes different for every build."""

from ._ops import add_op_namespace_prefix

NAMESPACE = add_op_namespace_prefix("").removesuffix("::")
