"""Writes docs/results.md from the files in benchmarks/results/.

python benchmarks/make_results_page.py
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from _common import OURS
from _results import Document, load_all
from _tables import every_row, machine_line, ratios, verdict_lines
from _targets import TARGETS, Target, Verdict, judge

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "results.md"
KERNELS = {
    "trigger_normalize": "uint8 images to model input in one pass: trigger, 8 bits, noise and "
    "erasing, normalisation, layout. Rows: `benchmarks/bench_trigger_normalize.py`.",
    "contrastive_par": "CLIP's contrastive loss and PAR's distance term, forward and backward, "
    "from raw features. Rows: `benchmarks/bench_contrastive_par.py`.",
    "adamw_ema": "One AdamW step with unscaling, clipping, the moving average of the weights and "
    "their bf16 copy. Rows: `benchmarks/bench_adamw_ema.py`.",
    "clean": "A whole cleaning run, files to a cleaned and evaluated model, in ms per 1,000 pairs. "
    "Rows: `benchmarks/bench_clean.py`.",
    "step": "One PAR training step of ViT-B/32, batch 512. Rows: `benchmarks/bench_step.py`.",
    "decode": "JPEG files to images of the model's size in the host's memory; errors are of the "
    "images, against Pillow's. Rows: `benchmarks/bench_decode.py`.",
    "dispatch": "What a call costs beside its kernels. Rows: `benchmarks/bench_dispatch.py`.",
    "ceiling": "What the device can do at most. Rows: `benchmarks/bench_ceilings.py`.",
}
INTRODUCTION = f"""# Results

Written by `python benchmarks/make_results_page.py` from the files in `benchmarks/results/`; do not
edit. Times are medians in milliseconds of runs interleaved in one process, lower is better. A ratio
says how many times {OURS}'s time a provider takes, in the same setting and process; one below 1,
where the other is faster, is bold. Providers named `*_graph` are replayed from a CUDA graph and
compared with {OURS}'s replay; what each provider is, the head of its benchmark says. Errors are
relative, against fp64. Targets for a GPU are stated for an H100."""


def document_part(document: Document, kernel: str) -> str:
    """Ratios and rows of one kernel in one file; empty where it has none."""
    rows = [r for r in document.rows if _kernel(r) == kernel]
    if not rows:
        return ""
    parts = [f"### {machine_line(document.machine)}", f"From `benchmarks/results/{document.name}`."]
    load = document.machine.get("load_average")
    if load:
        parts.append(f"Load average at the start: {load[0]:.2f}.")
    parts += document.notes
    if any(r["provider"] != OURS for r in rows) and kernel != "ceiling":
        parts.append(ratios(rows))
    return "\n\n".join(
        [*parts, "<details><summary>All rows</summary>", every_row(rows), "</details>"]
    )


def _kernel(row: dict) -> str:
    return "dispatch" if row.get("case") == "dispatch" else row["kernel"]


def best_verdict(target: Target, documents: list[Document]) -> Verdict:
    """The verdict of the newest file that measured the target."""
    newest = sorted(documents, key=lambda d: d.machine.get("date", ""), reverse=True)
    found = [judge(target, d.rows) for d in newest]
    return next((v for v in found if v.measured), judge(target, []))


def page(documents: list[Document]) -> str:
    """The whole page."""
    parts = [INTRODUCTION]
    for kernel, words in KERNELS.items():
        parts += [f"## {kernel}", words]
        targets = [t for t in TARGETS if t.kernel == kernel]
        for device, name in (("cpu", "CPU"), ("cuda", "GPU")):
            verdicts = [best_verdict(t, documents) for t in targets if t.device == device]
            if verdicts:
                parts += [f"### Targets, {name}", verdict_lines(verdicts, "not yet measured")]
        found = [p for d in documents if (p := document_part(d, kernel))]
        parts += found or ["Not yet measured."]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page(load_all(ROOT / "benchmarks" / "results")))
    print(PAGE)


if __name__ == "__main__":
    main()
