"""All drivers; importing this package registers them."""

from blockjobs.block.drivers import blkdebug, copy_before_write, file, null, raw, throttle

__all__ = ["blkdebug", "copy_before_write", "file", "null", "raw", "throttle"]
