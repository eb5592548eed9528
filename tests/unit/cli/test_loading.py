"""What a program does not load: each library and layer that is not needed makes every start slower (ADR 0018).

Counts of modules, because times depend on the machine.
"""

import subprocess
import sys
from pathlib import Path

import pytest

LIBRARIES = ("cryptography", "isal", "backports.zstd", "numpy", "rich", "uvloop")
LAYERS = ("blockjobs.daemon", "blockjobs.export", "blockjobs.lifecycle", "blockjobs.monitor")


def loaded_by(program: str, *words: str) -> set[str]:
    """The modules of a process that ran a program: `cli` or `daemon`."""
    script = (
        f"import sys; from blockjobs.{program}.main import main; code = main(sys.argv[1:]); "
        "print(*sys.modules, file=sys.stderr); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True, check=True)
    return set(done.stderr.split())


def among(modules: set[str], *names: str) -> list[str]:
    return sorted(each for each in modules if each.startswith(tuple(f"{name}." for name in names)) or each in names)


@pytest.fixture
def image(tmp_path: Path) -> str:
    path = str(tmp_path / "a.qcow2")
    loaded_by("cli", "create", path, "1M")
    return path


@pytest.mark.parametrize("command", ["info", "map", "check"])
def test_looking_at_an_image(command: str, image: str) -> None:
    loaded = loaded_by("cli", command, image)
    assert "blockjobs.block.drivers.qcow2.driver" in loaded or command == "check", "else this test sees nothing"
    assert among(loaded, *(each for each in LIBRARIES if command != "check" or each != "numpy"), *LAYERS) == []


def test_info_of_an_image(image: str) -> None:
    loaded = loaded_by("cli", "info", image)
    drivers = [each for each in loaded if each.startswith("blockjobs.block.drivers.") and each.count(".") == 3]
    assert {each.rpartition(".")[2] for each in drivers} & {"raw", "nbd", "luks", "quorum", "throttle"} == set()
    assert among(loaded, "blockjobs.jobs", "blockjobs.block.luks.volume") == []
    ours = among(loaded, "blockjobs")
    assert len(ours) <= 128, ours


def test_making_an_image(tmp_path: Path) -> None:
    loaded = loaded_by("cli", "create", str(tmp_path / "b.qcow2"), "1M")
    assert among(loaded, *LIBRARIES, *LAYERS, "blockjobs.block.luks.volume") == []


@pytest.mark.parametrize("words", [("--version",), ("--help",), ("info", "--help"), ("jobs", "--help")])
def test_words_about_the_program(words: tuple[str, ...]) -> None:
    loaded = loaded_by("cli", *words)
    libraries = [each for each in LIBRARIES if each != "rich"]  # it draws the help
    assert among(loaded, *libraries, *LAYERS, "blockjobs.block", "blockjobs.host", "asyncio", "msgspec") == []


@pytest.mark.parametrize("words", [("--version",), ("--help",)])
def test_words_about_the_daemon(words: tuple[str, ...]) -> None:
    loaded = loaded_by("daemon", *words)
    assert among(loaded, *LIBRARIES, "blockjobs.block", "blockjobs.host", "asyncio", "msgspec") == []
