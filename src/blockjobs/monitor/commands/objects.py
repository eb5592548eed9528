"""`object-add` and `object-del`: throttle groups, secrets."""

from typing import TYPE_CHECKING

from blockjobs.block.objects import AnyObjectOptions, add_object, delete_object
from blockjobs.schema.command import qmp

if TYPE_CHECKING:
    from blockjobs.host import Host


@qmp.command(since="2.0")
async def object_add(host: "Host", options: AnyObjectOptions) -> None:
    """Create an object for block nodes to refer to.

    Args:
        options: its type and identifier, and what the type asks for.
    """
    add_object(host.objects, options, host.clock)


@qmp.command(since="2.0")
async def object_del(host: "Host", *, id: str) -> None:
    """Delete an object that nothing uses.

    Args:
        id: the object's identifier.
    """
    delete_object(host.objects, id)
