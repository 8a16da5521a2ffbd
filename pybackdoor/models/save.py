"""Writing a model folder that `load`, open_clip or transformers can read."""

import errno
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from . import hf, openclip
from .folder import COMMIT, RECORD, recorded_names, write_folder
from .load import LoadedModel
from .preprocess import Preprocess
from .protocol import check_clip, check_finite

MANIFEST = "manifest.json"


def save(
    model: LoadedModel | nn.Module,
    folder: str | os.PathLike,
    *,
    config: Mapping[str, Any] | None = None,
    manifest: Any = None,
    extra_files: Mapping[str, Any] | None = None,
) -> Path:
    """Saves a CLIP model as a folder: all of it, or nothing and the old one stays.

    An open_clip model becomes `open_clip_model.safetensors` and `open_clip_config.json`; an
    `HFClip` what transformers writes. Tensors that share memory are written once per name, so that
    any strict reader finds every name. `pybackdoor.json` records the SHA-256 of each file; `load`
    checks it. In a folder that exists, only files of these names, and those of the previous
    record, are replaced or removed.

    Args:
        model: what `load` returned, or its (cleaned) model alone.
        folder: created with its parents.
        config: needed for a lone open_clip model: {"model_cfg": ..., "preprocess_cfg": ...} as
            `load` returns it; overrides a LoadedModel's own. preprocess_cfg
            defaults to the model's.
        manifest: of the trigger; anything with save(path), written as manifest.json.
        extra_files: further reports, file name ending in .json -> JSON-ready content.
    Returns:
        The folder.
    Raises:
        TypeError: no CLIP model, or manifest has no save().
        ValueError: no config, weights that are not finite, a file name that is taken, content that
            is no JSON, or a folder holding a model of the other format that is not ours.
        OSError: disk full, no permission or the like; the model that was there is untouched.
    """
    folder = Path(folder)
    tokenizer = None
    if isinstance(model, LoadedModel):
        config = model.config if config is None else config
        model, tokenizer = model.model, model.tokenizer
    model = _unwrapped(model)
    check_clip(model)
    check_finite(model, what="the model to save")
    is_hf = isinstance(model, hf.HFClip)
    settings = {} if is_hf else _open_clip_settings(model, config)
    reports = _reports(extra_files or {})
    if manifest is not None and not callable(getattr(manifest, "save", None)):
        raise TypeError(
            f"save: manifest must be a pybackdoor.manifest.Manifest, got {type(manifest).__name__}"
        )
    _refuse_other_format(folder, openclip.CONFIG if is_hf else hf.CONFIG)

    def fill(staging: Path) -> None:
        save_tokenizer = getattr(getattr(tokenizer, "inner", None), "save_pretrained", None)
        if save_tokenizer is not None:
            save_tokenizer(staging)
        if is_hf:
            _write_weights(lambda: hf.save_folder(model, staging))
        else:
            tensors = _separate(model.state_dict())
            _write_weights(lambda: _save_file(tensors, staging / openclip.WEIGHTS))
            (staging / openclip.CONFIG).write_text(json.dumps(settings, indent=2) + "\n", "utf-8")
        for name, text in reports.items():
            (staging / name).write_text(text, "utf-8")
        if manifest is not None:
            manifest.save(staging / MANIFEST)

    quick_gelu = (
        model.model.config.vision_config.hidden_act == "quick_gelu"
        if is_hf
        else bool(settings["model_cfg"].get("quick_gelu", False))
    )
    record = {"format": "hf" if is_hf else "open_clip", "quick_gelu": quick_gelu}
    write_folder(folder, fill, record=record)
    return folder


def refuse_folder(model: LoadedModel | nn.Module, folder: str | os.PathLike) -> None:
    """Raises what `save` would say against a folder, before any work depends on it.

    Raises:
        ValueError: it holds a model of the other format that is not ours.
        OSError: it has less room than the model takes.
    """
    module = _unwrapped(model.model if isinstance(model, LoadedModel) else model)
    _refuse_other_format(
        Path(folder), openclip.CONFIG if isinstance(module, hf.HFClip) else hf.CONFIG
    )
    size = sum(t.nbytes for t in module.state_dict().values())
    free = shutil.disk_usage(folder).free
    if free < size:
        raise OSError(
            errno.ENOSPC,
            f"the model takes {size / 1e9:.2f} GB, {folder} has {free / 1e9:.2f} GB free",
        )


def _unwrapped(model: nn.Module) -> nn.Module:
    """The module inside torch.compile and DistributedDataParallel."""
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif isinstance(getattr(model, "module", None), nn.Module) and not hasattr(
            model, "encode_image"
        ):
            model = model.module
        else:
            return model


def _open_clip_settings(model: nn.Module, config: Mapping[str, Any] | None) -> dict[str, Any]:
    if config is None:
        raise ValueError(
            "save: config must be given for a model that load() did not return with it: "
            '{"model_cfg": ..., "preprocess_cfg": ...} as in open_clip_config.json'
        )
    checked = openclip.check_config(config, "the model to save")
    preprocess = checked.get("preprocess_cfg")
    found = Preprocess.from_model(model) if preprocess is None else Preprocess.from_dict(preprocess)
    if found is None:
        raise ValueError(
            "save: config must hold preprocess_cfg, since the model does not say how its images "
            "are resized and normalised"
        )
    return {"model_cfg": checked["model_cfg"], "preprocess_cfg": found.to_dict()}


def _reports(extra_files: Mapping[str, Any]) -> dict[str, str]:
    taken = {openclip.CONFIG, hf.CONFIG, hf.PREPROCESSOR, MANIFEST, RECORD}
    reports = {}
    for name, content in extra_files.items():
        plain = isinstance(name, str) and name == os.path.basename(name) and len(name) > 5
        if not plain or not name.endswith(".json") or name in taken or name.startswith("."):
            raise ValueError(
                f"save: extra_files must be named like report.json, other than {sorted(taken)}, "
                f"got {name!r}"
            )
        try:
            reports[name] = json.dumps(content, indent=2, allow_nan=False) + "\n"
        except (TypeError, ValueError) as error:
            raise ValueError(f"save: extra_files[{name!r}] must be JSON, got {error}") from error
    return reports


def _refuse_other_format(folder: Path, foreign_config: str) -> None:
    """A folder of both formats would hold two models: whoever reads it gets either."""
    if not (folder / foreign_config).exists() or (folder / COMMIT).is_dir():
        return
    if foreign_config not in recorded_names(folder):
        raise ValueError(
            f"save: folder must not hold another model's {foreign_config}, which other programs "
            f"would read instead of this model: choose another folder than {folder}"
        )


def _separate(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """CPU tensors, contiguous, no two of which share memory."""
    seen: set[int] = set()
    separate = {}
    for name, tensor in state.items():
        tensor = tensor.detach().cpu().contiguous()
        address = tensor.untyped_storage().data_ptr()
        if address in seen:
            tensor = tensor.clone()
        seen.add(address)
        separate[name] = tensor
    return separate


def _save_file(tensors: dict[str, Tensor], path: Path) -> None:
    from safetensors.torch import save_file

    save_file(tensors, path, metadata={"format": "pt"})


def _write_weights(write: Any) -> None:
    """Gives the safetensors library's failures their errno back."""
    from safetensors import SafetensorError

    try:
        write()
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        code = int(number[1]) if number else errno.EIO
        raise OSError(code, os.strerror(code)) from error
