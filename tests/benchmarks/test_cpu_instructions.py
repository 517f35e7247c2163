"""Tests that the CPU kernels have at most 2% more instructions than the baseline, and that the counts are correct."""

from __future__ import annotations

import os

import pytest

from benchmarks import compare, cpu_instructions
from benchmarks.cpu_instructions import CASES, KEYS


def row(**changes: object) -> dict[str, object]:
    row = {"arch": "avx2", "kernel": "forward", "case": "7x7", "instructions": 1000}
    return {**row, "of_functions": "softmax: 600; matmul: 400", "compiler": "GCC 12", **changes}


@pytest.mark.parametrize("arch", cpu_instructions.ARCHS)
def test_no_kernel_grew(arch):
    try:
        rows = cpu_instructions.count(arch)
        grown = compare.grown(rows, compare.read_baseline(cpu_instructions.BASELINE), KEYS)
    except (cpu_instructions.Missing, compare.NoBaselineError) as error:
        pytest.skip(str(error))
    assert not grown, "\n".join(grown)


def test_counts_repeat():
    try:
        of = cpu_instructions.objects()
        first, second = cpu_instructions.count_avx2(of, [("backward", CASES[-1], "bfloat16")] * 2)
    except cpu_instructions.Missing as error:
        pytest.skip(str(error))
    assert first == second
    assert first.total() > 1000
    assert first["backward_window"] > 1000


def test_growth_names_the_kernel_and_its_functions():
    before = [row(), row(case="8x8"), row(kernel="backward")]
    after = [row(instructions=1021, of_functions="softmax: 621; matmul: 400"), row(case="8x8", instructions=1020)]
    (line,) = compare.grown(after, before, KEYS)
    assert "avx2 forward, 7x7: 1000 to 1021 (2.1%)" in line
    assert "softmax 600 to 621" in line
    assert "matmul" not in line
    assert compare.grown([row(instructions=1)], before, KEYS) == []
    assert compare.grown([row(case="new"), row()], before, KEYS) == []


def test_another_compiler_has_no_baseline():
    with pytest.raises(compare.NoBaselineError, match="no baseline for GCC 13, only for: GCC 12"):
        compare.grown([row(compiler="GCC 13")], [row()], KEYS)
    with pytest.raises(compare.NoBaselineError, match="only for: none"):
        compare.grown([row()], [], KEYS)


def test_baselines_of_other_compilers_stay(tmp_path):
    path = tmp_path / "counts.csv"
    compare.write_baseline(path, [row(), row(case="8x8")])
    compare.write_baseline(path, [row(compiler="GCC 13", instructions=7)])
    compare.write_baseline(path, [row(instructions=8)])
    found = [(r["compiler"], r["case"], r["instructions"]) for r in compare.read_baseline(path)]
    assert found == [("GCC 12", "7x7", "8"), ("GCC 13", "7x7", "7")]


def test_own_costs_leave_out_calls():
    dump = "fn=(1) outer\n0 5\n+2 7\ncfn=(2) inner\ncalls=3 0\n0 900\n* 1\n\nfn=(2)\n0 300\nfn=(1)\n-1 2\n"
    assert cpu_instructions.own_costs(dump) == {"outer": 15, "inner": 300}


def test_innermost_loops():
    texts = {0: "mov", 1: "add", 2: "vfmadd", 3: "vmul", 4: "jne    2 <f+0x2>", 5: "cmp", 6: "jl     1 <f+0x1>"}
    texts |= {7: "jmp    a <f+0xa>", 8: "sub", 9: "jne    8 <f+0x8>", 10: "jmp    900 <g>", 11: "ret"}
    # There are three loops: 2..4, nested in 1..6, and 8..9. Forward jumps and jumps out of the function form no loops.
    assert cpu_instructions.innermost_loops(list(texts.items())) == [3, 2]


@pytest.mark.parametrize(
    ("name", "short"),
    [
        (
            "void swinkernels::cpu::avx2::(anonymous namespace)::tile<6, 2, false>(long, float const*)",
            "tile<6, 2, false>",
        ),
        ("swinkernels::cpu::avx512::(anonymous namespace)::Window::move_to(long) [clone .isra.0]", "move_to"),
        ("__memcpy_avx_unaligned_erms", "__memcpy_avx_unaligned_erms"),
    ],
)
def test_short_names(name, short):
    assert cpu_instructions.short_name(name) == short


def test_objects_older_than_their_sources(tmp_path, monkeypatch):
    monkeypatch.setattr(cpu_instructions, "ROOT", tmp_path)
    monkeypatch.setattr(cpu_instructions, "OBJECTS", tmp_path)
    with pytest.raises(cpu_instructions.Missing, match="has no object files of the CPU kernels: run make build"):
        cpu_instructions.objects()
    old = tmp_path / "window_attention.o"
    old.write_text("")
    assert cpu_instructions.objects() == [old]
    os.utime(old, (1, 1))
    with pytest.raises(cpu_instructions.Missing, match="older than their sources: run make build"):
        cpu_instructions.objects()
