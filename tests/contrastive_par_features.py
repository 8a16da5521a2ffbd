"""Random features and options for contrastive_par."""

import torch
import torch.nn.functional as F


def random_case(m, n, d, *, seed=0, signs=True, similarity=1.0, dtype=torch.float32, refs=True):
    """Features whose rows resemble their image's, and all the options, several rows per image."""
    g = torch.Generator().manual_seed(seed)
    image = torch.randn(n, d, generator=g, dtype=torch.float64)
    owner = torch.randint(0, n, (m,), generator=g).sort().values if signs else torch.arange(n)
    text = similarity * image[owner] + torch.randn(m, d, generator=g, dtype=torch.float64)
    case = {"text": text.to(dtype), "image": image.to(dtype)}
    if refs:
        for name in ("text", "image"):
            ref = case[name].double() + torch.randn(case[name].shape, generator=g).double()
            case[f"{name}_ref"] = F.normalize(ref, dim=-1).to(dtype)
    if signs:
        case["owner"] = owner
        case["weight"] = torch.randn(m, generator=g).double() / m
        case["weight"][torch.rand(m, generator=g) < 0.1] = 0
        case["column_weight"] = torch.rand(n, generator=g).double() / n
        case["valid"] = torch.rand(n, generator=g) < 0.9
        case["suspect"] = torch.rand(n, generator=g) < 0.3
    return case
