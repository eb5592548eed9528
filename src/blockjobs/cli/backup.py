"""`blockjobs backup`: copy an image as a job under QEMU's life cycle, in this process."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from blockjobs.base.errors import BlockjobsError, UsageError
from blockjobs.cli.arguments import Copying
from blockjobs.cli.following import Faults, as_dict, follow
from blockjobs.cli.formats import format_for_new, format_of
from blockjobs.cli.image_options import parse_options
from blockjobs.cli.images import named
from blockjobs.cli.new_copy import NewCopy
from blockjobs.cli.progress import View, choose_view

if TYPE_CHECKING:
    from blockjobs.host import Host


def back_up(
    *,
    source: str,
    target: str,
    copying: Copying,
    source_format: str | None,
    target_format: str | None,
    options: Sequence[str] | None,
    as_json: bool,
    quiet: bool,
    replace: bool,
    keep_partial: bool,
    roots: Sequence[str] | None,
) -> int:
    """Carry out what the command line says; returns the exit code. The parameters are as they were typed.

    Raises:
        BlockjobsError: it failed; nothing new is left behind, except on request.
        OSError: likewise.
    """
    known_target = format_for_new(target, target_format)
    members = parse_options(options or (), known_target)
    if copying.compress and known_target != "qcow2":
        raise UsageError(f"--compress needs a qcow2 target, and '{target}' is to be {known_target}: add -O qcow2")
    if copying.sync == "top" and known_target != "qcow2":
        raise UsageError("--sync top copies one layer of a chain, which only a qcow2 target can hold: add -O qcow2")
    if copying.compress:
        members["compression_type"] = copying.compress
    copy = NewCopy(
        source=source,
        target=target,
        source_format=format_of(source, source_format),
        target_format=known_target,
        options=members,
        sync=copying.sync,
        roots=roots,
        replace=replace,
        keep_partial=keep_partial,
    )
    view = choose_view("backup", as_json=as_json, quiet=quiet)
    return copy.make(lambda host: _copy(host, copy, copying, view, as_json=as_json), as_json=as_json)


async def _copy(host: "Host", copy: NewCopy, copying: Copying, view: View, *, as_json: bool) -> int:
    async with copy.opened(host) as (source, target):
        faults = Faults(copy.source, copy.partial.final)
        with view, host.bus.listening(faults.note):
            try:
                job = await host.backup(source, target, id="backup", **_arguments(copying))
            except UsageError as error:
                raise named(copy.source, error) from error
            outcome = await follow(job, view, faults)
            if outcome.error is None or as_json:
                view.done(as_dict(outcome))
        if outcome.error is not None:
            raise BlockjobsError(f"backup of '{copy.source}' failed: '{faults.where}': {outcome.error}")
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
