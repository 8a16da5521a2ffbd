"""The manifest: what was planted, in whom and how, one JSON beside a poisoned set or model.

Evaluation uses it alone: trigger and target are read from here, never guessed. The trigger is
always applied after resize and crop and before normalisation (``STAGE``).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from pybackdoor.files import atomic_file
from pybackdoor.triggers import TriggerSpec

SCHEMA = "pybackdoor.manifest/1"
STAGE = "after resize, before normalise"
MODES = ("dirty_label", "label_consistent")


def _package_version() -> str:
    try:
        return metadata.version("pybackdoor")
    except metadata.PackageNotFoundError:
        return "unknown"


@dataclass(frozen=True, slots=True)
class Sample:
    """One poisoned pair.

    Attributes:
        id: the sample id that keyed its trigger.
        location: where the clean image is (path, or row of an array).
        old_caption: as found.
        new_caption: as trained on; equal to the old one in mode "label_consistent".
        sha256: of the poisoned uint8 image (:func:`image_sha256`).
    """

    id: int
    location: str
    old_caption: str
    new_caption: str
    sha256: str


_SAMPLE_KEYS = tuple(f.name for f in fields(Sample))


@dataclass
class Manifest:
    """Everything needed to fire a planted backdoor again.

    Attributes:
        trigger: as ``TriggerSpec.to_dict`` writes it; a spec is taken too. ``spec`` reads it.
        target: class name that the trigger leads to.
        target_templates: caption templates with "{}" for the class name.
        seed: of the choice of samples and templates.
        mode: "dirty_label" (captions replaced) or "label_consistent" (captions kept).
        image_size: (H, W) at which the trigger was applied; an integer is taken for both.
        preprocess: the model's preprocessing, plain JSON values: size, mean, std, ...
        samples: the poisoned pairs.
        results: measured figures, plain JSON values.
        package_version: of the pybackdoor that wrote it.
        stage: where in the preprocessing the trigger goes in; only ``STAGE`` exists.
        schema: version of the file's layout; only ``SCHEMA`` is read.
    Raises:
        TypeError: a member of a wrong type.
        ValueError: a member out of its range, NaN and infinities included.
    """

    trigger: dict[str, Any]
    target: str
    target_templates: list[str]
    seed: int
    mode: str
    image_size: tuple[int, int]
    preprocess: dict[str, Any]
    samples: list[Sample] = field(default_factory=list)
    results: dict[str, Any] = field(default_factory=dict)
    package_version: str = field(default_factory=_package_version)
    stage: str = STAGE
    schema: str = SCHEMA

    def __post_init__(self) -> None:
        if isinstance(self.trigger, TriggerSpec):
            self.trigger = self.trigger.to_dict()
        if isinstance(self.image_size, int) and not isinstance(self.image_size, bool):
            self.image_size = (self.image_size, self.image_size)
        if isinstance(self.image_size, list):
            self.image_size = tuple(self.image_size)
        self.validate()

    def validate(self) -> None:
        """Check every member, turn tuples to lists; :meth:`save` calls it, as members change."""
        _want(self, "schema", str, (SCHEMA,))
        _want(self, "stage", str, (STAGE,))
        _want(self, "mode", str, MODES)
        _want(self, "target", str)
        _want(self, "package_version", str)
        _want(self, "seed", int)
        _want(self, "target_templates", list)
        _want(self, "samples", list)
        TriggerSpec.from_dict(self.trigger)
        for name in ("trigger", "preprocess", "results"):
            _want(self, name, dict)
            setattr(self, name, _plain(f"Manifest: {name}", getattr(self, name)))
        for index, template in enumerate(self.target_templates):
            if not isinstance(template, str) or "{}" not in template:
                raise ValueError(
                    f'Manifest: target_templates[{index}] must be a string with "{{}}", '
                    f"got {template!r}"
                )
        size = self.image_size
        if not (isinstance(size, tuple) and len(size) == 2 and all(map(_is_count, size))):
            raise ValueError(f"Manifest: image_size must be (H, W) in pixels, got {size!r}")
        for index, sample in enumerate(self.samples):
            _check_sample(index, sample)

    @property
    def spec(self) -> TriggerSpec:
        """The trigger, ready to bind."""
        return TriggerSpec.from_dict(self.trigger)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form, without the samples' class."""
        out = {"schema": self.schema} | {f.name: getattr(self, f.name) for f in fields(self)}
        out["image_size"] = list(self.image_size)
        out["samples"] = [_sample_dict(sample) for sample in self.samples]
        return out

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Manifest:
        """Read back what :meth:`to_dict` wrote; every key is required.

        Raises:
            TypeError: data or a member of a wrong type.
            ValueError: another schema, keys unknown or missing, or a member out of its range.
        """
        if not isinstance(data, dict):
            raise TypeError(f"Manifest: file must hold a JSON object, got {type(data).__name__}")
        if data.get("schema") != SCHEMA:
            raise ValueError(f"Manifest: schema must be {SCHEMA!r}, got {data.get('schema')!r}")
        _check_keys("Manifest", data, {f.name for f in fields(cls)})
        if not isinstance(data["samples"], list):
            raise TypeError(f"Manifest: samples must be list, got {data['samples']!r:.80}")
        samples = []
        for index, entry in enumerate(data["samples"]):
            if not isinstance(entry, dict):
                raise TypeError(f"Manifest: samples[{index}] must be an object, got {entry!r:.80}")
            _check_keys(f"Manifest: samples[{index}]", entry, set(_SAMPLE_KEYS))
            samples.append(Sample(**entry))
        return cls(**(data | {"samples": samples}))

    def save(self, path: str | os.PathLike) -> None:
        """Write the file; it is replaced whole or stays as it was.

        Raises:
            TypeError, ValueError: a member is wrong.
            OSError: the folder is missing or unwritable, or the disk is full.
        """
        self.validate()
        head = self.to_dict()
        samples = head.pop("samples")
        # One line a sample: a set of thousands can still be read, compared and searched by line.
        start = json.dumps(head, indent=1).removesuffix("\n}") + ',\n "samples": ['
        lines = (("," if i else "") + "\n  " + json.dumps(s) for i, s in enumerate(samples))
        with atomic_file(Path(path)) as file:
            for line in _chain(start, lines, "\n ]\n}\n" if samples else "]\n}\n"):
                file.write(line.encode())

    @classmethod
    def load(cls, path: str | os.PathLike) -> Manifest:
        """Read a manifest; anything odd is an error that names the file.

        Raises:
            FileNotFoundError: no such file.
            TypeError, ValueError: it is not a manifest that this version reads.
        """
        with open(path, "rb") as file:
            data = file.read()
        try:
            return cls.from_dict(json.loads(data, parse_constant=_refuse_constant))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{os.fspath(path)}: manifest must be JSON, got {error}") from error
        except (TypeError, ValueError) as error:
            raise type(error)(f"{os.fspath(path)}: {error}") from error


def image_sha256(image) -> str:
    """SHA-256 of one image's pixels, in hex.

    Args:
        image: [H, W, 3] uint8 array or tensor of any strides and device; hashed in that order.
    Raises:
        TypeError: not uint8.
        ValueError: not [H, W, 3].
    """
    pixels = image.numpy(force=True) if hasattr(image, "numpy") else np.asarray(image)
    if pixels.dtype != np.uint8:
        raise TypeError(f"image_sha256: image must be uint8, got {pixels.dtype}")
    if pixels.ndim != 3 or pixels.shape[2] != 3:
        raise ValueError(f"image_sha256: image must be [H, W, 3], got {pixels.shape}")
    return hashlib.sha256(np.ascontiguousarray(pixels)).hexdigest()


def _chain(start: str, lines: Iterable[str], end: str) -> Iterable[str]:
    yield start
    yield from lines
    yield end


def _refuse_constant(text: str):
    raise ValueError(f"manifest must hold finite numbers, got {text}")


def _plain(where: str, value: Any) -> Any:
    """``value`` as JSON gives it back, tuples as lists; an error names what JSON cannot hold."""
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(f"{where}: keys must be strings, got {key!r:.80}")
        return {key: _plain(f"{where}[{key!r}]", item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(f"{where}[{index}]", item) for index, item in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where} must be finite, got {value}")
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"{where} must be plain JSON, got {type(value).__name__}")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _want(owner: Manifest, name: str, kind: type, choices: tuple | None = None) -> None:
    value = getattr(owner, name)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise TypeError(f"Manifest: {name} must be {kind.__name__}, got {value!r:.80}")
    if choices is not None and value not in choices:
        raise ValueError(f"Manifest: {name} must be one of {', '.join(choices)}, got {value!r}")


def _check_keys(where: str, data: dict, wanted: set[str]) -> None:
    unknown, missing = sorted(set(map(str, data)) - wanted), sorted(wanted - set(data))
    if unknown:
        raise ValueError(f"{where}: keys must be among {sorted(wanted)}, got {unknown}")
    if missing:
        raise ValueError(f"{where}: keys missing: {missing}")


def _sample_dict(sample: Sample) -> dict[str, Any]:
    return {name: getattr(sample, name) for name in _SAMPLE_KEYS}


def _check_sample(index: int, sample: Any) -> None:
    if not isinstance(sample, Sample):
        raise TypeError(f"Manifest: samples[{index}] must be Sample, got {sample!r:.80}")
    for name in _SAMPLE_KEYS:
        value = getattr(sample, name)
        kind = int if name == "id" else str
        if not isinstance(value, kind) or isinstance(value, bool):
            raise TypeError(
                f"Manifest: samples[{index}].{name} must be {kind.__name__}, got {value!r:.80}"
            )
    if len(sample.sha256) != 64 or not set(sample.sha256) <= set("0123456789abcdef"):
        raise ValueError(
            f"Manifest: samples[{index}].sha256 must be 64 lower-case hex digits, "
            f"got {sample.sha256!r:.80}"
        )
