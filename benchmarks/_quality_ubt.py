"""What bench_ubt.py measured, as tables for the page of the quality matrix."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from _quality_cells import INSTALLED
from _quality_setting import CLEAN, TUNING
from _tables import table

from pybackdoor.ubt.gate import LEAST_SWING
from pybackdoor.ubt.ranking import EXCESS

RATE = 0.01  # of ubt.json
# Below benchmarks/results.
FILES = (
    "ubt.json", "ubt_vit.json", "ubt_kept.json", "ubt_gate.json", "ubt_gate_badnet.json",
)  # fmt: skip
CLEANED = """## UBT-style unlearning

`python benchmarks/bench_ubt.py`: the small {arch} trained on its {planted:,} CIFAR-10 pairs,
{rate:g} % of them poisoned; one seed, k = {k}, the number of poisoned pairs. P@k is precision =
recall among the k most suspicious pairs by each ranking (`truth`: an oracle's), swing how clearly
these are of their word and lose it once disturbed, of which the gate wants {least:g}. `ubt_clean`
has no clean pairs; PAR beside it has 10,000. `k found`: it was not told k, and P@k is the precision
among those it found. Seconds are of one core, and those of a ranking hold detection. (t): settings
were chosen on this attack."""
IMAGE = """The same with the small {arch} ({trained}). `image side`: the words are
forgotten on the {share:g} % most suspicious patches of each image alone (`image_share`), in
parentheses the share of the trigger's pixels that lie in them. ‡: any of the way cost too much
accuracy, so that nothing is forgotten. Attacks that did not install: {failed}."""
KEPT = """For the rows above, the model went on training on all but the 2 k most suspicious pairs.
Now, by fragility, only the less suspicious half of the word's other pairs is kept. The reason: on
one of the matrix's models of BadNet-Stripes (5 % poisoned) a quarter of the poisoned pairs had been
found, the kept pairs taught the model the rest anew, and 36 % of the ASR stayed. The rule was
chosen in sight of this figure and of no other. With it, on models trained anew ({steps}):"""
GATE = f"""The gate on separately trained models, `bench_ubt.py --gate-only`: how many pairs are
poisoned is not given but found, as for a user. Lowest to highest of these runs: precision of the
pairs found; excess of cohesion, of which the gate by fragility wants {EXCESS["fragility"]:g};
swing, of which it wants {LEAST_SWING:g}. The definition of the swing was changed twice: after one
of the clean models of seeds 0 to 8 had fired, before those from 9 on had been looked at; and after
the swing of one model of BadNet-Stripes had been seen to depend on how many pairs were found. The
threshold was 0.5 until a clean model of seed 9 came near to it. On the poisoned model that was
missed too many pairs were found, of which only a third were poisoned: too few for their cohesion,
while its swing is like that of the others."""
SINCE = """The rule for how many pairs are found was then chosen anew, on weak triggers of the two
kinds that settings are chosen on, but in sight of the BadNet of seed 0 below, which a first version
had not helped. The rows above are of the search before that; its swing, by which clean models are
stopped, is the same. BadNet by the search as it is now, on models trained anew:"""


def sections(folder: Path) -> list[str]:
    """The parts of the page that the files in ``folder`` give."""
    cleaned, image, kept, gate, since = (_read(folder / name) for name in FILES)
    parts = [] if cleaned is None else [_introduction(cleaned), _cleaned(cleaned)]
    parts += [] if image is None else [_of_images(image), _cleaned(image)]
    parts += [] if kept is None else [KEPT.format(steps=_steps(kept)), _cleaned(kept)]
    parts += [] if gate is None else [GATE, _gates(gate)]
    return [*parts, *([] if since is None else [SINCE, _gates(since)])]


def _read(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text()) if path.exists() else None


def _introduction(found: dict[str, Any]) -> str:
    first = found["cells"][0]
    return CLEANED.format(
        arch=first["arch"], planted=round(first["k"] / first["rate"]), k=first["k"],
        rate=100 * first["rate"], least=LEAST_SWING,
    )  # fmt: skip


def _of_images(found: dict[str, Any]) -> str:
    cells = found["cells"]
    failed = [
        f"{_attack(cell)} (ASR {_percent(cell['asr_nontarget'])})"
        for cell in cells
        if cell["status"] != INSTALLED
    ]
    trained = sorted({(cell["rate"], cell["steps"]) for cell in cells})
    return IMAGE.format(
        arch=cells[0]["arch"], share=100 * found["image_share"], failed=", ".join(failed) or "none",
        trained="; ".join(f"{100 * rate:g} % poisoned: {steps:,} steps" for rate, steps in trained),
    )  # fmt: skip


def _steps(found: dict[str, Any]) -> str:
    return ", ".join(f"{_attack(cell)} {cell['steps']:,} steps" for cell in found["cells"])


def _attack(cell: dict[str, Any]) -> str:
    """With its rate where that is not the first table's."""
    name = f"{cell['attack']} (t)" if cell["attack"] in TUNING else cell["attack"]
    return name if cell["rate"] == RATE else f"{name}, {100 * cell['rate']:g} %"


def _cleaned(found: dict[str, Any]) -> str:
    header = ["attack", "ranking", "P@k", "gate", "swing", "CA before", "CA", "ASR before", "ASR"]
    cells = [cell for cell in found["cells"] if cell["status"] == INSTALLED]
    return table([*header, "seconds"], [row for cell in cells for row in _rows(cell)])


def _rows(cell: dict[str, Any]) -> Iterable[list[str]]:
    runs = list(cell["runs"].items())
    if "par" in cell:
        runs.append(("PAR", cell["par"]))
    for ranking, run in runs:
        gate, after = run.get("gate"), run.get("after")
        yield [
            _attack(cell),
            _named(ranking, run),
            f"{run['precision_at_k']:.3f}" if "precision_at_k" in run else "-",
            "-" if gate is None else "fires" if gate["fires"] else "stops",
            "-" if gate is None or gate["swing"] is None else f"{gate['swing']:.2f}",
            _percent(cell["ca"]),
            "-" if after is None else _percent(after["ca"]),
            _percent(cell["asr_nontarget"]),
            "-" if after is None else _percent(after["asr_nontarget"]),
            f"{run['cpu_seconds']:.0f}",
        ]


def _named(ranking: str, run: dict[str, Any]) -> str:
    """With the share of the trigger that the image side kept, and whether nothing is forgotten."""
    kept = f" ({100 * run['trigger_kept']:.0f} %)" if "trigger_kept" in run else ""
    return ranking + kept + " ‡" * (run.get("way") == 0)


def _percent(estimate: dict[str, float]) -> str:
    return f"{100 * estimate['value']:.1f}"


def _gates(found: dict[str, Any]) -> str:
    """How often each ranking's gate fires, on models without and with a backdoor."""
    groups: dict[tuple[str, str, int], list[dict]] = {}
    for cell in found["cells"]:
        groups.setdefault((cell["arch"], cell["attack"], cell["steps"]), []).append(cell)
    rows = []
    order = sorted(groups.items(), key=lambda group: (group[0][0], group[0][1] != CLEAN))
    for (arch, attack, steps), cells in order:
        held = [cell for cell in cells if attack == CLEAN or cell["status"] == INSTALLED]
        installed = "-" if attack == CLEAN else f"{len(held)} of {len(cells)}"
        for ranking in found["rankings"]:
            runs = [cell["runs"][ranking] for cell in held if ranking in cell["runs"]]
            gates = [run["gate"] for run in runs]
            rows.append([
                arch, attack, str(steps), installed, ranking,
                f"{sum(gate['fires'] for gate in gates)} of {len(gates)}",
                _reach(run["precision_at_k"] for run in runs if "precision_at_k" in run),
                _reach(gate["statistic"] - gate["matched"] for gate in gates),
                _reach(gate["swing"] for gate in gates if gate["swing"] is not None),
            ])  # fmt: skip
    header = [
        "model", "attack", "steps", "installed", "ranking", "fires", "precision", "excess", "swing"
    ]  # fmt: skip
    return table(header, rows)


def _reach(values: Iterable[float]) -> str:
    """The lowest and the highest."""
    found = sorted(values)
    return f"{found[0]:.2f} to {found[-1]:.2f}" if found else "-"
