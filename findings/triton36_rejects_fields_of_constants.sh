#!/usr/bin/env bash
# A kernel that reads its constants from a NamedTuple compiles with Triton 3.8 and fails with Triton 3.6.
#
# Packages   triton 3.6.0
# Expected   The same as with triton 3.8.0, which the script also installs: the fields of a constexpr NamedTuple
#            argument are constexpr values. "constants.window" can be passed to another jit function, and
#            "constants.width" can be used in the shape of tl.zeros, just as if they were first bound to names
#            annotated with tl.constexpr.
# Seen       With 3.8.0 all four kernels compile. With 3.6.0 the two kernels that use the fields directly raise
#            CompilationError, caused by "AttributeError: 'int' object has no attribute 'type'"; the two that bind the
#            fields first compile.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
cd "$tmp"
cat > compile_kernels.py <<'PY'
from typing import Any, NamedTuple

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


class Constants(NamedTuple):
    window: Any
    width: Any


@triton.jit
def row_of(token, window):
    return token // window[1]


@triton.jit
def argument_directly(out, constants: tl.constexpr):
    token = tl.arange(0, 32)
    tl.store(out + token, row_of(token, constants.window))


@triton.jit
def argument_bound(out, constants: tl.constexpr):
    window: tl.constexpr = constants.window
    token = tl.arange(0, 32)
    tl.store(out + token, row_of(token, window))


@triton.jit
def shape_directly(out, constants: tl.constexpr):
    tl.store(out + tl.arange(0, 32), tl.sum(tl.zeros([32, constants.width], tl.int32), 1))


@triton.jit
def shape_bound(out, constants: tl.constexpr):
    width: tl.constexpr = constants.width
    tl.store(out + tl.arange(0, 32), tl.sum(tl.zeros([32, width], tl.int32), 1))


for kernel in (argument_directly, argument_bound, shape_directly, shape_bound):
    source = ASTSource(
        fn=kernel, signature={"out": "*i32", "constants": "constexpr"}, constexprs={(1,): Constants((4, 8), 16)}
    )
    try:
        triton.compile(source, target=GPUTarget("cuda", 90, 32))
        print(kernel.__name__, "compiles")
    except triton.CompilationError as error:
        print(kernel.__name__, "fails:", str(error.__cause__ or error).splitlines()[-1])
PY
python3 -m venv venv-3.6.0
"$tmp/venv-3.6.0/bin/pip" install --quiet "triton==3.6.0"
python3 -m venv venv-3.8.0
"$tmp/venv-3.8.0/bin/pip" install --quiet "triton==3.8.0"
for version in 3.6.0 3.8.0; do
    echo "triton $version"
    TRITON_CACHE_DIR="$tmp/cache-$version" "venv-$version/bin/python" compile_kernels.py | tee "$version.txt"
done
[ "$(grep -c compiles 3.8.0.txt)" = 4 ]
[ "$(grep -c compiles 3.6.0.txt)" = 2 ]
[ "$(grep -c "directly fails: .*'int' object has no attribute 'type'" 3.6.0.txt)" = 2 ]
