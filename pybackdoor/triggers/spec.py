"""A trigger as data: the frozen spec and its JSON form."""

from __future__ import annotations

import math
import numbers
import os
from dataclasses import dataclass, fields
from typing import Any

from pybackdoor.triggers.catalogue import PLACEMENTS, TRIGGERS, Definition, resolve
from pybackdoor.triggers.files import file_sha256

_HEX = frozenset("0123456789abcdef")
_ALWAYS = frozenset({"name", "seed", "per_image", "grey", "wrap", "version"})


@dataclass(frozen=True)
class TriggerSpec:
    """One trigger, fully determined; make it with :func:`trigger`.

    Options that the trigger does not take are None; those left None take the published default, so
    two specs are equal exactly when they yield the same pixels from the same arguments.

    Attributes:
        name: canonical name, a key of ``TRIGGERS``.
        seed: in [0, 2**63); keys random patterns and places.
        per_image: a new random pattern for each image, keyed by (seed, sample id), instead of one
            for the whole set.
        grey: the same pattern in all three channels; files are turned to grey. No effect on a warp.
        wrap: values outside [0, 1] wrap modulo 256 in the 8-bit step, else they are clipped. Only
            badnet, badnet_stripes, blended_stripes and sig have such values.
        placement: one of ``PLACEMENTS``; patches only. "random" is keyed by (seed, sample id).
        position: (y, x) of the top left pixel for placement "fixed".
        size: patch side in pixels, of patch_file its longer side. None: by the image size, of
            patch_file the file's own.
        strength: blends: the weight a in [0, 1] of a*t + (1-a)*x. sig: the amplitude, added.
        file: PNG file of badclip, patch_file and blend_file.
        file_sha256: hash of its bytes; a file that differs is refused at use.
        mask_file: PNG file of blend_file that selects: white is mixed, black left alone.
        mask_sha256: hash of its bytes.
        version: version of the trigger's definition.

    Raises:
        TypeError: an argument of a wrong type.
        ValueError: an argument out of its range, or an option this trigger does not take.
    """

    name: str
    seed: int = 0
    per_image: bool = False
    grey: bool = False
    wrap: bool | None = None
    placement: str | None = None
    position: tuple[int, int] | None = None
    size: int | None = None
    strength: float | None = None
    file: str | None = None
    file_sha256: str | None = None
    mask_file: str | None = None
    mask_sha256: str | None = None
    version: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise TypeError(f"trigger: name must be a string, got {type(self.name).__name__}")
        if self.name not in TRIGGERS:
            raise ValueError(
                f"trigger: name must be one of {', '.join(TRIGGERS)}, got {self.name!r}"
            )
        self._refuse_foreign_options()
        self._settle_common()
        if self.definition.kind == "patch":
            self._settle_place()
        if "strength" in self.definition.options:
            self._settle_strength()
        if "file" in self.definition.options:
            self._check_file("file", "file_sha256", required=True)
        if "mask_file" in self.definition.options:
            self._check_file("mask_file", "mask_sha256", required=False)

    @property
    def definition(self) -> Definition:
        """The catalogue entry of this trigger."""
        return TRIGGERS[self.name]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form: the options that this trigger takes."""
        kept = _ALWAYS | set(self.definition.options)
        out = {f.name: getattr(self, f.name) for f in fields(self) if f.name in kept}
        if out.get("position") is not None:
            out["position"] = list(out["position"])
        return out

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> TriggerSpec:
        """Read back what :meth:`to_dict` wrote.

        Args:
            data: name and version, and any options; those missing take their defaults.
        Raises:
            TypeError: not a dict, or a value of a wrong type.
            ValueError: a key unknown or missing, a value out of range, or a definition of another
                version than this package holds.
        Example:
            >>> TriggerSpec.from_dict(trigger("sig").to_dict()) == trigger("sig")
            True
        """
        if not isinstance(data, dict):
            raise TypeError(
                f"TriggerSpec.from_dict: data must be a dict, got {type(data).__name__}"
            )
        known = [f.name for f in fields(cls)]
        unknown = sorted(set(map(str, data)) - set(known))
        if unknown:
            raise ValueError(
                f"TriggerSpec.from_dict: keys must be among {', '.join(known)}, got {unknown}"
            )
        missing = sorted({"name", "version"} - set(data))
        if missing:
            raise ValueError(f"TriggerSpec.from_dict: keys missing: {missing}")
        if data["version"] is None:
            raise TypeError("TriggerSpec.from_dict: version must be an integer, got None")
        return cls(**data)

    def _set(self, option: str, value: Any) -> None:
        object.__setattr__(self, option, value)

    def _fail(self, error: type[Exception], option: str, wanted: str, got: Any) -> None:
        raise error(f"trigger {self.name!r}: {option} must be {wanted}, got {got!r}")

    def _integer(self, option: str, value: Any, low: int, high: int) -> int:
        wanted = f"an integer in [{low}, {high}]"
        if isinstance(value, bool) or not isinstance(value, numbers.Integral):
            self._fail(TypeError, option, wanted, value)
        if not low <= value <= high:
            self._fail(ValueError, option, wanted, value)
        return int(value)

    def _refuse_foreign_options(self) -> None:
        allowed = _ALWAYS | set(self.definition.options)
        for f in fields(self):
            if f.name not in allowed and getattr(self, f.name) is not None:
                taken = ", ".join(("seed", "grey", "wrap", *self.definition.options))
                raise ValueError(f"trigger {self.name!r}: takes {taken}, got {f.name}")

    def _settle_common(self) -> None:
        self._set("seed", self._integer("seed", self.seed, 0, 2**63 - 1))
        if self.wrap is None:
            self._set("wrap", not self.definition.clips)
        for option in ("per_image", "grey", "wrap"):
            if not isinstance(getattr(self, option), bool):
                self._fail(TypeError, option, "True or False", getattr(self, option))
        if self.per_image and not self.definition.drawn:
            self._fail(ValueError, "per_image", "False, for its pattern is fixed", True)
        held = self.definition.version
        version = held if self.version is None else self.version
        if self._integer("version", version, 1, 2**31) != held:
            self._fail(ValueError, "version", f"{held}, the one this package holds", version)
        self._set("version", int(version))

    def _settle_place(self) -> None:
        if self.position is not None:
            if not isinstance(self.position, (tuple, list)):
                self._fail(TypeError, "position", "(y, x)", self.position)
            if len(self.position) != 2:
                self._fail(ValueError, "position", "(y, x)", self.position)
            # The op reads positions as int16.
            y, x = (self._integer("position", v, 0, 2**15 - 1) for v in self.position)
            self._set("position", (y, x))
        placement = self.placement
        if placement is None:
            fixed = self.position is not None
            placement = "fixed" if fixed else self.definition.options["placement"]
            self._set("placement", placement)
        if not isinstance(placement, str):
            self._fail(TypeError, "placement", "a string", placement)
        if placement not in PLACEMENTS:
            self._fail(ValueError, "placement", f"one of {', '.join(PLACEMENTS)}", placement)
        if (placement == "fixed") != (self.position is not None):
            wanted = "(y, x)" if placement == "fixed" else f"None with placement {placement!r}"
            self._fail(ValueError, "position", wanted, self.position)
        if self.size is not None:
            self._set("size", self._integer("size", self.size, 1, 2**15 - 1))

    def _settle_strength(self) -> None:
        value = self.definition.options["strength"] if self.strength is None else self.strength
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            self._fail(TypeError, "strength", "a number in [0, 1]", value)
        if not (math.isfinite(value) and 0 <= value <= 1):
            self._fail(ValueError, "strength", "a number in [0, 1]", value)
        self._set("strength", float(value))

    def _check_file(self, option: str, digest: str, *, required: bool) -> None:
        path, sha256 = getattr(self, option), getattr(self, digest)
        if not isinstance(path, (str, type(None))):
            self._fail(TypeError, option, "a path as a string", path)
        if not isinstance(sha256, (str, type(None))):
            self._fail(TypeError, digest, "64 lower-case hex digits", sha256)
        if path is None and sha256 is None and not required:
            return
        if path is None:
            self._fail(ValueError, option, "the path of a PNG file", None)
        if sha256 is None:
            self._fail(ValueError, digest, "the file's hash (trigger() fills it in)", None)
        if len(sha256) != 64 or not _HEX.issuperset(sha256):
            self._fail(ValueError, digest, "64 lower-case hex digits", sha256)


def trigger(name: str, **overrides: Any) -> TriggerSpec:
    """Make the spec of a trigger.

    Args:
        name: canonical name or alias; case, "-", "_" and spaces don't matter.
        **overrides: fields of :class:`TriggerSpec`. ``file`` and ``mask_file`` are read once, to
            record their hashes; "center" is taken for "centre".
    Raises:
        TypeError: no such option, or a value of a wrong type.
        ValueError: no such trigger, or a value out of range.
        FileNotFoundError: ``file`` or ``mask_file`` does not exist.
    Example:
        >>> trigger("Blended", strength=0.1).strength
        0.1
    """
    canonical = resolve(name)
    known = [f.name for f in fields(TriggerSpec) if f.name != "name"]
    unknown = sorted(set(overrides) - set(known))
    if unknown:
        raise TypeError(
            f"trigger {canonical!r}: options must be among {', '.join(known)}, got {unknown}"
        )
    if overrides.get("placement") == "center":
        overrides["placement"] = "centre"
    for option, digest in (("file", "file_sha256"), ("mask_file", "mask_sha256")):
        path = overrides.get(option)
        if option not in TRIGGERS[canonical].options or path is None:
            continue
        if not isinstance(path, (str, os.PathLike)):
            raise TypeError(f"trigger {canonical!r}: {option} must be a path, got {path!r}")
        overrides[option] = os.fspath(path)
        if overrides.get(digest) is None:
            if not os.path.isfile(path):
                raise FileNotFoundError(
                    f"trigger {canonical!r}: {option} must be an existing PNG, got {str(path)!r}"
                )
            overrides[digest] = file_sha256(path)
    return TriggerSpec(name=canonical, **overrides)
