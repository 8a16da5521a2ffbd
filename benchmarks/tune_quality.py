"""Chooses the defences' settings of the quality matrix, on its tuning half alone.

    python benchmarks/tune_quality.py --work DIR --jobs 2      # of quality.py; goes on where it was
    python benchmarks/tune_quality.py --work DIR --only invert
    python benchmarks/tune_quality.py --work DIR --data caltech101 --arch pretrained

Each candidate of a method cleans those of the matrix's models, CIFAR-10's ResNets unless said
otherwise, that carry the attacks of the tuning half (seed 0). The rule was fixed before any of it
was run: of the candidates that cost at most MOST points of CA, a mean over these attacks, the one
with the lowest mean ASR; where none is that cheap, the cheapest. The candidates were not: their
list grew while the tuning half was looked at. The rows, and which candidate won, go to
benchmarks/results/quality_tuning.json (of other architectures than the ResNet:
quality_tuning_<arch>.json), once all are there; the winners are written into _quality_defences.py
and _quality_setting.py by hand.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from _common import machine
from _quality_cells import (
    INSTALLED,
    Work,
    case_of,
    defended,
    identity,
    measured,
    train_model,
    trained,
)
from _quality_defences import DEFENCES, Defence
from _quality_run import run
from _quality_setting import FULL, TUNING, Model, Setting, short_hash
from _quality_summary import chosen_settings, mean

from pybackdoor.files import write_json

MOST = 3.0  # points of CA
OUT = Path(__file__).parent / "results"
RATES = (2e-4, 7e-4, 1.4e-3, 2e-3, 3e-3)  # the last is that of training


def rates(*starts: float) -> list[dict[str, Any]]:
    """Learning rates that fall to a fourteenth, as the demo's do."""
    return [{"lr_start": start, "lr": start / 14} for start in starts]


CANDIDATES: dict[str, dict[str, list[dict[str, Any]]]] = {
    "resnet": {
        "finetune": [
            *rates(1e-4, *RATES, 4e-4),
            *({**rate, "augment": False} for rate in rates(1.4e-3)),
        ],
        "par": [
            *rates(*RATES),
            *({**rate, "tau": tau} for tau in (1.0, 1.5) for rate in rates(1.4e-3, 2e-3)),
            *(
                {**rate, **more, "augment": False}
                for more in ({}, {"tau": 1.0})
                for rate in rates(1.4e-3)
            ),
        ],
        "cleanclip": rates(7e-4, 1.4e-3, 2e-3),
        "roclip": [{**rate, "pool_size": 200} for rate in rates(7e-4, 1.4e-3, 2e-3)],
        "ft_sam": [
            *rates(1e-5, 2e-5, 5e-5),
            *({**rate, "rho": rho} for rho in (0.002, 0.01) for rate in rates(1.4e-3)),
        ],
        "invert": [
            {**rate, "opacity": opacity, "share": share, **more}
            for start, opacity, share, more in (
                (7e-4, 0.3, 0.5, {}),
                (1.4e-3, 0.3, 0.5, {}),
                (7e-4, 0.3, 0.25, {}),
                (7e-4, 0.1, 0.5, {}),
                (1.4e-3, 0.1, 0.5, {}),
                (1.4e-3, 0.1, 0.25, {}),
                (1.4e-3, 0.1, 0.5, {"every": 100, "inversion_steps": 300}),
            )
            for rate in rates(start)
        ],
    },
    # A step of these takes seconds: the other methods take fine-tuning's learning rate, and what
    # else was chosen on the ResNet.
    "pretrained": {"finetune": rates(2e-4, 7e-4)},
}


@dataclass(frozen=True)
class Trial:
    """One candidate of a defence on one model."""

    defence: str
    candidate: int
    model: Model

    def trying(self) -> Defence:
        method = DEFENCES[self.defence].method
        return Defence(method, CANDIDATES[self.model.arch][self.defence][self.candidate])

    def settings(self, setting: Setting) -> dict[str, Any]:
        options = self.trying().settings(self.model.options("clean", setting))
        return {"model": self.model.settings(setting), "defence": self.defence, **options}

    def name(self, setting: Setting) -> str:
        """Of its file."""
        return f"{self.defence}-{self.model.attack}-{short_hash(self.settings(setting))}"

    def file(self, work: Work) -> Path:
        return work.folder / "tuning" / f"{self.name(work.setting)}.json"


def compute(trial: Trial, work: Work) -> dict[str, Any]:
    """One row."""
    case, before = case_of(trial.model, work), train_model(trial.model, work)
    if before["status"] != INSTALLED:
        raise RuntimeError(f"{trial.model.attack}: {before['status']}")
    model = trained(trial.model, work)
    result, _, told = defended(model, trial.trying(), case, work)
    found = measured(result.model, case, work)
    row = {**identity(case, work), "defence": trial.defence, "status": before["status"], **told}
    row |= {"options": trial.trying().options}
    row |= {"ca_before": before["ca"]["value"], "asr_before": before["asr_nontarget"]["value"]}
    row |= {"ca": found.ca.to_dict(), "asr_nontarget": found.asr_nontarget.to_dict()}
    trial.file(work).parent.mkdir(exist_ok=True)
    write_json(trial.file(work), row)
    return row


def judged(trials: list[Trial], work: Work) -> list[dict[str, Any]]:
    """Each candidate's means over the attacks, and whether the rule takes it."""
    groups = itertools.groupby(trials, key=lambda t: (t.defence, t.candidate))
    candidates = [(defence, list(group)) for (defence, _), group in groups]
    found = []
    for defence, group in candidates:
        rows = [json.loads(t.file(work).read_text()) for t in group if t.file(work).exists()]
        if len(rows) == len(TUNING):
            found.append({
                "defence": defence,
                "options": rows[0]["options"],
                "ca_loss": mean(row["ca_before"] - row["ca"]["value"] for row in rows),
                "asr": mean(row["asr_nontarget"]["value"] for row in rows),
                "cpu_seconds": mean(row["cpu_seconds"] for row in rows),
                "rows": rows,
            })  # fmt: skip
    for defence in dict.fromkeys(name for name, _ in candidates):
        own = [one for one in found if one["defence"] == defence]
        complete = len(own) == sum(name == defence for name, _ in candidates)
        for one in own:
            one["chosen"] = complete and one is winner(own)
    return found


def results_of(arch: str) -> Path:
    """The file of the committed results."""
    return OUT / f"quality_tuning{'' if arch == 'resnet' else f'_{arch}'}.json"


def winner(candidates: list[dict[str, Any]]) -> dict[str, Any]:
    """Of one defence, by the rule."""
    cheap = [one for one in candidates if 100 * one["ca_loss"] <= MOST]
    if cheap:
        return min(cheap, key=lambda one: one["asr"])
    return min(candidates, key=lambda one: one["ca_loss"])


def main(arguments: list[str] | None = None, setting: Setting = FULL) -> int:
    """Exit status: 1 when a trial failed."""
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--data", default=next(iter(setting.data)), choices=setting.data)
    options.add_argument("--arch", default="resnet", choices=CANDIDATES)
    options.add_argument("--only", nargs="+", metavar="METHOD", help="default: all")
    options.add_argument("--jobs", type=int, default=1, help="processes, of one thread each")
    options.add_argument("--work", type=Path, required=True, metavar="DIR", help="of quality.py")
    options.add_argument("--device", default="cpu")
    options.add_argument("--json", type=Path, metavar="FILE", help="instead of the file above")
    chosen = options.parse_args(arguments)
    methods = CANDIDATES[chosen.arch]
    only = chosen.only or list(methods)
    if unknown := set(only) - set(methods):
        options.error(f"--only must be of {', '.join(methods)}, got {', '.join(sorted(unknown))}")
    out = chosen.json or results_of(chosen.arch)
    work = Work(chosen.work, setting, chosen.device)
    trials = [
        Trial(defence, number, Model(chosen.data, chosen.arch, attack, 0))
        for defence, candidates in methods.items()
        for number in range(len(candidates))
        for attack in TUNING
    ]
    models = dict.fromkeys(t.model for t in trials)
    failed = run("model", train_model, list(models), work, chosen.jobs)
    missing = [t for t in trials if t.defence in only and not t.file(work).exists()]
    failed += run("trial", compute, missing, work, chosen.jobs)
    found = judged(trials, work)
    print(chosen_settings({"candidates": found}))
    lacking = sum(not t.file(work).exists() for t in trials)
    if lacking:
        print(f"{lacking} of {len(trials)} trials are missing: {out} is not written")
        return int(failed > 0)
    write_json(out, {"machine": machine(), "most_ca_loss": MOST, "candidates": found})
    return 0


if __name__ == "__main__":
    sys.exit(main())
