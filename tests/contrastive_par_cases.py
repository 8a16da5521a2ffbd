"""Random problems of contrastive_par, and every stage's tensors."""

import contrastive_par_stages as oracle
import torch

from pybackdoor.ops._contrastive_par_problem import Problem

ACC = {torch.float64: torch.float64}  # of the other dtypes: float32
# (M, N, D): no negatives; least D; odd and fewer images; tail lanes; beyond one tile of rows.
SIZES = [(1, 1, 1), (2, 2, 64), (3, 5, 31), (12, 5, 130), (129, 129, 512)]


def acc_of(dtype):
    return ACC.get(dtype, torch.float32)


def random_problem(
    rows,
    images,
    features,
    *,
    dtype=torch.float32,
    seed=0,
    scale=100.0,
    around=(0, 0),
    normalize=True,
    refs=True,
    far=False,
    stretch=1.0,
    device="cpu",
):
    """Mixed weights, invalid and suspect images, rows without length, and nearly so.

    around: numbers of other ranks' images, before and after this rank's.
    far: all features alike but for the sign of text and image, so that all cosines are near -1.
    stretch: length of the rows without normalize; above 1, E overflows.
    """
    g = torch.Generator().manual_seed(seed)
    acc, columns = acc_of(dtype), around[0] + images + around[1]

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    def uniform(*shape):
        return torch.rand(*shape, generator=g, dtype=torch.float64)

    if rows == images:
        owner = torch.arange(images)
    else:
        owner = torch.randint(images, (rows,), generator=g).sort().values
    segment = torch.zeros(images + 1, dtype=torch.int64)
    segment[1:] = torch.bincount(owner, minlength=images).cumsum(0)
    image = normal(images, features)
    text = normal(rows, features) + image[owner]
    if far:
        image, text = 0.3 * image - 9, 0.3 * text + 9
    elif rows > 3:
        text[rows // 2] = 0
        image[-1] = 0
        text[0] *= 1e-14
    if not normalize:
        text, image = (
            stretch * x / x.norm(dim=1, keepdim=True).clamp_min(1e-6) for x in (text, image)
        )
    unit = [torch.nn.functional.normalize(x + 0.3 * normal(*x.shape), dim=1) for x in (text, image)]

    bits = (uniform(columns) > 0.1) * oracle.VALID | (uniform(columns) < 0.2) * oracle.SUSPECT
    valid = (bits & oracle.VALID) != 0
    weight = (uniform(rows) + 0.1) * torch.where(uniform(rows) < 0.25, -1, 1) / max(rows, 1)
    weight *= (uniform(rows) > 0.15) & valid[around[0] + owner]
    column_weight = (uniform(columns) + 0.1) / columns * (uniform(columns) > 0.15) * valid
    problem = Problem(
        text.to(dtype),
        image.to(dtype),
        unit[0].to(dtype) if refs else None,
        unit[1].to(dtype) if refs else None,
        owner.int(),
        segment.int(),
        weight.to(acc),
        column_weight.to(acc),
        bits.to(torch.uint8),
        torch.tensor(scale, dtype=acc),
        normalize,
        around[0],
    )
    return Problem(*(t.to(device) if isinstance(t, torch.Tensor) else t for t in problem))


def double(value):
    """The same in fp64: a tensor, a problem, or a dictionary of tensors."""
    if isinstance(value, dict):
        return {name: double(t) for name, t in value.items()}
    if isinstance(value, Problem):
        return Problem(*(double(t) if isinstance(t, torch.Tensor) else t for t in value))
    value = value.cpu()
    return value.double() if value.is_floating_point() else value.clone()


def shapes(p, matrix):
    """Shape and dtype of every tensor that stages pass on, but for partials and gradients."""
    m, n, a, d = len(p.text), len(p.image), len(p.bits), p.text.shape[1]
    acc = p.scale.dtype
    sizes = {"inv_text": m, "inv_image": n, "target": m, "dist_text": m, "dist_image": n}
    sizes |= {"r": m, "c": a, "log_p": a, "row_lse": m, "col_lse": a, "alpha": m, "beta": a}
    sizes |= {"coef": m, "row_fix": m, "col_fix": a, "loss_row": m, "loss_col": n}
    sizes |= {"dot_text": m, "dot_image": n, "total": 5, "stats": 6}
    table = {name: ((size,), acc) for name, size in sizes.items()}
    table |= {"that": ((m, d), matrix), "ihat": ((n, d), matrix), "all_ihat": ((a, d), matrix)}
    table |= {"d_text": ((m, d), p.text.dtype), "d_image": ((n, d), p.text.dtype)}
    table |= {"g_text": ((m, d), acc), "g_image": ((a, d), acc)}
    return table | {"flagged": ((2,), torch.int32)}


def blank(p, matrix, names):
    """Tensors full of 7, which every stage overwrites."""
    table = shapes(p, matrix)
    return {
        name: torch.full(*table[name][:1], 7, dtype=table[name][1], device=p.text.device)
        for name in names
    }


def all_images(p, ihat, seed=1):
    """Unit rows of all ranks' images [A, D], of which ihat are this rank's."""
    g = torch.Generator().manual_seed(seed)
    full = torch.randn(len(p.bits), ihat.shape[1], generator=g, dtype=torch.float64)
    full = torch.nn.functional.normalize(full + 2 * ihat.double().nanmean(0), dim=1)
    full[p.offset : p.offset + len(ihat)] = ihat.double()
    return full.to(ihat.dtype)


def oracle_state(p, *, distance_weight=0.5, tau=2.15, grad=0.7):
    """All stages of the oracle in fp64, in turn: a dictionary of every tensor."""
    acc, p = p.scale.dtype, double(p)
    s = blank(p, torch.float64, shapes(p, torch.float64))
    m, n, a = len(p.text), len(p.image), len(p.bits)
    own = slice(p.offset, p.offset + n)
    oracle.prep(
        *(p, s["that"], s["ihat"], s["inv_text"], s["inv_image"], s["target"]),
        *(s["dist_text"], s["dist_image"], s["flagged"]),
    )
    s["all_ihat"] = all_images(p, s["ihat"])
    s["e"] = torch.empty(m, a, dtype=torch.float64)
    s["row_partial"], s["col_partial"] = torch.empty_like(s["r"])[None], s["c"][None].clone()
    oracle.exp_block(p, s["that"], s["all_ihat"], 0, s["e"], s["row_partial"], s["col_partial"])
    s["log_p"].fill_(-1.5)  # as if of other ranks
    oracle.sums(
        *(p, s["row_partial"], s["col_partial"], s["target"], s["r"], s["c"], s["log_p"][own])
    )
    s["r"], s["c"] = s["r"].to(acc).double(), s["c"].to(acc).double()  # inf beyond its range
    oracle.lse(p, s["that"], s["all_ihat"], s["r"], s["c"], s["row_lse"], s["col_lse"])
    oracle.finalise(
        *(p, s["target"], s["r"], s["c"], s["log_p"], s["row_lse"], s["col_lse"]),
        *(s["alpha"], s["beta"], s["coef"], s["row_fix"], s["col_fix"]),
        *(s["loss_row"], s["loss_col"], s["flagged"]),
    )
    oracle.totals(p, s["loss_row"], s["loss_col"], s["dist_text"], s["dist_image"], s["total"])
    oracle.close(s["total"], distance_weight, tau, s["stats"])
    oracle.gradients(p, s["that"], s["all_ihat"], s["alpha"], s["beta"], s["g_text"], s["g_image"])
    s["grad"] = torch.tensor(grad, dtype=torch.float64)
    return s
