"""`check`: does the image's metadata agree with itself? Reads everything but data, changes nothing.

What counts as a leak, a corruption or a check error, and the words, are `qemu-img check`'s (observed).
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

from blockjobs.base.offload import Offload
from blockjobs.block.driver import Child
from blockjobs.block.drivers.qcow2.header import read_header

if TYPE_CHECKING:
    from blockjobs.block.drivers.qcow2.check_tally import Tally
    from blockjobs.block.drivers.qcow2.check_walk import MetadataWalk

Advance: TypeAlias = Callable[[int], Awaitable[None]]


async def no_advance(done: int) -> None:
    """Nobody wants to know how far the work is. Checkpoint: no. Waits: no."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckResult:
    """What a check has found.

    Attributes:
        corruptions: data is in danger; leaks: space is wasted, nothing else; check_errors: could not be checked.
        image_end: end of the last cluster in use, in bytes.
        problems: the first lines about them, in QEMU's words; all are counted.
        wrong_flags: how many of the corruptions are COPIED flags that refcounts contradict.
        walk: counts the references again, for a repair.
    """

    corruptions: int
    leaks: int
    check_errors: int
    total_clusters: int
    allocated_clusters: int
    compressed_clusters: int
    fragmented_clusters: int
    image_end: int
    problems: list[str] = field(repr=False)
    wrong_flags: int = field(repr=False)
    walk: "MetadataWalk" = field(repr=False)

    @property
    def tally(self) -> "Tally":
        """What the walk has counted."""
        return self.walk.tally

    @property
    def is_clean(self) -> bool:
        """Whether nothing at all was found."""
        return not (self.corruptions or self.leaks or self.check_errors)

    def members(self) -> dict[str, Any]:
        """As in the output of `qemu-img check --output=json`: what is 0 is left out, but for the errors."""
        always = {"image-end-offset": self.image_end, "check-errors": self.check_errors}
        sometimes = {
            "total-clusters": self.total_clusters,
            "corruptions": self.corruptions,
            "leaks": self.leaks,
            "allocated-clusters": self.allocated_clusters,
            "fragmented-clusters": self.fragmented_clusters,
            "compressed-clusters": self.compressed_clusters,
        }
        return always | {name: count for name, count in sometimes.items() if count}


async def check_image(file: Child, *, offload: Offload, advance: Advance = no_advance) -> CheckResult:
    """Walk over all metadata of the image in `file`.

    Args:
        file: the node that has the image; nobody may write to it meanwhile.
        offload: counting runs in its workers, one batch at a time.
        advance: told how many more L2 tables have been looked at; may wait, and raise.

    Raises:
        UsageError: the image cannot be opened at all, or its structure is too far from sense to be walked.
        IoFailure: the file could not be read.

    Checkpoint: no. Waits: reads of all metadata.
    """
    from blockjobs.block.drivers.qcow2.check_walk import MetadataWalk

    header = await read_header(file, read_only=True, for_check=True)
    walk = await MetadataWalk.begin(file, header, offload=offload, advance=advance)
    image_end = 0

    async def compare(tally: "Tally") -> None:
        nonlocal image_end
        image_end = await offload.run(tally.compare)

    await walk.each_window(compare)
    tally = walk.tally
    return CheckResult(
        corruptions=tally.corruptions,
        leaks=tally.leaks,
        check_errors=tally.check_errors,
        total_clusters=-(-header.size // header.cluster_size),
        allocated_clusters=tally.allocated,
        compressed_clusters=tally.compressed,
        fragmented_clusters=tally.fragmented,
        wrong_flags=tally.wrong_flags,
        image_end=image_end,
        problems=tally.problems[:],
        walk=walk,
    )
