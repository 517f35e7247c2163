"""Formats the table at the end of a run: steps, first failures, speeds and goals, in at most 40 lines."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from gpu.lines import BAD, CUT, OK, SKIPPED, Line

MOST_LINES = 40
MOST_BAD = 9


def _shown(line: Line) -> str:
    value = line.get("value")
    return "" if value is None else f"{value:.3g} {line.get('unit', '')}".strip()


def _steps(lines: Sequence[Line], spent: Mapping[str, float]) -> Iterable[str]:
    for step in dict.fromkeys(line["step"] for line in lines):
        of_step = [line for line in lines if line["step"] == step]
        counts = {result: sum(line["result"] == result for line in of_step) for result in (OK, *BAD, SKIPPED, CUT)}
        said = ", ".join(f"{n} {result}" for result, n in counts.items() if n)
        why = next((line["detail"] for line in of_step if line["result"] in (SKIPPED, CUT)), "")
        yield f"{step:<9} {spent.get(step, 0):4.0f} s  {said}{': ' if why else ''}{why[:70]}"


def _bad(lines: Sequence[Line]) -> Iterable[str]:
    """Yield the first failure of each combination of step, op, backend and dtype, with the number of further ones."""
    groups: dict[tuple[str, ...], list[Line]] = {}
    for line in lines:
        if line["result"] in BAD:
            key = tuple(str(line.get(k, "")) for k in ("step", "op", "backend", "dtype"))
            groups.setdefault(key, []).append(line)
    for (step, *labels), found in list(groups.items())[:MOST_BAD]:
        first = found[0]
        more = f" and {len(found) - 1} more" if len(found) > 1 else ""
        what = " ".join(filter(None, [step, *labels, first.get("direction", ""), first["case"]]))
        yield f"{first['result']}: {what}{more}: {_shown(first)} {first.get('detail', '')}"[:160]
    if len(groups) > MOST_BAD:
        yield f"... and {len(groups) - MOST_BAD} more kernels"


def _times(lines: Sequence[Line]) -> Iterable[str]:
    """Yield one row per op and shape: the results of each build and backend in each direction, with the goals."""
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for line in lines:
        if line["step"] in ("time", "models") and "us" in line and line["result"] == OK:
            name = (
                line["backend"] if line.get("build", "shipped") == "shipped" else f"{line['build']} {line['backend']}"
            )
            goal = f" ({line['goal']:g})" if line.get("goal") else ""
            value = f"{line['us'] / 1e3:.3g} ms" if line["step"] == "models" else f"{_shown(line)}{goal}"
            key = (line["op"], line["shape"] + (f" {line['dtype']}" if line["dtype"] != "bfloat16" else ""))
            rows.setdefault(key, {})[f"{name} {line['direction']}"] = value.replace("% of copy", "%")
    for (op, shape), cells in rows.items():
        yield f"{op} {shape}: " + ", ".join(f"{name} {value}" for name, value in cells.items())


def table(lines: Sequence[Line], spent: Mapping[str, float]) -> str:
    last = lines[-1] if lines else {}
    head = ", ".join(str(last.get(k, "")) for k in ("device", "driver", "torch", "triton", "commit") if last.get(k))
    sections = [[head], list(_steps(lines, spent)), list(_bad(lines)), list(_times(lines))]
    text = [line for section in sections if section for line in ("", *section)][1:]
    if len(text) > MOST_LINES:
        text = [*text[: MOST_LINES - 1], f"... and {len(text) - MOST_LINES + 1} more lines in gpu.jsonl"]
    return "\n".join(text) + "\n"
