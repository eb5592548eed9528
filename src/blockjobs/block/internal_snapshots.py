"""What a driver promises that can keep snapshots inside its image (spec/jobs.md §7, spec/durability.md §1)."""

from collections.abc import Sequence
from enum import StrEnum
from typing import Final, Protocol, Self

from msgspec import Struct
from msgspec.structs import replace

from blockjobs.base.buffers import Buffer


class Stage(StrEnum):
    """How far a change of several images has come, as one of its snapshots says (docs/adr/0015)."""

    SAVING = "saving"
    """Made, and part of nothing yet."""
    SAVED = "saved"
    """A snapshot like any other."""
    UNDO = "undo"
    """The disk as it was before a load that is under way."""
    LOADED = "loaded"
    """The same, once it is not needed any more."""
    DOOMED = "doomed"
    """About to be deleted."""
    DELETED = "deleted"
    """As good as deleted."""

    @property
    def decision(self) -> "Stage | None":
        """What the first image says of a change that is to be, if this one only says that it was prepared."""
        return _DECISIONS.get(self)


_DECISIONS: Final = {Stage.SAVING: Stage.SAVED, Stage.UNDO: Stage.LOADED, Stage.DOOMED: Stage.DELETED}
_HIDDEN: Final = frozenset({Stage.SAVING, Stage.UNDO, Stage.LOADED, Stage.DELETED})


class GroupMark(Struct, frozen=True, kw_only=True):
    """That a snapshot takes part in a change of several images that happens everywhere or nowhere.

    Attributes:
        stage: what the change is, and how far it has come in this image.
        group: a name that no other change has; printable, without blanks.
        is_first: whether this is the image that decides.
        peers: absolute file names: of the first image, or in that of all others. Nothing if they were too long.
    """

    stage: Stage
    group: str
    is_first: bool
    peers: tuple[str, ...]

    def at(self, stage: Stage) -> Self:
        """The same change, further on."""
        return replace(self, stage=stage)

    def encode(self, length_max: int) -> bytes:
        """As an image keeps it."""
        head = f"{self.stage} {self.group} {'first' if self.is_first else 'other'} ".encode()
        mark = head + "\0".join(self.peers).encode("utf-8", "surrogateescape")
        return mark if len(mark) <= length_max else head

    @classmethod
    def decode(cls, raw: bytes) -> "Self | None":
        """The inverse of `encode`; None if it is something else."""
        stage, _, rest = raw.decode("utf-8", "surrogateescape").partition(" ")
        group, _, rest = rest.partition(" ")
        place, _, peers = rest.partition(" ")
        if stage not in set(Stage) or place not in ("first", "other"):
            return None
        named = tuple(peers.split("\0")) if peers else ()
        return cls(stage=Stage(stage), group=group, is_first=place == "first", peers=named)


class InternalSnapshot(Struct, frozen=True, kw_only=True):
    """One snapshot.

    Attributes:
        id: a decimal number as text, unique in the image and never used again while larger ones exist.
        name: any text, also empty or the same as another's.
        vm_state_bytes: how much machine state belongs to it; 0 for a snapshot of the disk alone.
        date_ns: wall-clock time at which it was made, in ns since 1970.
        vm_clock_ns: the machine's own clock then.
        icount: the machine's instruction count then, if it had one.
        disk_bytes: the length of the disk then.
        mark: the change of several images that it takes part in.
    """

    id: str
    name: str
    vm_state_bytes: int
    date_ns: int
    vm_clock_ns: int = 0
    icount: int | None = None
    disk_bytes: int
    mark: GroupMark | None = None

    @property
    def is_shown(self) -> bool:
        """Whether it exists for the user: not so if it is only there for a change of several images."""
        return self.mark is None or self.mark.stage not in _HIDDEN


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
        mark: GroupMark | None = None,
    ) -> InternalSnapshot:
        """Keep the disk as it is now, and the first `vm_state_bytes` of the vm state area with it, which is empty
        afterwards. Durable on return.

        Raises:
            UsageError, IoFailure: the image has no such snapshot.
        """
        ...

    async def mark(self, id: str, mark: GroupMark | None) -> None:
        """Note how far a change of several images has come. Durable on return.

        Raises:
            UsageError, IoFailure: the old mark holds, or the image can say neither: then it takes no more changes.
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

    async def view(self, id: str) -> None:
        """Show the disk of a read-only image as it was; the file stays as it is.

        Raises:
            UsageError, IoFailure, ImageCorrupt: the disk is shown as before.
        """
        ...

    def refuse_changes(self) -> None:
        """Whatever the disk is now is wrong, and could not be put right: let nobody write until it is opened anew."""
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
