"""Formats that can show a part of what they have reserved, so that a copy may stop between two of its steps."""

from abc import ABC, abstractmethod

from blockjobs.block.vocabulary import Reservation


class Divisible(ABC):
    """A `FormatDriver` that can give back the end of a reservation."""

    @abstractmethod
    def is_divisible(self, reservation: Reservation) -> bool:
        """Whether `shorten` can be called for this one."""

    @abstractmethod
    async def shorten(self, reservation: Reservation, length: int) -> None:
        """Give back all but the first bytes; `publish` and `release` then concern these alone. Never raises.

        Args:
            length: of bytes, in the order of the placements: whole allocation units, less than it holds but not none.
                The placements themselves may stay as they are.
        """
