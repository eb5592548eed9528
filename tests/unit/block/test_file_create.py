import os
import resource
import signal

import pytest

from blockjobs.base.errors import UsageError
from blockjobs.block.claims import ALL, Perm
from blockjobs.block.drivers.file_create import PreallocMode, create_file
from blockjobs.block.drivers.locks import ImageLock


def refusal(filename, size, **options):
    with pytest.raises(UsageError) as caught:
        create_file(str(filename), size, **options)
    return str(caught.value)


@pytest.mark.parametrize("size", [0, 1, 1000, 1 << 40])
def test_sizes_are_exact(tmp_path, size):
    create_file(str(tmp_path / "new"), size)
    assert (tmp_path / "new").stat().st_size == size


@pytest.mark.parametrize("mode", [PreallocMode.FALLOC, PreallocMode.FULL])
def test_preallocation(tmp_path, mode):
    create_file(str(tmp_path / "new"), 1_500_000, preallocation=mode, nocow=True, extent_size_hint=0)
    status = (tmp_path / "new").stat()
    assert status.st_size == 1_500_000
    assert status.st_blocks * 512 >= 1_500_000
    assert not any((tmp_path / "new").read_bytes())


def test_an_existing_file_loses_its_content_and_keeps_its_mode(tmp_path):
    path = tmp_path / "old"
    path.write_bytes(b"secret" * 1000)
    path.chmod(0o600)
    create_file(str(path), 10)
    assert path.read_bytes() == bytes(10)
    assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("durably", [True, False])
def test_what_is_to_be_durable(tmp_path, monkeypatch, durably):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.readlink(f"/proc/self/fd/{descriptor}")))
    create_file(str(tmp_path / "new"), 512, durably=durably)
    assert synced == ([str(tmp_path / "new"), str(tmp_path)] if durably else [])


def test_relative_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    create_file("file:odd name", 1)
    assert os.listdir() == ["file:odd name"]


# The texts are those of qemu-storage-daemon 7.2.
@pytest.mark.parametrize(
    ("size", "options", "text"),
    [
        (-1, {}, "Could not resize file: Invalid argument"),
        (-1, {"preallocation": PreallocMode.METADATA}, "Cannot use preallocation for shrinking files"),
        (-1, {"preallocation": PreallocMode.FULL}, "Cannot use preallocation for shrinking files"),
        (1, {"preallocation": PreallocMode.METADATA}, "Unsupported preallocation mode: metadata"),
        (1 << 62, {}, "Could not resize file: File too large"),
        (1 << 50, {"preallocation": PreallocMode.FALLOC}, "Could not preallocate new data: File too large"),
        (1, {"extent_size_hint": 1 << 32}, "Extent size hint is too large"),
    ],
)
def test_what_fails_leaves_no_new_file(tmp_path, size, options, text):
    assert refusal(tmp_path / "new", size, **options) == text
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(("size", "mode"), [(-1, PreallocMode.OFF), (1, PreallocMode.METADATA)])
def test_what_is_impossible_does_not_touch_an_old_file(tmp_path, size, mode):
    (tmp_path / "old").write_bytes(b"kept")
    refusal(tmp_path / "old", size, preallocation=mode)
    assert (tmp_path / "old").read_bytes() == b"kept"


def test_places_where_no_file_can_be(tmp_path):
    assert refusal("/nonexistent-dir/x", -1) == "Could not create '/nonexistent-dir/x': No such file or directory"
    assert refusal("", 1) == "Could not create '': No such file or directory"
    assert refusal(tmp_path, 1) == f"Could not create '{tmp_path}': Is a directory"
    os.mkfifo(tmp_path / "fifo")
    assert refusal(tmp_path / "fifo", 1) == f"'file' driver requires '{tmp_path / 'fifo'}' to be a regular file"


def test_a_file_in_use_is_left_alone(tmp_path):
    path = tmp_path / "used"
    path.write_bytes(b"kept")
    with path.open("rb+") as user:
        lock = ImageLock(user.fileno())
        lock.change(Perm.CONSISTENT_READ, Perm.CONSISTENT_READ)
        assert refusal(path, 1) == 'Failed to get "write" lock'
        lock.change(Perm.RESIZE, ALL)
        assert refusal(path, 1) == 'Failed to get shared "resize" lock'
    assert path.read_bytes() == b"kept"


def test_no_space_removes_what_was_begun(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))
    try:
        text = refusal(tmp_path / "new", 3 << 20, preallocation=PreallocMode.FULL)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert text == "Could not write zeros for preallocation: File too large"
    assert os.listdir(tmp_path) == []
