"""Compression of single clusters, in the two forms that qcow2 knows; all functions are safe in any worker thread.

zlib: raw deflate. Readers must cope with a window of 4 KiB only, so that is what is written; any window is read.
zstd: one frame. Input and output are bounded on reading, whatever the stream claims (spec/durability.md §3).
"""

import sys
import zlib
from collections.abc import Callable
from typing import Final, cast

from isal import isal_zlib

from blockjobs.base.buffers import Buffer
from blockjobs.block.driver import Compressor
from blockjobs.wire.qcow2 import ZSTD

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

Inflate = Callable[[Buffer], bytes | None]
"""A stream in, possibly with bytes after its end; one cluster out, or None if it does not give exactly that."""

_BAD_DEFLATE: Final = cast("type[Exception]", isal_zlib.error)
"""Its stub says that this is an instance."""
_WINDOW_BITS: Final = -12
_ISAL_LEVELS: Final = {"fast": 1, "default": 2}
_ISAL_BEST: Final = 3
_ZLIB_BEST: Final = 6
"""Level 9 takes three times as long for less than one percent."""
_ZLIB_MEMORY: Final = 8
"""Level 9, which is QEMU's, takes 7 to 25 percent longer, and makes programs and documents 0.2 percent larger."""
_TRIAL_CLUSTERS: Final = 8
"""One cluster of so many is compressed in both ways."""
_WINS_MIN: Final = 2
"""So many trials in a row must speak for the fast way."""
_ZSTD_LEVELS: Final = {"fast": 1, "default": 2, "best": 12}
"""QEMU has level 3 only. Level 2 is 1.2 to 1.7 times as fast for 0.2 (/usr/lib) to 2.4 (/usr/share) percent more bytes;
level 1 costs up to 8 percent (bench/BASELINE.md)."""
_ZSTD_WINDOW_LOG_MAX: Final = 24
"""A frame may ask its reader for memory: no more than 16 MiB, which is 8 of the largest clusters."""


def compressor(compression_type: int, level: str) -> Compressor:
    """A function that compresses one cluster at `level`: fast, default or best.

    It returns None where the stream would not be shorter than the cluster: that is then stored as it is.
    """
    if compression_type == ZSTD:
        return _zstd_compressor(_ZSTD_LEVELS[level])
    if level == "best":
        return _BestDeflate()
    return _isal_compressor(_ISAL_LEVELS[level])


def _isal_compressor(level: int) -> Compressor:
    def compress(cluster: Buffer) -> bytes | None:
        stream = _isal(cluster, level)
        return stream if len(stream) < len(cluster) else None

    return compress


def _isal(cluster: Buffer, level: int) -> bytes:
    deflate = isal_zlib.compressobj(level, isal_zlib.DEFLATED, _WINDOW_BITS)
    stream: bytes = deflate.compress(cluster) + deflate.flush()
    return stream


def _zlib(cluster: Buffer) -> bytes:
    deflate = zlib.compressobj(_ZLIB_BEST, zlib.DEFLATED, _WINDOW_BITS, _ZLIB_MEMORY)
    return deflate.compress(cluster) + deflate.flush()


class _BestDeflate:
    """As small as zlib makes it, at isal's speed where isal makes it no larger, which depends on the data.

    That is found out by trials. Threads that meet here may count one trial less or more.
    """

    def __init__(self) -> None:
        self._clusters = self._wins = 0

    def __call__(self, cluster: Buffer) -> bytes | None:
        """See `compressor`."""
        self._clusters += 1
        if self._clusters % _TRIAL_CLUSTERS == 1:
            fast, small = _isal(cluster, _ISAL_BEST), _zlib(cluster)
            self._wins = self._wins + 1 if len(fast) <= len(small) else 0
            stream = min(fast, small, key=len)
        else:
            stream = _isal(cluster, _ISAL_BEST) if self._wins >= _WINS_MIN else _zlib(cluster)
        return stream if len(stream) < len(cluster) else None


def _zstd_compressor(level: int) -> Compressor:
    # A compressor holds large tables and serves one thread at a time: lend them out, make more when all are out.
    idle: list[zstd.ZstdCompressor] = []

    def compress(cluster: Buffer) -> bytes | None:
        try:
            lent = idle.pop()
        except IndexError:
            lent = zstd.ZstdCompressor(level=level)
        stream = lent.compress(cluster, lent.FLUSH_FRAME)
        idle.append(lent)
        return stream if len(stream) < len(cluster) else None

    return compress


def inflater(compression_type: int, cluster_size: int) -> Inflate:
    """A function that restores one cluster of an image."""
    if compression_type == ZSTD:
        return lambda stream: _unzstd(stream, cluster_size)
    return lambda stream: _undeflate(stream, cluster_size)


def _undeflate(stream: Buffer, cluster_size: int) -> bytes | None:
    try:
        content: bytes = isal_zlib.decompressobj(-15).decompress(stream, cluster_size)
    except _BAD_DEFLATE:
        return None
    return content if len(content) == cluster_size else None


def _unzstd(stream: Buffer, cluster_size: int) -> bytes | None:
    options = {int(zstd.DecompressionParameter.window_log_max): _ZSTD_WINDOW_LOG_MAX}
    try:
        content = zstd.ZstdDecompressor(options=options).decompress(stream, max_length=cluster_size)
    except zstd.ZstdError:
        return None
    return content if len(content) == cluster_size else None
