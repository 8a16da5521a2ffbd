"""Provider `tuned`: PAR in stock PyTorch, as an expert would tune it.

Images are decoded once into an array of uint8, captions tokenised once; a thread reads one batch
ahead. Augmentation is vectorised on the device, captions are cut to the longest of the batch
(rounded up), the frozen towers' matrices are kept in the precision of the step, AdamW is fused, one
matrix of logits serves both directions, ResNets are laid out channels last, and no number is read
back before the end. With compile, both towers of both models go through torch.compile. Evaluation:
one zero-shot head of all prompts for clean and triggered images, both of which are kept as uint8.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

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
from torch import Tensor, nn
from torchvision import transforms

STEP = {False: 8, True: 16}  # lengths are multiples of it; compiled, each one costs a compilation


class Tuned:
    """The trainer."""

    name = "tuned"

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.student, self.frozen = setting.pair()
        transformer = hasattr(self.student.visual, "transformer")
        self.layout = torch.contiguous_format if transformer else torch.channels_last
        for model in (self.student, self.frozen):
            model.to(memory_format=self.layout)
        if setting.precision == "bf16":
            from open_clip.model import convert_weights_to_lp

            convert_weights_to_lp(self.frozen, torch.bfloat16)
        self.optimizer = torch.optim.AdamW(
            parameter_groups(self.student), lr=0.0, betas=(0.9, 0.98), eps=1e-8, fused=True
        )
        self.mean, self.std = setting.statistics()
        self.taken, self.history = 0, []
        self.generator = torch.Generator().manual_seed(0)
        self.on_device = torch.Generator(setting.device).manual_seed(0)
        self.functions = {}
        for name, model in (("student", self.student), ("frozen", self.frozen)):
            pair = lambda x, m=model: m.encode_image(x), lambda t, m=model: short_text(m, t)
            if setting.compile:
                pair = tuple(torch.compile(f, dynamic=False) for f in pair)
            self.functions[name] = pair
        self.images: np.ndarray | None = None
        self.tests: tuple[np.ndarray, np.ndarray] | None = None

    def read(self) -> None:
        """Decodes and tokenises what training takes, once."""
        rows = self.setting.table("pairs")
        self.images = self.decoded([path for path, _ in rows])
        self.tokens = self.setting.tokenizer([caption for _, caption in rows])

    def decoded(self, paths: list[str]) -> np.ndarray:  # [n, H, W, 3] uint8
        side = self.setting.side
        bicubic = transforms.InterpolationMode.BICUBIC
        geometry = transforms.Compose(
            [transforms.Resize(side, bicubic), transforms.CenterCrop(side)]
        )
        out = np.empty((len(paths), side, side, 3), np.uint8)

        def one(i: int) -> None:
            with Image.open(paths[i]) as image:
                out[i] = geometry(image.convert("RGB"))

        with ThreadPoolExecutor(max(1, self.setting.workers)) as pool:
            list(pool.map(one, range(len(paths))))
        return out

    def augmented(self, pixels: Tensor, augment: bool) -> Tensor:
        """[n, 3, H, W] of [n, H, W, 3] uint8 on the device; chances are drawn on the host."""
        x = pixels.permute(0, 3, 1, 2).contiguous(memory_format=self.layout).float().div_(255)
        n, _, height, width = x.shape
        if augment:
            noisy = torch.rand(n, generator=self.generator) < NOISE_P
            rows = sent(noisy.nonzero()[:, 0], x.device)
            noise = torch.empty((len(rows), 3, height, width), device=x.device)
            noise.normal_(0, NOISE_STD, generator=self.on_device).clamp_(0, 1)
            x.index_copy_(0, rows, noise.add_(x[rows]).clamp_(0, 1))
        x.sub_(self.mean).div_(self.std)
        if augment:
            chance, area, top, left = torch.rand((4, n), generator=self.generator)
            area = ERASE_AREA[0] + (ERASE_AREA[1] - ERASE_AREA[0]) * area
            side = (area * height * width).sqrt().round().clamp_(1)
            side = torch.where(chance < ERASE_P, side, 0)
            top, left = top * (height - side + 1), left * (width - side + 1)
            edges = sent(torch.stack([top.floor(), left.floor(), side]), x.device)
            masks = []
            for first, length in ((edges[0], height), (edges[1], width)):
                place = torch.arange(length, device=x.device)
                masks.append(
                    (place >= first[:, None]) & (place < first[:, None] + edges[2, :, None])
                )
            x.masked_fill_((masks[0][:, :, None] & masks[1][:, None, :])[:, None], 0)
        return x

    def cut(self, tokens: Tensor) -> Tensor:  # on the host
        """Without the padding of all, to a multiple of STEP."""
        step = STEP[self.setting.compile]
        longest = int((tokens != 0).sum(1).max())
        return tokens[:, : min(tokens.shape[1], -(-longest // step) * step)]

    def step(self, pixels: Tensor, tokens: Tensor, augment: bool) -> Tensor:
        """One training step; its loss stays on the device."""
        setting, stages = self.setting, self.setting.stages
        with stages("copy"):
            device = torch.device(setting.device)
            pixels, tokens = sent(pixels, device), sent(self.cut(tokens), device)
        with stages("input"):
            x = self.augmented(pixels, augment)
        for group in self.optimizer.param_groups:
            group["lr"] = rate(self.taken, setting)
        self.taken += 1
        with setting.autocast():
            encode_image, encode_text = self.functions["frozen"]
            with stages("reference"), torch.no_grad():
                refs = unit(encode_image(x)), unit(encode_text(tokens))
            encode_image, encode_text = self.functions["student"]
            with stages("student"):
                image, text = unit(encode_image(x)), unit(encode_text(tokens))
        with stages("loss"):
            logits = self.student.logit_scale.exp() * image @ text.T
            labels = torch.arange(len(image), device=setting.device)
            loss = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
            for now, before in zip((image, text), refs, strict=True):
                distance = (now - before).square().sum(-1).mean()
                loss = loss - WEIGHT * torch.where(distance <= TAU, distance, 0 * distance)
        self.optimizer.zero_grad(set_to_none=True)
        with stages("backward"):
            loss.backward()
        with stages("optimizer"):
            self.optimizer.step()
        return loss.detach()

    def block(self, batches: list[np.ndarray]) -> float:
        """Seconds of a step on each of these rows."""
        synchronize(self.setting.device)
        began = time.perf_counter()
        items = self.ahead(batches)
        for _ in batches:
            with self.setting.stages("data"):
                pixels, tokens = next(items)
            self.history.append(self.step(pixels, tokens, self.setting.augment))
        synchronize(self.setting.device)
        return time.perf_counter() - began

    def ahead(self, batches: list[np.ndarray]) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches, the next one read by a thread meanwhile."""

        def read(rows: np.ndarray) -> tuple[Tensor, Tensor]:
            pixels, tokens = torch.from_numpy(self.images[rows]), self.tokens[rows]
            return (pixels.pin_memory(), tokens) if self.setting.device == "cuda" else (
                pixels, tokens)  # fmt: skip

        with ThreadPoolExecutor(1) as pool:
            coming = pool.submit(read, batches[0])
            for following in [*batches[1:], None]:
                batch = coming.result()
                if following is not None:
                    coming = pool.submit(read, following)
                yield batch

    def restart(self) -> None:
        """What a run begins without: steps taken, gradients and the optimizer's state."""
        self.taken = 0
        self.optimizer.zero_grad()
        self.optimizer.state.clear()

    def whole(self, epochs: int) -> Parts:
        """Epochs, each with its evaluation; the files are read first."""
        parts, self.tests = Parts(), None
        with parts("reading"):
            self.read()
        for epoch in range(epochs):
            self.block(self.setting.epoch(epoch, len(self.images)))
            with parts("evaluation"):
                self.evaluate()
        return parts

    @torch.inference_mode()
    def evaluate(self) -> tuple[float, float]:
        """Accuracy on clean images, and on triggered ones."""
        setting = self.setting
        if self.tests is None:
            rows = setting.table("tests")
            number = {name: i for i, name in enumerate(setting.files.classes)}
            self.labels = torch.tensor([number[label] for _, label in rows])
            clean = self.decoded([path for path, _ in rows])
            self.tests = clean, self.triggered(clean)
            names = [t.replace("{}", c) for c in setting.files.classes for t in TEMPLATES]
            self.prompts = self.cut(setting.tokenizer(names))
        self.student.eval()
        with setting.autocast():
            size = setting.evaluation_batch
            texts = [
                unit(short_text(self.student, tokens.to(setting.device)))
                for tokens in self.prompts.split(size)
            ]
            head = unit(
                torch.cat(texts).view(len(setting.files.classes), len(TEMPLATES), -1).mean(1)
            )
            shares = []
            for images in self.tests:
                found = []
                for start in range(0, len(images), size):
                    part = torch.from_numpy(images[start : start + size])
                    pixels = sent(part, torch.device(setting.device))
                    rows = unit(self.student.encode_image(self.augmented(pixels, False)))
                    found.append((rows @ head.T).argmax(1))
                hits = torch.cat(found) == self.labels.to(setting.device)
                shares.append(hits.float().mean().item())
        training(self.student)
        return shares[0], shares[1]

    def triggered(self, images: np.ndarray) -> np.ndarray:
        """A copy with the patch at a place drawn for each image."""
        side = self.setting.side
        size = max(2, 16 * side // 224)
        with Image.open(self.setting.files.patch) as image:
            patch = np.asarray(image.convert("RGB").resize((size, size)))
        out, rng = images.copy(), np.random.default_rng(4)
        for image, (top, left) in zip(
            out, rng.integers(0, side - size + 1, (len(out), 2)), strict=True
        ):
            image[top : top + size, left : left + size] = patch
        return out

    def losses(self, batches: list[Batch]) -> list[float]:
        """Of a step on each batch of pixels, without augmentation."""
        return [self.step(images, tokens, False).item() for images, tokens, _ in batches]


def sent(x: Tensor, device: torch.device) -> Tensor:
    """x on the device, without waiting for what a GPU still has to do."""
    if device.type == "cuda":
        x = x.contiguous().pin_memory()
    return x.to(device, non_blocking=True)


def unit(rows: Tensor) -> Tensor:
    """Unit rows in fp32."""
    return F.normalize(rows.float(), dim=-1)


def short_text(model: nn.Module, tokens: Tensor) -> Tensor:
    """open_clip's encode_text for fewer tokens than the context has."""
    length = tokens.shape[1]
    if length == model.context_length:
        return model.encode_text(tokens)
    x = model.token_embedding(tokens).to(model.transformer.get_cast_dtype())
    x = x + model.positional_embedding[:length].to(x.dtype)
    x = model.ln_final(model.transformer(x, attn_mask=model.attn_mask[:length, :length]))
    x = x[torch.arange(len(x), device=x.device), tokens.argmax(-1)]
    return x @ model.text_projection
