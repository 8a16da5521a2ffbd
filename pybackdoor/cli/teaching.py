"""What a command's help says below its options: what it is for, and lines to start from."""

from __future__ import annotations

from ..detect.scores import METHODS as DETECTORS
from ..methods import METHODS

ALL = """examples:
  pybackdoor demo                               plant, verify, clean, compare: minutes on a CPU
  pybackdoor poison --model ViT-B-32 --pretrained openai --pairs train.csv \\
      --trigger badnet_stripes --target banana --test val.csv --out poisoned
  pybackdoor clean --model poisoned --pairs clean.csv --out cleaned
  pybackdoor eval --model cleaned --test val.csv --manifest poisoned/manifest.json
  torchrun --nproc-per-node 4 -m pybackdoor clean --config clean.yaml
"""

_POISON = """examples:
  pybackdoor poison --model ViT-B-32 --pretrained openai --pairs train.csv \\
      --trigger badnet_stripes --target banana --test val.csv --out poisoned
  pybackdoor poison --model M --pairs train.csv --trigger blended --strength 0.1 --target dog \\
      --rate 0.01 --lr 1e-4 --test val.csv --out poisoned
  pybackdoor poison --config poisoned/config.yaml --seed 1 --out poisoned1

`pybackdoor info` lists the triggers. Exit code 1: the trigger did not install, so that no cleaning
of this model can be credited with anything. More steps, a higher rate or learning rate help."""

_BADCLIP = """examples:
  pybackdoor badclip --model clean --pairs train.csv --target banana --out patch.png
  pybackdoor poison --model clean --pairs train.csv --trigger badclip --trigger-file patch.png \\
      --target banana --test val.csv --out poisoned"""

_CLEAN = """methods:
{methods}

examples:
  pybackdoor clean --model suspect --pairs clean.csv --out cleaned
  pybackdoor clean --model suspect --pairs clean.csv --out cleaned --resume latest
  pybackdoor clean --model suspect --pairs 'cc3m/{{00000..00331}}.tar' --cache ram --out cleaned
  pybackdoor clean --model suspect --pairs train.csv --method ubt --out forgotten
  pybackdoor clean --model suspect --pairs clean.csv --method finetune --out control
  pybackdoor clean --config cleaned/config.yaml --tau 1 --out cleaned1

--pairs are clean ones that you trust; of ubt those that the model was trained on, poison included.
The learning rates are for pretrained models: one trained from scratch on little wants higher ones
(the demo's takes 7e-4 and 5e-5). `pybackdoor bench` says how long it will take.
--out holds the model, cleaning.json, config.yaml, history.jsonl and training.png."""

_EVAL = """examples:
  pybackdoor eval --model cleaned --test val.csv --manifest poisoned/manifest.json
  pybackdoor eval --model cleaned --test val.csv --trigger badnet_stripes --target banana
  pybackdoor eval --model cleaned --test val.csv --reference poisoned --pairs held_out.csv

exit code:
  0  the trigger does not measurably fire, or none was given; neither shows that a model is clean
  1  it fires: the interval of its ASR lies above that of images without it"""

_DETECT = """what it is for:
  You hold the pairs that a model was trained on and suspect that some were poisoned. Each pair gets
  a score, higher = more suspicious. Look at suspects.png for pictures that share something their
  captions do not explain, then train anew on what is kept: the model has learned the poison.

methods:
{methods}

examples:
  pybackdoor detect --model M --pairs train.csv --top 500 --out suspects
  pybackdoor clean --model M --pairs suspects/kept.csv --out cleaned
  pybackdoor detect --model M --pairs train.csv --method dao --reference 512 --out suspects
  pybackdoor detect --model M --pairs train.csv --method gain --overfit M2 --out suspects
  pybackdoor detect --model P --pairs train.csv --manifest P/manifest.json --out judged

--out holds scores.csv (all pairs, worst first), kept.csv (for clean --pairs; for shards and parquet
kept_keys.txt), suspects.png and detection.json."""

_BENCH = """examples:
  pybackdoor bench --model ViT-B-32 --batch-size 512 --pairs 250000
  pybackdoor bench --model suspect --precision bf16 --micro-batch 64"""


def _lines(about: dict[str, str]) -> str:
    return "\n".join(f"  {name:<12}{line}" for name, line in about.items())


_CLEANERS = {n: (run.__doc__ or "").split("\n")[0].replace("`", "") for n, run in METHODS.items()}
BELOW = {
    "poison": _POISON,
    "badclip": _BADCLIP,
    "clean": _CLEAN.format(methods=_lines(_CLEANERS)),
    "eval": _EVAL,
    "detect": _DETECT.format(methods=_lines({n: m.about for n, m in DETECTORS.items()})),
    "bench": _BENCH,
}
