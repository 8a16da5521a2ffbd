"""Images kept on a device: gathered there, and the same as from anywhere else.

A CPU device stands in for a GPU; the code is one.
"""

from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from dual_encoder import MEAN, STD, DualEncoder
from shard_files import image_bytes, samples, write_shard
from test_data_ondemand import N, decoded, epoch, expected, read, tokenize  # noqa: F401

import pybackdoor
from pybackdoor.cli import inputs
from pybackdoor.cli.configs import PairOptions
from pybackdoor.data import Overlay, PairLoader, indexed, rows
from pybackdoor.data.rows import DeviceRows, MemoryRows
from pybackdoor.data.store import gather, subset_images
from pybackdoor.engine import banks

CPU = torch.device("cpu")


@pytest.fixture
def on_device(monkeypatch):
    """cache="device" with the rows of a device, wherever it is."""
    monkeypatch.setattr(
        indexed, "MemoryRows", lambda op, count, size: DeviceRows(op, count, size, CPU)
    )


def shard(folder, broken=()):
    members = samples(N)
    for row in broken:
        members[2 * row] = (members[2 * row][0], image_bytes(row)[:300])
    write_shard(folder / "s.tar", members)
    return folder


@pytest.mark.parametrize("workers", [1, 3])
def test_second_epoch_decodes_nothing(tmp_path, decoded, on_device, workers):  # noqa: F811
    pairs = read(shard(tmp_path), cache="device", num_workers=workers)
    assert isinstance(pairs.images._rows, DeviceRows) and not decoded
    for _ in range(2):
        for ids, images in epoch(pairs):
            np.testing.assert_array_equal(images, expected()[ids])
    assert len(decoded) == N
    np.testing.assert_array_equal(pairs.images.take([3, 0]), expected()[[3, 0]])
    assert len(decoded) == N and not pairs.images.pending().any()
    assert not list((tmp_path / "cache").glob("*.px"))


def test_a_batch_is_gathered_where_the_images_are(tmp_path, on_device, monkeypatch):
    pairs = read(shard(tmp_path), cache="device").decoded(progress=False)
    monkeypatch.setattr(DeviceRows, "get", lambda *_: pytest.fail("went through the host"))
    kept = pairs.images._rows._pixels
    asked = []
    monkeypatch.setattr(
        DeviceRows, "gather", lambda self, rows: asked.append(rows) or kept[torch.tensor(rows)]
    )
    for batch in PairLoader(pairs, tokenize, batch_size=4):
        np.testing.assert_array_equal(batch["images"], expected()[batch["ids"]])
    assert len(asked) == 3


@pytest.mark.parametrize("broken", [[3], [2, 3, 7]])
def test_broken_images_are_replaced_by_the_same_pairs(tmp_path, on_device, broken):
    shard(tmp_path, broken)
    wanted = epoch(read(tmp_path, cache="none"))
    got = epoch(read(tmp_path, cache="device"))
    for (ids, images), (other_ids, others) in zip(got, wanted, strict=True):
        assert ids == other_ids and not set(ids) & set(broken)
        np.testing.assert_array_equal(images, others)
    pairs = read(tmp_path, cache="device")
    images, bad = pairs.images.gather([1, *broken, 4])
    assert sorted(bad) == list(range(1, len(broken) + 1)) and len(images) == 2 + len(broken)
    np.testing.assert_array_equal(images[[0, -1]], expected()[[1, 4]])


@pytest.mark.parametrize("cache", ["device", "ram"])
def test_views_of_the_images_gather_too(tmp_path, request, cache):
    if cache == "device":
        request.getfixturevalue("on_device")
    pairs = read(shard(tmp_path, [5]), cache=cache)
    patch = np.full((8, 8, 3), 7, np.uint8)
    patched = Overlay(pairs.images, {2: patch, 9: patch})
    wanted = expected()
    wanted[[2, 9]] = 7
    view = subset_images(patched, [9, 5, 0, 2, 2])
    for rows_, bad_at in (([0, 1, 2, 3, 4], {1}), ([0, 3], set()), ([2, 2], set()), ([], set())):
        images, bad = gather(view, np.array(rows_, np.int64))
        assert isinstance(images, torch.Tensor) and set(bad) == bad_at
        good = [i for i in range(len(rows_)) if i not in bad_at]
        picked = np.array([9, 5, 0, 2, 2])[np.array(rows_, np.int64)[good]]
        np.testing.assert_array_equal(images[good], wanted[picked])


def test_a_file_that_has_changed_is_decoded_again(tmp_path, on_device):
    from PIL import Image

    for i, name in enumerate("ab"):
        Image.new("RGB", (8, 8), (i, 9, 9)).save(tmp_path / f"{name}.png")
    (tmp_path / "p.csv").write_text("image,caption\na.png,one\nb.png,two\n")
    pairs = pybackdoor.data.pairs_from_csv(
        tmp_path / "p.csv", image_size=8, cache="device", cache_dir=tmp_path / "cache", max_bad=0.5
    )
    assert pairs.images.gather([0, 1])[0][:, 0, 0, 0].tolist() == [0, 1]
    Image.new("RGB", (8, 8), (200, 9, 9)).save(tmp_path / "b.png")
    assert pairs.images.gather([1, 0])[0][:, 0, 0, 0].tolist() == [200, 0]
    (tmp_path / "a.png").unlink()
    assert set(pairs.images.gather([0, 1])[1]) == {0}


def test_a_run_on_them_is_the_run(tmp_path, on_device):
    shard(tmp_path)
    options = {"mean": MEAN, "std": STD, "progress": False, "precision": "fp32", "lr": 1e-2}

    def words(texts):
        return torch.tensor([[len(text), sum(text.encode()) % 50] for text in texts])

    def run(cache):
        pairs = read(tmp_path, cache=cache, image_size=16)
        loader = PairLoader(pairs, words, batch_size=4)
        return pybackdoor.par_clean(DualEncoder(), loader, epochs=2, **options).history

    assert run("device") == run("none")


def test_its_stream_is_entered_on_its_device(monkeypatch):
    """Else the one that a thread comes back to is the first GPU's."""
    kept, image = DeviceRows("x", 2, (4, 4), CPU), np.full((4, 4, 3), 7, np.uint8)
    open_, seen = [], []

    def spied(name):
        @contextmanager
        def enter(what):
            open_.append((name, what))
            seen.append(list(open_))
            yield
            assert open_.pop() == (name, what)

        monkeypatch.setattr(torch.cuda, name, enter)

    for name in ("device", "stream"):
        spied(name)
    kept._stream = "its own"
    kept.put(1, 5, image)
    out = np.zeros_like(image)
    assert kept.get(1, 5, out) and (out == image).all()
    assert seen == [[("device", CPU)], [("device", CPU), ("stream", "its own")]] * 2


@pytest.mark.gpu
def test_batches_on_a_gpu_hold_while_another_stream_reads_them(tmp_path):
    pairs = read(shard(tmp_path), cache="device")
    stream = torch.cuda.Stream()
    for _ in range(3):
        with torch.cuda.stream(stream):
            sums = {}
            for batch in PairLoader(pairs, tokenize, batch_size=2, prefetch=4):
                torch.cuda._sleep(5_000_000)  # the thread is ahead of this stream
                sums |= dict(
                    zip(batch["ids"].tolist(), batch["images"].sum((1, 2, 3)), strict=True)
                )
        stream.synchronize()
        for row, total in sums.items():
            assert total.item() == expected()[row].sum(dtype=np.int64)


def test_what_does_not_fit_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "free_memory", lambda device: N * 192 - 1)
    match = 'cache="device" needs 2,304 bytes on cpu, 2,303 are free.* choose cache="ram", "disk"'
    with pytest.raises(MemoryError, match=match):
        DeviceRows("pairs_from_shards", N, (8, 8), CPU)


def test_what_torch_holds_unused_is_free(monkeypatch):
    told = {"mem_get_info": (100, 1 << 20), "memory_reserved": 900, "memory_allocated": 500}
    asked = []
    for name, value in told.items():
        monkeypatch.setattr(
            torch.cuda, name, lambda device, value=value: asked.append(device) or value
        )
    gpu = torch.device("cuda:1")
    assert rows.free_memory(gpu) == 500 and set(asked) == {gpu}
    assert rows.free_memory(CPU) == rows.host_memory()
    like = SimpleNamespace(
        is_cuda=True, device=gpu, dtype=torch.uint8, element_size=lambda: 1,
        new_empty=lambda shape: f"{shape} on the GPU",
    )  # fmt: skip
    assert banks.bank((5, 25), like) == "(5, 25) on the GPU"  # a quarter of it
    assert banks.bank((5, 26), like).device == CPU


def test_which_device(tmp_path, monkeypatch):
    shard(tmp_path)
    assert type(read(tmp_path, cache=CPU).images._rows) is MemoryRows
    made = []
    monkeypatch.setattr(indexed, "DeviceRows", lambda *given: made.append(given))
    read(tmp_path, cache=torch.device("cuda:1"))
    monkeypatch.setattr(
        "pybackdoor.engine.pick_device", lambda device: torch.device(device or "cuda:3")
    )
    read(tmp_path, cache="device")
    assert [given[3] for given in made] == [torch.device("cuda:1"), torch.device("cuda:3")]
    assert made[0][:3] == ("pairs_from_shards", N, (8, 8))


def test_the_command_takes_the_training_device(monkeypatch):
    asked = {}
    monkeypatch.setattr(
        inputs.data, "pairs_from_shards", lambda source, **given: asked.update(given)
    )
    monkeypatch.setattr(inputs, "_decoding", lambda *_: {})
    monkeypatch.setattr(inputs, "pick_device", lambda device: torch.device(device))

    class Options(PairOptions):
        device = "cuda:1"

    inputs.read_pairs(Options(pairs="x.tar", cache="device"), None)
    assert asked["cache"] == torch.device("cuda:1")
    inputs.read_pairs(Options(pairs="x.tar"), None)
    assert asked["cache"] == "disk"
