"""All images of a source decoded at once: once, never mixed, by one process of several."""

import errno
import multiprocessing
import os
import pickle
import signal
import sys
import time
import types

import numpy as np
import pytest
import warm
from data_files import cut, image_table, noise, write_image

from pybackdoor.data import default_cache_dir, labelled_from_csv, ondemand, pairs_from_csv, rows
from pybackdoor.data.preprocess import Preprocessing


def read(table, folder, **options):
    options = {"image_size": 8, "cache_dir": folder, "num_workers": 2, **options}
    progress = options.pop("progress", None)
    return pairs_from_csv(table, **options).decoded(progress)


def labelled(table, folder, **options):
    """The same as an evaluation set, every caption a class."""
    options = {"image_size": 8, "cache_dir": folder, "num_workers": 2, **options}
    return labelled_from_csv(table, label_key="caption", **options)


both = pytest.mark.parametrize("read", [read, labelled])


def pixels(seed, size=8, *args):
    from PIL import Image

    return Preprocessing(size, *args)(Image.fromarray(noise(20, 24, seed)))


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


@both
def test_images_are_decoded_once_and_exact(tmp_path, decoded, read):
    table = image_table(tmp_path, 5)
    first = read(table, tmp_path / "cache")
    assert len(decoded) == 5
    second = read(table, tmp_path / "cache")
    assert len(decoded) == 5
    for pairs in (first, second, pickle.loads(pickle.dumps(second))):
        np.testing.assert_array_equal(
            pairs.images.take(range(5)), np.stack([pixels(i) for i in range(5)])
        )
        assert pairs.images.image_size == (8, 8)


def test_other_sizes_and_resizes_are_never_mixed(tmp_path, decoded):
    table = image_table(tmp_path, 3)
    kinds = [(8,), (9,), (8, "squash"), (8, "shortest", "bilinear")]
    for _ in range(2):
        for kind in kinds:
            names = dict(zip(("image_size", "resize_mode", "interpolation"), kind, strict=False))
            taken = read(table, tmp_path / "cache", **names).images.take([2])[0]
            np.testing.assert_array_equal(taken, pixels(2, *kind))
    assert len(decoded) == 3 * len(kinds)  # and each is kept beside the others


def change_content(folder, table):
    write_image(folder / "1.png", seed=77)


def change_time(folder, table):
    os.utime(folder / "1.png", ns=(0, 12345))


def add_row(folder, table):
    write_image(folder / "9.png", seed=9)
    table.write_text(table.read_text() + "9.png,nine\n")


def swap_rows(folder, table):
    table.write_text("image,caption\n1.png,one\n0.png,zero\n2.png,two\n")


@both
@pytest.mark.parametrize("change", [change_content, change_time, add_row, swap_rows])
def test_changed_source_is_decoded_again(tmp_path, decoded, change, read):
    table = image_table(tmp_path, 3)
    old = read(table, tmp_path / "cache")
    before = old.images.take(range(3))
    change(tmp_path, table)
    new = read(table, tmp_path / "cache")
    # A file's own change costs its own image, the list's change all of them.
    assert len(decoded) == 3 + (1 if change in (change_content, change_time) else len(new))
    wanted = [0, 77 if change is change_content else 1, 2]
    if change is add_row:
        wanted.append(9)
    if change is swap_rows:
        wanted = [1, 0, 2]
    np.testing.assert_array_equal(
        new.images.take(range(len(new))), np.stack([pixels(seed) for seed in wanted])
    )
    if change is not change_content:
        np.testing.assert_array_equal(old.images.take(range(3)), before)  # still open
    assert len(list((tmp_path / "cache").glob("*.px"))) == 1  # the outdated one is gone


def test_files_alike_in_size_and_time_are_told_apart(tmp_path):
    table = image_table(tmp_path, 2)
    for name, seed in (("a.ppm", 0), ("b.ppm", 1)):
        os.utime(write_image(tmp_path / name, seed=seed), ns=(5, 5))
    for order in (["a.ppm", "b.ppm"], ["b.ppm", "a.ppm"]):
        table.write_text("image,caption\n" + "".join(f"{name},x\n" for name in order))
        got = read(table, tmp_path / "cache").images.take([0, 1])
        np.testing.assert_array_equal(
            got, np.stack([pixels(int(name == "b.ppm")) for name in order])
        )


@both
def test_other_pillow_decodes_again(tmp_path, decoded, monkeypatch, read):
    table = image_table(tmp_path, 2)
    read(table, tmp_path / "cache")
    monkeypatch.setattr("PIL.__version__", "0.1")
    read(table, tmp_path / "cache")
    assert len(decoded) == 4


@both
def test_finished_cache_needs_no_writing(tmp_path, monkeypatch, read):
    table = image_table(tmp_path, 3)
    cut(tmp_path / "1.png")
    read(table, tmp_path / "cache", max_bad=0.5)

    def forbidden(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("pybackdoor.files.os.replace", forbidden)
    monkeypatch.setattr(rows.os, "pwrite", forbidden)
    assert len(read(table, tmp_path / "cache", max_bad=0.5)) == 2


def test_default_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_cache_dir() == tmp_path / "xdg" / "pybackdoor" / "images"
    read(image_table(tmp_path, 2), None)
    assert list((tmp_path / "xdg" / "pybackdoor" / "images").glob("*.px"))
    monkeypatch.setenv("XDG_CACHE_HOME", "not/absolute")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / ".cache" / "pybackdoor" / "images"


@both
def test_unwritable_folder_is_a_plain_error(tmp_path, read):
    table = image_table(tmp_path, 2)
    (tmp_path / "file").write_text("x")
    match = r"_from_csv: the .* in .*sub could not be built: Not a directory. Choose"
    with pytest.raises(OSError, match=match):
        read(table, tmp_path / "file" / "sub")


@both
def test_full_disk_is_refused_before_decoding(tmp_path, decoded, monkeypatch, read):
    table = image_table(tmp_path, 2)
    usage = types.SimpleNamespace(free=383)  # 2 images of 192 bytes
    monkeypatch.setattr(rows.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(OSError, match="384 bytes are needed, 383 are free") as caught:
        read(table, tmp_path / "cache")
    assert caught.value.errno == errno.ENOSPC and not decoded
    usage.free = 384
    assert len(read(table, tmp_path / "cache")) == 2


FULL = """
import resource, sys
from pybackdoor.data import pairs_from_csv
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))  # the disk takes 20 kB a file
try:
    pairs_from_csv(sys.argv[1], image_size=64, cache_dir=sys.argv[2])
except OSError as error:
    print(error)
"""


def test_disk_that_fills_up_while_writing(tmp_path):
    table = image_table(tmp_path, 4)
    done = warm.run(["-c", FULL, str(table), str(tmp_path / "cache")], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "could not be built: File too large. Choose another folder" in done.stdout
    assert len(read(table, tmp_path / "cache", image_size=64)) == 4


def build_in_process(table, folder, out):
    out.put(read(table, folder).images.take(range(20)).tobytes())


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("locks", [True, False])
def test_processes_building_the_same_cache(tmp_path, monkeypatch, locks):
    if not locks:  # as on a system without them: both build, the last one's file stays
        monkeypatch.setitem(sys.modules, "fcntl", None)
    table = image_table(tmp_path, 20)
    context = multiprocessing.get_context("fork")
    out = context.Queue()
    workers = [
        context.Process(target=build_in_process, args=(table, tmp_path / "cache", out))
        for _ in range(4)
    ]
    for worker in workers:
        worker.start()
    results = [out.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    wanted = np.stack([pixels(i) for i in range(20)]).tobytes()
    assert results == [wanted] * 4


def test_second_process_waits_and_decodes_nothing(tmp_path, decoded):
    table = image_table(tmp_path, 20)
    (tmp_path / "cache").mkdir()
    build = "from test_data_cache import read; import sys; read(sys.argv[1], sys.argv[2])"
    other = warm.Popen(["-c", build, str(table), str(tmp_path / "cache")])
    while not list((tmp_path / "cache").glob("*.px.lock")) and other.poll() is None:
        time.sleep(0.001)  # until it decodes, with the lock held
    read(table, tmp_path / "cache")
    _, errors = other.communicate()
    assert other.returncode == 0 and decoded == [], errors


def test_interrupt_while_decoding_keeps_what_is_done(tmp_path, monkeypatch):
    table = image_table(tmp_path, 600)
    decode = ondemand.decode_bytes
    count = []

    def interrupted(content, preprocessing):
        count.append(1)
        if len(count) == 300:
            os.kill(os.getpid(), signal.SIGINT)
        return decode(content, preprocessing)

    monkeypatch.setattr(ondemand, "decode_bytes", interrupted)
    with pytest.raises(KeyboardInterrupt):
        read(table, tmp_path / "cache")
    assert len(count) < 550
    done = len(count)
    read(table, tmp_path / "cache")
    assert len(count) == 600 and done >= 300


@both
def test_same_file_in_many_rows_is_decoded_once(tmp_path, decoded, read):
    table = image_table(tmp_path, 2)
    table.write_text("image,caption\n1.png,a\n0.png,b\n1.png,c\n1.png,d\n")
    pairs = read(table, tmp_path / "cache")
    assert len(decoded) == 2 and len(pairs) == 4
    np.testing.assert_array_equal(
        pairs.images.take(range(4)), np.stack([pixels(i) for i in (1, 0, 1, 1)])
    )


@both
@pytest.mark.parametrize(("progress", "shown"), [(True, True), (False, False), (None, False)])
def test_progress_bar(tmp_path, capsys, progress, shown, read):
    read(image_table(tmp_path, 3), tmp_path / "cache", progress=progress)
    assert ("decoding images: 100%" in capsys.readouterr().err) is shown


def test_no_workers(tmp_path):
    with pytest.raises(ValueError, match="pairs_from_csv: num_workers must be at least 1, got 0"):
        read(image_table(tmp_path, 2), tmp_path / "cache", num_workers=0)
