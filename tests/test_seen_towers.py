"""Towers without what no feature shows: the features and gradients of the plain forward pass."""

import copy

import open_clip
import pytest
import torch
from clip_models import tiny, tiny_hf
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.model import CLIP, CustomTextCLIP
from torch import nn

from pybackdoor.clean import frozen_copy, full_precision_copy
from pybackdoor.engine import shortcuts, towers
from pybackdoor.engine.shortcuts import image_shortcut, text_shortcut, ways
from pybackdoor.engine.towers import Encoder, TextTrim
from pybackdoor.features import FeatureReader
from pybackdoor.methods.par import par_clean
from pybackdoor.models import HFClip, image_features, image_tower, text_features, text_tower
from pybackdoor.models.seen import Shared

CPU = torch.device("cpu")
VISION = {"image_size": 32, "patch_size": 8, "layers": 3, "width": 32, "head_width": 16}
TEXT = {"context_length": 16, "vocab_size": 100, "layers": 3, "width": 32, "heads": 2}
IMAGES = torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def clip(kind=CLIP, vision=None, text=None, **options):
    torch.manual_seed(0)
    model = kind(16, VISION | (vision or {}), TEXT | (text or {}), **options)
    with torch.no_grad():  # biases and scales that are not 0 and 1
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def captions(*lengths, seed=0):
    """[n, 16] tokens: 98, words, 99 and padding; every other one starts alike."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.zeros(len(lengths), 16, dtype=torch.int64)
    for row, length in enumerate(lengths):
        words = torch.randint(1, 98, (length - 2,), generator=generator)
        words[: row % 2 * 4] = 7
        tokens[row, :length] = torch.tensor([98, *words.tolist(), 99])
    return tokens


def hf(**changes):
    torch.manual_seed(0)
    return HFClip(tiny_hf(**changes))


MODELS = {
    "clip": lambda: clip(),
    "quick gelu": lambda: clip(quick_gelu=True),
    "layer scale": lambda: clip(vision={"ls_init_value": 0.5}, text={"ls_init_value": 0.5}),
    "norm after pooling": lambda: clip(vision={"final_ln_after_pool": True}),
    "one block": lambda: clip(vision={"layers": 1}, text={"layers": 1}),
    "custom text": lambda: clip(CustomTextCLIP),
    "projection with bias": lambda: clip(CustomTextCLIP, text={"proj_bias": True}),
    "end by its number": lambda: clip(CustomTextCLIP, text={"pool_type": "eos", "eos_id": 99}),
    "transformers": lambda: hf(),
    "transformers, its old end mark": lambda: hf(eos_token_id=2),
}


def features_and_gradients(model, encode):
    model.zero_grad()
    rows = encode()
    (rows * torch.linspace(-1, 1, rows.numel()).view_as(rows)).sum().backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return rows.detach(), grads


def assert_same(model, one, other, tolerance=1e-11):
    (want, grads), (got, again) = (features_and_gradients(model, f) for f in (one, other))
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)
    assert grads.keys() == again.keys()
    for name, grad in grads.items():
        # the bias of keys moves no softmax: its gradient is rounding
        scale = 1.0 if "k_proj.bias" in name else float(grad.abs().max())
        torch.testing.assert_close(
            again[name], grad, rtol=tolerance, atol=tolerance * scale, msg=name
        )


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_features_and_gradients_are_the_plain_ones(name, training):
    model = MODELS[name]().double().train(training)
    x, tokens = IMAGES.double(), captions(3, 16, 9, 10, 4, 12)
    assert_same(model, lambda: model.encode_image(x), lambda: image_tower(model)(x))
    tower = text_tower(model)
    assert_same(model, lambda: model.encode_text(tokens), lambda: tower(tokens))
    assert_same(model, lambda: model.encode_text(tokens), lambda: tower.shared(tokens))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.integers(1, 3), max_size=6), min_size=1, max_size=8))
def test_every_beginning_is_carried_once(texts):
    rows = [[8, *words, 9] for words in texts]
    tokens = torch.tensor([row + [0] * (10 - len(row)) for row in rows])
    ends = torch.tensor([len(row) - 1 for row in rows])
    layout = Shared(tokens, ends)
    assert len(layout.tokens) == len({tuple(r[: k + 1]) for r in rows for k in range(len(r))})
    spread = layout.spread(layout.tokens[:, None].double())[..., 0]
    for row, words in zip(spread.tolist(), rows, strict=True):
        assert row[: len(words)] == words
    assert torch.equal(layout.gather(spread[..., None])[:, 0].long(), layout.tokens)
    places = layout.positions(torch.arange(10.0)[:, None])
    assert torch.equal(
        layout.spread(places)[0, : len(rows[0]), 0], torch.arange(len(rows[0])) * 1.0
    )
    assert layout.ends(layout.tokens[:, None].double())[:, 0].tolist() == [9.0] * len(rows)


class Doubled(CLIP):
    def encode_image(self, image, normalize=False):
        return 2 * super().encode_image(image, normalize) + 1


class OddNorm(nn.LayerNorm):
    pass


def hooked(place):
    def change(model):
        module = model.get_submodule(place)
        module.register_forward_hook(lambda *_: None)

    return change


def swapped(place, make):
    def change(model):
        parent, _, name = place.rpartition(".")
        setattr(model.get_submodule(parent), name, make())

    return change


def checkpointed(model):
    model.set_grad_checkpointing()


def replaced(model):
    before = model.visual.forward
    model.visual.forward = lambda x: before(x)


@pytest.mark.parametrize(
    "change, left",
    [
        (hooked("visual.transformer.resblocks.1"), "image"),
        (hooked("visual"), "image"),
        (hooked("transformer.resblocks.2.mlp.gelu"), "text"),
        (swapped("visual.ln_post", lambda: OddNorm(32)), "image"),
        (swapped("ln_final", lambda: OddNorm(32)), "text"),
        (swapped("visual.patch_dropout", lambda: nn.Dropout(0.1)), "image"),
        (swapped("transformer.resblocks.0.mlp.gelu", lambda: nn.Dropout(0.1)), "text"),
        (replaced, "image"),
        (checkpointed, "both"),
    ],
)
def test_what_is_not_known_to_be_the_same_computes_itself(change, left):
    model = clip()
    assert image_tower(model) is not None and text_tower(model) is not None
    change(model)
    assert (image_tower(model) is None) == (left in ("image", "both"))
    assert (text_tower(model) is None) == (left in ("text", "both"))


@pytest.mark.parametrize(
    "make, image, text",
    [
        (lambda: clip(vision={"pool_type": "avg"}), False, True),
        (lambda: clip(vision={"attentional_pool": True}), False, True),
        (lambda: clip(vision={"patch_dropout": 0.5}), False, True),
        (lambda: clip(vision={"qk_norm": True}, text={"qk_norm": True}), False, False),
        (lambda: clip(CustomTextCLIP, text={"embed_cls": True}), True, False),
        (lambda: clip(CustomTextCLIP, text={"pool_type": "last"}), True, False),
        (lambda: clip(CustomTextCLIP, text={"no_causal_mask": True}), True, False),
        (lambda: Doubled(16, VISION, TEXT), False, False),
        (lambda: tiny(vision_cfg={"layers": [1, 1, 1, 1], "width": 8, "image_size": 32}).model,
         True, True),
        (lambda: clip(vision={"timm_model_name": "resnet18", "timm_pool": "avg"}), False, True),
        (lambda: hf(attention_dropout=0.1), True, False),
    ],
)  # fmt: skip
def test_other_towers_compute_themselves(make, image, text):
    model = make()
    assert (image_tower(model) is not None, text_tower(model) is not None) == (image, text)


def test_methods_of_ones_own_are_called():
    model = clip()
    model.encode_image = lambda x: torch.ones(len(x), 4)
    model.encode_text = lambda x: torch.ones(len(x), 4)
    assert image_tower(model) is None and text_tower(model) is None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CLIP, "encode_image", lambda self, x: torch.ones(len(x), 4))
        assert image_tower(clip()) is None and text_tower(clip()) is not None
    model = hf()
    model.model.get_text_features = lambda input_ids: torch.ones(len(input_ids), 4)
    assert image_tower(model) is not None and text_tower(model) is None


def test_the_first_batch_decides():
    model, tokens = clip(), captions(3, 9)
    assert ways(model) == {"image": False, "text": False}  # nothing is known yet
    assert image_shortcut(model, IMAGES) is not None and text_shortcut(model, tokens) is not None
    assert ways(model) == {"image": True, "text": True}
    sees_all = clip()
    sees_all.attn_mask.zero_()  # a mask that hides nothing: the padding shows
    assert text_tower(sees_all) is not None and text_shortcut(sees_all, tokens) is None
    assert ways(sees_all) == {"image": False, "text": False}
    got = Encoder(None, CPU).text(sees_all, TextTrim(sees_all, True, grouped=True)(tokens))
    torch.testing.assert_close(got, text_features(sees_all, tokens), rtol=0, atol=0)


def test_what_is_known_of_a_model_is_known_of_its_copies(monkeypatch):
    model = clip()
    student = full_precision_copy(model)
    frozen = frozen_copy(student)
    assert image_shortcut(frozen, IMAGES) is not None  # the last one is the first to look
    assert ways(model) == ways(student) == ways(frozen) == {"image": True, "text": False}
    half = full_precision_copy(clip().bfloat16())
    monkeypatch.setattr(shortcuts, "same", lambda *_: pytest.fail("it is known already"))
    assert image_shortcut(model, IMAGES) is not None
    hooked("visual")(student)  # a copy whose classes or hooks were changed since has its own way
    assert image_shortcut(student, IMAGES) is None and image_shortcut(model, IMAGES) is not None
    with pytest.raises(pytest.fail.Exception):
        image_shortcut(half, IMAGES)


def test_another_dtype_is_looked_at_anew():
    model = clip().bfloat16()
    assert image_shortcut(model, IMAGES.bfloat16()) is not None
    wide = full_precision_copy(model)
    assert ways(model)["image"] and not ways(wide)["image"]
    assert image_shortcut(wide, IMAGES) is not None and ways(wide)["image"]


def test_a_batch_that_shows_nothing_decides_nothing():
    model = clip()
    assert image_shortcut(model, IMAGES[:0]) is None
    assert image_shortcut(model, IMAGES * float("nan")) is None
    assert image_shortcut(model, IMAGES) is not None


def test_a_library_with_other_members_computes_itself():
    model = clip()
    del model.visual.pool_type, model.text_pool_type
    assert image_shortcut(model, IMAGES) is None and text_shortcut(model, captions(3)) is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_towers_of_other_dtypes(dtype):
    model = clip().to(dtype)
    assert image_shortcut(model, IMAGES.to(dtype)) is not None
    assert text_shortcut(model, captions(3, 9)) is not None


@pytest.mark.parametrize("name", ["clip", "custom text", "transformers"])
def test_autocast_has_the_error_of_autocast(name):
    model, tokens = MODELS[name](), captions(3, 16, 9)
    exact = copy.deepcopy(model).double()
    encode = Encoder(torch.bfloat16, CPU)
    cases = [
        (image_features, IMAGES, IMAGES.double(), encode.image),
        (text_features, tokens, tokens, encode.text),
    ]
    for features, given_, wide, ours in cases:
        want = features(exact, wide)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            plain = (features(model, given_) - want).abs().max()
        assert (ours(model, given_) - want).abs().max() <= 2 * plain + 2**-9
    assert ways(model) == {"image": True, "text": True}


@pytest.mark.parametrize("name", ["clip", "transformers"])
def test_compiled_towers(name, monkeypatch):
    model, tokens = MODELS[name](), captions(3, 16, 9)
    compile_ = torch.compile

    def graph(function, mode, dynamic):
        return compile_(function, backend="aot_eager", dynamic=dynamic, fullgraph=True)

    monkeypatch.setattr(towers.torch, "compile", graph)
    encode = Encoder(None, CPU, "default")
    cases = [(image_features, IMAGES, encode.image), (text_features, tokens, encode.text)]
    for features, x, ours in cases:
        assert_same(
            model, lambda f=features, x=x: f(model, x), lambda f=ours, x=x: f(model, x), 1e-4
        )
    assert ways(model) == {"image": True, "text": True}


@pytest.mark.parametrize("name", ["clip", "transformers"])
@pytest.mark.parametrize("micro_batch", [None, 3])
def test_a_cleaning_run_is_the_plain_run(name, micro_batch, monkeypatch):
    model = MODELS[name]()
    pixels = torch.randint(0, 256, (8, 32, 32, 3), dtype=torch.uint8)
    tokens = captions(3, 16, 9, 10, 4, 12, 5, 5)
    common = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "precision": "fp32", "progress": False}
    common |= {"device": "cpu", "lr_start": 1e-3, "lr": 1e-3, "steps": 3, "augment": False}

    def run(model):
        batches = [(pixels, tokens)] * 3
        return par_clean(model, batches, micro_batch=micro_batch, **common)

    got = run(model)
    assert ways(got.model) == ways(model) == {"image": True, "text": True}
    monkeypatch.setattr(towers, "image_shortcut", lambda *_: None)
    monkeypatch.setattr(towers, "text_shortcut", lambda *_: None)
    want = run(copy.deepcopy(model))  # a copy of the user's own, of which nothing is known
    assert ways(want.model) == {"image": False, "text": False}
    for one, other in zip(got.history, want.history, strict=True):
        for key in ("loss", "s_image", "s_text"):
            assert one[key] == pytest.approx(other[key], rel=1e-3, abs=1e-5), key


def test_evaluation_takes_the_shortcut():
    model = tiny(text_cfg=TEXT | {"vocab_size": 49408}).model
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    tokenize = open_clip.get_tokenizer("", context_length=16)
    reader = FeatureReader(model, tokenize, mean=(0.5,) * 3, std=(0.5,) * 3)
    names = ["a photo of a cat", "a photo of a dog", "a cat"]
    torch.testing.assert_close(
        reader.captions(names), text_features(model, tokenize(names)).detach(), rtol=1e-5, atol=1e-6
    )
    assert ways(model)["text"]
