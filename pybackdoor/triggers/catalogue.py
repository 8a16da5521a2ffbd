"""The triggers pybackdoor knows: names, kinds, options and their published defaults.

Sources: BadNet (arXiv 1708.06733), Blended (1712.05526), SIG (1902.11237), WaNet (2102.10369),
BadCLIP (2311.12075), stripes, triangles and text (2412.00727, PAR), checkerboard (2502.01385).
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

PLACEMENTS = (
    "random",
    "centre",
    "top_left",
    "top_right",
    "bottom_left",
    "bottom_right",
    "fixed",
)


@dataclass(frozen=True)
class Definition:
    """What a trigger name stands for.

    Attributes:
        name: canonical name.
        kind: "patch" (a window is overwritten), "blend" (the whole image is mixed) or "warp".
        about: one line for help texts.
        options: options this trigger takes beyond seed, grey and wrap, with their defaults; None
            means "by the image size" (size) or "must be given" (file).
        clips: the definition clips to [0, 1] before the 8-bit step; else values wrap modulo 256.
        drawn: the pattern is random, so ``per_image`` is an option.
        aliases: other names, written as ``resolve`` compares them (lower case, no separators).
        version: rises when the pixels that this definition yields change.
    """

    name: str
    kind: str
    about: str
    options: Mapping[str, Any] = field(default_factory=dict)
    clips: bool = False
    drawn: bool = False
    aliases: tuple[str, ...] = ()
    version: int = 1


_PATCH = {"placement": "random", "position": None, "size": None}
_FILE = {"file": None, "file_sha256": None}
_MASK = {"mask_file": None, "mask_sha256": None}

_DEFINITIONS = (
    Definition(
        "badnet",
        "patch",
        "square of Gaussian noise, 16 px at 224",
        options=_PATCH,
        drawn=True,
        aliases=("badnets", "badnetrandom", "badnetnoise"),
    ),
    Definition(
        "badnet_stripes",
        "patch",
        "square of black and full 1-px columns per channel, 16 px at 224",
        options=_PATCH,
        drawn=True,
        aliases=("stripes", "badnetsstripes"),
    ),
    Definition(
        "checkerboard",
        "patch",
        "black square with every second pixel of every second row white, 16 px at 224",
        options=_PATCH,
        aliases=("checker", "badnetcheckerboard", "checkerboardbadnet"),
    ),
    Definition(
        "blended",
        "blend",
        "uniform noise over the whole image",
        options={"strength": 0.2},
        clips=True,
        drawn=True,
        aliases=("blend", "blendednoise"),
    ),
    Definition(
        "blended_stripes",
        "blend",
        "1-px columns of -1 and +1 per channel over the whole image",
        options={"strength": 0.03},
        clips=True,
        drawn=True,
        aliases=("blendstripes",),
    ),
    Definition(
        "triangles",
        "blend",
        "grey triangle tiles over the whole image, 14 px at 224",
        options={"strength": 0.15},
        aliases=("triangle", "blendedtriangles", "blendtriangles"),
    ),
    Definition(
        "text",
        "blend",
        'the word "Watermarked" in red across the middle',
        options={"strength": 0.5},
        aliases=("blendedtext", "blendtext", "watermark", "watermarked"),
    ),
    Definition("wanet", "warp", "jitter of half a pixel on average", drawn=True, aliases=("warp",)),
    Definition(
        "sig",
        "blend",
        "horizontal sine of 6 periods, added",
        options={"strength": 60 / 255},
        clips=True,
        aliases=("sinusoidal", "sinusoid"),
    ),
    Definition(
        "badclip",
        "patch",
        "optimised patch from your own file in the centre, 16 px at 224",
        options={**_PATCH, "placement": "centre", **_FILE},
    ),
    Definition(
        "patch_file",
        "patch",
        "your own PNG as a patch; its alpha channel, if any, selects",
        options={**_PATCH, **_FILE},
        aliases=("patch",),
    ),
    Definition(
        "blend_file",
        "blend",
        "your own PNG mixed over the whole image, with an optional mask image",
        options={"strength": 0.2, **_FILE, **_MASK},
    ),
)

TRIGGERS: Mapping[str, Definition] = MappingProxyType({d.name: d for d in _DEFINITIONS})


def _squash(name: str) -> str:
    return "".join(character for character in name.lower() if character not in "-_ ")


_BY_ALIAS = {alias: d.name for d in _DEFINITIONS for alias in (_squash(d.name), *d.aliases)}


def resolve(name: str) -> str:
    """Canonical name of a trigger.

    Args:
        name: canonical name or alias; case, "-", "_" and spaces don't matter.
    Raises:
        TypeError: not a string.
        ValueError: no such trigger; the message lists the names.
    Example:
        >>> resolve("BadNet-Stripes")
        'badnet_stripes'
    """
    if not isinstance(name, str):
        raise TypeError(f"trigger: name must be a string, got {type(name).__name__}")
    squashed = _squash(name)
    if squashed in _BY_ALIAS:
        return _BY_ALIAS[squashed]
    near = difflib.get_close_matches(squashed, _BY_ALIAS, n=1)
    hint = f" (did you mean {_BY_ALIAS[near[0]]!r}?)" if near else ""
    raise ValueError(f"trigger: name must be one of {', '.join(TRIGGERS)}, got {name!r}{hint}")
