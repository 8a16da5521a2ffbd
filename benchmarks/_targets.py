"""What the kernels are meant to reach, and whether rows show it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

from _common import OURS
from _results import by_setting, ours_in, ratio

K1, K2, K3 = "trigger_normalize", "contrastive_par", "adamw_ema"
CLEAN = "clean"
MET, MISSED, NOT_MEASURED = "met", "missed", "not measured"
FAILED = "failed: "  # in the note of a row that should have had a time


class Target(NamedTuple):
    """A bound on our row of one setting.

    Attributes:
        what: "ms" or "bytes", at most; "ratio", at least, against the fastest of `against`.
    """

    kernel: str
    device: str
    mode: str
    shape: str
    dtype: str
    case: str | None
    what: str
    bound: float
    against: tuple[str, ...] = ()
    provider: str = OURS

    def words(self) -> str:
        """The bound in words."""
        if self.what == "ratio":
            return f"≥ {self.bound:g}x {' or '.join(self.against)}"
        if self.what == "less memory":
            return f"≥ {self.bound:g}x less memory than {self.against[0]}"
        if self.what == "bytes":
            return f"peak ≤ {self.bound / 1e9:g} GB"
        graph = " in a graph" if self.provider.endswith("_graph") else ""
        return f"≤ {self.bound:g} ms{graph}"

    def matches(self, row: dict) -> bool:
        """Whether the row is of this setting, of any provider."""
        fields = ("kernel", "device", "mode", "shape", "dtype", "case")
        return all(row.get(f) == getattr(self, f) for f in fields)


class Verdict(NamedTuple):
    """A target, met, missed or not measured, and the figure."""

    target: Target
    status: str
    measured: str


def _k1(device: str, mode: str, batch: int, dtype: str, case: str, what: str, bound, *against):
    shape = f"{batch}x224x224x3"
    return Target(K1, device, mode, shape, dtype, case, what, bound, against)


def _k2(n: int, what: str, bound: float, *against: str, **fields) -> Target:
    return Target(
        K2, "cuda", "full", f"{n}x512", "bfloat16", "clip", what, bound, against, **fields
    )


LCE = ("linear_cross_entropy", "linear_cross_entropy_chunked")
RIVALS = (
    ("eager",),
    ("compile",),
    LCE,
    ("liger",),
    ("cut_cross_entropy",),
    ("memeff",),
    ("inf_cl",),
)
# N: our ms at most, then at least this many times as fast as each rival (stated for an H100).
K2_TABLE = {
    1024: (0.06, 10, 2.5, 6, 6, 4, 3, 6),
    2048: (0.06, 10, 2.5, 6, 6, 4, 3, 6),
    4096: (0.18, 4, 1.8, 2.5, 4, 3, 2.5, 8),
    16384: (1.9, 5, 2.3, 2.3, 3, 3, 3, 8),
    65536: (38, None, 2, 1.8, 2, 2.5, 3, 8),  # eager does not fit into 80 GB
}


def _k2_gpu() -> list[Target]:
    found = []
    for n, (ms, *ratios) in K2_TABLE.items():
        graph = {"provider": f"{OURS}_graph"} if n <= 2048 else {}
        found.append(_k2(n, "ms", ms, **graph))
        found += [
            _k2(n, "ratio", bound, *rival)
            for rival, bound in zip(RIVALS, ratios, strict=True)
            if bound is not None
        ]
    found += [_k2(16384, "bytes", 0.6e9), _k2(65536, "bytes", 1.3e9)]
    return [*found, _k2(65536, "less memory", 20, "compile")]


def _k2_cpu(n: int, what: str, bound: float, *against: str) -> Target:
    return Target(K2, "cpu", "full", f"{n}x512", "float32", "clip", what, bound, against)


TARGETS = [
    *(
        _k1("cpu", "forward", 128, dtype, "blend", "ratio", bound, rival)
        for dtype in ("float32", "bfloat16")
        for rival, bound in (("eager", 50), ("compile", 6))
    ),
    _k1("cpu", "backward", 128, "float32", "blend", "ratio", 8, "eager"),
    _k1("cuda", "forward", 1024, "bfloat16", "blend", "ms", 0.18),
    _k1("cuda", "forward", 1024, "bfloat16", "augment", "ms", 0.25),
    _k1("cuda", "forward", 1024, "bfloat16", "blend", "ratio", 15, "eager"),
    _k1("cuda", "forward", 1024, "bfloat16", "blend", "ratio", 1.2, "compile"),
    _k1("cuda", "backward", 1024, "bfloat16", "blend", "ms", 0.21),
    _k1("cuda", "backward", 1024, "bfloat16", "blend", "ratio", 8, "eager"),
    _k1("cuda", "backward", 1024, "bfloat16", "blend", "ratio", 1.2, "compile"),
    *(
        _k2_cpu(n, "ratio", bound, rival)
        for n in (512, 2048, 4096)
        for rival, bound in (("eager_onednn", 1.6), ("eager", 3.5))
    ),
    _k2_cpu(16384, "bytes", 0.7e9),
    *(
        Target(CLEAN, "cpu", mode, "32x224x224x3", dtype, "ViT-B-32", "ratio", bound, (rival,))
        for dtype in ("float32", "bfloat16")
        for mode, rival, bound in (
            ("train", "published", 1.3),
            ("train", "tuned", 1.1),
            ("run", "published", 3),
            ("run", "tuned", 1.3),
        )
    ),
    *_k2_gpu(),
    *(
        Target(K3, "cuda", "full", "ViT-B-32", "float32", "ema", "ratio", bound, tuple(rivals))
        for bound, *rivals in (  # plain calls with plain calls, replays with replays: both must
            (1.3, "torch_fused", "torch_fused_graph"),
            (2.5, "torch_foreach", "torch_foreach_graph"),
            (1.1, "apex_swa"),
            (0.95, "compile", "compile_graph"),
        )
    ),
]


def judge(target: Target, rows: Iterable[dict]) -> Verdict:
    """The verdict of the first run among the rows that measured what the target asks."""
    for group in by_setting(r for r in rows if target.matches(r)).values():
        ours = group.get(target.provider)
        value = None if ours is None else _value(target, ours, group)
        if value is None:
            note = "" if ours is None else ours.get("note") or ""
            if ours is not None and ours.get("ms_median") is None and FAILED in note:
                return Verdict(target, MISSED, note)
            continue
        met = value >= target.bound if target.against else value <= target.bound
        return Verdict(target, MET if met else MISSED, _words(target, value))
    return Verdict(target, NOT_MEASURED, "")


def _value(target: Target, ours: dict, group: dict[str, dict]) -> float | None:
    if target.what == "ms":
        return ours.get("ms_median")
    if target.what == "bytes":
        return ours.get("peak_bytes")
    rivals = [group[name] for name in target.against if name in group]
    if target.what == "less memory":
        needs = [r["peak_bytes"] for r in rivals if r.get("peak_bytes")]
        return min(needs) / ours["peak_bytes"] if needs and ours.get("peak_bytes") else None
    ratios = [ratio(r, ours_in(group, r["provider"])) for r in rivals]
    return min((r for r in ratios if r is not None), default=None)


def _words(target: Target, value: float) -> str:
    if target.what == "bytes":
        return f"{value / 1e9:.3g} GB"
    if target.what == "ms":
        return f"{value:.3g} ms"
    return "out of memory there" if math.isinf(value) else f"{value:.2f}x"


def verdicts(rows: Iterable[dict], device: str) -> list[Verdict]:
    """A verdict on every target for this kind of device."""
    rows = list(rows)
    return [judge(t, rows) for t in TARGETS if t.device == device]
