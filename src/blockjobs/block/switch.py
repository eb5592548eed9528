"""One driver's part in a reopen (spec/block-layer.md §1): what was prepared takes effect, or is taken back."""


class Switch:
    """What `Driver.prepare_reopen` returns. This one has nothing to do.

    The graph calls, for all nodes of a reopen together: `apply` (children after parents), then derives rights and file
    locks anew, then `activate` (children before parents), and `close` at the very end. If anything fails: `deactivate`
    for those that were activated, `revert` for those that were applied, rights as before, `close`.
    """

    def apply(self) -> None:
        """Take effect. No request is under way, and nobody can see the change half done."""

    def revert(self) -> None:
        """Undo `apply`."""

    async def activate(self) -> None:
        """What opening would do now that rights are held: repair what may be written, load what may be used.

        Raises:
            UsageError, IoFailure: the whole reopen is undone.
        """

    async def deactivate(self) -> None:
        """Undo `activate`; must not fail."""

    async def close(self, *, applied: bool) -> None:
        """Free the old state if the new one stays (`applied`), else the new one; must not fail."""
        del applied


class NewValues(Switch):
    """A switch that gives attributes of the driver other values."""

    def __init__(self, driver: object, **values: object) -> None:
        self._driver, self._values = driver, values
        self._before = {name: getattr(driver, name) for name in values}

    def apply(self) -> None:
        """See `Switch`."""
        self._set(self._values)

    def revert(self) -> None:
        """See `Switch`."""
        self._set(self._before)

    def _set(self, values: dict[str, object]) -> None:
        for name, value in values.items():
            setattr(self._driver, name, value)
