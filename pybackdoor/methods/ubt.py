"""UBT-style token-level local unlearning (experimental): forget what the poisoned pairs taught.

After the ideas of UBT (arXiv 2403.16257, 2409.19526), of which abstracts alone are public; every
stage here is a design of its own, and no reproduction is claimed. The defender holds the suspect
training pairs D.

    A  pool the pairs with the weakest cosine
    B  overfit a copy of the model on the pool
    C  rank all pairs by their gain, or by how fragile their match is, without A and B (the
       default, since it found planted poison where the gain did not); D_sus = top k. Do its images
       belong together more than chance? If not: no backdoor found, the model is returned as it is
    D  keep the most suspicious words of each caption of D_sus: t̂; where asked (``image_share``),
       the most suspicious patches of each image likewise: x̂, else the image as it is
    E  forget t̂ on D_sus, keep R = clean pairs, or D without what is suspicious:
       L = α L_tok(D_sus, t̂) + β L_CLIP(R) + γ (S_φ + S_ψ on R)
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from ..batches import InputRules, check_order
from ..clean import (
    CleanOptions,
    CleanResult,
    clean,
    frozen_copy,
    refuse_unknown,
    trainable_copy,
)
from ..data._keyed import permutation
from ..data.index import hashed
from ..detect import DetectionResult
from ..distributed import Ranks
from ..engine import Settings, loss_precision, pick_device, pick_precision
from ..ubt.evidence import save_picture, save_table
from ..ubt.fragility import SOUGHT
from ..ubt.gate import LEAST_SWING, Gate, check_gate, gate, top
from ..ubt.localise import Localisation, check_share, localise
from ..ubt.ranking import EXCESS, GIVEN, RANKINGS, Ranked, overfit_options, ranked
from ..ubt.reading import ImageRows, Reader
from ..ubt.region import Region, patch_size, suspicious_cells
from ..ubt.stopping import StoppingRule, check_looks
from ..ubt.suspects import RowLoader, Suspects
from ..ubt.unlearn import (
    LocalUnlearning,
    Portions,
    check_weights,
    freeze_text,
    some_pairs,
)
from ..ubt.weak import one_of

EVIDENCE = ("suspects.csv", "suspects.png")
LEFT_OUT = 2  # times k: how many of the most suspicious pairs R does without
_HELD_OUT = 0.2  # share of D_sus that only judges
_PROXY = 1024  # pairs of R that only judge
_STREAM = 0x68656C64
_STEPS, _LR = 500, 1e-6


@dataclass(frozen=True)
class UbtResult(CleanResult):
    """What UBT-style unlearning did and on which evidence.

    Attributes:
        suspects: the pairs that were looked at; those with a broken image are left out.
        scores: [N] of these pairs, higher = more suspicious.
        chosen: [k] rows of D_sus, the most suspicious first.
        gate: whether they belong together.
        found: their words; None where the gate stopped, and ``model`` is then the one given.
        region: their cells; None where the gate stopped, and without ``image_share``.
    """

    suspects: Suspects
    scores: np.ndarray
    chosen: np.ndarray
    gate: Gate
    found: Localisation | None
    region: Region | None = None

    @property
    def backdoor_found(self) -> bool:
        return self.found is not None

    def keep(self) -> np.ndarray:
        """[n] rows of the source, ascending, that are not suspicious: what R is made of.

        Those with a broken image are left out, and of a model without a backdoor none other is.
        """
        if not self.backdoor_found:
            return self.suspects.rows
        of_word = self.report["word"] is not None
        return self.suspects.rows[_rest(self.scores, len(self.chosen), of_word)]

    def save_evidence(self, folder: Path) -> None:
        """Write suspects.csv, and suspects.png with the words and cells to be forgotten in red."""
        about = (self.suspects, self.chosen, self.scores, self.found)
        table, picture = (folder / name for name in EVIDENCE)
        save_table(table, *about)
        save_picture(picture, *about, self.gate, self.region)


def ubt_clean(
    model: nn.Module,
    suspect_loader: Iterable[Any],
    retain_loader: Iterable[Any] | None = None,
    *,
    k: int | None = None,
    scores: np.ndarray | Tensor | DetectionResult | None = None,
    rank: str | None = None,
    weak_share: float | None = None,
    tail: str | None = None,
    overfit_steps: int | None = None,
    overfit_lr: float | None = None,
    overfit_loss: str | None = None,
    gate_sets: int = 999,
    gate_p: float = 0.01,
    gate_excess: float | None = None,
    gate_swing: float | None = None,
    token_share: float = 0.3,
    image_share: float | None = None,
    alpha: float = 1.0,
    beta: float = 2.0,
    gamma: float = 1.0,
    forget: str = "contrastive",
    forget_batch: int = 64,
    batch_size: int | None = None,
    train_text: bool = False,
    check_every: int = 25,
    max_drop: float = 0.03,
    **options: Unpack[CleanOptions],
) -> UbtResult:
    """Find poisoned training pairs, and forget their suspicious words on their images.

    Experimental and UBT-style: after two papers' abstracts, no reproduction. Needs the pairs that
    the model was trained on. A gate that stops proves no absence of a backdoor: weak triggers and
    too large a k are missed. What is forgotten is the trigger's tie to the words; triggered images
    need not be recognised again.

    Args:
        model: as for ``par_clean``, trained on the suspect pairs.
        suspect_loader: D: a PairLoader, Pairs (with ``tokenizer``), or batches of uint8 images as
            for ``par_clean``, which are kept in memory. Read whole, by every rank. Rows of the
            result are in the order it gave.
        retain_loader: R, clean pairs as for ``par_clean``; None: D without D_sus and the more
            suspicious half of its word's other pairs; where no word was found, without the ``2 k``
            most suspicious pairs.
        k: pairs of D_sus; None: by fragility as many as stand apart, else 256.
        scores: [N] suspicion of each pair of D in its order, higher = more, in place of a ranking
            of our own; NaN: never chosen. Of what ``detect_samples`` returns by fragility the swing
            and the number found are taken over, too.
        rank: by "fragility" (default), without stages A and B (``pybackdoor.ubt.fragility``); by
            "gain" in cosine through overfitting; or by the "cosine" after it.
        weak_share, tail: by the latter two, the pool: share of D (default 0.05), and which end of
            the cosines: "low" (default), "high" or "both".
        overfit_steps, overfit_lr, overfit_loss: by the latter two, of stage B; the loss is
            "contrastive" (default) or "cosine"; 200 steps at 1e-5.
        gate_sets, gate_p, gate_excess: random sets, the p-value and the excess in mean pairwise
            cosine that the gate wants (None: by the ranking); see ``pybackdoor.ubt.gate``.
        gate_swing: by fragility, how clearly the most suspicious pairs must be of their word and
            lose it once disturbed, at most 1 (default 0.6).
        token_share: of the words of a caption that are kept, at least one. Words are whole where
            the tokenizer marks them; the portions are encoded as captions of their own, so that no
            features of single tokens are needed.
        image_share: of the patches of an image that are kept, at least one, for image towers that
            see patches (``pybackdoor.ubt.region``): the words are forgotten on these alone, the
            others covered with the mean colour. None: on whole images, which removes far more
            (docs/quality.md): to study, not to clean by. The stopping rule looks at whole ones.
        alpha, beta, gamma: weights of the three terms.
        forget: "contrastive", or "hinge": mean max(0, cosine - kappa).
        forget_batch: pairs of D_sus a step.
        batch_size: of the overfitting, and of R where it is made from D; default the loader's own,
            else 256.
        train_text: also train what the image tower does not use.
        check_every, max_drop: steps between looks at the stopping rule, and the loss of proxy
            accuracy above which less of the way is taken; see ``pybackdoor.ubt.stopping``.
        **options: those of every cleaning method (``par_clean``), but 500 steps, and a learning
            rate that rises from 1e-7 to 1e-6 (``lr``) up to the middle, and no ``repair``:
            the third term keeps the embeddings where they were.
    Returns:
        UbtResult. Its report holds the gate, the words, with ``image_share`` what the kept cells
        gain, the looks of the stopping rule, and ``way``, how much of the way from the model given
        to the run's end was taken: as little as forgets, and not so much that accuracy falls by
        more than ``max_drop`` (0: nothing is forgotten). A warning says where too little is.
    Raises:
        As ``par_clean``; ValueError: fewer than k pairs, captions all equal, too few pairs left
        for R, ``image_share`` with an image tower without patches.
    """
    refuse_unknown("ubt", options, ubt_clean.__kwdefaults__)
    check_order(suspect_loader, "suspect_loader")
    if scores is not None and rank is not None:
        raise ValueError(f"give scores or rank, got both, and rank {rank!r}")
    ranked_by = GIVEN if scores is not None else one_of("rank", rank or "fragility", RANKINGS)
    pool = overfit_options(
        ranked_by, weak_share=weak_share, tail=tail, overfit_steps=overfit_steps,
        overfit_lr=overfit_lr, overfit_loss=overfit_loss,
    )  # fmt: skip
    swings = ranked_by == "fragility" or "swing" in getattr(scores, "settings", {})
    if gate_swing is not None and not swings:
        raise ValueError(f"gate_swing is for a ranking by fragility, got it with {ranked_by!r}")
    least_swing = LEAST_SWING if gate_swing is None else gate_swing
    excess = EXCESS[ranked_by] if gate_excess is None else gate_excess
    check_gate(gate_sets, gate_p, excess, least_swing)
    check_share(token_share)
    if image_share is not None:
        check_share(image_share, "image_share")
        patch_size(model)  # refuses a tower without patches
    check_weights(alpha, beta, gamma, forget)
    check_looks(check_every, max_drop)
    if options.get("steps") is None and options.get("epochs") is None:
        options["steps"] = _STEPS
    if train_text and options.get("lock") == "text":
        raise ValueError('train_text trains what lock="text" keeps as it is: give one of them')
    if options.get("repair"):
        raise ValueError(
            "repair is not for ubt_clean: its third term keeps the embeddings in place"
        )
    options = {"lr_start": _LR / 10, "lr": _LR, **options, "repair": False}  # type: ignore[assignment]
    device, progress = pick_device(options.get("device")), options.get("progress")
    precision = pick_precision(options.get("precision", "auto"), device)
    seed = options.get("seed", 0)
    rules = InputRules.of(
        model, mean=options.get("mean"), std=options.get("std"), tokenizer=options.get("tokenizer")
    )
    if batch_size is None:
        batch_size = getattr(suspect_loader, "batch_size", None) or 256
    began = time.perf_counter()
    suspects, ranks = Suspects.of(suspect_loader, rules, progress), Ranks.start(device)
    suspects.check_alike(ranks, device)
    given = None if scores is None else _given(scores, suspects, k)
    wanted, retain = SOUGHT if k is None else k, retain_loader is None
    usable = len(suspects) if given is None else given.usable
    _check_sizes(usable, wanted if given is None else given.k, retain)
    before = frozen_copy(trainable_copy(model, device))
    reader = Reader(before, rules, precision)
    image = ImageRows(reader, suspects)

    rated = given or ranked(
        ranked_by, before, reader, image, suspects, k, pool=pool, rules=rules, device=device,
        batch_size=batch_size, precision=precision, seed=seed, progress=progress,
    )  # fmt: skip
    # Unlike hardware must not come to unlike answers: the first's.
    (score,) = (t.numpy() for t in _first(ranks, device, torch.from_numpy(rated.scores)))
    sought, swing, word = ranks.from_first([rated.k, rated.swing, rated.word])
    chosen = top(score, sought)
    k = len(chosen)
    judged = gate(
        image, suspects, chosen, sets=gate_sets, alpha=gate_p, excess=excess, seed=seed,
        swing=swing, least_swing=least_swing,
    )  # fmt: skip
    judged = replace(judged, fires=ranks.from_first(judged.fires))
    own = {
        "k": k, "ranked_by": ranked_by, **pool, "token_share": token_share,
        "image_share": image_share,
        "alpha": alpha, "beta": beta, "gamma": gamma, "forget": forget,
        "forget_batch": forget_batch, "train_text": train_text, "check_every": check_every,
        "max_drop": max_drop, "suspects": suspects.identity, "suspicious": hashed(chosen.tolist()),
    }  # fmt: skip
    about = {
        "experimental": True, "gate": asdict(judged), "suspect_pairs": len(suspects), "word": word,
    }  # fmt: skip
    if not judged.fires:
        report = {
            "method": "ubt", "verdict": "no backdoor found", **about, "settings": own,
            "way": None, "steps_done": 0, "pairs_seen": 0, "seconds": 0.0,
            "seconds_searching": round(time.perf_counter() - began, 3),
        }  # fmt: skip
        return UbtResult(model, [], report, suspects, score, chosen, judged, None)

    _check_sizes(rated.usable, k, retain)  # more may have been found than sought
    found = localise(reader, suspects, chosen, share=token_share, image=image.at(chosen))
    region = None
    if image_share is not None:
        region = suspicious_cells(
            before, rules, suspects, chosen, share=image_share, progress=progress
        )
    learnt, held_out = _split(k, seed)
    keep = retain_loader
    if keep is None:
        rest = _rest(score, k, word is not None)
        rest = rest[permutation(seed ^ _STREAM, 1, len(rest))]
        few = min(_PROXY, len(rest) // 5)
        proxy = suspects.pixels(rest[:few]), suspects.tokens(rest[:few])
        keep = RowLoader(suspects, rest[few:], batch_size=batch_size, seed=seed)
    else:
        proxy = _first(ranks, device, *some_pairs(keep, rules, _PROXY, seed))
    rule = StoppingRule(
        before, rules, suspects, chosen[held_out], proxy, every=check_every, max_drop=max_drop,
        precision=precision,
    )  # fmt: skip
    rows = chosen[learnt]
    pixels = suspects.pixels(rows)
    portions = Portions(
        pixels if region is None else region.only(pixels, learnt), found.portions[learnt],
        torch.from_numpy(suspects.ids[rows]),
    )  # fmt: skip

    def objective(student: nn.Module, settings: Settings) -> LocalUnlearning:
        if not train_text:
            freeze_text(student, proxy[0], rules)
        return LocalUnlearning(
            before, portions, found.mentions, sample=forget_batch, alpha=alpha, beta=beta,
            gamma=gamma, forget=forget, margin=rule.kappa, stop=rule,
            precision=loss_precision(settings.precision), seed=settings.seed,
        )  # fmt: skip

    searching = time.perf_counter() - began
    result = clean("ubt", model, keep, objective, own, **options)
    try:
        way = rule.settle(result.model, before, ranks)
    except BaseException as stop:
        stop.result = result  # type: ignore[attr-defined]
        raise
    if remark := rule.remark():
        warnings.warn(remark, UserWarning, stacklevel=2)
    report = result.report | about | {
        "verdict": "suspicious pairs found",
        "whole_words": found.whole,
        "words": [asdict(token) | {"enriched": token.enriched} for token in found.tokens],
        "region": None if region is None else region.summary(),
        "kappa": rule.kappa, "stopped": rule.reason, "checks": rule.checks,
        "way": way, "ways": rule.ways, "seconds_searching": round(searching, 3),
    }  # fmt: skip
    return UbtResult(
        result.model, result.history, report, suspects, score, chosen, judged, found, region
    )


def _first(ranks: Ranks, device: torch.device, *tensors: Tensor) -> tuple[Tensor, ...]:
    """The first rank's tensors on every rank, on the CPU."""
    _, each = ranks.tensors_from_first({str(i): t for i, t in enumerate(tensors)}, device)
    return tuple(tensor.cpu() for _, tensor in each)


def _check_sizes(usable: int, k: int, retain: bool) -> None:
    if isinstance(k, bool) or not isinstance(k, int | np.integer):
        raise TypeError(f"k must be an integer, got {k!r}")
    if not 5 <= k <= usable:
        raise ValueError(
            f"k must be in [5, {usable}], the suspect pairs that can be used, got {k}; it is "
            f"{SOUGHT} where it is not given"
        )
    wanted = LEFT_OUT * k + 10
    if retain and usable < wanted:
        raise ValueError(
            f"without retain_loader, suspect_loader must hold at least {wanted} pairs, the {k} of "
            f"D_sus, as many again, and some to keep; got {usable}: lower k, or give clean pairs"
        )


def _given(
    scores: np.ndarray | Tensor | DetectionResult, suspects: Suspects, k: int | None
) -> Ranked:
    """The user's scores, of the pairs that can be used."""
    told = scores.settings if isinstance(scores, DetectionResult) else {}
    plain = scores.scores if isinstance(scores, DetectionResult) else scores
    array = np.asarray(plain.cpu() if isinstance(plain, Tensor) else plain)
    if array.shape != (suspects.total,) or array.dtype.kind not in "fiu":
        raise ValueError(
            f"scores must be [{suspects.total}] numbers, one per suspect pair, got {array.dtype} "
            f"of shape {list(array.shape)}"
        )
    number = told.get("found", SOUGHT) if k is None else k
    own = array[suspects.rows].astype(np.float64)
    return Ranked(own, number, told.get("swing"), told.get("word"))


def _rest(score: np.ndarray, k: int, of_word: bool) -> np.ndarray:
    """[n] rows, ascending, without the most suspicious ones and those without a score.

    Where one word's pairs alone are told apart, half of those that were not found go with the k
    that were: poison is the smaller part of a word's pairs, fewer of it may be found than there is,
    and what stays in R is learned anew. Else 2 k go, or fewer, so that half of the others stay.
    """
    usable = np.flatnonzero(~np.isnan(score))
    apart = int((score[usable] > score[usable].min()).sum())
    half = k + max(0, apart - k) // 2
    out = half if of_word else min(LEFT_OUT * k, half)
    return np.sort(usable[np.argsort(-score[usable], kind="stable")[out:]])


def _split(k: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Places in D_sus that are forgotten, and those that only judge."""
    order = permutation(seed ^ _STREAM, 0, k)
    few = max(1, round(_HELD_OUT * k))
    return np.sort(order[few:]), np.sort(order[:few])
