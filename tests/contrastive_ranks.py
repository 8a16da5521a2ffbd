"""contrastive_par shared by the ranks of a process group; rank 0 saves what all found."""

import sys

import torch
import torch.distributed as dist
from contrastive_par_features import random_case

import pybackdoor
from pybackdoor.distributed import Ranks
from pybackdoor.ops import contrastive_par

ranks = Ranks.start(torch.device("cpu"))
SHARES = {1: [23], 2: [14, 9], 4: [9, 1, 0, 13]}[ranks.size]  # unequal, one of a single image
found: dict[str, torch.Tensor] = {}


def together(name: str, scale: float, spread: float = 1.0, frozen: int = -1, **options) -> None:
    """The loss and gradients of the whole case, each rank holding its share of the images.

    Rank `frozen` wants no gradient of its features, which are then looked at on no rank.
    """
    case = random_case(60, 23, 20, seed=3, dtype=torch.float64)
    if spread != 1:
        case["image"] = 0.01 * case["image"] - 1  # all alike, and far from every text
        case["text"] = 0.01 * case["text"] + 1
    first = sum(SHARES[: ranks.rank])
    mine = slice(first, first + SHARES[ranks.rank])
    rows = (case["owner"] >= mine.start) & (case["owner"] < mine.stop)
    part = {k: case[k][mine] for k in ("image", "image_ref", "column_weight", "valid", "suspect")}
    part |= {k: case[k][rows] for k in ("text", "text_ref", "weight")}
    part["owner"] = case["owner"][rows] - first
    text, image = (part.pop(k).clone().requires_grad_() for k in ("text", "image"))
    if ranks.size > 1 and ranks.rank == frozen:
        for x in (text, image):
            x.requires_grad_(False)
    s = torch.tensor(scale, dtype=torch.float64, requires_grad=True)
    result = contrastive_par(text, image, s, **part, counts=SHARES, **options)
    result.loss.backward()
    gathered = {"text": text.grad, "image": image.grad, "scale": s.grad[None]}
    if frozen >= 0:
        del gathered["image"], gathered["text"]
    if ranks.size > 1:
        for key, grad in gathered.items():
            every = [None] * ranks.size
            dist.all_gather_object(every, grad)
            gathered[key] = torch.cat(every)
    gathered["scale"] = gathered["scale"].sum()
    found[f"{name} stats"] = torch.stack(result).detach()
    found.update({f"{name} {key}": grad for key, grad in gathered.items()})


together("kept", 20.0)
together("formed again", 20.0, budget=0)
together("off", 20.0, tau=0.5)
together("kept, some frozen", 20.0, frozen=1)
together("columns formed again", 400.0, spread=0.01)

# open_clip's call, equal shares, under the mean that DistributedDataParallel takes
whole = random_case(12, 12, 8, signs=False, refs=False, dtype=torch.float64)
parts = [x.tensor_split(ranks.size)[ranks.rank].clone().requires_grad_() for x in whole.values()]
s = torch.tensor(9.0, dtype=torch.float64, requires_grad=True)
loss = pybackdoor.ContrastiveLoss(world_size=ranks.size)(parts[1], parts[0], s)
loss.backward()
for x in (parts[1].grad, s.grad):
    x /= ranks.size
if ranks.size > 1:
    dist.all_reduce(s.grad)
found["clip loss"], found["clip scale"] = loss.detach(), s.grad
if ranks.rank == 0:
    found["clip image"] = parts[1].grad[:3]
    torch.save(found, sys.argv[1])
Ranks.finish()
