"""`Homes`: what is declared in modules that nobody has imported yet."""

import subprocess
import sys
from pathlib import Path

import pytest

from blockjobs.base.homes import Homes

REGISTRY: Homes[str] = Homes()


@pytest.fixture
def homes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Homes[str]:
    """Entries `a` and `b` in one module, `c` in another."""
    monkeypatch.syspath_prepend(tmp_path)
    for module, names in (("probe_home_one", "ab"), ("probe_home_two", "c")):
        entries = "".join(f"REGISTRY.loaded[{name!r}] = {name.upper()!r}\n" for name in names)
        (tmp_path / f"{module}.py").write_text(f"from {__name__} import REGISTRY\n{entries}")
        monkeypatch.delitem(sys.modules, module, raising=False)
    REGISTRY.loaded.clear()
    REGISTRY.know({"c": "probe_home_two", "a": "probe_home_one", "b": "probe_home_one"})
    return REGISTRY


def test_a_name_is_looked_up_at_home_and_nowhere_else(homes: Homes[str]) -> None:
    assert "b" in homes and homes.loaded == {}
    assert homes.find("b") == "B"
    assert homes.loaded == {"a": "A", "b": "B"} and "probe_home_two" not in sys.modules


def test_all_are_in_the_order_of_their_homes_whatever_was_loaded_first(homes: Homes[str]) -> None:
    homes.loaded["late"] = "LATE"
    homes.find("a")
    assert list(homes.all()) == ["c", "a", "b", "late"]


def test_every_home_of_the_program_has_what_it_is_said_to_have() -> None:
    """In a process of its own, where nothing else has loaded a module that adds more."""
    script = (
        "from blockjobs.block.objects import object_options as a;"
        "from blockjobs.block.options import node_options as b;"
        "from blockjobs.jobs.transaction import actions as c;"
        "from blockjobs.jobs.machine_state import makers as d;"
        "from blockjobs.schema.command import qmp; import blockjobs.monitor.commands, blockjobs.host.host;"
        "registries = (a.homes, b.homes, c.homes, qmp._commands, qmp._events);"
        "known = [{'none'} | set(d._homes), *(set(each._homes) for each in registries)];"
        "import importlib, pkgutil, blockjobs;"
        "[importlib.import_module(each.name) for each in pkgutil.walk_packages(blockjobs.__path__, 'blockjobs.')"
        " if not each.name.startswith(('blockjobs.testing', 'blockjobs.cli.demo')) and '__main__' not in each.name];"
        "found = [set(each.loaded) for each in (d, *registries)];"
        "assert known == found, [one ^ other for one, other in zip(known, found)]"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_what_has_no_home_is_not_there(homes: Homes[str]) -> None:
    assert "d" not in homes and homes.find("d") is None and homes.loaded == {}
