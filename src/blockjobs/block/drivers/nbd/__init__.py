"""The `nbd` driver: an export of an NBD server as a node."""

from blockjobs.block.drivers.nbd.driver import Nbd, NbdOptions

__all__ = ["Nbd", "NbdOptions"]
