"""The filter above the uppermost image of a running commit (spec/jobs.md §2).

What it shows stays right while the images below it change their meaning, so its users need no promise from them: it
takes no rights below. Only jobs make this filter; users cannot.
"""

from dataclasses import dataclass

from blockjobs.block.claims import Perm
from blockjobs.block.driver import Child, FilterDriver, OpenContext
from blockjobs.block.options import BlockRef, NodeOptions, hidden_driver
from blockjobs.block.vocabulary import NO_PERMS


class CommitTopOptions(NodeOptions, frozen=True, kw_only=True, tag="commit_top"):
    """The filtered node."""

    backing: BlockRef


@hidden_driver(CommitTopOptions)
@dataclass(eq=False)
class CommitTop(FilterDriver):
    """The filter."""

    filtered = "backing"

    children: dict[str, Child]

    @classmethod
    async def open(cls, options: CommitTopOptions, children: dict[str, Child], context: OpenContext) -> "CommitTop":
        """See `Driver`."""
        del options, context
        return cls(children)

    def child_perms(self, child: str, needs: Perm, shares: Perm) -> tuple[Perm, Perm]:
        """See `Driver`, and the module."""
        del child, needs, shares
        return NO_PERMS
