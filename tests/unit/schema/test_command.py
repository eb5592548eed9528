"""Commands, events, open unions: declaration, and QEMU's texts for arguments that do not fit."""

import asyncio
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, TypeAlias

import pytest
from msgspec import UNSET, Meta, UnsetType

from blockjobs.base.errors import CommandNotFound, ParameterError, UsageError
from blockjobs.schema.command import Event, Registry
from blockjobs.schema.types import Options, Size, UInt32, qapi
from blockjobs.schema.union import OpenUnion


class Mode(StrEnum):
    ALL = "all"
    NONE = "none"


class Checks(Options, kw_only=True):
    template: Mode | None = None
    main_header: bool | None = None


class NodeOptions(Options, kw_only=True, tag_field="driver"):
    node_name: str | None = None
    discard: Mode | None = None


node_options = OpenUnion("BlockdevOptions", base=NodeOptions)
if TYPE_CHECKING:
    BlockdevOptions: TypeAlias = NodeOptions
    BlockRef: TypeAlias = str | NodeOptions
    BlockRefOrNull: TypeAlias = str | NodeOptions | None
else:
    BlockdevOptions = node_options.type
    BlockRef = node_options.alternate("BlockdevRef", str)
    BlockRefOrNull = node_options.alternate("BlockdevRefOrNull", str, None)


@node_options.add
class FileOptions(NodeOptions, kw_only=True, tag="file"):
    filename: str
    aio: Mode | None = None


@node_options.add
class Qcow2Options(NodeOptions, kw_only=True, tag="qcow2"):
    file: BlockRef
    backing: BlockRefOrNull | UnsetType = UNSET
    overlap_check: Annotated[Mode | Checks, qapi("Qcow2OverlapChecks")] | None = None
    size: Size | None = None
    delay: UInt32 = 0
    children: list[BlockRef] | None = None


class Inet(Options, kw_only=True, tag_field="type", tag="inet"):
    host: str


class Unix(Options, kw_only=True, tag_field="type", tag="unix"):
    path: str


class Bitmaps(Options, kw_only=True):
    name: str


registry = Registry()


@registry.command(since="2.9")
async def blockdev_add(host: "object", options: BlockdevOptions) -> None:
    """Add a node.

    Args:
        options: what to open.
    """


@registry.command(since="3.0")
async def probe(
    host: object,
    *,
    id: str,
    speed: int | None = None,
    flag: bool = False,
    mode: Mode | None = None,
    modes: list[Mode] = [],  # noqa: B006 - never changed
    server: Inet | Unix | None = None,
    ratio: float | None = None,
    percent: Annotated[int, Meta(ge=0, le=100)] = 0,
    bitmaps: list[Annotated[str | Bitmaps, qapi("BlockDirtyBitmapOrStr")]] | None = None,
) -> dict[str, object]:
    """Give the arguments back.

    Args:
        id: of which job,
            on two lines.
        speed: in bytes per second.
        flag: yes or no.
        mode: one word.
        modes: several words.
        server: where.
        ratio: a number.
        percent: a small number.
        bitmaps: names.
    """
    return {"host": host, "id": id, "speed": speed, "flag": flag}


NODE_ERRORS = [
    # the left half of each line was sent to qemu-storage-daemon 7.2.22, the right half is its answer
    ({}, "Parameter 'driver' is missing"),
    ({"driver": 5}, "Invalid parameter type for 'driver', expected: string"),
    ({"driver": "zz"}, "Parameter 'driver' does not accept value 'zz'"),
    ({"driver": "qcow2"}, "Parameter 'file' is missing"),
    ({"driver": "qcow2", "file": 5}, "Invalid parameter type for 'file', expected: BlockdevRef"),
    ({"driver": "qcow2", "file": None}, "Invalid parameter type for 'file', expected: BlockdevRef"),
    ({"driver": "qcow2", "file": {}}, "Parameter 'file.driver' is missing"),
    ({"driver": "qcow2", "file": {"driver": "x"}}, "Parameter 'driver' does not accept value 'x'"),
    ({"driver": "qcow2", "file": {"driver": "file"}}, "Parameter 'file.filename' is missing"),
    (
        {"driver": "qcow2", "file": {"driver": "file", "filename": 5}},
        "Invalid parameter type for 'file.filename', expected: string",
    ),
    (
        {"driver": "qcow2", "file": {"driver": "file", "filename": "x", "zz": 1}, "yy": 1},
        "Parameter 'file.zz' is unexpected",
    ),
    (
        {"driver": "qcow2", "file": {"driver": "qcow2", "file": {"driver": "file", "filename": "x", "aio": "zz"}}},
        "Parameter 'aio' does not accept value 'zz'",
    ),
    (
        {"driver": "qcow2", "file": "f", "overlap-check": 5},
        "Invalid parameter type for 'overlap-check', expected: Qcow2OverlapChecks",
    ),
    (
        {"driver": "qcow2", "file": "f", "overlap-check": "bad"},
        "Parameter 'overlap-check' does not accept value 'bad'",
    ),
    (
        {"driver": "qcow2", "file": "f", "overlap-check": {"main-header": "bad"}},
        "Invalid parameter type for 'overlap-check.main-header', expected: boolean",
    ),
    (
        {"driver": "qcow2", "file": "f", "node-name": 5, "delay": -1},
        "Invalid parameter type for 'node-name', expected: string",
    ),
    (
        {"driver": "qcow2", "file": "f", "backing": 5},
        "Invalid parameter type for 'backing', expected: BlockdevRefOrNull",
    ),
    ({"driver": "qcow2", "file": "f", "children": [5]}, "Invalid parameter type for 'null', expected: BlockdevRef"),
    ({"driver": "qcow2", "file": "f", "children": {}}, "Invalid parameter type for 'children', expected: array"),
    ({"driver": "qcow2", "file": "f", "size": 1.0}, "Parameter 'size' expects uint64"),
    ({"driver": "qcow2", "file": "f", "size": "64k"}, "Parameter 'size' expects uint64"),
    (
        {"driver": "qcow2", "file": {"driver": "qcow2", "size": 2.0**64, "file": ""}},
        "Parameter 'file.size' expects uint64",
    ),
    ({"driver": "qcow2", "file": "f", "delay": -1}, "Parameter 'delay' expects uint32_t"),
    ({"driver": "qcow2", "file": "f", "delay": 2**63}, "Parameter 'delay' expects uint32_t"),
    ({"driver": "qcow2", "file": "f", "delay": 1.5}, "Parameter 'delay' expects uint64"),
]

KEYWORD_ERRORS = [
    ({"x": 1}, "Parameter 'id' is missing"),
    ({"id": "a", "b": {"zz": 1}}, "Parameter 'b' is unexpected"),
    ({"id": None}, "Invalid parameter type for 'id', expected: string"),
    ({"id": "a", "speed": None}, "Invalid parameter type for 'speed', expected: integer"),
    ({"id": "a", "speed": 1.0}, "Invalid parameter type for 'speed', expected: integer"),
    ({"id": "a", "speed": True}, "Invalid parameter type for 'speed', expected: integer"),
    ({"id": "a", "speed": 2**63}, "Invalid parameter type for 'speed', expected: integer"),
    ({"id": "a", "flag": 1}, "Invalid parameter type for 'flag', expected: boolean"),
    ({"id": "a", "mode": 5}, "Invalid parameter type for 'mode', expected: string"),
    ({"id": "a", "modes": ["x"]}, "Parameter 'null' does not accept value 'x'"),
    ({"id": "a", "modes": ["all", 5]}, "Invalid parameter type for 'modes[1]', expected: string"),
    ({"id": "a", "server": "x"}, "Invalid parameter type for 'server', expected: object"),
    ({"id": "a", "server": {"path": "/x"}}, "Parameter 'server.type' is missing"),
    ({"id": "a", "server": {"type": "foo"}}, "Parameter 'type' does not accept value 'foo'"),
    ({"id": "a", "server": {"type": "unix"}}, "Parameter 'server.path' is missing"),
    ({"id": "a", "server": {"type": "unix", "path": "x", "foo": 1}, "zap": 1}, "Parameter 'server.foo' is unexpected"),
    ({"id": "a", "ratio": "x"}, "Invalid parameter type for 'ratio', expected: number"),
    ({"id": "a", "percent": 101}, "Parameter 'percent' expects a number that is at most 100"),
    ({"id": "a", "percent": -1}, "Parameter 'percent' expects a number that is at least 0"),
    ({"id": "a", "bitmaps": [5]}, "Invalid parameter type for 'null', expected: BlockDirtyBitmapOrStr"),
    ({"id": "a", "bitmaps": [{"name": 5}]}, "Invalid parameter type for 'bitmaps[0].name', expected: string"),
]


@pytest.mark.parametrize(("arguments", "text"), NODE_ERRORS)
def test_a_flat_union_says_what_qemu_says(arguments: dict[str, object], text: str) -> None:
    with pytest.raises(ParameterError) as caught:
        registry.bind("blockdev-add", arguments)
    assert str(caught.value) == text


@pytest.mark.parametrize(("arguments", "text"), KEYWORD_ERRORS)
def test_keyword_arguments_say_what_qemu_says(arguments: dict[str, object], text: str) -> None:
    with pytest.raises(ParameterError) as caught:
        registry.bind("probe", arguments)
    assert str(caught.value) == text


def test_arguments_become_typed_values() -> None:
    arguments = {
        "driver": "qcow2",
        "file": {"driver": "file", "filename": "x"},
        "backing": None,
        "size": -1,
        "overlap-check": {"template": "all"},
        "children": ["a", {"driver": "qcow2", "file": "b"}],
    }
    options = registry.bind("blockdev-add", arguments).arguments
    assert options == Qcow2Options(
        file=FileOptions(filename="x"),
        backing=None,
        size=2**64 - 1,  # QEMU wraps negative numbers around
        overlap_check=Checks(template=Mode.ALL),
        children=["a", Qcow2Options(file="b")],
    )
    assert registry.bind("blockdev-add", {"driver": "qcow2", "file": "f"}).arguments.backing is UNSET


def test_hundreds_of_levels_are_refused() -> None:
    options: dict[str, object] = {"driver": "file", "filename": "x"}
    for _ in range(1000):
        options = {"driver": "qcow2", "file": options}
    with pytest.raises(UsageError, match="nested too deeply"):
        registry.bind("blockdev-add", options)


def test_a_call_passes_receiver_and_defaults() -> None:
    call = registry.bind("probe", {"id": "a", "speed": -5, "ratio": 2})
    assert asyncio.run(call.run("me")) == {"host": "me", "id": "a", "speed": -5, "flag": False}


def test_a_variant_registered_late_is_known_inside_earlier_ones() -> None:
    unknown = {"driver": "qcow2", "file": {"driver": "late"}}
    with pytest.raises(ParameterError, match="does not accept value 'late'"):
        registry.bind("blockdev-add", unknown)

    class Late(NodeOptions, kw_only=True, tag="late"):
        pass

    node_options.add(Late)
    try:
        assert registry.bind("blockdev-add", unknown).arguments.file == Late()
    finally:
        node_options.homes.loaded.pop("late")


def test_unknown_command() -> None:
    with pytest.raises(CommandNotFound, match=r"^The command nope has not been found$"):
        registry.bind("nope", {})


def test_declarations_that_are_refused() -> None:
    empty = Registry()

    async def undocumented(host: object, *, id: str) -> None:
        """Do it."""

    async def two_positional(host: object, a: str, b: str) -> None:
        """Do it."""

    def not_a_coroutine(host: object) -> None:
        """Do it."""

    async def untyped(host, *, a) -> None:
        """Do it.

        Args:
            a: what.
        """

    async def query_jobs_that_waits(host: object) -> None:
        """Do it."""

    for function in (undocumented, two_positional, not_a_coroutine, untyped):
        with pytest.raises(TypeError):
            empty.command(since="1.0")(function)
    with pytest.raises(TypeError, match="async def, or def"):
        empty.command(since="1.0", waits=False)(query_jobs_that_waits)
    with pytest.raises(TypeError, match="twice"):
        registry.command(since="3.0")(probe)
    assert not empty.commands


def test_documentation_is_kept() -> None:
    doc = registry.commands["probe"].doc
    assert doc.summary == "Give the arguments back."
    assert doc.arguments["id"] == "of which job, on two lines."


def test_events_know_their_name() -> None:
    events = Registry()

    @events.event("JOB_STATUS_CHANGE", since="3.0")
    class StatusChange(Event, kw_only=True):
        """A job's status changed."""

        id: str
        status: Mode

    assert StatusChange.event_name == StatusChange(id="a", status=Mode.ALL).event_name == "JOB_STATUS_CHANGE"
    assert events.events["JOB_STATUS_CHANGE"].struct is StatusChange
    with pytest.raises(TypeError):
        events.event("JOB_STATUS_CHANGE", since="3.0")(StatusChange)
