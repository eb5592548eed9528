"""`blockjobs bitmap --add ... FILE NAME`: qemu-img's form, several actions on one bitmap of an image nobody uses."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from blockjobs.base.errors import UsageError
from blockjobs.cli.image_opts import given_image
from blockjobs.cli.running import run_on_images

if TYPE_CHECKING:
    from blockjobs.block.node import Node
    from blockjobs.cli.arguments import Existing
    from blockjobs.host import ImageHost


@dataclass(frozen=True, slots=True, kw_only=True)
class Actions:
    """What is to be done, in the order of the attributes.

    Attributes:
        merge: bitmaps whose marks it is to have too.
        granularity: of a new bitmap, in bytes; None for the image's clusters.
        source_image: where the bitmaps to merge are; None for the image itself.
        source_format: its format.
    """

    add: bool
    clear: bool
    merge: tuple[str, ...]
    enable: bool
    disable: bool
    remove: bool
    granularity: int | None
    source_image: str | None
    source_format: str | None

    def demand_sense(self) -> None:
        """Raises UsageError: nothing is asked for, contradictions, or options without what they belong to."""
        if not (self.add or self.clear or self.merge or self.enable or self.disable or self.remove):
            raise UsageError("Need at least one of --add, --remove, --clear, --enable, --disable, or --merge")
        if self.granularity is not None and not self.add:
            raise UsageError("granularity only supported with --add")
        if self.source_image is not None and not self.merge:
            raise UsageError("Merge bitmap source file only supported with --merge")
        if self.source_format is not None and self.source_image is None:
            raise UsageError("-F only supported with -b")
        if self.enable and self.disable:
            raise UsageError("--enable and --disable contradict each other")
        if self.remove and (self.add or self.clear or self.merge or self.enable or self.disable):
            raise UsageError("--remove goes with no other action: what they do would be lost")


def act(file: str, name: str, existing: "Existing", actions: Actions) -> int:
    """Do it; returns the exit code.

    Raises:
        BlockjobsError: it could not be done.
    """
    actions.demand_sense()
    image = given_image(file, existing.format, image_opts=existing.image_opts)
    source = None if actions.source_image is None else given_image(actions.source_image, actions.source_format)
    if image.format != "qcow2":
        raise UsageError(f"'{file}' is {image.format}, a format without bitmaps (see blockjobs bitmap add --help)")

    async def work(host: "ImageHost") -> int:
        node = await image.open(host, name="image", read_only=False, backing=None)
        other = node if source is None else await source.open(host, name="source", backing=None)
        try:
            await _do(host, node, other, name, actions)
        except UsageError as error:
            raise image.named(error) from error
        await host.close_nodes(node)
        return 0

    return run_on_images(work)


async def _do(host: "ImageHost", node: "Node", other: "Node", name: str, actions: Actions) -> None:
    if actions.add:
        size = actions.granularity
        await host.add_bitmap(node, name, granularity=size, persistent=True, enabled=not actions.disable)
    if actions.clear:
        host.clear_bitmap(node, name)
    if actions.merge:
        await host.merge_bitmaps(node, name, [(other, each) for each in actions.merge])
    if actions.enable or (actions.disable and not actions.add):
        await host.enable_bitmap(node, name, actions.enable)
    if actions.remove:
        await host.remove_bitmap(node, name)
