"""From options to the things they name: models, data sets, triggers."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from .. import data
from ..data.tables import IMAGE_KEYS
from ..data.templates import fill, resolve_templates
from ..data.tokens import caption_told_apart
from ..engine import pick_device
from ..manifest import Manifest
from ..models import MANIFEST, LoadedModel, is_architecture, load
from ..options import UsageError
from ..triggers import TriggerSpec, trigger
from .configs import (
    EvalConfig,
    ModelOptions,
    PairOptions,
    PoisonConfig,
    PromptOptions,
    TriggerOptions,
)


def read_model(config: ModelOptions, *, untrained: bool = False) -> LoadedModel:
    """The model that the options name.

    Args:
        untrained: whether an architecture alone will do, whose weights are random.
    """
    there = Path(config.model.removeprefix("local-dir:")).exists()
    if not untrained and config.pretrained is None and not there and is_architecture(config.model):
        raise UsageError(
            f"--model {config.model} is an architecture, whose weights would be random: add "
            "--pretrained with one of its tags or a weight file, or name your model's folder"
        )
    return load(config.model, arch=config.arch, pretrained=config.pretrained)


def read_pairs(
    config: PairOptions | EvalConfig, loaded: LoadedModel, *, whole: bool = False
) -> data.Pairs:
    """Pairs at the model's size: shards, parquet files, a csv or tsv, or class folders.

    Args:
        whole: decode all images now and leave out the broken ones, instead of when they are met.
    """
    source = config.pairs
    common = _decoding(config, loaded)
    common["max_bad"] = config.max_bad or 0.0  # unless told otherwise, evaluation drops nothing
    keys = {"image_key": config.image_key, "caption_key": config.caption_key}
    cache = {"cache": getattr(config, "cache", "disk"), "decode": getattr(config, "decode", "cpu")}
    for name, where in cache.items():
        if where == "device":
            cache[name] = pick_device(config.device)
    kind = pairs_kind(source)
    if kind == "folder":
        return data.pairs_from_folder(
            source, templates=templates(config), classes=config.classes, **cache, **common
        )
    if kind == "shards":
        pairs = data.pairs_from_shards(source, **cache, **common)
    elif kind == "parquet":
        pairs = data.pairs_from_parquet(source, **keys, **cache, **common)
    else:
        pairs = data.pairs_from_csv(source, **keys, **cache, **common)
    return pairs.decoded(config.progress) if whole else pairs


def pairs_kind(source: str) -> str:
    """What a --pairs names, by its suffix or its content: shards, parquet, folder or table."""
    path = Path(source)
    if path.is_dir():
        for kind, suffix in (("shards", "*.tar"), ("parquet", "*.parquet")):
            if next(path.glob(suffix), None) is not None:
                return kind
        return "folder"
    name = source.lower()
    if name.startswith("pipe:") or re.search(r"\.(tar|tgz)(\.\w+)?$", name):
        return "shards"  # of a compressed one, the reader says what to do
    return "parquet" if name.endswith(".parquet") else "table"


def read_labelled(
    path: str, config: PoisonConfig | EvalConfig, loaded: LoadedModel, max_bad: float | None = None
) -> data.Labelled:
    """A labelled set at the model's size: a csv, or a folder of class folders.

    A csv's images stand under --image-key, as those of the pairs do, or else under a known name.
    """
    common = _decoding(config, loaded) | {"max_bad": max_bad, "classes": config.classes}
    if Path(path).is_dir():
        return data.labelled_from_folder(path, **common)
    own = () if config.image_key is None else (config.image_key,)
    keys = tuple(dict.fromkeys((*own, *IMAGE_KEYS)))
    return data.labelled_from_csv(path, image_key=keys, **common)


def refuse_other_tokens(
    option: str, other: LoadedModel, loaded: LoadedModel, captions: Sequence[str]
) -> None:
    """A model that is measured beside another on these captions must read the same tokens."""
    wanted, got = (each.tokenizer.context_length for each in (loaded, other))
    if wanted != got:
        raise UsageError(f"--{option} must take {wanted} tokens, as --model does, got {got}")
    caption = caption_told_apart(loaded.tokenizer, other.tokenizer, captions)
    if caption is not None:
        raise UsageError(
            f"--{option} must have the tokenizer of --model, got one that makes other tokens of "
            f"{caption!r}"
        )


def templates(config: PromptOptions) -> str | tuple[str, ...]:
    """A set's name, or the prompts themselves."""
    one = len(config.templates) == 1
    return config.templates[0] if one else config.templates


def prompts(config: PromptOptions, test: data.Labelled) -> list[str]:
    """The captions of a labelled set's classes."""
    forms = resolve_templates(templates(config))
    return [fill(form, name) for name in test.classes for form in forms]


def read_trigger(config: TriggerOptions) -> TriggerSpec:
    """The trigger that the options describe."""
    options: dict[str, Any] = {
        "file": config.trigger_file,
        "mask_file": config.trigger_mask,
        "strength": config.strength,
        "size": config.size,
        "placement": config.placement,
    }
    return trigger(
        config.trigger, seed=config.trigger_seed, per_image=config.per_image, grey=config.grey,
        **{name: value for name, value in options.items() if value is not None},
    )  # fmt: skip


def attack(config: EvalConfig, loaded: LoadedModel) -> tuple[TriggerSpec | None, str | None]:
    """Trigger and target: of the options, else of the manifest, else of the model's manifest.

    A manifest's trigger is only judged at the size it was planted at.
    """
    if config.trigger is not None:
        if config.target is None:
            raise UsageError("--target is required beside --trigger: the class it yields")
        if config.manifest is not None:
            raise UsageError("--trigger and --manifest both say what was planted: give one of them")
        return read_trigger(config), config.target
    for name in (field.name for field in fields(TriggerOptions)):
        if name != "target" and getattr(config, name) != getattr(TriggerOptions, name):
            raise UsageError(f"--{name.replace('_', '-')} is of a --trigger, which is not given")
    manifest = read_manifest(config.manifest, config.model)
    if manifest is None:
        if config.target is not None:
            raise UsageError(
                f"--target {config.target} needs a trigger that yields it: name it with --trigger, "
                "or give --manifest"
            )
        return None, None
    size = loaded.preprocess.size
    if tuple(manifest.image_size) != (size, size):
        height, width = manifest.image_size
        raise ValueError(
            f"the manifest's trigger was planted at {height}x{width} pixels, this model takes "
            f"{size}x{size}: name the trigger with --trigger to judge it at another size"
        )
    return manifest.spec, config.target or manifest.target


def read_manifest(path: str | None, model: str) -> Manifest | None:
    """The manifest named, else the one in the model's folder, if there is one."""
    if path is not None:
        return Manifest.load(Path(path))
    beside = Path(model.removeprefix("local-dir:")) / MANIFEST
    return Manifest.load(beside) if beside.is_file() else None


def refuse_overwriting(out: Path, names: Iterable[str], **given: str | None) -> None:
    """The files that options name must not be those that are written to ``out``."""
    for option, path in given.items():
        for name in names:
            if path is not None and Path(path).is_file() and (out / name).exists():
                if os.path.samefile(path, out / name):
                    raise UsageError(
                        f"--{option} {path} would be overwritten: choose another folder than "
                        f"--out {out}"
                    )


def _decoding(config: ModelOptions, loaded: LoadedModel) -> dict[str, Any]:
    wanted = loaded.preprocess
    return {
        "image_size": wanted.size,
        "resize_mode": wanted.resize_mode,
        "interpolation": wanted.interpolation,
        "cache_dir": config.cache_dir,
        "progress": config.progress,
    }
