"""`blockjobs bitmap ...`, declared; the work is in `bitmaps`."""

from typing import Annotated

from cyclopts import App, Parameter

from blockjobs.cli.app import NO_NEGATIVES, WORDS
from blockjobs.cli.arguments import AN_EXISTING, AsJson, Existing, Format, Size, Switch

BitmapFile = Annotated[str | None, Parameter(name="--bitmap-file")]

bitmap = App(
    name="bitmap",
    help="""Dirty bitmaps that images carry with them, for incremental backups.

    Also in qemu-img's form: bitmap --add FILE NAME, and --remove, --clear, --enable, --disable, --merge SOURCE.
    A qcow2 image holds them itself; those of a raw image are in a file beside it, IMAGE.bitmaps if no other is named.
    """,
    default_parameter=NO_NEGATIVES,
)


@bitmap.default
def operate(
    image: str,
    name: str,
    /,
    *,
    add: Switch = False,
    clear: Switch = False,
    merge: list[str] | None = None,
    enable: Switch = False,
    disable: Switch = False,
    remove: Switch = False,
    granularity: Annotated[Size | None, Parameter(name=("-g", "--granularity"))] = None,
    source_image: Annotated[str | None, Parameter(name=("-b", "--source-image"))] = None,
    source_format: Annotated[Format | None, Parameter(name=("-F", "--source-format"))] = None,
    existing: Existing = AN_EXISTING,
) -> int:
    """Do what is asked for with one bitmap, in the order in which it is asked for, and silently.

    If one action fails, those before it stay done.

    Args:
        image: the image; nobody may be using it.
        name: of the bitmap.
        add: make it; it records.
        clear: make it clean.
        merge: mark in it what this bitmap of the image, or of --source-image, has marked.
        enable: let it record.
        disable: let it stay as it is.
        remove: take it out of the image.
        granularity: what one bit stands for; with --add.
        source_image: with --merge, an image of the same length.
        source_format: its format.
    """
    from blockjobs.cli.bitmap_actions import Actions, act, in_order

    # Declared for the help and for the check of the command line; the order is only in the words themselves.
    del add, clear, merge, enable, disable, remove
    actions = Actions(
        steps=in_order(WORDS.get()),
        granularity=granularity,
        source_image=source_image,
        source_format=source_format,
    )
    return act(image, name, existing, actions)


@bitmap.command(name="list")
def list_(
    image: str, /, *, existing: Existing = AN_EXISTING, bitmap_file: BitmapFile = None, json: AsJson = False
) -> int:
    """Show the bitmaps of an image that nobody writes to.

    Args:
        image: the image.
        bitmap_file: where the bitmaps of a raw image are.
        json: members of QAPI's BlockDirtyInfo.
    """
    from blockjobs.cli.bitmaps import show

    return show(image, existing=existing, bitmap_file=bitmap_file, as_json=json)


@bitmap.command
def add(
    image: str,
    name: str,
    /,
    *,
    granularity: Annotated[Size | None, Parameter(name=("-g", "--granularity"))] = None,
    disabled: Switch = False,
    existing: Existing = AN_EXISTING,
    bitmap_file: BitmapFile = None,
) -> int:
    """Give an image a clean bitmap, which records what is written from now on.

    Args:
        image: the image; nobody may be using it.
        name: of the new bitmap.
        granularity: what one bit stands for, a power of two from 512 (64K); by default as the image's clusters.
        disabled: it does not record yet.
        bitmap_file: where the bitmaps of a raw image are.
    """
    from blockjobs.cli.bitmaps import add as run

    return run(image, name, granularity=granularity, disabled=disabled, existing=existing, bitmap_file=bitmap_file)


@bitmap.command
def remove(image: str, name: str, /, *, existing: Existing = AN_EXISTING, bitmap_file: BitmapFile = None) -> int:
    """Take a bitmap out of an image; the only thing to do with an inconsistent one.

    Args:
        image: the image; nobody may be using it.
        name: of the bitmap.
        bitmap_file: where the bitmaps of a raw image are.
    """
    from blockjobs.cli.bitmaps import remove as run

    return run(image, name, existing=existing, bitmap_file=bitmap_file)


@bitmap.command
def clear(image: str, name: str, /, *, existing: Existing = AN_EXISTING, bitmap_file: BitmapFile = None) -> int:
    """Make a bitmap clean: as if nothing had been written.

    Args:
        image: the image; nobody may be using it.
        name: of the bitmap.
        bitmap_file: where the bitmaps of a raw image are.
    """
    from blockjobs.cli.bitmaps import clear as run

    return run(image, name, existing=existing, bitmap_file=bitmap_file)


@bitmap.command
def enable(image: str, name: str, /, *, existing: Existing = AN_EXISTING, bitmap_file: BitmapFile = None) -> int:
    """Let a bitmap record what is written from now on.

    Args:
        image: the image; nobody may be using it.
        name: of the bitmap.
        bitmap_file: where the bitmaps of a raw image are.
    """
    from blockjobs.cli.bitmaps import enable as run

    return run(image, name, True, existing=existing, bitmap_file=bitmap_file)


@bitmap.command
def disable(image: str, name: str, /, *, existing: Existing = AN_EXISTING, bitmap_file: BitmapFile = None) -> int:
    """Let a bitmap stay as it is, whatever is written.

    Args:
        image: the image; nobody may be using it.
        name: of the bitmap.
        bitmap_file: where the bitmaps of a raw image are.
    """
    from blockjobs.cli.bitmaps import enable as run

    return run(image, name, False, existing=existing, bitmap_file=bitmap_file)


@bitmap.command
def merge(
    image: str,
    target: str,
    sources: list[str],
    /,
    *,
    source_image: Annotated[str | None, Parameter(name=("-b", "--source-image"))] = None,
    source_format: Annotated[Format | None, Parameter(name=("-F", "--source-format"))] = None,
    existing: Existing = AN_EXISTING,
    bitmap_file: BitmapFile = None,
) -> int:
    """Mark in the bitmap TARGET what any of the bitmaps SOURCES has marked: all of them, or none.

    Args:
        image: the image; nobody may be using it.
        target: the bitmap that is changed.
        sources: bitmaps of the same image, or of --source-image.
        source_image: an image of the same length, such as the overlay that recorded what was written since.
        source_format: its format.
        bitmap_file: where the bitmaps of a raw image are.
    """
    from blockjobs.cli.bitmaps import merge as run

    return run(
        image,
        target,
        sources,
        source_image=source_image,
        source_format=source_format,
        existing=existing,
        bitmap_file=bitmap_file,
    )
