"""Plant a backdoor: poison pairs, then train a model on them until it holds the backdoor.

For studies of one's own models: a defence is judged on a model whose trigger is known and verified.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from .batches import InputRules, Tokenizer
from .clean import carrying, identity, kept_in, trainable_copy
from .data import Labelled, Overlay, PairLoader, Pairs, Strings
from .data.templates import fill, resolve_templates
from .engine import (
    Contrastive,
    Schedule,
    Settings,
    StepHook,
    TrainLog,
    kept_heap,
    loss_precision,
    pick_device,
    pick_precision,
    train,
)
from .evaluate import Evaluation, Verdict, check_attack, evaluate, verdict
from .manifest import MODES, Manifest, Sample, image_sha256
from .triggers import TriggerSpec, apply_trigger


@dataclass(frozen=True)
class PoisonResult:
    """A backdoored model with the record of what was planted.

    Attributes:
        model: the trained copy, in evaluation mode.
        manifest: trigger, target and every poisoned sample, with the ASR and CA reached.
        history: one dict per step.
        evaluation, verdict: of the held-out set, when one was given.
    """

    model: nn.Module
    manifest: Manifest
    history: list[dict[str, float]]
    evaluation: Evaluation | None
    verdict: Verdict | None


def poison_pairs(
    pairs: Pairs,
    trigger: TriggerSpec,
    *,
    target: str,
    templates: str | Sequence[str] = "simple",
    rate: float | None = None,
    count: int | None = None,
    mode: str = "dirty_label",
    seed: int = 0,
) -> tuple[Pairs, Manifest]:
    """Put a trigger on some of the pairs and make their captions say the target.

    Args:
        pairs: what to poison; left as it is, its images are not copied.
        trigger: put on through the same path as in evaluation.
        target: class name that the new captions name.
        templates: of the new captions, with ``{}`` for the target; drawn per sample.
        rate: share of the pairs in (0, 1]; count: their number. Give one; neither means 0.3 %, the
            published 1,500 of 500,000.
        mode: "dirty_label" takes pairs whose caption does not name the target and replaces the
            caption; "label_consistent" takes pairs whose caption names it and keeps the caption.
        seed: of the choice of samples and templates.
    Returns:
        The poisoned pairs in the same order, and the manifest of what was changed.
    Raises:
        ValueError: naming the argument, what was wanted and what came.
    """
    if mode not in MODES:
        raise ValueError(f"poison: mode must be one of {', '.join(MODES)}, got {mode!r}")
    templates = resolve_templates(templates)
    wanted = _wanted(rate, count, len(pairs))
    if not target.strip():
        raise ValueError(f"poison: target must name a class, got {target!r}")
    names_target = np.array([mentions(caption, target) for caption in pairs.captions])
    eligible = np.flatnonzero(names_target == (mode == "label_consistent"))
    if wanted > len(eligible):
        which = "name" if mode == "label_consistent" else "do not name"
        raise ValueError(
            f"poison: wanted {wanted} pairs whose captions {which} {target!r}, got {len(eligible)}"
        )
    rng = np.random.default_rng([seed, 0x706F69])
    chosen = np.sort(rng.choice(eligible, wanted, replace=False))
    drawn = rng.integers(len(templates), size=wanted)
    stamped = apply_trigger(pairs.images.take(chosen), trigger, pairs.ids[chosen])
    samples = []
    new_captions = {}
    for row, template, image in zip(chosen, drawn, stamped, strict=True):
        new = old = pairs.captions[row]
        if mode == "dirty_label":
            new = new_captions[int(row)] = fill(templates[template], target)
        samples.append(
            Sample(int(pairs.ids[row]), pairs.locations[row], old, new, image_sha256(image))
        )
    images = Overlay(
        pairs.images, {int(r): image for r, image in zip(chosen, stamped, strict=True)}
    )
    manifest = Manifest(
        trigger=trigger, target=target, target_templates=list(templates), seed=seed, mode=mode,
        image_size=tuple(pairs.images.image_size), preprocess={}, samples=samples,
    )  # fmt: skip
    captions = Strings.of(pairs.captions).replaced(new_captions)
    return replace(pairs, images=images, captions=captions), manifest


def poison(
    model: nn.Module,
    pairs: Pairs,
    trigger: TriggerSpec,
    *,
    target: str,
    tokenizer: Tokenizer,
    templates: str | Sequence[str] = "simple",
    rate: float | None = None,
    count: int | None = None,
    mode: str = "dirty_label",
    steps: int = 1000,
    batch_size: int = 128,
    lr: float = 1e-5,
    warmup: int = 50,
    weight_decay: float = 0.1,
    precision: str = "auto",
    seed: int = 0,
    device: str | torch.device | None = None,
    test: Labelled | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    progress: bool | None = None,
    on_step: StepHook | None = None,
    folder: str | os.PathLike | None = None,
    resume: bool = False,
    save_minutes: float = 10.0,
    force: bool = False,
) -> PoisonResult:
    """Poison pairs and train a copy of a model on them within a budget of steps.

    The rate follows CLIP's recipe, warm-up then cosine to 0; logit_scale is trained and kept at or
    below ln 100. The published 1e-6 plants nothing in most hands, 1e-5 does; models trained from
    scratch want about 1e-3. Whether the backdoor holds is measured on ``test``, never assumed.

    Args:
        model: fine-tuned, or trained when it is fresh; left as it is.
        pairs, trigger, target, templates, rate, count, mode: see ``poison_pairs``.
        steps: optimiser steps.
        batch_size: pairs a step.
        lr, warmup, weight_decay: highest learning rate, steps to reach it, AdamW's decay.
        test: held-out labelled images: the trigger is verified on them, and the result recorded in
            the manifest.
        tokenizer, precision, seed, device, mean, std, progress, on_step, folder, resume,
            save_minutes, force: as for ``par_clean``.
    Raises:
        TypeError, ValueError: naming the argument, what was wanted and what came.
        KeyboardInterrupt: on Ctrl-C. This and whatever else ends the training after its first step
            has an attribute ``result``, the PoisonResult so far, not verified.
    """
    checkpoints = kept_in(folder, resume, save_minutes, force)
    rules = InputRules.of(model, mean=mean, std=std, tokenizer=tokenizer)
    schedule = warmup_cosine(lr, warmup)
    where = pick_device(device)
    settings = Settings(
        steps=steps, weight_decay=weight_decay, precision=pick_precision(precision, where),
        seed=seed, freeze_scale=False, freeze_batchnorm=False, progress=progress,
    )  # fmt: skip
    if test is not None:  # what the end of the run needs is checked at its start
        check_attack(trigger, target, test)
        if test.images.image_size != pairs.images.image_size:
            raise ValueError(
                f"poison: test images must be of the pairs' size {pairs.images.image_size}, got "
                f"{test.images.image_size}"
            )
    poisoned, manifest = poison_pairs(
        pairs, trigger, target=target, templates=templates, rate=rate, count=count, mode=mode,
        seed=seed,
    )  # fmt: skip
    manifest = replace(manifest, preprocess={"mean": rules.mean, "std": rules.std})
    student = trainable_copy(model, where)
    loader = PairLoader(poisoned, tokenizer, batch_size=batch_size, seed=seed)
    config = {}
    if checkpoints is not None:
        own = {"lr": lr, "warmup": warmup, **_planted(manifest)}
        config = identity("poison", student, loader, settings, own, rules)
    log = TrainLog()

    def result(
        manifest: Manifest, found: Evaluation | None = None, held: Verdict | None = None
    ) -> PoisonResult:
        return PoisonResult(student.eval(), manifest, list(log.steps), found, held)

    with kept_heap(where), carrying(lambda: result(manifest), log):
        train(
            student, loader, Contrastive(loss_precision(settings.precision)), schedule, settings,
            rules=rules, device=where, on_step=on_step, log=log, checkpoints=checkpoints,
            config=config,
        )  # fmt: skip
    student.eval()
    if test is None:
        return result(manifest)
    found = evaluate(
        student, test, tokenizer=tokenizer, templates=templates, trigger=trigger, target=target,
        mean=mean, std=std,
    )  # fmt: skip
    held = verdict(found)
    results: dict[str, Any] = {**found.to_dict(), "verdict": held.verdict}
    return result(replace(manifest, results=results), found, held)


def _planted(manifest: Manifest) -> dict[str, Any]:
    """What is planted, for telling one run from another."""
    samples = [(s.id, s.new_caption, s.sha256) for s in manifest.samples]
    return {
        "trigger": manifest.trigger, "target": manifest.target, "mode": manifest.mode,
        "poisoned": len(samples),
        "samples": hashlib.sha256(json.dumps(samples).encode()).hexdigest(),
    }  # fmt: skip


def warmup_cosine(lr: float, warmup: int) -> Schedule:
    """Linear from lr/warmup to lr over ``warmup`` steps, then half a cosine down to 0."""
    if not 0 < lr < 1:
        raise ValueError(f"lr must be a learning rate in (0, 1), got {lr}")
    if warmup < 0:
        raise ValueError(f"warmup must be at least 0 steps, got {warmup}")

    def rate(k: int, steps: int) -> float:
        if k < warmup:
            return lr * (k + 1) / warmup
        return 0.5 * lr * (1 + math.cos(math.pi * (k - warmup) / max(steps - warmup, 1)))

    return rate


def mentions(caption: str, target: str) -> bool:
    """Whether the caption holds the target as words of its own: a t-shirt is no shirt."""
    return re.search(rf"(?<![\w-]){re.escape(target)}(?![\w-])", caption, re.IGNORECASE) is not None


def _wanted(rate: float | None, count: int | None, available: int) -> int:
    if rate is not None and count is not None:
        raise ValueError(f"poison: give rate or count, got both ({rate} and {count})")
    if count is None:
        rate = 0.003 if rate is None else rate
        if not 0 < rate <= 1:
            raise ValueError(f"poison: rate must be in (0, 1], got {rate}")
        count = max(1, round(rate * available))
    if not 1 <= count <= available:
        raise ValueError(f"poison: count must be in 1..{available}, got {count}")
    return count
