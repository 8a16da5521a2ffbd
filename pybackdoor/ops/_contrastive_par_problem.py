"""What the stages of contrastive_par share, whatever the backend."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

__all__ = ["SUSPECT", "VALID", "Problem"]

VALID, SUSPECT = 1, 2  # bits of an image


class Problem(NamedTuple):
    """What all stages share; contiguous tensors on one device.

    M text rows, N images of this rank, A images of all ranks (A = N in one process), of which
    this rank's are [offset, offset + N); D features. "acc" is fp64 for fp64 inputs, else fp32.
    """

    text: Tensor  # [M, D] dtype
    image: Tensor  # [N, D] dtype
    text_ref: Tensor | None  # [M, D] dtype: unit rows, constant
    image_ref: Tensor | None  # [N, D] dtype
    owner: Tensor  # [M] int32 in [0, N), non-decreasing
    segment: Tensor  # [N + 1] int32: the rows of image j are segment[j] .. segment[j + 1] - 1
    weight: Tensor  # [M] acc: > 0 recover, < 0 unlearn, 0 skip; 0 where the owner is not valid
    column_weight: Tensor  # [A] acc, >= 0; 0 where not valid
    bits: Tensor  # [A] uint8: VALID | SUSPECT
    scale: Tensor  # [] acc: s
    normalize: bool
    offset: int
