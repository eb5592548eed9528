"""Events about nodes."""

from blockjobs.schema.command import Event, event


@event("BLOCK_IMAGE_CORRUPTED", since="1.7")
class BlockImageCorrupted(Event, frozen=True, kw_only=True):
    """An image breaks its format's rules. Said once for each node.

    Attributes:
        device: always empty: there are no devices here.
        node_name: the node.
        msg: what is wrong, and where.
        offset: bytes from the start of the file, where that says something.
        size: length of the wrong run.
        fatal: the image takes no further changes; otherwise it was opened read-only, or all that follows is lost space.
    """

    device: str
    node_name: str | None = None
    msg: str
    offset: int | None = None
    size: int | None = None
    fatal: bool
