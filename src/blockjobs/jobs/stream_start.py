"""Starting `block-stream`: all checks (spec/jobs.md §1)."""

from blockjobs.base.errors import UsageError
from blockjobs.block.chain import chain_of, images_of, named_in_chain
from blockjobs.block.driver import FilterDriver
from blockjobs.block.node import Node
from blockjobs.jobs.block_job import JobHost
from blockjobs.jobs.chain_options import BlockStream
from blockjobs.jobs.chain_start import start_chain_job
from blockjobs.jobs.stream import StreamJob
from blockjobs.lifecycle.handle import JobHandle


async def start_stream(host: JobHost, options: BlockStream) -> JobHandle:
    """Check everything, put the filter in place and start the job.

    Raises:
        UsageError: with QEMU's text, in QEMU's order of checks; the graph is as before.
        IoFailure: the image could not be made writable.
    Waits: for drains and for opening the filter. Checkpoint: no.
    """
    _check_one_base(options)
    device = host.graph.find(options.device)
    bottom = _bottom_of(host, options, device)
    job = StreamJob(host, options, device, bottom)
    return await start_chain_job(host, job, options, lambda: job.set_up(device))


def _check_one_base(options: BlockStream) -> None:
    if options.base is not None and options.base_node is not None:
        raise UsageError("'base' and 'base-node' cannot be specified at the same time")
    if options.base is not None and options.bottom is not None:
        raise UsageError("'base' and 'bottom' cannot be specified at the same time")
    if options.bottom is not None and options.base_node is not None:
        raise UsageError("'bottom' and 'base-node' cannot be specified at the same time")


def _bottom_of(host: JobHost, options: BlockStream, device: Node) -> Node:
    """The last image that is taken in, after all checks."""
    chain, images = list(chain_of(device)), images_of(device)
    base: Node | None = None
    bottom = images[-1]
    if options.base is not None:
        base = named_in_chain(device, options.base)
        if base is None:
            raise UsageError(f"Can't find '{options.base}' in the backing chain")
    elif options.base_node is not None:
        base = host.graph.node(options.base_node)
        if base not in chain or base is device:
            raise UsageError(f"Node '{base.name}' is not a backing image of '{device.name}'")
    elif options.bottom is not None:
        bottom = host.graph.node(options.bottom)
        if isinstance(bottom.driver, FilterDriver):
            raise UsageError(f"Node '{bottom.name}' is a filter, use a non-filter node as 'bottom'")
        if bottom not in chain:
            raise UsageError(f"Node '{bottom.name}' is not in a chain starting from '{device.name}'")
    if base is not None:
        above = chain[: chain.index(base)]
        bottom = next(node for node in reversed(above) if not isinstance(node.driver, FilterDriver))
    for node in chain:
        if node is base:
            break
        node.check_op("stream")
        if node is bottom and options.bottom is not None:
            break
    if options.backing_file is not None and base is None:
        raise UsageError("backing file specified, but streaming the entire chain")
    return bottom
