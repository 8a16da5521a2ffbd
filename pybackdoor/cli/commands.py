"""What each command does with its resolved options."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from .. import finetune_clean, par_clean, poison
from .._native import build_info
from ..clean import CleaningInterrupted, CleanResult
from ..data import PairLoader
from ..demo import story
from ..distributed import Ranks
from ..engine import pick_device
from ..evaluate import evaluate, verdict
from ..manifest import Manifest
from ..models import LoadedModel, load, save
from ..options import UsageError, write_yaml
from ..triggers import TRIGGERS
from . import inputs
from .configs import CleanConfig, EvalConfig, PoisonConfig
from .text import evaluation_table, info_text


@dataclass(frozen=True)
class Outcome:
    """An exit code, a result for programs and a text for people."""

    code: int
    result: dict[str, Any] | None
    text: str


@dataclass(frozen=True)
class Command:
    about: str
    config: type
    run: Callable[[Any], Outcome]


@dataclass(frozen=True)
class InfoConfig:
    """What was built and what is available."""


class Interrupt(KeyboardInterrupt):
    """Ctrl-C, with word of what was kept."""


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def run_demo(config: story.DemoConfig) -> Outcome:
    results = story.run(config, say)
    write_yaml(config, Path(config.out) / "config.yaml")
    fired = results["verdict"]["verdict"] == "fires"
    text = story.table(results)
    if not fired:
        text += "\n\nThe trigger did not install: no cleaning can be credited with removing it."
    text += f"\n\n{results['seconds']:.0f} s; results, models and pictures are in {config.out}/"
    return Outcome(0 if fired else 1, results, text)


def run_poison(config: PoisonConfig) -> Outcome:
    if config.trigger is None or config.target is None:
        raise UsageError("--trigger and --target are required: what to plant, and what it yields")
    loaded = inputs.read_model(config)
    pairs = inputs.read_pairs(config, loaded)
    test = config.test and inputs.read_labelled(config.test, config, loaded)
    out = _prepared(config.out)
    with _history(out) as record:
        result = poison(
            loaded.model, pairs, inputs.read_trigger(config), target=config.target,
            tokenizer=loaded.tokenizer, templates=inputs.templates(config), rate=config.rate,
            count=config.count, mode=config.mode, steps=config.steps, batch_size=config.batch_size,
            lr=config.lr, warmup=config.warmup, weight_decay=config.weight_decay,
            precision=config.precision, seed=config.seed, device=config.device, test=test or None,
            mean=loaded.preprocess.mean, std=loaded.preprocess.std, progress=config.progress,
            on_step=record,
        )  # fmt: skip
    if _follower():
        return Outcome(0, None, "")
    save(loaded._replace(model=result.model), out, manifest=result.manifest)
    write_yaml(config, out / "config.yaml")
    answer = {"out": str(out), "poisoned": len(result.manifest.samples)}
    if result.verdict is None:
        return Outcome(0, answer, f"{out}: saved; not verified, since no --test was given")
    answer |= {"verdict": result.verdict.to_dict(), "evaluation": result.evaluation.to_dict()}
    text = f"{evaluation_table(answer['evaluation'])}\n\ntrigger {result.verdict.describe()}"
    return Outcome(0 if result.verdict.fires else 1, answer, f"{text}\n{out}: saved")


def run_clean(config: CleanConfig) -> Outcome:
    loaded = inputs.read_model(config)
    pairs = inputs.read_pairs(config, loaded)
    manifest = Manifest.load(Path(config.manifest)) if config.manifest else None
    out = _prepared(config.out)
    Ranks.start(pick_device(config.device))  # before the loader asks which share is its own
    loader = PairLoader(pairs, loaded.tokenizer, batch_size=config.batch_size, seed=config.seed)
    own = {"tau": config.tau} if config.method == "par" else {}
    method = par_clean if config.method == "par" else finetune_clean
    try:
        with _history(out) as record:
            result = method(
                loaded.model, loader, epochs=config.epochs, steps=config.steps,
                lr_start=config.lr_start, lr=config.lr, lr_end=config.lr_end,
                weight_decay=config.weight_decay, augment=config.augment,
                precision=config.precision, seed=config.seed, device=config.device,
                mean=loaded.preprocess.mean, std=loaded.preprocess.std,
                progress=config.progress, on_step=record, **own,
            )  # fmt: skip
    except CleaningInterrupted as stop:
        kept = out / "interrupted"
        if not _follower():
            _save_cleaned(kept, loaded, stop.result, manifest)
        raise Interrupt(f"{stop}; that state is kept in {kept}") from stop
    if _follower():
        return Outcome(0, None, "")
    _save_cleaned(out, loaded, result, manifest)
    write_yaml(config, out / "config.yaml")
    return Outcome(0, {"out": str(out), **result.report}, _cleaning_text(out, result))


def run_eval(config: EvalConfig) -> Outcome:
    loaded = inputs.read_model(config)
    test = inputs.read_labelled(config.test, config, loaded, max_bad=config.max_bad)
    pairs = config.pairs and inputs.read_pairs(config, loaded)
    spec, target = inputs.attack(config)
    device = pick_device(config.device)
    others = {
        name: load(source).model.to(device)
        for name, source in (("baseline", config.baseline), ("reference", config.reference))
        if source is not None
    }
    found = evaluate(
        loaded.model.to(device), test, tokenizer=loaded.tokenizer,
        templates=inputs.templates(config), trigger=spec, target=target, pairs=pairs or None,
        mean=loaded.preprocess.mean, std=loaded.preprocess.std, batch_size=config.batch_size,
        precision=config.precision, **others,
    )  # fmt: skip
    answer: dict[str, Any] = {"evaluation": found.to_dict(), "left_out": test.num_bad}
    text, code = evaluation_table(answer["evaluation"]), 0
    if spec is not None:
        held = verdict(found)
        answer |= {"verdict": held.to_dict(), "trigger": spec.to_dict(), "target": target}
        text += f"\n\ntrigger {spec.name} -> {target}: {held.describe()}"
        code = 1 if held.fires else 0
    else:
        text += "\n\nNo trigger is known, so no attack success rate is measured or claimed."
    if config.out is not None:
        story.write_json(Path(config.out), answer)
    return Outcome(code, answer, text)


def run_info(config: InfoConfig) -> Outcome:
    info = build_info()
    triggers = {name: definition.about for name, definition in TRIGGERS.items()}
    return Outcome(0, {**info, "triggers": triggers}, info_text(info, triggers))


COMMANDS = {
    "demo": Command(
        "Plant a backdoor in a small CLIP model, see it fire, clean it, read the numbers.",
        story.DemoConfig,
        run_demo,
    ),
    "poison": Command(PoisonConfig.__doc__ or "", PoisonConfig, run_poison),
    "clean": Command(CleanConfig.__doc__ or "", CleanConfig, run_clean),
    "eval": Command(EvalConfig.__doc__ or "", EvalConfig, run_eval),
    "info": Command("Print what was built, and which backend each op takes.", InfoConfig, run_info),
}


def _prepared(name: str) -> Path:
    """The output folder, tried for writing before any work is done."""
    return story.writable_folder(name)


def _follower() -> bool:
    """Whether this is one of several processes and not the one that saves."""
    return Ranks().rank != 0


@contextmanager
def _history(out: Path) -> Iterator[Callable[[int, dict[str, float], nn.Module], None]]:
    """A step hook that writes ``history.jsonl``, a line per step, readable while it grows."""
    if _follower():
        yield lambda step, record, model: None
        return
    with open(out / "history.jsonl", "w", encoding="utf-8", buffering=1) as file:
        yield lambda step, record, model: file.write(json.dumps({"step": step, **record}) + "\n")


def _save_cleaned(
    out: Path, loaded: LoadedModel, result: CleanResult, manifest: Manifest | None
) -> None:
    save(
        loaded._replace(model=result.model), out, manifest=manifest,
        extra_files={"cleaning.json": result.report},
    )  # fmt: skip


def _cleaning_text(out: Path, result: CleanResult) -> str:
    lines = [
        f"{out}: cleaned by {result.report['method']} in {result.report['steps_done']} steps, "
        f"{result.report['seconds']:.0f} s"
    ]
    if "s_image" in result.history[-1]:
        cos = {t: 1 - result.history[-1][f"s_{t}"] / 2 for t in ("image", "text")}
        lines.append(
            "The encoders have left the old embedding space (mean cosine "
            f"{cos['image']:.2f} image, {cos['text']:.2f} text): rebuild indexes, probes and "
            "adapters made with the old model."
        )
    lines.append("Whether a backdoor is gone takes `pybackdoor eval` with its trigger.")
    return "\n".join(lines)
