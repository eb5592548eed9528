"""`--object` of the command line, which belongs to no single command."""

from collections.abc import Sequence
from contextvars import ContextVar
from typing import Final

OBJECTS: Final[ContextVar[tuple[str, ...]]] = ContextVar("objects", default=())
"""What was said; whoever makes a host makes the objects too."""


def without_objects(words: Sequence[str]) -> tuple[list[str], tuple[str, ...]]:
    """Take `--object TEXT` out of a command line: every command knows it, and none has to say so."""
    left: list[str] = []
    objects: list[str] = []
    given = iter(words)
    for word in given:
        if word == "--object":
            objects.append(next(given, ""))
        elif word.startswith("--object="):
            objects.append(word.partition("=")[2])
        else:
            left.append(word)
    return left, tuple(objects)
