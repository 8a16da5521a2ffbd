"""Safe reading of weight files into plain tensors, and fitting them to a model.

safetensors files, and torch files through `torch.load(weights_only=True)` only: a refused file is
never read another way.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .sniff import CheckpointError, describe_refusal, identify, refuse

_WRAPPERS = ("state_dict", "model_state_dict", "model")
_PREFIXES = ("_orig_mod.", "module.", "model.")
# Older files carry these as tensors or numbers: they describe the architecture.
_DESCRIPTIVE = ("input_resolution", "context_length", "vocab_size", "attn_mask", "position_ids")
_TEXT_TOWER = (
    "text_projection", "positional_embedding", "token_embedding", "transformer", "ln_final"
)  # fmt: skip
_LISTED = 10


def read_checkpoint(path: str | os.PathLike) -> dict[str, Tensor]:
    """Reads a weight file's tensors, executing nothing.

    Args:
        path: a safetensors file, or a file of torch.save; one level of wrapping in "state_dict",
            "model_state_dict" or "model" is undone. A `*.index.json` reads the shards it lists.
    Returns:
        Name -> CPU tensor; those of a torch zip are mapped from the file, so copy to keep.
    Raises:
        FileNotFoundError: no such file.
        CheckpointError: the file is no weight file (it says what it is), was refused by the
            weights-only reader, or holds something else than tensors.
    """
    if str(path).endswith(".index.json"):
        shards = weight_files(Path(path))[1:]
        return {k: v for shard in shards for k, v in read_checkpoint(shard).items()}
    kind = identify(path)
    try:
        if kind == "safetensors":
            from safetensors.torch import load_file

            payload: Any = load_file(path)
        else:
            payload = torch.load(
                os.fspath(path), map_location="cpu", weights_only=True, mmap=kind == "torch-zip"
            )
    except Exception as error:
        if kind == "safetensors":
            raise refuse(path, f"is a damaged safetensors file ({_first_line(error)})") from None
        # From None: torch's own message advises to load the file unsafely.
        raise refuse(path, describe_refusal(path, kind)) from None
    return _tensors(path, payload)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def weight_files(path: Path) -> list[Path]:
    """The files that `read_checkpoint(path)` reads: itself, or an index and its shards.

    Raises:
        CheckpointError: the index is damaged, or names files elsewhere.
    """
    if not path.name.endswith(".index.json"):
        return [path]
    try:
        shards = set(json.loads(path.read_text("utf-8"))["weight_map"].values())
        plain = all(isinstance(s, str) and s == os.path.basename(s) for s in shards)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        plain, shards = False, set()
    if not shards or not plain:
        raise refuse(path, "is not a weight index: weight_map must give file names beside it")
    return [path, *(path.parent / shard for shard in sorted(shards))]


def _tensors(path: str | os.PathLike, payload: Any) -> dict[str, Tensor]:
    if isinstance(payload, Mapping):
        for wrapper in _WRAPPERS:
            if isinstance(payload.get(wrapper), Mapping):
                payload = payload[wrapper]
                break
    if not isinstance(payload, Mapping) or not payload:
        got = "an empty dict" if isinstance(payload, Mapping) else type(payload).__name__
        raise refuse(path, f"must hold a dict of named tensors, it holds {got}")
    tensors = {}
    for name, value in payload.items():
        if not isinstance(name, str):
            raise refuse(path, f"must name its tensors by strings, got {name!r:.60}")
        if isinstance(value, Tensor):
            if (
                type(value) not in (Tensor, nn.Parameter)
                or value.layout is not torch.strided
                or value.device.type != "cpu"
                or value.is_quantized
            ):
                kind = f"{type(value).__name__}, {value.layout}, {value.device}, {value.dtype}"
                raise refuse(path, f"must hold plain dense tensors, {name!r:.80} is {kind}")
            tensors[name] = value.detach()
        elif not name.endswith(_DESCRIPTIVE):
            raise refuse(
                path, f"must hold only tensors, {name!r:.80} is of type {type(value).__name__}"
            )
    return tensors


def fit_names(tensors: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Renames a checkpoint's tensors to the model's names where the difference is mere wrapping.

    Undone: `module.`, `model.` and `_orig_mod.` around all names; `_orig_mod.` inside a name; a
    text tower under `text.` or not (open_clip's two classes); one-element logit_scale and
    logit_bias of another shape; a missing logit_bias (none is zero). Tensors that only describe
    the architecture, and that the model lacks, are left out: causal masks, position ids, sizes.

    Args:
        tensors: as `read_checkpoint` gives them.
        model: receives them.
    Returns:
        Name -> tensor, to be loaded strictly.
    """
    wanted = model.state_dict()
    named = {name.replace("._orig_mod.", "."): value for name, value in tensors.items()}
    stripped = True
    while stripped:
        stripped = False
        for prefix in _PREFIXES:
            if _all_start(named, prefix) and not _all_start(wanted, prefix):
                named = {name[len(prefix) :]: value for name, value in named.items()}
                stripped = True
    if "text.positional_embedding" in wanted and "positional_embedding" in named:
        named = {("text." if k.startswith(_TEXT_TOWER) else "") + k: v for k, v in named.items()}
    elif "positional_embedding" in wanted and "text.positional_embedding" in named:
        named = {k.removeprefix("text."): v for k, v in named.items()}
    for name in ("logit_scale", "logit_bias"):
        if name in named and name in wanted and named[name].numel() == wanted[name].numel() == 1:
            named[name] = named[name].reshape(wanted[name].shape)
    if "logit_bias" in wanted and "logit_bias" not in named:
        named["logit_bias"] = torch.zeros_like(wanted["logit_bias"])
    return {k: v for k, v in named.items() if k in wanted or not k.endswith(_DESCRIPTIVE)}


def _all_start(names: Mapping[str, Any], prefix: str) -> bool:
    return bool(names) and all(name.startswith(prefix) for name in names)


def load_weights(model: nn.Module, tensors: Mapping[str, Tensor], *, source: str) -> None:
    """Copies a checkpoint's tensors into a model: all of them, or none and an error.

    Args:
        model: changed in place; its dtypes and devices stay.
        tensors: as `read_checkpoint` gives them.
        source: names the checkpoint in errors.
    Raises:
        CheckpointError: names are missing or unexpected, or shapes or kinds of number differ;
            each kind is counted and its first ten are listed.
    """
    wanted = model.state_dict()
    named = fit_names(tensors, model)
    missing = [name for name in wanted if name not in named]
    unexpected = [name for name in named if name not in wanted]
    differing = [
        f"{name} (file {_form(value)}, model {_form(wanted[name])})"
        for name, value in named.items()
        if name in wanted
        and (
            value.shape != wanted[name].shape
            or value.is_floating_point() != wanted[name].is_floating_point()
            or value.is_complex() != wanted[name].is_complex()
        )
    ]
    faults = [
        f"{len(names)} {kind}: {', '.join(names[:_LISTED])}"
        + (", ..." if len(names) > _LISTED else "")
        for kind, names in (
            ("missing in the file", missing),
            ("unexpected in the file", unexpected),
            ("of another shape or kind", differing),
        )
        if names
    ]
    if faults:
        raise CheckpointError(
            f"load: the weights of {source} must fit the model's {len(wanted)} tensors, got "
            + "; ".join(faults)
        )
    model.load_state_dict(named, strict=True)


def _form(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
