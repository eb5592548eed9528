"""All drivers, and the types of objects that they refer to; importing this package registers them."""

from blockjobs.block import authz, iothread, tls_creds
from blockjobs.block.drivers import (
    blkdebug,
    blklogwrites,
    commit_top,
    compress,
    copy_before_write,
    copy_on_read,
    file,
    mirror_top,
    nbd,
    null,
    preallocate,
    qcow2,
    quorum,
    raw,
    snapshot_access,
    throttle,
)

__all__ = [
    "authz",
    "blkdebug",
    "blklogwrites",
    "commit_top",
    "compress",
    "copy_before_write",
    "copy_on_read",
    "file",
    "iothread",
    "mirror_top",
    "nbd",
    "null",
    "preallocate",
    "qcow2",
    "quorum",
    "raw",
    "snapshot_access",
    "throttle",
    "tls_creds",
]
