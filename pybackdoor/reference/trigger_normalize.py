"""trigger_normalize in plain eager PyTorch.

Runs on any device and never multiplies by a reciprocal: on CUDA the results equal those of CPU
torch, except where noise is drawn or an image is warped.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pybackdoor._native import sent

if TYPE_CHECKING:
    from pybackdoor.ops._trigger_table import Augment, TriggerTable

STREAM_DECISIONS, STREAM_NOISE = 0, 1
_LOW = 0xFFFFFFFF
_PHILOX_M = (0xD2511F53, 0xCD9E8D57)
_PHILOX_W = (0x9E3779B9, 0xBB67AE85)


def philox_uint32(seed: int, stream: int, view: int, sample_id: Tensor, blocks: Tensor) -> Tensor:
    """Philox4x32-10 words, a pure function of its arguments (Salmon et al., SC 2011).

    key = seed (64 bit); counter = (block, stream | view << 8, sample_id low, sample_id high).

    Args:
        seed: any integer; its low 64 bits are the key.
        stream: 0 for decisions, 1 for noise; in [0, 256).
        view: which augmented view of the sample; in [0, 2^24).
        sample_id: [B] int64.
        blocks: [n] int64 in [0, 2^32).
    Returns:
        [B, n, 4] int64 in [0, 2^32).
    """
    sample_id = sample_id.to(torch.int64)[:, None]
    shape = torch.broadcast_shapes(sample_id.shape, blocks[None].shape)
    c0 = blocks[None].expand(shape)
    c1 = torch.full_like(c0, stream | view << 8)
    c2 = (sample_id & _LOW).expand(shape)
    c3 = (sample_id >> 32 & _LOW).expand(shape)
    k0, k1 = seed & _LOW, seed >> 32 & _LOW
    for _ in range(10):
        p0, p1 = c0 * _PHILOX_M[0], c2 * _PHILOX_M[1]
        c0, c1, c2, c3 = (
            (p1 >> 32 & _LOW) ^ c1 ^ k0,
            p1 & _LOW,
            (p0 >> 32 & _LOW) ^ c3 ^ k1,
            p0 & _LOW,
        )
        k0, k1 = k0 + _PHILOX_W[0] & _LOW, k1 + _PHILOX_W[1] & _LOW
    return torch.stack((c0, c1, c2, c3), dim=-1)


def noise_normals(seed: int, view: int, sample_id: Tensor, size: tuple[int, int]) -> Tensor:
    """Standard normal numbers of each sample, by Box-Muller from stream 1, computed in fp64.

    Pixel i = y * W + x of channel c takes word i % 4 of block c * ceil(H * W / 4) + i // 4. Words
    (0, 1) and (2, 3) are pairs: u = ((w0 >> 8) + 1) / 2^24, t = (w1 >> 8) / 2^24,
    n0 = sqrt(-2 ln u) cos(2 pi t), n1 = sqrt(-2 ln u) sin(2 pi t).

    Args:
        sample_id: [B] int64.
        size: (H, W).
    Returns:
        [B, 3, H, W] fp32.
    """
    pixels = size[0] * size[1]
    per_channel = (pixels + 3) // 4
    blocks = torch.arange(3 * per_channel, device=sample_id.device)
    words = philox_uint32(seed, STREAM_NOISE, view, sample_id, blocks)
    pairs = (words >> 8).to(torch.float64).view(len(sample_id), 3, 2 * per_channel, 2)
    radius = ((pairs[..., 0] + 1) * 2.0**-24).log().mul(-2).sqrt()
    angle = pairs[..., 1] * (2 * math.pi * 2.0**-24)
    normals = torch.stack((radius * angle.cos(), radius * angle.sin()), dim=-1)
    normals = normals.view(len(sample_id), 3, 4 * per_channel)[..., :pixels].to(torch.float32)
    return normals.reshape(len(sample_id), 3, *size)


def augment_decisions(
    augment: Augment, seed: int, view: int, sample_id: Tensor, size: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """The coins of each sample and the square to erase; words 0-4 of stream 0.

    Word 0 is the noise coin, 1 the erase coin, 2 the area, 3 and 4 the square's y and x.

    Args:
        sample_id: [B] int64.
        size: (H, W).
    Returns:
        noise: [B] bool.
        square: [B, 3] int64 (y, x, side); side 0 where nothing is erased.
    """
    height, width = size
    blocks = torch.arange(2, device=sample_id.device)
    words = philox_uint32(seed, STREAM_DECISIONS, view, sample_id, blocks).flatten(1)
    unit = words.to(torch.float64) * 2.0**-32
    low, high = augment.erase_area
    area = (unit[:, 2] * (high - low) + low) * float(height * width)
    side = (area.sqrt() + 0.5).floor().to(torch.int64).clamp(1, min(height, width))
    y = words[:, 3] * (height - side + 1) >> 32
    x = words[:, 4] * (width - side + 1) >> 32
    erase = unit[:, 1] < augment.erase_p
    square = torch.stack((y, x, side), dim=1)
    return unit[:, 0] < augment.noise_p, torch.where(erase[:, None], square, 0)


def add_noise(images: Tensor, augment: Augment, seed: int, view: int, sample_id: Tensor) -> Tensor:
    """PAR's pixel noise, clip(x + clip(std * n, 0, 1), 0, 1), or without the inner clip.

    Args:
        images: [B, 3, H, W] fp32 in [0, 1].
        sample_id: [B] int64.
    Returns:
        [B, 3, H, W] fp32.
    """
    noise = noise_normals(seed, view, sample_id, images.shape[-2:]) * augment.noise_std
    if augment.noise == "half":
        noise = noise.clamp(0, 1)
    return (images + noise).clamp(0, 1)


def _erase_(images: Tensor, square: Tensor) -> Tensor:
    """Zeroes each sample's square (y, x, side) in [B, 3, H, W], in place."""
    rows = torch.arange(images.shape[-2], device=images.device)
    cols = torch.arange(images.shape[-1], device=images.device)
    y, x, side = square[:, :, None].unbind(1)
    inside_rows = (rows >= y) & (rows < y + side)
    inside_cols = (cols >= x) & (cols < x + side)
    inside = inside_rows[:, None, :, None] & inside_cols[:, None, None, :]
    return images.masked_fill_(inside, 0)


# Values that get noise at once, by some 150 operators, in about 70 bytes each: a GPU needs many.
_AT_ONCE = {"cpu": 1 << 21, "cuda": 1 << 24}


def augment_normalized(
    images: Tensor,
    mean: tuple[float, float, float] | None,
    std: tuple[float, float, float] | None,
    *,
    augment: Augment,
    seed: int,
    view: int,
    sample_id: Tensor,
) -> Tensor:
    """PAR's augmentation for images that arrive already normalised.

    The same numbers as `trigger_normalize`: noise in pixel space (only when mean and std are
    known), then one square set to zero. A sample whose coins both fall out is returned unchanged.

    Args:
        images: [B, 3, H, W] fp32, fp16 or bf16, normalised.
        mean, std: what the images were normalised with; None in either: no noise.
        sample_id: [B] int64; on the CPU nothing waits for a GPU.
    Returns:
        [B, 3, H, W] like images.
    Raises:
        ValueError: a shape is not as above.
    Example:
        >>> from pybackdoor.ops import Augment
        >>> x, ids = torch.zeros(2, 3, 8, 8), torch.tensor([4, 5])
        >>> options = dict(augment=Augment(), seed=0, view=0, sample_id=ids)
        >>> augment_normalized(x, (0.5,) * 3, (0.5,) * 3, **options).shape
        torch.Size([2, 3, 8, 8])
    """
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(
            f"augment_normalized: images must be [B, 3, H, W], got {list(images.shape)}"
        )
    if sample_id is None or sample_id.shape != images.shape[:1]:
        got = None if sample_id is None else list(sample_id.shape)
        raise ValueError(
            f"augment_normalized: sample_id must be [{len(images)}] like images, got {got}"
        )
    device = images.device
    noisy, square = augment_decisions(augment, seed, view, sample_id, images.shape[-2:])
    out = images.clone()
    if mean is not None and std is not None:
        constants = torch.tensor((mean, std), dtype=torch.float32, device="cpu")
        mean_c, std_c = sent(constants, device).view(2, 3, 1, 1)
        rows = noisy.nonzero()[:, 0]
        at_once = _AT_ONCE["cuda" if images.is_cuda else "cpu"]
        for part in rows.split(max(1, at_once // max(1, images.shape[1:].numel()))):
            ids, part = sent(sample_id[part], device), sent(part, device)
            pixels = images[part].float() * std_c + mean_c
            pixels = add_noise(pixels, augment, seed, view, ids)
            out[part] = ((pixels - mean_c) / std_c).to(images.dtype)
    return _erase_(out, sent(square, device))


def levels(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Tensor:
    """[256] fp32 or fp64: x / 255 by true division, computed on the CPU."""
    return (torch.arange(256, dtype=dtype, device="cpu") / 255).to(device)


def normalize_table(mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """[3, 256] fp32 on the CPU: (x / 255 - mean) / std of each level, by true divisions."""
    mean_c, std_c = torch.tensor((mean, std), dtype=torch.float32, device="cpu")[:, :, None]
    return (levels()[None] - mean_c) / std_c


def quantize(values: Tensor, clip: bool = False) -> Tensor:
    """fp32 pixels to levels as ToPILImage does on the CPU: times 255, truncate, modulo 256.

    Args:
        values: fp32 of any shape; infinities and NaN give 0.
        clip: clip to [0, 1] first.
    Returns:
        uint8, same shape.
    """
    scaled = (values.clamp(0, 1) if clip else values) * 255
    # From 2^31 on every fp32 number is a multiple of 256.
    return (torch.where(scaled.abs() < 2.0**31, scaled, 0).to(torch.int32) & 255).to(torch.uint8)


class _Windows(NamedTuple):
    """Which images get a trigger, and where."""

    chosen: Tensor  # [n] image
    which: Tensor  # [n] its trigger
    index: tuple[Tensor, Tensor, Tensor]  # [n, h, w]; a pixel outside has the row or column H, W


def _windows(
    images: Tensor,  # [B, H, W, 3] uint8
    triggers: TriggerTable,
    trigger_id: Tensor | None,  # [B]
    position: Tensor | None,  # [B, 2]
) -> _Windows:
    (batch, height, width), device = images.shape[:3], images.device
    if trigger_id is None:
        trigger_id = torch.zeros(batch, dtype=torch.int64, device=device)
    chosen = ((trigger_id >= 0) & (trigger_id < len(triggers.source))).nonzero().flatten()
    which = trigger_id[chosen].to(torch.int64)
    h, w = (1, 1) if triggers.mode == "warp" else triggers.pattern.shape[-2:]
    corner = torch.zeros(batch, 2, dtype=torch.int64, device=device)
    if position is not None:
        corner = position.to(torch.int64)
    rows = corner[chosen, :1] + torch.arange(h, device=device)
    cols = corner[chosen, 1:] + torch.arange(w, device=device)
    rows = torch.where((rows >= 0) & (rows < height), rows, height)
    cols = torch.where((cols >= 0) & (cols < width), cols, width)
    return _Windows(chosen, which, (chosen[:, None, None], rows[:, :, None], cols[:, None, :]))


def _strengths(strength: Tensor | float | None, like: Tensor) -> Tensor:
    """[B, 1, 1, 1] fp64 of the images `like`."""
    if not isinstance(strength, Tensor):
        value = 1.0 if strength is None else float(strength)
        strength = torch.full((len(like),), value, dtype=torch.float64, device=like.device)
    return strength.to(torch.float64).view(-1, 1, 1, 1)


def _mix(
    x: Tensor,  # [n, h, w, 3] levels / 255 under each window, in the pattern's dtype
    triggers: TriggerTable,
    which: Tensor,  # [n]
    strength: Tensor,  # [n, 1, 1, 1] fp64
) -> Tensor:
    """What a patch or a blend gives, [n, h, w, 3], before it is clipped and quantised."""
    t = triggers.pattern[which].permute(0, 2, 3, 1)
    if triggers.mode == "patch":
        return t
    a = strength
    if triggers.mask is not None:
        a = a * triggers.mask[which].permute(0, 2, 3, 1).to(torch.float64)
    b = torch.ones_like(a) if triggers.additive else 1 - a
    return a.to(t.dtype) * t + b.to(t.dtype) * x


def _apply_triggers(
    images: Tensor,  # [B, H, W, 3] uint8
    triggers: TriggerTable,
    trigger_id: Tensor | None,  # [B]
    position: Tensor | None,  # [B, 2]
    strength: Tensor | float | None,  # [B]
    quantized: bool,
) -> Tensor:
    """The poisoned images, [B, H, W, 3] uint8; a window is cropped at the image's edge.

    Not quantized: their values in [0, 1] pixels, in the pattern's dtype, differentiable in pattern
    and mask.
    """
    height, width = images.shape[1:3]
    device = images.device
    chosen, which, index = _windows(images, triggers, trigger_id, position)
    if len(chosen) == 0 and quantized:
        return images
    if triggers.mode == "warp":
        out = images.clone()
        pixels = levels(device)[images[chosen].int()].permute(0, 3, 1, 2)
        grid = triggers.grid[which]
        moved = F.grid_sample(pixels, grid, padding_mode="zeros", align_corners=True)
        out[chosen] = quantize(moved.permute(0, 2, 3, 1), triggers.clip)
        return out
    # What lies outside goes to a row and a column more, which are cut off in the end.
    out = F.pad(images, (0, 0, 0, 1, 0, 1))
    dtype = triggers.pattern.dtype
    scale = levels(device, dtype)
    mixed = _mix(scale[out[index].int()], triggers, which, _strengths(strength, images)[chosen])
    if quantized:
        mixed = quantize(mixed, triggers.clip)
    else:
        out = scale[out.int()]
        mixed = mixed.clamp(0, 1) if triggers.clip else mixed
    if triggers.nonzero_only:
        t = triggers.pattern[which].permute(0, 2, 3, 1)
        mixed = torch.where(t != 0, mixed, out[index])
    out[index] = mixed
    return out[:, :height, :width]


def trigger_normalize(
    images: Tensor,
    *,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    triggers: TriggerTable | None = None,
    trigger_id: Tensor | None = None,
    position: Tensor | None = None,
    strength: Tensor | float | None = None,
    augment: Augment | None = None,
    seed: int = 0,
    view: int = 0,
    sample_id: Tensor | None = None,
    input_layout: str = "nhwc",
    layout: str = "nchw",
    patch_size: int | None = None,
    dtype: torch.dtype = torch.float32,
    return_images: bool = False,
    quantize: bool = True,
) -> Tensor | tuple[Tensor, Tensor]:
    """`pybackdoor.ops.trigger_normalize` in plain PyTorch; the same arguments and meaning.

    Arguments are taken as valid (the op checks them), and tensors must be on one device. With
    quantize=False autograd can differentiate it in pattern and mask, in fp64 too.
    """
    poisoned = images if input_layout == "nhwc" else images.permute(0, 2, 3, 1)
    if triggers is not None:
        poisoned = _apply_triggers(poisoned, triggers, trigger_id, position, strength, quantize)
    batch, height, width = poisoned.shape[:3]
    if layout == "channels_last":
        out = torch.empty(batch, height, width, 3, dtype=dtype, device=images.device)
        out = out.permute(0, 3, 1, 2)
    else:
        out = torch.empty(batch, 3, height, width, dtype=dtype, device=images.device)
    if poisoned.dtype == torch.uint8:
        table = normalize_table(mean, std).to(dtype).to(images.device)
        for c in range(3):
            out[:, c] = table[c][poisoned[..., c].int()]
    else:
        constants = torch.tensor((mean, std), dtype=torch.float32, device="cpu").to(poisoned)
        out.copy_(((poisoned - constants[0]) / constants[1]).permute(0, 3, 1, 2))
    if augment is not None:
        size = (height, width)
        noisy, square = augment_decisions(augment, seed, view, sample_id, size)
        mean_c = torch.tensor(mean, dtype=torch.float32, device=images.device).view(3, 1, 1)
        std_c = torch.tensor(std, dtype=torch.float32, device=images.device).view(3, 1, 1)
        for i in noisy.nonzero().flatten().tolist():
            pixels = levels(images.device)[poisoned[i : i + 1].int()].permute(0, 3, 1, 2)
            pixels = add_noise(pixels, augment, seed, view, sample_id[i : i + 1])
            out[i] = ((pixels - mean_c) / std_c)[0]
        _erase_(out, square)
    if layout == "patchified":
        p = patch_size
        rows, cols = height // p, width // p
        out = out.view(batch, 3, rows, p, cols, p).permute(0, 2, 4, 1, 3, 5)
        out = out.reshape(batch, rows * cols, 3 * p * p)
    if not return_images:
        return out
    if input_layout == "nchw":
        poisoned = poisoned.permute(0, 3, 1, 2)
    return out, poisoned.clone(memory_format=torch.contiguous_format)
