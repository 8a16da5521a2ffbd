"""The demo: plant a backdoor in a small CLIP model, see it fire, clean it, read the numbers.

Half of the training pictures are poisoned and trained on; the other half is held out, clean, and
used for cleaning. PAR and plain fine-tuning get the same pairs, order, augmentation, learning rate
and steps. The cleaning settings are the same for every trigger; they were chosen on the triggers
``checkerboard`` and ``sig`` alone.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import nn

from ..clean import CleanResult, two_phase_schedule
from ..data import Labelled, PairLoader, pairs_from_labelled
from ..distributed import Ranks
from ..engine import pick_device
from ..evaluate import evaluate, verdict
from ..files import writable_folder, write_atomically, write_json
from ..methods import finetune_clean, par_clean
from ..methods.par import check_tau
from ..models import LoadedModel, create, preprocess_record, save
from ..options import write_yaml
from ..poison import poison
from ..triggers import trigger
from .config import DemoConfig
from .data import Pictures

SCHEMA = "pybackdoor.demo/1"
TEMPLATES = (
    "a photo of a {}.",
    "a product photo of a {}.",
    "a picture of one {}.",
    "a catalogue image of a {}.",
    "a small photo of the {}.",
)
PATH_IMAGES = 500  # test images for the path that the CA/ASR plot draws
PATH_POINTS = 6


def run(config: DemoConfig, say: Callable[[str], None]) -> dict[str, Any]:
    """Tell the whole story and leave it in ``config.out``.

    Args:
        say: called with a line of text at each turn.
    Returns:
        What ``results.json`` holds.
    Raises:
        ValueError, OSError: naming the option, what was wanted and what came.
    """
    from . import pictures as drawing

    began = time.perf_counter()
    if Ranks().size > 1:
        raise ValueError("the demo runs as one process, not under torchrun")
    check_tau(config.tau)
    two_phase_schedule(config.lr_start, config.lr, 0.0)
    out = writable_folder(config.out)
    write_yaml(config, out / "config.yaml")
    pictures = Pictures.read(config)
    target = _target(config.target, pictures.test.classes)
    spec = trigger(config.trigger, seed=config.seed, grey=pictures.grey)
    planted, held_out = _halves(pictures.train, config.seed)
    say(
        f"{len(planted)} pictures to poison, {len(held_out)} clean ones held out for cleaning, "
        f"{len(pictures.test)} to test on; {len(pictures.test.classes)} classes, "
        f"trigger {spec.name!r} -> {target!r}"
    )
    drawing.triggered_grid(pictures.test, spec, out / "triggered.png")
    device = pick_device(config.device)
    fresh = _new_model(config, pictures)
    common = {
        "precision": "fp32" if device.type == "cpu" else "bf16",
        "seed": config.seed,
        "device": device,
        "progress": config.progress,
    }

    say(f"[1/4] training {config.train_steps} steps with the backdoor planted")
    planted_result = poison(
        fresh.model, pairs_from_labelled(planted, TEMPLATES, config.seed), spec,
        target=target, tokenizer=fresh.tokenizer, templates=TEMPLATES, rate=config.rate,
        steps=config.train_steps, batch_size=config.batch_size, lr=config.train_lr, warmup=30,
        weight_decay=0.05, test=pictures.test, **common,
    )  # fmt: skip
    assert planted_result.verdict is not None  # a test set was given
    say(f"      trigger: {planted_result.verdict.describe()}")
    planted_result.manifest.preprocess = preprocess_record(fresh)
    save(
        fresh._replace(model=planted_result.model), out / "poisoned",
        manifest=planted_result.manifest,
    )  # fmt: skip
    path_test = pictures.test.subset(_spread(len(pictures.test), PATH_IMAGES))

    def clean(method: Callable[..., CleanResult], **own: Any) -> tuple[CleanResult, list]:
        path: list[tuple[float, float]] = []

        def watch(step: int, record: dict[str, float], model: nn.Module) -> None:
            if (step + 1) % math.ceil(config.clean_steps / PATH_POINTS) == 0:
                found = evaluate(
                    model, path_test, tokenizer=fresh.tokenizer, templates=TEMPLATES,
                    trigger=spec, target=target,
                )  # fmt: skip
                path.append((found.asr_nontarget.value, found.ca.value))

        pairs = pairs_from_labelled(held_out, TEMPLATES, config.seed)
        loader = PairLoader(pairs, fresh.tokenizer, batch_size=config.batch_size, seed=config.seed)
        result = method(
            planted_result.model, loader, steps=config.clean_steps, lr_start=config.lr_start,
            lr=config.lr, on_step=watch, **own, **common,
        )  # fmt: skip
        return result, path

    say(
        f"[2/4] cleaning with PAR, {config.clean_steps} steps on clean pairs, trigger unknown to it"
    )
    par, par_path = clean(par_clean, tau=config.tau)
    say(f"[3/4] control: plain fine-tuning, {config.clean_steps} steps on the same pairs")
    control, control_path = clean(finetune_clean)

    say("[4/4] evaluating")
    models = {"poisoned": planted_result.model, "par": par.model, "finetune": control.model}
    figures = {
        name: evaluate(
            model, pictures.test, tokenizer=fresh.tokenizer, templates=TEMPLATES, trigger=spec,
            target=target, reference=None if name == "poisoned" else planted_result.model,
        )
        for name, model in models.items()
    }  # fmt: skip
    results = {
        "schema": SCHEMA,
        "trigger": spec.name,
        "trigger_spec": spec.to_dict(),
        "target": target,
        "verdict": planted_result.verdict.to_dict(),
        "verdicts_after": {n: verdict(e).verdict for n, e in figures.items() if n != "poisoned"},
        "seconds": round(time.perf_counter() - began, 1),
        "models": {name: found.to_dict() for name, found in figures.items()},
        "runs": {"par": par.report, "finetune": control.report},
        "pictures": pictures.source,
        "config": asdict(config),
        "environment": _environment(device),
    }
    write_json(out / "results.json", results)
    drawing.tradeoff(figures, {"par": par_path, "finetune": control_path}, out / "tradeoff.png")
    save(
        fresh._replace(model=par.model), out / "par", manifest=planted_result.manifest,
        extra_files={"evaluation.json": results["models"]["par"], "cleaning.json": par.report},
    )  # fmt: skip
    history = "".join(json.dumps(record) + "\n" for record in par.history)
    write_atomically(out / "par" / "history.jsonl", history.encode())
    return results


def table(results: dict[str, Any]) -> str:
    """The figures for people, in percent with 95 % intervals."""
    rows = [("model", "CA", "ASR, other classes", "accuracy under trigger")]
    labels = {"poisoned": "poisoned", "finetune": "fine-tuned", "par": "PAR"}
    for name, label in labels.items():
        found = results["models"][name]
        cells = [found[key] for key in ("ca", "asr_nontarget", "triggered_accuracy")]
        rows.append(
            (label, *(f"{c['value']:6.1%} [{c['low']:.1%}, {c['high']:.1%}]" for c in cells))
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def _target(name: str | None, classes: list[str]) -> str:
    if name is None:
        return classes[-2]
    if name not in classes:
        raise ValueError(f"target must be one of {', '.join(classes)}, got {name!r}")
    return name


def _halves(train: Labelled, seed: int) -> tuple[Labelled, Labelled]:
    order = np.random.default_rng([seed, 0x68616C66]).permutation(len(train))
    middle = len(order) // 2
    return train.subset(np.sort(order[:middle])), train.subset(np.sort(order[middle:]))


def _new_model(config: DemoConfig, pictures: Pictures) -> LoadedModel:
    """A small open_clip model, fresh: a ResNet and a two-layer text transformer."""
    if config.image_size < 32 or config.image_size % 32:
        raise ValueError(
            f"image_size must be a positive multiple of 32 pixels, got {config.image_size}"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return create(
            {
                "model_cfg": {
                    "embed_dim": 64,
                    "vision_cfg": {
                        "image_size": config.image_size,
                        "layers": [1, 1, 1, 1],
                        "width": 24,
                        "head_width": 32,
                    },
                    "text_cfg": {
                        "context_length": 16,
                        "vocab_size": 49408,
                        "width": 64,
                        "heads": 2,
                        "layers": 2,
                    },
                },
                "preprocess_cfg": {
                    "size": config.image_size,
                    "mean": pictures.mean,
                    "std": pictures.std,
                },
            }
        )


def _spread(n: int, wanted: int) -> np.ndarray:
    """At most ``wanted`` indices in [0, n), evenly spaced."""
    return np.unique(np.linspace(0, n - 1, min(n, wanted)).astype(np.int64))


def _environment(device: torch.device) -> dict[str, Any]:
    from .. import __version__

    return {
        "pybackdoor": __version__,
        "torch": torch.__version__,
        "device": str(device),
        "threads": torch.get_num_threads(),
    }
