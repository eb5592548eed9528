"""What a node was told, once defaults and inheritance are applied."""

from dataclasses import dataclass

from blockjobs.block.options import DetectZeroes


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What a node was told, after inheritance and defaults.

    Attributes:
        unmap: discards reach the driver, and zeroing may deallocate.
        detect_zeroes: whether writes of zeroes become zero requests.
        direct: bypass the host's page cache.
        no_flush: flushes are dropped: the user said that the image may be lost.
        force_share: no file locks.
    """

    read_only: bool = False
    auto_read_only: bool = False
    unmap: bool = False
    detect_zeroes: DetectZeroes = DetectZeroes.OFF
    direct: bool = False
    no_flush: bool = False
    force_share: bool = False
