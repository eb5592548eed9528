"""All QMP commands and events; `load()` registers them."""

import importlib
from typing import Final

MODULES: Final = (
    "amend",
    "backup",
    "bitmaps",
    "block_jobs",
    "chains",
    "chardevs",
    "control",
    "exports",
    "graph",
    "jobs",
    "mirror",
    "nodes",
    "objects",
    "snapshots",
)


def load() -> None:
    """Import every module that declares commands; may be called again."""
    for name in MODULES:
        importlib.import_module(f"blockjobs.monitor.commands.{name}")
