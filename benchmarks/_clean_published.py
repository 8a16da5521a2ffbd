"""Provider `published`: PAR as a research script runs it, in stock PyTorch and in our own words.

What it reproduces of such a script's cost: every JPEG is opened, decoded, resized and augmented
twice per visit, with numpy's normals, the second one for a clean image that nobody reads; captions
are tokenised in the data set, at every visit, to 77 tokens; float images travel; the frozen model
encodes both towers at every step from fp32 weights; both logit matrices, accuracy and distances;
thresholds are made on the host; seven numbers are read back at every step; AdamW takes its foreach
path. Evaluation, in fp32, of clean and of triggered images each builds its own zero-shot head class
by class, decodes all images anew, through the augmenting transform, and pastes the trigger's file.

Of a script on several GPUs there is more: a frozen model in DistributedDataParallel, features
gathered with gradients, gradients that are synchronised or, where the wrapper is bypassed, are not.
One process has none of it.
"""

from __future__ import annotations

import random
import time

import numpy as np
import torch
import torch.nn.functional as F
from _clean_setting import (
    ERASE_AREA,
    ERASE_P,
    NOISE_P,
    NOISE_STD,
    TAU,
    TEMPLATES,
    WEIGHT,
    Batch,
    Parts,
    Setting,
    parameter_groups,
    rate,
    training,
)
from _timing import synchronize
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

VALIDATION_BATCH = 50  # images


class Augmenting:
    """PIL image -> [3, H, W] normalised float, with noise and an erased square."""

    def __init__(self, setting: Setting, augment: bool) -> None:
        bicubic = transforms.InterpolationMode.BICUBIC
        self.geometry = transforms.Compose(
            [transforms.Resize(setting.side, bicubic), transforms.CenterCrop(setting.side)]
        )
        self.to_tensor = transforms.ToTensor()
        self.normalize = transforms.Normalize(setting.mean, setting.std)
        self.augment = augment

    def __call__(self, image: Image.Image) -> Tensor:
        return self.finish(self.to_tensor(self.geometry(image).convert("RGB")))

    def finish(self, x: Tensor) -> Tensor:  # [3, H, W] in [0, 1]
        """Noise, normalisation, erasing."""
        if self.augment and random.random() < NOISE_P:
            noise = np.random.default_rng().standard_normal(x.shape, np.float32)
            x = (x + torch.from_numpy(noise).mul_(NOISE_STD).clamp_(0, 1)).clamp_(0, 1)
        x = self.normalize(x)
        if self.augment and random.random() < ERASE_P:
            height, width = x.shape[1:]
            side = max(1, round((random.uniform(*ERASE_AREA) * height * width) ** 0.5))
            top, left = random.randint(0, height - side), random.randint(0, width - side)
            x[:, top : top + side, left : left + side] = 0
        return x


class PairFiles(Dataset):
    """(augmented image, the "clean" one, tokens) of a row."""

    def __init__(self, setting: Setting) -> None:
        self.rows, self.tokenizer = setting.table("pairs"), setting.tokenizer
        self.transform = Augmenting(setting, setting.augment)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor, Tensor]:
        path, caption = self.rows[row]
        image = self.transform(Image.open(path).convert("RGB"))
        clean = self.transform(Image.open(path).convert("RGB"))
        return image, clean, self.tokenizer([caption])[0]


class LabelledFiles(Dataset):
    """(image, class) of a row, triggered where asked."""

    def __init__(self, setting: Setting, triggered: bool) -> None:
        self.setting, self.rows, self.triggered = setting, setting.table("tests"), triggered
        self.number = {name: i for i, name in enumerate(setting.files.classes)}
        self.transform = Augmenting(setting, setting.augment)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        path, label = self.rows[row]
        image, side = Image.open(path).convert("RGB"), self.setting.side
        if self.triggered:
            image = image.resize((side, side), Image.Resampling.BICUBIC)
            size = max(2, 16 * side // 224)
            patch = Image.open(self.setting.files.patch).resize((size, size))
            image.paste(patch, (random.randint(0, side - size), random.randint(0, side - size)))
        return self.transform(image), self.number[label]


class Given:
    """A batch sampler whose batches are put in from outside."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []

    def __iter__(self):
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


class Published:
    """The trainer."""

    name = "published"

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.student, self.frozen = setting.pair()
        self.optimizer = torch.optim.AdamW(
            parameter_groups(self.student), lr=0.0, betas=(0.9, 0.98), eps=1e-8, foreach=True
        )
        self.sampler, self.taken = Given(), 0
        pinned = setting.device == "cuda"
        self.loader = DataLoader(
            PairFiles(setting), batch_sampler=self.sampler, num_workers=setting.workers,
            persistent_workers=setting.workers > 0, pin_memory=pinned,
        )  # fmt: skip

    def step(self, images: Tensor, tokens: Tensor) -> dict[str, float]:
        """One training step of normalised float images."""
        setting, stages, student = self.setting, self.setting.stages, self.student
        with stages("copy"):
            images = images.to(setting.device, non_blocking=True)
            tokens = tokens.to(setting.device, non_blocking=True)
        for group in self.optimizer.param_groups:
            group["lr"] = rate(self.taken, setting)
        self.taken += 1
        with setting.autocast():
            with stages("student"):
                image = F.normalize(student.encode_image(images), dim=-1)
                text = F.normalize(student.encode_text(tokens), dim=-1)
            with stages("reference"), torch.no_grad():
                image_ref = F.normalize(self.frozen.encode_image(images), dim=-1)
                text_ref = F.normalize(self.frozen.encode_text(tokens), dim=-1)
            with stages("loss"):
                scale = student.logit_scale.exp().item()
                per_image, per_text = scale * image @ text.T, scale * text @ image.T
                labels = torch.arange(len(image), device=setting.device)
                clip = (F.cross_entropy(per_image, labels) + F.cross_entropy(per_text, labels)) / 2
                distances = []
                for now, before in ((image, image_ref), (text, text_ref)):
                    distance = (now.float() - before.float()).square().sum(-1).mean()
                    limit = torch.tensor(TAU).to(setting.device)
                    zero = torch.tensor(0.0).to(setting.device)
                    distances.append(torch.where(distance <= limit, distance, zero))
                loss = clip - WEIGHT * (distances[0] + distances[1])
                hits = (per_image.argmax(1) == labels).float().mean()
                text_hits = (per_text.argmax(1) == labels).float().mean()
        self.optimizer.zero_grad()
        with stages("backward"):
            loss.backward()
        with stages("optimizer"):
            self.optimizer.step()
        with stages("loss"):
            return {
                "loss": loss.item(), "contrastive": clip.item(), "s_image": distances[0].item(),
                "s_text": distances[1].item(), "hits": hits.item(), "text_hits": text_hits.item(),
                "scale": scale,
            }  # fmt: skip

    def block(self, batches: list[np.ndarray]) -> float:
        """Seconds of a step on each of these rows; nothing is read ahead beyond them."""
        synchronize(self.setting.device)
        began = time.perf_counter()
        self.sampler.batches = [rows.tolist() for rows in batches]
        items = iter(self.loader)
        for _ in batches:
            with self.setting.stages("data"):
                images, _, tokens = next(items)
            self.step(images, tokens)
        synchronize(self.setting.device)
        return time.perf_counter() - began

    def restart(self) -> None:
        """What a run begins without: steps taken, gradients and the optimizer's state."""
        self.taken = 0
        self.optimizer.zero_grad()
        self.optimizer.state.clear()

    def whole(self, epochs: int) -> Parts:
        """Epochs, each with its evaluation."""
        parts = Parts()
        for epoch in range(epochs):
            self.block(self.setting.epoch(epoch, len(self.loader.dataset)))
            with parts("evaluation"):
                self.evaluate()
        return parts

    @torch.no_grad()
    def evaluate(self) -> tuple[float, float]:
        """Accuracy on clean images, and on triggered ones."""
        self.student.eval()
        shares = []
        for triggered in (False, True):
            head, hits, count = self.head(), 0, 0
            loader = DataLoader(
                LabelledFiles(self.setting, triggered), batch_size=VALIDATION_BATCH,
                num_workers=self.setting.workers,
            )  # fmt: skip
            for images, labels in loader:
                rows = F.normalize(
                    self.student.encode_image(images.to(self.setting.device)), dim=-1
                )
                hits += ((100 * rows @ head.T).argmax(1).cpu() == labels).sum().item()
                count += len(labels)
            shares.append(hits / count)
        training(self.student)
        return shares[0], shares[1]

    def head(self) -> Tensor:
        """[classes, D], a class at a time."""
        rows = []
        for name in self.setting.files.classes:
            texts = [template.replace("{}", name) for template in TEMPLATES]
            tokens = self.setting.tokenizer(texts).to(self.setting.device)
            row = F.normalize(self.student.encode_text(tokens), dim=-1).mean(0)
            rows.append(row / row.norm())
        return torch.stack(rows)

    def losses(self, batches: list[Batch]) -> list[float]:
        """Of a step on each batch of pixels, without augmentation."""
        finish = Augmenting(self.setting, False).finish
        found = []
        for images, tokens, _ in batches:
            x = torch.stack([finish(image.permute(2, 0, 1) / 255) for image in images])
            found.append(self.step(x, tokens)["loss"])
        return found
