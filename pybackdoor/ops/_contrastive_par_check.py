"""Checks and defaults of contrastive_par's arguments."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pybackdoor.ops._contrastive_par_problem import SUSPECT, VALID

OP = "contrastive_par"
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
PRECISIONS = ("auto", "bf16", "tf32", "tf32x3", "ieee")


def check_features(
    text: Tensor,  # [M, D]
    image: Tensor,  # [N, D]
    scale: Tensor,  # []
    text_ref: Tensor | None,  # [M, D]
    image_ref: Tensor | None,  # [N, D]
) -> None:
    """Refuse features and a scale that cannot be used, naming what was wanted and got."""
    for name, x in (("text", text), ("image", image), ("scale", scale)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{OP}: {name} must be a tensor, got {type(x).__name__}")
    for name, x in (("text", text), ("image", image)):
        if x.ndim != 2 or x.shape[1] == 0:
            raise ValueError(f"{OP}: {name} must be [rows, D] with D > 0, got {list(x.shape)}")
        if x.dtype not in DTYPES:
            names = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
            raise TypeError(f"{OP}: {name} must be one of {names}, got {x.dtype}")
    if image.shape[1] != text.shape[1]:
        raise ValueError(
            f"{OP}: image must be [N, {text.shape[1]}] like text, got {list(image.shape)}"
        )
    if len(image) == 0 and len(text) > 0:
        raise ValueError(f"{OP}: text rows need images: got {len(text)} rows and no image")
    if image.dtype != text.dtype:
        raise TypeError(f"{OP}: image must be {text.dtype} like text, got {image.dtype}")
    if image.device != text.device:
        raise ValueError(f"{OP}: image must be on {text.device} like text, got {image.device}")
    if scale.numel() != 1 or not scale.is_floating_point():
        raise ValueError(
            f"{OP}: scale must be one floating number, exp(logit_scale), "
            f"got {list(scale.shape)} {scale.dtype}"
        )
    if scale.device != text.device and scale.device.type != "cpu":
        raise ValueError(f"{OP}: scale must be on {text.device} like text, got {scale.device}")
    for name, ref, like in (("text_ref", text_ref, text), ("image_ref", image_ref, image)):
        if ref is None:
            continue
        if ref.shape != like.shape or ref.dtype != like.dtype or ref.device != like.device:
            raise ValueError(
                f"{OP}: {name} must be {list(like.shape)} {like.dtype} on {like.device} like "
                f"{name[:-4]}, got {list(ref.shape)} {ref.dtype} on {ref.device}"
            )


def check_options(distance_weight: float, tau: float, precision: str, budget: int | None) -> None:
    """Refuse options out of range."""
    for name, value in (("distance_weight", distance_weight), ("tau", tau)):
        if not hasattr(value, "__float__"):  # numpy's numbers have it
            raise TypeError(f"{OP}: {name} must be a number, got {value!r}")
    if not math.isfinite(distance_weight):
        raise ValueError(f"{OP}: distance_weight must be finite, got {distance_weight}")
    if math.isnan(tau) or tau < 0:
        raise ValueError(f"{OP}: tau must be at least 0 (math.inf: never closed), got {tau}")
    if precision not in PRECISIONS:
        raise ValueError(
            f"{OP}: precision must be one of {', '.join(PRECISIONS)}, got {precision!r}"
        )
    if budget is not None and (isinstance(budget, bool) or not isinstance(budget, int)):
        raise TypeError(f"{OP}: budget must be an integer, in bytes, got {budget!r}")
    if budget is not None and budget < 0:
        raise ValueError(f"{OP}: budget must be a number of bytes, at least 0, got {budget}")


def check_counts(counts: Sequence[int] | None, images: int) -> list[int]:
    """The images of each rank; [] for one process."""
    if counts is None:
        return []
    from pybackdoor.distributed import Ranks

    ranks, counts = Ranks(), [int(n) for n in counts]
    if len(counts) != ranks.size or counts[ranks.rank] != images:
        raise ValueError(
            f"{OP}: counts must hold the images of each of {ranks.size} ranks, {images} of them "
            f"rank {ranks.rank}'s, got {counts}"
        )
    return counts if ranks.size > 1 else []


def owners(owner: Tensor | None, text: Tensor, image: Tensor) -> tuple[Tensor, Tensor | None]:
    """The owner of each text row, non-decreasing, and the order of the rows if it had to change.

    Returns:
        owner: [M] int64 on text's device, sorted. Out of range only where nobody has looked; such
            rows are left out later.
        order: [M] int64, or None where the rows stay as they are.
    """
    rows, images = len(text), len(image)
    if owner is None:
        if rows != images:
            raise ValueError(
                f"{OP}: without owner every image has one text row: text must be [{images}, D] "
                f"like image, got {list(text.shape)}"
            )
        return torch.arange(rows, device=text.device), None
    if owner.shape != (rows,) or owner.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"{OP}: owner must be [{rows}] int32 or int64 like text's rows, "
            f"got {list(owner.shape)} {owner.dtype}"
        )
    owner = owner.to(torch.int64)
    if looks_at_values(owner):
        if rows and not 0 <= int(owner.min()) <= int(owner.max()) < images:
            raise ValueError(
                f"{OP}: owner must be in [0, {images}), the number of images, "
                f"got {int(owner.min())} to {int(owner.max())}"
            )
        if bool((owner[1:] >= owner[:-1]).all()):
            return owner.to(text.device), None
    owner, order = owner.to(text.device).sort(stable=True)
    return owner, order


def looks_at_values(x: Tensor) -> bool:
    """Whether x's values may decide: not where that would wait for a device or break a graph."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def segments(owner: Tensor, images: int) -> Tensor:
    """[images + 1] int32: where the rows of each image begin; owner [M] sorted."""
    edges = torch.arange(images + 1, device=owner.device)
    return torch.searchsorted(owner, edges, out_int32=True)


def weights(
    weight: Tensor | None,  # [M]
    column_weight: Tensor | None,  # [N]
    valid: Tensor | None,  # [N]
    suspect: Tensor | None,  # [N]
    owner: Tensor,  # [M] sorted
    images: int,
    total: int,  # images of all ranks
    acc: torch.dtype,
    default_columns: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """weight [M], column_weight [N] in acc and the bits [N] of the images, with the defaults."""
    device = owner.device
    rows = len(owner)
    for name, x, size in (
        ("weight", weight, rows),
        ("column_weight", column_weight, images),
        ("valid", valid, images),
        ("suspect", suspect, images),
    ):
        if x is None:
            continue
        if x.shape != (size,):
            raise ValueError(f"{OP}: {name} must be [{size}], got {list(x.shape)}")
        if name in ("valid", "suspect"):
            if x.dtype != torch.bool:
                raise TypeError(f"{OP}: {name} must be bool, got {x.dtype}")
        elif not x.is_floating_point():
            raise TypeError(f"{OP}: {name} must be floating, got {x.dtype}")
        elif looks_at_values(x):
            if not bool(x.isfinite().all()):
                raise ValueError(f"{OP}: {name} must be finite, got {_first_bad(x)}")
            if name == "column_weight" and bool((x < 0).any()):
                raise ValueError(f"{OP}: column_weight must be at least 0, got {float(x.min())}")
    share = 1 / (2 * max(1, total))
    w = (
        torch.full((rows,), share, dtype=acc, device=device)
        if weight is None
        else weight.to(device, acc)
    )
    columns = share if default_columns else 0.0
    v = (
        torch.full((images,), columns, dtype=acc, device=device)
        if column_weight is None
        else column_weight.to(device, acc)
    )
    bits = torch.full((images,), VALID, dtype=torch.uint8, device=device)
    if suspect is not None:
        bits = bits | suspect.to(device, torch.uint8) * SUSPECT
    if not looks_at_values(owner):
        w = torch.where((owner >= 0) & (owner < images), w, 0)
    if valid is not None:
        valid = valid.to(device)
        bits, v = torch.where(valid, bits, 0), torch.where(valid, v, 0)
        w = torch.where(valid[owner.clamp(0, max(0, images - 1))], w, 0) if images else w
    return w.contiguous(), v.contiguous(), bits.contiguous()


def plain(
    images: int, total: int, acc: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """owner, segment, weight, column_weight and bits of CLIP's own loss, in three fills."""
    segment = torch.arange(images + 1, dtype=torch.int32, device=device)
    w = torch.full((images,), 1 / (2 * max(1, total)), dtype=acc, device=device)
    bits = torch.full((images,), VALID, dtype=torch.uint8, device=device)
    return segment[:images], segment, w, w, bits


def _first_bad(x: Tensor) -> float:
    return float(x[~x.isfinite()][0])
