"""The qcow2 image format; importing this package registers the driver."""

from blockjobs.block.drivers.qcow2.driver import Qcow2

__all__ = ["Qcow2"]
