"""PAR, Perturb and Recover (arXiv 2412.00727): clean a CLIP model without knowing the trigger.

Fine-tune on clean pairs with CLIP's own loss (recover) while pushing both towers' embeddings away
from those of the poisoned model (perturb), until their mean squared distance exceeds tau:

    L = L_CLIP(φ(x̃), ψ(t)) − ½ [gate(S_φ) + gate(S_ψ)],   gate(S) = S if S ≤ tau else 0
    S_φ = meanₙ‖φ(x̃ₙ) − φ_P(x̃ₙ)‖²,  S_ψ likewise for the text

x̃ is the augmented view that student and poisoned model both see; text is not augmented. The mean is
taken over the whole batch of all ranks before it is compared with tau: one gate per tower and step.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from typing_extensions import Unpack

from ..clean import CleanOptions, CleanResult, clean, frozen_copy
from ..engine import Captions, Given, Objective, Preparation, Settings, loss_precision
from ..ops import contrastive_par


class PerturbAndRecover(Objective):
    """The PAR objective against a frozen poisoned model."""

    shardable = True

    def __init__(self, poisoned: nn.Module, tau: float, precision: str = "auto") -> None:
        self._poisoned, self._tau, self._precision = poisoned, tau, precision

    def prepare(self, run: Preparation) -> None:
        self._reference = run.frozen(self._poisoned)

    def reference(self, x: Tensor, tokens: Tensor | Captions, given: Given) -> tuple[Tensor, ...]:
        return self._reference.image(x), self._reference.text(tokens, given.numbers)

    def __call__(
        self,
        image: Tensor,  # [n, D] unit rows
        text: Tensor,  # [n, D] unit rows
        scale: Tensor,  # []
        reference: tuple[Tensor, ...],  # the poisoned model's image and text features, [n, D]
        given: Given,
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
            counts=given.counts,
        )
        names = ("contrastive", "s_image", "s_text", "gate_image", "gate_text")
        return loss, dict(zip(names, terms, strict=True))


def par_clean(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    tau: float = 2.15,
    **options: Unpack[CleanOptions],
) -> CleanResult:
    """Remove a backdoor from a CLIP model by Perturb and Recover.

    Training takes both encoders out of the old embedding space: mean cosine to the input model
    falls to about 1 - tau/2. Much of that is one rotation which both share, so ``repair`` turns
    them back at the end, and stored images and texts of the old encoder find nearly what they
    found. What is left of the drift stands in the report; where it says that the repair was not
    done, they must be rebuilt. The backdoor may come back under later fine-tuning, and a clean
    model loses accuracy too.

    Args:
        model: has ``encode_image``, ``encode_text`` and ``logit_scale`` (log of the scale).
        loader: clean pairs. Yields ``(images, tokens)``, ``(images, tokens, ids)`` or a dict with
            those keys. Images are uint8 ([n, H, W, 3] or [n, 3, H, W]; augmented and normalised
            here) or normalised floats ([n, 3, H, W]; erased, and given noise when mean and std are
            known). Tokens are [n, L] integers, or strings with ``tokenizer``.
        tau: distance at which a tower is no longer pushed; in [0, 4], dimensionless.
    Options of every cleaning method:
        epochs (2): passes over the loader, from epoch 0 on, whatever position it holds.
        steps (None): optimiser steps, instead of epochs.
        lr_start (3e-5), lr (3e-6), lr_end (1e-9): linear lr_start -> lr over the first half, then
            cosine to lr_end.
        weight_decay (1e-4): not for biases, norms and scalars.
        betas (0.9, 0.98): of AdamW.
        augment (True): PAR's pixel noise (p = ½) and erased square (p = ½), or an ``Augment``.
        precision ("auto"): "bf16", autocast with distances, logits and losses in fp32; or "fp32".
            "auto" is bf16 where the device has instructions for it, else fp32; the report says.
        seed (0): of everything random; on a CPU the same seed gives the same bits.
        device: where to train; default this process's GPU, else the CPU.
        mean, std: of the three channels for pixels in [0, 1]; default the model's own.
        tokenizer: list of strings -> [n, L] tokens.
        progress: show a progress bar; default when standard error is a terminal.
        on_step: called with (step, record, model); returning True ends the run. On a GPU it makes
            each step wait for its numbers; ``track``, called with (step, record), does not. Their
            records have pairs_per_second and data_wait, the share of the time that the loader kept
            the run waiting, both over the last 20 steps, and memory_gb, too.
        micro_batch (None): pairs encoded at a time, for a batch that does not fit into memory; loss
            and gradients stay those of the whole batch, for one more forward pass.
        trim_text (True): encode captions without the padding that all of a batch share, on a CPU
            in groups of similar length; only where the model gives the same features for it, which
            the first batch shows.
        cache_text (True): compute the poisoned model's features of all captions once, at the start,
            where the loader numbers its captions (PairLoader does) and as many pairs will be seen;
            kept as those of ``views`` are, or, where they do not fit, not at all, with a warning.
        lock (None): "text" leaves the text tower as it is and trains the image tower alone, another
            method than the published one: cheaper, prompts and text indexes stay valid, the text's
            distance is 0 and its gate open in every record.
        views (None): K augmentations of a pair that take turns: epoch e shows number e mod K. The
            poisoned model's image features are then computed once for each and kept, for a loader
            that has ``image_ids`` (PairLoader does): on a GPU up to 2 GiB and a quarter of what is
            free, else in the host's memory, up to a quarter of it.
        compile (None): a mode of torch.compile for both towers, such as "default".
        repair (True): at the end, rotate both towers' embeddings together so that stored ones of
            the input model fit again, which leaves similarities as they are: see ``repair_drift``.
            It reads up to max(4096, 8 D) of the pairs again, not augmented. Where that cannot be
            done, as with ``shard`` on several processes, a warning and the report say why, and the
            model stays as it was trained; so it does with ``lock``, whose tower must not turn.
        max_faults (3): batches whose loss or gradients are not finite that are left out, each
            named in the report, before the run is given up.
        folder (None): keep checkpoints there every ``save_minutes`` (10), at the end, on Ctrl-C and
            on SIGTERM.
        resume (False): continue from the folder's newest valid checkpoint, if there is one. On a
            CPU, with as many threads, the weights end bit for bit as without the interruption.
        force (False): resume even though the settings or the pairs have changed.
        shard (False): split weights, gradients and optimiser state, and the poisoned model's
            weights, over the processes (PyTorch's FSDP2), for models that do not fit. Result and
            checkpoints hold whole weights, on the CPU; the run can be resumed on any number of
            processes. The model that ``on_step`` gets works on all ranks at once only, and an
            error on one rank alone leaves no ``result``. For PAR, its control, CleanCLIP and
            RoCLIP, without ``compile``, ``lock`` and ``views``; one process warns.
    Returns:
        The cleaned copy, one history record per step (loss, contrastive, s_image, s_text, both
        gates, lr), and a report.
    Raises:
        TypeError, ValueError: naming the argument, what was wanted and what came.
        NonFiniteError: more than max_faults times a feature, loss or gradient was not finite, or
            a weight was and no checkpoint is kept; names it.
        RuntimeError: another process uses the folder.
        KeyboardInterrupt: on Ctrl-C, once the step in flight is complete. This and whatever else
            ends the run after its first step has an attribute ``result``, the CleanResult so far.
    Example:
        >>> result = par_clean(model, loader, steps=100)  # doctest: +SKIP
        >>> result.history[-1]["s_image"]  # doctest: +SKIP
    Source: arXiv 2412.00727, objective and settings of its released configuration.
    """
    check_tau(tau)

    def objective(student: nn.Module, settings: Settings) -> PerturbAndRecover:
        return PerturbAndRecover(frozen_copy(student), tau, loss_precision(settings.precision))

    return clean("par", model, loader, objective, {"tau": tau}, **options)


def check_tau(tau: float) -> None:
    """Refuse what is no squared distance of unit rows."""
    if not 0 <= tau <= 4:
        raise ValueError(f"tau must be in [0, 4], the range of a squared distance, got {tau}")
