"""`Homes`: what is declared in modules that nobody has imported yet."""

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


def test_what_has_no_home_is_not_there(homes: Homes[str]) -> None:
    assert "d" not in homes and homes.find("d") is None and homes.loaded == {}
