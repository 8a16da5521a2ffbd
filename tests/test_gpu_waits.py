"""No step waits for the GPU: what a run waits for does not grow with its steps."""

from collections import Counter

import numpy as np
import pytest
import torch
from baseline_cases import loader, tokenizer
from dual_encoder import MEAN, STD, DualEncoder, random_pairs
from gpu_waits import waits
from pretend_cuda import pretended_gpu  # noqa: F401
from shard_files import samples, write_shard
from test_pretended_gpu import MODELS, captioned, words
from ubt_world import Planted, WordTokenizer, planted_pairs

import pybackdoor
from pybackdoor._native import sent
from pybackdoor.batches import InputRules, model_input
from pybackdoor.data import PairLoader, labelled_from_arrays, pairs_from_arrays, pairs_from_shards
from pybackdoor.data.store import subset_images
from pybackdoor.engine import images
from pybackdoor.features import FeatureReader
from pybackdoor.ops._trigger_normalize_arguments import on_device

pytestmark = [
    pytest.mark.usefixtures("pretended_gpu"),
    pytest.mark.filterwarnings("ignore:the drift is not repaired"),
    pytest.mark.filterwarnings("ignore:.*still find their own caption"),
]
NORM = {"mean": MEAN, "std": STD, "progress": False}
RUN = {**NORM, "precision": "fp32", "lr": 1e-2, "device": "cuda"}


def grown(run, few=4, many=8):
    """What a run of more steps waits for besides; batches are three an epoch."""
    found = []
    for steps in (few, many):
        with waits() as seen:
            run(steps)
        found.append(seen)
    return found[1] - found[0]


@pytest.mark.parametrize(
    ("wait", "what"),
    [
        (lambda x, host: host.to("cuda"), "copy of pageable memory"),
        (lambda x, host: host.to("cuda", non_blocking=True), "copy of pageable memory"),
        (lambda x, host: host.pin_memory().to("cuda"), "copy"),
        (lambda x, host: host.pin_memory().T.to("cuda", non_blocking=True), "copy of pageable"),
        (lambda x, host: x.copy_(host), "copy of pageable memory"),
        (lambda x, host: host.copy_(x), "copy of pageable memory"),
        (lambda x, host: torch.tensor([1.0], device="cuda"), "copy of pageable memory"),
        (lambda x, host: x.cpu(), "copy"),
        (lambda x, host: x.tolist(), "copy"),
        (lambda x, host: x.sum().item(), "_local_scalar_dense"),
        (lambda x, host: bool((x > 0).all()), "_local_scalar_dense"),
        (lambda x, host: x.nonzero(), "nonzero"),
        (lambda x, host: x[x > 0], "mask as index"),
        (lambda x, host: x[torch.tensor([1])], "index of the host"),
        (lambda x, host: torch.cuda.synchronize(), "synchronize"),
    ],
)
def test_what_waits_is_noted(wait, what):
    x, host = torch.ones(3, 4, device="cuda"), torch.ones(3, 4)
    with waits() as found:
        wait(x, host)
    (place,) = found
    assert place.startswith(what) and "test_gpu_waits.py:" in place


def test_what_does_not_wait_is_not_noted():
    x, host = torch.ones(3, 4, device="cuda"), torch.ones(3, 4).pin_memory()
    with waits() as found:
        x.copy_(host, non_blocking=True)
        host.copy_(x, non_blocking=True)
        x[host.to("cuda", non_blocking=True) > 0] = 0.0
        (x + 1).to("cpu", non_blocking=True)
        torch.empty_like(x).to(torch.float64)
        torch.ones(3) + 1
    assert found == Counter()


RUNS = {
    "par": {},
    "par_bf16": {"precision": "bf16"},
    "par_micro": {"micro_batch": 5},
    "par_locked": {"lock": "text"},
    "par_views": {"views": 1},
    "finetune": {},
    "cleanclip": {},
    "roclip": {"pool_size": 16},
    "ft_sam": {},
    "invert": {"inversion_steps": 3, "every": 2},
}


def cleaned(name, batches, model=DualEncoder, **options):
    method = getattr(pybackdoor, f"{name.split('_', 1)[0] if name != 'ft_sam' else name}_clean")
    options = {**RUN, **RUNS[name], **options}
    return grown(lambda steps: method(model(), batches(), steps=steps, **options))


@pytest.mark.parametrize("name", RUNS)
def test_cleaning(name):
    assert cleaned(name, lambda: loader(48)) == Counter()


def floats():
    """Batches that are normalised already."""
    rules = InputRules.of(DualEncoder(), mean=MEAN, std=STD)
    return [
        batch | {"images": model_input(
            batch["images"], rules, device=torch.device("cpu"), dtype=torch.float32,
            ids=batch["ids"],
        )}
        for batch in random_pairs(48, 16)
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["par", "par_bf16", "par_micro", "par_locked", "finetune"])
def test_cleaning_with_normalised_floats(name):
    assert cleaned(name, floats) == Counter()


@pytest.mark.parametrize("name", MODELS)
def test_cleaning_real_towers(name):
    if name == "hugging_face":
        pytest.importorskip("transformers")
    make, end, side = MODELS[name]
    batches, options = captioned(end, side), {"precision": "bf16", "lr": 1e-4, "repair": False}
    assert cleaned("par", lambda: batches, make, **options) == Counter()


def test_cleaning_with_images_that_the_gpu_keeps(tmp_path):
    write_shard(tmp_path / "s.tar", samples(12))
    pairs = pairs_from_shards(
        tmp_path / "s.tar", image_size=16, cache="device", cache_dir=tmp_path, progress=False
    )
    batches = [PairLoader(pairs, words, batch_size=4) for _ in range(2)]
    assert cleaned("par", batches.pop) == Counter()


class OfNumber(DualEncoder):
    """Its scale is a number of Python's."""

    def __init__(self) -> None:
        super().__init__()
        del self.logit_scale
        self.logit_scale = 2.3


def test_a_scale_that_is_a_number():
    assert pybackdoor.models.scale(OfNumber().to("cuda")).is_cuda
    assert cleaned("par", lambda: loader(48), OfNumber) == Counter()


def test_features_of_which_a_part_is_known(monkeypatch):
    """Epochs of 80 of 83 pairs, each of which leaves out others."""
    monkeypatch.setattr(images, "_FEWEST", 2)
    sizes = []

    def encoded(self, x, own=DualEncoder.encode_image):
        sizes.append(len(x))
        return own(self, x)

    monkeypatch.setattr(DualEncoder, "encode_image", encoded)
    options = {**RUN, "views": 1, "repair": False}

    def run(steps):
        pybackdoor.par_clean(DualEncoder(), loader(), steps=steps, **options)

    assert grown(run, 6, 20) == Counter() and {2, 16} <= set(sizes)


def test_unlearning():
    """Whose looks, every ``check_every`` steps, wait for their answer."""
    pairs, truth = planted_pairs()
    options = {
        **RUN, "mean": (0.5,) * 3, "std": (0.5,) * 3, "tokenizer": WordTokenizer(), "lr": 1e-1,
        "augment": False, "k": 40, "gate_sets": 199, "forget_batch": 32, "lr_start": 1e-3,
        "check_every": 1000, "scores": truth + np.linspace(0, 0.5, len(truth)),
    }  # fmt: skip
    assert grown(lambda n: pybackdoor.ubt_clean(Planted(), pairs, steps=n, **options)) == Counter()


def colours(n):
    """Labelled images."""
    whole = random_pairs(n, n)[0]
    labels = whole["tokens"][:, 0].numpy() - 1
    return labelled_from_arrays(whole["images"].numpy(), labels, list("1234"))


def with_captions(n):
    whole = random_pairs(n, n)[0]
    texts = [" ".join(map(str, row)) for row in whole["tokens"].tolist()]
    return pairs_from_arrays(whole["images"].numpy(), texts)


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("badnet", {"size": 4, "placement": "fixed", "position": (2, 3)}),
        ("badnet", {"size": 4, "placement": "random"}),
        ("blended", {"per_image": True}),
    ],
)
def test_evaluation(name, how):
    """Of more images and captions, in batches of eight."""
    spec = pybackdoor.trigger(name, **how)
    options = {
        "tokenizer": tokenizer, "templates": ["5 {}", "{} 7"], "mean": MEAN, "std": STD,
        "batch_size": 8, "trigger": spec, "target": "2",
    }  # fmt: skip
    model = DualEncoder().to("cuda")

    def run(n):
        pybackdoor.evaluate(model, colours(n), pairs=with_captions(n), **options)

    assert grown(run, 24, 64) == Counter()


def test_planting_and_the_patch():
    options = {"target": "2", "tokenizer": tokenizer, "device": "cuda", "batch_size": 16, **NORM}
    spec = pybackdoor.trigger("badnet", size=4)

    def planted(steps):
        pybackdoor.poison(
            DualEncoder(), with_captions(64), spec, templates=["5 {}"], count=4, steps=steps,
            test=colours(60), **options,
        )  # fmt: skip

    def patched(steps):
        pybackdoor.badclip_patch(DualEncoder(), with_captions(64), steps=steps, **options)

    assert grown(planted) == Counter()
    assert grown(patched) == Counter()


def test_index_tensors_of_the_host_are_sent():
    images, ids = torch.zeros(4, 8, 8, 3, dtype=torch.uint8, device="cuda"), torch.arange(4)
    with waits() as found:
        assert all(x.is_cuda for x in on_device(images, ids, ids[::2]))
    assert found == Counter()


def test_what_is_sent_from_the_gpu_has_arrived():
    x = torch.ones(3, device="cuda")
    with waits() as found:
        sent(x, torch.device("cpu"))
    assert list(found.values()) == [1]


class OnDevice:
    """Images that a GPU keeps; the last one cannot be decoded."""

    image_size = (16, 16)

    def __init__(self, images):  # [n, 16, 16, 3]
        self.images = images.to("cuda")

    def __len__(self):
        return len(self.images)

    def gather(self, indices):
        bad = {at: "torn" for at, i in enumerate(indices) if i == len(self) - 1}
        return self.images[torch.from_numpy(indices).to("cuda")], bad

    def take(self, indices):
        raise ValueError(f"image {indices[-1]} is torn")


def test_images_that_a_gpu_keeps_are_read_there():
    store = OnDevice(random_pairs(9, 9)[0]["images"])
    model, ids = DualEncoder().to("cuda"), np.arange(9)
    reader = FeatureReader(model, None, mean=MEAN, std=STD, batch_size=4)
    host = labelled_from_arrays(store.images.cpu().numpy(), ids % 2, ["a", "b"]).images
    want = FeatureReader(DualEncoder(), None, mean=MEAN, std=STD).images(host, ids)
    found = reader.images(subset_images(store, ids[:8]), ids[:8])
    assert not found.is_cuda
    torch.testing.assert_close(found, want[:8])
    with pytest.raises(ValueError, match="image 8 is torn"):
        reader.images(store, ids)
