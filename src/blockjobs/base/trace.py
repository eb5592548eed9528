"""Trace points: what the program does, told to those who ask for it by name (`--trace`), for nothing to all others.

A point is a logger below `blockjobs.trace`. While nobody listens, passing one costs the look at its level; there is
none in the data path, only where a request has failed.
"""

import logging
from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import Final

PREFIX: Final = "blockjobs.trace."

_points: Final[dict[str, "TracePoint"]] = {}


class TracePoint:
    """A place in the program. Made once, as a constant of the module that passes it.

    Args:
        name: as patterns and readers see it.
        about: one line on when it is passed.
    """

    def __init__(self, name: str, about: str) -> None:
        assert name not in _points, name
        self.name, self.about = name, about
        self._logger = logging.getLogger(PREFIX + name)
        self._logger.setLevel(logging.WARNING)
        _points[name] = self

    def __call__(self, **values: object) -> None:
        """Tell that it is passed; nothing is formatted if nobody listens."""
        if self._logger.isEnabledFor(logging.DEBUG):
            said = " ".join(f"{name}={value}" for name, value in values.items())
            self._logger.debug("%s", f"{self.name} {said}".rstrip())

    @property
    def is_on(self) -> bool:
        """Whether somebody listens: for callers whose values cost something."""
        return self._logger.isEnabledFor(logging.DEBUG)

    def switch(self, on: bool) -> None:
        """Let it tell, or not."""
        self._logger.setLevel(logging.DEBUG if on else logging.WARNING)


def trace_points() -> Iterator[TracePoint]:
    """All points of the modules that are loaded, by name."""
    yield from (_points[name] for name in sorted(_points))


def switch_points(pattern: str) -> bool:
    """Switch on all points that a pattern with `*` matches; off, if it begins with `-`.

    Returns:
        False if it matches none.
    """
    on = not pattern.startswith("-")
    matching = [point for name, point in _points.items() if fnmatchcase(name, pattern.lstrip("-"))]
    for point in matching:
        point.switch(on)
    return bool(matching)
