"""Host: nodes, jobs and events of one program, as one async context manager to embed.

    async with Host() as host:
        source = await host.open("disk.qcow2", read_only=True)
        target = await host.open("copy.qcow2")
        job = await host.backup(source, target, speed_bytes_per_s=100 * MiB)
        outcome = await job.outcome()

Two hosts in one process do not know of each other. Daemon, command line and tests are built on it.
"""

from blockjobs.host.images import ImageHost
from blockjobs.host.jobs import Jobs


class Host(ImageHost, Jobs):
    """Everything that a storage daemon has, without the daemon. Attributes: see `Core` and `Nodes`."""
