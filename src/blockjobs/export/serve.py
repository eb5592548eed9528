"""What a request may be, and what it does to the node."""

import errno
from collections.abc import Sequence
from typing import Final

from blockjobs.base.buffers import Buffer
from blockjobs.base.errors import BlockjobsError, IoFailure
from blockjobs.base.span import Span
from blockjobs.base.units import KiB, MiB
from blockjobs.block.node import Node
from blockjobs.block.quick import zeroes_fast
from blockjobs.block.vocabulary import ZeroMode
from blockjobs.export.contexts import status
from blockjobs.export.nbd_export import NbdExport
from blockjobs.export.negotiation import Agreed
from blockjobs.export.replies import Replies
from blockjobs.wire.nbd import REQUEST_BYTES_MAX, Command, CommandFlag
from blockjobs.wire.nbd_requests import Extent, Request

CACHE_BYTES: Final = 1 * MiB
"""Piece in which CACHE reads."""
STATUS_COST_BYTES: Final = 512 * KiB
"""What an answer with block status may take in memory."""

_FLAGS: Final = {
    Command.READ: CommandFlag.FUA | CommandFlag.DF,
    Command.WRITE: CommandFlag.FUA,
    Command.FLUSH: CommandFlag.FUA,
    Command.TRIM: CommandFlag.FUA,
    Command.CACHE: CommandFlag.FUA,
    Command.WRITE_ZEROES: CommandFlag.FUA | CommandFlag.NO_HOLE | CommandFlag.FAST_ZERO,
    Command.BLOCK_STATUS: CommandFlag.FUA | CommandFlag.REQ_ONE,
}
_CHANGES: Final = (Command.WRITE, Command.TRIM, Command.WRITE_ZEROES)
_WITH_DATA: Final = (Command.READ, Command.WRITE, Command.CACHE)


class BadRequest(Exception):
    """A request that is refused unheard; the client may go on."""

    def __init__(self, code: int, text: str) -> None:
        self.code = code
        super().__init__(text)


def payload_bytes(request: Request, agreed: Agreed) -> int:
    """How many bytes of the client's follow the request's header."""
    if request.command == Command.WRITE or (agreed.extended and request.flags & CommandFlag.PAYLOAD_LEN):
        return request.length
    return 0


def cost_bytes(request: Request) -> int:
    """What a valid request takes of the memory that all clients share."""
    match request.command:
        case Command.READ | Command.WRITE | Command.CACHE:
            # CACHE needs less memory, but as much time: so it queues with its like.
            return request.length
        case Command.BLOCK_STATUS:
            return STATUS_COST_BYTES
    return 0


def check(request: Request, agreed: Agreed) -> None:
    """Refuse what cannot be done, before anything is done about it.

    Raises:
        BadRequest: with the number and text for the client; texts as QEMU's.
    """
    flags, command, _, at, length = request
    export = agreed.export
    common = command == Command.READ or (command == Command.WRITE and export.writable)
    if common and not flags and length <= REQUEST_BYTES_MAX and at + length <= export.length:
        return  # what nearly all requests are
    if command not in _FLAGS:
        raise BadRequest(errno.EINVAL, f"invalid request type ({command}) received")
    kind = Command(command)
    if length > REQUEST_BYTES_MAX and kind in _WITH_DATA:
        raise BadRequest(errno.EINVAL, f"len ({length}) is larger than max len ({REQUEST_BYTES_MAX})")
    allowed = int(_FLAGS[kind])
    if kind is Command.READ and not agreed.structured:
        allowed &= ~int(CommandFlag.DF)
    if agreed.extended and kind is Command.WRITE:
        allowed |= int(CommandFlag.PAYLOAD_LEN)
    if flags & ~allowed:
        name = kind.name.lower().replace("_", " ")
        raise BadRequest(errno.EINVAL, f"unsupported flags for command {name} (got 0x{flags:x})")
    if kind in _CHANGES and not export.writable:
        raise BadRequest(errno.EPERM, "Export is read-only")
    if kind is Command.BLOCK_STATUS:
        if not agreed.contexts:
            raise BadRequest(errno.EINVAL, "CMD_BLOCK_STATUS not negotiated")
        if not length:
            raise BadRequest(errno.EINVAL, "need non-zero length")
    if kind is not Command.FLUSH and at + length > export.length:
        code = errno.ENOSPC if kind in (Command.WRITE, Command.WRITE_ZEROES) else errno.EINVAL
        raise BadRequest(code, f"operation past EOF; From: {at}, Len: {length}, Size: {export.length}")


async def serve(request: Request, content: Buffer, agreed: Agreed, replies: Replies) -> Sequence[Buffer]:
    """Carry out a checked request, once the export lets it in.

    Args:
        request: of the client.
        content: what a write carries; else where a read's bytes go, behind `replies.data_bytes` of room.
        agreed: with the client.
        replies: in the client's style.

    Returns:
        What to send.

    Raises:
        ExportClosed: nothing was done; there is no answer.
    Waits: for drained sections, overlapping requests and I/O. Checkpoint: no.
    """
    export = agreed.export
    if export.is_open:
        export.enter()
    else:
        await export.admit()
    try:
        if request.command == Command.READ:
            view = memoryview(content)
            await export.node.read_into(request.at, view[-request.length :] if request.length else view[:0])
            if not request.length:
                return [replies.done(request)]
            header = replies.data(request)
            view[: len(header)] = header
            return [content]
        if request.command == Command.BLOCK_STATUS:
            return replies.status(request, await _status(request, agreed))
        await _act(request, content, export)
        return [replies.done(request)]
    except IoFailure as error:
        return [replies.failed(request, error)]
    except BlockjobsError as error:  # a corrupt image, most likely
        return [replies.error(request, errno.EIO, str(error))]
    finally:
        export.leave()


async def _act(request: Request, content: Buffer, export: NbdExport) -> None:
    node, at, length = export.node, request.at, request.length
    fua = bool(request.flags & CommandFlag.FUA) or export.writethrough
    match request.command:
        case Command.WRITE:
            await node.write(at, content, fua=fua)
            return
        case Command.FLUSH:
            await node.flush()
            return
        case Command.CACHE:
            await _cache(node, Span(at, length))
            return
        case Command.TRIM:
            await node.discard(Span(at, length))
        case Command.WRITE_ZEROES:
            if request.flags & CommandFlag.FAST_ZERO and not zeroes_fast(node, Span(at, length)):
                raise IoFailure(errno.ENOTSUP, f"node '{node.name}' at {at}+{length}")
            mode = ZeroMode.KEEP if request.flags & CommandFlag.NO_HOLE else ZeroMode.UNMAP
            await node.zero(Span(at, length), mode=mode)
    if fua:
        await node.flush()


async def _cache(node: Node, span: Span) -> None:
    """Reading is what brings bytes closer: into the page cache, or through copy-on-read into the image."""
    scratch = memoryview(bytearray(min(span.length, CACHE_BYTES)))
    for piece in span.split(CACHE_BYTES):
        await node.read_into(piece.at, scratch[: piece.length])


async def _status(request: Request, agreed: Agreed) -> list[tuple[int, list[Extent]]]:
    export = agreed.export
    contexts = [context.id for context in agreed.contexts]
    single = bool(request.flags & CommandFlag.REQ_ONE)
    span = Span(request.at, request.length)
    return await status(export.node, span, contexts, export.contexts.bitmaps, single=single)
