"""Results as people read them."""

from __future__ import annotations

from typing import Any

_RATES = {
    "ca": "clean accuracy (CA)",
    "asr_nontarget": "attack success, other classes",
    "asr_all": "attack success, all images",
    "triggered_accuracy": "accuracy under trigger",
    "baseline_asr": "baseline ASR",
}
_OLD = {
    "reference_ca": "CA, reference",
    "old_images": "CA, its images, the model's texts",
    "old_texts": "CA, the model's images, its texts",
}


def evaluation_table(figures: dict[str, Any]) -> str:
    """An evaluation's figures, one a line, in percent with 95 % intervals and n."""
    lines = [_line(label, figures[key]) for key, label in _RATES.items() if key in figures]
    for key, when in (("retrieval", "clean"), ("triggered_retrieval", "triggered")):
        for way, recalls in figures.get(key, {}).items():
            name = f"{way.replace('_', ' ')}, {when}"
            lines += [_line(f"R@{k} {name}", found) for k, found in recalls.items()]
    if "drift" in figures:
        drift = figures["drift"]
        for tower in ("image", "text"):
            value = drift[tower]["value"]
            lines.append(f"{f'drift, {tower}':<36} {value:6.3f}  of 4 (mean squared distance)")
        lines.append(f"{'drift, image CKA':<36} {drift['image_cka']:6.3f}  of 1")
        lines += [_line(label, drift[key]) for key, label in _OLD.items()]
    return "\n".join(lines)


def info_text(info: dict[str, Any], triggers: dict[str, str]) -> str:
    """``build_info`` and the triggers, indented."""
    lines: list[str] = []
    _nested(info, 0, lines)
    width = max(map(len, triggers))
    lines.append("triggers:")
    lines += [f"  {name:<{width}}  {about}" for name, about in triggers.items()]
    return "\n".join(lines)


def _line(label: str, found: dict[str, float]) -> str:
    return (
        f"{label:<36} {found['value']:6.1%}  [{found['low']:.1%}, {found['high']:.1%}]"
        f"  n = {found['n']}"
    )


def _nested(values: dict[str, Any], depth: int, lines: list[str]) -> None:
    for key, value in values.items():
        if isinstance(value, dict):
            lines.append(f"{'  ' * depth}{key}:")
            _nested(value, depth + 1, lines)
        else:
            shown = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else value
            lines.append(f"{'  ' * depth}{key}: {shown}")
