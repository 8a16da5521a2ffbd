"""A spec fixed to an image size and a device, and its application to images."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from pybackdoor._native import sent
from pybackdoor.ops.trigger_normalize import TriggerTable, trigger_normalize
from pybackdoor.triggers import patterns
from pybackdoor.triggers.spec import TriggerSpec

Images = TypeVar("Images", np.ndarray, Tensor)

_CHUNK_ELEMENTS = 1 << 24  # apply_trigger: images at a time, 32 MiB as bfloat16


def sample_id_list(sample_ids: Iterable[int] | np.ndarray | Tensor, name: str) -> list[int]:
    """Sample ids of any integer kind as Python integers; errors name the caller ``name``."""
    if isinstance(sample_ids, (np.ndarray, Tensor)):
        if sample_ids.ndim != 1:
            raise ValueError(f"{name}: sample_ids must be [B], got {tuple(sample_ids.shape)}")
        sample_ids = sample_ids.tolist()
    ids = []
    try:
        for value in sample_ids:
            if isinstance(value, bool):
                raise TypeError(f"{value!r}")
            ids.append(operator.index(value))
    except TypeError as error:
        raise TypeError(f"{name}: sample_ids must be integers, got {error}") from None
    if any(not -(2**63) <= value < 2**63 for value in ids):
        raise ValueError(f"{name}: sample_ids must fit int64, got {max(ids, key=abs)}")
    return ids


class BoundTrigger:
    """A trigger at one image size, on one device; made by :func:`bind`.

    Attributes:
        spec: the trigger.
        image_size: (H, W) in pixels.
        window: (h, w), the part of the image that the trigger covers.
        device: where the tables are.
    """

    def __init__(self, spec: TriggerSpec, image_size: tuple[int, int], device: torch.device):
        self.spec = spec
        self.image_size = image_size
        self.device = torch.empty(0, device=device).device  # "cuda" becomes "cuda:0", as in images
        self.window = self._window()
        self._shared = None if spec.per_image else self._table([None])

    def __repr__(self) -> str:
        return f"BoundTrigger({self.spec!r}, image_size={self.image_size}, device={self.device})"

    def arguments(self, sample_ids: Iterable[int] | np.ndarray | Tensor) -> dict[str, Any]:
        """Keywords of ``trigger_normalize`` for a batch.

        Args:
            sample_ids: [B] int64 ids; they key random places and patterns per image, so the result
                for a sample doesn't depend on the batch it is in.
        Returns:
            triggers: table of one trigger, of B with ``per_image``.
            trigger_id: [B] int32; set entries to -1 to leave images clean.
            position: [B, 2] int16 (y, x) top left of a patch; None for a whole image.
            strength: the weight of a blend; None for patch and warp.
        Raises:
            TypeError: sample ids are no integers.
        """
        ids = sample_id_list(sample_ids, "BoundTrigger.arguments")
        table = self._shared
        trigger_id = torch.zeros(len(ids), dtype=torch.int32, device=self.device)
        if table is None:
            # An empty table is no table: an empty batch gets one pattern that nobody uses.
            table = self._table(ids or [None])
            trigger_id = torch.arange(len(ids), dtype=torch.int32, device=self.device)
        return {
            "triggers": table,
            "trigger_id": trigger_id,
            "position": self._positions(ids),
            "strength": self._strength(),
        }

    def _window(self) -> tuple[int, int]:
        spec, room = self.spec, self.image_size
        if spec.definition.kind != "patch":
            return room
        if spec.name == "patch_file":
            height, width = patterns.picture_size(spec)
            if spec.size is not None:
                longer = max(height, width)
                height, width = (max(1, round(n * spec.size / longer)) for n in (height, width))
        else:
            height = width = spec.size or patterns.patch_side(spec.name, min(room))
        if spec.name == "badclip":
            own = patterns.picture_size(spec)
            if own[0] != own[1]:
                raise ValueError(f"bind: file of badclip must be square, got {own[0]} x {own[1]}")
        y, x = spec.position or (0, 0)
        if y + height > room[0] or x + width > room[1]:
            at = f" at {spec.position}" if spec.position else ""
            raise ValueError(
                f"bind: trigger {spec.name!r} must fit the image of {room[0]} x {room[1]}, "
                f"got {height} x {width}{at}"
            )
        return height, width

    def _table(self, ids: list[int | None]) -> TriggerTable:
        spec, kind, mask = self.spec, self.spec.definition.kind, None
        if kind == "warp":
            grid = np.stack([patterns.warp_grid(spec, self.window, i) for i in ids])
            return TriggerTable(
                mode="warp", pattern=None, grid=torch.from_numpy(grid), clip=not spec.wrap
            ).to(self.device)
        if spec.file is None:
            pixels = np.stack([patterns.pattern(spec, self.window, i) for i in ids])
        else:
            pixels, mask = patterns.picture(spec, self.window)
            pixels, mask = pixels[None], None if mask is None else torch.from_numpy(mask[None])
        return TriggerTable(
            mode="patch" if kind == "patch" and mask is None else "blend",
            pattern=torch.from_numpy(pixels),
            mask=mask,
            nonzero_only=spec.name == "text",
            additive=spec.name == "sig",
            clip=not spec.wrap,
        ).to(self.device)

    def _strength(self) -> float | None:
        if self.spec.name == "sig":
            return 1.0  # its pattern carries the amplitude
        if self.spec.definition.kind == "blend":
            return self.spec.strength
        # A patch with soft edges is a blend of full weight under its mask.
        return None if self._shared is None or self._shared.mask is None else 1.0

    def _positions(self, ids: list[int]) -> Tensor | None:
        if self.spec.definition.kind != "patch":
            return None
        if self.spec.placement == "random":
            places = [patterns.place(self.spec, self.window, self.image_size, i) for i in ids]
            position = np.array(places, dtype=np.int16).reshape(-1, 2)
        else:
            position = np.tile(np.array(self._fixed_place(), dtype=np.int16), (len(ids), 1))
        return sent(torch.from_numpy(position), self.device)

    def _fixed_place(self) -> tuple[int, int]:
        if self.spec.placement == "fixed":
            return self.spec.position
        free = tuple(n - m for n, m in zip(self.image_size, self.window, strict=True))
        if self.spec.placement == "centre":
            return free[0] // 2, free[1] // 2
        vertical, horizontal = self.spec.placement.split("_")
        return free[0] * (vertical == "bottom"), free[1] * (horizontal == "right")


def bind(
    spec: TriggerSpec,
    image_size: int | tuple[int, int],
    device: str | torch.device = "cpu",
) -> BoundTrigger:
    """Fix a trigger to an image size and a device, and make its tables.

    Patterns are drawn on the CPU and moved, so they are the same on every device.

    Args:
        spec: the trigger.
        image_size: H = W, or (H, W), in pixels.
        device: where the images will be.
    Raises:
        TypeError: spec or image_size of a wrong type.
        ValueError: the trigger is larger than the image, or its file changed or is broken.
        FileNotFoundError: its file is gone.
    Example:
        >>> from pybackdoor.triggers import trigger
        >>> bind(trigger("badnet_stripes"), 224).window
        (16, 16)
    """
    if not isinstance(spec, TriggerSpec):
        raise TypeError(f"bind: spec must be a TriggerSpec, got {type(spec).__name__}")
    size = image_size if isinstance(image_size, (tuple, list)) else (image_size, image_size)
    try:
        height, width = (operator.index(n) for n in size)
    except (TypeError, ValueError):
        raise TypeError(
            f"bind: image_size must be an integer or (H, W), got {image_size!r}"
        ) from None
    if not (0 < height < 2**15 and 0 < width < 2**15):
        raise ValueError(f"bind: image_size must be in [1, 32767], got {image_size!r}")
    return BoundTrigger(spec, (height, width), torch.device(device))


def apply_trigger(
    images: Images,  # [B, H, W, 3] uint8
    spec: TriggerSpec | BoundTrigger,
    sample_ids: Iterable[int] | np.ndarray | Tensor,  # [B] int64
) -> Images:
    """Put a trigger on images, exactly as ``trigger_normalize`` does on its way to a model.

    Args:
        images: resized and cropped as the model takes them, before normalisation; may be empty.
        spec: the trigger; a bound one of this size and device saves making its tables anew.
        sample_ids: ids that key random places and patterns per image.
    Returns:
        [B, H, W, 3] uint8 of the type and device of ``images``, which stay as they are.
    Raises:
        TypeError: images are no uint8 array or tensor, or sample ids no integers.
        ValueError: a wrong shape, or a trigger larger than the image.
    Example:
        >>> from pybackdoor.triggers import trigger
        >>> apply_trigger(np.zeros((1, 8, 8, 3), np.uint8), trigger("sig"), [0])[0, 0, :, 0]
        array([ 0,  0,  0, 60,  0,  0,  0, 60], dtype=uint8)
    """
    _check_images(images)
    ids = sample_id_list(sample_ids, "apply_trigger")
    size = tuple(images.shape[1:3])
    device = images.device if isinstance(images, Tensor) else torch.device("cpu")
    if len(ids) != len(images):
        raise ValueError(f"apply_trigger: sample_ids must be [{len(images)}], got [{len(ids)}]")
    bound = spec if isinstance(spec, BoundTrigger) else bind(spec, size, device)
    if (bound.image_size, bound.device) != (size, device):
        raise ValueError(
            f"apply_trigger: the bound trigger must be of {size} on {device} like images, "
            f"got {bound.image_size} on {bound.device}"
        )
    out = images.clone() if isinstance(images, Tensor) else np.array(images, order="C")
    target = out if isinstance(out, Tensor) else torch.from_numpy(out)
    step = max(1, _CHUNK_ELEMENTS // (3 * size[0] * size[1]))
    for start in range(0, len(ids), step):
        part = target[start : start + step]
        _, poisoned = trigger_normalize(
            part,
            mean=(0.0, 0.0, 0.0),
            std=(1.0, 1.0, 1.0),
            dtype=torch.bfloat16,  # the model's input is thrown away
            return_images=True,
            **bound.arguments(ids[start : start + step]),
        )
        part.copy_(poisoned)
    return out


def _check_images(images: Any) -> None:
    wanted = "apply_trigger: images must be a [B, H, W, 3] uint8 array or tensor"
    if not isinstance(images, (np.ndarray, Tensor)):
        raise TypeError(f"{wanted}, got {type(images).__name__}")
    if images.dtype not in (torch.uint8, np.dtype(np.uint8)):
        raise TypeError(f"{wanted}, got {images.dtype}")
    if images.ndim != 4 or images.shape[3] != 3 or 0 in images.shape[1:3]:
        raise ValueError(f"{wanted}, got shape {tuple(images.shape)}")
