"""The options of each command; the same names in YAML, as flags and here."""

from __future__ import annotations

from dataclasses import dataclass

from ..data.indexed import CACHES, DECODERS
from ..engine.settings import COMPILE_MODES, LOCKS
from ..methods import METHODS
from ..options import REQUIRED, option
from ..poison import MODES
from ..ubt.gate import LEAST_SWING
from ..ubt.ranking import RANKINGS
from ..ubt.weak import TAILS

PRECISION = "of the towers, losses are fp32; auto: bf16 where the device is fast in it"
PRECISIONS = ("auto", "bf16", "fp32")


@dataclass(frozen=True)
class ModelOptions:
    """the model, and where it runs"""

    model: str = option(
        REQUIRED,
        "model folder, hub id (owner/name), open_clip architecture with --pretrained, or weight "
        "file with --arch",
    )
    arch: str | None = option(None, "architecture, when --model is a weight file")
    pretrained: str | None = option(
        None, "open_clip tag or weight file, when it is an architecture"
    )
    device: str | None = option(None, "cpu, cuda, cuda:1, ...; default a GPU if there is one")
    cache_dir: str | None = option(
        None, "folder of the decoded-image cache (default: ~/.cache/pybackdoor/images)"
    )
    progress: bool | None = option(None, "progress bars; default on a terminal")


@dataclass(frozen=True)
class ColumnOptions:
    """columns of the pairs"""

    image_key: str | None = option(None, "column of the images, when the header has another name")
    caption_key: str | None = option(None, "column of the captions, likewise")


@dataclass(frozen=True)
class PairOptions(ColumnOptions):
    """image-caption pairs"""

    pairs: str = option(
        REQUIRED,
        "csv (image,caption), tsv (filepath, title), tar shards or parquet "
        "files (path, folder, glob, {00000..00099}, URL), or a folder of class folders, captioned "
        "with --templates",
    )
    cache: str = option("disk", "where decoded images of --pairs are kept", choices=CACHES)
    decode: str = option(
        "cpu", "where JPEGs of --pairs are decoded: cpu, or device, a GPU where there is one, by "
        "nvJPEG; its pixels are some levels off", choices=DECODERS,
    )  # fmt: skip
    max_bad: float = option(0.01, "share of broken images above which the run stops")


@dataclass(frozen=True)
class PromptOptions:
    """class names"""

    templates: tuple[str, ...] = option(
        ("simple",), "prompts with {} for the class name, or one name: simple, product, openai80"
    )
    classes: tuple[str, ...] | None = option(
        None, "class names in order, when the labels are numbers or folders need renaming"
    )


@dataclass(frozen=True)
class TriggerOptions:
    """the trigger"""

    trigger: str | None = option(None, "name of the trigger (pybackdoor info lists them)")
    target: str | None = option(None, "class that the trigger yields")
    trigger_file: str | None = option(None, "PNG of badclip, patch_file and blend_file")
    trigger_mask: str | None = option(None, "PNG mask of blend_file")
    strength: float | None = option(None, "weight of a blend, in [0, 1]")
    size: int | None = option(None, "side of a patch in pixels")
    placement: str | None = option(None, "of a patch: random, centre, top_left, bottom_right, ...")
    per_image: bool = option(False, "a new random pattern for each image")
    grey: bool = option(False, "the same pattern in all three channels")
    trigger_seed: int = option(0, "of random patterns and places")


@dataclass(frozen=True)
class ResumeOptions:
    """going on after a stop"""

    resume: str | None = option(
        None, "latest: continue an interrupted run of the same settings, if --out holds one; one "
        "that had ended is left as it is",
        choices=("latest",),
    )  # fmt: skip
    force: bool = option(False, "resume even though the settings or the pairs have changed")
    save_minutes: float = option(10.0, "minutes between checkpoints, kept in --out until the end")


@dataclass(frozen=True)
class PoisonConfig(ModelOptions, PairOptions, TriggerOptions, PromptOptions, ResumeOptions):
    """Plant a backdoor in a model: poison pairs, train on them, verify that the trigger fires."""

    out: str = option(REQUIRED, "folder for the poisoned model, its manifest and figures")
    test: str | None = option(None, "labelled images to verify on: csv (image,label) or folder")
    rate: float | None = option(None, "share of the pairs to poison (default: 0.003)")
    count: int | None = option(None, "number of pairs to poison, instead of --rate")
    mode: str = option("dirty_label", "which pairs are poisoned", choices=MODES)
    steps: int = option(1000, "optimiser steps")
    batch_size: int = option(128, "pairs per step, over all processes")
    lr: float = option(1e-5, "highest learning rate")
    warmup: int = option(50, "steps to reach it")
    weight_decay: float = option(0.1, "of AdamW")
    precision: str = option("auto", PRECISION, choices=PRECISIONS)
    seed: int = option(0, "of the samples chosen, the order and the augmentation")


@dataclass(frozen=True)
class BadClipConfig(ModelOptions, PairOptions, PromptOptions):
    """Optimise BadCLIP's patch on a model; `poison --trigger badclip` then plants it."""

    out: str = option(REQUIRED, "PNG file for the patch; its report goes beside it as .json")
    target: str = option(REQUIRED, "class that the patch is to yield; some captions must name it")
    size: int | None = option(None, "side of the patch in pixels; default 16 at 224 px")
    epochs: int = option(50, "passes over the images of other classes, at most 10,000 of them")
    steps: int | None = option(None, "optimiser steps, instead of --epochs")
    batch_size: int = option(64, "images a step")
    patch_lr: float = option(1e-3, "learning rate, in units of [0, 1] pixels")
    augment: bool = option(
        True, "AutoAugment of half of the images, EDA of a tenth of the captions"
    )
    precision: str = option("fp32", "of the image tower", choices=("bf16", "fp32"))
    seed: int = option(0, "of the start and all draws")


@dataclass(frozen=True)
class ParOptions:
    """--method par: Perturb and Recover"""

    tau: float = option(2.15, "squared embedding distance at which a tower is let go")


@dataclass(frozen=True)
class CleanClipOptions:
    """--method cleanclip"""

    in_modal_weight: float = option(1.0, "weight of the terms within a modality")


@dataclass(frozen=True)
class RoclipOptions:
    """--method roclip"""

    pool_size: int = option(2000, "captions in the pool")
    pool_every: int = option(2, "every how many epochs captions come from the pool")


@dataclass(frozen=True)
class FtSamOptions:
    """--method ft_sam"""

    rho: float = option(0.05, "length of the step uphill")
    adaptive: bool = option(False, "scale that step by the weights' magnitudes")


@dataclass(frozen=True)
class InvertOptions:
    """--method invert"""

    perturb: bool = option(False, "PAR's distance term beside CLIP's loss")
    every: int = option(50, "steps between two inversions")
    inversion_steps: int = option(150, "optimiser steps of an inversion")
    share: float = option(0.25, "share of a batch that carries an inverted trigger")
    pool: int = option(3, "triggers kept of each family, the latest")
    opacity: float = option(0.3, "weight of the pattern that covers a whole image")


@dataclass(frozen=True)
class UbtOptions:
    """--method ubt: suspect pairs, not clean ones"""

    retain: str | None = option(
        None, "clean pairs, as --pairs; default the unsuspicious ones of --pairs"
    )
    k: int | None = option(
        None,
        "how many of the most suspicious --pairs are judged and forgotten (default: by fragility "
        "as many as it finds, else 256)",
    )
    rank: str | None = option(
        None, "how suspicion is measured (default: fragility)", choices=RANKINGS
    )
    tail: str | None = option(
        None, "end of the cosines that --rank gain starts from (default: low)", choices=TAILS
    )
    gate_excess: float | None = option(
        None,
        "how much more alike the suspicious images must be than random ones (default: set by "
        "--rank)",
    )
    gate_swing: float | None = option(
        None,
        "by fragility, how clearly the suspicious pairs must be of one word and lose it once "
        f"their image is disturbed (default: {LEAST_SWING:g})",
    )
    token_share: float = option(0.3, "share of a caption's words that is forgotten")
    image_share: float | None = option(
        None,
        "share of an image's patches that words are forgotten on (default: the whole image, "
        "which removes far more)",
    )
    beta: float = option(2.0, "weight of the pairs that are to stay as they are")
    check_every: int = option(25, "steps between two looks at what is forgotten")
    max_drop: float = option(
        0.03, "loss of accuracy on held-out pairs, above which less of the way is taken"
    )


@dataclass(frozen=True)
class ScheduleOptions:
    """how long, and how fast it learns"""

    epochs: int | None = option(None, "passes over the pairs (default: the method's, 2)")
    steps: int | None = option(None, "optimiser steps, instead of --epochs (ubt: 500)")
    batch_size: int = option(512, "pairs per step, over all processes")
    lr_start: float | None = option(None, "learning rate at the start (default: 3e-5, ubt 1e-7)")
    lr: float | None = option(None, "learning rate after the first half (default: 3e-6, ubt 1e-6)")
    lr_end: float | None = option(None, "learning rate at the end (default: 1e-9)")
    weight_decay: float = option(1e-4, "of AdamW; none for biases and norms")
    augment: bool | None = option(
        None, "PAR's pixel noise and erased squares (default: no for cleanclip, roclip, else yes)"
    )
    seed: int = option(0, "of the order and the augmentation")


@dataclass(frozen=True)
class CostOptions:
    """time and memory"""

    precision: str = option("auto", PRECISION, choices=PRECISIONS)
    micro_batch: int | None = option(
        None, "pairs encoded at a time, for a batch that does not fit into memory"
    )
    views: int | None = option(
        None, "augmentations of a pair, in turns by epoch: a frozen model then encodes each once"
    )
    lock: str | None = option(
        None, "tower left as it is: cheaper, and another method than the published", choices=LOCKS
    )
    compile: str | None = option(
        None, "mode of torch.compile for both towers", choices=COMPILE_MODES
    )
    shard: bool = option(
        False, "split weights and optimiser state over the processes, for models that do not fit"
    )


@dataclass(frozen=True)
class MethodOptions(
    ParOptions, CleanClipOptions, RoclipOptions, FtSamOptions, InvertOptions, UbtOptions
):
    """what one method alone takes"""


@dataclass(frozen=True)
class CleanConfig(
    ModelOptions, PairOptions, ScheduleOptions, CostOptions, ResumeOptions, PromptOptions,
    MethodOptions,
):  # fmt: skip
    """Remove a backdoor of unknown trigger, with clean image-caption pairs (ubt: suspect ones)."""

    out: str = option(REQUIRED, "folder for the cleaned model")
    method: str = option("par", "Perturb and Recover, or another", choices=tuple(METHODS))
    manifest: str | None = option(None, "manifest.json of the planted trigger, kept with the model")
    repair: bool | None = option(
        None,
        "at the end, rotate both towers back towards the input model; similarities stay "
        "(default: yes, but not by ubt)",
    )
    max_faults: int = option(3, "batches with broken numbers left out before the run is given up")


@dataclass(frozen=True)
class EvalConfig(ModelOptions, TriggerOptions, PromptOptions, ColumnOptions):
    """Measure clean accuracy, attack success, retrieval and drift. Exit code 1: a trigger fires."""

    test: str = option(REQUIRED, "labelled images: csv (image,label) or a folder of class folders")
    manifest: str | None = option(
        None, "manifest.json: trigger and target (default: the model folder's own, if it has one)"
    )
    baseline: str | None = option(None, "a clean model, for the baseline ASR")
    reference: str | None = option(None, "the model before cleaning, for the drift")
    pairs: str | None = option(
        None, "image-caption pairs as for clean (csv, tsv, shards, ...), for retrieval R@1/5/10"
    )
    batch_size: int = option(256, "images a time")
    precision: str = option("fp32", "of the towers", choices=("bf16", "fp32"))
    max_bad: float | None = option(None, "broken test images allowed, as a share (default: none)")
    out: str | None = option(None, "JSON file for the figures")
