"""Runs the CUDA kernels of csrc/ on the CPU, so that tests cover them without a GPU or a CUDA toolkit.

The C++ compiler compiles the kernel sources unchanged. ``include/`` shadows the toolkit's headers with the few types,
intrinsics and collectives that kernels use, and has CPU versions of ``kernels/common/ptx.cuh`` (every PTX instruction)
and ``launch.cuh`` (launches, dynamic shared memory). ``simt.cpp`` runs a block as one fiber per CUDA thread: a lane
runs until a barrier, shuffle, vote, ldmatrix or mma and waits there for the others. Then the result of the instruction
is computed in its documented fragment layout, with float32 accumulation. Index arithmetic, layouts, masks, barriers and
reductions are therefore those of the kernel. Time, occupancy, memory visibility between blocks, the last bit of the
approximate functions and the order in which a tensor core adds are not modelled.

The emulator is stricter than a GPU. Dynamic shared memory and every buffer start as NaN and lie next to inaccessible
pages; a cp.async writes NaN first and its data only at the wait that covers it. Misaligned vector accesses,
out-of-range array indices, mismatched collectives and deadlocks are reported as launch errors that name the block and
the thread. A schedule seed shuffles the order in which warps and lanes run: kernels without races give the same bits
for every seed.

$SWINKERNELS_EMULATION_FLAGS is added to the compiler's flags: -O0 compiles in a quarter of the time but runs slower.
"""

from __future__ import annotations

import concurrent.futures
import ctypes
import fcntl
import functools
import hashlib
import math
import os
import platform
import re
import shlex
import shutil
import subprocess
import tempfile
import weakref
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from swinkernels.ops import _arguments
from swinkernels.ops.window_attention import spec_of
from swinkernels.testing import WindowAttentionCase, run_case
from swinkernels.window_spec import WindowSpec

_HERE = Path(__file__).resolve().parent
_CSRC = _HERE.parents[1] / "csrc"
_TORCH = Path(torch.__file__).parent
_FLAGS = [
    "-std=c++20",
    "-O2",
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-gnu-unique",
    "-ffp-contract=off",
    "-Wno-unknown-pragmas",
]
_KERNEL_FLAGS = [
    "-Os",  # takes two thirds of the time of -O2 to compile, and the kernels run almost as fast
    "-fsanitize=alignment,bounds,shift,integer-divide-by-zero",
    "-fsanitize-undefined-trap-on-error",
]
# Flags for sources that include torch.
_BINDING_FLAGS = [
    "-DSWINKERNELS_WITH_CUDA",
    "-DSWINKERNELS_WITHOUT_CPU",
    "-DTORCH_TARGET_VERSION=0x020b000000000000",
]
_COMPILE_JOBS = 2


def compiler() -> str | None:
    """Return the path of $CXX (g++ by default), or None. It must be GCC: Clang lacks -fno-gnu-unique."""
    return shutil.which(os.environ.get("CXX", "g++"))


def missing() -> str | None:
    """Return the reason why the emulator cannot be built here, or None."""
    if platform.system() != "Linux":
        return "the emulator needs Linux"
    if compiler() is None:
        return "no C++ compiler (g++, or the one that $CXX names) to build the emulator with"
    return None


def _cpu() -> str:
    """Return the CPU's model and features, a part of the cache key because objects are compiled for this CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return "".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))
    except OSError:
        return platform.processor()


@functools.cache
def _read(path: Path) -> tuple[bytes, tuple[Path, ...]]:
    """Return the content of ``path``, and the files of this repository that it may include, on any include path."""
    content = path.read_bytes()
    names = re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', content.decode(), re.MULTILINE)
    folders = (path.parent, _HERE / "include", _CSRC)
    found = ((folder / name).resolve() for name in names for folder in folders)
    return content, tuple(included for included in found if included.is_file())


def _with_included(source: Path) -> set[Path]:
    """Return ``source`` and the files of this repository that it may include, directly or indirectly."""
    found = {source}
    waiting = [source]
    while waiting:
        new = set(_read(waiting.pop())[1]) - found
        found |= new
        waiting += new
    return found


def build(name: str, sources: Sequence[Path]) -> Path:
    """Return the path of the shared library of ``sources`` and the engine; compile it unless it is in the cache."""
    cxx = compiler()
    assert cxx is not None, missing()
    version = subprocess.run([cxx, "--version"], capture_output=True, text=True, check=True).stdout
    native = ["-march=native"] if platform.machine() == "x86_64" else []
    flags, added = [*_FLAGS, *native], shlex.split(os.environ.get("SWINKERNELS_EMULATION_FLAGS", ""))
    common = hashlib.sha256(repr((version, flags, _KERNEL_FLAGS, added, _cpu())).encode())
    cache = Path(tempfile.gettempdir()) / f"swinkernels-emulation-{os.getuid()}"
    cache.mkdir(mode=0o700, exist_ok=True)

    def key(source: Path, *options: object) -> str:
        digest = common.copy()
        digest.update(repr(options).encode())
        for path in sorted(_with_included(source)):
            digest.update(str(path.relative_to(_HERE.parents[1])).encode() + b"\0" + _read(path)[0])
        return digest.hexdigest()[:24]

    def compile_one(source: Path) -> Path:
        with_torch = _includes_torch(source)
        includes = [f"-I{_HERE / 'include'}", f"-I{_CSRC}"]
        extra = _KERNEL_FLAGS if source.suffix == ".cu" else []
        options: list[object] = []
        if with_torch:
            extra = [*_BINDING_FLAGS, "-isystem", str(_TORCH / "include")]
            options = [_BINDING_FLAGS, torch.__version__]
        if extra:
            twins = _HERE / "include" / ("binding_twins.h" if with_torch else "twins.h")
            options.append(key(twins, *options))
            # Precompile the header, which takes a second to parse. GCC looks for header.gch before header.
            header = cache / f"{twins.stem}-{options[-1]}.h"
            header.write_text(f"#include <{twins.name}>\n")
            _make(
                header.with_suffix(".h.gch"), [cxx, *flags, *includes, *extra, *added, "-x", "c++-header", str(header)]
            )
            includes = ["-include", str(header), *includes]
        out = cache / f"{source.stem}-{key(source, *options)}.o"
        _make(out, [cxx, *flags, *includes, *extra, *added, "-x", "c++", "-c", str(source)])
        return out

    with concurrent.futures.ThreadPoolExecutor(_COMPILE_JOBS) as pool:
        objects = list(pool.map(compile_one, [_HERE / "simt.cpp", *sources]))
    linked = cache / f"{name}-{hashlib.sha256(repr(objects).encode()).hexdigest()[:24]}.so"
    libraries = [f"-L{_TORCH / 'lib'}", "-ltorch_cpu"] if any(map(_includes_torch, sources)) else []
    _make(linked, [cxx, "-shared", "-Wl,-Bsymbolic", *map(str, objects), *libraries])
    return linked


def _includes_torch(source: Path) -> bool:
    return b"#include <torch/" in _read(source)[0]


def bindings_folder() -> Path:
    return _CSRC / "bindings"


def kernel_sources(op: str) -> list[Path]:
    """List the .cu files of the kernels of ``op``."""
    return sorted((_CSRC / "kernels" / "cuda" / op).rglob("*.cu"))


def _make(out: Path, command: list[str]) -> None:
    """Run the compiler ``command`` unless ``out`` exists. One process compiles; others wait and use its output."""
    with out.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if out.exists():
            return
        part = out.with_suffix(".part")
        done = subprocess.run([*command, "-o", str(part)], capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(command)}\n{done.stderr[-8000:]}")
        part.replace(out)  # atomic: if ``out`` exists, it is complete


class LaunchError(RuntimeError):
    """Raised if an emulated launch fails, with the emulator's message."""


class Launch(NamedTuple):
    """A launch: the kernel's mangled name, and the dynamic shared memory and number of threads per block."""

    kernel: str
    smem_bytes: int
    threads: int


class Library:
    """A compiled library of kernels: launches them and allocates their memory."""

    def __init__(self, path: Path):
        self.functions = ctypes.CDLL(str(path))
        self.functions.emulation_error.restype = ctypes.c_char_p
        self.functions.emulation_catches_faults.restype = ctypes.c_bool
        self.functions.emulation_allocate.restype = ctypes.c_void_p
        self.functions.emulation_allocate.argtypes = [ctypes.c_size_t, ctypes.c_size_t]
        self.functions.emulation_free.argtypes = [ctypes.c_void_p]
        self.functions.emulation_configure.argtypes = [ctypes.c_uint64, ctypes.c_int, ctypes.c_int]
        self.functions.emulation_next_launch.restype = ctypes.c_bool

    @property
    def catches_faults(self) -> bool:
        return bool(self.functions.emulation_catches_faults())

    def configure(self, seed: int = 0, multiprocessors: int = 2, shared_bytes: int = 227 * 1024) -> None:
        """Set the schedule seed, the number of multiprocessors and the shared memory per block for later launches.

        With seed 0, warps and lanes run in the order of their indices.
        """
        self.functions.emulation_configure(seed, multiprocessors, shared_bytes)

    def check_schedules(
        self, call: Callable[[], dict[str, Tensor]], seeds: Sequence[int] = (1, 2), **options: int
    ) -> None:
        """Check that ``call`` returns the same bits with all ``seeds``; ``options`` are passed to :meth:`configure`.

        A missing barrier, or a sum in the order of arrival, would change the bits.
        """
        self.configure(**options)
        first = call()
        for seed in seeds:
            self.configure(seed=seed, **options)
            for name, x in call().items():
                assert torch.equal(first[name], x), f"{name} differs with schedule {seed}"

    @functools.cached_property
    def _kernels(self) -> dict[int, str]:
        """Return the mangled names of the functions by address, from the symbol table, as kernels are not exported."""
        table = subprocess.run(["nm", self.functions._name], capture_output=True, text=True, check=True).stdout
        symbols = {name: int(at, 16) for at, _, name in (x.split() for x in table.splitlines() if x[0] != " ")}
        known = ctypes.cast(self.functions.emulation_error, ctypes.c_void_p).value
        base = (known or 0) - symbols["emulation_error"]
        return {base + at: name for name, at in symbols.items()}

    def launches(self) -> list[Launch]:
        """Return the launches since the last call of this method, or the last 64 if there are more."""
        kernel, smem_bytes, threads = ctypes.c_void_p(), ctypes.c_size_t(), ctypes.c_int()
        found = []
        while self.functions.emulation_next_launch(*map(ctypes.byref, (kernel, smem_bytes, threads))):
            found.append(Launch(self._kernels[kernel.value or 0], smem_bytes.value, threads.value))
        return found

    def check(self, status: int) -> None:
        if status != 0:
            message = self.functions.emulation_error().decode()
            raise LaunchError(f"cudaError {status}: {message or 'refused by the launch function'}")

    def empty(self, shape: Sequence[int], dtype: torch.dtype, *, alignment: int = 16) -> Tensor:
        """Allocate a tensor of NaN (all bits set) that ends at an inaccessible page."""
        count = math.prod(shape)
        if count == 0:
            return torch.empty(tuple(shape), dtype=dtype)
        address = self.functions.emulation_allocate(count * dtype.itemsize, alignment)
        if not address:
            raise MemoryError(f"no memory for {count} elements")
        memory = (ctypes.c_char * (count * dtype.itemsize)).from_address(address)
        weakref.finalize(memory, self.functions.emulation_free, address)
        return torch.frombuffer(memory, dtype=dtype).reshape(tuple(shape))

    def copy(self, x: Tensor) -> Tensor:
        return self.empty(x.shape, x.dtype).copy_(x)


@functools.cache
def self_test_library() -> Library:
    return Library(build("self_test", [_HERE / "self_test.cu"]))


class FeatureMap(ctypes.Structure):
    """Mirrors FeatureMap of csrc/params/feature_map.h."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("batch_stride", ctypes.c_int64),
        ("axis_stride", ctypes.c_int64 * 3),
    ]


class FrameGeometry(ctypes.Structure):
    """Mirrors FrameGeometry of csrc/params/frame.h."""

    _fields_ = [
        *((name, ctypes.c_int32 * 3) for name in ("size", "window", "shift", "frame", "num_windows", "pad_before")),
        ("roll_then_pad", ctypes.c_bool),
    ]

    def fill(
        self,
        size: Sequence[int],
        window: Sequence[int],
        shift: Sequence[int],
        pad_before: Sequence[int],
        pad_order: str,
    ) -> None:
        num_windows = [-(-s // w) for s, w in zip(size, window, strict=True)]
        for name, values, leading in (
            ("size", size, 1),
            ("window", window, 1),
            ("shift", shift, 0),
            ("frame", [n * w for n, w in zip(num_windows, window, strict=True)], 1),
            ("num_windows", num_windows, 1),
            ("pad_before", pad_before, 0),
        ):
            getattr(self, name)[:] = three(values, leading)
        self.roll_then_pad = pad_order == "roll_then_pad"


class _TokenMap(FeatureMap):
    _fields_ = [("head_stride", ctypes.c_int64)]


class _Geometry(FrameGeometry):
    _fields_ = [
        ("table_window", ctypes.c_int32 * 3),
        ("periodic", ctypes.c_bool * 3),
        ("grid", ctypes.c_bool),
        ("key_margin", ctypes.c_int32 * 3),
        ("table_pairs", ctypes.c_bool * 3),
    ]


class _Forward(ctypes.Structure):
    _fields_ = [
        ("dtype", ctypes.c_int32),
        ("allow_tf32", ctypes.c_bool),
        ("num_heads", ctypes.c_int32),
        ("head_dim", ctypes.c_int32),
        ("batch", ctypes.c_int64),
        ("geometry", _Geometry),
        ("scale", ctypes.c_float),
        ("mask_value", ctypes.c_float),
        ("q", _TokenMap),
        ("k", _TokenMap),
        ("v", _TokenMap),
        ("out", _TokenMap),
        ("lse", ctypes.c_void_p),
        ("bias_table", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("bias_types", ctypes.c_int32),
        ("axis_tables", ctypes.c_void_p),
        ("axis_rows", ctypes.c_int32 * 3),
        ("logit_scale", ctypes.c_void_p),
        ("pad_qkv", ctypes.c_void_p),
        ("region_map", ctypes.c_void_p),
        ("dropout_p", ctypes.c_float),
        ("dropout_seed", ctypes.c_void_p),
    ]


class _Backward(ctypes.Structure):
    _fields_ = [
        ("forward", _Forward),
        ("dout", _TokenMap),
        ("dq", _TokenMap),
        ("dk", _TokenMap),
        ("dv", _TokenMap),
        ("dbias_table", ctypes.c_void_p),
        ("dbias", ctypes.c_void_p),
        ("daxis_tables", ctypes.c_void_p),
        ("dlogit_scale", ctypes.c_void_p),
        ("dpad_qkv", ctypes.c_void_p),
        ("workspace", ctypes.c_void_p),
    ]


DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
WORKSPACE_ALIGNMENT = 256  # torch's CUDA allocator aligns memory to at least this


def pointer(x: Tensor | None) -> int | None:
    return None if x is None or x.numel() == 0 else x.data_ptr()


def three(values: Sequence[Any], leading: Any) -> list[Any]:
    """Return one value for each of three axes, with ``leading`` for leading axes without a value."""
    return [leading] * (3 - len(values)) + list(values)


def _token_map(x: Tensor) -> _TokenMap:
    """Build the TokenMap of ``x``, (B, D, H, W, num_heads, head_dim)."""
    assert x.dim() == 6 and x.stride(-1) == 1
    batch, d, h, w, head, _ = x.stride()
    return _TokenMap(pointer(x), batch, (ctypes.c_int64 * 3)(d, h, w), head)


class Arguments(NamedTuple):
    """The arguments of a call after validation, with defaults filled in and axis tables concatenated."""

    spec: WindowSpec
    size: tuple[int, ...]
    num_heads: int
    head_dim: int
    bias_table: Tensor | None
    bias: Tensor | None
    logit_scale: Tensor | None
    pad_qkv: Tensor | None
    region_map: Tensor | None
    axis_tables: Tensor | None  # of all axes


class _Call:
    """A forward call and the data for its backward call.

    ``spread`` leaves gaps between the rows of the maps; ``separate`` stores q, k and v (and their gradients) in three
    tensors.
    """

    def __init__(
        self,
        library: WindowAttentionLibrary,
        args: Arguments,
        qkv: Tensor,
        *,
        allow_tf32: bool = False,
        spread: bool = False,
        separate: bool = False,
        seed: int | None = None,
    ):
        self.library, self.args, self.shape = library, args, qkv.shape
        self.spread, self.separate = spread, separate
        self.heads = (args.num_heads, args.head_dim)
        self.map = (qkv.shape[0], *three(args.size, 1))
        spec = args.spec
        frame = _arguments.frame_size(args.size, spec.window_size)
        num_windows = [p // w for p, w in zip(frame, spec.window_size, strict=True)]
        pad_qkv, region_map = args.pad_qkv, args.region_map
        self.qkv = self._empty_map((3, *self.heads), qkv.dtype).copy_(qkv.reshape(*self.map, 3, *self.heads))
        self.out = self._empty_map(self.heads, qkv.dtype)
        lse_shape = (qkv.shape[0], math.prod(num_windows), args.num_heads, spec.volume)
        self.lse = library.empty(lse_shape, torch.float32)
        self.tables = {
            name: library.copy(x.detach().float().contiguous())
            for name in ("bias_table", "bias", "logit_scale", "axis_tables")
            if (x := getattr(args, name)) is not None
        }
        self.seed = None if seed is None else library.copy(torch.tensor([seed]))
        self.pad_qkv = None
        if pad_qkv is not None and frame != args.size:
            self.pad_qkv = library.copy(pad_qkv.detach().to(qkv.dtype))
        self.region_map = None if region_map is None else library.copy(region_map.to(torch.int32))

        geometry = _Geometry()
        geometry.fill(args.size, spec.window_size, spec.shift_size, spec.pad_before, spec.pad_order)
        geometry.table_window[:] = three(spec.table_window, 1)
        geometry.periodic[:] = three(spec.periodic, False)
        geometry.grid = spec.grid
        geometry.table_pairs[:] = three(spec.table_pairs, False)
        self.params = _Forward(
            DTYPES[qkv.dtype],
            allow_tf32,
            *self.heads,
            qkv.shape[0],
            geometry,
            spec.scale,
            spec.mask_value,
            *(_token_map(x) for x in self.qkv.unbind(4)),
            _token_map(self.out),
            lse=pointer(self.lse),
            **{name: pointer(x) for name, x in self.tables.items()},
            axis_rows=(ctypes.c_int32 * 3)(
                *three([2 * w - 1 for w in spec.window_size] if spec.axis_tables else (), 0)
            ),
            bias_types=spec.table_types if args.bias is None or args.bias.dim() == 3 else args.bias.shape[0],
            pad_qkv=pointer(self.pad_qkv),
            region_map=pointer(self.region_map),
            dropout_p=spec.dropout_p,
            dropout_seed=pointer(self.seed),
        )

    def _empty_map(self, channels: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        if self.separate and len(channels) == 3:
            return self.library.empty((channels[0], *self.map, *channels[1:]), dtype).movedim(0, 4)
        shape = (*self.map, *channels)
        if not self.spread:
            return self.library.empty(shape, dtype)
        vector = 16 // dtype.itemsize  # rows keep their alignment
        whole = self.library.empty([*(s + 1 for s in shape[:-1]), shape[-1] + vector], dtype)
        return whole[tuple(slice(s) for s in shape)]

    def forward(self, needs_lse: bool = True) -> dict[str, Tensor]:
        self.params.lse = pointer(self.lse) if needs_lse else None
        self.library.check(self.library.functions.emulated_forward(ctypes.byref(self.params)))
        shape = (self.shape[0], *self.args.size, math.prod(self.heads))
        return {"out": self.out.reshape(shape).clone(), "lse": self.lse}

    def backward(self, dout: Tensor, wanted: Collection[str]) -> dict[str, Tensor]:
        """Run the backward pass; return dqkv and, in float32, the gradients of the tensors named in ``wanted``."""
        library, functions = self.library, self.library.functions
        dout = self._empty_map(self.heads, self.qkv.dtype).copy_(dout.reshape(self.out.shape))
        gradients = {"dqkv": self._empty_map((3, *self.heads), self.qkv.dtype)}
        shapes = {**{name: x.shape for name, x in self.tables.items()}, "pad_qkv": (3, *self.heads)}
        for name in wanted:
            gradients[f"d{name}"] = library.empty(shapes[name], torch.float32)
        params = _Backward(self.params, _token_map(dout), *(_token_map(x) for x in gradients["dqkv"].unbind(4)))
        params.forward.out = _TokenMap()
        for name in wanted:
            setattr(params, f"d{name}", pointer(gradients[f"d{name}"]))
        workspace_bytes = functions.emulated_backward_workspace_bytes(ctypes.byref(params))
        workspace = library.empty((workspace_bytes,), torch.uint8, alignment=WORKSPACE_ALIGNMENT)
        params.workspace = pointer(workspace)
        library.check(functions.emulated_backward(ctypes.byref(params)))
        gradients["dqkv"] = gradients["dqkv"].reshape(self.shape)
        return {name: x.clone() for name, x in gradients.items()}


# The tensors that may require gradients, besides the maps.
_DIFFERENTIABLE = ("bias_table", "bias", "logit_scale", "pad_qkv", "axis_tables")


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx, library, args, allow_tf32, seed, qkv, *tensors):
        ctx.call = _Call(library, args, qkv, allow_tf32=allow_tf32, seed=seed)
        return ctx.call.forward()["out"]

    @staticmethod
    def backward(ctx, dout):
        args = ctx.call.args
        wanted = [n for n, needed in zip(_DIFFERENTIABLE, ctx.needs_input_grad[5:], strict=True) if needed]
        gradients = ctx.call.backward(dout, wanted)
        tensors = {name: getattr(args, name) for name in wanted}
        sums = {name: gradients[f"d{name}"].reshape(x.shape).to(x.dtype) for name, x in tensors.items()}
        return *(None,) * 4, gradients["dqkv"], *(sums.get(name) for name in _DIFFERENTIABLE)


class WindowAttentionLibrary(Library):
    """The window attention kernels as a differentiable function of CPU tensors."""

    def __init__(self, path: Path):
        super().__init__(path)
        f = self.functions
        for name in ("sizeof_forward_params", "sizeof_backward_params", "emulated_backward_workspace_bytes"):
            getattr(f, name).restype = ctypes.c_int64
        f.short16_takes.restype = ctypes.c_bool
        assert f.sizeof_forward_params() == ctypes.sizeof(_Forward), "mirror differs from csrc/params"
        assert f.sizeof_backward_params() == ctypes.sizeof(_Backward), "mirror differs from csrc/params"

    @staticmethod
    def normal_form(qkv: Tensor, bias_table: Tensor | None, *, num_heads: int, **arguments: Any) -> Arguments:
        op = "window_attention_qkvpacked"
        x = _arguments.check_qkvpacked(op, qkv, num_heads)
        tables = {"bias_table": bias_table, **{n: arguments.get(n) for n in Arguments._fields[5:]}}
        spec = spec_of(op, x, x.shape[1:-3], x.shape[-1], num_heads=num_heads, bias_table=bias_table, **arguments)
        if tables["axis_tables"] is not None:
            tables["axis_tables"] = torch.cat(tuple(tables["axis_tables"]))
        return Arguments(spec, tuple(x.shape[1:-3]), num_heads, x.shape[-1], **tables)

    def window_attention_qkvpacked(
        self,
        qkv: Tensor,
        bias_table: Tensor | None = None,
        *,
        allow_tf32: bool = False,
        dropout_seed: int = 0,
        **arguments: Any,
    ) -> Tensor:
        """Compute ``swinkernels.window_attention_qkvpacked`` and its gradients with the emulated CUDA kernels."""
        args = self.normal_form(qkv, bias_table, **arguments)
        return _Attend.apply(
            self, args, allow_tf32, dropout_seed, qkv, *(getattr(args, name) for name in _DIFFERENTIABLE)
        )

    def run(
        self,
        qkv: Tensor,
        dout: Tensor,
        bias_table: Tensor | None = None,
        *,
        allow_tf32: bool = False,
        spread: bool = False,
        separate: bool = False,
        **arguments: Any,
    ) -> dict[str, Tensor]:
        """Run both passes without autograd; return out, lse and all gradients as the kernels write them."""
        args = self.normal_form(qkv, bias_table, **arguments)
        call = _Call(self, args, qkv, allow_tf32=allow_tf32, spread=spread, separate=separate)
        results = call.forward()
        return {**results, **call.backward(dout, [n for n in _DIFFERENTIABLE if getattr(args, n) is not None])}

    def infer(self, qkv: Tensor, bias_table: Tensor | None = None, **arguments: Any) -> Tensor:
        """Return the output of a forward pass without lse."""
        call = _Call(self, self.normal_form(qkv, bias_table, **arguments), qkv)
        return call.forward(needs_lse=False)["out"]

    def check_isolation(self, case: WindowAttentionCase) -> None:
        """Check that infinities in a map's first window do not change the windows that its block processes later."""
        inputs, width = case.inputs(torch.bfloat16), case.window_tuple[-1]
        self.configure(multiprocessors=1)
        expected = run_case(self.window_attention_qkvpacked, inputs, case.arguments())
        inputs["qkv"][0, :, :width] = torch.inf
        got = run_case(self.window_attention_qkvpacked, inputs, case.arguments())
        for name in ("out", "dqkv"):
            assert got[name][0, :, :width].isnan().any()
            assert torch.equal(got[name][0, :, width:], expected[name][0, :, width:]), name
            assert torch.equal(got[name][1:], expected[name][1:]), name

    def find_tokens(
        self, size: Sequence[int], window: Sequence[int], shift: Sequence[int], item: int = 0, batch: int = 1
    ) -> Tensor | None:
        """Return the token indices of window ``item``, as computed by the kernels for short windows in 16 bits.

        Return None if these kernels do not support maps of this size. Only the strides of the maps are used, so no map
        is allocated.
        """
        geometry, lead = _Geometry(), _TokenMap(None, 0, (ctypes.c_int64 * 3)(), 32)
        geometry.fill(size, window, shift, (0, 0), "pad_then_roll")
        geometry.table_window[:] = three(window, 1)
        lead.batch_stride, lead.axis_stride[1], lead.axis_stride[2] = 32 * size[0] * size[1], 32 * size[1], 32
        params = _Forward(DTYPES[torch.float16], False, 1, 32, batch, geometry, 1.0, 0.0, lead, lead, lead, lead)
        params.bias_types = 1
        numbers = self.empty((math.prod(window),), torch.int32)
        takes = self.functions.short16_takes(
            ctypes.byref(params), ctypes.c_uint32(item), ctypes.c_void_p(pointer(numbers))
        )
        return numbers.long() & 0xFFFFFFFF if takes else None

    def workspace_bytes(
        self, qkv: Tensor, wanted: Collection[str], bias_table: Tensor | None = None, **arguments: Any
    ) -> int:
        """Return the workspace size of the backward pass; ``wanted`` names the tables that need a gradient."""
        call = _Call(self, self.normal_form(qkv, bias_table, **arguments), qkv)
        maps = (_token_map(x) for x in call.qkv.unbind(4))
        params = _Backward(call.params, _token_map(call.out), *maps)  # nothing is read or written
        for name in wanted:
            setattr(params, f"d{name}", pointer(call.tables[name]))
        return self.functions.emulated_backward_workspace_bytes(ctypes.byref(params))


@functools.cache
def window_attention_library() -> WindowAttentionLibrary:
    own = [_HERE / "window_attention.cpp", _HERE / "short16.cu"]
    sources = [*own, *kernel_sources("window_attention")]
    return WindowAttentionLibrary(build("window_attention", sources))
