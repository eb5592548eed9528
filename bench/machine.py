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
    kind = subprocess.run(["stat", "-f", "-c", "%T", str(folder)], capture_output=True, text=True, check=True).stdout
    qemu = subprocess.run(["qemu-img", "--version"], capture_output=True, text=True, check=True).stdout.split()[2]
    return (
        f"{os.cpu_count()} cores ({model}), {memory_kib >> 20} GiB of memory, {kind.strip()}, "
        f"Linux {platform.release().partition('-')[0]}, Python {platform.python_version()}, QEMU {qemu}, "
        f"blockjobs {importlib.metadata.version('blockjobs')}; load {os.getloadavg()[0]:.1f} at the start"
    )


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines()
