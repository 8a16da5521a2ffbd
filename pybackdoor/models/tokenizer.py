"""Captions to tokens, held to the model's context and vocabulary."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor


class Tokenizer:
    """A model's tokenizer: strings in, [n, context_length] int64 out.

    Captions longer than the context are cut to it, as CLIP does, keeping the end token.

    Args:
        inner: callable on a list of strings; open_clip's, or `HFTokens` over Hugging Face's.
        context_length: tokens per caption.
        vocab_size: of the model; the ids must lie below it.
    """

    def __init__(
        self, inner: Callable[[list[str]], Tensor], *, context_length: int, vocab_size: int
    ) -> None:
        self.inner = inner
        self.context_length = context_length
        self.vocab_size = vocab_size

    def __call__(self, texts: str | Sequence[str]) -> Tensor:
        """Tokenizes captions.

        Args:
            texts: one string or several.
        Returns:
            [n, context_length] int64.
        Raises:
            TypeError: something else than strings.
            ValueError: an id beyond the model's vocabulary, which no embedding could look up.
        """
        texts = [texts] if isinstance(texts, str) else list(texts)
        for index, text in enumerate(texts):
            if not isinstance(text, str):
                raise TypeError(
                    f"Tokenizer: texts[{index}] must be a string, got {type(text).__name__}"
                )
        tokens = self.inner(texts)
        if tokens.numel() and int(tokens.max()) >= self.vocab_size:
            worst = int(tokens.amax(dim=1).argmax())
            raise ValueError(
                f"Tokenizer: token ids must lie below the model's vocab_size {self.vocab_size}, "
                f"got {int(tokens.max())} for {texts[worst]!r:.80}"
            )
        return tokens


class HFTokens:
    """Makes a Hugging Face tokenizer return padded [n, context_length] ids.

    Args:
        tokenizer: a transformers CLIP tokenizer.
        context_length: tokens per caption; longer ones are cut.
    """

    def __init__(self, tokenizer: Any, context_length: int) -> None:
        self.tokenizer = tokenizer
        self.context_length = context_length

    def __call__(self, texts: list[str]) -> Tensor:
        return self.tokenizer(
            texts,
            padding="max_length",
            truncation=True,
            max_length=self.context_length,
            return_tensors="pt",
        )["input_ids"]

    def save_pretrained(self, folder: Any) -> None:
        """Writes the tokenizer's own files."""
        self.tokenizer.save_pretrained(folder)
