"""Registries of things whose modules are loaded when they are first wanted.

A registry is filled by decorators as modules are imported. So that a program need not import what it may never use, a
registry is also told the *homes* of its entries: name → the module that declares it. A name is looked up in what is
loaded, then at home; whoever wants all entries loads all homes. `tests/test_layers.py` counts homes as imports.
"""

import importlib
from collections.abc import Mapping
from typing import Final, Generic, TypeVar

T = TypeVar("T")

NO_HOMES: Final[Mapping[str, str]] = {}


class Homes(Generic[T]):
    """Entries by name, some of them not loaded yet.

    Attributes:
        loaded: the entries whose modules are imported.
    """

    def __init__(self, homes: Mapping[str, str] = NO_HOMES) -> None:
        """See the class.

        Args:
            homes: dotted modules by name of entry, in the order in which `all` has them; importing one adds its entry.
        """
        self._homes = dict(homes)
        self.loaded: dict[str, T] = {}

    def know(self, homes: Mapping[str, str]) -> None:
        """Add homes that only a layer above may name; saying the same again changes nothing."""
        self._homes.update(homes)

    def __contains__(self, name: object) -> bool:
        return name in self.loaded or name in self._homes

    def modules(self) -> tuple[str, ...]:
        """The homes, each once."""
        return tuple(dict.fromkeys(self._homes.values()))

    def find(self, name: str) -> T | None:
        """The entry of that name, loaded if need be; None if there is none."""
        if name not in self.loaded and name in self._homes:
            importlib.import_module(self._homes[name])
        return self.loaded.get(name)

    def all(self) -> dict[str, T]:
        """All entries: those with homes in their order, then what else was added, in the order of adding."""
        for home in self.modules():
            importlib.import_module(home)
        names = (*self._homes, *(name for name in self.loaded if name not in self._homes))
        return {name: self.loaded[name] for name in names}
