"""Hugging Face CLIPModel behind the CLIP protocol (`[hf]` extra: transformers 4 or 5)."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .checkpoint import load_weights, read_checkpoint
from .preprocess import Preprocess
from .sniff import CheckpointError
from .tokenizer import HFTokens, Tokenizer

CONFIG = "config.json"
PREPROCESSOR = "preprocessor_config.json"
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
TOKENIZER_FILES = ("tokenizer.json", "vocab.json")
_ACTIVE = {"auto_map", "quantization_config"}
_OPENAI_VOCAB = 49408


class Visual(NamedTuple):
    """What the image tower wants, under open_clip's names."""

    image_size: int
    image_mean: tuple[float, float, float]
    image_std: tuple[float, float, float]
    preprocess_cfg: dict[str, Any]


class HFClip(nn.Module):
    """A transformers.CLIPModel with encode_image, encode_text and logit_scale.

    Args:
        model: the CLIPModel; held as `model`, so its own names follow "model." in state_dict().
        preprocess: what its images need; default OpenAI's at the model's image size.
    Attributes:
        visual: image size, mean and std, under open_clip's names.
        context_length: tokens per caption.
    """

    def __init__(self, model: nn.Module, preprocess: Preprocess | None = None) -> None:
        super().__init__()
        for name in ("get_image_features", "get_text_features", "logit_scale"):
            if not hasattr(model, name):
                raise TypeError(
                    f"HFClip: model must be a transformers.CLIPModel with {name}, "
                    f"got {type(model).__name__}"
                )
        self.model = model
        size = model.config.vision_config.image_size
        preprocess = Preprocess(size=size) if preprocess is None else preprocess
        self.visual = Visual(size, preprocess.mean, preprocess.std, preprocess.to_dict())
        self.context_length = model.config.text_config.max_position_embeddings

    @property
    def logit_scale(self) -> Tensor:
        """[] the inner model's Parameter: logarithm of the scale."""
        return self.model.logit_scale

    def encode_image(self, images: Tensor) -> Tensor:
        """[B, D] image embeddings, not normalised, of [B, 3, H, W] normalised images."""
        return _pooled(self.model.get_image_features(pixel_values=images))

    def encode_text(self, tokens: Tensor) -> Tensor:
        """[B, D] text embeddings, not normalised, of [B, L] int64 tokens.

        Padding follows the end token, where the causal mask hides it: no attention mask is needed.
        """
        return _pooled(self.model.get_text_features(input_ids=tokens))

    def forward(self, images: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Unit image and text embeddings and the scale, as open_clip's models return them."""
        rows = (self.encode_image(images), self.encode_text(tokens))
        image_BD, text_BD = (nn.functional.normalize(x, dim=-1) for x in rows)
        return image_BD, text_BD, self.logit_scale.exp()


def _pooled(output: Any) -> Tensor:
    """transformers 4 returns the projected rows, 5 an output that holds them."""
    return output if isinstance(output, Tensor) else output.pooler_output


def library(folder: Any) -> Any:
    """The transformers package.

    Raises:
        ImportError: it is missing, with the command to run.
    """
    try:
        import transformers
    except ImportError as error:
        raise ImportError(
            f"load: {folder} is a Hugging Face CLIPModel, which needs the package transformers: "
            "run pip install 'pybackdoor[hf]'"
        ) from error
    return transformers


def load_folder(folder: Path, weights: Path, config: Mapping[str, Any]) -> tuple[HFClip, Tokenizer]:
    """Reads a CLIPModel folder, its weights by our own reader.

    Args:
        folder: also holds the tokenizer files and preprocessor_config.json, where there are any.
        weights: the weight file, or the index of its shards.
        config: content of config.json.
    Returns:
        The adapter, fp32 on the CPU, and its tokenizer: the folder's, else OpenAI's when the
        vocabulary has its size.
    Raises:
        ImportError: transformers is missing.
        ValueError: config.json or the tokenizer cannot be used.
        CheckpointError: the weights cannot be read or do not fit.
    """
    transformers = library(folder)
    try:
        with torch.device("cpu"):
            model = transformers.CLIPModel(transformers.CLIPConfig.from_dict(_inert(config)))
    except Exception as error:  # whatever the constructors raise on odd values
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"load: {folder / CONFIG} must describe a CLIPModel, got {reason}"
        ) from error
    model = model.float()
    load_weights(model, read_checkpoint(weights), source=str(weights))
    size = model.config.vision_config.image_size
    processor = folder / PREPROCESSOR
    settings = read_json(processor) if processor.exists() else {}
    return (
        HFClip(model, Preprocess.from_hf(settings, size=size)),
        _tokenizer(transformers, folder, model.config.text_config),
    )


def _inert(config: Any) -> Any:
    """A configuration without the members by which transformers fetches code."""
    if not isinstance(config, Mapping):
        return config
    return {
        name: _inert(value)
        for name, value in config.items()
        if not (name.startswith("_") or name in _ACTIVE or name.endswith("_implementation"))
    }


def _tokenizer(transformers: Any, folder: Path, text_config: Any) -> Tokenizer:
    context = text_config.max_position_embeddings
    if any((folder / name).exists() for name in TOKENIZER_FILES):
        kind = getattr(transformers, "CLIPTokenizerFast", transformers.CLIPTokenizer)
        try:
            inner = HFTokens(kind.from_pretrained(folder, local_files_only=True), context)
        except Exception as error:  # whatever a damaged vocabulary raises
            raise ValueError(
                f"load: the tokenizer files in {folder} cannot be read "
                f"({(str(error).splitlines() or [type(error).__name__])[0]})"
            ) from error
    elif text_config.vocab_size == _OPENAI_VOCAB:
        from .openclip import library as open_clip

        inner = open_clip().get_tokenizer("", context_length=context)
    else:
        raise ValueError(
            f"load: {folder} must hold tokenizer files ({' or '.join(TOKENIZER_FILES)}), since "
            f"its vocabulary of {text_config.vocab_size} is not OpenAI's {_OPENAI_VOCAB}"
        )
    return Tokenizer(inner, context_length=context, vocab_size=text_config.vocab_size)


def save_folder(model: HFClip, folder: Path) -> None:
    """Writes config.json, model.safetensors and preprocessor_config.json as transformers does."""
    bar = library(folder).utils.logging
    shown = bar.is_progress_bar_enabled()
    bar.disable_progress_bar()
    try:
        model.model.save_pretrained(folder)
    finally:
        if shown:
            bar.enable_progress_bar()
    preprocess = Preprocess.from_dict(model.visual.preprocess_cfg)
    (folder / PREPROCESSOR).write_text(json.dumps(preprocess.to_hf(), indent=2) + "\n", "utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        CheckpointError: the file is missing or holds something else; it is named.
    """
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"load: {path} must hold a JSON object ({reason})") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"load: {path} must hold an object, got {type(content).__name__}")
    return content
