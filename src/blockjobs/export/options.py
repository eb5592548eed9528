"""`block-export-add` and its relatives: what comes in and what goes out (spec/qmp.md)."""

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Final, TypeAlias

from blockjobs.schema.command import Event, event
from blockjobs.schema.types import Options, Record, qapi
from blockjobs.schema.union import OpenUnion

HANDSHAKE_S_MAX: Final = 10
CONNECTIONS_MAX: Final = 100


class BlockDirtyBitmap(Options, frozen=True, kw_only=True):
    """A bitmap by the node that it belongs to."""

    node: str
    name: str


BlockDirtyBitmapOrStr: TypeAlias = Annotated[str | BlockDirtyBitmap, qapi("BlockDirtyBitmapOrStr")]


class BlockExportOptions(Options, frozen=True, kw_only=True, tag_field="type"):
    """What every export has."""

    id: str
    node_name: str
    writable: bool = False
    writethrough: bool = False
    iothread: str | None = None
    fixed_iothread: bool = False


export_options = OpenUnion("BlockExportOptions", base=BlockExportOptions)
if TYPE_CHECKING:
    AnyExportOptions: TypeAlias = BlockExportOptions
else:
    AnyExportOptions = export_options.type


@export_options.add
class NbdExportOptions(BlockExportOptions, frozen=True, kw_only=True, tag="nbd"):
    """An export of the NBD server."""

    name: str | None = None
    description: str | None = None
    bitmaps: list[BlockDirtyBitmapOrStr] | None = None
    allocation_depth: bool = False


class BlockExportRemoveMode(StrEnum):
    """Whether clients keep an export from being removed."""

    SAFE = "safe"
    HARD = "hard"


class BlockExportType(StrEnum):
    """Kinds of export."""

    NBD = "nbd"


class BlockExportInfo(Record, frozen=True, kw_only=True):
    """One line of `query-block-exports`."""

    id: str
    type: BlockExportType
    node_name: str
    shutting_down: bool


@event("BLOCK_EXPORT_DELETED", since="5.2")
class BlockExportDeleted(Event, frozen=True, kw_only=True):
    """An export is gone; its identifier is free."""

    id: str
