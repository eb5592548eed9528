"""Starting `block-commit`: all checks, and which of the two jobs it is (spec/jobs.md §2)."""

from blockjobs.base.errors import DeviceNotFound, NodeNotFound, UsageError
from blockjobs.block.chain import chain_of, goes_by, images_of, named_in_chain
from blockjobs.block.claims import Perm
from blockjobs.block.node import Node
from blockjobs.jobs.active_commit import start_active_commit
from blockjobs.jobs.block_job import JobHost, check_root
from blockjobs.jobs.chain_options import BlockCommit
from blockjobs.jobs.chain_start import start_chain_job
from blockjobs.jobs.commit import CommitJob
from blockjobs.lifecycle.handle import JobHandle


async def start_commit(host: JobHost, options: BlockCommit) -> JobHandle:
    """Check everything and start the job: a mirror into the base if users write to `top`, a plain merge otherwise.

    Raises:
        UsageError: with QEMU's text, in QEMU's order of checks; the graph is as before.
        IoFailure: the base could not be made writable.
    Waits: for drains and for opening the filter. Checkpoint: no.
    """
    device = _find_device(host, options.device)
    top, base = _ends(host, options, device)
    is_active_layer = top.storage is device.storage
    has_writer = Perm.WRITE in top.rights.needs
    if (is_active_layer or has_writer) and options.backing_file is not None:
        why = "'top' is the active layer" if is_active_layer else "'top' has a writer on it"
        raise UsageError(f"'backing-file' specified, but {why}")
    if top.storage is base.storage:
        raise UsageError("Invalid files for merge: top and base are the same")
    if is_active_layer or has_writer:
        return await start_active_commit(host, options, top, base)
    job = CommitJob(host, options, device, top, base)
    return await start_chain_job(host, job, options, job.set_up, job_first=True)


def _find_device(host: JobHost, name: str) -> Node:
    try:
        device = host.graph.find(name)
    except NodeNotFound as error:
        raise DeviceNotFound(name) from error
    check_root(device)
    device.check_op("commit-source")
    return device


def _ends(host: JobHost, options: BlockCommit, device: Node) -> tuple[Node, Node]:
    """The uppermost image that is merged, and the one that takes everything in."""
    if options.top_node is not None and options.top is not None:
        raise UsageError("'top-node' and 'top' are mutually exclusive")
    top = device
    if options.top_node is not None:
        top = host.graph.node(options.top_node)
        _check_below(top, device)
    elif options.top is not None and not goes_by(device, options.top):
        found = named_in_chain(device, options.top)
        if found is None:
            raise UsageError(f"Top image file {options.top} not found")
        top = found
    if options.base_node is not None and options.base is not None:
        raise UsageError("'base-node' and 'base' are mutually exclusive")
    if options.base_node is not None:
        base = host.graph.node(options.base_node)
        _check_below(base, top)
    elif options.base is not None:
        named = named_in_chain(top, options.base)
        if named is None:
            raise UsageError(f"Can't find '{options.base}' in the backing chain")
        base = named
    else:
        base = images_of(top)[-1]
    for node in chain_of(top):
        node.check_op("commit-target")
        if node is base:
            break
    if top is base:
        raise UsageError("cannot commit an image into itself")
    return top, base


def _check_below(node: Node, top: Node) -> None:
    if node not in list(chain_of(top)):
        raise UsageError(f"'{node.name}' is not in this backing file chain")
