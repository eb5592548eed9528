"""A file that is being made never looks complete, whatever happens."""

import errno
import os
from pathlib import Path

import pytest

from blockjobs.base.errors import UsageError
from blockjobs.cli.targets import Partial, identity


def make(path: Path, content: bytes, **options) -> Partial:
    partial = Partial(str(path), **{"replace": False, **options})
    partial.claim_name()
    Path(partial.path).write_bytes(content)
    return partial


def test_the_name_appears_when_complete(tmp_path: Path) -> None:
    target = tmp_path / "t"
    with make(target, b"new") as partial:
        assert not target.exists()
        partial.complete()
    assert target.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["t"]
    assert target.stat().st_nlink == 1


def test_a_failure_removes_the_partial_file(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), make(tmp_path / "t", b"half"):
        raise RuntimeError
    assert not list(tmp_path.iterdir())


def test_or_keeps_it_on_request(tmp_path: Path, capsys) -> None:
    with pytest.raises(RuntimeError), make(tmp_path / "t", b"half", keep=True):
        raise RuntimeError
    assert os.listdir(tmp_path) == ["t.partial"]
    assert "t.partial" in capsys.readouterr().err


def test_a_partial_file_of_somebody_else_stays(tmp_path: Path) -> None:
    (tmp_path / "t.partial").write_bytes(b"not ours")
    with pytest.raises(RuntimeError), Partial(str(tmp_path / "t"), replace=False):
        raise RuntimeError
    assert os.listdir(tmp_path) == ["t.partial"]


def test_an_existing_file_is_kept_unless_told(tmp_path: Path) -> None:
    target = tmp_path / "t"
    target.write_bytes(b"old")
    with pytest.raises(UsageError, match="--force"):
        Partial(str(target), replace=False)
    with make(target, b"new", replace=True) as partial:
        assert target.read_bytes() == b"old"
        partial.complete()
    assert target.read_bytes() == b"new"


def test_a_file_that_came_meanwhile_is_kept(tmp_path: Path) -> None:
    target = tmp_path / "t"
    with make(target, b"ours") as partial:
        target.write_bytes(b"theirs")
        with pytest.raises(UsageError, match="meanwhile"):
            partial.complete()
    assert target.read_bytes() == b"theirs"
    assert os.listdir(tmp_path) == ["t"]


def test_a_file_system_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: str, target: str) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    with make(tmp_path / "t", b"new") as partial:
        partial.complete()
    assert os.listdir(tmp_path) == ["t"]


def test_a_link_keeps_pointing_to_the_new_file(tmp_path: Path) -> None:
    real = tmp_path / "real"
    real.write_bytes(b"old")
    (tmp_path / "link").symlink_to(real)
    with make(tmp_path / "link", b"new", replace=True) as partial:
        partial.complete()
    assert (tmp_path / "link").is_symlink()
    assert real.read_bytes() == b"new"


def test_the_source_is_known_by_any_name(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"x")
    os.link(source, tmp_path / "hard")
    (tmp_path / "soft").symlink_to(source)
    known = identity(str(source))
    assert known is not None
    for name in ("source", "hard", "soft"):
        with pytest.raises(UsageError, match="is the source itself"):
            Partial(str(tmp_path / name), replace=True).demand_other_than({known})
    os.link(source, tmp_path / "other.partial")
    with pytest.raises(UsageError, match="is the source itself"):
        Partial(str(tmp_path / "other"), replace=False).demand_other_than({known})


@pytest.mark.parametrize(
    ("name", "text"),
    [("", "not the name"), ("folder/", "not the name"), ("folder", "not a regular"), ("a/b", "folder")],
)
def test_impossible_names(tmp_path: Path, name: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    with pytest.raises(UsageError, match=text):
        Partial(name, replace=True)
