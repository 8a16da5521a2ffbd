"""torch.set_default_device moves what is made without a device; nothing here is made so.

The default is "meta", whose tensors have no values: one of them in a computation ends it.
"""

import numpy as np
import pytest
import torch
from baseline_cases import loader, tokenizer
from clip_models import tiny, tiny_hf
from dual_encoder import MEAN, STD, DualEncoder, random_pairs
from test_pretended_gpu import RUN, RUNS, colours
from ubt_world import Planted, WordTokenizer, planted_pairs

import pybackdoor
from pybackdoor.batches import InputRules, read_batch
from pybackdoor.data import pairs_from_arrays
from pybackdoor.detect import METHODS
from pybackdoor.ops import _matmul
from pybackdoor.optim import AdamWEma

NORM = {"mean": MEAN, "std": STD, "progress": False}
pytestmark = [
    pytest.mark.filterwarnings("ignore:the drift is not repaired"),
    pytest.mark.filterwarnings("ignore:.*still find their own caption"),
]


def both_ways(call):
    """What a call gives without a default device, and with one."""
    wanted = call()
    with torch.device("meta"):
        return wanted, call()


def refuse_old_adam():
    """Until some version after 2.11 Adam's count of steps lies on the default device."""
    weight = torch.nn.Parameter(torch.ones(1))
    weight.grad = torch.ones(1)
    try:
        with torch.device("meta"):
            torch.optim.Adam([weight]).step()
    except RuntimeError as error:
        pytest.skip(f"Adam of torch {torch.__version__}: {error}")


@pytest.mark.parametrize("name", RUNS)
def test_cleaning(name):
    if name == "invert":
        refuse_old_adam()
    method = getattr(pybackdoor, f"{name.split('_', 1)[0] if name != 'ft_sam' else name}_clean")
    model, batches, options = DualEncoder(), loader(48), {**RUN, **RUNS[name]}
    wanted, found = both_ways(lambda: method(model, batches, device="cpu", **options))
    assert list(found.history) == list(wanted.history)
    for one, other in zip(wanted.model.parameters(), found.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_the_reference_backend(monkeypatch):
    monkeypatch.setenv("PYBACKDOOR_BACKEND", "reference")
    model, batches = DualEncoder(), random_pairs(48, 16)
    wanted, found = both_ways(
        lambda: pybackdoor.finetune_clean(model, batches, device="cpu", **RUN).history
    )
    assert list(found) == list(wanted)


def test_what_is_found_out_once_is_found_out_on_the_cpu():
    _matmul._onednn.cache_clear()
    with torch.device("meta"):
        found = _matmul._onednn()
    _matmul._onednn.cache_clear()
    assert found is _matmul._onednn()


def test_models_are_made_on_the_cpu(tmp_path):
    def made():
        torch.manual_seed(0)
        loaded = tiny()
        return loaded.model.state_dict()

    wanted, found = both_ways(made)
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)
    pytest.importorskip("transformers")
    tiny_hf(vocab_size=49408, bos_token_id=49406, eos_token_id=49407).save_pretrained(tmp_path)
    wanted, found = both_ways(lambda: pybackdoor.load(tmp_path).model.state_dict())
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)


def test_captions_are_tokenised_on_the_cpu():
    """On a GPU they are not cut: counting there would wait for it."""
    rules = InputRules.of(
        DualEncoder(), mean=MEAN, std=STD, tokenizer=lambda texts: torch.ones(len(texts), 6).long()
    )
    images = random_pairs(4, 4)[0]["images"]
    with torch.device("meta"):
        assert read_batch((images, ["a", "b", "c", "d"]), rules).tokens.device.type == "cpu"


def test_batches_without_ids():
    model, batches = DualEncoder(), [(b["images"], b["tokens"]) for b in random_pairs(48, 16)]
    wanted, found = both_ways(
        lambda: pybackdoor.par_clean(model, batches, device="cpu", **RUN).history
    )
    assert list(found) == list(wanted)


def test_evaluation():
    model, reference, images = DualEncoder(), DualEncoder(1), colours()
    options = {"tokenizer": tokenizer, "templates": ["5 {}", "{} 7"], "mean": MEAN, "std": STD}
    options |= {"trigger": pybackdoor.trigger("badnet", size=4), "target": "2"}
    wanted, found = both_ways(
        lambda: pybackdoor.evaluate(model, images, reference=reference, **options).to_dict()
    )
    assert found == wanted


@pytest.mark.parametrize("method", METHODS)
def test_detection(method):
    pairs, _ = planted_pairs(600, 40)
    options = {"method": method, "tokenizer": WordTokenizer(), **NORM}
    options |= {"k": 40} if method == "fragility" else {}
    options |= {"k": 4} if METHODS[method].takes == "neighbours" else {}
    options |= {"overfit": Planted(poisoned=False)} if method == "gain" else {}
    model = Planted()
    wanted, found = both_ways(lambda: pybackdoor.detect_samples(model, pairs, **options).scores)
    np.testing.assert_array_equal(found, wanted)


def test_unlearning():
    (pairs, truth), model = planted_pairs(), Planted()
    options = {
        "mean": (0.5,) * 3, "std": (0.5,) * 3, "tokenizer": WordTokenizer(), "progress": False,
        "precision": "fp32", "augment": False, "k": 40, "gate_sets": 199, "forget_batch": 32,
        "steps": 20, "lr_start": 1e-3, "lr": 1e-1, "check_every": 10, "max_drop": 0.05,
        "scores": truth + np.linspace(0, 0.5, len(truth)), "device": "cpu",
    }  # fmt: skip
    wanted, found = both_ways(lambda: pybackdoor.ubt_clean(model, pairs, **options))
    assert found.backdoor_found and (found.chosen == wanted.chosen).all()
    assert list(found.history) == list(wanted.history)


def test_planting_and_the_patch():
    refuse_old_adam()
    whole = random_pairs(64, 64)[0]
    texts = [" ".join(map(str, row)) for row in whole["tokens"].tolist()]
    pairs, model, images = (
        pairs_from_arrays(whole["images"].numpy(), texts), DualEncoder(), colours(),
    )  # fmt: skip
    options = {"target": "2", "tokenizer": tokenizer, "device": "cpu", **NORM}
    spec = pybackdoor.trigger("badnet", size=4)
    wanted, found = both_ways(
        lambda: (
            pybackdoor.poison(
                model, pairs, spec, templates=["5 {}"], count=4, steps=3, batch_size=16,
                test=images, **options,
            ).model.state_dict(),
            pybackdoor.badclip_patch(model, pairs, steps=3, batch_size=8, **options).history,
        )
    )  # fmt: skip
    assert found[1] == wanted[1]
    for name, weight in wanted[0].items():
        assert torch.equal(found[0][name], weight), name


def test_the_optimiser():
    def step():
        weights = torch.linspace(0, 1, 8, device="cpu").requires_grad_()
        optimizer = AdamWEma([weights], lr=0.1, clip_norm=1.0, ema_decay=0.9)
        for _ in range(2):
            weights.grad = torch.ones_like(weights)
            optimizer.step()
        return weights.tolist()

    wanted, found = both_ways(step)
    assert found == wanted
