"""Dotted keys: forms, escapes, coercion, and the texts of qemu-storage-daemon 7.2."""

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import pytest
from msgspec import UNSET, UnsetType

from blockjobs.base.errors import BlockjobsError
from blockjobs.schema.keyval import parse, parse_members
from blockjobs.schema.types import Options, Size, UInt32, qapi
from blockjobs.schema.union import OpenUnion
from blockjobs.wire.qmp_lines import read_one


class Cache(Options, frozen=True, kw_only=True):
    direct: bool = False


class Event(StrEnum):
    READ = "read_aio"


class Inject(Options, frozen=True, kw_only=True):
    event: Event
    errno: int = 5


class NodeOptions(Options, frozen=True, kw_only=True, tag_field="driver"):
    node_name: str | None = None
    read_only: bool | None = None
    cache: Cache | None = None


nodes = OpenUnion("BlockdevOptions", base=NodeOptions)
if TYPE_CHECKING:
    BlockdevOptions: TypeAlias = NodeOptions
    BlockRef: TypeAlias = str | NodeOptions
    BlockRefOrNull: TypeAlias = str | NodeOptions | None
else:
    BlockdevOptions = nodes.type
    BlockRef = nodes.alternate("BlockdevRef", str)
    BlockRefOrNull = nodes.alternate("BlockdevRefOrNull", str, None)


@nodes.add
class NullOptions(NodeOptions, frozen=True, kw_only=True, tag="null-co"):
    size: int | None = None
    area: Size | None = None
    ratio: float | None = None
    delay: UInt32 | None = None


@nodes.add
class FileOptions(NodeOptions, frozen=True, kw_only=True, tag="file"):
    filename: str


@nodes.add
class Qcow2Options(NodeOptions, frozen=True, kw_only=True, tag="qcow2"):
    file: BlockRef
    backing: BlockRefOrNull | UnsetType = UNSET
    check: Annotated[Event | Cache, qapi("Qcow2OverlapChecks")] | None = None


@nodes.add
class QuorumOptions(NodeOptions, frozen=True, kw_only=True, tag="quorum"):
    children: list[BlockRef]
    inject_error: list[Inject] | None = None


def read(text: str) -> Any:
    return parse(text, BlockdevOptions, implied="driver", read_json=read_one)


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("null-co", NullOptions()),
        ("driver=null-co,", NullOptions()),
        ("null-co,read-only=yes,cache.direct=on", NullOptions(read_only=True, cache=Cache(direct=True))),
        ("null-co,read-only=n,node-name=a,,b", NullOptions(read_only=False, node_name="a,b")),
        ("null-co,size=0x10", NullOptions(size=16)),
        ("null-co,size= +010", NullOptions(size=8)),
        ("null-co,size=-1,area=1.5k,ratio=0.5", NullOptions(size=-1, area=1536, ratio=0.5)),
        ("null-co,node-name=a,node-name=b", NullOptions(node_name="b")),
        ("node-name=x=y,driver=null-co", NullOptions(node_name="x=y")),
        ("qcow2,file=a,backing=", Qcow2Options(file="a", backing=None)),
        ("qcow2,file.driver=file,file.filename=/x", Qcow2Options(file=FileOptions(filename="/x"))),
        ("qcow2,file=a,check=read_aio", Qcow2Options(file="a", check=Event.READ)),
        ("qcow2,file=a,check.direct=on", Qcow2Options(file="a", check=Cache(direct=True))),
        (
            "quorum,children.0=a,children.1.driver=null-co,children.1.size=3,inject-error.0.event=read_aio",
            QuorumOptions(children=["a", NullOptions(size=3)], inject_error=[Inject(event=Event.READ)]),
        ),
        ('{"driver":"null-co","size":3}', NullOptions(size=3)),
        ("{'driver':'null-co','node-name':'it\\'s'}", NullOptions(node_name="it's")),
    ],
)
def test_values(text: str, options: NodeOptions) -> None:
    assert read(text) == options


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("", "Parameter 'driver' is missing"),
        ("zz", "Parameter 'driver' does not accept value 'zz'"),
        ("null-co,,", "Parameter 'driver' does not accept value 'null-co,'"),
        (' {"driver":"null-co"}', "Parameter 'driver' does not accept value ' {\"driver\":\"null-co\"}'"),
        ("null-co,size=x", "Parameter 'size' expects integer"),
        ("null-co,size=1k", "Parameter 'size' expects integer"),
        ("null-co,size=5 ", "Parameter 'size' expects integer"),
        ("null-co,size=", "Parameter 'size' expects integer"),
        ("null-co,size=9999999999999999999999", "Parameter 'size' expects integer"),
        ("null-co,delay=-1", "Parameter 'delay' expects uint32_t"),
        ("null-co,delay=x", "Parameter 'delay' expects integer"),
        ("null-co,area=x", "Parameter 'area' expects a non-negative number below 2^64"),
        ("null-co,ratio=x", "Parameter 'ratio' expects number"),
        ("null-co,read-only=maybe", "Parameter 'read-only' expects 'on' or 'off'"),
        ("null-co,read-only=ON", "Parameter 'read-only' expects 'on' or 'off'"),
        ("null-co,cache.direct=maybe", "Parameter 'cache.direct' expects 'on' or 'off'"),
        ("null-co,cache=on", "Invalid parameter type for 'cache', expected: object"),
        ("null-co,cache.x=on", "Parameter 'cache.x' is unexpected"),
        ("null-co,size.x=5", "Parameters 'size.*' are unexpected"),
        ("null-co,node-name.x=5", "Parameters 'node-name.*' are unexpected"),
        ("null-co,node-name", "Expected '=' after parameter 'node-name'"),
        ("null-co,=5", "Invalid parameter ''"),
        (",driver=null-co", "Invalid parameter ''"),
        ("null-co,.x=5", "Invalid parameter '.x'"),
        ("null-co,x..y=5", "Invalid parameter 'x..y'"),
        ("null-co,0=x", "Invalid parameter '0'"),
        ("null-co,a.1x=2", "Invalid parameter 'a.1x'"),
        ("null-co,_x=1", "Invalid parameter '_x'"),
        ("null-co,a.00=1", "Parameter 'a' is unexpected"),
        ("a b=c", "Invalid parameter 'a b'"),
        ("qcow2,file=a,file.driver=file", "Parameters 'file.*' used inconsistently"),
        ("qcow2,file.driver=file,file=a", "Parameters 'file.*' used inconsistently"),
        ("null-co,a.b=1,a.b.c=2", "Parameters 'a.b.*' used inconsistently"),
        ("qcow2,file.driver=file", "Parameter 'file.filename' is missing"),
        ("quorum,children.0=a,children.2=b", "Parameter 'children.1' missing"),
        ("quorum,children.0=a,children.x=b", "Parameters 'children.*' used inconsistently"),
        ("quorum,children=a", "Invalid parameter type for 'children', expected: array"),
        (
            "quorum,children.0=a,inject-error.0.event=read_aio,inject-error.0.errno=x",
            "Parameter 'inject-error.0.errno' expects integer",
        ),
        ("quorum,children.0=a,inject-error.0.event=zz", "Parameter 'event' does not accept value 'zz'"),
        ('{"driver":"null-co"', "JSON parse error, premature EOI"),
        ('{"driver":"null-co"} x', "JSON parse error, invalid keyword 'x'"),
        ('{"driver":"null-co"} {}', "Expecting at most one JSON value"),
        ('{"driver":"null-co","node-name":5}', "Invalid parameter type for 'node-name', expected: string"),
    ],
)
def test_errors(text: str, error: str) -> None:
    with pytest.raises(BlockjobsError) as caught:
        read(text)
    assert str(caught.value) == error


def test_short_booleans() -> None:
    text = "socket,id=c,server,nowait"
    members = parse_members(text, implied="backend", short_booleans=True)
    assert members == {"backend": "socket", "id": "c", "server": "on", "wait": "off"}


def test_strict_json_without_the_monitors_dialect() -> None:
    assert parse('{"driver":"null-co"}', BlockdevOptions) == NullOptions()
    with pytest.raises(BlockjobsError, match="JSON parse error"):
        parse("{'driver':'null-co'}", BlockdevOptions)
