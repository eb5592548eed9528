"""Commands on image files, declared; the work is in the modules that they import when run."""

from typing import Annotated, Literal

from cyclopts import Parameter

from blockjobs.cli.arguments import (
    AN_EXISTING,
    DEFAULT_COPYING,
    FOR_PEOPLE,
    Answer,
    AsJson,
    CacheMode,
    Copying,
    Existing,
    ForceShare,
    Format,
    ImageRoots,
    Options,
    Progress,
    Quiet,
    Size,
    SourceFormat,
    Switch,
    TargetFormat,
)


def backup(
    source: str,
    target: str,
    /,
    *,
    copying: Copying = DEFAULT_COPYING,
    existing: Existing = AN_EXISTING,
    target_format: TargetFormat = None,
    options: Options = None,
    force: Annotated[Switch, Parameter(name="--force")] = False,
    keep_partial: Switch = False,
    image_root: ImageRoots = None,
    quiet: Annotated[Switch, Parameter(name=("-q", "--quiet"))] = False,
    json: AsJson = False,
) -> int:
    """Copy an image as it is at this instant.

    The copy is written to TARGET.partial and gets its name once it is complete and on disk. Ctrl-C stops cleanly.
    NBD exports (nbd://HOST[:PORT]/EXPORT, nbd+unix:///EXPORT?socket=PATH) can be either side; as a target, an export
    of the source's size is overwritten.

    Args:
        source: the image to copy.
        target: the new image. Its suffix chooses its format (.raw, .img: raw, else qcow2) unless -O does.
        target_format: format of the target.
        options: options of the target, as qemu-img has them (cluster_size=128K,...).
        force: replace TARGET if it exists.
        keep_partial: keep TARGET.partial if the backup fails or is cancelled.
        image_root: a folder besides the source's own in which backing files may be.
        quiet: no progress bar on terminals, only lines.
        json: progress and outcome as JSON, one object a line, on standard output.
    """
    from blockjobs.cli.backup import back_up

    return back_up(
        source=source,
        target=target,
        copying=copying,
        existing=existing,
        target_format=target_format,
        options=options,
        as_json=json,
        quiet=quiet,
        replace=force,
        keep_partial=keep_partial,
        roots=image_root,
    )


def create(
    file: str,
    size: Size | None = None,
    /,
    *,
    format: SourceFormat = None,
    options: Options = None,
    backing: Annotated[str | None, Parameter(name=("-b", "--backing"))] = None,
    backing_format: Annotated[Format | None, Parameter(name=("-F", "--backing-format"))] = None,
    unsafe: Annotated[Switch, Parameter(name=("-u", "--unsafe"))] = False,
    force: Switch = False,
    image_root: ImageRoots = None,
    quiet: Quiet = False,
    json: AsJson = False,
) -> int:
    """Make an empty image.

    Args:
        file: the new image.
        size: what the disk shows, such as 10G; with a backing file its size is the default.
        format: qcow2 or raw; by default what the suffix says, else qcow2.
        options: options of the format, as qemu-img has them (cluster_size=128K,...); "help" lists them.
        backing: the image below a new qcow2 overlay; relative names count from the folder of FILE.
        backing_format: its format.
        unsafe: do not look whether the backing file is there; SIZE must be given.
        force: replace FILE if it exists.
        image_root: a folder besides the backing file's own in which its backing files may be.
        quiet: say nothing but errors.
        json: print what was made as JSON.
    """
    from blockjobs.cli.create import create as make

    return make(
        file,
        size,
        format=format,
        options=options,
        backing=backing,
        backing_format=backing_format,
        unchecked=unsafe,
        replace=force,
        quiet=quiet,
        as_json=json,
        roots=image_root,
    )


def info(
    file: str,
    /,
    *,
    existing: Existing = AN_EXISTING,
    backing_chain: Switch = False,
    image_root: ImageRoots = None,
    force_share: ForceShare = False,
    answer: Answer = FOR_PEOPLE,
) -> int:
    """Describe an image from its own headers; nothing that it refers to is opened unless you ask for the chain.

    Args:
        file: the image; it may be in use.
        backing_chain: describe the images below it too.
        image_root: a folder besides the image's own in which backing files may be.
        force_share: as qemu-img has it; an image in use is described in any case.
    """
    del force_share
    from blockjobs.cli.look import info as show

    return show(file, existing, backing_chain=backing_chain, as_json=answer.as_json, roots=image_root)


def check(
    file: str,
    /,
    *,
    repair: Annotated[Literal["leaks", "all"] | None, Parameter(name=("-r", "--repair"))] = None,
    existing: Existing = AN_EXISTING,
    cache: Annotated[CacheMode, Parameter(name=("-T", "--cache"))] = "writeback",
    force_share: ForceShare = False,
    quiet: Quiet = False,
    answer: Answer = FOR_PEOPLE,
) -> int:
    """Look for damage in a qcow2 image, and repair its reference counts on request.

    Exit codes: 0 sound, 1 could not check, 2 damaged, 3 only wasted space (leaks), 63 the format has no checks.

    Args:
        file: the image; nobody may be writing to it.
        repair: "leaks" gives wasted space back, "all" also repairs wrong reference counts and unclean shutdowns.
        cache: "none" and "directsync" go past the host's page cache.
        force_share: check it though somebody may be writing to it; damage that is found may be none.
        quiet: say nothing but errors.
    """
    from blockjobs.cli.check import check as run_check

    return run_check(
        file,
        existing,
        repair=repair,
        cache=cache,
        force_share=force_share,
        quiet=quiet,
        as_json=answer.as_json,
    )


def map(
    file: str,
    /,
    *,
    existing: Existing = AN_EXISTING,
    start_offset: Annotated[Size, Parameter(name=("-s", "--start-offset"))] = 0,
    max_length: Annotated[Size | None, Parameter(name=("-l", "--max-length"))] = None,
    image_root: ImageRoots = None,
    force_share: ForceShare = False,
    answer: Answer = FOR_PEOPLE,
) -> int:
    """Show which parts of a disk are stored, and where. JSON has every run, also the empty ones.

    Args:
        file: the image.
        start_offset: where on the disk to begin (64K).
        max_length: how much of it to show; by default the rest.
        image_root: a folder besides the image's own in which backing files may be.
        force_share: look though somebody may be writing to it.
    """
    from blockjobs.cli.look import show_map

    return show_map(
        file,
        existing,
        start=start_offset,
        length_max=max_length,
        force_share=force_share,
        as_json=answer.as_json,
        roots=image_root,
    )


def compare(
    one: str,
    other: str,
    /,
    *,
    format: SourceFormat = None,
    other_format: Annotated[Format | None, Parameter(name=("-F", "--other-format"))] = None,
    image_opts: Switch = False,
    strict: Annotated[Switch, Parameter(name=("-s", "--strict"))] = False,
    cache: Annotated[CacheMode, Parameter(name=("-T", "--cache"))] = "writeback",
    force_share: ForceShare = False,
    progress: Progress = False,
    quiet: Quiet = False,
    image_root: ImageRoots = None,
    json: AsJson = False,
) -> int:
    """Say whether two images read the same, whatever their formats.

    Exit codes: 0 identical, 1 different, 2 could not compare.

    Args:
        one: an image.
        other: another; where one is longer, its rest must be zero.
        format: format of ONE; without it, name and content must agree on one.
        other_format: format of OTHER.
        image_opts: both are no paths but the options of nodes: driver=qcow2,file.filename=a.qcow2,...
        strict: different sizes are a difference, and so is what only one of them has allocated or stored.
        cache: "none" and "directsync" go past the host's page cache.
        force_share: the images may be in use by a writer.
        progress: show a bar.
        quiet: only the exit code says it.
        image_root: a folder besides the images' own in which backing files may be.
        json: the verdict as JSON; there the first difference is told to the byte.
    """
    from blockjobs.cli.compare import compare as run_compare

    return run_compare(
        one,
        other,
        format=format,
        other_format=other_format,
        image_opts=image_opts,
        strict=strict,
        cache=cache,
        force_share=force_share,
        progress=progress,
        quiet=quiet,
        as_json=json,
        roots=image_root,
    )
