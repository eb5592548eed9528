"""Page-aligned buffers, so that O_DIRECT works and the kernel copies whole pages."""

import ctypes
import mmap
from typing import Final

ALIGN: Final = mmap.PAGESIZE
_memcmp: Final = ctypes.CDLL(None).memcmp
_memcmp.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
_ZEROES: Final = bytes(2 * 1024 * 1024)

Buffer = bytes | bytearray | memoryview | mmap.mmap


def aligned(length: int) -> memoryview:
    """A writable, page-aligned, zeroed buffer of `length` bytes."""
    if length == 0:
        return memoryview(bytearray())
    return memoryview(mmap.mmap(-1, -(-length // ALIGN) * ALIGN))[:length]


def zeroes(length: int) -> bytes | memoryview:
    """`length` zero bytes, shared where possible: do not write to it."""
    return memoryview(_ZEROES)[:length] if length <= len(_ZEROES) else bytes(length)


def is_zero(content: bytes | bytearray | memoryview) -> bool:
    """Whether every byte is 0; by `startswith`, since comparing a memoryview is 40 times slower (design §1.6)."""
    length = len(content)
    return (_ZEROES if length <= len(_ZEROES) else bytes(length)).startswith(content)


def is_same(left: memoryview, right: memoryview) -> bool:
    """Whether two writable buffers of the same length hold the same bytes; other threads run meanwhile.

    Reading into page-aligned buffers is five times faster than into a bytearray, but only those compare fast in Python.
    """
    length = len(left)
    assert length == len(right)
    if not length:
        return True
    kind = ctypes.c_char * length
    return bool(_memcmp(kind.from_buffer(left), kind.from_buffer(right), length) == 0)
