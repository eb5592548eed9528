"""The command line as a whole: its groups of commands, where each is declared, and how one is found and run."""

from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Final, NamedTuple, TypeVar

from blockjobs.base.errors import UsageError
from blockjobs.base.homes import Homes

F = TypeVar("F", bound=Callable[..., int])

IMAGES: Final = "Images"
LIVE: Final = "Live disks"
JOBS: Final = "Jobs of a server (give its QMP socket with --connect)"
GROUPS: Final = (IMAGES, LIVE, JOBS)

WORDS: Final[ContextVar[tuple[str, ...]]] = ContextVar("words", default=())
"""The command line as it was typed, for the command whose options are deeds that have an order."""

ABOUT: Final = """Back up, move, merge and look at disk images, and steer the background jobs of any QMP server.

Every command takes --object secret,id=key,file=PATH: the passphrase of enciphered images."""


class Command(NamedTuple):
    """A command, or a name in front of several.

    Attributes:
        name: one or two words.
        group: the heading under which help lists it.
        function: does it and returns the exit code; None if more words must follow.
        about: the help of a name without a function, or above the function's own.
    """

    name: str
    group: str
    function: Callable[..., int] | None
    about: str = ""


_BITMAPS: Final = "blockjobs.cli.bitmap_commands"
_CONVERSION: Final = "blockjobs.cli.convert_commands"
_EDITS: Final = "blockjobs.cli.edit_commands"
_IMAGES: Final = "blockjobs.cli.image_commands"
_JOBS: Final = "blockjobs.cli.job_commands"
_LIVE: Final = "blockjobs.cli.live_commands"

COMMANDS: Final[Homes[Command]] = Homes(
    {
        "amend": _CONVERSION,
        "backup": _IMAGES,
        "bitmap": _BITMAPS,
        "bitmap add": _BITMAPS,
        "bitmap clear": _BITMAPS,
        "bitmap disable": _BITMAPS,
        "bitmap enable": _BITMAPS,
        "bitmap list": _BITMAPS,
        "bitmap merge": _BITMAPS,
        "bitmap remove": _BITMAPS,
        "cancel": _JOBS,
        "check": _IMAGES,
        "commit": _LIVE,
        "compare": _IMAGES,
        "complete": _JOBS,
        "convert": _CONVERSION,
        "create": _IMAGES,
        "dd": _EDITS,
        "dismiss": _JOBS,
        "finalize": _JOBS,
        "info": _IMAGES,
        "jobs": _JOBS,
        "map": _IMAGES,
        "measure": _CONVERSION,
        "mirror": _LIVE,
        "nbd": _LIVE,
        "nbd serve": _LIVE,
        "pause": _JOBS,
        "rebase": _EDITS,
        "resize": _EDITS,
        "resume": _JOBS,
        "schema": _JOBS,
        "serve": _LIVE,
        "snapshot": _CONVERSION,
        "speed": _JOBS,
        "stream": _LIVE,
        "watch": _JOBS,
    }
)


def command(group: str, *, name: str | None = None, about: str = "") -> Callable[[F], F]:
    """Declare a function as a command; its home is in `COMMANDS`.

    Args:
        group: see `Command`.
        name: where it is not the function's.
        about: see `Command`.
    """

    def register(function: F) -> F:
        known = name or function.__name__
        COMMANDS.loaded[known] = Command(known, group, function, about)
        return function

    return register


def topic(name: str, group: str, about: str) -> None:
    """Declare a name that only stands in front of other words."""
    COMMANDS.loaded[name] = Command(name, group, None, about)


def below(name: str) -> Iterator[Command]:
    """The commands whose names begin with `name` and have one more word; those of one word if it is empty."""
    prefix = f"{name} " if name else ""
    for each in COMMANDS.all().values():
        if each.name.startswith(prefix) and each.name != name and " " not in each.name[len(prefix) :]:
            yield each


def run_words(words: Sequence[str]) -> int:
    """Do what a command line says, and return the exit code.

    Args:
        words: without the program's name.

    Raises:
        UsageError: there is no such command, or it cannot be told that.
    """
    first = words[0] if words else ""
    if first in ("", "--help", "-h"):
        from blockjobs.cli.help import help_page

        print(help_page(""), end="")
        return 0
    if first == "--version":
        from blockjobs import __version__

        print(__version__)
        return 0
    if first not in COMMANDS:
        what = f"unknown option '{first}'" if first.startswith("-") else f"there is no command '{first}'"
        raise UsageError(f"{what} (see blockjobs --help)")
    known = " ".join(words[:2]) if " ".join(words[:2]) in COMMANDS else first
    found = COMMANDS.find(known)
    assert found is not None
    rest = words[len(known.split()) :]
    given = rest[: rest.index("--")] if "--" in rest else rest
    if "--help" in given or "-h" in given or (found.function is None and not rest):
        from blockjobs.cli.help import help_page

        print(help_page(known), end="")
        return 0
    return _run(found, rest)


def _run(found: Command, words: Sequence[str]) -> int:
    from blockjobs.cli.parameters import groups_of, slots_of
    from blockjobs.cli.words import arguments, read_words

    if found.function is None:
        raise UsageError(f"there is no command '{found.name} {words[0]}' (see blockjobs {found.name} --help)")
    slots = slots_of(found.function)
    try:
        values = read_words(slots, words)
    except UsageError as error:
        raise UsageError(f"{error} (see blockjobs {found.name} --help)") from error
    positional, keywords = arguments(slots, values, groups_of(found.function))
    return found.function(*positional, **keywords)
