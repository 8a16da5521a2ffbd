"""Captions without their common padding: the same features and gradients, or none is cut."""

import copy

import open_clip
import pytest
import torch
from dual_encoder import DualEncoder
from open_clip.model import CLIP, CustomTextCLIP

from pybackdoor.engine.towers import Encoder, TextTrim
from pybackdoor.features import FeatureReader
from pybackdoor.methods.par import par_clean
from pybackdoor.models import text_features

VISION = {"image_size": 32, "patch_size": 16, "layers": 1, "width": 32, "head_width": 16}
TEXT = {"context_length": 77, "vocab_size": 49408, "layers": 2, "width": 32, "heads": 2}
CAPTIONS = ["a cat", "two dogs on a red sofa", "a photograph of the harbour at dawn, in rain"]


def clip(kind=CLIP, **text):
    torch.manual_seed(0)
    return kind(16, VISION, TEXT | text)


def features_and_gradients(model, tokens):
    model = copy.deepcopy(model)
    rows = text_features(model, tokens)
    (rows * torch.arange(rows.numel()).view_as(rows)).sum().backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return rows.detach(), grads


@pytest.mark.parametrize("kind", [CLIP, CustomTextCLIP])
def test_causal_towers_see_no_padding(kind):
    model, tokens = clip(kind), open_clip.tokenize(CAPTIONS)
    short = TextTrim(model, wanted=True)(tokens)
    assert short.shape == (3, 16) and torch.equal(short, tokens[:, :16])
    (want, grads), (got, again) = (features_and_gradients(model, t) for t in (tokens, short))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    assert grads.keys() == again.keys()
    for name, grad in grads.items():
        scale = float(grad.abs().max()) + 1e-12
        torch.testing.assert_close(again[name], grad, rtol=1e-4, atol=1e-5 * scale, msg=name)


def test_a_full_caption_and_a_tower_that_sees_its_padding_are_left_alone():
    tokens = open_clip.tokenize(["a cat", "cat " * 80])
    assert TextTrim(clip(), wanted=True)(tokens) is tokens
    assert TextTrim(clip(), wanted=False)(tokens[:1]) is not None
    unmasked = clip(CustomTextCLIP, no_causal_mask=True, pool_type="last")
    tokens = open_clip.tokenize(CAPTIONS)
    trim = TextTrim(unmasked, wanted=True)
    assert trim(tokens) is tokens and trim(tokens) is tokens
    assert TextTrim(clip(), wanted=False)(tokens) is tokens


def test_a_tower_of_one_length_is_left_alone():
    class Fixed(DualEncoder):
        def encode_text(self, tokens):
            if tokens.shape[1] != 77:
                raise RuntimeError("77 tokens, please")
            return self.text(tokens.clamp(max=49))

    tokens = open_clip.tokenize(CAPTIONS)
    model = Fixed().train()
    assert TextTrim(model, wanted=True)(tokens) is tokens
    assert model.training and model.image[1].training


@pytest.mark.parametrize("compiled, step", [(False, 8), (True, 16)])
def test_lengths_are_few(compiled, step):
    trim, found = TextTrim(clip(), wanted=True, compiled=compiled), set()
    for words in range(1, 76):
        tokens = open_clip.tokenize(["cat " * words])
        short = trim(tokens)
        assert int(tokens.argmax(1)) < short.shape[1]
        found.add(short.shape[1])
    assert found == {*range(step, 77, step), 77}


def of_lengths(*counts):
    """Captions of so many tokens with both marks, in a shuffled order."""
    order = torch.randperm(len(counts), generator=torch.Generator().manual_seed(0)).tolist()
    return open_clip.tokenize(["cat " * (counts[i] - 2) for i in order])


@pytest.mark.parametrize(
    "counts, wanted",
    [
        ([6] * 40 + [14] * 40 + [30] * 3, [(40, 8), (40, 16), (3, 32)]),
        ([6] * 3 + [14] * 40 + [30] * 3, [(43, 16), (3, 32)]),  # 3 save too little
        ([6] * 3 + [14] * 3, [(6, 16)]),
        ([6] * 40 + [80] * 2, [(40, 8), (2, 77)]),  # one is as long as the context
        ([6] * 40, [(40, 8)]),
    ],
)
def test_groups_have_the_features_and_gradients_of_the_whole(counts, wanted):
    model, tokens = clip().train(), of_lengths(*counts)
    captions = TextTrim(model, wanted=True, grouped=True)(tokens)
    assert [(len(rows), length) for rows, length in captions.groups()] == wanted
    encode = Encoder(None, torch.device("cpu"))
    weights = torch.arange(16.0 * len(tokens)).view(-1, 16)

    def run(given):
        model.zero_grad()
        rows = encode.text(model, given)
        (rows * weights).sum().backward()
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        return rows.detach(), grads

    (want, grads), (got, again) = run(tokens), run(captions)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    for name, grad in grads.items():
        scale = float(grad.abs().max()) + 1e-12
        torch.testing.assert_close(again[name], grad, rtol=1e-4, atol=1e-5 * scale, msg=name)
    half = captions[len(tokens) // 2 :]
    torch.testing.assert_close(
        encode.text(model, half).detach(), want[len(tokens) // 2 :], rtol=1e-5, atol=1e-6
    )


def test_groups_are_for_towers_that_see_no_padding():
    tokens = of_lengths(*[6] * 40, *[14] * 40)
    unmasked = clip(CustomTextCLIP, no_causal_mask=True, pool_type="last")
    assert TextTrim(unmasked, wanted=True, grouped=True)(tokens) is tokens
    full = open_clip.tokenize(["cat " * 80] * 4)
    assert TextTrim(clip(), wanted=True, grouped=True)(full) is full


@pytest.mark.parametrize("micro_batch", [None, 24])
def test_a_cleaning_run_in_groups_is_the_run_on_whole_captions(micro_batch):
    tokens = of_lengths(*[6] * 40, *[14] * 40)
    pixels = torch.randint(
        0, 256, (80, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    common = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "precision": "fp32", "progress": False}
    common |= {"device": "cpu", "lr_start": 1e-3, "lr": 1e-3, "epochs": 3, "augment": False}
    got, want = (
        par_clean(clip(), [(pixels, tokens)], trim_text=trim, micro_batch=size, **common).history
        for trim, size in ((True, micro_batch), (False, None))
    )
    assert len(want) == 3 and want[2]["s_text"] > 1e-3
    for one, other in zip(got, want, strict=True):
        for name in ("loss", "s_image", "s_text"):
            assert one[name] == pytest.approx(other[name], rel=1e-3, abs=1e-6), name


def test_evaluation_trims_to_the_same_features():
    model, lengths = clip(), []
    before = model.encode_text

    def encode_text(tokens):
        lengths.append(tokens.shape[1])
        return before(tokens)

    model.encode_text = encode_text
    reader = FeatureReader(model, open_clip.tokenize, mean=(0.5,) * 3, std=(0.5,) * 3)
    got = reader.captions(CAPTIONS)
    assert lengths[-1] == 16
    with torch.no_grad():
        want = text_features(model.eval(), open_clip.tokenize(CAPTIONS))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
