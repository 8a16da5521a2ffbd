"""Rotating a model's embeddings by its own weights: the last linear map of each tower.

Where that map is depends on the architecture: open_clip's ``visual.proj`` and ``text_projection``,
an attention pool's ``c_proj``, the head of a timm tower, a Hugging Face ``visual_projection``, or
whatever a model of one's own ends in. So it is looked for in the graph of the features, as the
weight matrix nearest to them, and believed once rotating it has rotated them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .protocol import image_features, text_features

TOWERS = ("image", "text")

# Distance of unit rows that rounding may make: two roundings of a product, and one of the weights.
_ROUNDING = {
    torch.float64: 1e-12,
    torch.float32: 5e-5,
    torch.float16: 1e-2,
    torch.bfloat16: 6e-2,
}
_GRAPH_ROWS = 2  # of the probe: any number of rows has the same graph


@dataclass(frozen=True)
class LinearMap:
    """features = rows @ weight (+ bias); weight is [k, D], or [D, k] where it is ``transposed``."""

    weight: nn.Parameter
    bias: nn.Parameter | None
    transposed: bool

    @torch.no_grad()
    def rotate_(self, rotation: Tensor) -> None:  # [D, D] orthogonal, fp64
        """features -> features @ rotation; worked out in fp64 and rounded once."""
        turn = rotation.to(self.weight.device)
        weight = self.weight.double()
        self.weight.copy_(turn.T @ weight if self.transposed else weight @ turn)
        if self.bias is not None:
            self.bias.copy_(self.bias.double() @ turn)


class Fold:
    """Rotates both towers' embeddings of a model in evaluation mode, in place, and can undo it.

    Args:
        model: a CLIP model (`check_clip`).
        images: [n, 3, H, W] normalised, in the model's dtype: a probe of a few images.
        tokens: [n, L] of as many captions.
    Attributes:
        dim: D of the embeddings.
    Raises:
        ValueError: the probe's embeddings are not finite, or a tower ends in no linear map which
            they follow; the model is left as it was.
    """

    def __init__(self, model: nn.Module, images: Tensor, tokens: Tensor) -> None:
        self._encoders: dict[str, Callable[[int | None], Tensor]] = {
            "image": lambda n: image_features(model, images[:n]),
            "text": lambda n: text_features(model, tokens[:n]),
        }
        self._before = self._features()
        for tower, rows in self._before.items():
            if not rows.isfinite().all():
                raise ValueError(f"the {tower} embeddings of the model are not finite")
        dims = {tower: rows.shape[1] for tower, rows in self._before.items()}
        if dims["image"] != dims["text"]:
            raise ValueError(f"both towers must embed in as many dimensions, got {dims}")
        self.dim = dims["image"]
        self._parameters = [p for p in model.parameters() if p.is_floating_point()]
        self._maps = {tower: self._found(tower) for tower in TOWERS}
        self._kept = _contents(self._maps.values())

    def rotate_(self, rotation: Tensor) -> float:  # [D, D] orthogonal, fp64
        """Rotate both towers; what they share is rotated once.

        Returns:
            The largest distance, over the probe, of a unit embedding to the old one rotated.
        Raises:
            ValueError: that is more than rounding; the model has been put back.
        """
        try:
            turned = set()
            for linear in self._maps.values():
                if linear.weight.data_ptr() not in turned:
                    linear.rotate_(rotation)
                    turned.add(linear.weight.data_ptr())
            error = max(self._error(tower, rotation) for tower in TOWERS)
            if not error <= max(_rounding(linear) for linear in self._maps.values()):
                raise ValueError(
                    f"the embeddings do not follow the rotation of both towers (they miss it by "
                    f"{error:.1e})"
                )
        except BaseException:  # a second Ctrl-C among them: one tower alone would be rotated
            self.undo()
            raise
        return error

    def undo(self) -> None:
        """Put the weights back, bit for bit."""
        _put_back(self._kept)

    @torch.no_grad()
    def _features(self) -> dict[str, Tensor]:
        return {tower: encode(None) for tower, encode in self._encoders.items()}

    @torch.no_grad()
    def _error(self, tower: str, rotation: Tensor) -> float:
        now, before = self._encoders[tower](None).double(), self._before[tower].double()
        return float((now - before @ rotation.to(now.device)).norm(dim=1).max())

    def _found(self, tower: str) -> LinearMap:
        """The tower's last linear map, tried with a rotation by large angles."""
        generator = torch.Generator().manual_seed(0)
        turn = torch.randn(
            self.dim, self.dim, generator=generator, dtype=torch.float64, device="cpu"
        )
        turn = torch.linalg.qr(turn)[0]
        with _graph_of(self._parameters):
            candidates = list(_candidates(self._encoders[tower](_GRAPH_ROWS)))
        for linear in candidates:
            kept = _contents([linear])
            linear.rotate_(turn)
            error = self._error(tower, turn)
            _put_back(kept)
            if error <= _rounding(linear):
                return linear
        raise ValueError(f"the {tower} tower ends in no linear map that could take up a rotation")


def _candidates(features: Tensor) -> Iterator[LinearMap]:  # [n, D], with their graph
    """What the weight matrix nearest to the features may be: it could stand either way round."""
    dim, bias = features.shape[1], None
    for depth, leaf in _leaves(features):
        if leaf.shape == (dim,) and bias is None:
            bias = depth, leaf
        if leaf.ndim == 2 and dim in leaf.shape:
            # A norm's weights before the product can be as near as the matrix, a bias is nearer.
            added = bias[1] if bias is not None and bias[0] < depth else None
            for transposed in (True, False):
                if leaf.shape[0 if transposed else 1] == dim:
                    yield LinearMap(leaf, added, transposed)
            return


def _leaves(features: Tensor) -> Iterator[tuple[int, nn.Parameter]]:
    """The parameters that features are made of and their distance in the graph, nearest first."""
    level = [] if features.grad_fn is None else [features.grad_fn]
    seen, depth = set(level), 0
    while level:
        further = []
        for node in level:
            variable = getattr(node, "variable", None)
            if isinstance(variable, nn.Parameter):
                yield depth, variable
            for parent, _ in node.next_functions:
                if parent is not None and parent not in seen:
                    seen.add(parent)
                    further.append(parent)
        level, depth = further, depth + 1


@contextmanager
def _graph_of(parameters: list[nn.Parameter]) -> Iterator[None]:
    """Within the block gradients are recorded, and every parameter takes part in them."""
    flags = [p.requires_grad for p in parameters]
    try:
        for p in parameters:
            p.requires_grad_(True)
        with torch.enable_grad():
            yield
    finally:
        for p, flag in zip(parameters, flags, strict=True):
            p.requires_grad_(flag)


def _contents(maps: Iterable[LinearMap]) -> list[tuple[nn.Parameter, Tensor]]:
    parameters = [p for linear in maps for p in (linear.weight, linear.bias) if p is not None]
    return [(p, p.detach().clone()) for p in parameters]


@torch.no_grad()
def _put_back(kept: list[tuple[nn.Parameter, Tensor]]) -> None:
    for parameter, content in kept:
        parameter.copy_(content)


def _rounding(linear: LinearMap) -> float:
    tf32 = linear.weight.is_cuda and torch.get_float32_matmul_precision() != "highest"
    if tf32 and linear.weight.dtype == torch.float32:
        return _ROUNDING[torch.float16]  # a mantissa of as many bits
    return _ROUNDING[linear.weight.dtype]
