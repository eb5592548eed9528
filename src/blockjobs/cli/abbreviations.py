"""Long options may be cut short where only one begins like that, as getopt has it and qemu-img's users know it."""

from collections.abc import Sequence
from typing import Final

from cyclopts.exceptions import UnknownOptionError

_ALWAYS_WHOLE: Final = frozenset({"--image-root"})
"""Options that qemu-img has not, and that would make a short form of one of its options mean two things."""


def spelled_out(words: Sequence[str], error: UnknownOptionError) -> list[str] | None:
    """The same command line with the option whole that was not known; None if it is the beginning of none, or of two.

    Args:
        words: the command line.
        error: what the parser said of it.
    """
    said = error.token.keyword or error.token.value
    start = said.partition("=")[0]
    known = {name for argument in error.argument_collection or () for name in argument.names} | {"--object"}
    meant = [name for name in sorted(known - _ALWAYS_WHOLE) if name.startswith(start)]
    if not start.startswith("--") or len(start) < len("--a") or len(meant) != 1 or said not in words:
        return None
    index = words.index(said)
    return [*words[:index], meant[0] + said[len(start) :], *words[index + 1 :]]
