"""Remote files: tried again with growing waits, given up after a limit."""

import threading
import time

import numpy as np
import pytest
from shard_files import archive, samples
from test_data_ondemand import expected

fsspec = pytest.importorskip("fsspec")

from pybackdoor.data import Retry, pairs_from_shards, remote  # noqa: E402
from pybackdoor.data.remote import OpenFiles, RemoteFile, Windowed  # noqa: E402

FAST = Retry(attempts=4, first=0.001, longest=0.01, timeout=5.0)


class Flaky(fsspec.AbstractFileSystem):
    """A file system whose calls fail as told: one exception, hang or cut answer per call."""

    protocol = "flaky"
    cachable = False
    files: dict = {}
    plan: list = []
    calls: list = []
    etag = "1"

    def info(self, path, **_):
        path = self._strip_protocol(path)
        self._act("info", path)
        if path not in self.files:
            raise FileNotFoundError(path)
        return {"name": path, "size": len(self.files[path]), "type": "file", "ETag": self.etag}

    def ls(self, path, detail=True, **_):
        found = [self.info(name) for name in self.files]
        return found if detail else [one["name"] for one in found]

    def cat_file(self, path, start=None, end=None, **_):
        act = self._act("cat", path)
        content = self.files[path][start:end]
        return content[: len(content) // 2] if act == "cut" else content

    def _open(self, path, mode="rb", **_):
        return Reading(self, path, mode, cache_type="none")

    def _act(self, kind, path):
        self.calls.append((kind, path))
        act = self.plan.pop(0) if self.plan else None
        if isinstance(act, BaseException):
            raise act
        if isinstance(act, threading.Event):
            act.wait(30)
        return act


class Reading(fsspec.spec.AbstractBufferedFile):
    """A file that asks for all it reads."""

    def _fetch_range(self, start, end):
        return self.fs.cat_file(self.path, start, end)


@pytest.fixture
def flaky():
    fsspec.register_implementation("flaky", Flaky, clobber=True)
    Flaky.files, Flaky.plan, Flaky.calls, Flaky.etag = {"s.tar": archive(samples(12))}, [], [], "1"
    yield Flaky


def read(folder, **options):
    options = {"image_size": 8, "retry": FAST, "num_workers": 2, **options}
    return pairs_from_shards("flaky://s.tar", cache_dir=folder, **options)


def test_remote_shards(tmp_path, flaky):
    pairs = read(tmp_path)
    assert pairs.captions == [f"caption {i}" for i in range(12)]
    assert pairs.locations[3] == "flaky://s.tar#00003.png"
    np.testing.assert_array_equal(pairs.images.take(range(12)), expected())
    reads = [kind for kind, _ in flaky.calls].count("cat")
    assert reads == 1 + 12  # the shard once for the index, each image once
    read(tmp_path).images.take(range(12))
    assert [kind for kind, _ in flaky.calls].count("cat") == reads  # all from the cache
    flaky.files["s.tar"], flaky.etag = archive(samples(12, first=50)), "2"
    assert read(tmp_path).captions[0] == "caption 50"
    assert pairs_from_shards("flaky://*.tar", image_size=8, cache_dir=tmp_path).captions[0]


@pytest.mark.parametrize(
    "error", [OSError("reset"), TimeoutError(), RuntimeError("503"), ConnectionError(), "cut"]
)
def test_failures_are_tried_again(tmp_path, flaky, error):
    flaky.plan = [None, None, error, error, error] if error == "cut" else [error] * 3
    assert len(read(tmp_path)) == 12
    flaky.plan = [error, None, error]
    pairs = read(tmp_path, num_workers=1)
    np.testing.assert_array_equal(pairs.images.take([0, 1]), expected()[:2])


def test_a_limit_ends_the_trying(tmp_path, flaky):
    pairs = read(tmp_path, num_workers=1)
    del flaky.calls[:]
    flaky.plan = [OSError("down")] * 4
    match = "flaky://s.tar could not be read in 4 tries: OSError: down"
    with pytest.raises(OSError, match=match):
        pairs.images.take([0])
    assert len(flaky.calls) == 4
    # The network's mood is not the image's fault: nothing is left out, and the next try succeeds.
    assert not pairs.ledger.rows
    np.testing.assert_array_equal(pairs.images.take([0]), expected()[:1])
    flaky.plan = [OSError("down")] * 4
    with pytest.raises(OSError, match="in 4 tries"):
        read(tmp_path / "other")
    assert not list((tmp_path / "other").glob("*.index"))


def test_what_cannot_get_better_is_not_tried_again(tmp_path, flaky):
    with pytest.raises(FileNotFoundError):
        pairs_from_shards("flaky://none.tar", image_size=8, cache_dir=tmp_path, retry=FAST)
    assert len(flaky.calls) == 1
    flaky.plan = [PermissionError("no")]
    with pytest.raises(PermissionError):
        read(tmp_path)


def test_a_call_that_hangs_is_given_up(tmp_path, flaky):
    release = threading.Event()
    pairs = read(tmp_path, retry=Retry(attempts=2, first=0.0, timeout=0.05), num_workers=1)
    flaky.plan = [release]
    np.testing.assert_array_equal(pairs.images.take([4]), expected()[4:5])
    flaky.plan = [release, release]
    start = time.monotonic()
    with pytest.raises(OSError, match="2 tries: TimeoutError: no answer in 0.05 s"):
        pairs.images.take([5])
    assert time.monotonic() - start < 5
    release.set()


def test_waits_grow_up_to_the_longest(monkeypatch):
    waits = []
    monkeypatch.setattr(remote.time, "sleep", waits.append)

    def fail():
        raise OSError("x")

    with pytest.raises(OSError, match="y could not be read in 7 tries"):
        Retry(attempts=7, first=0.5, longest=5.0)("y", fail)
    assert waits == [0.5, 1, 2, 4, 5, 5]


@pytest.mark.parametrize("options", [{"attempts": 0}, {"first": -1}, {"timeout": 0}])
def test_patience_that_is_none(options):
    with pytest.raises(ValueError, match="Retry: wanted attempts >= 1"):
        Retry(**options)


def test_file_without_a_size(flaky, monkeypatch):
    monkeypatch.setattr(Flaky, "info", lambda *_, **__: {"size": None})
    with pytest.raises(ValueError, match="does not tell its size"):
        RemoteFile("flaky://s.tar", FAST)


def test_windows_read_neighbours_at_once(flaky):
    file = RemoteFile("flaky://s.tar", FAST)
    del flaky.calls[:]
    window = Windowed(file)
    content = flaky.files["s.tar"]
    for at in (0, 512, 100, len(content) - 5, len(content), 3):
        assert window.read(at, 10) == content[at : at + 10]
    assert len(flaky.calls) <= 2


def test_open_files_are_bounded_and_shared_by_threads(tmp_path):
    names = []
    for i in range(20):
        (tmp_path / str(i)).write_bytes(bytes([i]) * 1000)
        names.append(str(tmp_path / str(i)))
    files, wrong = OpenFiles(names, FAST, most=3), []

    def work(seed):
        rng = np.random.default_rng(seed)
        for number in rng.integers(0, 20, 300).tolist():
            if files.read(number, 5, 100) != bytes([number]) * 100:
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and len(files._open) == 3
