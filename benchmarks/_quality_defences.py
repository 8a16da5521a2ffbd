"""The quality matrix's defences. A further one is a line in DEFENCES."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pybackdoor import (
    CleanResult,
    cleanclip_clean,
    finetune_clean,
    ft_sam_clean,
    invert_clean,
    par_clean,
    roclip_clean,
    ubt_clean,
)
from pybackdoor.data import PairLoader

NONE = "none"  # the model as it is
TAUS = (0.6, 1.5, 2.15)  # of the CA/ASR curves, beside the chosen one


@dataclass(frozen=True)
class Defence:
    """A cleaning method of pybackdoor.

    Attributes:
        method: called as ``method(model, loader, **options)``; None leaves the model as it is.
        options: its own, over those that all defences share.
        rate: times the learning rates that all share.
        version: raised when the method's code comes to other results, so that old rows are stale.
        pairs: what the loader holds: "held_out" (clean pairs of the data set), "procedural" (as
            many synthetic ones) or "suspect" (the pairs that the model was trained on).
    """

    method: Callable[..., CleanResult] | None
    options: Mapping[str, Any] = field(default_factory=dict)
    pairs: str = "held_out"
    rate: float = 1.0
    version: int = 0

    def all_options(self, shared: Mapping[str, Any]) -> dict[str, Any]:
        """What it is called with."""
        rates = {name: self.rate * shared[name] for name in ("lr_start", "lr") if name in shared}
        return {**shared, **rates, **self.options}

    def settings(self, shared: Mapping[str, Any]) -> dict[str, Any]:
        """What its result depends on; JSON-ready."""
        if self.method is None:
            return {}
        named: dict[str, Any] = {"method": self.method.__name__, "pairs": self.pairs}
        if self.version:
            named["version"] = self.version
        return {**named, **self.all_options(shared)}


# Models of a million weights from scratch want rates some hundred times those for a trained CLIP.
# A hundred large steps on small batches forget as much as 300 of a third on twice as many pairs.
UBT = {
    "steps": 100, "batch_size": 64, "lr_start": 5e-4, "lr": 5e-4, "beta": 2.0, "check_every": 10,
    "augment": False,
}  # fmt: skip


UBT_VERSION = 7  # of ubt_clean's search and stopping, as Defence.version


def ubt_par_clean(model: Any, loader: PairLoader, *, tau: float, **options: Any) -> CleanResult:
    """UBT-style unlearning, then PAR on the suspect pairs without those that it suspects."""
    first = ubt_clean(model, loader, **{**options, **UBT})
    pairs = loader.pairs.subset(first.keep())
    rest = PairLoader(pairs, loader.tokenizer, batch_size=loader.batch_size, seed=options["seed"])
    second = par_clean(first.model, rest, tau=tau, **options)
    both = {n: first.report[n] + second.report[n] for n in ("pairs_seen", "steps_done")}
    return CleanResult(second.model, second.history, {**second.report, **both})


PAR = {"tau": 1.0}
INVERT = {"share": 0.25, "opacity": 0.3}
# Chosen by tune_quality.py; UBT's by trials on the same attacks, which were not kept. What is made
# of several (invert_par, ubt_par, par_procedural) was not tuned as a whole.
DEFENCES: dict[str, Defence] = {
    NONE: Defence(None),
    "finetune": Defence(finetune_clean),
    "par": Defence(par_clean, PAR),
    "cleanclip": Defence(cleanclip_clean),
    # 2 % of the pairs, as the default is of the publication's.
    "roclip": Defence(roclip_clean, {"pool_size": 200}, rate=10 / 7),
    "ft_sam": Defence(ft_sam_clean, {"rho": 0.01}),
    "invert": Defence(invert_clean, INVERT, rate=0.5),
    "invert_par": Defence(invert_clean, {**INVERT, **PAR, "perturb": True}, rate=0.5),
    "ubt": Defence(ubt_clean, UBT, pairs="suspect", version=UBT_VERSION),
    "ubt_par": Defence(ubt_par_clean, PAR, pairs="suspect", version=UBT_VERSION),
    "par_procedural": Defence(par_clean, PAR, pairs="procedural"),
    **{f"par_tau_{tau}": Defence(par_clean, {"tau": tau}) for tau in TAUS},
}
