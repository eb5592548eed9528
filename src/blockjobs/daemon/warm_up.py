"""What a daemon loads once it serves: the rest of the program.

It was left out so that clients are answered sooner (base/homes.py). It must not stay out until it is wanted: that may
be weeks later, when another version of this program has been installed in the place of this one.
"""

import asyncio
import importlib
import logging
from typing import Final

from blockjobs.block.objects import object_options
from blockjobs.block.options import node_options
from blockjobs.jobs.machine_state import makers
from blockjobs.schema.command import qmp

log = logging.getLogger(__name__)

_LATE: Final = (
    "blockjobs.block.drivers.file_copies",
    "blockjobs.block.drivers.file_reopen",
    "blockjobs.block.drivers.qcow2.amend",
    "blockjobs.block.drivers.qcow2.compress",
    "blockjobs.block.drivers.qcow2.encryption",
    "blockjobs.block.drivers.qcow2.inactive_tables",
    "blockjobs.block.drivers.qcow2.repair",
    "blockjobs.block.drivers.qcow2.room",
    "blockjobs.block.drivers.qcow2.sparse",
    "blockjobs.block.drivers.qcow2.streams",
    "blockjobs.block.packed_move",
    "blockjobs.block.root_write",
    "blockjobs.export.registry",
)
"""Modules that functions import when they need them, and that no home leads to."""


async def load_rest() -> None:
    """Import a module at a time; between two of them the event loop does what there is to do."""
    registries = (node_options.homes, object_options.homes, makers)
    homes = (*qmp.homes(), *(module for each in registries for module in each.modules()), *_LATE)
    for module in dict.fromkeys(homes):
        try:
            importlib.import_module(module)
        except ImportError as error:
            log.warning("%s cannot be loaded, what it does will fail: %s", module, error)
        await asyncio.sleep(0)
