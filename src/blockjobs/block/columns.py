"""What a format may offer to a copy: thousands of runs in columns of integers (see `pieces.py`), and packed bytes."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Final

from blockjobs.base.span import Span
from blockjobs.block.medium import Medium
from blockjobs.block.vocabulary import Reservation, Segment, ZeroMode

ZERO_AT: Final = -1
"""In the place of a place in a child: there are no bytes, but zeroes that hide what is below."""


class Columnar(ABC):
    """A `FormatDriver` that does for thousands of runs at once what a copy asks of it."""

    @property
    @abstractmethod
    def columns_in(self) -> str:
        """The child that has the bytes."""

    @property
    @abstractmethod
    def keeps_places(self) -> bool:
        """Whether bytes have the same place there as on the node."""

    @abstractmethod
    async def pieces(self, span: Span, *, has_zeroes: bool = True) -> tuple[list[int], list[int], list[int]] | None:
        """`resolve`, if all of the run is DATA in that child, or needs no bytes of this layer.

        Args:
            has_zeroes: it may be that this layer says ZERO; else only that it leaves it to what is below.

        Returns:
            Of each DATA segment the place, the length and the place in the child; of each ZERO segment, if something
            may be below, ZERO_AT as the latter. None: ask `resolve`.

        Raises:
            IoFailure: tables could not be read.
        """

    @abstractmethod
    async def reserve_in_one(self, at: list[int], length: list[int]) -> Reservation | None:
        """`reserve_many`, if all of it goes to one run of that child, piece after piece, or is where it is on the node.

        Args:
            at: where each piece begins, ascending.
            length: its bytes.

        Returns:
            Its only placement is that run, or all that lies between the first and the last byte; None if it is not like
            that: nothing is reserved then.

        Raises:
            IoFailure, ImageCorrupt: as `reserve_many`; nothing is reserved.
        """

    @abstractmethod
    async def zero_many(self, spans: Sequence[Span], mode: ZeroMode) -> list[Span]:
        """`zero` for each of these runs, which ascend.

        Raises:
            IoFailure, ImageCorrupt: any part of them may be zeroed.
        """


class Unpacked(ABC):
    """A `FormatDriver` that can show what is packed in its file as plain bytes, for workers to read."""

    @abstractmethod
    def unpacked(self, segments: Sequence[Segment], file: Medium) -> Medium:
        """A medium for reading, on which the bytes of SPECIAL segments are where they are on the node.

        It is good as long as nobody writes to these bytes of the node.

        Args:
            segments: as `resolve` has returned them.
            file: plain bytes of the child `file`.
        """
