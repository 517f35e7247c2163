"""Write docs/benchmarks.md, its charts, docs/gpu.md and the README's figures, only from the result files.

Each folder of ``benchmarks/results`` contains one run, or several runs on one machine; the CSV files of a folder are
read together.
"""

from __future__ import annotations

import statistics
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

from benchmarks import attention, charts, commit, gpu_page, models, record, scaling
from benchmarks.record import RESULT_OK

RESULTS = commit.ROOT / "benchmarks" / "results"
PAGE, README, PICTURES = "docs/benchmarks.md", "README.md", "docs/images/benchmarks"
BEGIN, END = "<!-- numbers: python -m benchmarks report -->", "<!-- end of numbers -->"
RATIOS = "other implementations' time over ours, forward / forward and backward"
Row = dict[str, Any]
Runs = dict[str, list[Row]]  # name of the folder -> rows
Group = dict[str, Row]  # contestant -> its row for one op, shape, dtype and direction

HEAD = """# Benchmarks

Written by `python -m benchmarks report` from the CSV files in `benchmarks/results`; an edit here is lost.

## Method

`python -m benchmarks ops`, `blocks`, `models`, `memory`, `latency`, `scaling` or `all` measures the tables below on
your machine; `--quick`, `--filter`, `--baseline`, `--dtype` and `--device` choose a part. `python -m benchmarks compare
A.csv B.csv` lists the changes between two runs that exceed their noise.

- The outputs and gradients of each contestant are first compared in float64 with the reference, or with the library's
  own model. The row of a wrong contestant says WRONG and has no ratio. The error is the worst RMS error in units of the
  dtype's eps.
- The contestants of a row take turns, so that a slow moment of the machine affects all. Times are medians. A time is
  noisy if its 20th and 80th percentiles differ by more than 10 % of the median. All contestants of its row are then
  measured again, up to three times in all; `~` marks a time that is still noisy. The CSV files have both percentiles.
- On a GPU, ops are timed in replays of CUDA graphs over inputs that rotate through more than the L2 cache. Models are
  timed with events, after the cache has been overwritten. On a CPU, times are wall-clock times, and inputs may be in a
  cache.
- The roofline is the larger of bytes / copy rate and flops / matrix rate, both measured in the same run, for the bytes
  that the op has to move and the flops of its matrix products. A map that fits a CPU's cache may beat the copy rate.
- The published mask of -100 leads to probabilities of e^-100, which are denormal in float32 and slow down plain code on
  a CPU; how much depends on the processor. The CPU kernels count such probabilities as zero.
- Times exclude compilation; `first_call_s` in the CSV files includes it. Peak memory is the most memory that one call
  allocates in addition to the memory in use before it, results included.
- A training step is a forward and a backward pass, without an optimizer. Models have random weights.
"""


def write(results: Path, root: Path = commit.ROOT) -> list[Path]:
    """Write both pages, the charts and the README's figures in the checkout ``root``; return the paths."""
    runs, on_gpus = read(results), gpu_page.read(results)
    pictures = [path for name, rows in runs.items() for path in draw(rows, root / PICTURES, f"{name}-")]
    page, gpus, readme = root / PAGE, root / gpu_page.PAGE, root / README
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(page_text(runs))
    gpus.write_text(gpu_page.page_text(on_gpus))
    readme.write_text(replace_numbers(readme.read_text(), readme_numbers(runs, on_gpus)))
    return [page, gpus, readme, *pictures]


def write_run(out: Path) -> Path:
    """Write report.md and charts for one run next to its CSV files; return the path of report.md."""
    rows, page = read_folder(out), out / "report.md"
    draw(rows, out)
    page.write_text(run_text(rows))
    return page


def draw(rows: Sequence[Row], folder: Path, prefix: str = "") -> list[Path]:
    """Draw all charts for which a run has rows; return the paths of the images."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = {kind: folder / f"{prefix}{kind}.png" for kind, can_draw in charts.DRAWABLE.items() if can_draw(rows)}
    for kind, path in drawn.items():
        charts.DRAW[kind](rows, path)
    return list(drawn.values())


def read_folder(folder: Path) -> list[Row]:
    """Read the rows of a folder's CSV files."""
    return [row for path in sorted(folder.glob("*.csv")) for row in record.read_csv(path)]


def read(results: Path) -> Runs:
    """Read every subfolder of ``results`` that contains CSV files."""
    runs = {folder.name: read_folder(folder) for folder in sorted(results.iterdir()) if folder.is_dir()}
    return {name: rows for name, rows in runs.items() if rows}


def replace_numbers(text: str, numbers: str) -> str:
    """Replace the text between the markers BEGIN and END."""
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"expected one line {BEGIN!r} and one line {END!r} around the numbers in {README}")
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{numbers}{END}{rest.split(END)[1]}"


def groups(rows: Iterable[Row], *suites: str) -> dict[tuple[str, ...], Group]:
    """Group the rows of contestants that were measured together, in the order of the files."""
    found: dict[tuple[str, ...], Group] = {}
    for row in rows:
        if row["suite"] in suites:
            key = tuple(row[k] for k in ("op", "shape", "case", "dtype", "direction"))
            found.setdefault(key, {})[row["backend"]] = row
    return found


def ours(group: Group) -> Row | None:
    """Return the fastest correct row of our kernels, or None."""
    right = [group[name] for name in attention.OURS if name in group and _time(group[name]) is not None]
    return min(right, key=lambda row: row["median_us"], default=None)


def _time(row: Row | None) -> float | None:
    return row["median_us"] if row is not None and row["result"] == RESULT_OK else None


def _ratio(row: Row | None, mine: Row | None) -> str:
    if row is None:
        return ""
    if row["result"] != RESULT_OK:
        return row["result"]
    theirs, time = _time(row), _time(mine)
    return "" if theirs is None or time is None else f"{theirs / time:.2f}"


def _ms(row: Row | None) -> str:
    if row is None:
        return ""
    if row["median_us"] is None or row["result"] != RESULT_OK:
        return row["result"]
    return f"{'~' if row['noisy'] else ''}{row['median_us'] / 1e3:.3g}"


def _number(value: float | None, digits: int = 0) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _range(values: Iterable[float]) -> str:
    found = sorted(values)
    return " to ".join(dict.fromkeys(f"{end:.3g}" for end in (found[0], found[-1])))


def _table(rows: Sequence[dict[str, str]]) -> str:
    """Format rows as a Markdown table, without columns that are empty in every row."""
    columns = [c for c in rows[0] if any(row[c] for row in rows)]
    cells = [[row[c] for c in columns] for row in rows]
    return tabulate(cells, headers=columns, tablefmt="pipe", disable_numparse=True) + "\n"


def settings(rows: Sequence[Row]) -> str:
    """Return the versions, commits and dates of all runs in a folder."""

    def values(column: str) -> str:
        return ", ".join(dict.fromkeys(str(row[column]) for row in rows if row[column]))

    parts = [f"torch {values('torch')}", f"Triton {values('triton')}" if values("triton") else ""]
    parts += [f"driver {values('driver')}" if values("driver") else "", f"commit {values('commit')}"]
    days = sorted({row["date"][:10] for row in rows})
    return f"{'; '.join(p for p in parts if p)}; {' to '.join(dict.fromkeys((days[0], days[-1])))}"


def device(rows: Sequence[Row]) -> str:
    """Return a folder's device, preferably from another suite than latency, which may use a single thread."""
    return next(iter(dict.fromkeys(row["device"] for row in rows if row["suite"] != "latency")), rows[0]["device"])


def speedups(rows: Sequence[Row]) -> str:
    """Return the table of window attention: the time of each other contestant divided by ours."""
    found = groups((row for row in rows if row["op"] == "window_attention"), "ops")
    cells = []
    for (_, _, case, dtype, direction), forward in found.items():
        if direction != "fwd" or ours(forward) is None:
            continue
        shape = next(iter(forward.values()))["shape"]
        both = found.get(("window_attention", shape, case, dtype, "fwd+bwd"), {})
        mine = ours(forward)
        assert mine is not None
        ratios = {
            name: " / ".join(r for g in (forward, both) if (r := _ratio(g.get(name), ours(g))))
            for name in ("reference", *attention.PEERS)
        }
        what = f"{shape}, {'v2, ' if 'v2' in case else ''}{_short(case)}, {dtype}"
        cells.append({"shape": what, "ours": f"{mine['backend']}, {_ms(mine)} / {_ms(ours(both))} ms", **ratios})
    return _table(cells) if cells else ""


def _short(case: str) -> str:
    """Describe batch, map, heads and window of a case, given a name such as "b1-56x56-h3x32-w7-s3-table"."""
    batch, size, heads, window, *_ = case.split("-")
    heads, head_dim = heads[1:].split("x")
    across = [x.replace("x", " x ") for x in (size, window[1:])]
    return f"batch {batch[1:]}, {across[0]}, {heads} heads of {head_dim}, window {across[1]}"


def steps(rows: Sequence[Row], *suites: str) -> str:
    """Return the table of models or blocks: times, and speed-ups over the fastest original, eager and compiled."""
    cells = []
    for (op, shape, _, dtype, direction), group in groups(rows, *suites).items():
        if not any(_time(row) is not None for row in group.values()):
            continue
        named = {f"{name}, ms": _ms(group.get(name)) for name in models.CONTESTANTS}
        gains = {}
        for how in ("", "-compiled", "-graphs"):
            others = [group[f"{kind}{how}"] for kind in ("eager", "fused") if f"{kind}{how}" in group]
            right = [row for row in others if _time(row) is not None]
            best = min(right, key=lambda row: row["median_us"], default=None)
            gains[f"gain{how.replace('-', ', ')}"] = _ratio(best, group.get(f"accelerate{how}"))
        busy = group.get("accelerate-compiled", {}).get("gpu_busy_us")
        cells.append(
            {
                "model": f"{shape} ({op})" if shape not in op else op,
                "batch": next(iter(group.values()))["case"].split("-")[1][1:],
                "step": f"{direction}, {dtype}",
                **named,
                **gains,
                "GPU busy, compiled, ms": _number(busy and busy / 1e3, 2),
            }
        )
    return _table(cells) if cells else ""


def memory(rows: Sequence[Row]) -> str:
    """Return the table of the models' peak memory per step, in MiB, by contestant."""
    cells = []
    for (_, shape, case, dtype, direction), group in groups(rows, "models", "memory").items():
        named = {n: _number(group[n]["peak_mib"]) if n in group else "" for n in models.CONTESTANTS}
        batch = case.split("-")[1][1:]
        cells.append({"model": shape, "batch": batch, "step": f"{direction}, {dtype}", **named})
    return _table(cells) if cells else ""


def details(rows: Sequence[Row]) -> str:
    """Return the table of all ops: time, percentage of the roofline, error and memory of each contestant."""
    cells = [
        {
            "op": row["op"],
            "shape": row["case"],
            "dtype": row["dtype"],
            "backend": row["backend"],
            "direction": row["direction"],
            "ms": _ms(row),
            "of roofline, %": _number(row["percent_of_roofline"]),
            "of a copy, %": _number(row["percent_of_copy"]),
            "error, eps": _number(row["error_eps"], 1),
            "peak, MiB": _number(row["peak_mib"], 1),
            "first call, s": _number(row["first_call_s"], 2),
        }
        for row in rows
        if row["suite"] == "ops"
    ]
    return _table(cells) if cells else ""


def host(rows: Sequence[Row]) -> str:
    """Return the table of the calling thread's CPU time per call of window attention."""
    cells = [
        {"case": row["shape"], "call": row["direction"], "backend": row["backend"], "us": _number(row["host_us"], 1)}
        for row in rows
        if row["suite"] == "latency" and row["op"].startswith("host time")
    ]
    return _table(cells) if cells else ""


def slopes(rows: Sequence[Row]) -> str:
    """Return the table of the sweeps: the exponent with which each contestant's time grows."""
    cells = []
    for sweep, (_, _, what) in scaling.SWEEPS.items():
        for backend, (x, y) in scaling.series(rows, sweep).items():
            if len(x) > 2:
                largest = scaling.slope(x[-3:], y[-3:])
                cells.append(
                    {
                        "sweep": f"{sweep}: {what}",
                        "backend": backend,
                        "from": f"{x[0]:.3g}",
                        "to": f"{x[-1]:.3g}",
                        "slope": f"{scaling.slope(x, y):.2f}",
                        "of the three largest": f"{largest:.2f}",
                    }
                )
    return _table(cells) if cells else ""


def run_text(rows: Sequence[Row], pictures: str = "") -> str:
    """Return the section of a page about one run, with links to its charts: ``pictures`` is their prefix."""
    noisy = sum(row["noisy"] is True for row in rows)
    timed = sum(row["median_us"] is not None for row in rows)
    parts = [f"## {device(rows)}\n\n{settings(rows)}. {noisy} of {timed} times are noisy.\n"]
    measured = [row for row in rows if row["suite"] == "ops" and row["ceiling_gb_per_s"]]
    for dtype in dict.fromkeys(row["dtype"] for row in measured):
        of_dtype = [row for row in measured if row["dtype"] == dtype]
        copy, product = (_range(row[f"ceiling_{unit}_per_s"] for row in of_dtype) for unit in ("gb", "gflop"))
        parts.append(f"Measured alongside the ops, in {dtype}: copy {copy} GB/s, matrix product {product} GFLOP/s.\n")
    sections = [
        (f"Window attention: {RATIOS}", speedups(rows), ("speedup", "roofline")),
        ("Models", steps(rows, "models"), ("models",)),
        ("Blocks", steps(rows, "blocks"), ()),
        ("Latency at batch 1", steps(rows, "latency"), ()),
        ("Host time of a window attention call", host(rows), ()),
        ("Peak memory of a step, MiB", memory(rows), ("memory",)),
        ("Scaling: the exponent of the time, 1 if it is proportional", slopes(rows), ("scaling",)),
        ("Global and window attention, with their formulas", "", ("complexity",)),
        ("Every op", details(rows), ()),
    ]
    for title, table, kinds in sections:
        drawn = [kind for kind in kinds if charts.DRAWABLE[kind](rows)]
        if table or drawn:
            parts.append(f"### {title}\n")
            parts += [table] if table else []
            parts += [f"![{charts.TITLES[kind]}]({pictures}{kind}.png)\n" for kind in drawn]
    return "\n".join(parts)


def page_text(runs: Runs) -> str:
    """Return the text of docs/benchmarks.md."""
    folder = Path(PICTURES).relative_to(Path(PAGE).parent)
    parts = [run_text(rows, f"{folder}/{name}-") for name, rows in runs.items()]
    return "\n".join([HEAD, *parts])


def readme_numbers(runs: Runs, on_gpus: gpu_page.Runs) -> str:
    """Return the README's chart, headline (both from a GPU run if there is one) and sentence about GPUs."""
    drawable = [name for name, rows in runs.items() if charts.DRAWABLE["summary"](rows)]
    parts = [gpu_page.readme_text(on_gpus)]
    if drawable:
        shown = next((name for name in drawable if any(row["driver"] for row in runs[name])), drawable[0])
        picture = f"![{charts.TITLES['summary']}]({PICTURES}/{shown}-summary.png)\n"
        parts = [picture, headline(runs[shown]), *parts]
    return "\n".join(["", *parts, ""])


def headline(rows: Sequence[Row]) -> str:
    """Summarise a run: the speed-ups of window attention over the fastest alternative, and of whole models."""
    forward, both = (list(charts.best_ratios(rows, direction).values()) for direction in ("fwd", "fwd+bwd"))
    timed = [row for row in rows if row["median_us"] is not None]
    noisy = sum(row["noisy"] is True for row in timed)
    dtypes = ", ".join(dict.fromkeys(dtype for _, dtype in charts.best_ratios(rows, "fwd")))
    text = (
        f"**Window attention is {statistics.median(forward):.1f} times as fast forward** as the fastest other "
        "implementation in the same run: plain PyTorch, `scaled_dot_product_attention` or `torch.compile`. This is the "
        f"median of {len(forward)} shapes ({_span(forward)})"
    )
    if both:
        text += f"; forward and backward together it is {statistics.median(both):.1f} times as fast ({_span(both)})"
    text += ". "
    if gains := model_gains(rows):
        text += f"Whole models spend most of their time in other layers and run {_span(gains)} times as fast as the "
        text += "library's own uncompiled code. "
    text += (
        f"All times were measured on {device(rows)}, {dtypes}; in {noisy} of {len(timed)} timings the 20th and 80th "
        "percentiles differ by over a tenth of the median ([benchmarks](docs/benchmarks.md))."
    )
    return textwrap.fill(text, 120, break_on_hyphens=False) + "\n"


def model_gains(rows: Sequence[Row]) -> list[float]:
    """Return, per model and step, the library's fastest uncompiled time divided by the accelerated model's."""
    gains = []
    for group in groups(rows, "models").values():
        theirs = [t for name in ("eager", "fused") if (t := _time(group.get(name))) is not None]
        mine = _time(group.get("accelerate"))
        if theirs and mine is not None:
            gains.append(min(theirs) / mine)
    return gains


def _span(values: Sequence[float]) -> str:
    return f"{min(values):.2f} to {max(values):.2f}"
