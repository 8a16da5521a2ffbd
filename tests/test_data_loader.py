"""The loader: every pair once, resumed exactly, split evenly, and no thread left behind."""

import os
import pickle
import signal
import threading
import time

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pybackdoor.data import PairLoader, pairs_from_arrays
from pybackdoor.data._keyed import keyed_words, mix64, permutation


def tokenize(texts):
    """[n, 4]: the caption's number, its length, padding."""
    return torch.tensor([[int(text), len(text), 0, 0] for text in texts])


def numbered(count):
    """count pairs; image, caption and id of pair i all say i."""
    images = np.zeros((count, 1, 2, 3), np.uint8)
    images[:] = (np.arange(count) % 256)[:, None, None, None]
    return pairs_from_arrays(images, [str(i) for i in range(count)])


def ids_of(batches):
    return [batch["ids"].tolist() for batch in batches]


def no_prefetch_thread():
    return not [t for t in threading.enumerate() if t.name == "pybackdoor-prefetch"]


def splitmix(state):
    """The published next() of SplitMix64 on Python integers."""
    mask = 2**64 - 1
    state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & mask
    state = (state ^ (state >> 27)) * 0x94D049BB133111EB & mask
    return state ^ (state >> 31)


GOLDEN = 0x9E3779B97F4A7C15


def test_mix64_gives_the_published_stream():
    states = (1234567 + GOLDEN * np.arange(1, 4, dtype=object)) % 2**64
    assert mix64(states.astype(np.uint64)).tolist() == [
        6457827717110365317, 3203168211198807973, 9817491932198370423,
    ]  # fmt: skip


@given(st.integers(-(2**70), 2**70), st.integers(0, 2**70))
@settings(max_examples=30, deadline=None)
def test_keyed_words_against_python_integers(seed, stream):
    key = splitmix((splitmix((seed + GOLDEN) % 2**64) + stream * GOLDEN) % 2**64)
    wanted = [splitmix((key + (i + 1) * GOLDEN) % 2**64) for i in range(5)]
    assert keyed_words(seed, stream, np.arange(5)).tolist() == wanted
    assert permutation(seed, stream, 5).tolist() == np.argsort(
        np.array(wanted, np.uint64)
    ).tolist()  # fmt: skip


def test_permutation_of_three_million_is_cheap_and_spread():
    start = time.process_time()
    order = permutation(1, 2, 3_000_000)
    assert time.process_time() - start < 3  # 0.4 s on an idle core
    assert np.array_equal(np.sort(order), np.arange(3_000_000))
    # Of a random order, |correlation with the identity| is below 1 / sqrt(n) * 5 = 0.003.
    assert abs(np.corrcoef(order, np.arange(3_000_000))[0, 1]) < 0.003
    assert (permutation(1, 3, 1000) != permutation(1, 2, 1000)).any()
    assert (permutation(2, 2, 1000) != permutation(1, 2, 1000)).any()


def test_batch_holds_pixels_tokens_and_ids_of_the_same_pairs():
    pairs = numbered(10).subset([7, 3, 9, 1, 0])
    for batch in PairLoader(pairs, tokenize, batch_size=2):
        assert set(batch) == {"images", "tokens", "ids", "captions"}
        assert batch["images"].dtype == torch.uint8 and batch["images"].shape == (2, 1, 2, 3)
        assert batch["tokens"].dtype == batch["ids"].dtype == torch.int64
        for image, tokens, i in zip(*(batch[k] for k in ("images", "tokens", "ids")), strict=True):
            assert (image == i).all() and tokens.tolist() == [i, 1, 0, 0]


loaders = {
    "count": st.integers(2, 40), "batch_size": st.integers(2, 15), "seed": st.integers(0, 99),
    "drop_last": st.booleans(), "shuffle": st.booleans(),
}  # fmt: skip


def usable(count, batch_size, least):
    """Pairs visited: all, less a last batch of fewer than least."""
    return count - (count % batch_size if count % batch_size < least else 0)


@given(epoch=st.integers(0, 3), **loaders)
@settings(max_examples=60, deadline=None)
def test_each_epoch_visits_each_pair_once(count, batch_size, epoch, drop_last, **rest):
    least = batch_size if drop_last else 2
    assume(count >= least)
    loader = PairLoader(
        numbered(count), tokenize, batch_size=batch_size, drop_last=drop_last, **rest
    )
    loader.set_epoch(epoch)
    batches = ids_of(loader)
    assert len(batches) == len(loader)
    visited = sum(batches, [])
    assert len(visited) == usable(count, batch_size, least)
    assert len(set(visited)) == len(visited)
    assert all(len(batch) == batch_size for batch in batches[:-1])
    wanted = permutation(rest["seed"], epoch, count) if rest["shuffle"] else np.arange(count)
    assert visited == wanted[: len(visited)].tolist()
    assert loader.state_dict() == {"seed": rest["seed"], "epoch": epoch + 1, "position": 0}


@given(data=st.data(), **loaders)
@settings(max_examples=60, deadline=None)
def test_resume_anywhere_yields_the_same_remaining_batches(data, count, batch_size, **rest):
    assume(count >= (batch_size if rest["drop_last"] else 2))
    options = {"batch_size": batch_size, "drop_last": rest["drop_last"], "shuffle": rest["shuffle"]}
    loader = PairLoader(numbered(count), tokenize, seed=rest["seed"], **options)
    loader.set_epoch(2)
    batches, states = [], [loader.state_dict()]
    for batch in loader:  # the state in the loop counts the batch being worked on as done
        batches.append(batch["ids"].tolist())
        states.append(loader.state_dict())
    done = data.draw(st.integers(0, len(batches)))
    other = PairLoader(numbered(count), tokenize, seed=12345, **options)
    other.load_state_dict(pickle.loads(pickle.dumps(states[done])))
    assert other.state_dict() == states[done]
    other.set_epoch(2)  # as a training loop does; the position stays
    assert ids_of(other) == batches[done:]
    assert ids_of(other) == ids_of(loader)  # and both go on with the same next epoch


@given(world=st.integers(1, 5), **loaders)
@settings(max_examples=60, deadline=None)
def test_ranks_partition_the_batch(world, count, batch_size, drop_last, **rest):
    batch_size = max(batch_size, world)
    least = batch_size if drop_last else max(2, world)
    assume(count >= least)
    options = {"batch_size": batch_size, "drop_last": drop_last, **rest}
    one = ids_of(PairLoader(numbered(count), tokenize, **options))
    ranks = [
        PairLoader(numbered(count), tokenize, rank=r, world_size=world, **options)
        for r in range(world)
    ]
    parts = [ids_of(loader) for loader in ranks]
    # A single process also keeps a last batch of 2 .. world - 1 pairs; the ranks cannot.
    kept = [batch for batch in one if len(batch) >= world]
    assert len(one) - len(kept) <= 1
    assert [len(part) for part in parts] == [len(kept)] * world == [len(r) for r in ranks]
    for step, batch in enumerate(kept):
        shares = [part[step] for part in parts]
        assert sum(shares, []) == batch
        assert shares == [share.tolist() for share in np.array_split(batch, world)]
        assert min(map(len, shares)) >= 1


def test_resume_with_another_batch_size_and_ranks():
    loader = PairLoader(numbered(23), tokenize, batch_size=4, seed=3)
    iterator = iter(loader)
    done = ids_of([next(iterator), next(iterator)])
    other = PairLoader(
        numbered(23), tokenize, batch_size=5, drop_last=False, rank=0, world_size=1
    )  # fmt: skip
    other.load_state_dict(loader.state_dict())
    visited = sum(done + ids_of(other), [])
    assert visited == permutation(3, 0, 23).tolist()


def test_left_early_the_epoch_starts_again_where_it_started():
    loader = PairLoader(numbered(12), tokenize, batch_size=3, seed=1)
    first = next(iter(loader))["ids"].tolist()  # a peek
    assert loader.epoch == 0 and loader.state_dict()["position"] == 3
    assert ids_of(loader)[0] == first
    assert loader.epoch == 1
    loader.load_state_dict({"seed": 1, "epoch": 0, "position": 6})
    peeked = next(iter(loader))["ids"].tolist()
    assert ids_of(loader)[0] == peeked == permutation(1, 0, 12)[6:9].tolist()
    loader.load_state_dict({"seed": 1, "epoch": 0, "position": 12})
    assert ids_of(loader) == [] and loader.epoch == 1  # it was over


def test_state_between_iterations():
    loader = PairLoader(numbered(12), tokenize, batch_size=3)
    next(iter(loader))
    assert loader.state_dict()["position"] == 3
    iter(loader)
    assert loader.state_dict()["position"] == 0
    for _ in loader:
        loader.set_epoch(5)  # a jump inside the loop is not undone at its end
    assert loader.epoch == 5


def test_state_that_is_no_state():
    loader = PairLoader(numbered(4), tokenize, batch_size=2)
    with pytest.raises(ValueError, match=r"must hold \['seed', 'epoch', 'position'\], got \['a'\]"):
        loader.load_state_dict({"a": 1})
    with pytest.raises(ValueError, match=r"position must be in \[0, 4\], the pairs, got 5"):
        loader.load_state_dict({"seed": 0, "epoch": 0, "position": 5})
    with pytest.raises(ValueError, match="epoch must not be negative, got -1"):
        loader.load_state_dict({"seed": 0, "epoch": -1, "position": 0})
    with pytest.raises(TypeError, match="seed must be an integer, got str"):
        loader.load_state_dict({"seed": "0", "epoch": 0, "position": 0})


@pytest.mark.parametrize(
    ("count", "options", "error", "match"),
    [
        (0, {"batch_size": 2}, ValueError, "at least 2 pairs, got 0"),
        (1, {"batch_size": 2}, ValueError, "at least 2 pairs, got 1"),
        (9, {"batch_size": 1}, ValueError, "batch_size must be at least 2 .* got 1"),
        (9, {"batch_size": 2.0}, TypeError, "batch_size must be an integer, got float"),
        (9, {"batch_size": True}, TypeError, "batch_size must be an integer, got bool"),
        (9, {"batch_size": 2, "rank": 0, "world_size": 3}, ValueError, "each of 3 ranks, got 2"),
        (9, {"batch_size": 10}, ValueError, "9 pairs do not fill .* 10: .* drop_last=False"),
        (2, {"batch_size": 3, "drop_last": False, "rank": 0, "world_size": 3}, ValueError, "of 3:"),
        (9, {"batch_size": 2, "prefetch": 0}, ValueError, "prefetch must be at least 1"),
        (9, {"batch_size": 2, "seed": -1}, ValueError, "seed must not be negative"),
        (9, {"batch_size": 2, "rank": 1}, ValueError, "rank and world_size go together"),
        (9, {"batch_size": 2, "rank": 2, "world_size": 2}, ValueError, "got 2 of 2"),
    ],
)
def test_arguments(count, options, error, match):
    with pytest.raises(error, match=f"PairLoader: .*{match}"):
        PairLoader(numbered(count), tokenize, **options)


def test_rank_comes_from_torch_distributed(monkeypatch):
    assert PairLoader(numbered(4), tokenize, batch_size=2).world_size == 1
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    loader = PairLoader(numbered(4), tokenize, batch_size=4)
    assert (loader.rank, loader.world_size) == (1, 2)
    assert ids_of(loader) == [permutation(0, 0, 4)[2:].tolist()]
    assert PairLoader(numbered(4), tokenize, batch_size=4, rank=0, world_size=1).rank == 0


class Slow:
    """A store that waits, and notes what was asked of it."""

    image_size = (1, 1)

    def __init__(self, count, wait=0.0, error=None):
        self.count, self.wait, self.error, self.taken = count, wait, error, []

    def __len__(self):
        return self.count

    def take(self, indices):
        if self.error and len(self.taken) == 2:
            raise self.error
        self.taken.append(indices)
        time.sleep(self.wait)
        return np.zeros((len(indices), 1, 1, 3), np.uint8)


def slow_loader(store, **options):
    from dataclasses import replace

    pairs = replace(numbered(len(store)), images=store)
    return PairLoader(pairs, tokenize, batch_size=2, **options)


@pytest.mark.parametrize("prefetch", [1, 3])
def test_prefetch_is_bounded(prefetch):
    store = Slow(40)
    iterator = iter(slow_loader(store, prefetch=prefetch))
    for done in range(1, 4):
        next(iterator)
        time.sleep(0.05)
        # delivered, in the queue, and one that waits for room
        assert done < len(store.taken) <= done + prefetch + 1
    iterator.close()
    assert no_prefetch_thread()


@pytest.mark.parametrize("error", [RuntimeError("bad disk"), KeyboardInterrupt(), SystemExit(3)])
def test_what_the_thread_raises_is_raised_in_the_loop(error):
    loader = slow_loader(Slow(40, error=error))
    seen = []
    with pytest.raises(type(error)) as caught:
        for batch in loader:
            seen.append(batch)
    assert caught.value is error and len(seen) == 2 and no_prefetch_thread()
    assert loader.state_dict() == {"seed": 0, "epoch": 0, "position": 4}


@pytest.mark.parametrize("wait", [0.0, 0.02])
@pytest.mark.parametrize("way", ["break", "error", "end", "close", "forgotten"])
def test_no_thread_outlives_the_loop(way, wait):
    loader = slow_loader(Slow(12, wait))
    if way == "close":
        iterator = iter(loader)
        next(iterator)
        iterator.close()
    elif way == "forgotten":
        iterator = iter(loader)
        next(iterator)
        del iterator
    else:
        try:
            for _ in loader:
                if way == "break":
                    break
                if way == "error":
                    raise OSError
        except OSError:
            pass
    assert no_prefetch_thread()
    assert len(ids_of(loader)) == 6  # and the loader goes on


def test_ctrl_c_while_waiting_for_a_batch():
    loader = slow_loader(Slow(40, wait=0.3))
    timer = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        for _ in loader:
            pass
    assert time.monotonic() - start < 5 and no_prefetch_thread()


def test_two_iterations_at_once():
    loader = PairLoader(numbered(12), tokenize, batch_size=3)
    pairs = [(a["ids"].tolist(), b["ids"].tolist()) for a, b in zip(loader, loader, strict=True)]
    assert len(pairs) == 4 and all(a == b for a, b in pairs)
    assert loader.epoch == 1


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_loader_pickles_and_forks():
    loader = PairLoader(numbered(12), tokenize, batch_size=3)
    wanted = ids_of(loader)
    loader.set_epoch(0)
    assert ids_of(pickle.loads(pickle.dumps(loader))) == wanted
    child = os.fork()
    if child == 0:
        os._exit(0 if ids_of(loader) == wanted else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.gpu
@pytest.mark.parametrize("pin_memory", [None, True, False])
def test_batches_are_page_locked(pin_memory):
    torch.zeros(1, device="cuda")
    for batch in PairLoader(numbered(6), tokenize, batch_size=3, pin_memory=pin_memory):
        assert all(value.is_pinned() is (pin_memory is not False) for value in batch.values())
