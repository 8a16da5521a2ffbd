"""Captions as tokens: tokenised once, lossless, and cut captions are counted."""

import numpy as np
import pytest
import torch

from pybackdoor.data import PairLoader, pairs_from_arrays
from pybackdoor.data import tokens as tokens_module
from pybackdoor.data.tokens import TokenTable, caption_told_apart

CAPTIONS = [
    "a photo of a dog.", "", "a a a a a a a a", "b" * 30, "a photo of a dog.", "Übergröße ☃",
    "one two three four five six", "one two three four five six seven", "<end_of_text>",
]  # fmt: skip


@pytest.fixture
def chunks_of_two(monkeypatch):
    monkeypatch.setattr(tokens_module, "_CHUNK", 2)


@pytest.fixture(scope="module")
def simple():
    return pytest.importorskip("open_clip").SimpleTokenizer


@pytest.mark.parametrize("length", [3, 8, 9, 77])
def test_open_clip_tokens_and_truncation(simple, chunks_of_two, length):
    tokenizer = simple(context_length=length)
    table = TokenTable(CAPTIONS, tokenizer)
    rows = [3, 8, 0, 0, 5, 7, 1]
    torch.testing.assert_close(
        table.take(np.array(rows)), tokenizer([CAPTIONS[row] for row in rows]), rtol=0, atol=0
    )
    assert table.length == length and len(table) == len(CAPTIONS)
    long = sum(len(tokenizer.encode(caption)) + 2 > length for caption in CAPTIONS)
    assert table.num_truncated == long
    # "one two three four five six" needs exactly 8 tokens and is whole at 8.
    assert long == {3: 7, 8: 4, 9: 3, 77: 0}[length]


def test_loader_warns_once_of_cut_captions(simple):
    pairs = pairs_from_arrays(np.zeros((4, 2, 2), np.uint8), ["a b c d", "a", "a b c d", "a b"])
    loader = PairLoader(pairs, simple(context_length=4), batch_size=2)
    with pytest.warns(UserWarning, match="2 of 4 captions are longer than the context length of 4"):
        list(loader)
    list(loader)  # warnings are errors here


def hugging_face(**options):
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    words = ["<pad>", "<s>", "</s>", "<unk>", "a", "b", "c"]
    backend = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, "<unk>")
    )
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="</s>", unk_token="<unk>", **options
    )


@pytest.mark.parametrize("pad", ["<pad>", "</s>"])  # OpenAI's own pads with the end mark
def test_hugging_face_tokenizer(chunks_of_two, pad):
    tokenizer = hugging_face(pad_token=pad, model_max_length=5)
    table = TokenTable(["a", "a b c", "a b c a", "c c c c c"], tokenizer)
    p = 0 if pad == "<pad>" else 2
    assert table.take(np.arange(4)).tolist() == [
        [1, 4, 2, p, p], [1, 4, 5, 6, 2], [1, 4, 5, 6, 2], [1, 6, 6, 6, 2],
    ]  # fmt: skip
    assert table.num_truncated == 2

    class Wrapped:  # as open_clip wraps it
        def __init__(self):
            self.tokenizer = tokenizer

        def __call__(self, texts):
            return tokenizer(
                texts, padding="max_length", truncation=True, max_length=5, return_tensors="pt"
            )["input_ids"]

    assert TokenTable(["a b c a", "a"], Wrapped()).num_truncated == 1


def test_tokenizers_are_compared_by_their_tokens_but_not_their_padding():
    own, other = (hugging_face(pad_token=pad, model_max_length=5) for pad in ("<pad>", "</s>"))
    texts = ["a", "a b c", "a b c a", "c c c c c", "x"]
    for pair in ((own, other), (other, own), (own, own)):
        assert caption_told_apart(*pair, texts) is None
    assert (
        caption_told_apart(own, hugging_face(pad_token="<pad>", model_max_length=6), texts) == "a"
    )

    def without_b(captions):
        return other([text.replace("b", "") for text in captions], padding="max_length",
                     truncation=True, max_length=5, return_tensors="pt")["input_ids"]  # fmt: skip

    assert caption_told_apart(own, without_b, texts) == "a b c"
    assert caption_told_apart(without_b, own, ["a"] * 400 + ["a b"]) is None  # some are looked at


def test_hugging_face_tokenizer_without_a_length():
    with pytest.raises(ValueError, match="model_max_length must be the model's context length"):
        TokenTable(["a"], hugging_face(pad_token="<pad>"))


def test_each_caption_is_tokenised_once(chunks_of_two):
    seen = []

    def tokenizer(texts):
        seen.extend(texts)
        return torch.tensor([[len(text), 7, 7] for text in texts])

    pairs = pairs_from_arrays(np.zeros((6, 1, 1), np.uint8), ["a", "bb", "a", "bb", "a", "ccc"])
    loader = PairLoader(pairs, tokenizer, batch_size=2)
    assert seen == []  # not before the first iteration
    for _ in range(2):
        for batch in loader:
            lengths = [len(pairs.captions[i]) for i in batch["ids"]]
            assert batch["tokens"].tolist() == [[n, 7, 7] for n in lengths]
    assert seen == ["a", "bb", "ccc"]
    assert loader._tokens.num_truncated is None  # it cannot be asked


def test_padding_is_not_kept():
    captions = [str(i) for i in range(1000)]
    table = TokenTable(captions, lambda texts: torch.tensor([[int(t)] + [9] * 76 for t in texts]))
    assert table._flat.dtype == np.int32 and table._flat.size == 1000 * 2 - 1  # "9" is all nines
    assert table.take(np.array([9, 5])).tolist() == [[9] * 77, [5] + [9] * 76]


@pytest.mark.parametrize(
    ("tokenizer", "error", "match"),
    [
        (None, TypeError, "must be callable, got NoneType"),
        (lambda t: [[1]] * len(t), TypeError, "must return an integer tensor, got list"),
        (lambda t: torch.ones(len(t), 3), TypeError, "integer tensor, got torch.float32"),
        (lambda t: torch.ones(1, 3, dtype=torch.long), ValueError, r"\[2, 'L'\] .* got \[1, 3\]"),
        (lambda t: torch.ones(len(t), 0, dtype=torch.long), ValueError, r"got \[2, 0\]"),
        (lambda t: torch.ones(len(t), dtype=torch.long), ValueError, r"got \[2\]"),
        (lambda t: torch.full((len(t), 2), 2**31), ValueError, "tokens below 2\\^31"),
        (lambda t: torch.ones(len(t), len(t[0]), dtype=torch.long), ValueError,
         r"\[1, 1\] for 1 captions, got \[1, 3\]"),
    ],
)  # fmt: skip
def test_tokenizer_that_is_none(chunks_of_two, tokenizer, error, match):
    with pytest.raises(error, match=f"PairLoader: .*{match}"):
        TokenTable(["a", "b", "abc"], tokenizer)


@pytest.mark.parametrize(("progress", "shown"), [(True, True), (False, False), (None, False)])
def test_progress_bar(capsys, progress, shown):
    TokenTable(["a"], lambda texts: torch.ones(len(texts), 2, dtype=torch.long), progress=progress)
    assert ("tokenising" in capsys.readouterr().err) is shown


def test_rewritten_captions_keep_the_numbers_of_the_old():
    captions = ["b", "a", "b", "cc", "a"]  # "a" and "b" become the same

    def tokens(texts):
        return torch.tensor([[len(text), *map(ord, text.ljust(3))] for text in texts])

    table, asked = TokenTable(captions, tokens), []
    other = table.rewritten(captions, lambda c: asked.append(c) or c.replace("b", "a"), tokens)
    assert asked == ["b", "a", "cc"] and len(other) == len(table.different) == 3
    numbers = table.numbers(np.arange(5))
    assert torch.equal(other.tokens(numbers), tokens(["a", "a", "a", "cc", "a"]))
    assert other.lengths().tolist() == [3, 3, 4]
