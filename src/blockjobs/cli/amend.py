"""`blockjobs amend`: change what was chosen when an image was made, as a job in this process."""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from blockjobs.base.errors import BlockjobsError, UsageError
from blockjobs.cli.following import Faults, as_dict, follow
from blockjobs.cli.image_options import AMENDABLE, AMENDABLE_LUKS, option_lines, parse_options, wants_help
from blockjobs.cli.image_opts import given_image
from blockjobs.cli.images import cache_options, image_roots
from blockjobs.cli.progress import BarView, JsonView, NoView, View
from blockjobs.cli.running import run_in_host

if TYPE_CHECKING:
    from blockjobs.cli.arguments import Existing
    from blockjobs.host import Host


def amend(
    file: str,
    existing: "Existing",
    *,
    options: Sequence[str],
    force: bool,
    cache: str,
    progress: bool,
    as_json: bool,
    roots: Sequence[str] | None,
) -> int:
    """Amend an image that nobody uses; returns the exit code.

    Raises:
        BlockjobsError: it failed; the image is good, and as before unless the text says otherwise.
    """
    image = given_image(file, existing.format, image_opts=existing.image_opts)
    known = image.format
    if known == "raw":
        raise UsageError(f"Format driver '{known}' does not support option amendment")
    readers = AMENDABLE_LUKS if known == "luks" else AMENDABLE
    if wants_help(options):
        print("\n".join([f"Amend options for '{known}':", *option_lines(readers)]))
        return 0
    members = parse_options(options, known, known=readers, what="amend")
    if "encrypt" in members:
        members["encrypt"]["format"] = "luks"
    if not members:
        raise UsageError("Must specify options (-o)")

    async def work(host: "Host") -> int:
        # Its backing file may be the very thing that is to be changed: it only matters to a downgrade.
        needed = known == "luks" or "version" in members or "size" in members
        unneeded = {} if needed else {"backing": None}
        node = await image.open(host, name="image", read_only=False, **unneeded, **cache_options(cache))
        bar: View = BarView("amend") if progress else NoView()
        view = JsonView("amend", sys.stdout) if as_json else bar
        with view:
            try:
                job = await host.amend(node, id="amend", force=force, **members)
            except UsageError as error:
                raise image.named(error) from error
            outcome = await follow(job, view, Faults(file, file))
            if as_json:
                view.done(as_dict(outcome))
        await host.close_nodes(node)
        if outcome.error is not None:
            raise BlockjobsError(f"'{file}': {outcome.error}")
        return 0

    return run_in_host(work, image_roots=image_roots(roots, *image.folder_of))
