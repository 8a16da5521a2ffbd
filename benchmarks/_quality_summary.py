"""What the quality matrix says of each defence: a table, and sentences that follow from it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from _quality_cells import INSTALLED
from _quality_defences import DEFENCES, NONE, TAUS
from _quality_setting import CLEAN, TUNING
from _tables import table

GONE = 0.1  # an ASR up to this is called removed
CHEAP = 0.03  # so is a loss of CA up to this: three points
SWEPT = tuple(f"par_tau_{tau}" for tau in TAUS)  # no choice of theirs was made on the tuning half
NEAR = 0.05  # ASRs that differ by less are not told apart: seeds differ by as much
HAVE = {
    "held_out": "clean pairs",
    "suspect": "the suspect training pairs alone",
    "procedural": "no pairs at all (procedural ones)",
}
INTRODUCTION = """Over the attacks that no setting was chosen on: means over attacks and seeds, the
attack that each defence does worst on, how many attacks it brings to an ASR of at most {gone:.0%},
and what it costs in points of CA on poisoned models and on the clean one (control). {seeds}"""
ONE_SEED = "One seed: differences of a few points may be chance."


class Standing(NamedTuple):
    """One defence over the untouched attacks of one data set and architecture.

    Attributes:
        asr: mean over attacks of the seeds' means, as ca_loss and rebound, in [0, 1].
        worst: the attack that is left with the highest ASR, worst_asr.
        gone: attacks whose ASR is at most GONE, of ``attacks``.
        control: loss of CA on the clean model, or None.
        seconds: of one core, a mean over all.
    """

    defence: str
    asr: float
    worst: str
    worst_asr: float
    gone: int
    attacks: int
    ca_loss: float
    control: float | None
    rebound: float
    seconds: float


def standings(groups: dict[tuple[str, str], list[dict]]) -> list[Standing]:
    """Of the defences that met every untouched attack, in every seed, that NONE's rows have.

    Args:
        groups: the rows of one data set and architecture by attack and defence.
    """
    rows: dict[str, dict[str, dict[int, dict]]] = {}  # by defence, attack and seed
    for (attack, defence), all_ in groups.items():
        if attack not in (CLEAN, *TUNING):
            found = {row["seed"]: row for row in installed(all_)}
            rows.setdefault(defence, {}).setdefault(attack, found)
    before = {attack: own for attack, own in rows.get(NONE, {}).items() if own}
    complete = [
        defence for defence in DEFENCES
        if before and defence in rows
        and all(set(own) <= set(rows[defence].get(attack, ())) for attack, own in before.items())
    ]  # fmt: skip
    return [_standing(defence, rows[defence], before) for defence in complete]


def installed(rows: Iterable[dict]) -> list[dict]:
    """Of seeds whose attack was there to be removed."""
    return [row for row in rows if row["status"] == INSTALLED]


def ca_loss(row: dict, none: dict) -> float:
    """What a defence cost its own model, which a row of earlier code shares with no other row.

    Args:
        none: the row without a defence, which stands in where the model's own CA is not in the row.
    """
    before = row.get("drift", {}).get("reference_ca", none["ca"])
    return before["value"] - row["ca"]["value"]


def _standing(
    defence: str, rows: dict[str, dict[int, dict]], before: dict[str, dict[int, dict]]
) -> Standing:
    def per_attack(of: Callable[[dict, dict], float]) -> dict[str, float]:
        """Each attack's mean over seeds."""
        return {
            attack: mean(of(rows[attack][seed], old) for seed, old in seeds.items())
            for attack, seeds in before.items()
        }

    asr = per_attack(lambda row, old: row["asr_nontarget"]["value"])
    worst = max(asr, key=asr.__getitem__)
    losses = [
        row["control_ca_loss"] for attack, seeds in before.items()
        for row in (rows[attack][seed] for seed in seeds) if row["control_ca_loss"] is not None
    ]  # fmt: skip
    return Standing(
        defence=defence,
        asr=mean(asr.values()),
        worst=worst,
        worst_asr=asr[worst],
        gone=sum(value <= GONE for value in asr.values()),
        attacks=len(before),
        ca_loss=mean(per_attack(ca_loss).values()),
        control=mean(losses) if losses else None,
        rebound=mean(per_attack(lambda row, old: row["rebound"]["highest"]).values()),
        seconds=mean(per_attack(lambda row, old: row["cpu_seconds"]).values()),
    )


def mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found)


def summary(groups: dict[tuple[str, str], list[dict]]) -> str | None:
    """The table and what follows from it; None where fewer than two defences are complete."""
    found = standings(groups)
    if len(found) < 2:
        return None
    header = ["defence", "ASR", "worst", f"ASR <= {100 * GONE:.0f}", "CA loss", "control"]
    parts = [
        INTRODUCTION.format(gone=GONE, seeds=_seeds(groups)).strip(),
        table([*header, "rebound", "seconds"], map(_line, found)),
        *_advice([one for one in found if one.defence not in (NONE, *SWEPT)]),
    ]
    left = _left(groups, [one.defence for one in found if one.defence not in SWEPT])
    return "\n\n".join([*parts, *left])


def _seeds(groups: dict[tuple[str, str], list[dict]]) -> str:
    count = max(len({row["seed"] for row in rows}) for rows in groups.values())
    return ONE_SEED if count == 1 else f"Up to {count} seeds."


def _line(one: Standing) -> list[str]:
    return [
        one.defence,
        f"{100 * one.asr:.1f}",
        f"{one.worst} {100 * one.worst_asr:.1f}",
        f"{one.gone} of {one.attacks}",
        f"{100 * one.ca_loss:.1f}",
        "-" if one.control is None else f"{100 * one.control:.1f}",
        f"{100 * one.rebound:.1f}",
        f"{one.seconds:.0f}",
    ]


def _advice(found: list[Standing]) -> list[str]:
    """Which to take with what one has: the lowest mean ASR, and the lowest that is cheap."""
    lines = []
    for pairs, words in HAVE.items():
        own = [one for one in found if DEFENCES[one.defence].pairs == pairs]
        if not own:
            continue
        best = min(own, key=lambda one: one.asr)
        line = f"- With {words}: **{best.defence}** leaves the lowest mean ASR, {_cost(best)}"
        cheap = [one for one in own if one.ca_loss <= CHEAP]
        if best not in cheap and cheap:
            other = min(cheap, key=lambda one: one.asr)
            line += (
                f"; of those that cost at most {100 * CHEAP:.0f} points of CA it is"
                f" **{other.defence}**, {_cost(other)}"
            )
        near = [one for one in own if one is not best and one.asr <= best.asr + NEAR]
        if near:
            named = ", ".join(f"{one.defence} {_cost(one)}" for one in near)
            line += f". Within {100 * NEAR:.0f} points of it: {named}"
        lines.append(f"{line}.")
    return ["\n".join(lines)] if lines else []


def _cost(one: Standing) -> str:
    return f"{100 * one.asr:.1f} %, at {100 * one.ca_loss:.1f} points of CA"


def _left(groups: dict[tuple[str, str], list[dict]], defences: list[str]) -> list[str]:
    """The attacks that no defence removes, with the best of each: weaknesses are not hidden."""
    words = []
    for attack in dict.fromkeys(attack for attack, _ in groups if attack != CLEAN):
        asr = {
            defence: mean(row["asr_nontarget"]["value"] for row in judged)
            for defence in defences
            if (judged := installed(groups.get((attack, defence), ())))
        }
        if set(asr) - {NONE} and min(asr.values()) > GONE:
            best = min(asr, key=asr.__getitem__)
            words.append(f"{attack} (lowest: {100 * asr[best]:.1f} % by {best})")
    if not words:
        return []
    return [f"No defence brings these attacks to {100 * GONE:.0f} %: {', '.join(words)}."]


def chosen_settings(tuning: dict[str, Any]) -> str:
    """The candidates that settings were chosen from, as tune_quality.py left them."""
    header = ["defence", "candidate", "CA loss", "ASR", "seconds", "chosen"]
    return table(header, map(candidate, tuning["candidates"]))


def candidate(one: dict[str, Any]) -> list[str]:
    options = ", ".join(f"{name} {_number(value)}" for name, value in one["options"].items())
    figures = [f"{100 * one[name]:.1f}" for name in ("ca_loss", "asr")]
    taken = "chosen" if one["chosen"] else ""
    return [one["defence"], options, *figures, f"{one['cpu_seconds']:.0f}", taken]


def _number(value: Any) -> str:
    return f"{value:.2g}" if isinstance(value, float) else str(value)
