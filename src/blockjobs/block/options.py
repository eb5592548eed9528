"""How nodes are described: options common to all drivers, references to children, and the driver registry.

A driver file declares its option struct and its class, and is then known to blockdev-add, the command line and the
schema:

    class ThrottleOptions(NodeOptions, frozen=True, kw_only=True, tag="throttle"):
        throttle_group: str
        file: BlockRef

    @driver(ThrottleOptions)
    class Throttle(FilterDriver):
        @classmethod
        async def open(cls, options, children, context): ...

Drivers of this program have their homes listed here, so that only those in use are loaded.
"""

from collections.abc import Callable, Iterator
from enum import StrEnum
from functools import cache
from typing import TYPE_CHECKING, Any, Final, TypeAlias, TypeVar, get_args

import msgspec
from msgspec import UNSET, UnsetType

from blockjobs.base.homes import Homes
from blockjobs.block.driver import Driver
from blockjobs.schema.types import Options
from blockjobs.schema.union import OpenType, OpenUnion


class DetectZeroes(StrEnum):
    """Whether writes of only zero bytes become zero requests."""

    OFF = "off"
    ON = "on"
    UNMAP = "unmap"


class DiscardMode(StrEnum):
    """Whether discard requests reach the driver."""

    IGNORE = "ignore"
    UNMAP = "unmap"


class CacheOptions(Options, frozen=True, kw_only=True):
    """How the host's page cache is used."""

    direct: bool = False
    no_flush: bool = False


class NodeOptions(Options, frozen=True, kw_only=True, tag_field="driver"):
    """What every node can be told; None means not given, so that inline children inherit (spec/block-layer.md §2)."""

    node_name: str | None = None
    discard: DiscardMode | None = None
    cache: CacheOptions | None = None
    read_only: bool | None = None
    auto_read_only: bool | None = None
    force_share: bool | None = None
    detect_zeroes: DetectZeroes | None = None
    active: bool | None = None


_HOMES: Final = {
    "blkdebug": "blockjobs.block.drivers.blkdebug",
    "blklogwrites": "blockjobs.block.drivers.blklogwrites",
    "compress": "blockjobs.block.drivers.compress",
    "copy-before-write": "blockjobs.block.drivers.copy_before_write",
    "copy-on-read": "blockjobs.block.drivers.copy_on_read",
    "file": "blockjobs.block.drivers.file",
    "host_device": "blockjobs.block.drivers.file",
    "luks": "blockjobs.block.drivers.luks",
    "nbd": "blockjobs.block.drivers.nbd.driver",
    "null-co": "blockjobs.block.drivers.null",
    "null-aio": "blockjobs.block.drivers.null",
    "preallocate": "blockjobs.block.drivers.preallocate",
    "qcow2": "blockjobs.block.drivers.qcow2.driver",
    "quorum": "blockjobs.block.drivers.quorum",
    "raw": "blockjobs.block.drivers.raw",
    "snapshot-access": "blockjobs.block.drivers.snapshot_access",
    "throttle": "blockjobs.block.drivers.throttle",
}

node_options: Final = OpenUnion("BlockdevOptions", base=NodeOptions, homes=_HOMES)

if TYPE_CHECKING:
    BlockdevOptions: TypeAlias = NodeOptions
    BlockRef: TypeAlias = str | NodeOptions
    BlockRefOrNull: TypeAlias = str | NodeOptions | None
else:
    BlockdevOptions = node_options.type
    BlockRef = node_options.alternate("BlockdevRef", str)
    BlockRefOrNull = node_options.alternate("BlockdevRefOrNull", str, None)

D = TypeVar("D", bound=Driver)

_HIDDEN_HOMES: Final = {
    "commit_top": "blockjobs.block.drivers.commit_top",
    "mirror_top": "blockjobs.block.drivers.mirror_top",
    "salvage": "blockjobs.block.drivers.salvage",
}
_drivers: Final[Homes[type[Driver]]] = Homes(_HOMES | _HIDDEN_HOMES)


def driver(options: type[NodeOptions]) -> Callable[[type[D]], type[D]]:
    """Class decorator that registers a driver under the tag of its option struct."""

    def register(driver_class: type[D]) -> type[D]:
        node_options.add(options)
        _drivers.loaded[tag_of(options)] = driver_class
        return driver_class

    return register


def hidden_driver(options: type[NodeOptions]) -> Callable[[type[D]], type[D]]:
    """As `driver`, for what only jobs make: users cannot, and no schema shows it."""

    def register(driver_class: type[D]) -> type[D]:
        _drivers.loaded[tag_of(options)] = driver_class
        return driver_class

    return register


def tag_of(options: NodeOptions | type[NodeOptions]) -> str:
    """The driver's name as users write it."""
    tag = options.__struct_config__.tag
    assert isinstance(tag, str)
    return tag


def driver_named(name: str) -> type[Driver] | None:
    """The class of a driver name, loaded if need be; None if there is no such driver."""
    return _drivers.find(name)


Reference = str | NodeOptions | None
"""A child as options give it: a node's name, an inline description, or null for explicitly none."""


def references(options: NodeOptions) -> Iterator[tuple[str, Reference]]:
    """The children that `options` name, in the order of declaration; those not given are left out.

    Members that are lists of references give edges named `children.0`, `children.1`, ...
    """
    for attribute, wire_name, optional in _reference_fields(type(options)):
        value = getattr(options, attribute)
        if isinstance(value, UnsetType) or (value is None and optional):
            continue
        if isinstance(value, list | tuple):
            yield from ((f"{wire_name}.{index}", item) for index, item in enumerate(value))
        elif value == "" and not optional and wire_name == "backing":
            yield wire_name, None  # how null was spelled before QEMU 2.9
        else:
            yield wire_name, value


@cache
def _reference_fields(kind: type[NodeOptions]) -> tuple[tuple[str, str, bool], ...]:
    """(attribute, wire name, None means absent) of the fields that hold references."""
    return tuple(
        (field.name, field.encode_name, field.default is None)
        for field in msgspec.structs.fields(kind)
        if _mentions_nodes(field.type)
    )


def _mentions_nodes(annotation: Any) -> bool:
    if isinstance(annotation, OpenType):
        return annotation.union is node_options
    return any(_mentions_nodes(argument) for argument in get_args(annotation))


__all__ = [
    "UNSET",
    "BlockRef",
    "BlockRefOrNull",
    "BlockdevOptions",
    "CacheOptions",
    "DetectZeroes",
    "DiscardMode",
    "NodeOptions",
    "Reference",
    "UnsetType",
    "driver",
    "driver_named",
    "hidden_driver",
    "node_options",
    "references",
    "tag_of",
]
