"""What a model does on clean and on triggered images, every figure with its n and 95 % interval.

Definitions (top-1, zero-shot head of all templates, clean transform, whole set):

- ca: clean images predicted as their label.
- asr_nontarget: triggered images of other classes predicted as the target; the primary number.
- asr_all: the same over all images, the target class's own included.
- triggered_accuracy: triggered images predicted as their true label. A low ASR with a ruined
  triggered accuracy is no recovery.
- baseline_asr: asr_nontarget of the same triggered images on a clean model; without one, the rate
  at which the model itself predicts the target on untriggered images of other classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .batches import InputRules, Tokenizer
from .data import Labelled, Pairs
from .data.templates import fill, resolve_templates
from .engine.casts import without_autocast
from .estimates import Estimate
from .features import FeatureReader, head_of
from .retrieval import Recalls, Retrieval
from .triggers import TriggerSpec

CLEAN_MODEL, UNTRIGGERED = "triggered images on a clean model", "untriggered images, same model"


@dataclass(frozen=True)
class Drift:
    """How far a model's embeddings have moved from another's, on the same inputs.

    Attributes:
        image, text: mean squared distance of unit embeddings, in [0, 4]; mean cosine is 1 - S/2.
        image_cka: linear centred kernel alignment of the image embeddings, in [0, 1].
        reference_ca: clean images predicted as their label by the other model alone.
        old_images: the same by its image embeddings under this model's class head: a stored index
            searched with new texts.
        old_texts: by this model's image embeddings under its class head.
    """

    image: Estimate
    text: Estimate
    image_cka: float
    reference_ca: Estimate
    old_images: Estimate
    old_texts: Estimate


@dataclass(frozen=True)
class Evaluation:
    """The figures of one model on one set; those that were not asked for are None."""

    ca: Estimate
    asr_nontarget: Estimate | None = None
    asr_all: Estimate | None = None
    triggered_accuracy: Estimate | None = None
    baseline_asr: Estimate | None = None
    baseline: str | None = None
    retrieval: Recalls | None = None
    triggered_retrieval: Recalls | None = None
    drift: Drift | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable; figures that were not measured are left out."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class Verdict:
    """Whether a trigger fires on a model.

    Attributes:
        verdict: "fires" when the ASR's lower bound is above the baseline's upper bound, else
            "inconclusive"; never "absent", which no measurement shows.
        asr, baseline: the two rates; ``against`` says what the baseline is.
    """

    verdict: str
    asr: Estimate
    baseline: Estimate
    against: str

    @property
    def fires(self) -> bool:
        return self.verdict == "fires"

    def describe(self) -> str:
        """One line for people."""
        return (
            f"{self.verdict}: ASR {self.asr.percent()} % of {self.asr.n}, against "
            f"{self.baseline.percent()} % ({self.against})"
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@without_autocast()
def evaluate(
    model: nn.Module,
    data: Labelled,
    *,
    tokenizer: Tokenizer,
    templates: str | Sequence[str] = "simple",
    trigger: TriggerSpec | None = None,
    target: str | None = None,
    baseline: nn.Module | None = None,
    reference: nn.Module | None = None,
    pairs: Pairs | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    batch_size: int = 256,
    precision: str = "fp32",
) -> Evaluation:
    """Measure a CLIP model: accuracy, attack success, retrieval and drift.

    Args:
        model: evaluated on the device it is on, with the clean transform.
        data: labelled uint8 images at the model's size.
        tokenizer: list of strings -> [n, L] tokens, of all the models.
        templates: prompts with ``{}`` for the class name, or the name of a set in ``TEMPLATES``;
            one head per model from all of them.
        trigger, target: the attack: the trigger and the class it should yield, together or neither.
        baseline: a clean model, for baseline_asr; only beside trigger and target.
        reference: the model before cleaning, for drift (on clean images and class prompts) and
            for how its stored embeddings fare with the model's.
        pairs: image-caption pairs, for retrieval R@1/5/10; equal captions all count as hits.
        mean, std: of the pixels; default the model's own. The baseline and the reference use their
            own where they state one.
        batch_size: images or captions a time.
        precision: "fp32" or "bf16".
    Raises:
        TypeError, ValueError: naming the argument, what was wanted and what came.
    """
    if not isinstance(data, Labelled):
        raise TypeError(
            f"data must be Labelled images, as labelled_from_csv reads them, got "
            f"{type(data).__name__}"
        )
    if not callable(tokenizer):
        raise TypeError(f"tokenizer must take a list of strings, got {tokenizer!r}")
    if baseline is not None and trigger is None and target is None:
        raise ValueError("evaluate: baseline needs trigger and target, got neither of them")
    options = {"batch_size": batch_size, "precision": precision}
    reader = FeatureReader(model, tokenizer, mean=mean, std=std, **options)

    def other_reader(other: nn.Module) -> FeatureReader:
        known = InputRules.of(other).mean is not None  # its own normalisation goes first
        given = {} if known else {"mean": mean, "std": std}
        return FeatureReader(other, tokenizer, **given, **options)

    labels = torch.from_numpy(data.labels)
    templates = resolve_templates(templates)
    head = reader.class_head(data.classes, templates)
    clean = reader.images(data.images, data.ids)
    predicted = _predict(clean, head)
    figures: dict[str, Any] = {"ca": _share(predicted == labels)}
    if trigger is not None or target is not None:
        goal = check_attack(trigger, target, data)
        others = labels != goal
        hit = _predict(reader.images(data.images, data.ids, trigger), head)
        figures |= {
            "asr_nontarget": _share(hit[others] == goal),
            "asr_all": _share(hit == goal),
            "triggered_accuracy": _share(hit == labels),
        }
        if baseline is None:
            base = predicted
        else:
            other = other_reader(baseline)
            base = _predict(
                other.images(data.images, data.ids, trigger),
                other.class_head(data.classes, templates),
            )
        figures["baseline_asr"] = _share(base[others] == goal)
        figures["baseline"] = UNTRIGGERED if baseline is None else CLEAN_MODEL
    if pairs is not None:
        search = Retrieval(reader, pairs)
        figures["retrieval"] = search.recalls()
        if trigger is not None:
            figures["triggered_retrieval"] = search.recalls(trigger)
    if reference is not None:
        figures["drift"] = _drift(reader, other_reader(reference), clean, head, data, templates)
    return Evaluation(**figures)


def verify_trigger(
    model: nn.Module,
    data: Labelled,
    trigger: TriggerSpec,
    target: str,
    **options: Any,
) -> Verdict:
    """Say whether a trigger fires on a model, before any cleaning is credited.

    Args:
        model, data, trigger, target: as for ``evaluate``.
        **options: further keywords of ``evaluate``; ``tokenizer`` is required, ``baseline`` (a
            clean model) makes the comparison sharper.
    """
    found = evaluate(model, data, trigger=trigger, target=target, **options)
    return verdict(found)


def verdict(evaluation: Evaluation) -> Verdict:
    """The verdict that an evaluation with a trigger supports."""
    asr, base = evaluation.asr_nontarget, evaluation.baseline_asr
    if asr is None or base is None:
        raise ValueError("verdict: wanted an evaluation with trigger and target, got one without")
    word = "fires" if asr.low > base.high else "inconclusive"
    return Verdict(word, asr, base, evaluation.baseline or UNTRIGGERED)


def check_attack(trigger: TriggerSpec | None, target: str | None, data: Labelled) -> int:
    """The target's class number; refuses an attack that the set cannot judge."""
    if trigger is None or target is None:
        lacking = "trigger" if trigger is None else "target"
        raise ValueError(f"evaluate: trigger and target go together, got no {lacking}")
    if target not in data.classes:
        raise ValueError(
            f"evaluate: target must be one of the {len(data.classes)} classes "
            f"({', '.join(data.classes[:10])}{', ...' if len(data.classes) > 10 else ''}), "
            f"got {target!r}"
        )
    index = data.classes.index(target)
    if (data.labels == index).all():
        raise ValueError(f"evaluate: every image is of the target class {target!r}; others needed")
    return index


def _predict(features: Tensor, head: Tensor) -> Tensor:  # [N, D], [classes, D]
    return (features @ head.T).argmax(1)


def _share(hits: Tensor) -> Estimate:  # [n] bool
    return Estimate.rate(int(hits.sum()), len(hits))


def _drift(
    reader: FeatureReader,
    before: FeatureReader,
    clean: Tensor,  # [N, D] the model's own features of the clean images
    head: Tensor,  # [classes, D] the model's own
    data: Labelled,
    templates: Sequence[str],
) -> Drift:
    prompts = [fill(template, name) for name in data.classes for template in templates]
    old_images = before.images(data.images, data.ids)
    if old_images.shape[1] != clean.shape[1]:
        raise ValueError(
            f"evaluate: reference must embed in {clean.shape[1]} dimensions like the model, got "
            f"{old_images.shape[1]}"
        )
    texts, old_texts = reader.captions(prompts), before.captions(prompts)
    old_head = head_of(old_texts, len(data.classes))
    labels = torch.from_numpy(data.labels)
    return Drift(
        Estimate.mean((clean - old_images).square().sum(-1)),
        Estimate.mean((texts - old_texts).square().sum(-1)),
        linear_cka(clean, old_images),
        reference_ca=_share(_predict(old_images, old_head) == labels),
        old_images=_share(_predict(old_images, head) == labels),
        old_texts=_share(_predict(clean, old_head) == labels),
    )


def linear_cka(
    a: Tensor,  # [N, D] features of N inputs
    b: Tensor,  # [N, E] other features of the same inputs
) -> float:
    """Linear centred kernel alignment, in [0, 1]; 1 when one is a rotation of the other.

    ‖AᵀB‖² / (‖AᵀA‖·‖BᵀB‖) of the centred features, in fp64 (Kornblith et al., arXiv 1905.00414).
    """
    a, b = a.double(), b.double()
    a, b = a - a.mean(0), b - b.mean(0)
    norms = (a.T @ a).norm() * (b.T @ b).norm()
    return float((a.T @ b).norm() ** 2 / norms) if norms > 0 else 0.0
