"""Tests that the instruction counter executes instructions as a GPU does, and that the kernels have not grown."""

from __future__ import annotations

import shutil
import subprocess
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import instructions, sass
from benchmarks.compiled import ROOT, architectures, missing
from swinkernels import reference


def _not_there() -> str | None:
    return missing("nvcc", "cuobjdump") or (
        None if shutil.which("g++") and shutil.which("nm") else "no g++ and nm to link with"
    )


needs_compiler = pytest.mark.skipif(_not_there() is not None, reason=str(_not_there()))


def _block(listing: str, threads: int = 32, parameters: bytes = b"", memory: sass.Memory | None = None) -> sass.Block:
    """Run ``listing``, in cuobjdump's syntax, on one block of ``threads`` threads, and return the block."""
    lines = [line for line in textwrap.dedent(listing).strip().splitlines() if line]
    text = "\n".join(f"        /*{16 * i:04x}*/   {line} ;" for i, line in enumerate(lines))
    code = sass.parse(f"\t\tFunction : kernel\n{text}")["kernel"]
    assert len(code) == len(lines)
    constants = np.frombuffer(bytes(16) + parameters, np.uint8).copy()
    launch = sass.Launch((1, 1, 1), (threads, 1, 1), constants)
    (block,) = sass.run_launch(sass.Program(code), launch, memory or sass.Memory())
    return block


def test_a_loop_with_lanes_that_leave_it_early() -> None:
    """Lane i runs i + 1 iterations; an instruction counts once however many lanes run it; all lanes reconverge."""
    block = _block(
        """
        S2R R0, SR_TID.X
        MOV R1, RZ
        BSSY B0, 0x70
        IADD3 R1, R1, 0x1, RZ
        ISETP.GT.AND P0, PT, R1, R0, PT
        @!P0 BRA 0x30
        BSYNC B0
        IMAD R2, R1, 0x3, R0
        @!PT LDS RZ, [RZ]
        EXIT
        """
    )
    (warp,) = block.warps
    lanes = np.arange(32)
    assert (warp.r[1] == lanes + 1).all()
    assert (warp.r[2] == 3 * (lanes + 1) + lanes).all()
    assert warp.counts.tolist() == [1, 1, 1, 32, 32, 32, 32, 1, 1, 1]


def test_warps_meet_at_barriers_and_exchange_through_shared_memory() -> None:
    block = _block(
        """
        S2R R0, SR_TID.X
        IMAD.SHL.U32 R1, R0, 0x4, RZ
        STS [R1+0x400], R0
        BAR.SYNC.DEFER_BLOCKING 0x0
        LOP3.LUT R2, R1, 0xfc, RZ, 0x3c, !PT
        LDS R3, [R2+0x400]
        EXIT
        """,
        threads=64,
    )
    assert [w.r[3].tolist() for w in block.warps] == [list(range(63, 31, -1)), list(range(31, -1, -1))]
    with pytest.raises(sass.Fault, match="never arrive"):
        _block(
            """
            S2R R0, SR_TID.X
            ISETP.GE.AND P0, PT, R0, 0x4, PT
            BSSY B0, 0x60
            @P0 BRA 0x50
            BSYNC B0
            BAR.SYNC.DEFER_BLOCKING 0x0
            EXIT
            """
        )


@pytest.mark.parametrize(
    ("stride", "size", "passes"),
    [(4, "", 1), (8, "", 2), (128, "", 32), (0, "", 1), (16, ".128", 4), (128, ".128", 32)],
)
def test_passes_over_the_banks(stride: int, size: str, passes: int) -> None:
    block = _block(f"S2R R0, SR_TID.X\nIMAD R1, R0, {stride:#x}, RZ\nLDS{size} R4, [R1+0x400]\nEXIT")
    assert block.warps[0].passes.tolist() == [0, 0, passes, 0]


def test_sixty_four_bits_by_carries() -> None:
    a, b = 0x1_FFFF_FFF0, 0x2_0000_0020
    parameters = np.array([a, b], np.uint64).tobytes()
    block = _block(
        """
        LDC.64 R2, c[0x0][0x10]
        ULDC.64 UR4, c[0x0][0x18]
        IADD3 R6, P0, R2, UR4, RZ
        IADD3.X R7, R3, UR5, RZ, P0, !PT
        IADD3 R8, P1, -R2, UR4, RZ
        IADD3.X R9, ~R3, UR5, RZ, P1, !PT
        ISETP.GE.U32.AND P2, PT, R2, UR4, PT
        ISETP.GE.U32.AND.EX P3, PT, R3, UR5, PT, P2
        LEA.HI.X R10, R2, UR4, R3, 0x4, P0
        IMAD.WIDE.U32 R12, R2, 0x10, R2
        SHF.R.U64 R14, R2, 0x4, R3
        EXIT
        """,
        parameters=parameters,
    )
    (warp,) = block.warps

    def pair(register: int) -> int:
        return int(warp.r[register][0]) | int(warp.r[register + 1][0]) << 32

    assert pair(6) == a + b
    assert pair(8) == b - a
    assert not warp.p[3].any()
    assert int(warp.r[10][0]) == ((a << 4) >> 32 & 0xFFFFFFFF) + (b & 0xFFFFFFFF) + 1
    assert pair(12) == (a & 0xFFFFFFFF) * 16 + a
    assert int(warp.r[14][0]) == a >> 4 & 0xFFFFFFFF


def test_matrix_products_and_their_copies() -> None:
    """cp.async, ldmatrix with and without transposition, and mma with float32 accumulators give numpy's product."""
    memory = sass.Memory()
    values = np.random.default_rng(0).integers(-4, 5, (2, 16, 8)).astype(np.float32)
    halves = values.astype(np.float16)
    out = np.zeros((16, 8), np.float32)
    addresses = np.array([memory.take(halves), memory.take(out)], np.uint64).tobytes()
    _block(
        """
        S2R R0, SR_TID.X
        IMAD.SHL.U32 R1, R0, 0x10, RZ
        LDC.64 R2, c[0x0][0x10]
        IADD3 R4, P0, R2, R1, RZ
        IADD3.X R5, R3, RZ, RZ, P0, !PT
        LDGSTS.E.BYPASS.128 [R1+0x400], desc[UR4][R4.64]
        LDSM.16.M88.2 R8, [R1+0x400]
        LDSM.16.MT88.2 R10, [R1+0x500]
        HMMA.1688.F32 R12, R8, R10, RZ
        SHF.R.U32.HI R6, RZ, 0x2, R0
        LOP3.LUT R7, R0, 0x3, RZ, 0xc0, !PT
        IMAD.SHL.U32 R6, R6, 0x20, RZ
        LEA R6, R7, R6, 0x3
        LDC.64 R2, c[0x0][0x18]
        IADD3 R4, P0, R2, R6, RZ
        IADD3.X R5, R3, RZ, RZ, P0, !PT
        STG.E.64 desc[UR4][R4.64], R12
        STG.E.64 desc[UR4][R4.64+0x100], R14
        EXIT
        """,
        parameters=addresses,
        memory=memory,
    )
    # B is stored row-major (k x n), so its fragments are loaded by the transposing ldmatrix.
    assert np.array_equal(out, values[0] @ values[1][:8])


def test_what_a_predicate_switches_off_has_no_address() -> None:
    """An instruction with a false predicate is issued and counted; its address register may contain any value."""
    block = _block("MOV R1, 0x3eb4d23a\n@!PT STSM.16.M88.4 [R1], R4\n@!PT LDSM.16.M88.4 R4, [R1]\nEXIT")
    assert block.warps[0].counts.tolist() == [1, 1, 1, 1]
    assert block.warps[0].passes.tolist() == [0, 0, 0, 0]
    with pytest.raises(sass.Fault, match="is not aligned"):
        _block("MOV R1, 0x3eb4d23a\n@PT STSM.16.M88.4 [R1], R4\nEXIT")


def test_unknown_instructions_and_addresses_are_refused() -> None:
    with pytest.raises(sass.UnknownInstruction, match=r"FROB.X R0, R1 at 0x0.*no function for FROB"):
        _block("FROB.X R0, R1\nEXIT")
    assert _block("EXIT\nFROB.X R0, R1").warps[0].counts.tolist() == [1, 0]  # FROB.X is not executed
    with pytest.raises(sass.Fault, match="belongs to no argument"):
        _block("LDG.E R0, desc[UR4][R2.64]\nEXIT")


def _row(**changed: Any) -> dict[str, Any]:
    row = {"arch": "sm_90", "kernel": "fwd", "case": "w7 d32 bf16", "per_window_head": 1000, "compiler": "nvcc 13.0.88"}
    return {**row, **changed}


def test_growth_is_found_under_the_same_compiler() -> None:
    before = [_row(), _row(kernel="bwd", per_window_head=2000)]
    assert instructions.grown([_row(per_window_head=1020)], before) == []
    assert instructions.grown([_row(per_window_head=1021), _row(kernel="bwd", per_window_head=1)], before) == [
        "sm_90 fwd w7 d32 bf16: 1000 instructions became 1021"
    ]
    with pytest.raises(instructions.NoBaseline, match=r"no count of nvcc 13.1.0 .* only of nvcc 13.0.88: .*--update"):
        instructions.grown([_row(compiler="nvcc 13.1.0")], before)


def test_an_update_replaces_what_it_counted_and_keeps_the_rest() -> None:
    before = [_row(), _row(compiler="nvcc 12.9.0"), _row(kernel="bwd")]
    after = instructions.merged([_row(per_window_head=900)], before)
    assert sorted((r["compiler"], r["kernel"], r["per_window_head"]) for r in after) == [
        ("nvcc 12.9.0", "fwd", 1000),
        ("nvcc 13.0.88", "bwd", 1000),
        ("nvcc 13.0.88", "fwd", 900),
    ]


def test_blocks_per_multiprocessor() -> None:
    device = instructions.DEVICES["sm_90"]
    assert instructions.blocks_per_multiprocessor(device, 120, 31872, 4) == 4  # registers are the limit: 16 warps
    assert instructions.blocks_per_multiprocessor(device, 157, 75776, 4) == 3
    assert instructions.blocks_per_multiprocessor(device, 32, 100 * 1024, 4) == 2  # shared memory is the limit
    assert instructions.blocks_per_multiprocessor(device, 16, 0, 2) == 32


def test_committed_counts() -> None:
    """The columns read by other code come first, and every architecture has rows for the hot cases."""
    rows = instructions.read(instructions.BASELINE)
    named = "arch,kernel,case,per_window_head,registers,shared_bytes,warps_per_sm,compiler,commit"
    assert ",".join(rows[0]).startswith(named)
    found = {(row["arch"], row["kernel"], row["case"]) for row in rows}
    assert found >= {(arch, c.kernel, c.name) for arch in ("sm_80", "sm_90") for c in instructions.HOT}
    for row in rows:
        classes = sum(int(row[name]) for name in instructions.CLASSES)
        assert abs(classes - int(row["per_window_head"])) <= len(instructions.CLASSES)  # each is rounded


def _bits(x: torch.Tensor) -> np.ndarray:
    return x.detach().contiguous().view(torch.int16).numpy().view(np.uint16)


def _from_bits(x: np.ndarray, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.from_numpy(x.view(np.int16).copy()).view(torch.bfloat16).reshape(shape).double()


@needs_compiler
@pytest.mark.long
@pytest.mark.parametrize("arch", ["sm_90"])
def test_what_is_executed_is_attention(arch: str) -> None:
    """The right code is counted: executed on data, it computes the reference's output and gradients."""
    forward = instructions.Case("fwd", (7, 7), lse=True)
    backward = instructions.Case("bwd", (7, 7))
    torch.manual_seed(0)
    qkv = torch.randn(1, 14, 7, 96).bfloat16()
    dout = torch.randn(1, 14, 7, 32).bfloat16()
    table = torch.randn(169, 1)
    fill = {"qkv": _bits(qkv), "bias_table": table.numpy()}
    arguments: dict[str, Any] = {"batch": 1, "windows": 2, "shift": (0, 3, 3)}
    done = instructions.run(instructions.Build(ROOT, arch, "fwd", "bf16"), forward, fill=fill, **arguments)
    fill |= {"dout": _bits(dout), "lse": done.arrays["lse"]}
    undone = instructions.run(instructions.Build(ROOT, arch, "bwd", "bf16"), backward, fill=fill, **arguments)

    inputs = [x.double().requires_grad_() for x in (qkv, table)]
    expected = reference.window_attention_qkvpacked(*inputs, num_heads=1, window_size=7, shift_size=3)
    dqkv, dtable = torch.autograd.grad(expected, inputs, dout.double())
    torch.testing.assert_close(_from_bits(done.arrays["out"], (1, 14, 7, 32)), expected.detach(), rtol=0.02, atol=0.02)
    torch.testing.assert_close(_from_bits(undone.arrays["dqkv"], (1, 14, 7, 96)), dqkv, rtol=0.03, atol=0.03)
    found = torch.from_numpy(undone.arrays["dbias_table"]).double().reshape(169, 1)
    torch.testing.assert_close(found, dtable, rtol=0.03, atol=0.03)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("arch", [pytest.param("sm_80", marks=pytest.mark.long), "sm_90"])
def test_kernels_have_not_grown(arch: str) -> None:
    """If growth is intended, ``python -m benchmarks.instructions --update`` records a new baseline."""
    if arch not in architectures():
        pytest.skip(f"{instructions.compiler()} does not compile for {arch}")
    rows = list(instructions.count(ROOT, [arch], instructions.HOT))
    try:
        grown = instructions.grown(rows, instructions.read(instructions.BASELINE))
    except instructions.NoBaseline as reason:
        pytest.skip(str(reason))
    assert not grown, "\n".join(grown)


@needs_compiler
def test_another_checkout_must_be_one(tmp_path: Path) -> None:
    assert instructions.main(["--source", str(tmp_path), "--arch", "sm_90"]) == 2
    with pytest.raises(SystemExit):
        instructions.main(["--case", "w5 d32 bf16"])


def test_the_command_lists_its_cases() -> None:
    command = ["python", "-m", "benchmarks.instructions", "--list", "--kernel", "fwd"]
    said = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout.splitlines()
    assert "fwd  w7 d32 bf16" in said
    assert len(said) == len({*said}) == sum(c.kernel == "fwd" for c in instructions.CASES)
