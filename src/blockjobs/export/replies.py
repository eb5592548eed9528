"""Replies in the style that a client negotiated: simple, structured, or with extended headers."""

import errno
from collections.abc import Sequence

from blockjobs.base.buffers import Buffer
from blockjobs.wire.nbd import ChunkFlag, ChunkType, wire_errno
from blockjobs.wire.nbd_requests import (
    CHUNK,
    EXTENDED_CHUNK,
    OFFSET_BYTES,
    SIMPLE_REPLY,
    Chunk,
    Extent,
    Request,
    encode_chunk,
    encode_data,
    encode_error,
    encode_simple_reply,
    encode_status,
)


class Replies:
    """Makes the bytes of replies; payload that was read stays where it is, behind `data_bytes` of room for a header."""

    def __init__(self, *, structured: bool, extended: bool) -> None:
        self._structured, self._extended = structured, extended
        self._chunk_bytes = EXTENDED_CHUNK.size if extended else CHUNK.size
        self.data_bytes = self._chunk_bytes + OFFSET_BYTES if structured else SIMPLE_REPLY.size
        """How long the header of a reply with data is."""

    def done(self, request: Request) -> bytes:
        """The request succeeded, and there is nothing to tell."""
        if self._extended or (self._structured and not request.command):
            return self._chunk(request, ChunkFlag.DONE, ChunkType.NONE, b"")
        return encode_simple_reply(request.cookie)

    def data(self, request: Request) -> bytes:
        """The header of a reply whose `request.length` bytes follow."""
        if not self._structured:
            return encode_simple_reply(request.cookie)
        return encode_data(request, extended=self._extended)

    def error(self, request: Request, code: int, text: str) -> bytes:
        """The request failed."""
        code = wire_errno(code)
        if not self._structured:
            return encode_simple_reply(request.cookie, code)
        return self._chunk(request, ChunkFlag.DONE, ChunkType.ERROR, encode_error(code, text))

    def failed(self, request: Request, failure: OSError) -> bytes:
        """The request failed as I/O does."""
        return self.error(request, failure.errno or errno.EIO, str(failure))

    def status(self, request: Request, answers: Sequence[tuple[int, list[Extent]]]) -> list[Buffer]:
        """Block status: one chunk for each context."""
        type = ChunkType.BLOCK_STATUS_EXT if self._extended else ChunkType.BLOCK_STATUS
        return [
            self._chunk(
                request,
                ChunkFlag.DONE if index == len(answers) - 1 else ChunkFlag(0),
                type,
                encode_status(context, extents, extended=self._extended),
            )
            for index, (context, extents) in enumerate(answers)
        ]

    def _chunk(self, request: Request, flags: ChunkFlag, type: ChunkType, payload: bytes) -> bytes:
        header = Chunk(flags, type, request.cookie, len(payload), request.at)
        return encode_chunk(header, extended=self._extended) + payload
