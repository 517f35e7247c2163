"""NAMESPACE: the ops' namespace in torch.ops, which is different in every build by kernel-builder."""

from ._ops import add_op_namespace_prefix

NAMESPACE = add_op_namespace_prefix("").removesuffix("::")
