"""Objects such as throttle groups and secrets: `object-add`, `object-del`, and their properties (`qom-*`)."""

from typing import TYPE_CHECKING, Any

from blockjobs.block.iothread import IothreadOrNull, check_iothread
from blockjobs.block.object_properties import get_property, list_properties, set_property
from blockjobs.block.objects import AnyObjectOptions, add_object, delete_object
from blockjobs.schema.command import qmp
from blockjobs.schema.types import Record

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


class ObjectPropertyInfo(Record, frozen=True, kw_only=True):
    """A property of an object.

    Attributes:
        type: `string`, `int`, `bool`, the name of a structure, or `child<...>` for an object below.
    """

    name: str
    type: str
    description: str | None = None
    default_value: Any = None


@qmp.command(since="1.2")
async def qom_list(host: "Host", *, path: str) -> list[ObjectPropertyInfo]:
    """List the properties of an object.

    Args:
        path: where it is: `/objects/<id>`, or its identifier alone.
    """
    return [ObjectPropertyInfo(name=name, type=kind) for name, kind in list_properties(host.objects, path)]


@qmp.command(since="1.2")
async def qom_get(host: "Host", *, path: str, property: str) -> Any:
    """Read a property of an object.

    Args:
        path: where it is: `/objects/<id>`, or its identifier alone.
        property: the property's name.
    """
    return get_property(host.objects, path, property)


@qmp.command(since="1.2")
async def qom_set(host: "Host", *, path: str, property: str, value: Any) -> None:
    """Change a property of a living object, such as the `limits` of a throttle group.

    Args:
        path: where it is: `/objects/<id>`, or its identifier alone.
        property: the property's name.
        value: what it becomes.
    """
    set_property(host.objects, path, property, value)


@qmp.command(since="2.12", features=["unstable"])
async def x_blockdev_set_iothread(
    host: "Host", *, node_name: str, iothread: IothreadOrNull, force: bool = False
) -> None:
    """Say which thread serves a node; without effect, as requests have threads of their own here.

    Args:
        node_name: the node.
        iothread: an `iothread` object; null for none.
        force: also if an export or a job uses the node.
    """
    check_iothread(host.graph, node_name, iothread, force=force)
