"""The quality matrix as one JSON file, a page of tables and a picture per data set."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import _quality_detect
import _quality_ubt
from _common import machine
from _quality_cells import NO_ATTACK, NOT_INSTALLED, Work
from _quality_defences import DEFENCES, NONE
from _quality_models import ARCHITECTURES
from _quality_picture import draw
from _quality_setting import ATTACKS, CLEAN, TUNING, Cell, Model, Setting
from _quality_summary import ca_loss, chosen_settings, summary
from _tables import table

from pybackdoor.files import write_atomically, write_json

SCHEMA = "pybackdoor.quality/1"
TOWERS = ("image", "text")
INTRODUCTION = """# Quality

Written by `python benchmarks/quality.py --report` from the cells that the same program computes;
the rows are in `benchmarks/results/quality.json`. Do not edit.

Each model is a small dual encoder trained with its backdoor: from scratch or, if `pretrained`, from
towers that saw other data before, whose first layers stay as they were. The patch of `badclip` was
found on the clean model of the same seed, without augmentation. Each defence gets the poisoned
model and the same held-out clean pairs, and nothing of the attack. Exceptions: `ubt` and `ubt_par`
get the pairs that the model was trained on, poison included, and `par_procedural` gets generated
pairs.

Figures are means over the seeds in %; brackets reach from the lowest lower to the highest upper
bound of the seeds' 95 % intervals. There are as many test images of each class, so accuracies are
macro accuracies. The columns:

- **CA**: accuracy on clean images.
- **ASR**: share of triggered images of *other* classes that are predicted as the target.
- **PA**: accuracy of triggered images against their true labels.
- **drift**: mean squared distance of unit embeddings to the poisoned model's, in [0, 4],
  image / text, before and after drift repair, which lets it grow where that keeps what stored
  embeddings find.
- **old index**: accuracy of stored old image embeddings under the cleaned model's class texts / of
  the cleaned model's images under stored old texts; to be compared with CA.
- **probe**: accuracy of a linear probe trained on old image embeddings and given new ones; in
  parentheses what it reaches on old ones.
- **rebound**: highest ASR at {points} steps of further training on other clean pairs.
- **control**: CA, in points, that the same defence costs the clean model of the same seed.
- **seconds**: of one core.

Repair changed no image's similarity to a class text by more than {changed:.0e} (logits:
{logits:.0e}).

An attack counts as installed when its ASR exceeds {installed} %; one that does not is not cleaned.
Settings were chosen on {tuning} alone, two of ten attacks, called the *tuning half* and marked (t).
No other attack had a part in that choice, except in how `ubt` searches (see there). `ubt`'s other
settings come from trials whose figures were not kept. The models and images are small: what holds
here need not hold for pretrained CLIP models.
"""

OUTDATED = """Groups marked † hold, {n} in all, outdated rows: their settings, or the code that they
depend on, have changed since, and they have not been computed anew. They cleaned other models,
trained with the same settings; their losses of CA are measured from the CA of those models."""

CHOICE = """## How the settings were chosen

By `python benchmarks/tune_quality.py`, on models with the attacks of the tuning half:
of the candidates that cost at most {most:g} points of CA the one with the lowest ASR, else the
cheapest; means over these attacks in %, one seed. The list of candidates grew while they were
looked at, and is not equally long for all. Learning rates fall as `par_clean` describes."""

WITHIN = 2.0  # points
Key = tuple[str, str, str, str]  # data set, architecture, attack, defence


class Mean(NamedTuple):
    """Over seeds: the mean of the estimates, and the widest reach of their intervals."""

    value: float
    low: float
    high: float

    @staticmethod
    def of(rows: Iterable[dict], name: str) -> Mean:
        found = [row[name] for row in rows]
        value = sum(f["value"] for f in found) / len(found)
        return Mean(value, min(f["low"] for f in found), max(f["high"] for f in found))

    def percent(self) -> str:
        return f"{100 * self.value:.1f} [{100 * self.low:.1f}, {100 * self.high:.1f}]"


def adopt(work: Work, out: Path) -> int:
    """Puts an earlier report's cells whose settings are today's into the work folder; how many.

    So that a run on another machine computes what is missing. Cells that are there stay.
    """
    results, adopted = results_file(out), 0
    if not results.exists():
        return 0
    for row in json.loads(results.read_text())["rows"]:
        cell = _cell(row)
        if not _known(cell, work.setting) or cell.name(work.setting) != row.pop("cell"):
            continue
        path = work.cell_file(cell)
        if not path.exists():
            row.pop("control_ca_loss", None)  # of rows beside it
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, {**row, "settings": cell.settings(work.setting)})
            adopted += 1
    return adopted


def results_file(out: Path) -> Path:
    return out / "benchmarks" / "results" / "quality.json"


def write_report(work: Work, out: Path) -> list[Path]:
    """Writes the JSON, the page and the pictures below ``out``; says which."""
    todays = rows_of(work)
    rows = with_controls(ordered(todays + outdated(work, out, todays)))
    groups = grouped(rows)
    folder = out / "docs" / "quality"
    folder.mkdir(parents=True, exist_ok=True)
    results = results_file(out)
    results.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(results, document(rows, work.setting).encode())
    written = [results]
    parts = [introduction(work.setting, rows)]
    for data, arch in dict.fromkeys(key[:2] for key in groups):
        own = {key[2:]: rows for key, rows in groups.items() if key[:2] == (data, arch)}
        picture = folder / f"{data}-{arch}.png"
        drawn = draw(own, picture)
        parts.append(section(data, arch, own, work.setting, picture.name if drawn else None))
        written += [picture] * drawn
    parts += _quality_ubt.sections(results.parent)
    parts += _quality_detect.sections(results.parent)
    tuned = [json.loads(p.read_text()) for p in sorted(results.parent.glob("quality_tuning*.json"))]
    if tuned:
        parts.append(CHOICE.format(most=tuned[0]["most_ca_loss"]))
    for found in tuned:
        of = found["candidates"][0]["rows"][0]
        parts += [f"On {of['data']}, {of['arch']}:", chosen_settings(found)]
    page = out / "docs" / "quality.md"
    write_atomically(page, ("\n\n".join(parts) + "\n").encode())
    written.append(page)
    for path in written:
        print(path)
    return written


def rows_of(work: Work) -> list[dict[str, Any]]:
    """The records of all cells whose settings are today's."""
    found = []
    for path in (work.folder / "cells").glob("*.json"):
        row = json.loads(path.read_text())
        cell = _cell(row)
        if _known(cell, work.setting) and cell.name(work.setting) == path.stem:
            del row["settings"]  # the document states them once
            found.append({"cell": path.stem, **row})
    return found


def outdated(work: Work, out: Path, todays: list[dict]) -> list[dict[str, Any]]:
    """An earlier report's rows under other settings, where there is none yet under today's.

    So that a change does not lose hours of computing: they are marked, until computed anew.
    """
    results, there = results_file(out), {(*_key(row), row["seed"]) for row in todays}
    if not results.exists():
        return []
    return [
        {**row, "outdated": True}
        for row in json.loads(results.read_text())["rows"]
        if _known(_cell(row), work.setting) and (*_key(row), row["seed"]) not in there
    ]


def ordered(rows: list[dict]) -> list[dict]:
    """As the plan has them."""
    return sorted(rows, key=lambda row: (*map(_place, _key(row)), row["seed"]))


def _cell(row: dict[str, Any]) -> Cell:
    return Cell(Model(row["data"], row["arch"], row["attack"], row["seed"]), row["defence"])


def _known(cell: Cell, setting: Setting) -> bool:
    model = cell.model
    return (
        cell.defence in DEFENCES and model.data in setting.data and model.arch in ARCHITECTURES
        and model.attack in ATTACKS
    )  # fmt: skip


def _key(row: dict) -> Key:
    return row["data"], row["arch"], row["attack"], row["defence"]


def _place(name: str) -> tuple[int, str]:
    """Attacks and defences as they are listed, other names by the alphabet."""
    for names in (ATTACKS, tuple(DEFENCES)):
        if name in names:
            return names.index(name), ""
    return 0, name


def with_controls(rows: list[dict]) -> list[dict]:
    """Each row with what its defence costs the clean model of its seed; None where not measured."""
    clean = {(*_key(r), r["seed"]): r for r in rows if r["attack"] == CLEAN}

    def loss(row: dict) -> float | None:
        before, after = (
            clean.get((row["data"], row["arch"], CLEAN, defence, row["seed"]))
            for defence in (NONE, row["defence"])
        )
        return None if before is None or after is None else ca_loss(after, before)

    return [{**row, "control_ca_loss": loss(row)} for row in rows]


def grouped(rows: list[dict]) -> dict[Key, list[dict]]:
    """The seeds' rows together."""
    groups: dict[Key, list[dict]] = {}
    for row in rows:
        groups.setdefault(_key(row), []).append(row)
    return groups


def document(rows: list[dict], setting: Setting) -> str:
    """The JSON file: versions, settings, and a line for each row."""
    head = {
        "schema": SCHEMA,
        "machine": machine(),
        "settings": {
            "data": {name: asdict(data) for name, data in setting.data.items()},
            "architectures": {name: asdict(arch) for name, arch in ARCHITECTURES.items()},
            "train": {name: dict(options) for name, options in setting.train.items()},
            "patch": dict(setting.patch),
            "own": setting.own,
            "defences": {name: d.settings(setting.clean) for name, d in DEFENCES.items()},
            "rebound": {**setting.rebound, "at": list(setting.rebound_at)},
            "installed": setting.installed,
        },
    }
    text = json.dumps(head, indent=1, allow_nan=False)[:-2]
    lines = ",\n  ".join(json.dumps(row, allow_nan=False) for row in rows)
    return f'{text},\n "rows": [\n  {lines}\n ]\n}}\n'


def introduction(setting: Setting, rows: list[dict]) -> str:
    repairs = [row["repair"] for row in rows if "repair" in row]
    changed, logits = (
        max((r[f"{of}_difference"] for r in repairs), default=0.0) for of in ("cosine", "logit")
    )
    text = INTRODUCTION.format(
        changed=changed, logits=logits,
        points=", ".join(map(str, setting.rebound_at)), installed=f"{100 * setting.installed:g}",
        tuning=" and ".join(f"`{name}`" for name in TUNING),
    ).strip()  # fmt: skip
    fresh = [row for row in rows if "outdated" not in row]
    old = f"\n\n{OUTDATED.format(n=len(rows) - len(fresh))}" if len(fresh) < len(rows) else ""
    return f"{text}{old}\n\n{_old_index(fresh)}".strip()


def _old_index(rows: list[dict]) -> str:
    """How far what is stored falls behind the models' own accuracy."""
    kept = [row for row in rows if {"drift", "ca"} <= row.keys()]
    if not kept:
        return ""
    told = []
    for of, name in (("Old images", "old_images"), ("Old class texts", "old_texts")):
        found = [_points(row, name) - _points(row) for row in kept]
        # A stored embedding knows no more than the model that made it.
        known = [
            _points(row, name) - min(_points(row), _points(row, "reference_ca")) for row in kept
        ]
        told.append(
            f"{of} from {min(found):+.1f} to {max(found):+.1f} points of the cleaned model's "
            f"own CA ({sum(found) / len(found):+.1f} on average), {_within(found)} at most "
            f"{WITHIN:g} below; {_within(known)} at most {WITHIN:g} below the lower of its CA and "
            "that of the model which they were stored from"
        )
    behind = Counter(
        f"{row['data']}, {row['arch']}"
        for row in kept
        if min(_points(row, "old_images"), _points(row, "old_texts")) < _points(row) - WITHIN
    )
    whose = "; ".join(f"{count} of {group}" for group, count in behind.items())
    told += [f"Models that fall further behind by either: {whose}"] if behind else []
    return f"After repair, over {len(kept)} cleaned models (rows without †). {'. '.join(told)}."


def _points(row: dict, name: str | None = None) -> float:
    """CA, or an accuracy of the row's drift, in %."""
    return 100 * (row["ca"] if name is None else row["drift"][name])["value"]


def _within(gaps: list[float]) -> str:
    return f"{sum(gap >= -WITHIN for gap in gaps)} of {len(gaps)}"


def section(
    data: str,
    arch: str,
    groups: dict[tuple[str, str], list[dict]],  # by attack and defence
    setting: Setting,
    picture: str | None,
) -> str:
    """One data set and architecture: an overview, the picture, and every figure."""
    attacks = [name for name in ATTACKS if any(attack == name for attack, _ in groups)]
    defences = [name for name in DEFENCES if any(defence == name for _, defence in groups)]
    steps = setting.options("train", data, arch)["steps"]
    size = setting.data[data].image_size
    tested = next(row["ca"]["n"] for rows in groups.values() for row in rows if "ca" in row)
    short = summary(groups)
    parts = [
        f"## {data}, {arch}",
        f"{steps} steps of training, {size} px, {tested} test images.",
        *([] if short is None else [short]),
        "ASR (CA) in %, means over the seeds:",
        table(
            ["attack", *defences],
            [[_attack(a), *(_short(groups.get((a, d))) for d in defences)] for a in attacks],
        ),
    ]
    if picture is not None:
        parts.append(f"![CA against ASR for each attack](quality/{picture})")
    header = ["attack", "rate %", "defence", "CA", "ASR", "PA", "drift before", "drift after"]
    header += ["old index", "probe", "rebound", "control", "pairs", "seconds", "seeds"]
    parts += ["<details><summary>Every figure</summary>", table(header, map(_full, groups.items()))]
    return "\n\n".join([*parts, "</details>"])


def _attack(name: str) -> str:
    return f"{name} (t)" if name in TUNING else name


def _judged(rows: list[dict]) -> list[dict]:
    """Rows with figures that count: of seeds whose attack installed, or without one."""
    return [row for row in rows if row["status"] != NOT_INSTALLED]


def _short(rows: list[dict] | None) -> str:
    if rows is None:
        return "-"
    judged = _judged(rows)
    if not judged:
        return NOT_INSTALLED
    ca = f"{100 * Mean.of(judged, 'ca').value:.1f}"
    if judged[0]["status"] == NO_ATTACK:
        return f"({ca})"
    return f"{100 * Mean.of(judged, 'asr_nontarget').value:.1f} ({ca})"


def _full(item: tuple[tuple[str, str], list[dict]]) -> list[str]:
    (attack, defence), rows = item
    judged = _judged(rows)
    seeds = f"{len(judged)} of {len(rows)}" if len(judged) < len(rows) else str(len(rows))
    seeds += " †" * any("outdated" in row for row in rows)
    rate = rows[0]["rate"]
    about = [_attack(attack), "-" if rate is None else f"{100 * rate:g}", defence]
    shown = judged or [row for row in rows if "ca" in row]  # an attack that failed has its own row
    if not shown:
        return [*about, NOT_INSTALLED, *"----------", seeds]
    attacked = "asr_nontarget" in shown[0]
    drifts = [row["drift"] for row in shown if "drift" in row]
    repairs = [row["repair"] for row in shown if "repair" in row]
    probes = [row["probe"] for row in shown if "probe" in row]
    rebounds = [row["rebound"]["highest"] for row in shown if "rebound" in row]
    losses = [row["control_ca_loss"] for row in shown if row["control_ca_loss"] is not None]

    def mean(values: list[float], form: str) -> str:
        return form.format(sum(values) / len(values)) if values else "-"

    return [
        *about,
        Mean.of(shown, "ca").percent(),
        Mean.of(shown, "asr_nontarget").percent() if attacked else "-",
        Mean.of(shown, "triggered_accuracy").percent() if attacked else "-",
        " / ".join(mean([r[f"{tower}_before"] for r in repairs], "{:.2f}") for tower in TOWERS),
        " / ".join(mean([d[tower]["value"] for d in drifts], "{:.2f}") for tower in TOWERS),
        " / ".join(mean([100 * d[f"old_{t}s"]["value"] for d in drifts], "{:.1f}") for t in TOWERS),
        " ".join(
            mean([100 * p[which] for p in probes], form)
            for which, form in (("new", "{:.1f}"), ("old", "({:.1f})"))
        ),
        mean([100 * value for value in rebounds], "{:.1f}"),
        mean([100 * value for value in losses], "{:.1f}"),
        str(shown[0]["pairs"]),
        mean([row["cpu_seconds"] for row in shown], "{:.0f}"),
        seeds,
    ]
