"""Commands that make images from images, with the options of qemu-img's commands of the same name."""

from blockjobs.base.errors import UsageError
from blockjobs.cli.app import IMAGES, app
from blockjobs.cli.convert_options import DEFAULT_CONVERTING, Converting


@app.command(group=IMAGES)
def convert(*files: str, converting: Converting = DEFAULT_CONVERTING) -> int:
    """Make an image of another format, or one out of several: convert SOURCE [SOURCE...] TARGET.

    An existing TARGET is replaced, at once and whole, when the new image is complete and on disk.

    Args:
        files: the images to read, one behind the other, and last the image to make (paths or NBD URIs).
    """
    if len(files) < 2:
        raise UsageError("convert needs the image to read and the image to make")
    from blockjobs.cli.convert import convert as run

    return run(files[:-1], files[-1], converting)
