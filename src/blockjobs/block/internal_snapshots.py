"""What a driver promises that can keep snapshots inside its image (spec/jobs.md §7, spec/durability.md §1)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from blockjobs.base.buffers import Buffer


@dataclass(frozen=True, slots=True, kw_only=True)
class InternalSnapshot:
    """One snapshot.

    Attributes:
        id: a decimal number as text, unique in the image and never used again while larger ones exist.
        name: any text, also empty or the same as another's.
        vm_state_bytes: how much machine state belongs to it; 0 for a snapshot of the disk alone.
        date_ns: wall-clock time at which it was made, in ns since 1970.
        vm_clock_ns: the machine's own clock then.
        icount: the machine's instruction count then, if it had one.
        disk_bytes: the length of the disk then.
        group: the name of the group, if it is one of several snapshots that exist together or not at all.
        is_settled: whether it exists for sure: not so between `create` with a group and `settle`. A crash in the middle
            of a snapshot-save leaves such ones, which nobody is shown.
    """

    id: str
    name: str
    vm_state_bytes: int
    date_ns: int
    vm_clock_ns: int = 0
    icount: int | None = None
    disk_bytes: int
    group: bytes | None = None
    is_settled: bool = True


class InternalSnapshots(Protocol):
    """The snapshots of one open image. The caller has drained the node, and nobody writes during any of the calls."""

    @property
    def entries(self) -> Sequence[InternalSnapshot]:
        """Those in the image, in its order."""
        ...

    async def create(
        self,
        name: str,
        *,
        date_ns: int,
        vm_state_bytes: int = 0,
        vm_clock_ns: int = 0,
        icount: int | None = None,
        group: bytes | None = None,
    ) -> InternalSnapshot:
        """Keep the disk as it is now, and the first `vm_state_bytes` of the vm state area with it, which is empty
        afterwards. Durable on return.

        Raises:
            UsageError, IoFailure: the image has no such snapshot.
        """
        ...

    async def settle(self, id: str) -> None:
        """Its group is complete: the snapshot is one like any other from now on. Durable on return.

        Raises:
            IoFailure: it is settled or not.
        """
        ...

    async def apply(self, id: str) -> None:
        """Make the disk what it was; the length may change with it. Durable on return. The snapshot stays.

        Raises:
            UsageError, IoFailure: the disk is as before.
        """
        ...

    async def delete(self, id: str) -> None:
        """Forget a snapshot and give its space back. Durable on return.

        Raises:
            IoFailure: the snapshot is there as before, or gone.
        """
        ...

    async def write_vm_state(self, at: int, content: Buffer) -> None:
        """Put bytes into the vm state area of the image as it is now, for the `create` that follows.

        Raises:
            IoFailure: what the area holds is unspecified.
        """
        ...

    async def read_vm_state(self, id: str, at: int, length: int) -> bytes:
        """Machine state that belongs to a snapshot, without applying it.

        Raises:
            IoFailure, ImageCorrupt: it could not be read.
        """
        ...

    async def drop_vm_state(self) -> None:
        """Empty the vm state area after a `create` that was not to be. Never raises."""
        ...
