"""Reading command lines: every way to write an option, and what a mistake is called."""

from typing import Annotated, Any, Literal, NamedTuple

import pytest

from blockjobs.base.errors import UsageError
from blockjobs.base.units import MiB, parse_size
from blockjobs.cli.app import COMMANDS
from blockjobs.cli.help import help_page
from blockjobs.cli.parameters import Parameter, groups_of, slots_of
from blockjobs.cli.words import arguments, read_words

Size = Annotated[int, Parameter(read=parse_size)]


class Group(NamedTuple):
    """Options together.

    Attributes:
        fast: sooner.
        level: how much.
    """

    fast: Annotated[bool, Parameter(name=("-x", "--fast"))] = False
    level: Literal["low", "high"] = "low"


DEFAULT_GROUP = Group()


def probe(
    file: str,
    size: Size | None = None,
    /,
    *,
    group: Group = DEFAULT_GROUP,
    options: Annotated[list[str] | None, Parameter(name=("-o", "--options"))] = None,
    quiet: Annotated[bool, Parameter(name=("-q", "--quiet"))] = False,
    speed: Annotated[Size, Parameter(name=("-r", "--speed"))] = 0,
    connect: Annotated[str | None, Parameter(variable="PROBE_CONNECT")] = None,
    image_root: str = "",
    count: int = 1,
) -> int:
    """Do nothing.

    Args:
        file: some file.
    """
    return 0


def several(*files: str, keep: bool = False) -> int:
    """Take any number."""
    return 0


def signed(file: str, size: Annotated[str, Parameter(may_be_negative=True)], /, *, shrink: bool = False) -> int:
    """Take a number with a sign."""
    return 0


def read(words: str, function: Any = probe, **environment: str) -> tuple[list[Any], dict[str, Any]]:
    slots = slots_of(function)
    return arguments(slots, read_words(slots, words.split(), environment), groups_of(function))


@pytest.mark.parametrize(
    ("words", "keywords"),
    [
        ("f", {}),
        ("f -o a -ob --options c --options=d=e", {"options": ["a", "b", "c", "d=e"]}),
        ("-q f --speed 1M", {"quiet": True, "speed": MiB}),
        ("-r=1M f", {"speed": MiB}),
        ("-qr1M f", {"quiet": True, "speed": MiB}),
        ("-qx f", {"quiet": True, "group": Group(fast=True)}),
        ("f --speed 2M -r 1M", {"speed": MiB}),
        ("f --level high", {"group": Group(level="high")}),
        ("f --image-root=-r --count 3", {"image_root": "-r", "count": 3}),
    ],
)
def test_options_in_all_their_forms(words: str, keywords: dict[str, Any]) -> None:
    assert read(words) == (["f"], keywords)


def test_what_follows_two_dashes_is_no_option() -> None:
    assert read("-q -- -f 1M") == (["-f", MiB], {"quiet": True})


def test_one_dash_is_a_word() -> None:
    assert read("-") == (["-"], {})


def test_a_variable_of_the_environment_stands_in() -> None:
    assert read("f", PROBE_CONNECT="s")[1] == {"connect": "s"}
    assert read("f --connect t", PROBE_CONNECT="s")[1] == {"connect": "t"}


def test_any_number_of_words() -> None:
    assert read("a --keep b c", several) == (["a", "b", "c"], {"keep": True})
    assert read("", several) == ([], {})


def test_a_sign_is_no_option_where_numbers_have_one() -> None:
    assert read("f -1G --shrink", signed) == (["f", "-1G"], {"shrink": True})
    with pytest.raises(UsageError, match="unknown option '-s'"):
        read("f -s", signed)


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ("", "FILE is missing"),
        ("f 1X", "SIZE: '1X' is not a size"),
        ("f 1M more", "'more' is one argument too many"),
        ("f --nope", "unknown option '--nope'"),
        ("f -n", "unknown option '-n'"),
        ("f -qn", "unknown option '-n'"),
        ("f --quiet=yes", "--quiet takes no value"),
        ("f --speed", "--speed needs a value"),
        ("f -r -q", "-r needs a value"),
        ("f --level no", '\'no\' is no value of --level. Choose from: "low", "high"'),
        ("f --count many", "--count: 'many' is not a whole number"),
    ],
)
def test_a_mistake_names_the_parameter(words: str, text: str) -> None:
    with pytest.raises(UsageError) as caught:
        read(words)
    assert str(caught.value).startswith(text)


def test_every_parameter_of_every_command_is_explained_and_named_once() -> None:
    for name, command in COMMANDS.all().items():
        if command.function is None:
            continue
        slots = slots_of(command.function)
        spellings = [spelling for slot in slots if slot.is_option for spelling in slot.names]
        assert len(set(spellings)) == len(spellings), name
        assert "-h" not in spellings and "--help" not in spellings, name
        assert [slot.names for slot in slots if not slot.about] == [], name


def test_help_keeps_to_its_width() -> None:
    for name in ("", *COMMANDS.all()):
        page = help_page(name, width=80)
        assert page.startswith("Usage: blockjobs")
        assert [line for line in page.splitlines() if len(line) > 80] == []
