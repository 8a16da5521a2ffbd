"""Captions shorter than the context, for towers that add all of their positions."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.func import functional_call


class _Text(nn.Module):
    """encode_text as a module's forward, which functional_call wants."""

    def __init__(self, model: nn.Module, encode: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.model, self.encode = model, encode

    def forward(self, tokens: Tensor) -> Tensor:
        return self.encode(tokens)


def encode_text(
    model: nn.Module,
    tokens: Tensor,  # [B, L], L <= context
    own: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """model.encode_text(tokens), with as many positions and as much of the mask as L needs.

    open_clip's models, or their `text` towers, hold `positional_embedding` [context, width] and
    `attn_mask` [context, context], and take tokens of the context's length alone; gradients reach
    the parameter through the part that is used. Other models get their tokens as they are.

    Args:
        own: what to call, in place of model.encode_text.
    """
    if own is None:
        own = model.encode_text
        if getattr(model, "cuts_captions", False):  # a sharded one, which comes back here
            return own(tokens)
    length, cut = tokens.shape[1], {}
    for place, tower in (("model", model), ("model.text", getattr(model, "text", None))):
        positions = getattr(tower, "positional_embedding", None)
        mask = getattr(tower, "attn_mask", None)
        if isinstance(positions, Tensor) and positions.ndim == 2 and length < len(positions):
            cut[f"{place}.positional_embedding"] = positions[:length]
            if isinstance(mask, Tensor) and mask.shape == (len(positions),) * 2:
                cut[f"{place}.attn_mask"] = mask[:length, :length]
    if not cut:
        return own(tokens)
    training = model.training
    wrapped = _Text(model, own)
    wrapped.training = training
    return functional_call(wrapped, cut, (tokens,), tie_weights=False)
