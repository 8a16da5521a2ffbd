"""What a model wants done to an image, recorded with the model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image
    from torch import nn

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)
_PILLOW_FILTERS = {2: "bilinear", 3: "bicubic"}  # PIL.Image.Resampling, as stored by Hugging Face


@dataclass(frozen=True)
class Preprocess:
    """From an image to the pixels of a model; normalisation is left to the device.

    Attributes:
        size: side of the square, in pixels.
        mean, std: of the three channels, for pixels in [0, 1].
        interpolation: "bicubic" or "bilinear".
        resize_mode: "shortest" resizes the short side and crops the centre, "squash" both sides.
    Raises:
        TypeError, ValueError: naming the member, what it must be and what it is.
    """

    size: int = 224
    mean: tuple[float, float, float] = OPENAI_MEAN
    std: tuple[float, float, float] = OPENAI_STD
    interpolation: str = "bicubic"
    resize_mode: str = "shortest"

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", _square(self.size))
        for name in ("mean", "std"):
            object.__setattr__(self, name, _three(name, getattr(self, name)))
        if min(self.std) <= 0:
            raise ValueError(f"Preprocess: std must be positive, got {self.std}")
        self._resize()

    def _resize(self):
        from pybackdoor.data.preprocess import Preprocessing

        try:
            return Preprocessing((self.size, self.size), self.resize_mode, self.interpolation)
        except ValueError as error:
            raise ValueError(f"Preprocess: {error}") from None

    def __call__(self, image: Image.Image) -> np.ndarray:
        """Resizes one image with Pillow, byte for byte as open_clip's validation transform.

        Args:
            image: any Pillow image of 8-bit samples.
        Returns:
            [size, size, 3] uint8.
        Raises:
            TypeError: not a Pillow image.
            ValueError: 16-bit, 32-bit or floating samples, whose range is unknown here.
        """
        mode = getattr(image, "mode", None)
        if mode is None:
            raise TypeError(f"Preprocess: image must be a Pillow image, got {type(image).__name__}")
        if mode.startswith("I") or mode == "F":
            raise ValueError(f"Preprocess: image must have 8-bit samples, got mode {mode}")
        return self._resize()(image)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form, with the key names of open_clip's preprocess_cfg."""
        return asdict(self) | {"mean": list(self.mean), "std": list(self.std)}

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Preprocess:
        """Reads a preprocess_cfg; what it leaves out is OpenAI's, its other keys are ignored."""
        if not isinstance(config, Mapping):
            raise TypeError(
                f"Preprocess: preprocess_cfg must be a dict, got {type(config).__name__}"
            )
        fields = cls.__dataclass_fields__
        return cls(**{k: v for k, v in config.items() if k in fields and v is not None})

    @classmethod
    def from_model(cls, model: nn.Module) -> Preprocess | None:
        """Reads it off an open_clip model or an `HFClip`; None when the model does not say."""
        visual = getattr(model, "visual", None)
        config = getattr(visual, "preprocess_cfg", None)
        if isinstance(config, Mapping):
            return cls.from_dict(config)
        mean, std = getattr(visual, "image_mean", None), getattr(visual, "image_std", None)
        size = getattr(visual, "image_size", None)
        if mean is None or std is None or size is None:
            return None
        return cls(size=size, mean=mean, std=std)

    def to_hf(self) -> dict[str, Any]:
        """The preprocessor_config.json of Hugging Face that says the same."""
        square = {"height": self.size, "width": self.size}
        squash = self.resize_mode == "squash"
        resample = next(k for k, v in _PILLOW_FILTERS.items() if v == self.interpolation)
        return {
            "image_processor_type": "CLIPImageProcessor",
            "do_convert_rgb": True,
            "do_resize": True,
            "size": square if squash else {"shortest_edge": self.size},
            "resample": resample,
            "do_center_crop": not squash,
            "crop_size": square,
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
        }

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], *, size: int) -> Preprocess:
        """Reads Hugging Face's preprocessor_config.json.

        Args:
            config: its content; empty means OpenAI's.
            size: the model's own image size, in pixels; the file's must agree.
        Raises:
            ValueError: sizes disagree, or a step that this package does not do.
        """
        resample = config.get("resample", 3)
        if resample not in _PILLOW_FILTERS:
            raise ValueError(
                f"Preprocess: resample must be one of {sorted(_PILLOW_FILTERS)}, got {resample!r}"
            )
        wanted = config.get("size", size)
        squash = isinstance(wanted, Mapping) and "height" in wanted
        final = config.get("crop_size", wanted) if config.get("do_center_crop", True) else wanted
        if isinstance(final, Mapping):
            final = final.get("shortest_edge", (final.get("height"), final.get("width")))
        if _square(final) != size:
            raise ValueError(f"Preprocess: size must be the model's {size}, got {final!r}")
        return cls(
            size=size,
            mean=config.get("image_mean", OPENAI_MEAN),
            std=config.get("image_std", OPENAI_STD),
            interpolation=_PILLOW_FILTERS[resample],
            resize_mode="squash" if squash else "shortest",
        )


def _square(size: Any) -> int:
    sides = set(size) if isinstance(size, list | tuple) else {size}
    side = sides.pop() if len(sides) == 1 else None
    if isinstance(side, bool) or not isinstance(side, int) or side < 1:
        raise ValueError(f"Preprocess: size must be one positive integer (square), got {size!r}")
    return side


def _three(name: str, values: Any) -> tuple[float, float, float]:
    try:
        numbers = tuple(float(v) for v in values)
    except (TypeError, ValueError):
        numbers = ()
    if len(numbers) != 3 or not all(map(math.isfinite, numbers)):
        raise ValueError(f"Preprocess: {name} must be three finite numbers, got {values!r:.80}")
    return numbers
