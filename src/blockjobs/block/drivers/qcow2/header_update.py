"""Changing the header so that a crash at any instant leaves the old or the new one (spec/durability.md §1, I5).

What writes is loaded when a header is first written: looking at images must not wait for it.
"""

from collections.abc import Sequence
from typing import Final

from msgspec import Struct
from msgspec.structs import replace

from blockjobs.base.buffers import Buffer
from blockjobs.base.errors import UsageError
from blockjobs.base.span import Span
from blockjobs.block.driver import Child
from blockjobs.wire.qcow2 import (
    BACKING_NAME_MAX,
    EXT_BACKING_FORMAT,
    EXT_FEATURE_NAMES,
    FEATURE_NAMES,
    FIELD_FEATURES,
    SECTOR,
    V3_BYTES,
    WRITTEN_V3_BYTES,
    Extension,
    Field,
    Header,
    encode_extension,
    encode_feature_names,
)

EXT_FILLER: Final = 0x66696C6C
"""Ours: an extension without meaning that reaches from H0 to the place where the list goes on."""
_END: Final = bytes(8)
_FEATURE_NAMES_CLUSTER_MIN: Final = 8192
"""As QEMU: smaller clusters have no room to spare for names."""


class Layout(Struct, frozen=True):
    """A header as bytes: `tail` goes to `tail_at`, ▷, then `sector` to 0. An empty tail needs no write."""

    header: Header
    sector: bytes
    tail_at: int
    tail: bytes

    @property
    def before(self) -> list[tuple[int, Buffer]]:
        """What is to be written before `sector`, and where."""
        return [(self.tail_at, self.tail)] if self.tail else []


def lay_out(header: Header, durable_tail: Span) -> Layout:
    """Find places in cluster 0 for everything, never on top of `durable_tail`.

    The feature name table is only there for people who read error messages; it is left out where the header would
    otherwise outgrow its first sector, or cannot be written without touching what the durable header uses.

    Args:
        header: what it shall say; `backing_at` and `backing_bytes` are set in the result.
        durable_tail: the part past the first sector that the header now in the file refers to.

    Raises:
        UsageError: it does not fit into a cluster.
    """
    if V3_BYTES < header.header_bytes < WRITTEN_V3_BYTES and header.version > 2:
        header = replace(header, header_bytes=WRITTEN_V3_BYTES)  # no field is cut, and extensions begin behind them
    name = (header.backing_file or "").encode("utf-8", "surrogateescape")
    if len(name) > BACKING_NAME_MAX:
        raise UsageError("Backing file name too long")
    with_names = [each for each in header.extensions if each.type not in (EXT_FILLER, EXT_FEATURE_NAMES)]
    without_names = list(with_names)
    if header.version > 2 and header.cluster_size >= _FEATURE_NAMES_CLUSTER_MIN:
        with_names.append(Extension(EXT_FEATURE_NAMES, encode_feature_names(FEATURE_NAMES)))
    for extensions in (with_names, without_names):
        listed = b"".join(map(encode_extension, extensions)) + _END
        backing_at = header.header_bytes + len(listed)
        end = backing_at + len(name)
        if end <= SECTOR or (not durable_tail and end <= header.cluster_size):
            return _layout(header, extensions, listed + name, backing_at, name, SECTOR)
    return _lay_out_apart(header, without_names, name, durable_tail)


def _lay_out_apart(header: Header, extensions: list[Extension], name: bytes, durable_tail: Span) -> Layout:
    """The list begins in H0 and goes on in free space, reached by a filler; the backing name follows it."""
    if header.header_bytes + len(_END) > SECTOR:
        raise UsageError("The image's header has no room for this")  # its fields alone are more than one write
    here: list[Extension] = []
    there = list(extensions)
    end = header.header_bytes
    while there and end + len(encode_extension(there[0])) + 8 <= SECTOR:
        end += len(encode_extension(there[0]))
        here.append(there.pop(0))
    rest = b"".join(map(encode_extension, there)) + _END if there else b""
    tail_at = _free_place(header, durable_tail, len(rest) + len(name))
    if there:
        here.append(Extension(EXT_FILLER, bytes(tail_at - end - 8)))
        listed = b"".join(map(encode_extension, here))
        return _layout(header, [*here, *there], listed + rest + name, tail_at + len(rest), name, tail_at)
    listed = b"".join(map(encode_extension, here)) + _END
    gap = bytes(tail_at - header.header_bytes - len(listed))
    return _layout(header, here, listed + gap + name, tail_at, name, tail_at)


def _free_place(header: Header, durable_tail: Span, needed: int) -> int:
    if SECTOR + needed <= durable_tail.at:
        return SECTOR
    at = -(-durable_tail.end // SECTOR) * SECTOR
    if at + needed > header.cluster_size:
        raise UsageError("The image's header has no room for this")
    return at


def _layout(
    header: Header, extensions: list[Extension], rest: bytes, backing_at: int, name: bytes, tail_at: int
) -> Layout:
    placed = replace(
        header,
        extensions=tuple(extensions),
        backing_at=0 if header.backing_file is None else backing_at,
        backing_bytes=len(name),
    )
    whole = placed.encode_fields() + rest
    assert len(whole) <= header.cluster_size
    return Layout(placed, whole[:SECTOR].ljust(SECTOR, b"\0"), tail_at, whole[tail_at:])


def tail_of(header: Header) -> Span:
    """The part of cluster 0 past the first sector that `header`, as decoded or laid out, needs."""
    used = []
    at = header.header_bytes
    for extension in header.extensions:
        length = len(encode_extension(extension))
        if extension.type != EXT_FILLER:
            used.append(Span(at, length))
        at += length
    used.append(Span(at, len(_END)))
    used.append(Span(header.backing_at, header.backing_bytes))
    past = [span for span in used if span.end > SECTOR]
    if not past:
        return Span(SECTOR, 0)
    return Span.between(max(SECTOR, min(span.at for span in past)), max(span.end for span in past))


class HeaderFile:
    """The header of an open image and its only writer.

    `header` is what the file durably says; it changes only after the write that made it so.
    """

    def __init__(self, children: dict[str, Child], header: Header) -> None:
        self._children = children
        self.header = header

    @property
    def file(self) -> Child:
        """The node that has the image; graph edits may replace it."""
        return self._children["file"]

    async def switch(self, header: Header, part: Field) -> None:
        """Make the fields of `part` durable as `header` has them: flush ▷ write ▷ flush.

        Args:
            header: the current header with those fields changed.
            part: which bytes of H0 to write.

        Raises:
            IoFailure: `self.header` is as before; the file may say either.

        Checkpoint: no. Waits: two flushes and a write of at most 512 bytes.
        """
        from blockjobs.block.root_write import write_root

        await write_root(self.file, part.at, header.encode_field(part))
        self.header = header

    async def set_features(self, *, set_bits: int = 0, clear_bits: int = 0) -> None:
        """Set and clear incompatible feature bits (dirty, corrupt); no write if they are so already.

        Raises:
            IoFailure: see `switch`.

        Checkpoint: no. Waits: as `switch`.
        """
        wanted = (self.header.incompatible | set_bits) & ~int(clear_bits)  # ~ of a flag forgets unknown bits
        if wanted != self.header.incompatible:
            await self.switch(replace(self.header, incompatible=wanted), FIELD_FEATURES)

    async def begin_writing(self, keep: int) -> None:
        """Clear the autoclear bits that the writer does not maintain, before the first write.

        Args:
            keep: bits the caller keeps truthful.

        Raises:
            IoFailure: see `switch`; nothing else may be written then.

        Checkpoint: no. Waits: as `switch`.
        """
        kept = self.header.autoclear & keep
        if kept != self.header.autoclear:
            await self.switch(replace(self.header, autoclear=kept), FIELD_FEATURES)

    async def rewrite(self, header: Header) -> None:
        """Make all of `header` durable, extensions and backing string too: tail ▷ first sector ▷.

        Raises:
            UsageError: it does not fit; nothing was written.
            IoFailure: `self.header` is as before; the file may say either.

        Checkpoint: no. Waits: three flushes and two writes within cluster 0.
        """
        from blockjobs.block.root_write import write_root

        layout = lay_out(header, tail_of(self.header))
        await write_root(self.file, 0, layout.sector, first=layout.before)
        self.header = layout.header

    async def change_backing(self, filename: str | None, backing_format: str | None) -> None:
        """Let the header name another backing file, or none; the format is dropped with the name.

        Raises:
            UsageError: too long; nothing was written.
            IoFailure: see `rewrite`.

        Checkpoint: no. Waits: as `rewrite`.
        """
        await self.rewrite(with_backing(self.header, filename, backing_format))


def with_backing(header: Header, filename: str | None, backing_format: str | None) -> Header:
    """The header that names that backing file, or none; the format is dropped with the name."""
    text = None if filename is None or backing_format is None else backing_format.encode("utf-8", "surrogateescape")
    return replace(header.with_extension(EXT_BACKING_FORMAT, text), backing_file=filename)


async def write_new_header(
    file: Child, header: Header, *, length: int | None = None, first: Sequence[tuple[int, Buffer]] = ()
) -> Header:
    """Give a new image its header: everything past the first sector, ▷, then the sector with the magic, ▷.

    The caller has made cluster 0 read as zeroes, and has written what the header refers to.

    Args:
        file: without a header.
        header: what it shall say.
        length, first: what is still to be done of that, see `write_root`.

    Raises:
        UsageError: it does not fit into a cluster; nothing was written.
        IoFailure: the image is not valid yet.

    Checkpoint: no. Waits: two flushes and two writes.
    """
    from blockjobs.block.root_write import write_root

    layout = lay_out(header, Span(SECTOR, 0))
    await write_root(file, 0, layout.sector, length=length, first=[*first, *layout.before])
    return layout.header
