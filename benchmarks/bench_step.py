"""One PAR training step of a CLIP model: pixels to updated weights.

    python benchmarks/bench_step.py --device cuda --json result.json

ViT-B/32 with random weights, batch 512, uint8 images on the device, bf16 autocast on CUDA. Both
providers run the same towers, the student's and the frozen reference's, and torch's AdamW:
    eager       normalisation, loss and distance term in plain torch
    pybackdoor  trigger_normalize and contrastive_par
"""

from __future__ import annotations

import copy
import math
import sys
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))
from _common import OURS, Report, make_row, parser
from _contrastive_eager import distance_term, two_products
from _memory import peak_growth
from _timing import interleave

from pybackdoor.ops import contrastive_par, trigger_normalize

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
DISTANCE_WEIGHT, TAU = 0.5, 2.15
MODEL, BATCH = "ViT-B-32", 512
TINY_MODEL = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16},
    "text_cfg": {"context_length": 8, "vocab_size": 100, "width": 64, "heads": 2, "layers": 1},
}
TOLERANCE = {"cuda": 2e-2, "cpu": 1e-4}  # of the first loss: bf16 there, fp32 here


class Step:
    """A student, its frozen reference, a batch and an optimizer."""

    def __init__(self, tiny: bool, device: str):
        import open_clip

        torch.manual_seed(0)
        model = open_clip.CLIP(**TINY_MODEL) if tiny else open_clip.create_model(MODEL)
        self.model = model.to(device)
        with torch.no_grad():
            self.model.logit_scale.fill_(math.log(20.0))
        self.frozen = copy.deepcopy(self.model).requires_grad_(False)
        with torch.no_grad():  # so that the distances are not zero
            for p in self.model.parameters():
                p.mul_(1 + 0.02 * torch.randn_like(p))
        size = self.model.visual.image_size
        side = size[0] if isinstance(size, tuple) else size
        words, vocabulary = self.model.context_length, self.model.vocab_size
        self.batch = 8 if tiny else BATCH
        shape = (self.batch, side, side, 3)
        self.images = torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
        self.tokens = torch.randint(1, vocabulary, (self.batch, words), device=device)
        self.device = device
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-6, fused=True)
        self.mean = torch.tensor(MEAN, device=device).view(3, 1, 1)
        self.std = torch.tensor(STD, device=device).view(3, 1, 1)

    def features(self, model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        """Raw text and image features."""
        cuda = self.device == "cuda"
        with torch.autocast("cuda", torch.bfloat16) if cuda else nullcontext():
            return model.encode_text(self.tokens), model.encode_image(x)

    def eager_loss(self) -> Tensor:
        """As one writes it."""
        x = (self.images.permute(0, 3, 1, 2).float() / 255 - self.mean) / self.std
        with torch.no_grad():
            refs = [F.normalize(f.float(), dim=1) for f in self.features(self.frozen, x)]
        units = [F.normalize(f.float(), dim=1) for f in self.features(self.model, x)]
        value = two_products(*units, self.model.logit_scale.exp())
        for unit, ref in zip(units, refs, strict=True):
            value = value + distance_term(unit, ref, DISTANCE_WEIGHT, TAU)
        return value

    def our_loss(self) -> Tensor:
        """The ops."""
        x = trigger_normalize(self.images, mean=MEAN, std=STD)
        with torch.no_grad():
            refs = [F.normalize(f.float(), dim=1) for f in self.features(self.frozen, x)]
        text, image = self.features(self.model, x)
        return contrastive_par(
            text,
            image,
            self.model.logit_scale.exp(),
            text_ref=refs[0].to(text.dtype),
            image_ref=refs[1].to(image.dtype),
            distance_weight=DISTANCE_WEIGHT,
            tau=TAU,
            precision="bf16" if self.device == "cuda" else "ieee",
        ).loss

    def run(self, loss) -> None:
        """Loss, gradients, new weights."""
        self.optimizer.zero_grad(set_to_none=True)
        loss().backward()
        self.optimizer.step()


def main() -> None:
    options = parser(__doc__.splitlines()[0]).parse_args()
    torch.set_num_threads(options.threads)
    report, device = Report(options), options.device
    step = Step(options.tiny, device)
    losses = {OURS: step.our_loss, "eager": step.eager_loss}
    with torch.no_grad():
        first = {name: loss().item() for name, loss in losses.items()}
    gap = abs(first[OURS] - first["eager"]) / abs(first["eager"])
    if not gap <= TOLERANCE[device]:
        sys.exit(f"error: the losses differ: {first}")
    runs = {name: lambda loss=loss: step.run(loss) for name, loss in losses.items()}
    times = interleave(runs, device, repeats=options.repeats)
    side = step.images.shape[1]
    for name, spread in times.items():
        peak = peak_growth(runs[name], device) if device == "cuda" else None
        report.add(
            make_row(
                "step",
                name,
                "full",
                f"{step.batch}x{side}x{side}x3",
                "bfloat16" if device == "cuda" else "float32",
                device,
                case="tiny" if options.tiny else MODEL,
                times=spread,
                peak_bytes=peak,
            )
        )
    report.close()


if __name__ == "__main__":
    main()
