"""The same experiments by one process or by several; what rank 0 found is saved."""

import sys

import torch
from dual_encoder import MEAN, STD, DualEncoder, random_pairs
from torch import nn

import pybackdoor
from pybackdoor.batches import InputRules
from pybackdoor.data import PairLoader, pairs_from_arrays
from pybackdoor.distributed import Ranks
from pybackdoor.engine import Contrastive, Settings, train
from pybackdoor.methods.par import PerturbAndRecover

DEVICE = torch.device("cpu")
ranks = Ranks.start(DEVICE)
found: dict = {"shares": []}


def shares() -> list:
    """This rank's part of 7, 7 and 5 pairs, as normalised fp64 floats."""
    g = torch.Generator().manual_seed(0)
    batches = []
    found["shares"] = []
    for whole in random_pairs(19, 7):
        images = torch.randn(len(whole["ids"]), 3, 16, 16, generator=g).double()
        parts = torch.arange(len(images)).tensor_split(ranks.size)
        found["shares"].append([len(part) for part in parts])
        mine = parts[ranks.rank]
        batches.append((images[mine], whole["tokens"][mine], whole["ids"][mine]))
    return batches


def trained(model: nn.Module, objective, loader, **settings) -> dict[str, torch.Tensor]:
    """Gradients of every step, losses, and the weights after the last."""
    kept: dict[str, torch.Tensor] = {}

    def keep(step, record, model):
        kept[f"{step} loss"] = torch.tensor(record["loss"], dtype=torch.float64)
        for name, p in model.named_parameters():
            if p.grad is not None:
                kept[f"{step} {name}"] = p.grad.clone()

    train(
        model,
        loader,
        objective,
        lambda k, steps: 1e-2,
        Settings(steps=3, precision="fp32", progress=False, weight_decay=0.1, **settings),
        rules=InputRules.of(model),
        device=DEVICE,
        on_step=keep,
    )
    return {**kept, **model.state_dict()}


def error_of(run) -> str:
    try:
        run()
    except Exception as error:
        return str(error)
    return "no error"


def model(seed: int) -> DualEncoder:
    fresh = DualEncoder(seed=seed).double()
    fresh.unused = nn.Parameter(torch.ones(2, 2, dtype=torch.float64))  # no loss reaches it
    return fresh


objective = PerturbAndRecover(model(2).eval(), 2.15)
found["par"] = trained(model(1), objective, shares())
found["trained scale"] = trained(model(1), Contrastive(), shares(), freeze_scale=False)

# The public call on the public loader, uint8 and augmented; each rank starts from its own weights.
whole = random_pairs(19, 19)[0]
texts = [" ".join(map(str, row)) for row in whole["tokens"].tolist()]
pairs = pairs_from_arrays(whole["images"].numpy(), texts)
loader = PairLoader(
    pairs,
    lambda texts: torch.tensor([[int(w) for w in t.split()] for t in texts]),
    batch_size=7,
    drop_last=False,
)
start = model(1 + ranks.rank)
options = {"precision": "fp32", "mean": MEAN, "std": STD, "progress": False, "lr": 1e-2}
cleaned = pybackdoor.par_clean(start, loader, steps=3, **options)
assert cleaned.history[0]["s_image"] < 1e-12  # the teacher is the same model on every rank
found["clean"] = cleaned.model.state_dict()

if ranks.size == 2:
    fine, me = shares(), ranks.rank
    quick = {**options, "augment": False}
    found["same shares"] = error_of(
        lambda: pybackdoor.par_clean(model(1), random_pairs(8, 8), steps=1, **quick)
    )
    broken = [fine[0], fine[1] if me == 0 else "no batch"]
    found["a rank fails"] = error_of(
        lambda: pybackdoor.par_clean(model(1), broken, steps=2, **quick)
    )
    found["unequal steps"] = error_of(
        lambda: pybackdoor.par_clean(model(1), fine[: 3 - me], epochs=1, **quick)
    )
    result = pybackdoor.par_clean(
        model(1), fine, steps=9, on_step=lambda k, r, m: me == 1 and k == 1, **quick
    )
    found["a rank stops"] = len(result.history)
if ranks.rank == 0:
    torch.save(found, sys.argv[1])
Ranks.finish()
