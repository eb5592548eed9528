"""`blockjobs bitmap --add ... FILE NAME`: qemu-img's form, several actions on one bitmap of an image nobody uses."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple

from blockjobs.base.errors import UsageError
from blockjobs.cli.image_opts import given_image
from blockjobs.cli.running import run_on_images

if TYPE_CHECKING:
    from blockjobs.block.node import Node
    from blockjobs.cli.arguments import Existing
    from blockjobs.host import ImageHost


FLAGS: Final = ("--add", "--clear", "--enable", "--disable", "--remove")
_WITH_VALUE: Final = ("-b", "--source-image", "-F", "--source-format", "-g", "--granularity", "-f", "--format")


class Action(NamedTuple):
    """One thing to do. `source` is the bitmap to merge; empty for all others."""

    what: str
    source: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Actions:
    """What is to be done.

    Attributes:
        steps: in this order.
        granularity: of new bitmaps, in bytes; None for the image's clusters.
        source_image: where the bitmaps to merge are; None for the image itself.
        source_format: its format.
    """

    steps: Sequence[Action]
    granularity: int | None
    source_image: str | None
    source_format: str | None

    def demand_sense(self) -> None:
        """Raises UsageError: nothing is asked for, or options without what they belong to."""
        wanted = {step.what for step in self.steps}
        if not wanted:
            raise UsageError("Need at least one of --add, --remove, --clear, --enable, --disable, or --merge")
        if self.granularity is not None and "add" not in wanted:
            raise UsageError("granularity only supported with --add")
        if self.source_image is not None and "merge" not in wanted:
            raise UsageError("Merge bitmap source file only supported with --merge")
        if self.source_format is not None and self.source_image is None:
            raise UsageError("-F only supported with -b")


def in_order(words: Sequence[str]) -> tuple[Action, ...]:
    """The actions that a command line asks for, as they follow each other in it."""
    found: list[Action] = []
    given = iter(words)
    for word in given:
        name, _, value = word.partition("=")
        if word in _WITH_VALUE:
            next(given, None)
        elif name == "--merge":
            found.append(Action("merge", value if "=" in word else next(given, "")))
        elif word in FLAGS:
            found.append(Action(word.removeprefix("--")))
    return tuple(found)


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
        finally:
            # As in qemu-img, what was done before one action failed is done.
            await host.close_nodes(node)
        return 0

    return run_on_images(work)


async def _do(host: "ImageHost", node: "Node", other: "Node", name: str, actions: Actions) -> None:
    for what, source in actions.steps:
        try:
            if what == "add":
                await host.add_bitmap(node, name, granularity=actions.granularity, persistent=True)
            elif what == "clear":
                host.clear_bitmap(node, name)
            elif what == "merge":
                await host.merge_bitmaps(node, name, [(other, source)])
            elif what == "remove":
                await host.remove_bitmap(node, name)
            else:
                await host.enable_bitmap(node, name, what == "enable")
        except UsageError as error:
            raise UsageError(f"Operation {what} on bitmap {name} failed: {error}") from error
