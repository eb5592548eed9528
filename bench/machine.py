"""What a result was measured on: the machine, the versions, and how busy it was."""

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path


def described(folder: Path) -> str:
    """One line: processors, memory, file system of `folder`, kernel, Python, QEMU, load."""
    model = next(
        (line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        platform.machine(),
    )
    memory_kib = next(int(line.split()[1]) for line in _lines("/proc/meminfo") if line.startswith("MemTotal"))
    qemu = subprocess.run(["qemu-img", "--version"], capture_output=True, text=True, check=True).stdout.split()[2]
    return (
        f"{os.cpu_count()} cores ({model}), {memory_kib >> 20} GiB of memory, {file_system(folder)}, "
        f"Linux {platform.release().partition('-')[0]}, Python {platform.python_version()}, QEMU {qemu}, "
        f"blockjobs {importlib.metadata.version('blockjobs')}; load {os.getloadavg()[0]:.1f} at the start"
    )


def file_system(folder: Path) -> str:
    """The kind of file system as it was mounted: stat knows ext4 only as "ext2/ext3"."""
    device = folder.stat().st_dev
    for line in _lines("/proc/self/mountinfo"):
        mount, _, source = line.partition(" - ")
        if mount.split()[2] == f"{os.major(device)}:{os.minor(device)}":
            return source.split()[0]
    done = subprocess.run(["stat", "-f", "-c", "%T", str(folder)], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def spread(folder: Path) -> None:
    """Have the folders made in it lie apart, in other places of the disk, where the file system (ext4) can be asked to.

    For minutes ext4 looks at each inode that was freed nearby before it takes another: after a thousand removals by
    another benchmark, a new file costs it up to 0.7 ms instead of 0.02, whoever makes it.
    """
    subprocess.run(["chattr", "+T", str(folder)], stderr=subprocess.DEVNULL, check=False)


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines()
