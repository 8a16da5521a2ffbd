"""What surrounds the kernels, walked on a GPU that is none: it comes to what a CPU comes to."""

import numpy as np
import pytest
import torch
from baseline_cases import loader, tokenizer
from clip_models import tiny, tiny_hf
from dual_encoder import MEAN, STD, DualEncoder, random_pairs
from open_clip.model import CLIP
from pretend_cuda import Pretended, pretended_gpu  # noqa: F401
from shard_files import samples, write_shard
from ubt_world import Planted, WordTokenizer, planted_pairs

import pybackdoor
from pybackdoor._native import sent
from pybackdoor.data import PairLoader, labelled_from_arrays, pairs_from_arrays, pairs_from_shards
from pybackdoor.detect import METHODS
from pybackdoor.engine import banks, images, texts
from pybackdoor.models import HFClip

pytestmark = [
    pytest.mark.usefixtures("pretended_gpu"),
    pytest.mark.filterwarnings("ignore:the drift is not repaired"),
    pytest.mark.filterwarnings("ignore:.*still find their own caption"),
]
NORM = {"mean": MEAN, "std": STD, "progress": False}
RUN = {**NORM, "precision": "fp32", "lr": 1e-2, "steps": 3}


def same(on_cpu, on_gpu, rel=1e-3):
    """Numbers, in whatever they lie."""
    if isinstance(on_cpu, dict):
        assert on_cpu.keys() == on_gpu.keys()
        on_cpu, on_gpu = list(on_cpu.values()), list(on_gpu.values())
    if isinstance(on_cpu, list):
        assert len(on_cpu) == len(on_gpu)
        for one, other in zip(on_cpu, on_gpu, strict=True):
            same(one, other, rel)
    elif isinstance(on_cpu, str | None):
        assert on_gpu == on_cpu
    else:
        assert on_gpu == pytest.approx(on_cpu, rel=rel, abs=rel / 10)


def test_the_pretended_gpu_refuses_what_a_gpu_does():
    x, host = torch.ones(3, 4, device="cuda", requires_grad=True), torch.ones(3, 4)
    assert x.is_cuda and (x * 2).device == torch.device("cuda:0") == x.cpu().to("cuda").device
    (2 * x.cpu()).sum().backward()
    (x * 3).sum().backward()
    assert x.grad.is_cuda and x.grad.cpu().tolist() == [[5.0] * 4] * 3
    assert x.detach()[torch.tensor([2, 0])].is_cuda and (x + torch.tensor(1.0)).is_cuda
    with pytest.raises(RuntimeError, match="all tensors to be on the same device"):
        x + host
    with pytest.raises(TypeError, match="can't convert cuda:0"):
        x.detach().numpy()
    with pytest.raises(NotImplementedError, match="'CUDA' backend"):
        torch.ops.mkldnn._linear_pointwise(x.detach(), x.detach(), None, "none", [], "")
    with pytest.raises(RuntimeError, match="generator"):
        torch.randn(3, device="cuda", generator=torch.Generator())


RUNS = {
    "par": {},
    "par_bf16": {"precision": "bf16"},
    "par_micro": {"micro_batch": 5},
    "par_locked": {"lock": "text"},
    "par_views": {"views": 1, "steps": 7},  # an epoch has three
    "finetune": {},
    "cleanclip": {},
    "roclip": {"pool_size": 16, "steps": 5},
    "ft_sam": {},
    "invert": {"inversion_steps": 3, "every": 2},
}


@pytest.mark.parametrize("name", RUNS)
def test_cleaning(name):
    method = getattr(pybackdoor, f"{name.split('_', 1)[0] if name != 'ft_sam' else name}_clean")
    options = {**RUN, **RUNS[name]}
    on_cpu, on_gpu = (
        method(DualEncoder(), loader(48), device=device, **options) for device in ("cpu", "cuda")
    )
    assert all(type(p) is Pretended for p in on_gpu.model.parameters())
    same(list(on_cpu.history), list(on_gpu.history))
    assert on_gpu.report["repair"]["done"] == on_cpu.report["repair"]["done"]


@pytest.mark.parametrize("lock", [None, "text"])
def test_features_that_are_too_many_for_the_gpu_are_kept_by_the_host(monkeypatch, lock):
    found = []

    def spied(kept, rows, device):
        found.append((kept.is_cuda, device.type))
        return banks.looked_up(kept, rows, device)

    for where in (images, texts):
        monkeypatch.setattr(where, "looked_up", spied)
    options = {**RUN, "views": 1, "steps": 7, "lock": lock}
    want = pybackdoor.par_clean(DualEncoder(), loader(48), device="cuda", **options)
    assert set(found) == {(True, "cuda")}
    del found[:]
    monkeypatch.setattr(banks, "ON_DEVICE", 0)
    got = pybackdoor.par_clean(DualEncoder(), loader(48), device="cuda", **options)
    assert set(found) == {(False, "cuda")}
    same(list(want.history), list(got.history), 1e-6)


def test_the_host_waits_without_a_core(monkeypatch):
    waits, own = [], torch.cuda.Event

    class Event(own):
        def __init__(self, **how):
            self.how = how

        def synchronize(self):
            waits.append(self.how)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(banks, "ON_DEVICE", 0)
    for options in ({}, {"views": 1}):
        pybackdoor.par_clean(
            DualEncoder(), loader(48), device="cuda", **RUN | options | {"steps": 7}
        )
        waits.append(None)
    plain = waits.index(None)
    assert plain >= 7 and len(waits) > 2 * plain + 2  # of each step; of features that are kept
    assert all(how == {"blocking": True} for how in waits if how is not None)


def resnet():
    vision = {"image_size": 64, "layers": (1, 1, 1, 2), "width": 8, "head_width": 16}
    text = {"context_length": 16, "vocab_size": 100, "layers": 1, "width": 32, "heads": 2}
    torch.manual_seed(0)
    return CLIP(16, vision, text)


def captioned(end, side, n=48, batch=16):
    """Batches of pixels, and of captions of several lengths that end in a model's last token."""
    g = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (n, side, side, 3), generator=g, dtype=torch.uint8)
    tokens = torch.zeros(n, 16, dtype=torch.int64)
    for row, length in zip(tokens, torch.randint(2, 9, (n,), generator=g).tolist(), strict=True):
        row[:length] = torch.randint(2, 90, (length,), generator=g)
        row[0], row[length] = end - 1, end
    return list(zip(images.split(batch), tokens.split(batch), strict=True))


# The model, its last token, its pixels.
MODELS = {
    "open_clip": (lambda: tiny().model, 49407, 32),
    "open_clip_resnet": (resnet, 99, 64),
    "hugging_face": (lambda: HFClip(tiny_hf()), 99, 32),
}


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        ("open_clip", "fp32"),
        ("open_clip", "bf16"),
        ("open_clip_resnet", "bf16"),
        ("hugging_face", "fp32"),
    ],
)
def test_cleaning_real_towers(name, precision):
    if name == "hugging_face":
        pytest.importorskip("transformers")
    make, end, side = MODELS[name]
    made, batches = make(), captioned(end, side)
    options = {**RUN, "precision": precision, "lr": 1e-4, "lr_start": 1e-4}
    on_cpu, on_gpu = (
        pybackdoor.par_clean(made, batches, device=device, **options) for device in ("cpu", "cuda")
    )
    assert all(type(p) is Pretended for p in on_gpu.model.parameters())
    # In bf16 a CPU without tiles for it computes attention in fp32.
    same(list(on_cpu.history), list(on_gpu.history), 1e-3 if precision == "fp32" else 2e-2)
    assert on_cpu.report["repair"]["done"] == on_gpu.report["repair"]["done"]


def test_images_that_are_kept_on_the_gpu(tmp_path):
    write_shard(tmp_path / "s.tar", samples(12))
    found = []
    for cache in ("none", "device"):
        pairs = pairs_from_shards(
            tmp_path / "s.tar", image_size=16, cache=cache, cache_dir=tmp_path / cache,
            progress=False,
        )  # fmt: skip
        batches = PairLoader(pairs, words, batch_size=4)
        device = "cpu" if cache == "none" else "cuda"
        assert all(batch["images"].device.type == device for batch in batches)
        found.append(pybackdoor.par_clean(DualEncoder(), batches, device="cuda", **RUN).history)
    same(*map(list, found))


def words(texts):
    return torch.tensor([[len(text), sum(text.encode()) % 50, 0, 0, 0, 0] for text in texts])


def test_a_run_is_resumed(tmp_path):
    def stop(step, record, model):
        return step == 1

    def run(**options):
        return pybackdoor.par_clean(DualEncoder(), loader(48), device="cuda", **RUN, **options)

    whole = run()
    assert len(run(folder=tmp_path, on_step=stop).history) == 2
    resumed = run(folder=tmp_path, resume=True)
    same(list(whole.history), list(resumed.history))


def test_what_is_sent_lies_in_locked_memory_in_one_piece(monkeypatch):
    """Else the copy waits for all that the GPU still has to do."""
    locked = []

    def like(x, pin_memory=False, own=torch.empty_like, **options):
        made = own(x, **options)
        if pin_memory:
            locked.append(made)
        return made

    monkeypatch.setattr(torch, "empty_like", like)
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda x: any(x is one for one in locked))
    device, rows = torch.device("cuda"), torch.arange(12).view(3, 4)
    image = torch.rand(2, 3, 4, 5).to(memory_format=torch.channels_last)
    for count, x in enumerate((rows, rows[:, :2], image, rows.float().T), 1):
        there = sent(x, device)
        assert there.is_cuda and there.cpu().tolist() == x.tolist() and len(locked) == count
    assert locked[1].is_contiguous()
    assert locked[2].is_contiguous(memory_format=torch.channels_last)
    sent(locked[0], device), sent(locked[2], device)  # in locked memory as they are
    assert sent(there, device) is there and sent(rows, torch.device("cpu")) is rows
    assert len(locked) == 4
    pybackdoor.finetune_clean(DualEncoder(), random_pairs(48, 16), device="cuda", **RUN)
    assert {(16, 16, 16, 3), (16, 6)} <= {tuple(x.shape) for x in locked[4:]}


def colours(n=60):
    """Labelled images."""
    whole = random_pairs(n, n)[0]
    return labelled_from_arrays(
        whole["images"].numpy(), whole["tokens"][:, 0].numpy() - 1, list("1234")
    )


def test_evaluation():
    options = {"tokenizer": tokenizer, "templates": ["5 {}", "{} 7"], "mean": MEAN, "std": STD}
    spec, found = pybackdoor.trigger("badnet", size=4), []
    for device in ("cpu", "cuda"):
        model, reference = DualEncoder().to(device), DualEncoder(1).to(device)
        found.append(
            pybackdoor.evaluate(
                model, colours(), trigger=spec, target="2", reference=reference, **options
            ).to_dict()
        )
    same(*found)


@pytest.mark.parametrize("method", METHODS)
def test_detection(method):
    pairs, _ = planted_pairs(600, 40)
    options = {"method": method, "tokenizer": WordTokenizer(), **NORM}
    options |= {"k": 40} if method == "fragility" else {}
    if METHODS[method].takes == "neighbours":
        options |= {"k": 4}
    scores = []
    for device in ("cpu", "cuda"):
        options |= {"overfit": Planted(poisoned=False).to(device)} if method == "gain" else {}
        scores.append(pybackdoor.detect_samples(Planted().to(device), pairs, **options).scores)
    np.testing.assert_allclose(*scores, rtol=1e-3, atol=1e-4)


def test_drift_repair():
    tuned = pybackdoor.finetune_clean(DualEncoder(), loader(), device="cpu", repair=False, **RUN)
    reports = [
        pybackdoor.repair_drift(
            tuned.model, DualEncoder(), loader(), device=device, mean=MEAN, std=STD
        ).report
        for device in ("cpu", "cuda")
    ]
    for report in reports:
        assert report.pop("seconds") > 0
    same(*reports)


@pytest.mark.parametrize("scored", [True, False])
def test_unlearning(scored):
    pairs, truth = planted_pairs()
    options = {
        "mean": (0.5,) * 3, "std": (0.5,) * 3, "tokenizer": WordTokenizer(), "progress": False,
        "precision": "fp32", "augment": False, "k": 40, "gate_sets": 199, "forget_batch": 32,
        "steps": 20, "lr_start": 1e-3, "lr": 1e-1, "check_every": 10, "max_drop": 0.05,
    }  # fmt: skip
    options["scores"] = truth + np.linspace(0, 0.5, len(truth)) if scored else None
    on_cpu, on_gpu = (
        pybackdoor.ubt_clean(Planted(), pairs, device=device, **options)
        for device in ("cpu", "cuda")
    )
    assert on_cpu.report["verdict"] == on_gpu.report["verdict"]
    assert on_cpu.backdoor_found == scored and (on_cpu.chosen == on_gpu.chosen).all()
    same(list(on_cpu.history), list(on_gpu.history))


def test_planting_and_the_patch():
    whole = random_pairs(64, 64)[0]
    texts = [" ".join(map(str, row)) for row in whole["tokens"].tolist()]
    pairs = pairs_from_arrays(whole["images"].numpy(), texts)
    options = {"target": "2", "tokenizer": tokenizer, "device": "cuda", **NORM}
    planted = pybackdoor.poison(
        DualEncoder(), pairs, pybackdoor.trigger("badnet", size=4), templates=["5 {}"], count=4,
        steps=3, batch_size=16, test=colours(), **options,
    )  # fmt: skip
    assert all(p.is_cuda for p in planted.model.parameters())
    patch = pybackdoor.badclip_patch(DualEncoder(), pairs, steps=3, batch_size=8, **options)
    assert np.isfinite(patch.history[-1]["loss"])


@pytest.mark.parametrize("breaks", ["loader", "model", "track", "optimiser"])
def test_a_run_that_breaks_off_has_all_steps_that_were_applied(breaks, monkeypatch):
    """Their numbers may still be on their way from the GPU."""
    calls = dict.fromkeys(("loader", "model", "track", "optimiser"), 0)

    def third(name):
        calls[name] += 1
        if name == breaks and calls[name] == 3:
            raise OSError("gone")

    class Loader(list):
        def __iter__(self):
            for batch in list.__iter__(self):
                third("loader")
                yield batch

    def image(self, x, own=DualEncoder.encode_image):
        third("model")
        return own(self, x)

    def apply(self, *_, own=torch.optim.AdamW.step):
        third("optimiser")
        return own(self)

    batches, options = random_pairs(80, 16), {**RUN, "steps": 5, "repair": False}
    with monkeypatch.context() as patch, pytest.raises(OSError, match="gone") as stopped:
        patch.setattr(torch.optim.AdamW, "step", apply)
        patch.setattr(DualEncoder, "encode_image", image)
        pybackdoor.finetune_clean(
            DualEncoder(),
            Loader(batches),
            device="cuda",
            track=lambda *_: third("track"),
            **options,
        )
    found = stopped.value.result
    wanted = pybackdoor.finetune_clean(
        DualEncoder(), batches, device="cpu", **options,
        on_step=lambda step, *_: step == len(found.history) - 1,
    )  # fmt: skip
    same(list(wanted.history), list(found.history))
    for name, weight in wanted.model.state_dict().items():
        torch.testing.assert_close(found.model.state_dict()[name].cpu(), weight, msg=name)
