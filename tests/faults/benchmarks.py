"""Planted faults in the computations and reports of the benchmarks."""

from __future__ import annotations

from tests.faults import Fault

FAULTS = {
    "benchmarks-bytes-of-the-backward-pass": Fault(
        "benchmarks/formulas.py",
        '"bwd": 7 * one',
        '"bwd": 8 * one',
        "tests/benchmarks/test_benchmarks.py::test_moved_bytes_of_the_goal",
    ),
    "benchmarks-roofline-of-the-faster": Fault(
        "benchmarks/timing.py",
        "return max(moved / self.bytes_per_us, flops / self.flops_per_us)",
        "return min(moved / self.bytes_per_us, flops / self.flops_per_us)",
        "tests/benchmarks/test_models.py::test_the_larger_of_bytes_and_flops_is_the_roofline",
    ),
    "benchmarks-slower-within-noise": Fault(
        "benchmarks/compare.py",
        'row["p20_us"] > was["p80_us"]',
        'row["p20_us"] > was["p20_us"]',
        "tests/benchmarks/test_report.py::test_compare",
    ),
    "benchmarks-wrong-results-have-percentages": Fault(
        "benchmarks/record.py",
        "counts = t if t is not None and result == RESULT_OK else None",
        "counts = t",
        "tests/benchmarks/test_benchmarks.py::test_a_wrong_result_has_a_time_but_no_percentage",
    ),
}
