"""`pybackdoor detect`: rank training pairs by how suspicious they are, and leave out the worst."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..data import Pairs
from ..detect import DetectionResult, detect_samples, outputs, planted
from ..detect.scores import METHODS, method_named
from ..distributed import Ranks
from ..engine import pick_device
from ..files import writable_folder, write_json
from ..manifest import Manifest
from ..models import load
from ..options import REQUIRED, UsageError, option
from ..ubt.gate import LEAST_SWING
from . import inputs
from .configs import ModelOptions, PairOptions, PromptOptions

SCHEMA = "pybackdoor.detection/1"
SHARE = 0.01  # of the pairs left out, when --top does not say


@dataclass(frozen=True)
class DetectConfig(ModelOptions, PairOptions, PromptOptions):
    """Rank training pairs by how suspicious they are, and write those to keep."""

    out: str = option(REQUIRED, "folder for scores, kept pairs and the picture")
    method: str | None = option(
        None,
        "how pairs are scored; see below (default: fragility where captions repeat, as those made "
        "of class names do; else, or with --k or --reference, dao)",
    )
    top: int | None = option(
        None,
        "pairs to leave out, the most suspicious (default: 1 % of them; by fragility as many "
        "as it finds)",
    )
    k: int | None = option(
        None,
        "dao, slof, lid, k_dist: neighbours of an image (default: 16); fragility: pairs to "
        "find (default: as many as stand apart)",
    )
    reference: int | None = option(
        None, "pairs that neighbours are sought among, drawn at random; 0 = all (default: 256)"
    )
    seed: int = option(0, "of the draw")
    overfit: str | None = option(
        None, "gain: the model after some steps on the pairs of the lowest cosines"
    )
    manifest: str | None = option(
        None, "manifest.json of what was planted in --pairs, to judge the scores by; samples whose "
        "images are clean in --pairs are poisoned again",
    )  # fmt: skip
    batch_size: int = option(256, "pairs encoded at a time")
    precision: str = option("fp32", "of the towers", choices=("bf16", "fp32"))


def detect(config: DetectConfig) -> tuple[dict[str, Any], str]:
    """Scores the pairs and writes the files; (result for programs, text for people)."""
    if Ranks().size > 1:
        raise UsageError("detect runs as one process, not under torchrun")
    two = config.method is not None and method_named(config.method).takes == "two models"
    if two != (config.overfit is not None):
        raise UsageError("--overfit and --method gain go together")
    out = writable_folder(config.out)
    kept = f"kept{Path(config.pairs).suffix or '.csv'}"
    inputs.refuse_overwriting(out, ("scores.csv", kept), pairs=config.pairs)
    device, loaded = pick_device(config.device), inputs.read_model(config)
    model = loaded.model.to(device)
    overfit = None if config.overfit is None else load(config.overfit)
    if overfit is not None and overfit.preprocess != loaded.preprocess:
        raise UsageError(
            f"--overfit must take images as --model does, {loaded.preprocess}, got "
            f"{overfit.preprocess}"
        )
    pairs, truth = inputs.read_pairs(config, loaded), None
    if overfit is not None:
        inputs.refuse_other_tokens("overfit", overfit, loaded, pairs.captions)
    top = max(1, round(SHARE * len(pairs))) if config.top is None else config.top
    if not 1 <= top < len(pairs):
        raise UsageError(f"--top must be in 1..{len(pairs) - 1}, of {len(pairs)} pairs, got {top}")
    manifest = None if config.manifest is None else Manifest.load(config.manifest)
    if manifest is not None:
        pairs, truth = planted(pairs, manifest)
    result = detect_samples(
        model, pairs, method=config.method, k=config.k, reference=config.reference,
        seed=config.seed, overfit=None if overfit is None else overfit.model.to(device),
        tokenizer=loaded.tokenizer, truth=truth, mean=loaded.preprocess.mean,
        std=loaded.preprocess.std, batch_size=config.batch_size, precision=config.precision,
        progress=config.progress,
    )  # fmt: skip
    if config.top is None:
        top = result.settings.get("found", top)
    suspects = result.top(min(top, len(result.order)))
    kept = np.sort(result.order[len(suspects) :])
    outputs.write_scores(out / "scores.csv", result, pairs)
    outputs.suspects_picture(out / "suspects.png", result, pairs)
    answer: dict[str, Any] = {
        "schema": SCHEMA, "out": config.out, "method": result.method, "settings": result.settings,
        "pairs": len(result), "scored": len(result.order), "left_out": len(suspects),
        "kept": len(kept), "kept_file": str(_write_kept(out, config, pairs, kept)),
    }  # fmt: skip
    if truth is not None:
        answer |= _judgement(result, truth, len(suspects))
        answer["samples_of_manifest"] = len(manifest.samples)
    write_json(out / "detection.json", answer | {"config": asdict(config)})
    return answer, _text(answer, result, pairs)


def _judgement(result: DetectionResult, truth: np.ndarray, left_out: int) -> dict[str, Any]:
    """How well the scores find what was planted, or why nothing says so."""
    planted, scored = int(truth[result.order].sum()), len(result.order)
    if 0 < planted < scored:
        return {"measures": result.measures(sorted({left_out, planted}))}
    if planted:
        reason = f"all {scored:,} scored pairs are planted: there are no others to tell them from"
    else:
        count = int(truth.sum())
        reason = f"none of the {count:,} planted pairs has a usable image, and so a score"
    return {"not_judged": reason}


def _write_kept(out: Path, config: DetectConfig, pairs: Pairs, rows: np.ndarray) -> Path:
    kind = inputs.pairs_kind(config.pairs)
    if kind == "table":
        source = Path(config.pairs)
        path = out / f"kept{source.suffix or '.csv'}"
        outputs.write_kept_table(
            path, source, pairs.ids[rows], image_key=config.image_key,
            caption_key=config.caption_key,
        )  # fmt: skip
    elif kind == "folder":
        path = out / "kept.csv"
        outputs.write_kept_pairs(path, pairs, rows)
    else:
        path = out / "kept_keys.txt"
        outputs.write_kept_keys(path, pairs, rows)
    return path


def _text(answer: dict[str, Any], result: DetectionResult, pairs: Pairs) -> str:
    settings = result.settings
    takes = METHODS[result.method].takes
    among = ""
    if takes == "neighbours":
        some = 0 < settings["reference"] < answer["scored"]
        where = f"{settings['reference']} at random" if some else "all"
        among = f", {settings['k']} neighbours among {where}"
    elif takes == "views":
        among = f", {settings['found']:,} of the word {settings['word']!r} found suspicious"
    lines = [
        f"{answer['scored']:,} pairs scored by {result.method}{among}; the {answer['left_out']:,} "
        f"most suspicious are left out of {answer['kept_file']}"
    ]
    if result.broken:
        where = "" if pairs.ledger is None else f": see {pairs.ledger.path}"
        lines.append(f"{len(result.broken):,} pairs have no usable image, so no score{where}")
    if takes == "views":
        lines.append(_swing(settings["swing"]))
    if "measures" in answer:
        lines.append(_judged(answer))
    elif "not_judged" in answer:
        lines.append(f"The scores are not judged by the manifest: {answer['not_judged']}.")
    lines += ["", "Look at suspects.png: what do these pictures share that their captions do not?"]
    lines += _not_shown(answer, result, takes)
    return "\n".join(lines)


def _swing(swing: float) -> str:
    told = f"Swing {swing:.2f}: how clearly they are of that word, and lose it once disturbed"
    wanted = f"poison shows {LEAST_SWING:g} and more"
    return f"{told}; {wanted}." if swing >= LEAST_SWING else f"{told}, which is little: {wanted}."


def _judged(answer: dict[str, Any]) -> str:
    found = answer["measures"]
    lines = [
        f"Planted: {found['planted']:,} of the scored pairs (the manifest has "
        f"{answer['samples_of_manifest']:,}); AUROC {found['auroc']:.3f}"
    ]
    lines += [
        f"  among the {at['k']:,} most suspicious: precision {at['precision']:.1%}, "
        f"recall {at['recall']:.1%}"
        for at in found["at"]
    ]
    return "\n".join(lines)


def _not_shown(answer: dict[str, Any], result: DetectionResult, takes: str) -> list[str]:
    lines = [
        "What this does not show:",
        f"- that the {answer['left_out']:,} are poisoned: scores rank, and the pairs of an honest "
        "set have a worst end too;",
        f"- that the other {answer['kept']:,} are not: poison that {result.method} does not see is "
        "still among them;",
    ]
    if takes == "neighbours":
        size = result.settings["reference"] or answer["scored"]
        limit = result.settings["k"] / min(size, answer["scored"])
        lines += [
            "- triggers in captions, or captions that were exchanged: only images are compared;",
            f"- poison in near {limit:.2%} of the pairs (k of the reference) or more: such "
            "pictures are each other's neighbours and look ordinary;",
        ]
    elif takes == "views":
        lines += [
            f"- poison of another word than {result.settings['word']!r}: one word's is found at a "
            "time, where it is the smaller part of that word's pairs;",
            "- triggers in captions, and those that fire however an image is disturbed;",
        ]
    elif result.method == "high_cosine":
        lines.append("- poison that the model has not learned: its pairs do not agree yet;")
    elif takes == "cosines":
        lines.append("- poison that the model has learned: image and caption then agree well;")
    lines.append("- whether a model has a backdoor: that takes a trigger, and `pybackdoor eval`.")
    return lines
