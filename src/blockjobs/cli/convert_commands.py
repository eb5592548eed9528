"""Commands that make images from images, with the options of qemu-img's commands of the same name."""

from typing import Annotated

from cyclopts import Parameter

from blockjobs.base.errors import UsageError
from blockjobs.cli.arguments import (
    AN_EXISTING,
    FOR_PEOPLE,
    Answer,
    AsJson,
    CacheMode,
    Existing,
    ForceShare,
    Format,
    ImageRoots,
    Options,
    Output,
    Quiet,
    Size,
    SourceFormat,
    Switch,
)
from blockjobs.cli.convert_options import DEFAULT_CONVERTING, Converting


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


def measure(
    file: str | None = None,
    /,
    *,
    size: Size | None = None,
    format: SourceFormat = None,
    target_format: Annotated[Format, Parameter(name=("-O", "--target-format"))] = "raw",
    options: Options = None,
    force_share: ForceShare = False,
    snapshot: Annotated[str | None, Parameter(name=("-l", "--snapshot"))] = None,
    image_opts: Switch = False,
    image_root: ImageRoots = None,
    output: Output = "human",
    json: AsJson = False,
) -> int:
    """Say how large an image would become that `convert` or `create` would make.

    Holes that the file system shows in FILE count as zeroes, to the last one. qemu-img counts one that ends a file as
    data, and says so much more.

    Args:
        file: the image that would be converted.
        size: instead, the size of an empty disk.
        format: format of FILE; without it, name and content must agree on one.
        target_format: format of the new image.
        options: options of the new image, as qemu-img has them (cluster_size=128K,...).
        force_share: FILE may be in use by a writer.
        snapshot: the disk as it was when that snapshot inside FILE was made would be converted: its name or number.
        image_opts: FILE is no path but the options of a node: driver=qcow2,file.filename=a.qcow2,...
        image_root: a folder besides FILE's own in which backing files may be.
        output: json: as `qemu-img measure --output=json`.
        json: the same as --output=json.
    """
    from blockjobs.cli.measure import measure as run

    return run(
        file,
        size=size,
        format=format,
        target_format=target_format,
        options=options or (),
        force_share=force_share,
        snapshot=snapshot,
        image_opts=image_opts,
        as_json=json or output == "json",
        roots=image_root,
    )


def amend(
    file: str,
    /,
    *,
    options: Options = None,
    existing: Existing = AN_EXISTING,
    force: Switch = False,
    progress: Annotated[Switch, Parameter(name=("-p", "--progress"))] = False,
    cache: Annotated[CacheMode, Parameter(name=("-t", "--cache"))] = "writeback",
    quiet: Quiet = False,
    json: AsJson = False,
    image_root: ImageRoots = None,
) -> int:
    """Change what was chosen when an image was made: -o compat=, refcount_bits=, lazy_refcounts=, size=, ...

    Ctrl-C leaves the image as it was, as long as nothing has changed; a crash leaves it as it was, or changed.

    Args:
        file: the image; nobody may be using it.
        options: what it is to be, as for qemu-img (compat=0.10,refcount_bits=16,...); backing_file= and backing_fmt=
            change what the header names, and nothing else.
        force: a smaller size may delete data.
        cache: "none" and "directsync" go past the host's page cache.
        progress: show a bar.
        quiet: no bar.
        json: progress and outcome as lines of JSON.
        image_root: a folder besides the image's own in which backing files may be.
    """
    from blockjobs.cli.amend import amend as run

    return run(
        file,
        existing,
        options=options or (),
        force=force,
        cache=cache,
        progress=progress and not quiet,
        as_json=json,
        roots=image_root,
    )


def snapshot(
    file: str,
    /,
    *,
    list_: Annotated[Switch, Parameter(name=("-l", "--list"))] = False,
    create: Annotated[str | None, Parameter(name=("-c", "--create"))] = None,
    apply: Annotated[str | None, Parameter(name=("-a", "--apply"))] = None,
    delete: Annotated[str | None, Parameter(name=("-d", "--delete"))] = None,
    existing: Existing = AN_EXISTING,
    force_share: ForceShare = False,
    quiet: Quiet = False,
    answer: Answer = FOR_PEOPLE,
) -> int:
    """Make, apply, delete or list snapshots inside an image that nobody uses.

    Args:
        file: the image.
        list_: list them; also if nothing else is asked for.
        create: keep the disk as it is now, under this name.
        apply: make the disk what it was; a name, or the number that the list shows.
        delete: forget the snapshot of this name.
        force_share: as qemu-img has it; snapshots of an image in use are listed in any case.
        quiet: as qemu-img has it; what is done is done in silence anyway.
    """
    if (list_, create, apply, delete).count(None) + (not list_) < 3:
        raise UsageError("Cannot mix '-l', '-a', '-c', '-d'")
    if force_share and (create or apply or delete):
        raise UsageError("-U is for -l only: an image that somebody may be using must not change")
    del quiet
    from blockjobs.cli.snapshot import snapshot as run

    return run(file, existing, create=create, apply=apply, delete=delete, as_json=answer.as_json)
