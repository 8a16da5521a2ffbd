"""The arguments of trigger_normalize that are more than a tensor: TriggerTable and Augment."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pybackdoor._native import sent

MODES = ("none", "patch", "blend", "warp")
NOISES = ("half", "symmetric")


def need(condition: bool, error: type[Exception], message: str) -> None:
    """Raises error(message) unless the condition holds."""
    if not condition:
        raise error(message)


def describe(value: object) -> str:
    """What the caller gave, for a message."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)} on {value.device}"
    return f"{value!r}"


@dataclass(frozen=True, eq=False)
class TriggerTable:
    """A batch of triggers of one kind, as the op reads them.

    Attributes:
        mode: "patch" overwrites, "blend" computes a * pattern + b * image, "warp" resamples.
        pattern: [T, 3, h, w] fp32, any finite value, in units of [0, 1] pixels; patch and blend.
        mask: [T, 1, h, w] or [T, 3, h, w] fp32 in [0, 1]; blend only: with strength a, the
            pattern's weight is a * mask and the image's 1 - a * mask.
        grid: [T, H, W, 2] fp32 (x, y) in [-1, 1], as for grid_sample(align_corners=True); warp.
        nonzero_only: blend only those elements (not pixels) where pattern != 0.
        additive: blend with b = 1 instead of 1 - a.
        clip: clip to [0, 1] before quantising; else levels wrap modulo 256.
    Raises:
        TypeError, ValueError: a member is missing, superfluous, of the wrong shape or dtype, or
            holds values that are not as above (looked at once, here).
    """

    mode: str
    pattern: Tensor | None = None
    mask: Tensor | None = None
    grid: Tensor | None = None
    nonzero_only: bool = False
    additive: bool = False
    clip: bool = False

    def __post_init__(self) -> None:
        need(
            self.mode in MODES[1:],
            ValueError,
            f"TriggerTable: mode must be one of {', '.join(MODES[1:])}, got {self.mode!r}",
        )
        wanted = {
            "patch": ("pattern",),
            "blend": ("pattern", "mask", "nonzero_only", "additive"),
            "warp": ("grid",),
        }[self.mode]
        for name in ("pattern", "mask", "grid", "nonzero_only", "additive"):
            value = getattr(self, name)
            given = value is not None and value is not False
            need(
                name in wanted or not given,
                ValueError,
                f"TriggerTable: {name} has no meaning in mode {self.mode}, got {describe(value)}",
            )
        main = "grid" if self.mode == "warp" else "pattern"
        self._check_tensor(main, "[T, H, W, 2]" if main == "grid" else "[T, 3, h, w]")
        if self.mask is not None:
            self._check_tensor("mask", "[T, 1, h, w] or [T, 3, h, w] like pattern")
            ok = self.mask.shape[1] in (1, 3) and self.mask.shape == (
                len(self.pattern),
                self.mask.shape[1],
                *self.pattern.shape[2:],
            )
            need(
                ok,
                ValueError,
                f"TriggerTable: mask must be [{len(self.pattern)}, 1 or 3, "
                f"{', '.join(map(str, self.pattern.shape[2:]))}] like pattern, "
                f"got {list(self.mask.shape)}",
            )
            need(
                self.mask.device == self.pattern.device,
                ValueError,
                f"TriggerTable: mask must be on {self.pattern.device} like pattern, "
                f"got {self.mask.device}",
            )
            if self.mask.device.type != "meta":
                low, high = self.mask.min().item(), self.mask.max().item()
                need(
                    low >= 0 and high <= 1,
                    ValueError,
                    f"TriggerTable: mask must lie in [0, 1], got [{low:g}, {high:g}]",
                )

    def _check_tensor(self, name: str, shape: str) -> None:
        value = getattr(self, name)
        need(
            isinstance(value, Tensor),
            TypeError,
            f"TriggerTable: {name} must be a tensor {shape} in mode {self.mode}, "
            f"got {describe(value)}",  # not all its numbers, each time
        )
        need(
            value.dtype == torch.float32,
            TypeError,
            f"TriggerTable: {name} must be float32 {shape}, got {describe(value)}",
        )
        axis, channels = (3, 2) if name == "grid" else (1, 3)
        ok = value.ndim == 4 and value.numel() > 0
        ok = ok and (name == "mask" or value.shape[axis] == channels)
        need(
            ok,
            ValueError,
            f"TriggerTable: {name} must be {shape}, not empty, got {list(value.shape)}",
        )
        if value.device.type != "meta":
            need(
                bool(value.isfinite().all()),
                ValueError,
                f"TriggerTable: {name} must be finite, got infinities or NaN",
            )

    @property
    def source(self) -> Tensor:
        """The tensor that defines the triggers: grid for warp, else pattern."""
        return self.grid if self.mode == "warp" else self.pattern

    def to(self, device: torch.device | str) -> TriggerTable:
        """The same table with its tensors on `device`."""
        moved = {
            name: sent(value, torch.device(device))
            for name in ("pattern", "mask", "grid")
            if (value := getattr(self, name)) is not None
        }
        return unchecked_table(**(vars(self) | moved))


def unchecked_table(**members: object) -> TriggerTable:
    """A TriggerTable of all the members of a checked one; looks at no value."""
    table = object.__new__(TriggerTable)
    table.__dict__.update(members)
    return table


@dataclass(frozen=True)
class Augment:
    """PAR's augmentation (arXiv 2412.00727): noise in pixel space, one square erased after it.

    Attributes:
        noise_p: probability of noise per image.
        noise_std: standard deviation in units of [0, 1] pixels.
        noise: "half" adds clip(std * n, 0, 1), as the paper's code does; "symmetric" std * n.
        erase_p: probability of erasing one square per image; erased values are 0, normalised.
        erase_area: range of the square's share of the image's area.
    Raises:
        ValueError: a value outside its range.
    """

    noise_p: float = 0.5
    noise_std: float = 0.2
    noise: str = "half"
    erase_p: float = 0.5
    erase_area: tuple[float, float] = (0.005, 0.01)

    def __post_init__(self) -> None:
        for name in ("noise_p", "erase_p"):
            value = getattr(self, name)
            need(0 <= value <= 1, ValueError, f"Augment: {name} must be in [0, 1], got {value!r}")
        need(
            0 <= self.noise_std < math.inf,
            ValueError,
            f"Augment: noise_std must be finite and >= 0, got {self.noise_std!r}",
        )
        need(
            self.noise in NOISES,
            ValueError,
            f"Augment: noise must be one of {', '.join(NOISES)}, got {self.noise!r}",
        )
        low, high = self.erase_area
        need(
            0 < low <= high <= 1,
            ValueError,
            f"Augment: erase_area must satisfy 0 < low <= high <= 1, got {self.erase_area!r}",
        )
