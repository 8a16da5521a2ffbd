"""PAR, Perturb and Recover (arXiv 2412.00727): clean a CLIP model without knowing the trigger.

Fine-tune on clean pairs with CLIP's own loss (recover) while pushing both towers' embeddings away
from those of the poisoned model (perturb), until their mean squared distance exceeds tau:

    L = L_CLIP(φ(x̃), ψ(t)) − ½ [gate(S_φ) + gate(S_ψ)],   gate(S) = S if S ≤ tau else 0
    S_φ = meanₙ‖φ(x̃ₙ) − φ_P(x̃ₙ)‖²,  S_ψ likewise for the text

x̃ is the augmented view that student and poisoned model both see; text is not augmented. The mean is
taken over the whole batch of all ranks before it is compared with tau: one gate per tower and step.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .batches import Tokenizer
from .clean import CleanResult, augmentation, clean, frozen_copy, two_phase_schedule
from .engine import PRECISIONS, Encoder, Settings, StepHook, loss_precision
from .ops import Augment, contrastive_par


class PerturbAndRecover:
    """The PAR objective against a frozen poisoned model."""

    def __init__(
        self, poisoned: nn.Module, tau: float, encode: Encoder, precision: str = "auto"
    ) -> None:
        self._poisoned, self._tau, self._encode = poisoned, tau, encode
        self._precision = precision

    @torch.no_grad()
    def reference(self, x: Tensor, tokens: Tensor) -> tuple[Tensor, ...]:
        return self._encode.image(self._poisoned, x), self._encode.text(self._poisoned, tokens)

    def __call__(
        self,
        image: Tensor,  # [n, D] unit rows
        text: Tensor,  # [n, D] unit rows
        scale: Tensor,  # []
        reference: tuple[Tensor, ...],  # the poisoned model's image and text features, [n, D]
        counts: list[int] | None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        loss, *terms = contrastive_par(
            text,
            image,
            scale,
            image_ref=reference[0],
            text_ref=reference[1],
            distance_weight=0.5,
            tau=self._tau,
            normalize=False,
            precision=self._precision,
            counts=counts,
        )
        names = ("contrastive", "s_image", "s_text", "gate_image", "gate_text")
        return loss, dict(zip(names, terms, strict=True))


def par_clean(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    tau: float = 2.15,
    epochs: int = 2,
    steps: int | None = None,
    lr_start: float = 3e-5,
    lr: float = 3e-6,
    lr_end: float = 1e-9,
    weight_decay: float = 1e-4,
    betas: tuple[float, float] = (0.9, 0.98),
    augment: bool | Augment = True,
    precision: str = "bf16",
    seed: int = 0,
    device: str | torch.device | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    tokenizer: Tokenizer | None = None,
    progress: bool | None = None,
    on_step: StepHook | None = None,
) -> CleanResult:
    """Remove a backdoor from a CLIP model by Perturb and Recover.

    The cleaned encoder leaves the old embedding space: mean cosine to the input model falls to
    about 1 - tau/2. Embedding indexes, probes and adapters built on the old encoder must be
    rebuilt. The backdoor may come back under later fine-tuning, and a clean model loses accuracy
    too.

    Args:
        model: has ``encode_image``, ``encode_text`` and ``logit_scale`` (log of the scale).
        loader: clean pairs. Yields ``(images, tokens)``, ``(images, tokens, ids)`` or a dict with
            those keys. Images are uint8 ([n, H, W, 3] or [n, 3, H, W]; augmented and normalised
            here) or normalised floats ([n, 3, H, W]; erased, and given noise when mean and std are
            known). Tokens are [n, L] integers, or strings with ``tokenizer``.
        tau: distance at which a tower is no longer pushed; in [0, 4], dimensionless.
        epochs: passes over the loader, from epoch 0 on; a position that it holds is not resumed.
        steps: optimiser steps, instead of epochs.
        lr_start, lr, lr_end: linear lr_start -> lr over the first half, then cosine to lr_end.
        weight_decay: not for biases, norms and scalars.
        betas: of AdamW.
        augment: PAR's pixel noise (p = ½) and erased square (p = ½), or an ``Augment``.
        precision: "bf16" (autocast; distances, logits and losses in fp32) or "fp32".
        seed: of everything random; on a CPU the same seed gives the same bits.
        device: where to train; default this process's GPU, else the CPU.
        mean, std: of the three channels for pixels in [0, 1]; default the model's own.
        tokenizer: list of strings -> [n, L] tokens.
        progress: show a progress bar; default when standard error is a terminal.
        on_step: called with (step, record, model); returning True ends the run.
    Returns:
        The cleaned copy, one history record per step (loss, contrastive, s_image, s_text, both
        gates, lr), and a report.
    Raises:
        TypeError, ValueError: naming the argument, what was wanted and what came.
        NonFiniteError: a feature, loss or gradient is not finite; names it.
        KeyboardInterrupt: on Ctrl-C, once the step in flight is complete. This and whatever else
            ends the run after its first step has an attribute ``result``, the CleanResult so far.
    Example:
        >>> result = par_clean(model, loader, steps=100)  # doctest: +SKIP
        >>> result.history[-1]["s_image"]  # doctest: +SKIP
    Source: arXiv 2412.00727, objective and settings of its released configuration.
    """
    check_tau(tau)
    settings = Settings(
        steps, epochs, weight_decay, betas, augmentation(augment), precision, seed,
        progress=progress,
    )  # fmt: skip

    def objective(student: nn.Module) -> PerturbAndRecover:
        where = next(student.parameters()).device
        encode = Encoder(PRECISIONS[precision], where)
        return PerturbAndRecover(frozen_copy(student), tau, encode, loss_precision(precision))

    return clean(
        "par", model, loader, objective, two_phase_schedule(lr_start, lr, lr_end), settings,
        mean=mean, std=std, tokenizer=tokenizer, device=device, on_step=on_step,
        own={"tau": tau, "lr_start": lr_start, "lr": lr, "lr_end": lr_end},
    )  # fmt: skip


def check_tau(tau: float) -> None:
    """Refuse what is no squared distance of unit rows."""
    if not 0 <= tau <= 4:
        raise ValueError(f"tau must be in [0, 4], the range of a squared distance, got {tau}")
