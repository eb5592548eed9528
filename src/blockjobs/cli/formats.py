"""Which format a file has when a person did not say.

A guest can write anything to its disk, also a qcow2 header; so a file's content alone never makes it qcow2
(spec/durability.md §3, format probing). Name and content must agree, or the person must say.
"""

import os
import re
import stat
from typing import Final

from blockjobs.base.errors import UsageError
from blockjobs.block.nbd_uri import is_export

QCOW2_MAGIC: Final = b"QFI\xfb"
SUFFIXES: Final = {
    ".qcow2": "qcow2",
    ".qcow": "qcow2",
    ".luks": "luks",
    ".raw": "raw",
    ".img": "raw",
    ".iso": "raw",
    ".bin": "raw",
}
FORMATS: Final = ("qcow2", "raw", "luks")
_PROTOCOL: Final = re.compile(r"([^/:]*):")


def local_name(name: str) -> str:
    """The path that a name means, as qemu-img reads names: `file:` may be in front. Exports are left as they are.

    Raises:
        UsageError: it names a protocol that there is not.
    """
    if is_export(name):
        return name
    protocol = _PROTOCOL.match(name)
    if protocol is None:
        return name
    if protocol[1] not in ("file", "host_device"):
        how = f"a file of that name is ./{name}"
        if protocol[1] == "json":
            how = "only an image that is there already can be described, and not in another image's header"
        elif "://" in name:
            how = "let an NBD server show it"
        raise UsageError(f"Could not open '{name}': Unknown protocol '{protocol[1]}' ({how})")
    return name[protocol.end() :]


def format_for_new(path: str, chosen: str | None) -> str:
    """The format of an image to be made: as chosen, else by its suffix, else qcow2; raw for exports.

    Raises:
        UsageError: the chosen format is unknown, or the name means no file or export.
    """
    path = local_name(path)
    if chosen is not None:
        return _known(chosen)
    if is_export(path):
        return "raw"
    return SUFFIXES.get(os.path.splitext(path)[1].lower(), "qcow2")


def format_of(path: str, chosen: str | None) -> str:
    """The format of an existing image: as chosen, else what suffix and content agree on; exports show raw disks.

    Raises:
        UsageError: unknown format, no such file, or suffix and content contradict each other.
    """
    path = local_name(path)
    if chosen is not None:
        return _known(chosen)
    if is_export(path):
        return "raw"
    magic = _first_bytes(path)
    suffix = os.path.splitext(path)[1].lower()
    by_name = SUFFIXES.get(suffix)
    if by_name == "luks":
        return "luks"
    has_magic = magic == QCOW2_MAGIC
    if has_magic and by_name != "raw":
        return "qcow2"
    if not has_magic and by_name != "qcow2":
        return "raw"
    if has_magic:
        raise UsageError(f"'{path}' is named like a raw image but starts like qcow2: say which with -f raw or -f qcow2")
    raise UsageError(f"'{path}' is named like a qcow2 image but is none: if it is raw, say so with -f raw")


def _known(name: str) -> str:
    if name not in FORMATS:
        raise UsageError(f"Unknown format '{name}': use {', '.join(FORMATS[:-1])} or {FORMATS[-1]}")
    return name


def _first_bytes(path: str) -> bytes:
    try:
        # A fifo without a writer would block the open for ever.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise UsageError(f"Could not open '{path}': {os.strerror(error.errno or 0)}") from error
    try:
        mode = os.fstat(descriptor).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
            raise UsageError(f"'{path}' is neither a file nor a block device")
        return os.pread(descriptor, len(QCOW2_MAGIC), 0)
    finally:
        os.close(descriptor)
