"""The `iothread` object: a name that exports and nodes may be given. Requests have threads of their own here anyway.

What may be set, and the texts, are those of QEMU's storage daemon (probed).
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Final

from blockjobs.base.clock import Clock
from blockjobs.base.errors import ParameterError, UsageError
from blockjobs.block.object_properties import LiveProperties
from blockjobs.block.objects import ObjectOptions, object_options
from blockjobs.block.users import Root
from blockjobs.schema.types import qapi

if TYPE_CHECKING:
    from blockjobs.block.graph import Graph

IothreadOrNull = Annotated[str | None, qapi("StrOrNull")]

_DEFAULTS: Final = {
    "aio-max-batch": 0,
    "thread-pool-min": 0,
    "thread-pool-max": 64,
    "poll-max-ns": 32768,
    "poll-grow": 0,
    "poll-shrink": 0,
}
_INT64_MAX: Final = 2**63 - 1
_THREADS_MAX: Final = 2**31 - 1


@object_options.add
class IoThreadOptions(ObjectOptions, frozen=True, kw_only=True, tag="iothread"):
    """A thread of QEMU's that requests may run in; accepted for compatibility."""

    aio_max_batch: int | None = None
    thread_pool_min: int | None = None
    thread_pool_max: int | None = None
    poll_max_ns: int | None = None
    poll_grow: int | None = None
    poll_shrink: int | None = None

    def build(self, clock: Clock, objects: Mapping[str, object]) -> "IoThread":
        """See `ObjectOptions.build`."""
        del clock, objects
        given = {name: getattr(self, name.replace("-", "_")) for name in _DEFAULTS}
        return IoThread({name: value for name, value in given.items() if value is not None})


class IoThread(LiveProperties):
    """Remembers what it was told."""

    def __init__(self, given: Mapping[str, int]) -> None:
        """See the class.

        Raises:
            UsageError: a value is out of range.
        """
        self._settings = _checked({**_DEFAULTS, **given})

    def current(self, name: str) -> object:
        """See `LiveProperties`."""
        return self._settings[name]

    def change(self, name: str, value: object) -> None:
        """See `LiveProperties`."""
        if not isinstance(value, int) or isinstance(value, bool):
            raise ParameterError.wrong_type(name, "integer")
        self._settings = _checked({**self._settings, name: value})


def _checked(settings: dict[str, int]) -> dict[str, int]:
    for name, value in settings.items():
        if not 0 <= value <= _INT64_MAX:
            raise UsageError(f"{name} value must be in range [0, {_INT64_MAX}]")
    if not settings["thread-pool-min"] <= settings["thread-pool-max"] <= _THREADS_MAX:
        raise UsageError("bad thread-pool-min/thread-pool-max values")
    return settings


def check_iothread(graph: "Graph", node: str, iothread: str | None, *, force: bool) -> None:
    """The checks of x-blockdev-set-iothread, in QEMU's order.

    Raises:
        UsageError: no such node or thread, or somebody uses the node.
    """
    found = next((each for each in graph.nodes() if each.name == node), None)
    if found is None:
        raise UsageError(f"Failed to find node with node-name='{node}'")
    if not force and any(isinstance(parent, Root) and parent.is_backend for parent in found.parents):
        raise UsageError(
            f"Node {node} is associated with a BlockBackend and could be in use (use force=true to override this check)"
        )
    if iothread is not None and not isinstance(graph.objects.get(iothread), IoThread):
        raise UsageError(f"Cannot find iothread {iothread}")
