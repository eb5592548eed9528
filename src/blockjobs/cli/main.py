"""The command `blockjobs`: what it can do, declared; the work is in the modules that the commands import when run."""

import os
import sys
from collections.abc import Sequence
from typing import Annotated, Final, Literal

from cyclopts import App, Group, Parameter
from cyclopts.exceptions import CycloptsError

from blockjobs import __version__
from blockjobs.base.errors import BlockjobsError, IoFailure
from blockjobs.cli.arguments import (
    DEFAULT_COPYING,
    AsJson,
    Connect,
    Copying,
    Format,
    ImageRoots,
    Options,
    Size,
    SourceFormat,
    Switch,
    TargetFormat,
    explain,
)

IMAGES: Final = Group("Images", sort_key=0)
JOBS: Final = Group("Jobs of a server (give its QMP socket with --connect)", sort_key=1)

TRACEBACK_VARIABLE: Final = "BLOCKJOBS_TRACEBACK"

app = App(
    name="blockjobs",
    help="Back up, make and look at disk images, and steer the background jobs of any QMP server.",
    version=__version__,
    suppress_keyboard_interrupt=False,
    default_parameter=Parameter(negative=()),
)


@app.command(group=IMAGES)
def backup(
    source: str,
    target: str,
    /,
    *,
    copying: Copying = DEFAULT_COPYING,
    format: SourceFormat = None,
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

    Args:
        source: the image to copy.
        target: the new image. Its suffix chooses its format (.raw, .img: raw, else qcow2) unless -O does.
        format: format of the source; without it, name and content must agree on one.
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
        source_format=format,
        target_format=target_format,
        options=options,
        as_json=json,
        quiet=quiet,
        replace=force,
        keep_partial=keep_partial,
        roots=image_root,
    )


@app.command(group=IMAGES)
def create(
    file: str,
    size: Size | None = None,
    /,
    *,
    format: SourceFormat = None,
    options: Options = None,
    backing: Annotated[str | None, Parameter(name=("-b", "--backing"))] = None,
    backing_format: Annotated[Format | None, Parameter(name=("-F", "--backing-format"))] = None,
    force: Switch = False,
    image_root: ImageRoots = None,
    json: AsJson = False,
) -> int:
    """Make an empty image.

    Args:
        file: the new image.
        size: what the disk shows, such as 10G; with a backing file its size is the default.
        format: qcow2 or raw; by default what the suffix says, else qcow2.
        options: options of the format, as qemu-img has them (cluster_size=128K,compression_type=zstd,...).
        backing: the image below a new qcow2 overlay; relative names count from the folder of FILE.
        backing_format: its format.
        force: replace FILE if it exists.
        image_root: a folder besides the backing file's own in which its backing files may be.
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
        replace=force,
        as_json=json,
        roots=image_root,
    )


@app.command(group=IMAGES)
def info(file: str, /, *, format: SourceFormat = None, json: AsJson = False) -> int:
    """Describe an image from its own headers; nothing that it refers to is opened.

    Args:
        file: the image; it may be in use.
        format: qcow2 or raw; without it, name and content must agree on one.
        json: as `qemu-img info --output=json`.
    """
    from blockjobs.cli.look import info as show

    return show(file, format=format, as_json=json)


@app.command(group=IMAGES)
def check(
    file: str,
    /,
    *,
    repair: Annotated[Literal["leaks", "all"] | None, Parameter(name=("-r", "--repair"))] = None,
    format: SourceFormat = None,
    json: AsJson = False,
) -> int:
    """Look for damage in a qcow2 image, and repair its reference counts on request.

    Exit codes: 0 sound, 1 could not check, 2 damaged, 3 only wasted space (leaks), 63 the format has no checks.

    Args:
        file: the image; nobody may be writing to it.
        repair: "leaks" gives wasted space back, "all" also repairs wrong reference counts and unclean shutdowns.
        format: qcow2 or raw; without it, name and content must agree on one.
        json: as `qemu-img check --output=json`.
    """
    from blockjobs.cli.check import check as run_check

    return run_check(file, repair=repair, format=format, as_json=json)


@app.command(group=IMAGES)
def map(file: str, /, *, format: SourceFormat = None, image_root: ImageRoots = None, json: AsJson = False) -> int:
    """Show which parts of a disk are stored, and where.

    Args:
        file: the image.
        format: qcow2 or raw; without it, name and content must agree on one.
        image_root: a folder besides the image's own in which backing files may be.
        json: every run, also the empty ones, as `qemu-img map --output=json`.
    """
    from blockjobs.cli.look import show_map

    return show_map(file, format=format, as_json=json, roots=image_root)


@app.command(group=IMAGES)
def compare(
    one: str,
    other: str,
    /,
    *,
    format: SourceFormat = None,
    other_format: Annotated[Format | None, Parameter(name=("-F", "--other-format"))] = None,
    strict: Annotated[Switch, Parameter(name=("-s", "--strict"))] = False,
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
        strict: different sizes are a difference.
        image_root: a folder besides the images' own in which backing files may be.
        json: the verdict as JSON.
    """
    from blockjobs.cli.look import compare as run_compare

    return run_compare(
        one,
        other,
        format=format,
        other_format=other_format,
        strict=strict,
        as_json=json,
        roots=image_root,
    )


@app.command(group=IMAGES)
def serve(
    images: list[str],
    /,
    *,
    qmp: str,
    format: SourceFormat = None,
    read_only: Switch = False,
    image_root: ImageRoots = None,
    json: AsJson = False,
) -> int:
    """Open images and serve QMP until Ctrl-C.

    Args:
        images: become nodes named like the files.
        qmp: the socket to make: a path, or host:port (without any protection: localhost only).
        format: format of all of them; without it, name and content must agree on one.
        read_only: never write to them.
        image_root: a folder besides the images' own in which backing files may be.
        json: say where and what as JSON.
    """
    from blockjobs.cli.serve import serve as run_server

    return run_server(images, qmp=qmp, format=format, read_only=read_only, as_json=json, roots=image_root)


@app.command(group=JOBS)
def jobs(*, connect: Connect, json: AsJson = False) -> int:
    """List the jobs.

    Args:
        connect: path of the server's QMP socket, or host:port.
        json: what query-jobs and query-block-jobs say.
    """
    from blockjobs.cli.remote import list_jobs

    return list_jobs(connect, as_json=json)


@app.command(group=JOBS)
def watch(job: str | None = None, /, *, connect: Connect, json: AsJson = False) -> int:
    """Show progress until a job, or every job there is, has ended.

    Args:
        job: its id.
        connect: path of the server's QMP socket, or host:port.
        json: progress and outcomes as JSON, one object a line.
    """
    from blockjobs.cli.watch import watch as follow

    return follow(connect, job, as_json=json)


@app.command(group=JOBS)
def cancel(job: str, /, *, connect: Connect, force: Switch = False, json: AsJson = False) -> int:
    """Cancel a job.

    Args:
        job: its id.
        connect: path of the server's QMP socket, or host:port.
        force: also if it is paused; a mirror that is ready stops in the middle instead of ending well.
        json: what is left of it as JSON.
    """
    from blockjobs.cli.remote import cancel as run_cancel

    return run_cancel(connect, job, force=force, as_json=json)


@app.command(group=JOBS)
def speed(job: str, rate: Size, /, *, connect: Connect, json: AsJson = False) -> int:
    """Change the rate limit of a job.

    Args:
        job: its id.
        rate: bytes a second, such as 100M; 0 is no limit.
        connect: path of the server's QMP socket, or host:port.
        json: the job as JSON.
    """
    from blockjobs.cli.remote import set_speed

    return set_speed(connect, job, rate, as_json=json)


def _add_verb(verb: str, help: str) -> None:
    def use(job: str, /, *, connect: Connect, json: AsJson = False) -> int:
        from blockjobs.cli.remote import use_verb

        return use_verb(connect, verb, job, as_json=json)

    use.__doc__ = f"""{help}

    Args:
        job: its id.
        connect: path of the server's QMP socket, or host:port.
        json: the job as JSON.
    """
    app.command(use, name=verb, group=JOBS)


_add_verb("pause", "Hold a job at its next checkpoint.")
_add_verb("resume", "Let a paused job go on.")
_add_verb("complete", "Ask a ready job to finish.")
_add_verb("finalize", "Settle a pending job, and its whole group.")
_add_verb("dismiss", "Forget a concluded job.")


def main(words: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code. Errors are one line on standard error.

    Args:
        words: without the program's name; the process's own by default.
    """
    words = sys.argv[1:] if words is None else words
    # 1 says "different" there.
    failed = 2 if words[:1] == ["compare"] else 1
    try:
        code = app(words, exit_on_error=False, print_error=False, result_action="return_value")
        sys.stdout.flush()
    except CycloptsError as error:
        return _fail(explain(error, words), failed)
    except IoFailure as error:
        return _fail(f"{error.where}: {error}" if error.where else str(error), failed)
    except BlockjobsError as error:
        return _fail(str(error), failed)
    except BrokenPipeError:
        # Whoever read our output has seen enough; what is left in the buffer must not raise again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return failed
    except OSError as error:
        where = f"'{error.filename}': " if error.filename else ""
        return _fail(f"{where}{error.strerror or error}", failed)
    except KeyboardInterrupt:
        return 130
    except Exception as error:  # a bug: one line for people, all of it for us
        if os.environ.get(TRACEBACK_VARIABLE):
            raise
        what = f"{type(error).__name__}: {' '.join(str(error).split())}"
        return _fail(f"internal error, please report it ({what}; {TRACEBACK_VARIABLE}=1 shows more)", failed)
    return code if isinstance(code, int) else 0


def _fail(text: str, code: int) -> int:
    print(f"blockjobs: {text}", file=sys.stderr)
    return code
