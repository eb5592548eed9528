"""Makes the disks a scenario starts from with the real qemu-img and qemu-io."""

from __future__ import annotations

import hashlib
import json
import subprocess
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from scenario import Scenario

EXTRA_COMMANDS: dict[str, list[str]] = {
    "amend_luks": [
        "qemu-img create -q -f luks --object secret,id=s,data=hunter2 -o key-secret=s,iter-time=100 l.img 1M",
    ],
    "qcow2_info": [
        "qemu-img create -q -f qcow2 -o data_file=d.raw,data_file_raw=on df.img 1M",
        "qemu-img bitmap -f qcow2 --add base.img pb",
        "qemu-img snapshot -c s1 base.img",
    ],
}
"""What the recording did to the disks beyond what the header can say."""


class ImageStore:
    """Builds each distinct set of images once and hands out copies: many scenarios start from the same disks."""

    def __init__(self) -> None:
        self._root = tempfile.TemporaryDirectory(prefix="bj-images-")
        self._lock = threading.Lock()

    def place(self, scenario: Scenario, directory: Path) -> None:
        """Put fresh copies of the scenario's images into `directory`, holes kept."""
        extra = EXTRA_COMMANDS.get(scenario.name, [])
        if not scenario.images and not extra:
            return
        key = hashlib.sha256(json.dumps([scenario.images, extra]).encode()).hexdigest()[:16]
        template = Path(self._root.name) / key
        with self._lock:
            if not template.exists():
                template.mkdir()
                for image in scenario.images:
                    create(image, template)
                for command in extra:
                    run_patiently(command.split(), template)
        subprocess.run(["cp", "-a", "--sparse=auto", f"{template}/.", str(directory)], check=True)

    def close(self) -> None:
        """Remove the templates."""
        self._root.cleanup()


def run_patiently(command: list[str], directory: Path) -> None:
    """Run a command that must succeed; qemu-img's timing of key derivation may fail by chance, so that is retried.

    Raises:
        AssertionError: it failed for another reason, or five times.
    """
    for _ in range(5):
        done = subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False)
        if "accurate CPU usage" not in done.stderr:
            break
    assert done.returncode == 0, done.stderr


def create(image: dict[str, Any], directory: Path) -> None:
    """Create one image in `directory` as a transcript's header describes it.

    Raises:
        subprocess.CalledProcessError: qemu-img or qemu-io refused.
    """
    command = ["qemu-img", "create", "-q", "-f", image["format"]]
    if "options" in image:
        command += ["-o", image["options"]]
    if "backing" in image:
        command += ["-b", image["backing"], "-F", image["backing-fmt"]]
    command += [image["file"], *([image["size"]] if "size" in image else [])]
    subprocess.run(command, cwd=directory, check=True, capture_output=True)
    if writes := image.get("writes"):
        commands = [f"write -P {write['pattern']} {write['offset']} {write['length']}" for write in writes]
        arguments = [argument for command in commands for argument in ("-c", command)]
        subprocess.run(
            ["qemu-io", "-f", image["format"], *arguments, image["file"]],
            cwd=directory,
            check=True,
            capture_output=True,
        )
