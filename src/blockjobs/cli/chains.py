"""`blockjobs commit` and `blockjobs stream`: shorten a chain of images, a server's or one that nobody has open."""

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from blockjobs.base.errors import UsageError
from blockjobs.block.emptying import empty
from blockjobs.cli.image_opts import given_image
from blockjobs.cli.images import cache_options, image_roots
from blockjobs.cli.live import in_process, on_server, run_job
from blockjobs.cli.running import run_in_host
from blockjobs.cli.server_nodes import find_node
from blockjobs.monitor.client import Commander

if TYPE_CHECKING:
    from blockjobs.block.node import Node
    from blockjobs.cli.arguments import Existing
    from blockjobs.host import Host


class Shortening:
    """One job that takes images out of a chain.

    Attributes:
        command: `block-commit` or `block-stream`.
        links: images that the user named, by the command's argument (`top-node`, `base-node`).
        cache: a cache mode of qemu-img, for images that nobody has open.
        empties: a commit of the active image into the one below it leaves nothing in it.
    """

    def __init__(
        self,
        command: str,
        image: str,
        *,
        links: Mapping[str, str | None],
        speed: int,
        on_error: str,
        job: str,
        as_json: bool,
        quiet: bool,
        cache: str = "writeback",
        empties: bool = False,
    ) -> None:
        self._command, self._image, self._links = command, image, links
        self._speed, self._on_error = speed, on_error
        self._job, self._as_json, self._quiet = job, as_json, quiet
        self._cache, self._empties = cache, empties

    def there(self, address: str) -> int:
        """Do it on a server; returns the exit code.

        Raises:
            BlockjobsError: it was refused, or failed; the chain is as before.
        """

        async def work(client: Commander) -> int:
            device = await find_node(client, self._image)
            links = {argument: await find_node(client, name) for argument, name in self._links.items() if name}
            return await self._run(client, device, links)

        return on_server(address, work)

    def here(self, existing: "Existing", *, roots: Sequence[str] | None) -> int:
        """Do it on images that nobody has open; returns the exit code.

        Raises:
            BlockjobsError: it was refused, or failed; the chain is as before.
        """
        image = given_image(self._image, existing.format, image_opts=existing.image_opts)

        async def work(host: "Host") -> int:
            top = await image.open(host, name="image", read_only=False, **cache_options(self._cache))
            links = {argument: _in_chain(top, name).name for argument, name in self._links.items() if name}
            below = top.backing
            if self._command == "block-commit" and below is None:
                raise image.named(UsageError("Image does not have a backing file"))
            if self._command == "block-commit" and not links and below is not None:
                links["base-node"] = below.name
            code = await in_process(host, lambda client: self._run(client, top.name, links))
            if self._empties and below is not None:
                async with host.access(top, write=True), host.graph.drained(top):
                    await empty(top, below)
            await host.close_nodes(top)
            return code

        return run_in_host(work, image_roots=image_roots(roots, *image.folder_of))

    async def _run(self, client: Commander, device: str, links: Mapping[str, str]) -> int:
        async def complete_when_ready(job: dict[str, Any]) -> Mapping[str, Any]:
            # What commits the active image follows its guest until it is told to let it go on below.
            if job["status"] == "ready":
                await client.execute("job-complete", id=self._job)
            return {}

        await run_job(
            client,
            self._command,
            id=self._job,
            arguments={"device": device, "speed": self._speed, "on-error": self._on_error, **links},
            as_json=self._as_json,
            quiet=self._quiet,
            look=complete_when_ready,
        )
        return 0


def _in_chain(top: "Node", name: str) -> "Node":
    """The image of a chain that `name` leads to.

    Raises:
        UsageError: it is none of them; the text lists them.
    """
    chain: list[Node] = []
    node: Node | None = top
    while node is not None:
        chain.append(node)
        node = node.backing
    for node in chain:
        if os.path.realpath(node.filename) == os.path.realpath(name):
            return node
    listed = ", ".join(f"'{node.filename}'" for node in chain)
    raise UsageError(f"'{name}' is not in the chain of '{top.filename}': {listed}")
