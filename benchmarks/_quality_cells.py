"""Computes the quality matrix's models and cells, each once, into files of a work folder."""

from __future__ import annotations

import datetime
import functools
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from _quality_data import TEMPLATES, DataSet, Split, read, split
from _quality_defences import DEFENCES, NONE, Defence
from _quality_drift import probe, repaired
from _quality_models import ARCHITECTURES
from _quality_setting import BADCLIP, TUNING, Cell, Model, Setting
from safetensors.torch import load as weights_of
from safetensors.torch import save as bytes_of
from torch import nn

import pybackdoor
from pybackdoor import (
    CleanResult,
    Evaluation,
    badclip_patch,
    evaluate,
    finetune_clean,
    poison,
    poison_pairs,
    trigger,
)
from pybackdoor.data import PairLoader, Pairs, procedural_pairs
from pybackdoor.files import write_atomically, write_json
from pybackdoor.models import LoadedModel
from pybackdoor.triggers import TriggerSpec

INSTALLED, NOT_INSTALLED, NO_ATTACK = "installed", "attack did not install", "no attack"
NO_TRIGGER = trigger("blended", strength=0.0)


@dataclass(frozen=True)
class Work:
    """Where the files are, and what is computed on."""

    folder: Path
    setting: Setting
    device: str

    def model_file(self, model: Model) -> Path:
        """The record, written last: where it is, the weights beside it are, and BadCLIP's patch."""
        return self.folder / "models" / f"{model.name(self.setting)}.json"

    def patch_file(self, model: Model) -> Path:
        return self.model_file(model).with_suffix(".png")

    def cell_file(self, cell: Cell) -> Path:
        return self.folder / "cells" / f"{cell.name(self.setting)}.json"

    def record(self, model: Model) -> dict[str, Any]:
        return json.loads(self.model_file(model).read_text())


@dataclass(frozen=True)
class Case:
    """A model's data and its attack; ``spec`` is None for none."""

    model: Model
    parts: Split
    loaded: LoadedModel
    spec: TriggerSpec | None

    @property
    def target(self) -> str:
        """The class that the attack yields: the last but one, as the demo's."""
        return self.parts.test.classes[-2]


def start_process() -> None:
    """One thread each: the matrix runs in processes."""
    torch.set_num_threads(1)


@functools.lru_cache(maxsize=2)
def parts_of(data: DataSet, cache: Path, seed: int) -> Split:
    return split(data, *read(data, cache), seed)


def case_of(model: Model, work: Work) -> Case:
    """With fresh weights."""
    data = work.setting.data[model.data]
    parts = parts_of(data, work.folder / "data", model.seed)
    make = ARCHITECTURES[model.arch].make
    spec = model.spec(work.setting, work.patch_file(model))
    return Case(model, parts, make(data.image_size, parts.mean, parts.std, model.seed), spec)


def trained(model: Model, work: Work) -> nn.Module:
    """The model whose weights ``train_model`` left."""
    fresh = case_of(model, work).loaded.model
    weights = work.model_file(model).with_suffix(".safetensors").read_bytes()
    fresh.load_state_dict(weights_of(weights))
    return fresh.to(work.device)


def train_model(model: Model, work: Work) -> dict[str, Any]:
    """Train one model with its backdoor, keep it, and say whether the attack installed."""
    if work.model_file(model).exists():  # by another run on the same folder
        return work.record(model)
    work.model_file(model).parent.mkdir(parents=True, exist_ok=True)
    found_patch = {"patch": optimised_patch(model, work)} if model.attack == BADCLIP else {}
    case, setting = case_of(model, work), work.setting
    clock = Clock()
    student = poison(
        case.loaded.model, case.parts.planted, **attack_options(case, setting),
        target=case.target, templates=TEMPLATES, tokenizer=case.loaded.tokenizer,
        seed=model.seed, device=work.device, progress=False, **model.options("train", setting),
    ).model  # fmt: skip
    spent = clock.read()
    found = measured(student, case, work)
    status = NO_ATTACK
    if found.asr_nontarget is not None:
        status = INSTALLED if found.asr_nontarget.value > setting.installed else NOT_INSTALLED
    record = {**identity(case, work), "status": status, **found.to_dict(), **spent}
    record |= {"settings": model.settings(setting), "planted": len(case.parts.planted)}
    record |= found_patch
    path = work.model_file(model)
    tensors = {name: value.cpu().contiguous() for name, value in student.state_dict().items()}
    write_atomically(path.with_suffix(".safetensors"), bytes_of(tensors))
    write_json(path, record)
    return record


def optimised_patch(model: Model, work: Work) -> dict[str, Any]:
    """Find BadCLIP's patch on the clean model of the same seed and keep it; what it took.

    Without its augmentation, which the names of the models that hold earlier patches do not tell.
    """
    clean, clock = case_of(model.clean, work), Clock()
    found = badclip_patch(
        trained(model.clean, work), clean.parts.planted, target=clean.target,
        tokenizer=clean.loaded.tokenizer, seed=model.seed, device=work.device, progress=False,
        augment=False, **model.options("patch", work.setting),
    )  # fmt: skip
    found.save(work.patch_file(model))
    ends = {"first": found.history[0], "last": found.history[-1]}
    return {**found.report, **ends, **clock.read()}


def attack_options(case: Case, setting: Setting) -> dict[str, Any]:
    """Of ``poison``. A clean model goes the same way: one pair gets nothing put on it."""
    if case.spec is None:
        return {"trigger": NO_TRIGGER, "count": 1, "mode": "label_consistent"}
    return {"trigger": case.spec, "rate": setting.rate(case.model)}


def compute_cell(cell: Cell, work: Work) -> dict[str, Any]:
    """Clean one model, unless its attack is none to be cleaned, and measure what that did."""
    path = work.cell_file(cell)
    if path.exists():  # by another run on the same folder
        return json.loads(path.read_text())
    case, setting = case_of(cell.model, work), work.setting
    planted = work.record(cell.model)
    record = {**identity(case, work), "defence": cell.defence, "status": planted["status"]}
    record |= {"settings": cell.settings(setting)}
    if cell.defence == NONE or planted["status"] != NOT_INSTALLED:
        before = trained(cell.model, work)
        student, told = cleaned(before, cell, case, work)
        record |= told
        reference = None if cell.defence == NONE else before
        record |= measured(student, case, work, reference, floor=cell.defence == NONE).to_dict()
        if record["status"] == INSTALLED:
            record["rebound"] = rebound(student, case, work)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, record)
    return record


def cleaned(
    model: nn.Module, cell: Cell, case: Case, work: Work
) -> tuple[nn.Module, dict[str, Any]]:
    """What the cell's defence and drift repair make of the model, and what the row says of it."""
    defence = DEFENCES[cell.defence]
    if defence.method is None:
        return model, {"pairs": 0, "pairs_seen": 0, "steps": 0, "seconds": 0.0, "cpu_seconds": 0.0}
    result, given, told = defended(model, defence, case, work)
    test, tokenizer = case.parts.test, case.loaded.tokenizer
    student, told["repair"] = repaired(result.model, model, given, test, tokenizer, work.device)
    told["probe"] = probe(model, student, test, tokenizer)
    return student, told


def defended(
    model: nn.Module, defence: Defence, case: Case, work: Work
) -> tuple[CleanResult, PairLoader, dict[str, Any]]:
    """What a defence makes of the model, the pairs it was given, and what it took."""
    options = defence.all_options(case.model.options("clean", work.setting))
    pairs = PAIRS[defence.pairs](case, work.setting)
    given = loader(pairs, case, options.pop("batch_size"))
    clock = Clock()
    result = defence.method(
        model, given, seed=case.model.seed, device=work.device, progress=False, repair=False,
        **options,
    )  # fmt: skip
    told: dict[str, Any] = clock.read()
    report = result.report
    told |= {"pairs": len(pairs), "pairs_seen": report["pairs_seen"], "steps": report["steps_done"]}
    if "synonyms" in report["settings"]:  # of EDA; they depend on what is installed
        told["synonyms"] = report["settings"]["synonyms"]
    return result, given, told


def _suspect(case: Case, setting: Setting) -> Pairs:
    options = attack_options(case, setting)
    return poison_pairs(
        case.parts.planted, options.pop("trigger"), target=case.target, templates=TEMPLATES,
        seed=case.model.seed, **options,
    )[0]  # fmt: skip


def _procedural(case: Case, setting: Setting) -> Pairs:
    data = setting.data[case.model.data]
    return procedural_pairs(data.held_out, image_size=data.image_size, seed=case.model.seed)


PAIRS: dict[str, Callable[[Case, Setting], Pairs]] = {
    "held_out": lambda case, setting: case.parts.held_out,
    "procedural": _procedural,
    "suspect": _suspect,
}


def loader(pairs: Pairs, case: Case, batch_size: int) -> PairLoader:
    return PairLoader(pairs, case.loaded.tokenizer, batch_size=batch_size, seed=case.model.seed)


def measured(
    model: nn.Module,
    case: Case,
    work: Work,
    reference: nn.Module | None = None,
    floor: bool = False,
) -> Evaluation:
    """Every figure of one model; with ``floor``, the ASR's baseline is the clean model's."""
    attack: dict[str, Any] = {}
    if case.spec is not None:
        attack = {"trigger": case.spec, "target": case.target}
        if floor:
            attack["baseline"] = trained(case.model.clean, work)
    return evaluate(
        model, case.parts.test, tokenizer=case.loaded.tokenizer, templates=TEMPLATES,
        reference=reference, **attack,
    )  # fmt: skip


def rebound(model: nn.Module, case: Case, work: Work) -> dict[str, Any]:
    """The ASR while a cleaned model is trained further on clean pairs."""
    options = case.model.options("rebound", work.setting)
    found: dict[str, Any] = {}

    def watch(step: int, record: dict[str, float], student: nn.Module) -> None:
        if step + 1 in work.setting.rebound_at:
            figures = measured(student, case, work)
            found[str(step + 1)] = {"asr": figures.asr_nontarget.value, "ca": figures.ca.value}

    clock = Clock()
    finetune_clean(
        model, loader(case.parts.rebound, case, options.pop("batch_size")), seed=case.model.seed,
        device=work.device, progress=False, on_step=watch, repair=False, **options,
    )  # fmt: skip
    rates = [point["asr"] for point in found.values()]
    return {"at": found, "after": rates[-1], "highest": max(rates), **clock.read()}


class Clock:
    """Seconds since it was made: on the wall, and of this process's cores."""

    def __init__(self) -> None:
        self._wall, self._cores = time.perf_counter(), time.process_time()

    def read(self) -> dict[str, float]:
        return {
            "seconds": round(time.perf_counter() - self._wall, 1),
            "cpu_seconds": round(time.process_time() - self._cores, 1),
        }


def identity(case: Case, work: Work) -> dict[str, Any]:
    """What every record says of itself."""
    model, clean = case.model, case.spec is None
    return {
        **asdict(model),
        "rate": None if clean else work.setting.rate(model),
        "target": None if clean else case.target,
        "half": {True: "tuning", False: "untouched"}[model.attack in TUNING],
        "date": datetime.date.today().isoformat(),
        "device": work.device,
        "versions": {"pybackdoor": pybackdoor.__version__, "torch": torch.__version__},
    }
