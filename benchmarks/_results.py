"""Reads result files: what a benchmark wrote with --json, or the lines that gpu_proof appends."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from _common import OURS, SETTING

K1_CASES = ("none", "patch", "blend", "warp")


class Document(NamedTuple):
    """One result file.

    Attributes:
        name: of the file.
        machine: date, versions, devices.
        rows: with inf as a number.
        stages: of gpu_proof: name, status, seconds, error.
        notes: what its benchmark remarked.
    """

    name: str
    machine: dict
    rows: list[dict]
    stages: list[dict]
    notes: list[str]


def load(path: Path) -> Document:
    """The document in a .json or .jsonl file.

    Raises:
        ValueError: a line is no JSON; the file and the line are named.
    """
    if path.suffix == ".json":
        machine = json.loads(path.read_text())
        rows, stages = machine.pop("rows"), []
    else:
        machine, rows, stages = {}, [], []
        for number, line in enumerate(path.read_text().splitlines(), 1):
            try:
                value = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number}: {error}") from None
            if "machine" in value:
                machine = value["machine"]
            elif "stage" in value:
                stages.append(value)
            else:
                rows.append(value)
    notes = machine.pop("notes", [])
    return Document(path.name, machine, [_row(r) for r in rows], stages, notes)


# What docs/quality.md and the README's section on it show.
OTHERS = {
    "quality.json", "quality_tuning.json", "quality_tuning_pretrained.json", "ubt.json",
    "ubt_vit.json", "ubt_gate.json", "ubt_gate_badnet.json", "ubt_found.json",
    "ubt_kept.json", "detect_planted.json",
}  # fmt: skip


def load_all(folder: Path) -> list[Document]:
    """Every result file of times in the folder, by name."""
    files = (p for p in sorted(folder.iterdir()) if p.name not in OTHERS)
    return [load(p) for p in files if p.suffix in (".json", ".jsonl")]


def _row(row: dict) -> dict:
    row = {k: float(v) if v in ("inf", "nan") else v for k, v in row.items()}
    if row["kernel"] == "trigger_normalize" and row["mode"] in K1_CASES:
        # Files of schema 1 have the case as mode, and GB/s under another name.
        row |= {"case": row["mode"], "mode": "forward"}
        row.setdefault("gbps", row.pop("gb_per_s", None))
    return row


def setting(row: dict) -> tuple:
    """What rows to be compared with each other share."""
    return tuple(row.get(field) for field in SETTING)


def ratio(row: dict, ours: dict | None) -> float | None:
    """How many times ours the row's time is; inf where it ran out of memory and ours did not."""
    if ours is None or row.get("ms_median") is None or ours.get("ms_median") is None:
        return None
    if math.isinf(ours["ms_median"]):
        return None if math.isinf(row["ms_median"]) else 0.0
    return row["ms_median"] / ours["ms_median"]


def by_setting(rows: Iterable[dict]) -> dict[tuple, dict[str, dict]]:
    """setting -> provider -> row; of several equal ones the last."""
    found: dict[tuple, dict[str, dict]] = {}
    for row in rows:
        found.setdefault(setting(row), {})[row["provider"]] = row
    return found


def ours_in(group: dict[str, dict], provider: str) -> dict | None:
    """Our row that a provider's is compared with: replay with replay, plain call with plain."""
    if provider.endswith("_graph") and f"{OURS}_graph" in group:
        return group[f"{OURS}_graph"]
    return group.get(OURS)
