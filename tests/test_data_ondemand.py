"""Images decoded on demand: kept once decoded, never half, and broken ones replaced alike."""

import errno
import json
import multiprocessing
import os
import pickle
import random
import signal
import threading
import time
import types

import numpy as np
import pytest
import torch
import warm
from data_files import noise
from PIL import Image
from shard_files import image_bytes, samples, write_shard

from pybackdoor.data import BrokenImage, Overlay, PairLoader, ondemand, pairs_from_shards, rows
from pybackdoor.data.preprocess import Preprocessing
from pybackdoor.data.rows import DiskRows

N = 12


def tokenize(texts):
    return torch.tensor([[len(text), sum(text.encode()), 0, 0] for text in texts])


def read(folder, **options):
    options = {"image_size": 8, "max_bad": 0.5, "num_workers": 2, **options}
    return pairs_from_shards(folder / "s.tar", cache_dir=folder / "cache", **options)


def expected(count=N):
    return np.stack([Preprocessing(8)(Image.fromarray(noise(20, 24, i))) for i in range(count)])


@pytest.fixture
def shard(tmp_path):
    write_shard(tmp_path / "s.tar", samples(N))
    return tmp_path


@pytest.fixture
def broken(tmp_path):
    """Rows 2, 3 and 7 are cut images."""
    members = samples(N)
    for row in (2, 3, 7):
        members[2 * row] = (members[2 * row][0], image_bytes(row)[:300])
    write_shard(tmp_path / "s.tar", members)
    return tmp_path


@pytest.fixture
def decoded(monkeypatch):
    """Sizes of the files decoded so far."""
    sizes = []
    decode = ondemand.decode_bytes

    def counted(content, preprocessing):
        sizes.append(len(content))
        return decode(content, preprocessing)

    monkeypatch.setattr(ondemand, "decode_bytes", counted)
    return sizes


def epoch(pairs, **options):
    loader = PairLoader(pairs, tokenize, **{"batch_size": 4, "seed": 1, **options})
    return [(batch["ids"].tolist(), batch["images"].numpy()) for batch in loader]


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("cache", ["disk", "ram", "none"])
def test_second_epoch_decodes_nothing(shard, decoded, cache, workers):
    pairs = read(shard, cache=cache, num_workers=workers)
    assert not decoded  # training starts at once
    wanted = expected()
    for _ in range(2):
        for ids, images in epoch(pairs):
            np.testing.assert_array_equal(images, wanted[ids])
    assert len(decoded) == (2 * N if cache == "none" else N)
    epoch(read(shard, cache=cache))
    assert len(decoded) == {"disk": N, "ram": 2 * N, "none": 3 * N}[cache]
    assert bool(list((shard / "cache").glob("*.px"))) is (cache == "disk")


def test_half_an_epoch_is_kept(shard, decoded):
    read(shard).images.take([1, 5])
    assert len(decoded) == 2
    np.testing.assert_array_equal(read(shard).images.take(range(N)), expected())
    assert len(decoded) == N


def flipped(path, at):
    with open(path, "r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))


@pytest.mark.parametrize("suffix", ["px", "row"])
def test_damaged_rows_are_decoded_again(shard, decoded, suffix):
    read(shard).decoded()
    (file,) = (shard / "cache").glob(f"*.{suffix}")
    size = file.stat().st_size // N
    places = (
        range(0, N * size, 1) if suffix == "row" else random.Random(0).sample(range(N * size), 50)
    )
    for at in places:
        flipped(file, at)
        del decoded[:]
        images = read(shard).images
        np.testing.assert_array_equal(images.take([at // size])[0], expected()[at // size])
        assert len(decoded) == 1, at
    del decoded[:]
    file.write_bytes(file.read_bytes()[: 5 * size + 3])
    np.testing.assert_array_equal(read(shard).images.take(range(N)), expected())
    assert len(decoded) == N - 5


def test_a_row_whose_pixels_never_came_is_not_valid(shard, decoded):
    """As after a power failure that kept the records and lost the pixels."""
    read(shard).decoded()
    (file,) = (shard / "cache").glob("*.px")
    file.write_bytes(bytes(file.stat().st_size))
    np.testing.assert_array_equal(read(shard).images.take(range(N)), expected())
    assert len(decoded) == 2 * N


FILL = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_data_ondemand import read
images = read(Path(sys.argv[1]), num_workers=2, image_size=64).images
print("go", flush=True)
for row in range(len(images)):
    images.take([row])
"""


def test_kills_leave_no_false_row(tmp_path, decoded):
    count = 60
    write_shard(tmp_path / "s.tar", samples(count))
    rng = random.Random(0)
    states = []
    wanted = np.stack([Preprocessing(64)(Image.fromarray(noise(20, 24, i))) for i in range(count)])
    for _ in range(2):  # tests/stress/kills.py does more
        process = warm.Popen(["-c", FILL, str(tmp_path), str(warm.HERE)], cwd=tmp_path)
        assert process.stdout.readline() == "go\n"
        time.sleep(rng.uniform(0, 0.02))
        process.kill()
        process.communicate()
        del decoded[:]
        pairs = read(tmp_path, image_size=64, num_workers=1)
        half = np.arange(0, count, 2)
        np.testing.assert_array_equal(pairs.images.take(half), wanted[half])
        states.append(len(decoded))
    np.testing.assert_array_equal(pairs.images.take(range(count)), wanted)
    assert states[-1] == 0


def fill(folder, seed, out):
    pairs = read(folder)
    order = random.Random(seed).sample(range(N), N)
    out.put(pairs.images.take(order)[np.argsort(order)].tobytes())


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_processes_share_a_cache(shard):
    context = multiprocessing.get_context("fork")
    out = context.Queue()
    workers = [context.Process(target=fill, args=(shard, seed, out)) for seed in range(4)]
    for worker in workers:
        worker.start()
    results = [out.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    assert results == [expected().tobytes()] * 4


def test_full_disk_is_noticed_before_decoding(shard, decoded, monkeypatch):
    usage = types.SimpleNamespace(free=N * 192 - 1)
    monkeypatch.setattr(rows.shutil, "disk_usage", lambda _: usage)
    match = "pairs_from_shards: the image cache in .* 2,304 bytes are needed, 2,303 are free"
    with pytest.raises(OSError, match=match) as caught:
        read(shard)
    assert caught.value.errno == errno.ENOSPC and not decoded
    assert len(read(shard, cache="none")) == N
    usage.free += 1
    read(shard).images.take([0, 1, 2])
    usage.free -= 3 * 192  # what is decoded needs no room any more
    read(shard)


def test_disk_that_fills_up_stops_the_cache_not_the_run(shard, monkeypatch):
    pairs = read(shard)
    pairs.images.take([0])

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(rows.os, "pwrite", full)
    with pytest.warns(RuntimeWarning, match="cannot grow .No space left on device.: further"):
        np.testing.assert_array_equal(pairs.images.take(range(N)), expected())
    np.testing.assert_array_equal(pairs.images.take(range(N)), expected())


def test_memory_is_checked(tmp_path, shard, monkeypatch):
    monkeypatch.setattr(rows.os, "sysconf", lambda _: 32)
    with pytest.raises(MemoryError, match=r'cache="ram" needs 2,304 bytes, the machine has 1,024'):
        read(shard, cache="ram")
    with pytest.raises(ValueError, match="cache must be one of disk, ram, device, none, got 'all'"):
        read(shard, cache="all")
    with pytest.raises(ValueError, match="num_workers must be at least 1, got 0"):
        read(shard, num_workers=0)


def test_read_only_cache_is_used(shard, decoded, monkeypatch):
    read(shard).decoded()
    real = os.open

    def refused(path, flags, *rest):
        if flags & (os.O_RDWR | os.O_WRONLY):
            raise OSError(errno.EROFS, "Read-only file system")
        return real(path, flags, *rest)

    monkeypatch.setattr(rows.os, "open", refused)
    np.testing.assert_array_equal(read(shard).images.take(range(N)), expected())
    assert len(decoded) == N


def test_broken_images_are_refused_by_take_and_left_out_by_decoded(broken, decoded):
    pairs = read(broken)
    match = r"image 3 \(.*s.tar#00003.png\) cannot be used: .*; Pairs.decoded\(\) leaves"
    with pytest.raises(BrokenImage, match=match):
        pairs.images.take([0, 3])
    good = pairs.decoded()
    kept = [i for i in range(N) if i not in (2, 3, 7)]
    assert good.ids.tolist() == kept and good.captions == [f"caption {i}" for i in kept]
    np.testing.assert_array_equal(good.images.take(range(len(kept))), expected()[kept])
    assert sorted(bad.row for bad in pairs.ledger.rows) == [2, 3, 7]
    lines = [json.loads(line) for line in pairs.ledger.path.read_text().splitlines()]
    assert sorted(line["row"] for line in lines) == [2, 3, 7]
    del decoded[:]
    again = read(broken)  # knows them without looking
    assert sorted(bad.row for bad in again.ledger.rows) == [2, 3, 7]
    assert again.decoded().ids.tolist() == kept and not decoded


def substitutes(order, batch_size, bad):
    """The documented rule, written again."""
    order, out = order.tolist(), []
    for place, row in enumerate(order):
        step = 0
        while row in bad:
            row = order[(place + batch_size + step) % len(order)]
            step += 1
        out.append(row)
    return out


@pytest.mark.parametrize("cache", ["disk", "none"])
def test_broken_images_are_replaced_alike_on_every_rank_and_after_resuming(broken, cache):
    from pybackdoor.data._keyed import permutation

    wanted = substitutes(permutation(1, 0, N), 4, {2, 3, 7})
    one = epoch(read(broken, cache=cache))
    assert sum((ids for ids, _ in one), []) == wanted
    for ids, images in one:
        np.testing.assert_array_equal(images, expected()[ids])
    shares = [epoch(read(broken, cache=cache), rank=r, world_size=2) for r in range(2)]
    for step, (ids, _) in enumerate(one):
        assert shares[0][step][0] + shares[1][step][0] == ids
    loader = PairLoader(read(broken, cache=cache), tokenize, batch_size=4, seed=1)
    loader.load_state_dict({"seed": 1, "epoch": 0, "position": 4})
    rest = [(batch["ids"].tolist(), batch["tokens"][:, 1].tolist()) for batch in loader]
    assert [ids for ids, _ in rest] == [ids for ids, _ in one[1:]]
    for ids, sums in rest:  # captions and images stay together
        assert sums == [sum(f"caption {i}".encode()) for i in ids]


def test_too_many_broken_images_stop_the_run(broken):
    pairs = read(broken, max_bad=0.2)
    with pytest.raises(ValueError, match=r"at least 3 of 12 rows cannot be used, and max_bad=0.2"):
        epoch(pairs)
    with pytest.raises(ValueError, match="at least 3 of 12 rows"):  # and so does the next run
        read(broken, max_bad=0.2)


def test_all_broken(tmp_path):
    write_shard(tmp_path / "s.tar", [(f"{i}.{e}", b"x") for i in range(4) for e in ("png", "txt")])
    with pytest.raises(ValueError, match="none of the images can be decoded"):
        epoch(read(tmp_path, max_bad=1.0))


def test_views_pass_broken_images_on(broken):
    pairs = read(broken)
    patch = np.full((8, 8, 3), 7, np.uint8)
    over = Overlay(pairs.images, {3: patch, 5: patch})
    images, bad = over.attempt([7, 3, 5, 0])
    assert set(bad) == {0} and (images[1:3] == 7).all()
    np.testing.assert_array_equal(images[3], expected()[0])
    subset = pairs.subset([5, 2, 4])
    images, bad = subset.images.attempt([0, 1, 2])
    assert set(bad) == {1}
    np.testing.assert_array_equal(images[[0, 2]], expected()[[5, 4]])
    assert subset.decoded().ids.tolist() == [5, 4]


def test_decoded_sees_through_an_overlay(broken):
    from dataclasses import replace

    pairs = read(broken)
    patch = np.full((8, 8, 3), 7, np.uint8)
    patched = replace(pairs, images=Overlay(pairs.images, {3: patch}))
    kept = [i for i in range(N) if i not in (2, 7)]
    assert patched.decoded().ids.tolist() == kept
    assert patched.subset([7, 3, 2, 1]).decoded().ids.tolist() == [3, 1]


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_loader_pickles_and_forks(shard):
    pairs = read(shard)
    wanted = [ids for ids, _ in epoch(pairs)]
    for cache in ("disk", "ram", "none"):
        again = pickle.loads(pickle.dumps(read(shard, cache=cache)))
        for ids, images in epoch(again):
            np.testing.assert_array_equal(images, expected()[ids])
    child = os.fork()
    if child == 0:
        os._exit(0 if [ids for ids, _ in epoch(pairs)] == wanted else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_stamp_of_a_row_tells_files_apart(tmp_path):
    store = DiskRows("op", tmp_path / "x", 3, (2, 2))
    pixels, out = np.arange(12, dtype=np.uint8).reshape(2, 2, 3), np.empty((2, 2, 3), np.uint8)
    store.put(1, 99, pixels)
    assert store.get(1, 99, out) and np.array_equal(out, pixels)
    assert not store.get(1, 98, out) and not store.get(0, 99, out) and not store.get(0, 0, out)
    assert store.kept().tolist() == [False, True, False]


def test_ctrl_c_ends_the_loop(shard, monkeypatch):
    pairs = read(shard)
    decode = ondemand.decode_bytes

    sent = []

    def interrupted(content, preprocessing):
        time.sleep(0.05)  # the loop waits for the batch by then
        if not sent:
            sent.append(os.kill(os.getpid(), signal.SIGINT))
        return decode(content, preprocessing)

    monkeypatch.setattr(ondemand, "decode_bytes", interrupted)
    with pytest.raises(KeyboardInterrupt):
        epoch(pairs)
    assert not [t for t in threading.enumerate() if t.name == "pybackdoor-prefetch"]
