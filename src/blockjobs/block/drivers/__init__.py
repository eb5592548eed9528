"""All drivers; importing this package registers them."""

from blockjobs.block.drivers import blkdebug, copy_before_write, file, null, qcow2, raw, throttle

__all__ = ["blkdebug", "copy_before_write", "file", "null", "qcow2", "raw", "throttle"]
