"""What a node was told, once defaults and inheritance are applied."""

from msgspec import Struct
from msgspec.structs import replace

from blockjobs.base.errors import UsageError
from blockjobs.block.options import DetectZeroes, DiscardMode, NodeOptions


class Settings(Struct, frozen=True, kw_only=True):
    """What a node was told, after inheritance and defaults.

    Attributes:
        unmap: discards reach the driver, and zeroing may deallocate.
        detect_zeroes: whether writes of zeroes become zero requests.
        direct: bypass the host's page cache.
        no_flush: flushes are dropped: the user said that the image may be lost.
        force_share: no file locks.
        looks_only: see `OpenContext`.
        is_active: if not, another program may be using the image: nobody writes until it is activated.
    """

    read_only: bool = False
    auto_read_only: bool = False
    unmap: bool = False
    detect_zeroes: DetectZeroes = DetectZeroes.OFF
    direct: bool = False
    no_flush: bool = False
    force_share: bool = False
    looks_only: bool = False
    is_active: bool = True


def settings_of(options: NodeOptions, inherited: Settings) -> Settings:
    """What the node was told; None means: as inherited.

    Raises:
        UsageError: options that contradict each other.
    """
    cache = options.cache
    is_active = options.active is not False
    settings = Settings(
        read_only=not is_active or (inherited.read_only if options.read_only is None else options.read_only),
        auto_read_only=inherited.auto_read_only if options.auto_read_only is None else options.auto_read_only,
        unmap=inherited.unmap if options.discard is None else options.discard is DiscardMode.UNMAP,
        detect_zeroes=options.detect_zeroes or DetectZeroes.OFF,
        direct=inherited.direct if cache is None else cache.direct,
        no_flush=inherited.no_flush if cache is None else cache.no_flush,
        force_share=inherited.force_share if options.force_share is None else options.force_share,
        looks_only=inherited.looks_only,
        is_active=is_active,
    )
    if settings.detect_zeroes is DetectZeroes.UNMAP and not settings.unmap:
        raise UsageError("setting detect-zeroes to unmap is not allowed without setting discard operation to unmap")
    if settings.force_share and not settings.read_only:
        raise UsageError("force-share=on can only be used with read-only images")
    return settings


def settings_for_child(parent: Settings, edge: str) -> Settings:
    """What an inline child inherits: nobody writes to a backing image, and formats decide about discards themselves."""
    return replace(parent, read_only=parent.read_only or edge == "backing", unmap=True)
