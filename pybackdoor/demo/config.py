"""The options of the demo."""

from __future__ import annotations

from dataclasses import dataclass

from ..options import option


@dataclass(frozen=True)
class DemoConfig:
    """Options of ``pybackdoor demo``."""

    out: str = option("demo-out", "folder for results, models and pictures")
    trigger: str = option("badnet_stripes", "trigger to plant: any that needs no file")
    target: str | None = option(None, "class the trigger yields; default the last but one")
    images: str | None = option(
        None, "your own pictures: a folder of class folders, or .npy [N, H, W(, 3)] with --labels"
    )
    labels: str | None = option(None, ".npy of integers or a text file, one label per image")
    csv: str | None = option(None, "your own pictures as a csv with the columns image and label")
    image_size: int = option(32, "side of the pictures in pixels, a multiple of 32")
    rate: float = option(0.03, "share of the training pictures that are poisoned")
    train_steps: int = option(450, "steps of training with the backdoor planted")
    train_lr: float = option(2e-3, "its highest learning rate")
    clean_steps: int = option(300, "steps of cleaning, for PAR and for fine-tuning")
    lr_start: float = option(7e-4, "cleaning: learning rate at the start")
    lr: float = option(5e-5, "cleaning: learning rate after the first half")
    tau: float = option(2.15, "PAR: squared distance at which the perturbation stops")
    batch_size: int = option(256, "pairs per step")
    seed: int = option(0, "of everything random")
    device: str | None = option(None, "cpu or cuda; default a GPU if there is one")
    progress: bool | None = option(None, "progress bars; default on a terminal")
