"""Commands that change an image, or cut one out of another, with the options of qemu-img's commands."""

from typing import Annotated, Literal

from cyclopts import Parameter

from blockjobs.cli.arguments import CacheMode, ForceShare, Format, ImageRoots, SourceFormat, Switch, TargetFormat

Quiet = Annotated[Switch, Parameter(name=("-q", "--quiet"))]
ImageOpts = Annotated[Switch, Parameter(name="--image-opts")]


def resize(
    file: str,
    size: Annotated[str, Parameter(allow_leading_hyphen=True)],
    /,
    *,
    format: SourceFormat = None,
    shrink: Switch = False,
    preallocation: Literal["off", "metadata", "falloc", "full"] = "off",
    quiet: Quiet = False,
    image_opts: ImageOpts = False,
) -> int:
    """Give a disk another length.

    Args:
        file: the image; nobody may be using it.
        size: the new length (10G), or with a sign the difference (+1G, -1G).
        format: format of the image; without it, name and content must agree on one.
        shrink: a shorter disk is meant: what lies beyond its end is deleted.
        preallocation: give what is new its space now: "full" writes zeroes, "falloc" only takes it, "metadata" only
            says where in the file it will be (qcow2).
        quiet: say nothing.
        image_opts: FILE is the options of a node (driver=qcow2,file.filename=...).
    """
    from blockjobs.cli.image_opts import given_image
    from blockjobs.cli.resize import resize as run

    image = given_image(file, format, image_opts=image_opts)
    return run(image, size, shrink=shrink, preallocation=preallocation, quiet=quiet)


def rebase(
    file: str,
    /,
    *,
    backing: Annotated[str | None, Parameter(name=("-b", "--backing"))] = None,
    backing_format: Annotated[Format | None, Parameter(name=("-F", "--backing-format"))] = None,
    unsafe: Annotated[Switch, Parameter(name=("-u", "--unsafe"))] = False,
    cache: Annotated[CacheMode, Parameter(name=("-t", "--cache"))] = "writeback",
    source_cache: Annotated[CacheMode, Parameter(name=("-T", "--source-cache"))] = "writeback",
    force_share: ForceShare = False,
    format: SourceFormat = None,
    progress: Annotated[Switch, Parameter(name=("-p", "--progress"))] = False,
    quiet: Quiet = False,
    image_opts: ImageOpts = False,
    image_root: ImageRoots = None,
) -> int:
    """Let an overlay lie on another image, and read as before: what it would lose is copied into it first.

    Args:
        file: the overlay; nobody may be using it.
        backing: the new backing file; relative names count from the folder of FILE. Empty: none any more, as with -u
            alone.
        backing_format: its format.
        unsafe: change the name only, for a backing file that was moved; what FILE shows may change.
        cache: "none" and "directsync" go past the host's page cache; "unsafe" does not wait for the disk.
        source_cache: the same for the new backing file.
        force_share: the new backing file may be in use by a writer.
        format: qcow2, if the name does not say so.
        progress: show a bar.
        quiet: no bar.
        image_opts: FILE is the options of a node (driver=qcow2,file.filename=...).
        image_root: a folder besides the images' own in which backing files may be.
    """
    from blockjobs.cli.image_opts import given_image
    from blockjobs.cli.rebase import rebase as run

    return run(
        given_image(file, format, image_opts=image_opts),
        backing,
        backing_format=backing_format,
        unsafe=unsafe,
        cache=cache,
        source_cache=source_cache,
        force_share=force_share,
        progress=progress and not quiet,
        roots=image_root,
    )


def dd(
    *operands: str,
    format: SourceFormat = None,
    target_format: TargetFormat = "raw",
    image_opts: ImageOpts = False,
    force_share: Annotated[Switch, Parameter(name=("-U", "--force-share"))] = False,
) -> int:
    """Copy part of an image to a new one: dd if=IMAGE of=IMAGE [bs=SIZE] [skip=BLOCKS] [count=BLOCKS].

    Args:
        operands: if= the image to read, of= the image to make, bs= bytes in a block (512), skip= blocks to leave out at
            the start, count= the block to stop before.
        format: format of the image to read; without it, name and content must agree on one.
        target_format: format of the image to make.
        image_opts: if= names no path but the options of a node (driver=qcow2,file.filename=...).
        force_share: the image to read may be in use by a writer.
    """
    from blockjobs.cli.convert_options import Converting
    from blockjobs.cli.dd import dd as run

    how = Converting(format=format, target_format=target_format, image_opts=image_opts, force_share=force_share)
    return run(operands, how)
