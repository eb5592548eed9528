"""`--trace`: what the daemon tells of its own work, in a file or on stderr, and what it keeps to itself."""

import re
import subprocess
import sys

import pytest

DAEMON = [sys.executable, "-m", "blockjobs.daemon", "--chardev", "stdio,id=s", "--monitor", "s"]
LINE = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3} (\w+)")
COMMANDS = """
{"execute":"qmp_capabilities"}
{"execute":"object-add","arguments":{"qom-type":"secret","id":"x","data":"hush-hush"}}
{"execute":"blockdev-add","arguments":{"driver":"null-co","node-name":"n","size":65536}}
{"execute":"blockdev-create","arguments":{"job-id":"j","options":{"driver":"file","filename":"f","size":512}},"id":7}
{"execute":"job-pause","arguments":{"id":"nobody"}}
{"execute":"blockdev-del","arguments":{"node-name":"n"}}
{"execute":"quit"}
"""


def traced(directory, *words):
    """Standard error of a daemon that carries out COMMANDS."""
    done = subprocess.run(
        [*DAEMON, *words], input=COMMANDS, cwd=directory, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


def names(text):
    return [match[1] for match in map(LINE.match, text.splitlines()) if match]


def test_nothing_is_told_unasked(tmp_path):
    assert traced(tmp_path) == ""


def test_patterns_choose_and_secrets_are_not_shown(tmp_path):
    text = traced(tmp_path, "--trace", "*", "-T", "-qmp_event")
    assert {"qmp_client", "qmp_command", "qmp_error", "node_open", "node_close", "job_status"} <= set(names(text))
    assert "qmp_event" not in names(text)
    assert len(names(text)) == len(text.splitlines())
    assert "hush-hush" not in text
    assert "node_open node=n driver=null-co" in text
    assert re.search(r"qmp_command command=blockdev-create arguments=\{.*\"job-id\": \"j\".*\} id=7", text)
    assert "job_status id=j type=create status=concluded" in text
    assert "qmp_error command=job-pause error=Job not found" in text


@pytest.mark.parametrize("events", ["# what we want\n\njob_*\n", "job_status # only that"])
def test_to_a_file_by_a_list_of_patterns(tmp_path, events):
    (tmp_path / "events").write_text(events)
    assert traced(tmp_path, "--trace", "events=events,file=log") == ""
    told = names((tmp_path / "log").read_text())
    assert len(told) >= 3 and set(told) == {"job_status"}
