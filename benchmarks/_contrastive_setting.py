"""A setting of the contrastive_par benchmark: inputs, the exact answer, the providers' losses."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from _common import OURS
from _contrastive_eager import (
    Exact,
    OneDnnProduct,
    distance_term,
    exact,
    one_product,
    two_products,
)
from _peers import PEERS, Unfit
from torch import Tensor

SCALE = 100.0  # CLIP's, once trained
COSINE = 0.2  # of the pairs: their logits stand about where the sums of the others do
NOISE = 1.0  # of the references, relative to the features
DISTANCE_WEIGHT, TAU = 0.5, 2.15
PRECISION = {torch.float32: "fp32", torch.bfloat16: "bf16"}
ARGUMENT = {torch.float32: "ieee", torch.bfloat16: "bf16"}  # the op's name for it
GRAPH_ROWS = 4096  # beyond, launches take no part in the time

Leaves = tuple[Tensor, Tensor, Tensor]  # text [N, D], image [N, D], log of the scale []
Loss = Callable[..., Tensor]
EAGER = {"eager": two_products, "eager_shared": one_product}


class Setting:
    """One shape, dtype, device and case: inputs, the exact answer, and the providers' losses."""

    def __init__(self, shape: tuple[int, int], dtype: torch.dtype, device: str, case: str = "clip"):
        self.shape, self.dtype, self.device, self.case = shape, dtype, device, case
        self.refs: tuple[Tensor, Tensor] | None = None
        self.leaves = self.make_leaves(0)
        if case == "par":
            units = [F.normalize(x.detach().float(), dim=1) for x in self.leaves[:2]]
            noise = [F.normalize(x, dim=1) * NOISE for x in map(torch.randn_like, units)]
            self.refs = tuple(
                F.normalize(u + e, dim=1).to(dtype) for u, e in zip(units, noise, strict=True)
            )

    def make_leaves(self, seed: int) -> Leaves:
        """A set of inputs: pairs of cosine about COSINE."""
        generator = torch.Generator(self.device).manual_seed(seed)
        options = {"generator": generator, "device": self.device}
        a, b = (torch.randn(self.shape, **options) for _ in range(2))
        image = COSINE * a + math.sqrt(1 - COSINE**2) * b
        log_scale = torch.tensor(math.log(SCALE), device=self.device)
        return tuple(
            x.requires_grad_() for x in (a.to(self.dtype), image.to(self.dtype), log_scale)
        )

    def exact(self) -> Exact:
        """The fp64 answer at the first set of inputs."""
        text, image, log_scale = self.leaves
        return exact(text, image, log_scale.exp(), self.refs, DISTANCE_WEIGHT, TAU)

    def ours(self, text: Tensor, image: Tensor, log_scale: Tensor) -> Tensor:
        """The op."""
        from pybackdoor.ops import contrastive_par

        text_ref, image_ref = self.refs or (None, None)
        return contrastive_par(
            text,
            image,
            log_scale.exp(),
            text_ref=text_ref,
            image_ref=image_ref,
            distance_weight=DISTANCE_WEIGHT,
            tau=TAU,
            precision=ARGUMENT[self.dtype],
        ).loss

    def around(self, loss: Loss, autocast: bool, product=None) -> Loss:
        """Normalisation, a loss of unit rows, and the distance term; autocast or cast by hand."""
        mixed = autocast and self.dtype == torch.bfloat16
        extra = {} if product is None else {"product": product}

        def run(text: Tensor, image: Tensor, log_scale: Tensor) -> Tensor:
            with torch.autocast(self.device, torch.bfloat16) if mixed else nullcontext():
                if mixed:
                    text, image = F.normalize(text, dim=1), F.normalize(image, dim=1)
                else:
                    text, image = (F.normalize(x.float(), dim=1).to(x.dtype) for x in (text, image))
                value = loss(text, image, log_scale.exp(), **extra)
            if self.refs is not None:
                for unit, ref in zip((text, image), self.refs, strict=True):
                    value = value + distance_term(unit, ref, DISTANCE_WEIGHT, TAU)
            return value

        return run

    def loss(self, name: str, backend: str = "inductor") -> Loss:
        """A provider's loss of the leaves.

        Raises:
            ImportError: a peer is not installed.
            Unfit: it cannot do this setting.
        """
        if name == OURS:
            return self.ours
        if name.endswith("_onednn"):
            if self.device != "cpu" or self.dtype != torch.float32:
                raise Unfit("is for fp32 on a CPU")
            return self.around(EAGER[name.removesuffix("_onednn")], True, OneDnnProduct.apply)
        if name in EAGER:
            return self.around(EAGER[name], True)
        if name in ("compile", "compile_graph"):
            mode = None
            if name == "compile_graph":
                if self.device != "cuda":
                    raise Unfit("needs a CUDA device")
                if self.shape[0] > GRAPH_ROWS:
                    raise Unfit(f"is for N <= {GRAPH_ROWS}")
                mode = "reduce-overhead"
            run = torch.compile(self.around(two_products, True), backend=backend, mode=mode,
                                dynamic=False)  # fmt: skip
            return run if mode is None else _marked(run)
        peer = PEERS[name]
        made = peer.make(self.device, self.shape[1])
        return self.around(partial(_numbered, made), peer.autocast)

    def precision(self, name: str) -> str:
        """What the provider's products are in."""
        return PEERS[name].precision[self.dtype] if name in PEERS else PRECISION[self.dtype]


def _marked(run: Loss) -> Loss:
    def call(*leaves: Tensor) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        return run(*leaves)

    return call


def _numbered(loss: Callable, text: Tensor, image: Tensor, scale: Tensor) -> Tensor:
    return loss(text, image, scale, SCALE)


def gradients(loss: Tensor, leaves: Leaves, retain: bool = False) -> tuple[Tensor | None, ...]:
    """Of text, image and log scale; None where the loss does not depend on one."""
    return torch.autograd.grad(loss, leaves, retain_graph=retain, allow_unused=True)


def full(loss: Loss, leaves: Leaves) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """Forward and backward."""
    value = loss(*leaves)
    return value, gradients(value, leaves)
