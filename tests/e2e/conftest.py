"""The end-to-end tests run against our daemon, and against QEMU's to show that they ask for nothing special."""

from __future__ import annotations

import pytest
from player import PROGRAMS


@pytest.fixture(params=PROGRAMS, ids=lambda program: program.name, scope="session")
def program(request):
    return request.param
