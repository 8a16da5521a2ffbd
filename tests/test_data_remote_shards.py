"""Remote shards are indexed several at a time, and the index is as if one after another."""

import json
import random
import threading
import time

import pytest
from shard_files import archive, image_bytes, samples, write_shard

fsspec = pytest.importorskip("fsspec")

from pybackdoor.data import Retry, pairs_from_shards, remote  # noqa: E402

COUNT, EACH = 20, 4
FAST = Retry(attempts=2, first=0.001, longest=0.01, timeout=5.0)


class Slow(fsspec.AbstractFileSystem):
    """A memory that takes its time to answer, another one for each call."""

    protocol = "slow"
    cachable = False
    files: dict = {}
    failing: dict = {}  # path -> the error of its reads
    delay = 0.0
    lock = threading.Lock()
    running = most = 0
    read: list = []

    def info(self, path, **_):
        path = self._strip_protocol(path)
        return {"name": path, "size": len(self.files[path]), "type": "file", "ETag": "1"}

    def cat_file(self, path, start=None, end=None, **_):
        with self.lock:
            Slow.running += 1
            Slow.most = max(Slow.most, Slow.running)
            Slow.read.append(path)
        try:
            time.sleep(self.delay * random.Random(path).random())
            if path in self.failing:
                raise self.failing[path]
            return self.files[path][start:end]
        finally:
            with self.lock:
                Slow.running -= 1


@pytest.fixture
def slow():
    fsspec.register_implementation("slow", Slow, clobber=True)
    Slow.files, Slow.failing, Slow.read, Slow.most = {}, {}, [], 0
    for number in range(COUNT):
        members = samples(EACH, first=EACH * number)
        if number % 3 == 1:  # a caption without an image, beside a member that is neither
            members[0] = (f"{EACH * number:05}.xyz", b"1")
        if number == 7:
            members[2] = (members[2][0], image_bytes(3) * 0)
        Slow.files[f"{number:02}.tar"] = archive(members)
    Slow.delay = 0.03
    yield Slow
    Slow.delay = 0.0


def read(folder, source="slow://{00..19}.tar", **options):
    options = {"image_size": 8, "max_bad": 0.5, "retry": FAST, "cache_dir": folder, **options}
    return pairs_from_shards(source, **options)


def told(pairs):
    """All that an index says, free of where its shards lie."""
    bad = [(b.row, b.location.rpartition("/")[2], b.reason) for b in pairs.ledger.rows]
    places = [place.rpartition("/")[2] for place in pairs.locations]
    return list(pairs.captions), pairs.ids.tolist(), places, bad, pairs.ledger.skipped


def test_the_index_is_that_of_local_shards(tmp_path, slow):
    for name, content in slow.files.items():
        (tmp_path / name).write_bytes(content)
    got = read(tmp_path / "cache")
    assert 2 <= slow.most <= 8
    assert told(got) == told(read(tmp_path / "cache", tmp_path / "{00..19}.tar"))
    lines = got.ledger.path.read_text().splitlines()
    rows = [json.loads(line)["row"] for line in lines]
    assert len(rows) == 8 and rows == sorted(rows) and got.ledger.skipped == {"xyz": 7}


def test_same_bytes_whatever_comes_first(tmp_path, slow):
    def index(folder, delay):
        slow.delay = delay
        read(folder)
        (path,) = folder.glob("*.index")
        return path.read_bytes()

    assert index(tmp_path / "a", 0.03) == index(tmp_path / "b", 0.0)


def test_no_more_than_eight_shards_are_ahead(tmp_path, slow, monkeypatch):
    """Else a slow first shard would have all others wait in memory."""
    gate = threading.Event()
    cat = Slow.cat_file

    def gated(self, path, **place):
        if path == "00.tar" and not gate.wait(20):
            raise AssertionError
        return cat(self, path, **place)

    monkeypatch.setattr(Slow, "cat_file", gated)
    found = []
    thread = threading.Thread(target=lambda: found.append(read(tmp_path)))
    thread.start()
    while len(set(slow.read)) < 7:
        time.sleep(0.01)
    time.sleep(0.1)
    assert set(slow.read) == {f"{n:02}.tar" for n in range(1, 8)}
    gate.set()
    thread.join()
    assert len(found[0]) == COUNT * EACH - 8


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (OSError("reset"), OSError, "slow://05.tar could not be read in 2 tries: OSError: reset"),
        (PermissionError("no"), PermissionError, "slow://05.tar: no"),
    ],
)
def test_the_first_error_in_order_is_raised_by_name(tmp_path, slow, error, kind, message):
    slow.failing = {"05.tar": error, "06.tar": ValueError("later"), "09.tar": ValueError("later")}
    with pytest.raises(kind, match=message):
        read(tmp_path)
    assert not list(tmp_path.glob("*.index"))
    assert not {"14.tar", "19.tar"} & set(slow.read)  # what had not begun never does
    slow.failing = {}
    assert len(read(tmp_path)) == COUNT * EACH - 8


def test_given_up_shards_are_read_no_further(tmp_path, slow, monkeypatch):
    monkeypatch.setattr(remote.RemoteFile, "window", 512)
    calls = []

    def work(file, name):
        if name == "slow://00.tar":
            raise ValueError("first")
        for at in range(0, 10**6, 512):
            calls.append(name)
            file.read(at % file.size, 1)

    with pytest.raises(ValueError, match="first"):
        list(remote.each_file([f"slow://{n:02}.tar" for n in range(8)], FAST, work))
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        before = len(calls)
        time.sleep(0.15)
        if len(calls) == before:
            break
    assert len(calls) < 500 and len(calls) == before


def test_progress_counts_shards(tmp_path, slow, capsys):
    read(tmp_path, progress=True)
    shown = capsys.readouterr().err
    assert "indexing shards: 100%" in shown and "20/20" in shown


def test_local_shards_take_no_threads(tmp_path, monkeypatch):
    write_shard(tmp_path / "s.tar", samples(3))
    monkeypatch.setattr(remote, "ThreadPoolExecutor", lambda *_: pytest.fail("a pool"))
    assert len(read(tmp_path / "cache", tmp_path / "s.tar")) == 3
