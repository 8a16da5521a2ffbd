"""Every setting of the quality matrix in one place, each with its reason.

The file name of a model or a cell ends in a hash of the settings that it depends on. Change one
here, and what depends on it is computed anew; the rest is kept.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from _quality_data import DataSet
from _quality_defences import DEFENCES
from _quality_drift import VERSION as REPAIR_VERSION
from _quality_models import ARCHITECTURES

from pybackdoor.triggers import TRIGGERS, TriggerSpec, trigger

CLEAN = "clean"  # the attack that is none
BADCLIP = "badclip"  # the attack whose trigger is found on the clean model
TUNING = ("checkerboard", "sig")  # attacks that settings were chosen on; the others are untouched
ATTACKS = (
    CLEAN, "badnet", "badnet_stripes", "blended", "blended_stripes", "triangles", "text", "wanet",
    BADCLIP, "sig", "checkerboard",
)  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """What is computed, on which data, for how long.

    Attributes:
        data: data sets by name.
        rates: share of the planted pairs that is poisoned, by data set, or by (data set, attack)
            where an attack needs more to be installed.
        train: of ``poison``, by data set.
        patch: of ``badclip_patch``, which is called without its augmentation.
        own: by architecture, what it has in place of the common: options of "train", "patch",
            "clean" and "rebound", and a "rate" for every attack.
        clean: of every defence.
        rebound: of the training after cleaning.
        rebound_at: its steps at which the ASR is taken.
        seeds: by (data set, architecture); others have seed 0 alone.
        installed: ASR above which an attack counts as installed, and is cleaned.
    """

    data: Mapping[str, DataSet]
    rates: Mapping[Any, float]
    train: Mapping[str, Mapping[str, Any]]
    patch: Mapping[str, Any]
    clean: Mapping[str, Any]
    rebound: Mapping[str, Any]
    rebound_at: tuple[int, ...]
    seeds: Mapping[tuple[str, str], tuple[int, ...]] = field(default_factory=dict)
    installed: float = 0.9
    own: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def rate(self, model: Model) -> float:
        common = self.rates.get((model.data, model.attack), self.rates[model.data])
        return self.own.get(model.arch, {}).get("rate", common)

    def options(self, what: str, data: str, arch: str) -> dict[str, Any]:
        """Of "train", "patch", "clean" or "rebound" for one architecture on one data set."""
        common = self.train[data] if what == "train" else getattr(self, what)
        return {**common, **self.own.get(arch, {}).get(what, {})}


# From scratch, on one thread, in some minutes for CIFAR-10's ResNet: five passes.
# bf16 halves the time of the ResNet on CPUs that have it. The rates are what it takes to install
# the attacks in that budget; published ones are far lower, on a hundred times the pairs.
TRAIN = {"batch_size": 128, "lr": 3e-3, "warmup": 50, "weight_decay": 0.05, "precision": "bf16"}
# Pretrained towers learn from fewer pairs, and lose what they know at the common learning rates.
# fp32: on CPUs depthwise convolutions take twice as long backwards in bf16.
# With the first layers frozen an attack takes more poisoned pairs: at 30 % checkerboard stays just
# below 90 %.
# The learning rates of cleaning are tune_quality.py's, for fine-tuning; all methods take them.
PRETRAINED = {
    "rate": 0.4,
    "train": {"steps": 160, "batch_size": 64, "lr": 1e-3, "warmup": 20, "precision": "fp32"},
    "patch": {"steps": 60, "batch_size": 32, "lr": 3e-2, "precision": "fp32"},
    "clean": {
        "steps": 100, "batch_size": 64, "lr_start": 7e-4, "lr": 5e-5, "precision": "fp32"
    },
    "rebound": {
        "batch_size": 16, "lr_start": 5e-5, "lr": 5e-5, "lr_end": 5e-5, "precision": "fp32"
    },
}  # fmt: skip
FULL = Setting(
    # Test images: as many per class as Caltech-101's rarest class has; 2,000 of CIFAR-10 put an
    # interval of 2 points around a CA of 70 % and cost a second or two of a core.
    data={
        "cifar10": DataSet("cifar10_32.npz", 32, 10_000, 5_000, 200),
        "caltech101": DataSet("caltech101_128.npz", 64, 1_200, 600, 10),
        "fashion": DataSet(None, 32, 10_000, 2_000, 300, grey=True),
    },
    # Of Caltech-101 as many poisoned pairs as of CIFAR-10: at 5 % checkerboard is not planted.
    rates={"cifar10": 0.05, "caltech101": 0.3, "fashion": 0.03},
    train={
        "cifar10": {"steps": 1400, **TRAIN},
        "caltech101": {"steps": 1600, **TRAIN},
        "fashion": {"steps": 600, **TRAIN},
    },
    patch={"steps": 600, "batch_size": 64, "lr": 1e-2, "precision": "bf16"},
    # The demo's steps; learning rates that tune_quality.py chose on TUNING for most.
    clean={"steps": 300, "batch_size": 128, "lr_start": 1.4e-3, "lr": 1e-4, "precision": "bf16"},
    # A later user's fine-tuning: half of cleaning's learning rate, constant, a small
    # batch, no augmentation; on clean pairs that no defence has seen.
    rebound={
        "steps": 300, "batch_size": 64, "lr_start": 5e-5, "lr": 5e-5, "lr_end": 5e-5,
        "precision": "bf16", "augment": False,
    },
    rebound_at=(100, 200, 300),
    seeds={("cifar10", "resnet"): (0, 1, 2)},
    # At the ResNet's 3e-3 the ViT stays at a CA of 50 %, and learns no small trigger.
    own={"vit": {"train": {"lr": 1e-3}}, "pretrained": PRETRAINED},
)  # fmt: skip
# A self-check in seconds, whose figures say nothing.
TINY = Setting(
    data={"fashion": DataSet(None, 32, 64, 32, 2, grey=True)},
    rates={"fashion": 0.05},
    train={"fashion": {"steps": 2, **TRAIN, "batch_size": 16}},
    patch={**FULL.patch, "steps": 2, "batch_size": 8},
    clean={**FULL.clean, "steps": 2, "batch_size": 16},
    rebound={**FULL.rebound, "steps": 3, "batch_size": 16},
    rebound_at=(1, 2, 3),
    installed=-1.0,  # two steps plant nothing: every path is walked all the same
)


@dataclass(frozen=True, order=True)
class Model:
    """One trained model of the matrix: data set, architecture, attack and seed."""

    data: str
    arch: str
    attack: str
    seed: int

    @property
    def clean(self) -> Model:
        """The model of the same data, architecture and seed without an attack."""
        return Model(self.data, self.arch, CLEAN, self.seed)

    def spec(self, setting: Setting, patch: Path | None = None) -> TriggerSpec | None:
        """Its trigger; BadCLIP's is in the file ``patch``."""
        if self.attack == CLEAN:
            return None
        file = {"file": patch} if self.attack == BADCLIP else {}
        return trigger(self.attack, seed=self.seed, grey=setting.data[self.data].grey, **file)

    def settings(self, setting: Setting) -> dict[str, Any]:
        """All that its weights depend on; JSON-ready."""
        attack: dict[str, Any] = {}
        if self.attack != CLEAN:
            attack = {"trigger": self._trigger(setting)}
            attack["rate"] = setting.rate(self)
        return {
            **asdict(self), **attack,
            "data_set": asdict(setting.data[self.data]),
            "architecture": asdict(ARCHITECTURES[self.arch]),
            "train": self.options("train", setting),
        }  # fmt: skip

    def _trigger(self, setting: Setting) -> dict[str, Any]:
        """All that its trigger depends on: for BadCLIP what the patch follows from."""
        if self.attack != BADCLIP:
            return self.spec(setting).to_dict()
        return {
            "name": BADCLIP,
            "version": TRIGGERS[BADCLIP].version,
            "patch": self.options("patch", setting),
            "clean": self.clean.settings(setting),
        }

    def options(self, what: str, setting: Setting) -> dict[str, Any]:
        """Of its "train", "patch", "clean" or "rebound"."""
        return setting.options(what, self.data, self.arch)

    def name(self, setting: Setting) -> str:
        """Of its files."""
        about = f"{self.data}-{self.arch}-{self.attack}-s{self.seed}"
        return f"{about}-{short_hash(self.settings(setting))}"


@dataclass(frozen=True, order=True)
class Cell:
    """One row of the matrix: a model and what was done to it."""

    model: Model
    defence: str

    def settings(self, setting: Setting) -> dict[str, Any]:
        """All that its figures depend on; JSON-ready."""
        defence = DEFENCES[self.defence]
        repair = {} if defence.method is None else {"repair": REPAIR_VERSION}
        return {
            "model": self.model.settings(setting),
            **repair,
            "defence": {
                "name": self.defence, **defence.settings(self.model.options("clean", setting))
            },
            "rebound": {
                **self.model.options("rebound", setting), "at": list(setting.rebound_at)
            },
            "installed": setting.installed,
        }  # fmt: skip

    def name(self, setting: Setting) -> str:
        """Of its file."""
        about = f"{self.model.name(setting)}-{self.defence}"
        return f"{about}-{short_hash(self.settings(setting))}"


def short_hash(settings: Mapping[str, Any]) -> str:
    """Ten hex digits that other settings do not share."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:10]
