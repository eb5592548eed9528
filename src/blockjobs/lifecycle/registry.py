"""The job types of a program: QAPI's nine, and any number of others whose names start with `x-`."""

from collections.abc import Callable
from enum import StrEnum
from typing import Final, TypeVar

from blockjobs.base.errors import UsageError
from blockjobs.base.ids import is_well_formed
from blockjobs.lifecycle.job import Job


class JobType(StrEnum):
    """QAPI's `JobType`, in its order."""

    COMMIT = "commit"
    STREAM = "stream"
    MIRROR = "mirror"
    BACKUP = "backup"
    CREATE = "create"
    AMEND = "amend"
    SNAPSHOT_LOAD = "snapshot-load"
    SNAPSHOT_SAVE = "snapshot-save"
    SNAPSHOT_DELETE = "snapshot-delete"


QAPI_TYPES: Final = tuple(each.value for each in JobType)

_CLASSES: Final[dict[str, type[Job]]] = {}

J = TypeVar("J", bound=type[Job])


def job_type(name: str) -> Callable[[J], J]:
    """Class decorator: `Engine.create(name, ...)` is served by this class, and the schema lists `name`.

    Raises:
        UsageError: the name is neither QAPI's nor starts with `x-`.
        AssertionError: two classes claim one name.
    """
    check_type(name)

    def register(job_class: J) -> J:
        assert name not in _CLASSES, name
        _CLASSES[name] = job_class
        return job_class

    return register


def check_type(name: str) -> None:
    """Refuse a type name that QEMU may give a meaning of its own one day.

    Raises:
        UsageError: the name is neither QAPI's nor a well-formed one that starts with `x-`.
    """
    if name not in QAPI_TYPES and not (name.startswith("x-") and is_well_formed(name)):
        raise UsageError(f"Invalid job type '{name}': types that QAPI does not name start with 'x-'")


def type_names() -> tuple[str, ...]:
    """QAPI's types, then the registered others in order of registration."""
    return (*QAPI_TYPES, *(name for name in _CLASSES if name not in QAPI_TYPES))


def class_of(name: str) -> type[Job] | None:
    """The class registered for a type, if any."""
    return _CLASSES.get(name)
