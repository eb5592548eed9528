"""The recordings hold against the installed QEMU: this proves the runner, and that the recordings are not luck."""

from __future__ import annotations

import os
import subprocess

import player
import pytest
import scenario

pytestmark = [pytest.mark.qemu, pytest.mark.xdist_group("transcripts of QEMU")]

PROGRAM = player.QEMU
RECORDED_VERSION = "7.2.22"

SAMPLE = [
    "backup_fail_run",
    "backup_manual_both",
    "backup_source_stop",
    "backup_success",
    "backup_sync_none",
    "bitmap_sync_modes",
    "cancel_paused_job_cancel",
    "commit_active",
    "concluded_holds_nodes",
    "conflict_permissions",
    "create_probe",
    "create_success",
    "drain_pauses_jobs",
    "export_nbd",
    "filters",
    "graph_backup",
    "id_rules",
    "locks",
    "mirror_standby",
    "nodes",
    "qcow2_info",
    "quit_with_jobs",
    "set_speed",
    "stream_fail_prepare",
    "txn_grouped_cancel_paused",
    "txn_grouped_failure",
    "txn_grouped_mixed_finalize",
    "validate_backup",
]
"""One or two of each kind; `make conformance` plays every scenario."""


def _names() -> list[str]:
    if not os.environ.get("BLOCKJOBS_ALL_LIVE"):
        return SAMPLE
    return [name for name in scenario.names() if scenario.load(name).program == "qemu-storage-daemon"]


@pytest.fixture(scope="module", autouse=True)
def _recorded_version() -> None:
    version = subprocess.run(["qemu-storage-daemon", "--version"], capture_output=True, text=True, check=True).stdout
    if RECORDED_VERSION not in version:
        pytest.skip(f"the recordings are of QEMU {RECORDED_VERSION}, here is {version.splitlines()[0]}")


@pytest.mark.parametrize("name", _names())
def test_the_recording_holds_against_qemu(name, replays):
    assert replays.outcome(name).differences() == []
