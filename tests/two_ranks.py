"""Three PAR steps in fp64, by one process or by several that share each batch unequally."""

import sys

import torch
from dual_encoder import DualEncoder, random_pairs

from pybackdoor.batches import InputRules
from pybackdoor.distributed import Ranks
from pybackdoor.engine import Encoder, Settings, train
from pybackdoor.par import PerturbAndRecover

device = torch.device("cpu")
ranks = Ranks.start(device)
model, poisoned = DualEncoder(seed=1).double(), DualEncoder(seed=2).double().eval()
g = torch.Generator().manual_seed(0)
batches, shares = [], []
for whole in random_pairs(19, 7):  # 7, 7 and 5 pairs
    images = torch.randn(len(whole["ids"]), 3, 16, 16, generator=g).double()
    parts = torch.arange(len(images)).tensor_split(ranks.size)
    shares.append([len(part) for part in parts])
    mine = parts[ranks.rank]
    batches.append((images[mine], whole["tokens"][mine], whole["ids"][mine]))

gradients: dict[str, torch.Tensor] = {}


def keep(step, record, model):
    if step == 0:
        gradients.update(
            {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
        )


log = train(
    model,
    batches,
    PerturbAndRecover(poisoned, 2.15, Encoder(None, device)),
    lambda k, steps: 1e-2,
    Settings(steps=3, precision="fp32", progress=False),
    rules=InputRules.of(model),
    device=device,
    on_step=keep,
)
if ranks.rank == 0:
    torch.save(
        {
            "weights": model.state_dict(),
            "gradients": gradients,
            "batches": shares,
            "history": [record["loss"] for record in log.steps],
        },
        sys.argv[1],
    )
if torch.distributed.is_initialized():
    torch.distributed.destroy_process_group()
