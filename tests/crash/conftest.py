"""All cores for the tests that look at hundreds of thousands of states."""

import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

import pytest

CORES = len(os.sched_getaffinity(0))


@pytest.fixture(scope="session")
def workers() -> Iterator[ProcessPoolExecutor]:
    with ProcessPoolExecutor(CORES, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield pool
