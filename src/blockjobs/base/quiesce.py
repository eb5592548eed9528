"""How a drain reaches whoever uses a node without the block layer knowing what that is (design §1.1 rule b)."""

from typing import Protocol


class Quiescable(Protocol):
    """A user of nodes that can be asked to stop issuing requests: a job, an export.

    `quiesce_begin` and `quiesce_end` nest; between them the user issues nothing new once `is_quiet()` holds.
    """

    def quiesce_begin(self) -> None:
        """Stop at the next opportunity; may already be quiet when this returns."""
        ...

    def is_quiet(self) -> bool:
        """Whether nothing is in flight and nothing will be issued until `quiesce_end`."""
        ...

    async def quiet(self) -> None:
        """Wait until `is_quiet()`. Waits: for the user's requests in flight."""
        ...

    def quiesce_end(self) -> None:
        """Go on, once every begin has its end."""
        ...
