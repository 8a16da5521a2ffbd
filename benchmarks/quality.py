"""The quality matrix: what each defence does to each attack, and what it costs.

    python benchmarks/quality.py --jobs 2                       # all that is missing
    python benchmarks/quality.py --only data=cifar10 arch=resnet defence=none,par seed=0
    python benchmarks/quality.py --list                         # what there is and what is missing
    python benchmarks/quality.py --report                       # JSON, tables and pictures

Data set x architecture x attack x defence x seed. A model is trained once with its backdoor and
kept for all defences; a model or cell is a file in the work folder, written when it is complete and
named by a hash of its settings (_quality_setting.py), so that a run that was stopped goes on where
it was and changed settings are computed anew; cells of an earlier report in --out with the same
settings are taken from it, others stay in the report, marked, until computed anew. Results do not
depend on --jobs: every process has one thread. CIFAR-10 and Caltech-101 are read from the folder
PYBACKDOOR_DATA. The architecture "pretrained" is computed where it is named, and needs the weights
of the extra [towers].

A row holds CA, ASR of other classes and of all, accuracy under trigger, drift, each with n and a
95 % interval; the ASR in 300 further clean steps; pairs, steps and seconds. An attack whose ASR
does not exceed 90 % is recorded as not installed and not cleaned. What a defence costs on a clean
model is the row of attack "clean". Settings were chosen on the attacks of the tuning half alone.
"""

from __future__ import annotations

import argparse
import difflib
import itertools
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
from _quality_cells import Work, compute_cell, train_model
from _quality_data import pack_path
from _quality_defences import DEFENCES
from _quality_models import ARCHITECTURES, ON_REQUEST
from _quality_report import adopt, write_report
from _quality_run import run, summary
from _quality_setting import ATTACKS, BADCLIP, FULL, TINY, Cell, Model, Setting

from pybackdoor.engine import pick_device, pick_precision
from pybackdoor.files import writable_folder

ROOT = Path(__file__).resolve().parent.parent
WORK = Path.home() / ".cache" / "pybackdoor" / "quality"
AXES = ("data", "arch", "attack", "defence", "seed")
TINY_ONLY = ["arch=resnet", "attack=clean,badnet", "defence=none,par,par_procedural"]


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 when all that was asked for is there, 1 when something failed."""
    options = parsed(arguments)
    setting = TINY if options.tiny else FULL
    cells = plan(setting, chosen(setting, options.only or (TINY_ONLY if options.tiny else [])))
    device = str(pick_device(options.device))
    work = Work(writable_folder(options.work), setting, device)
    adopt(work, options.out)
    if options.list:
        show(cells, work)
        return 0
    if options.report:
        write_report(work, options.out)
        return 0
    cells = [c for c in cells if not work.cell_file(c).exists()]
    warn_if_slow(cells, setting, device)
    for pack in {setting.data[c.model.data].pack for c in cells} - {None}:
        pack_path(pack)  # refuses before the hours, not after
    for arch in {c.model.arch for c in cells}:
        ARCHITECTURES[arch].check()
    models = dict.fromkeys(m for c in cells for m in (c.model.clean, c.model))
    missing = [m for m in models if not work.model_file(m).exists()]
    failed = 0
    for wave in waves(missing):
        failed += run("model", train_model, wave, work, options.jobs)
    ready = [c for c in cells if trained_for(c, work)]
    failed += run("cell", compute_cell, ready, work, options.jobs)
    if failed:
        print(f"{failed} failed; the same command tries them again", file=sys.stderr)
    return int(failed > 0)


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = options.add_argument
    add("--only", nargs="+", metavar="AXIS=A,B", help=f"axes: {', '.join(AXES)}")
    add("--jobs", type=int, default=1, help="processes, of one thread each (default: 1)")
    add("--work", type=Path, default=WORK, metavar="DIR", help=f"models and cells ({WORK})")
    add("--device", help="cpu or cuda; default a GPU if there is one")
    add("--tiny", action="store_true", help="a self-check in seconds; its figures say nothing")
    add("--list", action="store_true", help="say what is there, compute nothing")
    add("--report", action="store_true", help="write the report from what is there")
    add(
        "--out", type=Path, default=ROOT, metavar="DIR",
        help="of the report, this one and an earlier one (the repository)",
    )  # fmt: skip
    found = options.parse_args(arguments)
    if found.jobs < 1:
        options.error(f"--jobs must be at least 1, got {found.jobs}")
    return found


def chosen(setting: Setting, only: Iterable[str]) -> dict[str, list[Any]]:
    """The names on each axis that was filtered.

    Raises:
        ValueError: an axis or a name is unknown; the nearest is offered.
    """
    known = {
        "data": list(setting.data), "arch": list(ARCHITECTURES), "attack": list(ATTACKS),
        "defence": list(DEFENCES),
    }  # fmt: skip
    found: dict[str, list[Any]] = {}
    for part in only:
        axis, _, names = part.partition("=")
        refuse_unknown("--only: axis", axis, AXES)
        found[axis] = names.split(",")
        for name in found[axis]:
            if axis != "seed":
                refuse_unknown(f"--only {axis}", name, known[axis])
            elif not name.isdecimal():
                raise ValueError(f"--only seed: must be a whole number, got {name!r}")
    if "seed" in found:
        found["seed"] = [int(name) for name in found["seed"]]
    known["arch"] = [name for name in ARCHITECTURES if name not in ON_REQUEST]
    return known | found


def refuse_unknown(what: str, name: str, known: Iterable[str]) -> None:
    known = list(known)
    if name not in known:
        near = difflib.get_close_matches(name, known, 1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ValueError(f"{what} must be one of {', '.join(known)}, got {name!r}{hint}")


def plan(setting: Setting, axes: dict[str, list[Any]]) -> list[Cell]:
    """The cells in the order in which they are computed: a seed of a data set after the other."""
    cells = []
    for data, arch in itertools.product(axes["data"], axes["arch"]):
        for seed in axes.get("seed", setting.seeds.get((data, arch), (0,))):
            for attack, defence in itertools.product(axes["attack"], axes["defence"]):
                cells.append(Cell(Model(data, arch, attack, seed), defence))
    return cells


def warn_if_slow(cells: Iterable[Cell], setting: Setting, device: str) -> None:
    """Says beforehand that what is trained in bf16 takes long on a CPU without instructions for it.

    The precision is part of a setting all the same: figures must not depend on the machine.
    """
    precisions = {c.model.options("train", setting)["precision"] for c in cells}
    if "bf16" in precisions and pick_precision("auto", torch.device(device)) != "bf16":
        print(
            f"this {device} has no instructions for bf16, which most models are trained in: that "
            "takes several times as long here",
            file=sys.stderr,
        )


def waves(models: Iterable[Model]) -> list[list[Model]]:
    """One after the other: BadCLIP's patch is found on a clean model, which must be there."""
    parts: list[list[Model]] = [[], []]
    for model in models:
        parts[model.attack == BADCLIP].append(model)
    return [part for part in parts if part]


def trained_for(cell: Cell, work: Work) -> bool:
    """Whether the models that a cell needs are there: its own, and the clean one for the floor."""
    return all(work.model_file(m).exists() for m in (cell.model, cell.model.clean))


def show(cells: list[Cell], work: Work) -> None:
    """What is there, a line per model, and the defences that are missing for it."""
    for model, group in itertools.groupby(cells, key=lambda cell: cell.model):
        missing = [c.defence for c in group if not work.cell_file(c).exists()]
        path = work.model_file(model)
        state = summary(work.record(model)) if path.exists() else "not trained"
        about = f"{model.data} {model.arch} {model.attack} seed {model.seed}"
        print(f"{about}: {state}; missing: {', '.join(missing) or 'nothing'}")
    there = sum(work.cell_file(c).exists() for c in cells)
    print(f"{there} of {len(cells)} cells")


if __name__ == "__main__":
    sys.exit(main())
