"""The compiled ops, loaded by kernel-builder's module _ops."""

import json

from ._ops import ops

build = json.loads(ops.build_info())
error = None
