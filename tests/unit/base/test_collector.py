"""Programs relax the collector; importing the library does not."""

import subprocess
import sys


def thresholds(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", f"{code}\nimport gc; print(gc.get_threshold(), gc.get_freeze_count() > 0)"],
        capture_output=True, text=True, check=True,
    ).stdout.strip()  # fmt: skip


def test_only_programs_change_it() -> None:
    default = thresholds("")
    assert thresholds("import blockjobs.host") == default
    relaxed = thresholds("from blockjobs.base.collector import relax_collector; relax_collector()")
    assert relaxed == "(50000, 20, 20) True"
