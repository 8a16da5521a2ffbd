"""CleanCLIP, RoCLIP and FT-SAM against their formulas written out in eager fp64, and as runs."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from baseline_cases import FIXED, RUNS, loader, tokenizer
from dual_encoder import GIVEN, MEAN, STD, DualEncoder, random_pairs
from run_ranks import run_ranks
from torch.nn.functional import cross_entropy, normalize

import pybackdoor
from pybackdoor.batches import Batch, InputRules, model_input
from pybackdoor.clean import two_phase_schedule
from pybackdoor.data.autoaugment import autoaugment
from pybackdoor.data.eda import eda
from pybackdoor.engine import NonFiniteError, Preparation
from pybackdoor.methods import METHODS, method, own_options
from pybackdoor.methods._views import AugmentedViews
from pybackdoor.methods.roclip import PooledContrastive

BATCHES, EPOCHS, LR = 4, 4, 1e-2


def batches(n=BATCHES, size=8):
    """uint8 pairs with another wording of each caption."""
    found = random_pairs(n * size, size)
    others = random_pairs(n * size, size, seed=9)
    return [{**b, "augmented": o["tokens"]} for b, o in zip(found, others, strict=True)]


def plain(batch):
    return seen(batch["images"], batch["ids"])


def view(batch, epoch):
    ids = batch["ids"]
    return seen(autoaugment(batch["images"], seed=0, view=epoch, sample_id=ids), ids)


def seen(images, ids):
    rules = InputRules(MEAN, STD, None, None, None, None)
    cpu = torch.device("cpu")
    return model_input(images, rules, device=cpu, dtype=torch.float64, ids=ids)


def features(model, x, tokens):
    return normalize(model.encode_image(x), dim=-1), normalize(model.encode_text(tokens), dim=-1)


def clip(image, text, scale):
    logits, target = scale * image @ text.T, torch.arange(len(image))
    return (cross_entropy(logits, target) + cross_entropy(logits.T, target)) / 2


class Reference:
    """One method's step in eager torch: leaves the gradients, returns the loss."""

    def __init__(self, **own):
        self.own, self.pool = own, []

    def cleanclip(self, model, batch, epoch):
        scale, target = model.logit_scale.exp(), torch.arange(len(batch["ids"]))
        image, text = features(model, plain(batch), batch["tokens"])
        image_view, text_view = features(model, view(batch, epoch), batch["augmented"])
        loss = clip(image, text, scale)
        for a, b in ((image, image_view), (text, text_view)):
            loss = loss + self.own["in_modal_weight"] * cross_entropy(scale * a @ b.T, target) / 2
        loss.backward()
        return loss

    def roclip(self, model, batch, epoch):
        scale = model.logit_scale.detach().exp()
        if epoch % 2 == 0:
            image, text = features(model, view(batch, epoch), batch["augmented"])
            used = text
        else:
            image, text = features(model, plain(batch), batch["tokens"])
            pool = torch.stack(self.pool)
            used = torch.stack([pool[(pool @ t).argmax()] for t in text.detach()])
        self.pool = [*self.pool, *text.detach()][-self.own["pool_size"] :]
        loss = clip(image, used, scale)
        loss.backward()
        return loss

    def ft_sam(self, model, batch, epoch):
        def backward():
            model.zero_grad()
            image, text = features(model, plain(batch), batch["tokens"])
            loss = clip(image, text, model.logit_scale.detach().exp())
            loss.backward()
            return loss

        loss = backward()
        named = [p for p in model.parameters() if p.grad is not None]
        before = [p.detach().clone() for p in named]
        size = [p.detach().abs() if self.own["adaptive"] else torch.ones_like(p) for p in named]
        norm = sum((s * p.grad).square().sum() for s, p in zip(size, named, strict=True)).sqrt()
        with torch.no_grad():
            for p, s in zip(named, size, strict=True):
                p += self.own["rho"] * s * s * p.grad / norm
        backward()
        with torch.no_grad():
            for p, old in zip(named, before, strict=True):
                p.copy_(old)
        return loss


def reference_run(model, name, **own):
    """The whole algorithm with torch's own AdamW, in fp64; (model, losses)."""
    model, losses, reference = copy.deepcopy(model), [], Reference(**own)
    model.train()
    model.image[1].eval()
    trained = [p for n, p in model.named_parameters() if n != "logit_scale" or name == "cleanclip"]
    adam = torch.optim.AdamW(trained, lr=0.0, betas=(0.9, 0.98), eps=1e-8, weight_decay=0.0)
    rate, step = two_phase_schedule(3e-5, LR, 1e-9), 0
    for epoch in range(EPOCHS):
        for batch in batches():
            adam.zero_grad()
            losses.append(float(getattr(reference, name)(model, batch, epoch).detach()))
            for group in adam.param_groups:
                group["lr"] = rate(step, BATCHES * EPOCHS)
            adam.step()
            with torch.no_grad():
                model.logit_scale.clamp_(0, math.log(100))
            step += 1
    return model, losses


CASES = [
    ("cleanclip", {"in_modal_weight": 0.7}),
    ("roclip", {"pool_size": 20}),
    ("ft_sam", {"rho": 0.3, "adaptive": False}),
    ("ft_sam", {"rho": 2.0, "adaptive": True}),
]


@pytest.mark.parametrize("micro", [None, 3])
@pytest.mark.parametrize("name, own", CASES)
def test_equals_the_algorithm_written_out_in_fp64(name, own, micro):
    model = DualEncoder(seed=1).double()
    with torch.no_grad():
        model.logit_scale += 2.299  # ln 100 is near: the clamp takes part
    options = FIXED | {"augment": False, "weight_decay": 0.0, "epochs": EPOCHS, "lr": LR}
    got = RUNS[name](model, batches(), micro_batch=micro, **own, **options)
    wanted, losses = reference_run(model, name, **own)
    assert [r["loss"] for r in got.history] == pytest.approx(losses, rel=1e-9)
    for (key, tensor), want in zip(
        got.model.state_dict().items(), wanted.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(tensor, want, rtol=1e-7, atol=1e-10, msg=key)
    moved = not torch.equal(got.model.logit_scale, model.logit_scale)
    assert moved == (name == "cleanclip") and got.model.logit_scale <= math.log(100) + 1e-12


def test_terms_of_the_history():
    runs = {n: r(DualEncoder(), batches(), epochs=2, **FIXED).history for n, r in RUNS.items()}
    for record in runs["cleanclip"]:
        terms = record["contrastive"] + (record["in_modal_image"] + record["in_modal_text"]) / 2
        assert record["loss"] == pytest.approx(terms, rel=1e-6)
    cosines = [record["neighbour_cosine"] for record in runs["roclip"]]
    assert cosines[:BATCHES] == [1.0] * BATCHES
    assert all(0.5 < c < 0.9999 for c in cosines[BATCHES:])
    assert all(r["loss_uphill"] > r["loss"] for r in runs["ft_sam"])


@pytest.mark.parametrize("stops", [[2], [4, 5, 11]])
@pytest.mark.parametrize("name", RUNS)
def test_a_resumed_run_ends_with_the_same_bits(name, stops, tmp_path):
    own = {"pool_size": 20} if name == "roclip" else {}

    def run(**options):
        model = DualEncoder(seed=4, dropout=0.3)
        return RUNS[name](model, loader(), epochs=3, **own, **FIXED | options)

    whole = run()
    for stop in stops:
        run(folder=tmp_path, resume=True, on_step=lambda k, r, m, stop=stop: k == stop)
    again = run(folder=tmp_path, resume=True)
    assert again.history == whole.history
    for key, tensor in whole.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[key], tensor), key
    with pytest.raises(ValueError, match="seed|settings"):  # the views are drawn by it
        run(folder=tmp_path, resume=True, seed=1)


@pytest.fixture(scope="module")
def one_and_two(tmp_path_factory):
    found = []
    for count in (1, 2):
        folder = tmp_path_factory.mktemp("ranks")
        code, errors, saved = run_ranks("baseline_ranks.py", folder, count)
        assert code == 0, errors[-3000:]
        found.append(saved)
    return found


@pytest.mark.parametrize("name", [*RUNS, "ft_sam adaptive"])
def test_two_processes_equal_one(one_and_two, name):
    """Losses of every step and weights after nine, in fp64, uneven shares."""
    one, two = (found[name] for found in one_and_two)
    assert one.keys() == two.keys()
    for key, tensor in one.items():
        torch.testing.assert_close(two[key], tensor, rtol=1e-6, atol=1e-11, msg=key)


class Broken(DualEncoder):
    """No numbers at one call while training: in an image's feature or in the gradient."""

    def __init__(self, what, at):
        super().__init__(seed=2)
        self.what, self.at, self.calls = what, at, -1

    def encode_image(self, x):
        out = super().encode_image(x)
        self.calls += self.training
        if self.training and self.calls == self.at:
            if self.what == "gradient":
                out.register_hook(lambda g: g * math.inf)
            else:
                out = torch.cat([out[:2], out[2:] * math.nan])
        return out


@pytest.mark.parametrize("what", ["features", "gradient"])
@pytest.mark.parametrize("name, step", [("cleanclip", 0), ("roclip", 0), ("ft_sam", 0),
                                        ("ft_sam", 1)])  # fmt: skip
def test_a_batch_that_breaks_is_left_out(name, step, what):
    """Of FT-SAM either pass; the pool takes no caption of it."""
    own = {"pool_size": 20, "pool_every": 1} if name == "roclip" else {}
    passes = 2 if name == "ft_sam" else 1
    loader, at = batches(6), 2
    got = RUNS[name](Broken(what, passes * at + step), loader, steps=5, **own, **FIXED)
    without = batches(6)
    del without[at]
    want = RUNS[name](Broken(what, -5), without, steps=5, **own, **FIXED)
    for key, tensor in want.model.state_dict().items():
        assert torch.equal(got.model.state_dict()[key], tensor), key
    assert got.history == want.history
    (fault,) = got.report["faults"]
    assert fault.startswith(f"step {at}: not finite: ")
    with pytest.raises(NonFiniteError) as stopped:
        RUNS[name](Broken(what, passes * at + step), loader, steps=5, max_faults=0, **own, **FIXED)
    for key, tensor in stopped.value.result.model.state_dict().items():
        assert tensor.isfinite().all(), key


def test_steps_in_flight_take_their_captions_back():
    """On a GPU a fault shows one step later: two steps are given again, with other batches."""
    g = torch.Generator().manual_seed(0)
    rows = torch.nn.functional.normalize(torch.randn(40, 4, 8, generator=g), dim=-1)

    def pooled(order):
        """The last answer for each step, and the pool."""
        objective, found = PooledContrastive(AugmentedViews("x", None), pool_size=10, every=2), {}
        objective.prepare(Preparation(DualEncoder(), None, torch.device("cpu")))
        for step, which in order:
            given = replace(GIVEN, step=step, epoch=1)
            loss, terms = objective(rows[which], rows[which], torch.tensor(5.0), (), given)
            found[step] = float(loss), float(terms["neighbour_cosine"])
        return found, objective.state()

    wanted, pool = pooled([(0, 0), (1, 1), (2, 2), (3, 4), (4, 5), (5, 6)])
    again, same = pooled([(0, 0), (1, 1), (2, 2), (3, 3), (4, 4), (3, 4), (4, 5), (5, 6)])
    assert again == wanted
    assert torch.equal(pool["pool"], same["pool"]) and torch.equal(pool["pool"][-4:], rows[6])
    assert len(pool["pool"]) == 10 + 2 * 4  # and it does not grow


def test_weights_are_back_where_the_second_pass_fails():
    class Fails(DualEncoder):
        calls = 0

        def encode_text(self, tokens):
            self.calls += self.training
            if self.calls == 4:
                raise MemoryError("the second pass of the second step")
            return super().encode_text(tokens)

    one = pybackdoor.ft_sam_clean(DualEncoder(), batches(), steps=5, on_step=lambda k, r, m: k == 0,
                                  **FIXED)  # fmt: skip
    with pytest.raises(MemoryError) as stopped:
        pybackdoor.ft_sam_clean(Fails(), batches(), steps=5, **FIXED)
    for key, tensor in one.model.state_dict().items():
        assert torch.equal(stopped.value.result.model.state_dict()[key], tensor), key


def test_no_gradient_moves_nothing_uphill():
    model = DualEncoder()
    with torch.no_grad():
        model.image[6].weight.zero_()  # its bias alone gives the features, the same for all
        model.text[1].weight.zero_()
        model.ln_final.weight.zero_()
        model.ln_final.bias.fill_(1.0)
    result = pybackdoor.ft_sam_clean(model, batches(), steps=1, **FIXED)
    assert math.isfinite(result.history[0]["loss_uphill"])


@pytest.mark.parametrize("name", RUNS)
def test_the_loss_falls_and_the_model_learns(name):
    own = {"pool_size": 10} if name == "roclip" else {}
    result = RUNS[name](DualEncoder(seed=4), loader(), epochs=13, lr_start=1e-2, **own, **FIXED)
    loss = [0.0] * 13
    for record in result.history:
        loss[record["epoch"]] += record.get("contrastive", record["loss"]) / 5
    assert loss[12] < 0.75 * loss[0]  # both without the pool


def test_rewording_is_one_for_a_loader_and_for_strings():
    """A PairLoader's numbered captions, strings with a tokenizer, and tokens given as such."""
    pairs = loader(shuffle=False)
    rules = InputRules(MEAN, STD, None, None, None, tokenizer)
    texts = list(pairs.pairs.captions)
    wanted = tokenizer([eda(text, seed=5) for text in texts])[:16]
    assert not torch.equal(wanted, tokenizer(texts)[:16])

    def tokens(batch, loader=()):
        views = AugmentedViews("m", None)
        cpu = torch.device("cpu")
        views.prepare(Preparation(DualEncoder(), None, cpu, rules=rules, loader=loader, seed=5))
        return views.tokens(replace(GIVEN, batch=batch))

    first = next(iter(pairs))
    images, of = first["images"], first["tokens"]
    assert torch.equal(tokens(Batch(images, of, None, first["captions"]), pairs), wanted)
    assert torch.equal(tokens(Batch(images, of, None, texts=texts[:16])), wanted)
    assert torch.equal(tokens(Batch(images, of, None, augmented=of.flip(0))), of.flip(0))


def test_strings_may_be_cleaned_with():
    texts = [
        {**b, "texts": [" ".join(map(str, r)) for r in b["tokens"].tolist()]} for b in batches()
    ]
    for b in texts:
        del b["tokens"], b["augmented"]
    result = pybackdoor.cleanclip_clean(
        DualEncoder(), texts, steps=2, tokenizer=tokenizer, synonyms=lambda w: ["7"], **FIXED
    )
    assert "lambda" in result.report["settings"]["synonyms"]


def without(key):
    return [{k: v for k, v in b.items() if k != key} for b in batches()]


BAD = {
    "no second wording": ("cleanclip", without("augmented"), {}, "second wording.*'augmented'"),
    "floats": (
        "roclip",
        [{**b, "images": torch.zeros(8, 3, 16, 16)} for b in batches()],
        {},
        "roclip_clean: images must be uint8 pixels.*got torch.float32",
    ),
    "augmented shape": (
        "cleanclip",
        [{**b, "augmented": b["augmented"][:, :5]} for b in batches()],
        {},
        r"augmented must be \[8, 6\] like the batch's tokens, got \[8, 5\]",
    ),
    "weight": ("cleanclip", batches(), {"in_modal_weight": -1}, "in_modal_weight must be at least"),
    "pool": ("roclip", batches(), {"pool_size": 0}, "pool_size must be an integer.*got 0"),
    "every": ("roclip", batches(), {"pool_every": True}, "pool_every must be an integer.*got True"),
    "never": ("roclip", batches(), {"steps": 4}, "after 1 epochs of 4 steps, got 4 steps in all"),
    "rho": ("ft_sam", batches(), {"rho": 0.0}, "rho must be above 0 and finite, got 0.0"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case):
    name, batches, own, message = BAD[case]
    with pytest.raises((TypeError, ValueError), match=message):
        RUNS[name](DualEncoder(), batches, **FIXED | {"epochs": 2} | own)


def test_methods_go_by_name():
    assert {"par", "finetune", "cleanclip", "roclip", "ft_sam"} <= set(METHODS)
    for name, function in METHODS.items():
        assert function is getattr(pybackdoor, f"{name}_clean") is method(name)
    assert own_options("roclip") == {"pool_size": 2000, "pool_every": 2, "synonyms": None}
    with pytest.raises(ValueError, match="unknown method 'clean_clip' .did you mean 'cleanclip'"):
        method("clean_clip")
    with pytest.raises(TypeError, match="ft_sam_clean: unknown option 'fixed'"):
        pybackdoor.ft_sam_clean(DualEncoder(), batches(), fixed={"freeze_scale": False})
