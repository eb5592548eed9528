"""What all tests share: which outside programs there are, and how a skip is shown."""

import os
import shutil

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile("ci", deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True)
settings.register_profile("night", deadline=None, max_examples=5_000, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile(os.environ.get("BLOCKJOBS_HYPOTHESIS", "ci"))

# Many tests start our programs: compiling the package anew each time would cost more than all they do.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

ORACLES = ("qemu-img", "qemu-io", "qemu-storage-daemon")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    del config
    missing = [program for program in ORACLES if shutil.which(program) is None]
    if not missing:
        return
    skip = pytest.mark.skip(reason=f"not installed: {', '.join(missing)}")
    for item in items:
        if item.get_closest_marker("qemu"):
            item.add_marker(skip)


def pytest_terminal_summary(terminalreporter) -> None:
    for report in terminalreporter.stats.get("skipped", []):
        terminalreporter.write_line(f"SKIPPED BY NAME {report.nodeid}")
