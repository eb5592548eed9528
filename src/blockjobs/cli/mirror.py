"""`blockjobs mirror`: keep a copy in step with an image, of a server's or of our own, and end in step."""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from blockjobs.base.errors import UsageError
from blockjobs.cli.arguments import AN_EXISTING, Existing, Mirror
from blockjobs.cli.convergence import Goal, parse_goal
from blockjobs.cli.formats import format_for_new
from blockjobs.cli.image_options import parse_options
from blockjobs.cli.image_opts import given_image
from blockjobs.cli.live import in_process, on_server, run_job
from blockjobs.cli.mirroring import Ending, Mirroring
from blockjobs.cli.new_copy import NewCopy
from blockjobs.cli.server_nodes import find_node, made_by_server, target_path
from blockjobs.monitor.client import Commander

if TYPE_CHECKING:
    from blockjobs.host import Host


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What the command line asks for.

    Attributes:
        goal: how long the mirror may take to catch up.
        ending: what happens when it is ready.
    """

    source: str
    target: str
    existing: Existing
    target_format: str | None
    options: Sequence[str]
    mirror: Mirror
    goal: Goal | None
    ending: Ending
    connect: str | None
    job: str
    as_json: bool
    quiet: bool
    replace: bool
    keep_partial: bool
    roots: Sequence[str] | None


def mirror(*, mirror: Mirror, **words: Any) -> int:
    """Carry out what the command line says; returns the exit code.

    Raises:
        BlockjobsError: it failed; a target that we made ourselves is removed, except on request.
    """
    if mirror.pivot and mirror.stay:
        raise UsageError("--pivot and --stay contradict each other")
    ending = Ending.PIVOT if mirror.pivot else Ending.STAY if mirror.stay else Ending.COPY
    goal = parse_goal(mirror.converge) if mirror.converge else None
    order = Order(mirror=mirror, goal=goal, ending=ending, **words)
    if order.connect is None:
        if ending is not Ending.COPY:
            raise UsageError("--pivot and --stay are for disks in use: name their server with --connect")
        return _mirror_here(order)
    if order.options or order.keep_partial or order.roots or order.existing != AN_EXISTING:
        raise UsageError("-f, -o, --image-opts, --keep-partial and --image-root are for images no server has open")
    return on_server(order.connect, lambda client: _mirror_there(order, client))


async def _mirror_there(order: Order, client: Commander) -> int:
    """On a server: it makes the target itself."""
    path = target_path(order.target, replace=order.replace)
    device = await find_node(client, order.source)
    words = _arguments(order.mirror)
    words |= {"device": device, "target": path, "format": format_for_new(order.target, order.target_format)}
    steering = _steering(order, client)
    with made_by_server(path, keeps=lambda: steering.keeps_target):
        await _run(order, client, "drive-mirror", words, steering)
    return 0


def _mirror_here(order: Order) -> int:
    """On images that nobody has open: the target gets its name when it is complete."""
    copy = NewCopy(
        source=given_image(order.source, order.existing.format, image_opts=order.existing.image_opts),
        target=order.target,
        target_format=(target_format := format_for_new(order.target, order.target_format)),
        options=parse_options(order.options, target_format),
        sync=order.mirror.sync,
        roots=order.roots,
        replace=order.replace,
        keep_partial=order.keep_partial,
    )

    async def work(host: "Host") -> int:
        async with copy.opened(host) as (source, target):
            words = _arguments(order.mirror) | {"device": source.name, "target": target.name}

            async def mirror_it(client: Commander) -> int:
                return await _run(order, client, "blockdev-mirror", words, _steering(order, client))

            return await in_process(host, mirror_it)

    return copy.make(work, as_json=order.as_json)


def _steering(order: Order, client: Commander) -> Mirroring:
    return Mirroring(client, order.job, ending=order.ending, goal=order.goal, say=_say)


async def _run(order: Order, client: Commander, command: str, words: dict[str, Any], steering: Mirroring) -> int:
    await run_job(
        client,
        command,
        id=order.job,
        arguments=words,
        as_json=order.as_json,
        quiet=order.quiet,
        look=steering.look,
        ends_softly=steering.ends_softly,
    )
    return 0


def _arguments(mirror: Mirror) -> dict[str, Any]:
    return {
        "sync": mirror.sync,
        "speed": mirror.speed,
        "granularity": mirror.granularity,
        "buf-size": mirror.buf_size,
        "copy-mode": mirror.copy_mode,
        "on-source-error": mirror.on_source_error,
        "on-target-error": mirror.on_target_error,
    }


def _say(line: str) -> None:
    end = "\r\n" if os.isatty(2) else "\n"
    print(f"blockjobs: {line}", end=end, file=sys.stderr, flush=True)
