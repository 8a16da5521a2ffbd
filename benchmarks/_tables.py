"""Results as Markdown tables."""

from __future__ import annotations

import math
from collections.abc import Iterable

from _common import OURS
from _results import by_setting, ours_in, ratio
from _targets import MET, MISSED, Verdict

FASTER = "**{}**"  # a rival's ratio below 1


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table."""
    header = list(header)
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def milliseconds(value: float | None) -> str:
    """Three significant digits; - where not measured."""
    if value is None:
        return "-"
    if math.isinf(value):
        return "out of memory"
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def times(value: float | None) -> str:
    """A ratio to ours; bold where the rival is faster."""
    if value is None:
        return "-"
    if math.isinf(value):
        return "out of memory"
    text = f"{value:.2f}x" if value < 10 else f"{value:.1f}x"
    return FASTER.format(text) if value < 1 else text


def rate(row: dict) -> str:
    """GB/s or TFLOP/s, and the part of the ceiling."""
    for field, unit in (("tflops", "TFLOP/s"), ("gbps", "GB/s")):
        if row.get(field) is not None:
            share = row.get(f"{field}_pct")
            return f"{row[field]:.3g} {unit}" + ("" if share is None else f" ({share:.0f} %)")
    return "-"


def title(row: dict) -> str:
    """Mode, case, shape and dtype of a setting."""
    words = [row["mode"], row.get("case"), row["shape"], row["dtype"], row.get("run")]
    return ", ".join(w for w in words if w)


def ratios(rows: list[dict]) -> str:
    """A line per setting: our time, and how many times that every provider takes."""
    groups = [g for g in by_setting(rows).values() if any(r.get("ms_median") for r in g.values())]
    names = dict.fromkeys(r["provider"] for g in groups for r in g.values())
    rivals = [n for n in names if n != OURS]
    lines = []
    for group in groups:
        ours = group.get(OURS)
        cells = [title(next(iter(group.values()))), milliseconds(ours and ours.get("ms_median"))]
        for name in rivals:
            row = group.get(name)
            base = ours if name == f"{OURS}_graph" else ours_in(group, name)
            cells.append("-" if row is None else times(ratio(row, base)))
        lines.append(cells)
    return table(["setting", f"{OURS}, ms", *rivals], lines)


def every_row(rows: list[dict]) -> str:
    """A line per row: times, error, rate, memory, launches and note."""
    lines = []
    for row in rows:
        spread = "-"
        if row.get("ms_median") is not None and math.isfinite(row["ms_median"]):
            spread = f"{milliseconds(row['ms_p20'])} to {milliseconds(row['ms_p80'])}"
        error, peak = row.get("rel_error"), row.get("peak_bytes")
        lines.append(
            [
                title(row),
                row["provider"],
                row.get("precision") or "-",
                milliseconds(row.get("ms_median")),
                spread,
                "-" if error is None else f"{error:.1e}",
                rate(row),
                "-" if peak is None else f"{peak / 1e6:.0f}",
                "-" if row.get("launches") is None else str(row["launches"]),
                (row.get("note") or "").replace("|", "/"),
            ]
        )
    header = ["setting", "provider", "precision", "median ms", "20 to 80 %", "error"]
    return table([*header, "rate (of ceiling)", "peak MB", "launches", "note"], lines)


def verdict_lines(verdicts: Iterable[Verdict], missing: str) -> str:
    """A line per target: the setting, the bound, the figure and the verdict."""
    lines = []
    for v in verdicts:
        t = v.target
        words = [t.kernel, t.mode, t.case, t.shape, t.dtype]
        status = f"**{v.status}**" if v.status == MISSED else v.status
        if v.status not in (MET, MISSED):
            status = missing
        lines.append([", ".join(w for w in words if w), t.words(), v.measured or "-", status])
    return table(["setting", "target", "measured", "verdict"], lines)


def machine_line(machine: dict) -> str:
    """Device, date and versions in a sentence."""
    parts = [machine["gpu"] or machine["cpu"], machine["date"]]
    for name in ("pybackdoor", "torch", "triton", "cuda", "driver"):
        if machine.get(name):
            parts.append(f"{name} {machine[name]}")
    return ", ".join(parts)
