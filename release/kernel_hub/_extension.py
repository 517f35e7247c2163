"""The compiled ops, which kernel-builder's module _ops loads."""

import json

from ._ops import ops

build = json.loads(ops.build_info())
error = None
