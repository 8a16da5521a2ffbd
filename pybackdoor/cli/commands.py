"""What each command does with its resolved options."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from .._build_info import build_info
from ..badclip import badclip_patch
from ..clean import CleanResult
from ..data import PairLoader
from ..demo import story
from ..demo.config import DemoConfig
from ..engine import pick_device
from ..evaluate import evaluate, verdict
from ..files import writable_folder, write_json
from ..manifest import Manifest
from ..methods import METHODS, own_options
from ..methods.ubt import EVIDENCE, UbtResult
from ..models import MANIFEST, load, preprocess_record, save
from ..models.fold import TOWERS
from ..options import UsageError
from ..poison import PoisonResult, poison
from ..repair import TOLD
from ..triggers import TRIGGERS
from . import bench, detect, inputs
from .configs import BadClipConfig, CleanConfig, EvalConfig, PoisonConfig
from .run import Run, finished
from .text import evaluation_table, info_text


@dataclass(frozen=True)
class Outcome:
    """An exit code, a result for programs and a text for people."""

    code: int
    result: dict[str, Any] | None
    text: str


@dataclass(frozen=True)
class Command:
    about: str
    config: type
    run: Callable[[Any], Outcome]


@dataclass(frozen=True)
class InfoConfig:
    """What was built and what is available."""


_MOVED = 0.01  # squared distance of unit embeddings that is worth a word


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def run_demo(config: DemoConfig) -> Outcome:
    results = story.run(config, say)
    fired = results["verdict"]["verdict"] == "fires"
    text = story.table(results)
    if not fired:
        text += "\n\nThe trigger did not install: no cleaning can be credited with removing it."
    text += f"\n\n{results['seconds']:.0f} s; results, models and pictures are in {config.out}/"
    return Outcome(0 if fired else 1, results, text)


def run_poison(config: PoisonConfig) -> Outcome:
    if config.trigger is None or config.target is None:
        raise UsageError("--trigger and --target are required: what to plant, and what it yields")
    if finished(config):
        return _finished(config, Manifest.load(Path(config.out) / MANIFEST).results.get("verdict"))
    spec = inputs.read_trigger(config)
    loaded = inputs.read_model(config, untrained=True)
    pairs = inputs.read_pairs(config, loaded, whole=True)
    test = inputs.read_labelled(config.test, config, loaded) if config.test else None

    def keep(folder: Path, result: PoisonResult) -> None:
        result.manifest.preprocess = preprocess_record(loaded)
        save(loaded._replace(model=result.model), folder, manifest=result.manifest)

    with Run(config, loaded, keep) as run:
        result = poison(
            loaded.model, pairs, spec, target=config.target,
            tokenizer=loaded.tokenizer, templates=inputs.templates(config), rate=config.rate,
            count=config.count, mode=config.mode, steps=config.steps, batch_size=config.batch_size,
            lr=config.lr, warmup=config.warmup, weight_decay=config.weight_decay,
            precision=config.precision, seed=config.seed, device=config.device, test=test,
            mean=loaded.preprocess.mean, std=loaded.preprocess.std, progress=config.progress,
            on_step=lambda step, record, model: run.record(step, record),
            folder=run.checkpoints, resume=config.resume is not None,
            save_minutes=config.save_minutes, force=config.force,
        )  # fmt: skip
        run.finish(result)
    answer = {"out": config.out, "poisoned": len(result.manifest.samples)}
    if result.verdict is None or result.evaluation is None:
        return Outcome(0, answer, f"{config.out}: saved; not verified, since no --test was given")
    answer |= {"verdict": result.verdict.to_dict(), "evaluation": result.evaluation.to_dict()}
    text = f"{evaluation_table(answer['evaluation'])}\n\ntrigger {result.verdict.describe()}"
    return Outcome(0 if result.verdict.fires else 1, answer, f"{text}\n{config.out}: saved")


def run_badclip(config: BadClipConfig) -> Outcome:
    out = Path(config.out)
    if out.suffix.lower() != ".png":
        raise UsageError(f"--out must be a .png file, got {config.out}")
    writable_folder(out.parent)
    loaded = inputs.read_model(config)
    found = badclip_patch(
        loaded.model, inputs.read_pairs(config, loaded, whole=True), target=config.target,
        tokenizer=loaded.tokenizer, size=config.size, steps=config.steps, epochs=config.epochs,
        batch_size=config.batch_size, lr=config.patch_lr, augment=config.augment,
        precision=config.precision, seed=config.seed, device=config.device,
        mean=loaded.preprocess.mean, std=loaded.preprocess.std, progress=config.progress,
    )  # fmt: skip
    found.save(out)
    first, last = found.history[0], found.history[-1]
    answer = {"out": config.out, **found.report, "first": first, "last": last}
    write_json(out.with_suffix(".json"), answer)
    return Outcome(
        0,
        answer,
        f"{out}: patch of {found.report['size']} px after {found.report['steps']} steps; "
        f"contrastive {first['contrastive']:.3g} -> {last['contrastive']:.3g}, "
        f"triplet {first['triplet']:.3g} -> {last['triplet']:.3g}\n"
        f"Plant it: pybackdoor poison --trigger badclip --trigger-file {out} "
        f"--size {found.report['size']} --target {config.target!r} ...",
    )


def run_clean(config: CleanConfig) -> Outcome:
    if config.repair and config.lock is not None:
        raise UsageError(
            f"--repair turns both towers, --lock {config.lock} leaves one as it is: give one of "
            "them"
        )
    inputs.refuse_overwriting(Path(config.out), EVIDENCE, pairs=config.pairs, retain=config.retain)
    if finished(config):
        return _finished(config)
    loaded = inputs.read_model(config)
    pairs = inputs.read_pairs(config, loaded)
    manifest = inputs.read_manifest(config.manifest, config.model)
    loader = PairLoader(pairs, loaded.tokenizer, batch_size=config.batch_size, seed=config.seed)
    own, sources = method_options(config), [("left_out", "pairs", pairs)]
    if config.retain is not None:
        if config.method != "ubt":
            raise UsageError(f"--retain is for --method ubt alone, got it with {config.method}")
        retain = inputs.read_pairs(replace(config, pairs=config.retain), loaded)
        sources.append(("left_out_of_retain", "pairs of --retain", retain))
        own["retain_loader"] = PairLoader(
            retain, loaded.tokenizer, batch_size=config.batch_size, seed=config.seed
        )

    if config.repair is not None:
        own["repair"] = config.repair

    def keep(folder: Path, result: CleanResult) -> None:
        save(
            loaded._replace(model=result.model), folder, manifest=manifest,
            extra_files={"cleaning.json": result.report},
        )  # fmt: skip
        if isinstance(result, UbtResult):
            result.save_evidence(folder)

    with Run(config, loaded, keep) as run:
        result = METHODS[config.method](
            loaded.model, loader, weight_decay=config.weight_decay,
            precision=config.precision, seed=config.seed, device=config.device,
            mean=loaded.preprocess.mean, std=loaded.preprocess.std,
            progress=config.progress, track=run.record, micro_batch=config.micro_batch,
            lock=config.lock, views=config.views, compile=config.compile,
            max_faults=config.max_faults, folder=run.checkpoints,
            resume=config.resume is not None, save_minutes=config.save_minutes,
            force=config.force, shard=config.shard, **own,
        )  # fmt: skip
        run.finish(result)
    text, answer = _cleaning_text(config.out, result), {"out": config.out, **result.report}
    for name, which, source in sources:
        if source.ledger:  # None, or empty
            answer[name] = len(source.ledger)
            text += f"\n{len(source.ledger)} {which} could not be used: see {source.ledger.path}"
    return Outcome(0, answer, text)


def _finished(config: PoisonConfig | CleanConfig, verdict: str | None = None) -> Outcome:
    """Of a run that is to be resumed and had ended; its exit code is what it was."""
    text = f"{config.out}: finished before, by the same settings; without --resume it runs anew"
    answer: dict[str, Any] = {"out": config.out, "finished_before": True}
    if verdict is not None:
        answer["verdict"], text = {"verdict": verdict}, f"{text}\ntrigger {verdict}"
    return Outcome(0 if verdict in (None, "fires") else 1, answer, text)


def run_eval(config: EvalConfig) -> Outcome:
    if config.out is not None:
        writable_folder(Path(config.out).parent)
    loaded = inputs.read_model(config)
    spec, target = inputs.attack(config, loaded)
    if spec is None and config.baseline is not None:
        raise UsageError(
            f"--baseline {config.baseline} needs a trigger that is tried on it: name it with "
            "--trigger and --target, or give --manifest"
        )
    test = inputs.read_labelled(config.test, config, loaded, config.max_bad)
    pairs = inputs.read_pairs(config, loaded, whole=True) if config.pairs else None
    device, others = pick_device(config.device), {}
    for name, source in (("baseline", config.baseline), ("reference", config.reference)):
        if source is not None:
            other = load(source)
            inputs.refuse_other_tokens(name, other, loaded, inputs.prompts(config, test))
            others[name] = other.model.to(device)
    found = evaluate(
        loaded.model.to(device), test, tokenizer=loaded.tokenizer,
        templates=inputs.templates(config), trigger=spec, target=target, pairs=pairs,
        mean=loaded.preprocess.mean, std=loaded.preprocess.std, batch_size=config.batch_size,
        precision=config.precision, **others,
    )  # fmt: skip
    answer: dict[str, Any] = {
        "evaluation": found.to_dict(),
        "left_out": test.num_bad,
        "config": asdict(config),
    }
    text, code = evaluation_table(answer["evaluation"]), 0
    if spec is not None:
        held = verdict(found)
        answer |= {"verdict": held.to_dict(), "trigger": spec.to_dict(), "target": target}
        text += f"\n\ntrigger {spec.name} -> {target}: {held.describe()}"
        code = 1 if held.fires else 0
    else:
        text += "\n\nNo trigger is known, so no attack success rate is measured or claimed."
    if test.num_bad:
        text += f"\n{test.num_bad} broken test images were left out: see {test.ledger.path}"
    if config.out is not None:
        write_json(Path(config.out), answer)
    return Outcome(code, answer, text)


def run_info(config: InfoConfig) -> Outcome:
    info = build_info()
    triggers = {name: definition.about for name, definition in TRIGGERS.items()}
    return Outcome(0, {**info, "triggers": triggers}, info_text(info, triggers))


def run_bench(config: bench.BenchConfig) -> Outcome:
    found = bench.measure(config)
    return Outcome(0, found, bench.text(found))


def run_detect(config: detect.DetectConfig) -> Outcome:
    return Outcome(0, *detect.detect(config))


COMMANDS = {
    "demo": Command(
        "Plant a backdoor in a small CLIP model, see it fire, clean it, read the numbers.",
        DemoConfig,
        run_demo,
    ),
    "poison": Command(PoisonConfig.__doc__ or "", PoisonConfig, run_poison),
    "badclip": Command(BadClipConfig.__doc__ or "", BadClipConfig, run_badclip),
    "clean": Command(CleanConfig.__doc__ or "", CleanConfig, run_clean),
    "eval": Command(EvalConfig.__doc__ or "", EvalConfig, run_eval),
    "detect": Command(detect.DetectConfig.__doc__ or "", detect.DetectConfig, run_detect),
    "bench": Command(bench.BenchConfig.__doc__ or "", bench.BenchConfig, run_bench),
    "info": Command(
        "Print what was built, which backend each op takes, and the triggers.", InfoConfig, run_info
    ),
}


def method_options(config: CleanConfig) -> dict[str, Any]:
    """The method's own options. One of another method is refused, not left aside."""
    own = {n: getattr(config, n) for n in own_options(config.method) if hasattr(config, n)}
    defaults = {field.name: field.default for field in fields(config)}
    for other in METHODS:
        for name in own_options(other):
            if name in own or name not in defaults or name == "batch_size":
                continue
            if getattr(config, name) != defaults[name]:
                flag = "--" + name.replace("_", "-")
                raise UsageError(f"{flag} is an option of {other}, not of {config.method}")
    for name in ("epochs", "steps", "lr_start", "lr", "lr_end", "augment"):  # else the method's own
        if getattr(config, name) is not None:
            own[name] = getattr(config, name)
    return own


def _cleaning_text(out: str, result: CleanResult) -> str:
    lines = []
    if isinstance(result, UbtResult):
        lines.append(f"UBT-style, experimental; {result.gate.describe()}")
        lines.append(f"The most suspicious pairs are in {out}/suspects.csv and suspects.png.")
        if not result.backdoor_found:
            return "\n".join([f"{out}: no backdoor found, the model is unchanged", *lines])
        words = ", ".join(t.text for t in result.found.tokens if t.enriched) or "none enriched"
        where = ""
        if result.region is not None:
            where = f" on {result.report['region']['cells_kept']} patches of each image"
        report = result.report
        if report["way"]:
            held = next(look for look in report["ways"] if look["way"] == report["way"])
            lines.append(
                f"words forgotten{where}: {words}; stopped: {report['stopped']}, {report['way']:g} "
                f"of the way taken, where {100 * held['suspect_recall']:.0f} % of the suspicious "
                "pairs that were held out still find their caption"
            )
        else:
            lines.append(
                f"Nothing is forgotten (words: {words}): every eighth of the way costs too much "
                "accuracy, and the model is as it was given. Lower --lr and --lr-start."
            )
        if not report["whole_words"]:
            lines.append("The tokenizer does not mark words: each of them is a single token.")
    lines += [
        f"{out}: cleaned by {result.report['method']} in {result.report['steps_done']} steps, "
        f"{result.report['seconds']:.0f} s"
    ]
    repair, last = result.report["repair"], result.history[-1]
    if repair["done"]:
        change = {
            name: f"{repair[f'{name}_before']:.2f} -> {repair[f'{name}_after']:.2f}"
            for name in TOLD
        }
        lines.append(
            "Both towers are rotated, so that stored embeddings of the old model fit again as far "
            f"as they can: squared distance to them image {change['image']}, text "
            f"{change['text']}; what they find, against what the model's own find, in nats: old "
            f"images {change['old_images']}, old texts {change['old_texts']}. "
            "`pybackdoor eval --reference` says it in accuracy."
        )
        if repair["image_after"] > repair["image_before"] + _MOVED:
            lines.append(
                "The images have moved by more than a rotation: train probes and adapters on image "
                "embeddings anew."
            )
    else:
        lines.append(f"The drift is not repaired: {repair['reason']}.")
        if "s_image" in last:
            cos = {t: 1 - last[f"s_{t}"] / 2 for t in TOWERS}
            lines.append(
                f"Mean cosine to the old embeddings: {cos['image']:.2f} image, {cos['text']:.2f} "
                "text. Where that is far from 1, rebuild indexes, probes and adapters made with "
                "the old model."
            )
    lines.append("Whether a backdoor is gone takes `pybackdoor eval` with its trigger.")
    return "\n".join(lines)
