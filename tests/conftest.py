"""What all tests share: which outside programs there are, and how a skip is shown."""

import os
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile("ci", deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True)
settings.register_profile("night", deadline=None, max_examples=5_000, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile(os.environ.get("BLOCKJOBS_HYPOTHESIS", "ci"))

# Many tests start our programs: compiling the package anew each time would cost more than all they do.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

PATIENT = """#!/bin/sh
# To choose a number of iterations QEMU measures how fast keys are derived, and now and then gives up on a fast machine.
case "$*" in
*iter-time*) ;;
*) exec {real} "$@" ;;
esac
for attempt in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27 28 29 30; do
    {real} "$@" 2>"$0.$$"
    code=$?
    [ $code -ne 0 ] && grep -q "Unable to get accurate CPU usage" "$0.$$" || break
done
cat "$0.$$" >&2
rm -f "$0.$$"
exit $code
"""
_programs = tempfile.TemporaryDirectory(prefix="blockjobs-tests-")
if real := shutil.which("qemu-img"):
    patient = Path(_programs.name) / "qemu-img"
    patient.write_text(PATIENT.format(real=real))
    patient.chmod(0o755)
    os.environ["PATH"] = f"{_programs.name}:{os.environ['PATH']}"

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
