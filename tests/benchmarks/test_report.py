"""Tests the benchmark command, its CSV files, and the tables, charts and comparisons generated from them."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import charts, commit, compare, contest, gpu_page, models, record, report, scaling, shapes
from benchmarks.timing import Ceiling, Timing, time_on_cpu
from swinkernels.testing import WindowAttentionCase

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def short_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorten the timing: the tests check the rows, but not the times in them."""
    monkeypatch.setattr(contest, "SECONDS", 0.01)
    monkeypatch.setattr(contest, "QUICK_SECONDS", 0.01)
    monkeypatch.setattr(contest, "time_on_cpu", functools.partial(time_on_cpu, rounds=2))


@pytest.fixture
def small_shape(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(shapes.ATTENTION, "small", WindowAttentionCase(4, (6, 9), 2, 8, 3, 1))
    return "small"


OPS = ("ops", "--device", "cpu", "--op", "window_attention", "--filter", "small", "--baseline", "reference", "eager")


# The command


def test_a_run_writes_rows_tables_and_pictures(small_shape: str, tmp_path: Path, capsys) -> None:
    assert command.main([*OPS, "--out", str(tmp_path / "a")]) == 0
    rows = record.read_csv(tmp_path / "a" / "ops.csv")
    assert {(r["backend"], r["direction"]) for r in rows} == {
        (name, direction) for name in ("reference", "eager") for direction in ("fwd", "fwd+bwd")
    }
    for row in rows:
        assert row["case"] == "b1-6x9-h2x8-w3-s1-table"  # the batch is 1 on a CPU
        assert row["result"] == "ok"
        assert 0 < row["p20_us"] <= row["median_us"] <= row["p80_us"]
        assert row["noisy"] in (True, False)
        assert row["percent_of_roofline"] == pytest.approx(100 * row["roofline_us"] / row["median_us"], rel=1e-4)
        assert row["seed"] == str(record.SEED)
        assert all(row[key] for key in ("device", "torch", "commit", "date", "ceiling_gb_per_s"))
    out = capsys.readouterr().out
    assert [path.name for path in (tmp_path / "a").glob("*.png")] == ["roofline.png"]  # no kernel of this package ran
    assert "4 rows in" in out
    assert "report.md" in out
    assert "| window_attention | b1-6x9-h2x8-w3-s1-table" in (tmp_path / "a" / "report.md").read_text()


def test_a_baseline_that_is_ours_is_drawn(small_shape: str, tmp_path: Path) -> None:
    """The chart of speed-ups needs a time of one of this package's kernels, so the extension must be built."""
    if "cpu" not in command.attention.contestants(CPU, ()):
        pytest.skip("the extension is not built")
    assert command.main([*OPS, "cpu", "--out", str(tmp_path)]) == 0
    assert {path.name for path in tmp_path.glob("*.png")} == {"summary.png", "speedup.png", "roofline.png"}
    assert "| small, batch 1, 6 x 9, 2 heads of 8, window 3, float32" in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ops", "--filter", "nothing"], "nothing matches on cpu"),
        (["ops", "--device", "cuda"], "torch sees no CUDA GPU"),
        (["ops", "--dtype", "float8"], "invalid choice: 'float8'"),
        (["ops", "--baseline", "nobody"], "invalid choice: 'nobody'"),
        (["dance"], "invalid choice: 'dance'"),
        (["report", "--results", "/nowhere"], "/nowhere has no folder with the CSV files of a run"),
        (["compare", "/nowhere.csv", "/nowhere.csv"], "/nowhere.csv is not a file"),
    ],
)
def test_wrong_arguments_are_refused(arguments: list[str], message: str, capsys) -> None:
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    device = ["--device", "cpu"] if arguments[0] == "ops" and "cuda" not in arguments else []
    with pytest.raises(SystemExit):
        command.main([*arguments, *device])
    assert message in capsys.readouterr().err


def test_without_a_kernel_of_ours_nothing_starts(small_shape: str, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(command.attention, "kernels", lambda device: {"cpu": "it is not built"})
    for wanted in ([], ["cpu", "eager"], ["accelerate"]):
        with pytest.raises(SystemExit):
            command.main(["ops", "--device", "cpu", "--filter", "small", *(["--baseline", *wanted] if wanted else [])])
        message = capsys.readouterr().err
        assert "no kernel of swinkernels can run on cpu (cpu: it is not built)" in message
        assert "--baseline reference eager sdpa" in message
    assert command.main([*OPS, "--out", str(tmp_path)]) == 0  # only other contestants were requested


def test_a_quick_run_on_a_cpu_compiles_nothing_and_draws(small_shape: str, tmp_path: Path, monkeypatch) -> None:
    if "cpu" not in command.attention.contestants(CPU, ()):
        pytest.skip("the extension is not built")
    monkeypatch.setattr(shapes, "QUICK", ("small",))
    monkeypatch.setattr(torch, "compile", None)
    assert command.main(["ops", "--device", "cpu", "--quick", "--out", str(tmp_path)]) == 0
    rows = record.read_csv(tmp_path / "ops.csv")
    assert {row["op"] for row in rows} == {"window_attention"}
    assert {row["backend"] for row in rows} == {"cpu", "reference", "eager", "sdpa"}
    assert {path.name for path in tmp_path.glob("*.png")} == {"summary.png", "speedup.png", "roofline.png"}


def test_a_missing_package_is_named_with_the_others(tmp_path: Path) -> None:
    (tmp_path / "tabulate.py").write_text("raise ModuleNotFoundError(\"No module named 'tabulate'\", name='tabulate')")
    command = [sys.executable, "-m", "benchmarks", "ops"]
    environ = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, cwd=commit.ROOT, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == (
        "The benchmarks need matplotlib, rich and tabulate (No module named 'tabulate'): "
        "pip install matplotlib rich tabulate\n"
    )


def test_results_are_not_overwritten(small_shape: str, tmp_path: Path, capsys) -> None:
    (tmp_path / "ops.csv").write_text("precious")
    with pytest.raises(SystemExit):
        command.main([*OPS, "--out", str(tmp_path)])
    assert "results are not overwritten" in capsys.readouterr().err
    assert (tmp_path / "ops.csv").read_text() == "precious"


def test_a_wrong_peer_is_shown_as_wrong(small_shape: str, tmp_path: Path, monkeypatch, capsys) -> None:
    right = command.attention.make_peer

    def off(*args: Any) -> Any:
        peer = right(*args)
        return lambda qkv, bias_table: peer(qkv, bias_table * 1.01)

    monkeypatch.setattr(command.attention, "make_peer", off)
    assert command.main([*OPS, "--out", str(tmp_path)]) == 0  # a wrong result of this package would fail the run
    assert "wrong results: eager at small" in capsys.readouterr().out
    wrong = [row for row in record.read_csv(tmp_path / "ops.csv") if row["result"] == record.RESULT_WRONG]
    assert {row["backend"] for row in wrong} == {"eager"}
    assert all(row["median_us"] > 0 and row["percent_of_roofline"] is None for row in wrong)


def test_a_library_without_a_switch_leaves_nothing_to_measure(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(command.models, "benchmark", lambda *args, **options: [])
    arguments = ["models", "--device", "cpu", "--filter", "swin_t", "--baseline", "fused", "--out", str(tmp_path)]
    assert command.main(arguments) == 2
    assert "none of fused exists for this choice" in capsys.readouterr().err


def options(*arguments: str) -> Any:
    parsed = command.parser().parse_args([*arguments, "--device", "cpu"])
    parsed.dtype = parsed.dtype or ["float32"]
    return parsed


def test_plans() -> None:
    """Every suite has tasks; "all" is the union of the suites; quick and filtered plans are subsets."""
    by_suite = {suite: {task.label for task in command.plan(options(suite), CPU)} for suite in command.HELP}
    assert all(by_suite.values())
    assert set(command.PLANS) == set(command.HELP)
    assert {(task.suite, task.label) for task in command.plan(options("all"), CPU)} == {
        (suite, label) for suite, labels in by_suite.items() for label in labels
    }
    for suite, labels in by_suite.items():
        quick = {task.label for task in command.plan(options(suite, "--quick"), CPU)}
        assert quick <= labels
        assert quick
    assert {task.label for task in command.plan(options("ops", "--filter", "swin_t.1", "--op", "layer_norm"), CPU)} == {
        "layer_norm swin_t.1 float32"
    }
    assert not {f"{name} float32" for name in shapes.LARGE_MODELS} & by_suite["models"]  # on a CPU
    asked = command.plan(options("models", "--filter", shapes.LARGE_MODELS[0]), CPU)
    assert [task.label for task in asked] == [f"{shapes.LARGE_MODELS[0]} float32"]
    both = command.plan(options("models", "--filter", "swin_t", "--dtype", "float32", "bfloat16"), CPU)
    assert [task.label for task in both] == ["swin_t float32", "swin_t bfloat16"]


def test_shapes_cover_what_is_published() -> None:
    attention = shapes.ATTENTION
    assert {c.window_size for n, c in attention.items() if n.startswith("swinv2")} == {8, 16, 24}
    assert attention["swin_ir"].head_dim == 30
    assert attention["video_swin_t.1"].window_size == (8, 7, 7)
    assert attention["weather.1"].window_size == (2, 6, 12)
    assert {c.image[-1] for c in shapes.MODELS.values() if c.library == "monai"} == {64, 96, 128}
    assert {c.image[-1] for n, c in shapes.MODELS.items() if n.startswith(("swin_b", "swin_l"))} == {224, 384}


# CSV files and their comparison


def row(backend: str, median: float | None, *, result: str = "ok", spread: float = 0.01, **labels: Any) -> dict:
    timing = None if median is None else Timing(median, median * (1 - spread), median * (1 + spread))
    named = {"suite": "ops", "op": "window_attention", "shape": "swin_t.1", "case": "b1-56x56-h3x32-w7-s3-table"}
    named |= {"dtype": "float32", "direction": "fwd", "backend": backend, **labels}
    limits = Ceiling(1e4, 1e5)
    extra = {"peak": 2**20, "first_call_s": 0.1, "host_us": 10.0}
    return record.row(named, result, 1.0, timing, ceiling=limits, moved=10**6, flops=10**8, **extra)


def with_environment(rows: list[dict]) -> list[dict]:
    return [{**r, **record.environment(CPU)} for r in rows]


def test_rows_come_back_as_they_were_written(tmp_path: Path) -> None:
    rows = [row("cpu", 123.456789, spread=0.2), row("eager", None, result="FAILED")]
    record.write_csv(tmp_path / "a.csv", rows, CPU)
    back = record.read_csv(tmp_path / "a.csv")
    for before, after in zip(rows, back, strict=True):
        for key, value in before.items():
            expected = pytest.approx(value, rel=1e-5) if isinstance(value, float) else value
            assert after[key] == expected, key
    assert back[0]["noisy"] is True


@pytest.mark.parametrize(
    ("before", "after", "verdict"),
    [
        (row("cpu", 100.0), row("cpu", 103.0), "within noise"),
        (row("cpu", 100.0), row("cpu", 120.0), "slower"),
        (row("cpu", 100.0), row("cpu", 80.0), "faster"),
        (row("cpu", 100.0, spread=0.3), row("cpu", 120.0), "within noise"),
        (row("cpu", 100.0), row("cpu", 50.0, result="WRONG"), "WRONG"),
        (row("cpu", 100.0), row("cpu", None, result="FAILED"), "FAILED"),
        (row("cpu", 100.0, result="WRONG"), row("cpu", 100.0), "right now"),
        (row("cpu", 100.0, result="WRONG"), row("cpu", 50.0, result="WRONG"), "as before"),
        (row("cpu", None), row("cpu", None), "not timed"),
    ],
)
def test_compare(before: dict, after: dict, verdict: str, tmp_path: Path, capsys) -> None:
    assert [r["verdict"] for r in compare.compare([before], [after])] == [verdict]
    for name, r in (("a", before), ("b", after)):
        record.write_csv(tmp_path / f"{name}.csv", [r], CPU)
    status = command.main(["compare", str(tmp_path / "a.csv"), str(tmp_path / "b.csv")])
    assert status == (1 if verdict in ("slower", "WRONG", "FAILED") else 0)
    assert "1 measurements compared" in capsys.readouterr().out


def test_files_without_anything_in_common_are_not_compared(tmp_path: Path, capsys) -> None:
    record.write_csv(tmp_path / "a.csv", [row("cpu", 1.0)], CPU)
    record.write_csv(tmp_path / "b.csv", [row("eager", 1.0)], CPU)
    assert command.main(["compare", str(tmp_path / "a.csv"), str(tmp_path / "b.csv")]) == 2
    assert "no measurement in common" in capsys.readouterr().err


# The report


def run_of_everything() -> list[dict]:
    """Return rows of every suite, as a run writes them."""
    rows = [
        row(name, us, direction=direction)
        for name, us in (("cpu", 100.0), ("reference", 800.0), ("eager", 400.0), ("sdpa", 50.0))
        for direction in ("fwd", "fwd+bwd")
    ]
    for r in rows:
        if r["backend"] == "sdpa":
            r.update(result="WRONG")
    for suite in ("models", "latency"):
        rows += [
            row(name, us, suite=suite, op="timm swin", shape="swin_t", case="timm-b1-3x224x224", direction="inference")
            for name, us in (("eager", 4000.0), ("fused", 3000.0), ("accelerate", 2000.0))
        ]
    rows += [
        row("cpu", 10.0 * case.batch, suite="scaling", shape=shape, case=str(case))
        for shape, case in scaling.SWEEPS["batch"][0].items()
    ]
    rows += [
        row(kind, us * side**2, suite="scaling", op="attention layer", shape=f"complexity {side}x{side}")
        for kind, us in (("window", 1.0), ("global", 2.0))
        for side in (14, 28)
    ]
    return with_environment(rows)


def test_tables_of_a_run() -> None:
    rows = run_of_everything()
    speedups = report.speedups(rows)
    assert "| cpu, 0.1 / 0.1 ms | 8.00 / 8.00 | 4.00 / 4.00 | WRONG / WRONG |" in " ".join(speedups.split())
    steps = " ".join(report.steps(rows, "models").split())
    assert "| 4 | 3 | 2 | 1.50 |" in steps  # relative to the faster of the library's own times
    slopes = report.slopes(rows)
    assert "batch: images" in slopes
    assert "1.00" in slopes
    assert report.memory(rows).count("swin_t") == 1
    assert report.host(rows) == ""


def test_a_noisy_time_is_marked() -> None:
    rows = with_environment([row("cpu", 100.0, spread=0.2), row("eager", 300.0)])
    assert "cpu, ~0.1" in report.speedups(rows)
    assert "1 of 2 times are noisy" in report.run_text(rows)


def test_headline_compares_with_the_fastest_other_contestant() -> None:
    """The headline is the median over the shapes; contestants with wrong results do not count."""
    rows = [
        row("cpu", 100.0), row("reference", 250.0), row("sdpa", 400.0),
        row("eager", 10.0, result="wrong", shape="other"), row("reference", 800.0, shape="other"),
        row("cpu", 200.0, shape="other"),
        row("cpu", 100.0, direction="fwd+bwd"), row("eager", 150.0, direction="fwd+bwd"),
    ]  # fmt: skip
    text = " ".join(report.headline(with_environment(rows)).split())
    assert "is 3.2 times as fast forward** as" in text  # the median of 2.5 and 4
    assert (
        "the median of 2 shapes (2.50 to 4.00); forward and backward together it is 1.5 times as fast (1.50 to 1.50)."
        in text
    )
    assert "Whole models" not in text
    assert "float32; 0 of 8 are noisy ([benchmarks](docs/benchmarks.md))." in text


def test_the_readme_shows_one_run() -> None:
    """The README shows the run on a GPU if the files contain one."""
    rows = with_environment([row("cpu", 100.0), row("reference", 250.0)])
    on_gpu = [
        {**r, "driver": "1.0", "device": "Some GPU", "backend": r["backend"].replace("cpu", "cuda")} for r in rows
    ]
    text = report.readme_numbers({"a": rows, "b": on_gpu, "c": rows}, [])
    assert text.count("![") == 1 and "/b-summary.png" in text and "Some GPU" in text
    assert "/a-summary.png" in report.readme_numbers({"a": rows}, [])
    assert "![" not in report.readme_numbers({"a": with_environment([row("eager", 1.0)])}, [])


def test_headline_names_the_gain_of_models() -> None:
    of_model = {"suite": "models", "op": "timm swin", "direction": "inference", "case": "swin-b1"}
    rows = [row("cpu", 1.0), row("eager", 2.0)]
    rows += [row(name, time, **of_model) for name, time in (("eager", 120.0), ("fused", 110.0), ("accelerate", 100.0))]
    assert "run 1.10 to 1.10 times as fast as the library's own uncompiled code." in " ".join(
        report.headline(with_environment(rows)).split()
    )


def test_pictures_of_a_run(tmp_path: Path) -> None:
    drawn = report.draw(run_of_everything(), tmp_path)
    assert {path.stem for path in drawn} == set(charts.DRAW) == set(charts.DRAWABLE) == set(charts.TITLES)
    assert all(path.read_bytes()[:4] == b"\x89PNG" and path.stat().st_size < 100_000 for path in drawn)


def test_every_contestant_has_a_colour() -> None:
    assert set(charts.COLOURS) == {*command.attention.CONTESTANTS, *models.CONTESTANTS, *scaling.LAYERS}


def test_report_of_a_folder(tmp_path: Path, capsys) -> None:
    results = tmp_path / "results"
    rows = run_of_everything()
    record.write_csv(results / "here" / "rows.csv", [{k: r[k] for k in row("cpu", 1.0)} for r in rows], CPU)
    (tmp_path / "README.md").write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    written = report.write(results, tmp_path)
    assert all(path.is_file() for path in written)
    page, readme = (tmp_path / name for name in (report.PAGE, report.README))
    text = page.read_text()
    assert "images/benchmarks/here-speedup.png" in text
    assert (page.parent / "images/benchmarks/here-speedup.png").is_file()
    assert readme.read_text().startswith(f"before\n{report.BEGIN}\n")
    assert readme.read_text().endswith(f"{report.END}\nafter\n")
    assert "old" not in readme.read_text()
    assert "(docs/images/benchmarks/here-summary.png)" in readme.read_text()
    before = [path.read_bytes() for path in written]
    report.write(results, tmp_path)
    assert [path.read_bytes() for path in written] == before  # the same rows give the same files


def test_a_readme_without_its_marks_is_left_alone() -> None:
    with pytest.raises(ValueError, match="expected one line"):
        report.replace_numbers("nothing", "numbers")


def test_committed_pages_are_those_of_the_committed_rows() -> None:
    """The committed pages equal the pages generated from the CSV files, so no number in them is typed by hand."""
    runs, on_gpus = report.read(report.RESULTS), gpu_page.read(report.RESULTS)
    assert (commit.ROOT / report.PAGE).read_text() == report.page_text(runs)
    assert (commit.ROOT / gpu_page.PAGE).read_text() == gpu_page.page_text(on_gpus)
    readme = (commit.ROOT / report.README).read_text()
    assert report.replace_numbers(readme, report.readme_numbers(runs, on_gpus)) == readme


# The page of kernels confirmed on a GPU


def gpu_line(step: str, direction: str, result: str = "ok", value: float = 0.3, **labels: Any) -> dict[str, Any]:
    line = {"step": step, "op": "window_attention", "backend": "cuda", "dtype": "bfloat16", "direction": direction,
            "case": "window 7", "result": result, "value": value, "unit": "eps", "device": "Some GPU",
            "torch": "2.11.0", "commit": "0123456789ab", "date": "2026-11-28T12:00:00Z"}  # fmt: skip
    return {**line, **labels}


def timed_line(direction: str, value: float, **labels: Any) -> dict[str, Any]:
    given = {"unit": "% of copy", "us": 100.0, "copy_us": value, "goal": 85, "shape": "swin_t.1", "build": "shipped"}
    return gpu_line("time", direction, value=value, **{**given, **labels})


def gpu_results(folder: Path, *runs: list[dict[str, Any]]) -> Path:
    for i, lines in enumerate(runs):
        path = folder / "results" / f"run{i}" / "gpu.jsonl"
        path.parent.mkdir(parents=True)
        path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return folder / "results"


def test_without_lines_no_kernel_has_run() -> None:
    cells = [[c.strip() for c in x.split("|")[1:-1]] for x in gpu_page.page_text([]).splitlines() if x.startswith("| ")]
    kernels = list(gpu_page.kernels())
    assert [tuple(cells[:3]) for cells in cells[1:]] == kernels
    assert all(row[3:] == [gpu_page.NOT_YET] * 3 for row in cells[1:])
    of_attention = {(b, d) for op, b, d in kernels if op == "window_attention"}
    assert of_attention == {(b, d) for b in ("cuda", "triton") for d in ("float32", "tf32", "float16", "bfloat16")}
    assert "No kernel has been timed on a GPU yet" in gpu_page.readme_text([])


def test_what_ran_is_confirmed_or_wrong_with_its_device_and_commit(tmp_path: Path) -> None:
    lines = [
        gpu_line("smoke", "fwd"),
        gpu_line("smoke", "fwd", value=0.4),
        gpu_line("smoke", "bwd"),
        gpu_line("smoke", "bwd", "wrong", 7.0, case="window 16"),
        timed_line("fwd", 86.0),
        timed_line("bwd", 71.0),
        timed_line("fwd", 99.0, build="against"),
    ]
    runs = gpu_page.read(gpu_results(tmp_path, lines))
    text = " ".join(gpu_page.page_text(runs).split())
    assert (
        "| window_attention | cuda | bfloat16 | confirmed: Some GPU, commit 0123456789ab, 0.40 eps at most | "
        "**wrong** at window 16, 7 eps: Some GPU, commit 0123456789ab | 86 (swin_t.1) / 71 (swin_t.1) |" in text
    )
    assert "| window_attention | cuda | float16 | not yet run | not yet run | not yet run |" in text
    assert "| window_attention | swin_t.1 | cuda | bfloat16 | fwd | 100.0 | 86 | 85 |" in text
    assert "99" not in text
    assert "| 85 % of copy | 86 | met |" in text
    assert "swin_t.1 86 / 71" in gpu_page.readme_text(runs)


def test_the_newest_run_counts_and_a_rehearsal_does_not(tmp_path: Path) -> None:
    old = [gpu_line("smoke", "fwd", "wrong"), gpu_line("smoke", "bwd", date="2026-11-28T11:00:00Z")]
    new = [gpu_line("smoke", "fwd", commit="ba9876543210", date="2026-11-29T11:00:00Z")]
    rehearsed = [gpu_line("smoke", "fwd", "wrong", date="2026-11-30T11:00:00Z", rehearsed=True)]
    runs = gpu_page.read(gpu_results(tmp_path, old, new, rehearsed))
    text = gpu_page.page_text(runs)
    assert "**wrong**" not in text
    assert "commit ba9876543210" in text
    assert "commit 0123456789ab" in text  # the older run still counts for the backward pass
