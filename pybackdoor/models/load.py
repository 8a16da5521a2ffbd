"""One call from a name, a folder, a hub id or a weight file to a model that is ready to clean."""

import difflib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from .._backend import check_device
from . import hf, hub, openclip
from .checkpoint import load_weights, read_checkpoint, weight_files
from .folder import finish_interrupted, verify
from .preprocess import Preprocess
from .protocol import check_clip, check_finite
from .sniff import CheckpointError
from .tokenizer import Tokenizer

_LOCAL, _HUB = "local-dir:", "hf-hub:"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp64": torch.float64,
}


class LoadedModel(NamedTuple):
    """A model and what belongs to it.

    Attributes:
        model: in eval mode; encode_image, encode_text, logit_scale (`check_clip`).
        preprocess: Pillow image -> uint8 pixels, with mean and std of the normalisation to follow.
        tokenizer: strings -> [n, context_length] int64.
        config: "format" ("open_clip" | "hf"), "source", "quick_gelu", "preprocess_cfg", and
            "model_cfg" for open_clip; enough for `save`.
    """

    model: nn.Module
    preprocess: Preprocess
    tokenizer: Tokenizer
    config: dict[str, Any]


def load(
    source: str | os.PathLike,
    *,
    device: str | torch.device = "cpu",
    precision: str = "fp32",
    pretrained: str | os.PathLike | None = None,
    arch: str | os.PathLike | None = None,
    quick_gelu: bool | None = None,
    cache_dir: str | None = None,
) -> LoadedModel:
    """Loads a CLIP model. Nothing in its files is executed.

    Weights are read from safetensors, or by torch's weights-only reader, and must fit the
    architecture name by name. A folder's `pybackdoor.json`, where there is one, must match.

    Args:
        source: one of
            - an open_clip architecture, "ViT-B-32" (random weights unless `pretrained` is given);
            - a folder, also as "local-dir:<folder>", with open_clip_config.json and its weights,
              or of a Hugging Face CLIPModel (`[hf]` extra); it goes before an architecture of
              the same name;
            - a hub id, "owner/name" or "hf-hub:owner/name", of either format;
            - a weight file, with `arch`.
        device: where the model goes.
        precision: dtype of its weights: "fp32", "bf16", "fp16" or "fp64"; fp32 suits cleaning.
        pretrained: only with an architecture: one of open_clip's tags, or a weight file.
        arch: only with a weight file: an architecture, or a folder with open_clip_config.json.
        quick_gelu: overrides the activation that the architecture states; no weight file tells it.
            For open_clip only.
        cache_dir: of hub downloads.
    Raises:
        TypeError, ValueError: an argument, a configuration or a model is not usable.
        CheckpointError: (a ValueError) the weights cannot be read, are damaged or do not fit.
        FileNotFoundError: no such file or folder.
        ConnectionError: the hub cannot be reached or does not have the model.
        ImportError: open_clip or transformers is needed and missing.
    Example:
        >>> model, preprocess, tokenizer, config = load("ViT-B-32")
    """
    if not isinstance(source, str | os.PathLike):
        raise TypeError(f"load: source must be a name or a path, got {type(source).__name__}")
    if precision not in _DTYPES:
        raise ValueError(f"load: precision must be one of {', '.join(_DTYPES)}, got {precision!r}")
    check_device(device)
    text = os.fspath(source)
    options = {"quick_gelu": quick_gelu, "cache_dir": cache_dir}
    if text.startswith(_LOCAL) or os.path.isdir(text):
        _refuse_given("a folder", pretrained=pretrained, arch=arch)
        loaded = _load_folder(text.removeprefix(_LOCAL), **options)
    elif text.startswith(_HUB):
        _refuse_given("a hub id", pretrained=pretrained, arch=arch)
        loaded = _load_hub(text.removeprefix(_HUB), **options)
    elif os.path.isfile(text):
        if arch is None or pretrained is not None:
            wanted = "arch must name" if arch is None else "pretrained goes with"
            raise ValueError(f"load: {wanted} the architecture when source is a file, got {text}")
        loaded = _load_named(os.fspath(arch), Path(text), options)
    elif isinstance(source, str) and (config := openclip.named_config(text)) is not None:
        _refuse_given("an architecture", arch=arch)
        loaded = _load_tagged(text.replace("/", "-"), config, pretrained, options)
    elif isinstance(source, str) and _HUB_ID.fullmatch(text) and not text.startswith("."):
        _refuse_given("a hub id", pretrained=pretrained, arch=arch)
        loaded = _load_hub(text, **options)
    else:
        raise _unknown(text)
    model = loaded.model.to(device=device, dtype=_DTYPES[precision]).eval()
    check_clip(model)
    check_finite(model, what=text)
    return loaded._replace(model=model)


def create(
    config: Mapping[str, Any],
    *,
    device: str | torch.device = "cpu",
    precision: str = "fp32",
) -> LoadedModel:
    """An open_clip model of random weights, from a configuration of one's own.

    Args:
        config: {"model_cfg": ..., "preprocess_cfg": ...} as in open_clip_config.json, the latter
            optional. torch's seed decides the weights.
        device: where the model goes.
        precision: as in `load`.
    Raises:
        ValueError: the configuration does not describe a model.
    """
    if precision not in _DTYPES:
        raise ValueError(
            f"create: precision must be one of {', '.join(_DTYPES)}, got {precision!r}"
        )
    check_device(device)
    checked = openclip.check_config(config, "create()")
    loaded = _finish(openclip.build(checked, "create()"), checked, "create()")
    return loaded._replace(model=loaded.model.to(device=device, dtype=_DTYPES[precision]).eval())


def preprocess_record(loaded: LoadedModel) -> dict[str, Any]:
    """What a manifest keeps of the model its trigger was planted in: preprocessing, activation."""
    return {**loaded.preprocess.to_dict(), "quick_gelu": loaded.config.get("quick_gelu")}


def _refuse_given(kind: str, **arguments: Any) -> None:
    for name, value in arguments.items():
        if value is not None:
            raise ValueError(f"load: {name} must be left out when source is {kind}, got {value!r}")


def _unknown(text: str) -> Exception:
    if os.path.isabs(text) or text.startswith((".", "~")) or text.count("/") > 1:
        return FileNotFoundError(f"load: source must be a file or folder, {text} is missing")
    close = difflib.get_close_matches(text, openclip.library().list_models(), 3)
    hint = f"; similar names: {', '.join(close)}" if close else ""
    return ValueError(
        "load: source must be an open_clip architecture, a folder, a hub id owner/name or a "
        f"weight file, got {text!r}{hint}"
    )


def _finish(
    model: nn.Module,
    config: dict[str, Any],
    source: str,
    *,
    folder: Path | None = None,
) -> LoadedModel:
    preprocess = Preprocess.from_dict(model.visual.preprocess_cfg)
    full = {
        "format": "open_clip",
        "source": source,
        "quick_gelu": config["quick_gelu"],
        "model_cfg": config["model_cfg"],
        "preprocess_cfg": preprocess.to_dict(),
    }
    tokenizer = openclip.tokenizer(config, source, folder=folder)
    return LoadedModel(model, preprocess, tokenizer, full)


def _set_quick_gelu(config: dict[str, Any], quick_gelu: bool | None) -> None:
    if quick_gelu is not None:
        config["quick_gelu"] = config["model_cfg"]["quick_gelu"] = bool(quick_gelu)


def _load_tagged(name: str, config: dict[str, Any], pretrained: Any, options: dict) -> LoadedModel:
    if pretrained is not None and os.path.isfile(pretrained):
        return _load_named(name, Path(pretrained), options)
    checked = openclip.check_config(config, name)
    weights = None
    if pretrained is not None:
        tag = openclip.pretrained_config(name, os.fspath(pretrained))
        source = f"{name} ({pretrained})"
        if options["quick_gelu"] is None:
            openclip.follow_tag(checked, tag, source)
        repo, file = os.path.split(tag.get("hf_hub", ""))
        if not repo:
            raise ValueError(f"load: pretrained must be a tag with a place on the hub, got {tag}")
        names = (
            [f"{os.path.splitext(file)[0]}.safetensors", file] if file else openclip.WEIGHT_FILES
        )
        weights = hub.fetch_weights(repo, names, cache_dir=options["cache_dir"])
    _set_quick_gelu(checked, options["quick_gelu"])
    model = openclip.build(checked, name)
    if weights is not None:
        load_weights(model, read_checkpoint(weights), source=str(weights))
    return _finish(model, checked, name)


def _load_named(arch: str, weights: Path, options: dict) -> LoadedModel:
    folder = Path(arch) if os.path.isdir(arch) else None
    if folder is not None:
        config = hf.read_json(folder / openclip.CONFIG)
    else:
        config = openclip.named_config(arch)
        if config is None:
            raise _unknown(arch)
    checked = openclip.check_config(config, arch)
    _set_quick_gelu(checked, options["quick_gelu"])
    tensors = read_checkpoint(weights)  # before building: a bad file is told at once
    model = openclip.build(checked, arch)
    load_weights(model, tensors, source=str(weights))
    return _finish(model, checked, str(weights), folder=folder)


def _load_hub(repo: str, *, quick_gelu: bool | None, cache_dir: str | None) -> LoadedModel:
    if not _HUB_ID.fullmatch(repo):
        raise ValueError(f"load: a hub id must be owner/name, got {repo!r}")
    folder = hub.fetch_configs(repo, cache_dir=cache_dir)
    names = openclip.WEIGHT_FILES if (folder / openclip.CONFIG).exists() else hf.WEIGHT_FILES
    hub.fetch_weights(repo, names, cache_dir=cache_dir)
    return _load_folder(str(folder), quick_gelu=quick_gelu, cache_dir=cache_dir, source=repo)


def _load_folder(
    path: str, *, quick_gelu: bool | None, cache_dir: str | None, source: str | None = None
) -> LoadedModel:
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"load: source must be a folder, {folder} is missing")
    finish_interrupted(folder)
    source = source or str(folder)
    if (folder / openclip.CONFIG).exists():
        weights = _weights_in(folder, openclip.CONFIG, openclip.WEIGHT_FILES)
        checked = openclip.check_config(hf.read_json(folder / openclip.CONFIG), source)
        _set_quick_gelu(checked, quick_gelu)
        tensors = read_checkpoint(weights)
        model = openclip.build(checked, source)
        load_weights(model, tensors, source=str(weights))
        return _finish(model, checked, source, folder=folder)
    if not (folder / hf.CONFIG).exists():
        raise CheckpointError(
            f"load: {folder} must hold {openclip.CONFIG} (open_clip) or {hf.CONFIG} (Hugging Face)"
        )
    config = hf.read_json(folder / hf.CONFIG)
    if config.get("model_type") != "clip":
        raise CheckpointError(
            f"load: model_type in {folder / hf.CONFIG} must be 'clip', "
            f"got {config.get('model_type')!r}"
        )
    if quick_gelu is not None:
        raise ValueError(
            "load: quick_gelu must be left out for a Hugging Face model: its config "
            "states the activation"
        )
    weights = _weights_in(folder, hf.CONFIG, hf.WEIGHT_FILES)
    model, tokenizer = hf.load_folder(folder, weights, config)
    preprocess = Preprocess.from_dict(model.visual.preprocess_cfg)
    full = {
        "format": "hf",
        "source": source,
        "quick_gelu": model.model.config.vision_config.hidden_act == "quick_gelu",
        "preprocess_cfg": preprocess.to_dict(),
    }
    return LoadedModel(model, preprocess, tokenizer, full)


def _weights_in(folder: Path, config: str, names: tuple[str, ...]) -> Path:
    """The weight file to read; it and the configuration agree with the record."""
    for name in names:
        if (folder / name).exists():
            files = [config, *(path.name for path in weight_files(folder / name))]
            settings = [hf.PREPROCESSOR, *hf.TOKENIZER_FILES]
            verify(folder, files, if_listed=settings)
            return folder / name
    raise CheckpointError(f"load: {folder} must hold weights, one of {', '.join(names)}")
