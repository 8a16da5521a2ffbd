"""open_clip models built from a configuration; weights are read by `checkpoint`, never here.

Only create_model, the tokenizers and the configuration lookups of open_clip are used: they exist
in 3.x and stay in 4.x. `quick_gelu` of model_cfg picks the activation of both towers. It is part of
the architecture, and no weight file tells it: models trained by OpenAI and some others need it.
"""

import json
import logging
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .tokenizer import Tokenizer

CONFIG = "open_clip_config.json"
WEIGHTS = "open_clip_model.safetensors"
WEIGHT_FILES = (
    WEIGHTS,
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
    "open_clip_pytorch_model.pth",
)
# Those of open_clip's own configurations. Others reach transformers, trust_remote_code among them.
_TOKENIZER_KWARGS = {"clean", "strip_sep_token", "language"}
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "vocab.txt")


def library() -> Any:
    """The open_clip package.

    Raises:
        ImportError: it is missing or does not import, with the reason and the command to run.
    """
    try:
        import open_clip
    except (ImportError, RuntimeError) as error:  # RuntimeError: torchvision of another torch
        raise ImportError(
            f"load: open_clip models need the package open_clip_torch, which does not import "
            f"({str(error).splitlines()[0]}): run pip install open_clip_torch torchvision"
        ) from error
    return open_clip


def named_config(name: str) -> dict[str, Any] | None:
    """{"model_cfg": ...} of one of open_clip's architectures; None when there is no such name."""
    model_cfg = library().get_model_config(name.replace("/", "-"))
    return None if model_cfg is None else {"model_cfg": model_cfg}


def is_architecture(name: str) -> bool:
    """Whether open_clip has an architecture of this name."""
    return named_config(name) is not None


def pretrained_config(name: str, tag: str) -> dict[str, Any]:
    """What open_clip records of a pretrained tag: hf_hub, mean, std, quick_gelu and more.

    Raises:
        ValueError: no such tag; the known ones are listed.
    """
    open_clip = library()
    config = open_clip.get_pretrained_cfg(name, tag)
    if not config:
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none"
        raise ValueError(
            f"load: pretrained must be a weight file or a tag of {name} ({tags}), got {tag!r}"
        )
    return dict(config)


def check_config(config: Any, source: str) -> dict[str, Any]:
    """A configuration's own copy, checked for what building needs.

    Args:
        config: {"model_cfg": {...}, "preprocess_cfg": {...}}, the latter optional.
        source: names it in errors.
    Raises:
        ValueError: not such a dict, or not JSON.
    """
    model_cfg = config.get("model_cfg") if isinstance(config, Mapping) else None
    if not isinstance(model_cfg, Mapping):
        raise ValueError(
            f"load: the config of {source} must be a dict with model_cfg, as in {CONFIG}, "
            f"got {_summary(config)}"
        )
    lacking = [k for k in ("embed_dim", "vision_cfg", "text_cfg") if k not in model_cfg]
    if lacking or not all(isinstance(model_cfg[k], Mapping) for k in ("vision_cfg", "text_cfg")):
        raise ValueError(
            f"load: model_cfg of {source} must hold embed_dim, vision_cfg and text_cfg, "
            f"got {_summary(model_cfg)}"
        )
    odd = sorted(set(model_cfg["text_cfg"].get("tokenizer_kwargs") or {}) - _TOKENIZER_KWARGS)
    if odd:
        raise ValueError(
            f"load: tokenizer_kwargs of {source} must be among {sorted(_TOKENIZER_KWARGS)}, "
            f"got {odd}"
        )
    try:
        copy = json.loads(json.dumps(dict(config)))
    except (TypeError, ValueError) as error:
        raise ValueError(f"load: the config of {source} must be plain JSON, got {error}") from None
    copy["quick_gelu"] = bool(model_cfg.get("quick_gelu", False))
    return copy


def _summary(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"keys {', '.join(map(str, value)) or 'none'}"[:200]
    return type(value).__name__


def build(config: Mapping[str, Any], source: str) -> nn.Module:
    """A model of random weights, fp32 on the CPU.

    Args:
        config: as `check_config` returns it.
        source: names it in errors.
    Raises:
        ValueError: open_clip cannot build it; its reason is given.
    """
    open_clip = library()
    with _config_folder(config) as folder, _quiet():
        try:
            with torch.device("cpu"):
                return open_clip.create_model(
                    f"local-dir:{folder}", load_weights=False, pretrained_text=False
                )
        except Exception as error:  # whatever the constructors raise on odd values
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ValueError(
                f"load: model_cfg of {source} must describe an open_clip model, got {reason}"
            ) from error


def tokenizer(config: Mapping[str, Any], source: str, *, folder: Path | None = None) -> Tokenizer:
    """The tokenizer of a configuration.

    Args:
        config: as `check_config` returns it.
        source: names the model in errors.
        folder: where its tokenizer files lie, if it brings its own.
    Raises:
        ValueError: the configuration wants a Hugging Face tokenizer which cannot be had.
    """
    open_clip = library()
    text_cfg = config["model_cfg"]["text_cfg"]
    wanted = text_cfg.get("hf_tokenizer_name")
    try:
        if not wanted:
            with _config_folder(config) as plain:
                inner = open_clip.get_tokenizer(f"local-dir:{plain}")
        elif folder is not None and any((folder / name).exists() for name in _TOKENIZER_FILES):
            inner = open_clip.get_tokenizer(f"local-dir:{folder}", trust_remote_code=False)
        else:
            inner = open_clip.tokenizer.HFTokenizer(
                wanted,
                context_length=text_cfg.get("context_length", 77),
                tokenizer_mode=text_cfg.get("tokenizer_mode"),
                trust_remote_code=False,
                **(text_cfg.get("tokenizer_kwargs") or {}),
            )
    except Exception as error:  # transformers missing, hub unreachable, files damaged
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"load: {source} needs the tokenizer {wanted or 'of open_clip'}, which could not be "
            f"loaded ({reason})"
        ) from error
    return Tokenizer(
        inner,
        context_length=text_cfg.get("context_length", 77),
        vocab_size=text_cfg.get("vocab_size", 49408),
    )


def follow_tag(config: dict[str, Any], tag_config: Mapping[str, Any], source: str) -> None:
    """Takes the activation and preprocessing that a pretrained tag was trained with.

    Args:
        config: as `check_config` returns it; changed in place.
        tag_config: as `pretrained_config` returns it.
        source: names the model in the warning given when the activation changes.
    """
    quick_gelu = bool(tag_config.get("quick_gelu", False))
    if quick_gelu != config["quick_gelu"]:
        warnings.warn(
            f"load: {source} was trained with quick_gelu={quick_gelu}, which the architecture's "
            "name does not say; it is built so",
            stacklevel=4,
        )
        config["quick_gelu"] = config["model_cfg"]["quick_gelu"] = quick_gelu
    keys = ("size", "mean", "std", "interpolation", "resize_mode")
    config["preprocess_cfg"] = {
        k: list(v) if isinstance(v, tuple) else v for k, v in tag_config.items() if k in keys
    }


@contextmanager
def _config_folder(config: Mapping[str, Any]) -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="pybackdoor-") as folder:
        held = {k: config[k] for k in ("model_cfg", "preprocess_cfg") if k in config}
        (Path(folder) / CONFIG).write_text(json.dumps(held), "utf-8")
        yield folder


@contextmanager
def _quiet() -> Iterator[None]:
    """Drops open_clip's warning that no weights were loaded: ours are loaded next."""
    root = logging.getLogger()
    handler = logging.NullHandler()  # without one, logging.warning() would configure the root

    def from_elsewhere(record: logging.LogRecord) -> bool:
        return "open_clip" not in Path(record.pathname).parts

    root.addHandler(handler)
    root.addFilter(from_elsewhere)
    try:
        yield
    finally:
        root.removeFilter(from_elsewhere)
        root.removeHandler(handler)
