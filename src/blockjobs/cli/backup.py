"""`blockjobs backup`: copy an image as a job under QEMU's life cycle, in this process."""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from blockjobs.base.errors import BlockjobsError, UsageError
from blockjobs.cli.arguments import Copying
from blockjobs.cli.following import Faults, as_dict, follow
from blockjobs.cli.formats import format_for_new, format_of
from blockjobs.cli.image_options import parse_options
from blockjobs.cli.images import image_roots, named, open_image
from blockjobs.cli.progress import View, choose_view
from blockjobs.cli.running import run
from blockjobs.cli.targets import Partial

if TYPE_CHECKING:
    from blockjobs.block.node import Node


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What the command line asks for."""

    source: str
    target: str
    source_format: str
    target_format: str
    options: dict[str, Any]
    copying: Copying
    as_json: bool
    quiet: bool
    replace: bool
    keep_partial: bool
    roots: Sequence[str] | None


def _make_order(
    *,
    source: str,
    target: str,
    source_format: str | None,
    target_format: str | None,
    options: list[str] | None,
    copying: Copying,
    **rest: Any,
) -> Order:
    """Check what can be checked before a file is touched.

    Raises:
        UsageError: wrong or contradicting parameters.
    """
    known_source = format_of(source, source_format)
    known_target = format_for_new(target, target_format)
    members = parse_options(options or (), known_target)
    if copying.compress and known_target != "qcow2":
        raise UsageError(f"--compress needs a qcow2 target, and '{target}' is to be {known_target}: add -O qcow2")
    if copying.sync == "top" and known_target != "qcow2":
        raise UsageError("--sync top copies one layer of a chain, which only a qcow2 target can hold: add -O qcow2")
    if copying.compress:
        members["compression_type"] = copying.compress
    return Order(
        source=source,
        target=target,
        source_format=known_source,
        target_format=known_target,
        options=members,
        copying=copying,
        **rest,
    )


def back_up(**words: Any) -> int:
    """Carry out what the command line says; returns the exit code.

    Args:
        words: the members of `Order`; formats and `options` still as they were typed.

    Raises:
        BlockjobsError: it failed; nothing new is left behind, except on request.
        OSError: likewise.
    """
    order = _make_order(**words)
    view = choose_view("backup", as_json=order.as_json, quiet=order.quiet)
    with Partial(order.target, replace=order.replace, keep=order.keep_partial) as partial:
        code = run(lambda: _copy(order, partial, view))
        if code == 0:
            partial.complete()
    if code and not order.as_json:
        print(f"blockjobs: cancelled, '{order.target}' was not made", file=sys.stderr)
    return code


async def _copy(order: Order, partial: Partial, view: View) -> int:
    from blockjobs.host import Host

    async with Host(image_roots=image_roots(order.roots, order.source)) as host:
        source = await open_image(host, order.source, order.source_format, name="source")
        partial.demand_other_than(host.open_files())
        await partial.demand_unused(host)
        # A copy must not be readable for more people than the original.
        partial.claim_name(mode=os.stat(order.source).st_mode & 0o666)
        more: dict[str, Any] = {}
        if order.target_format == "qcow2":
            more["backing"] = None
        await host.create_image(
            partial.path, order.target_format, source.length, **order.options, **_backing(order, source, partial)
        )
        target = await open_image(host, partial.path, order.target_format, name="target", read_only=False, **more)
        faults = Faults(order.source, partial.final)
        with view, host.bus.listening(faults.note):
            try:
                job = await host.backup(source, target, id="backup", **_arguments(order.copying))
            except UsageError as error:
                raise named(order.source, error) from error
            outcome = await follow(job, view, faults)
            if outcome.error is None or order.as_json:
                view.done(as_dict(outcome))
        if outcome.error is not None:
            raise BlockjobsError(f"backup of '{order.source}' failed: '{faults.where}': {outcome.error}")
        await host.close_nodes(target, source)
    return 0


def _arguments(copying: Copying) -> dict[str, Any]:
    return {
        "sync": copying.sync,
        "compress": copying.compress is not None,
        "level": copying.level,
        "speed_bytes_per_s": copying.speed,
        "on_source_error": copying.on_source_error,
        "on_target_error": copying.on_target_error,
    }


def _backing(order: Order, source: "Node", partial: Partial) -> dict[str, str]:
    """A copy of the top layer only makes sense on top of the same backing image."""
    backing = source.backing if order.copying.sync == "top" else None
    if backing is None or "backing_file" in order.options:
        return {}
    path = os.path.realpath(backing.filename)
    folder = os.path.dirname(partial.final)
    name = os.path.basename(path) if os.path.dirname(path) == folder else path
    return {"backing_file": name, "backing_fmt": backing.driver_name}
