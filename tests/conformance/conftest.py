"""Fixtures of the conformance tests."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from replays import Replays

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="module")
def replays(request: pytest.FixtureRequest) -> Iterator[Replays]:
    """The outcomes of the scenarios that the selected tests of a module name, against the module's PROGRAM."""
    names = [
        item.callspec.params["name"]
        for item in request.session.items
        if isinstance(item, pytest.Function) and item.module is request.module and hasattr(item, "callspec")
    ]
    replays = Replays(request.module.PROGRAM, names)
    yield replays
    replays.close()
