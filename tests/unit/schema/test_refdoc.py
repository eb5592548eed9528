"""Reference text and docstrings, from declarations."""

from enum import StrEnum

from blockjobs.monitor import commands  # noqa: F401  importing it makes them known
from blockjobs.schema.command import Registry, qmp
from blockjobs.schema.docstring import parse_doc
from blockjobs.schema.refdoc import reference


class Mode(StrEnum):
    ALL = "all"
    NONE = "none"


def test_a_page() -> None:
    registry = Registry()

    @registry.command(since="3.0", features=("deprecated",))
    async def probe_disk(host: object, *, job_id: str, modes: list[Mode] | None = None) -> list[int]:
        """Look at a disk.

        At every sector.

        Args:
            job_id: who looks,
                and when.
            modes: how.
        Errors:
            GenericError: there is no such disk.
        """
        return []

    assert reference(registry.commands["probe-disk"]) == (
        "probe-disk (since 3.0, deprecated)\n\n"
        "Look at a disk.\n\n"
        "At every sector.\n\n"
        "Arguments:\n"
        "  job-id (string): who looks, and when.\n"
        "  modes (array of one of all, none, optional): how.\n\n"
        "Returns: array of integer\n\n"
        "Errors:\n"
        "  GenericError: there is no such disk.\n"
    )


def test_every_command_has_a_page() -> None:
    for command in qmp.commands.values():
        page = reference(command)
        assert page.startswith(f"{command.name} (since ")
        assert len(page.splitlines()[2]) > 10
    assert "object by 'driver'" in reference(qmp.commands["blockdev-add"])


def test_docstrings() -> None:
    assert parse_doc(None).summary == ""
    doc = parse_doc(
        "One\n    line.\n\n    More.\n\n    Raises:\n        X: y\n    Args:\n        a (int): b\n            c\n"
    )
    assert (doc.summary, doc.body, doc.arguments, doc.errors) == ("One line.", "More.", {"a": "b c"}, {})
