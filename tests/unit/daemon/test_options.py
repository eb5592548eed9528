"""The option grammar, against what the real qemu-storage-daemon printed."""

import pytest

from blockjobs.base.errors import UsageError
from blockjobs.daemon.options import FLAGS, HELP, VALUED, Option, parse_arguments


def test_order_is_kept_and_both_spellings_of_a_value_work() -> None:
    assert parse_arguments(["--object", "secret,id=a", "--blockdev=driver=file", "--daemonize", "-V"]) == [
        Option("object", "secret,id=a"),
        Option("blockdev", "driver=file"),
        Option("daemonize"),
        Option("version"),
    ]


def test_names_may_be_shortened() -> None:
    assert parse_arguments(["--block", "x", "--pid=y"]) == [Option("blockdev", "x"), Option("pidfile", "y")]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--foo"], "unrecognized option '--foo'"),
        (["--blockdev"], "option '--blockdev' requires an argument"),
        (["bar"], "bar: Unexpected argument"),
        (["--help=x"], "option '--help' doesn't allow an argument"),
        (["-x"], "invalid option -- 'x'"),
    ],
)
def test_mistakes_are_named(arguments: list[str], text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_arguments(arguments)
    assert str(caught.value) == text


def test_help_names_every_option() -> None:
    assert all(f"--{name}" in HELP for name in VALUED + FLAGS)
