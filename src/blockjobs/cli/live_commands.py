"""Commands on disks in use, declared; the work is in the modules that they import when run."""

from typing import Annotated

from cyclopts import App, Parameter

from blockjobs.cli.app import NO_NEGATIVES
from blockjobs.cli.arguments import (
    AN_EXISTING,
    DEFAULT_MIRROR,
    AsJson,
    CacheMode,
    Existing,
    ImageRoots,
    JobId,
    Mirror,
    OnError,
    OnServer,
    Options,
    Progress,
    Quiet,
    Size,
    Switch,
    TargetFormat,
)


def mirror(
    source: str,
    target: str,
    /,
    *,
    copying: Mirror = DEFAULT_MIRROR,
    connect: OnServer = None,
    job: JobId = "mirror",
    existing: Existing = AN_EXISTING,
    target_format: TargetFormat = None,
    options: Options = None,
    force: Switch = False,
    keep_partial: Switch = False,
    image_root: ImageRoots = None,
    quiet: Quiet = False,
    json: AsJson = False,
) -> int:
    """Copy a disk while it is being written to, and end with both alike.

    With --connect SOURCE is an image or node of that server, which makes TARGET. When the copy has caught up, it is
    ended there; with --pivot everybody who uses SOURCE goes on with TARGET; with --stay it follows until Ctrl-C.

    Args:
        source: the image to copy.
        target: the new image. Its suffix chooses its format (.raw, .img: raw, else qcow2) unless -O does.
        connect: path of the server's QMP socket, or host:port.
        job: id of the job.
        target_format: format of the target.
        options: options of the target, as qemu-img has them (cluster_size=128K,...).
        force: replace TARGET if it exists.
        keep_partial: keep TARGET.partial if the mirror fails or is cancelled.
        image_root: a folder besides the source's own in which backing files may be.
        quiet: no progress bar on terminals, only lines.
        json: progress and outcome as JSON, one object a line, on standard output.
    """
    from blockjobs.cli.mirror import mirror as run_mirror

    return run_mirror(
        source=source,
        target=target,
        mirror=copying,
        connect=connect,
        job=job,
        existing=existing,
        target_format=target_format,
        options=options or (),
        replace=force,
        keep_partial=keep_partial,
        roots=image_root,
        quiet=quiet,
        as_json=json,
    )


def commit(
    image: str,
    /,
    *,
    top: str | None = None,
    base: Annotated[str | None, Parameter(name=("-b", "--base"))] = None,
    speed: Annotated[Size, Parameter(name=("-r", "--speed"))] = 0,
    on_error: OnError = "report",
    connect: OnServer = None,
    job: JobId = "commit",
    existing: Existing = AN_EXISTING,
    keep: Annotated[Switch, Parameter(name=("-d", "--keep"))] = False,
    cache: Annotated[CacheMode, Parameter(name=("-t", "--cache"))] = "writeback",
    progress: Progress = False,
    image_root: ImageRoots = None,
    quiet: Quiet = False,
    json: AsJson = False,
) -> int:
    """Merge images of a chain downwards: what TOP and those below it hold goes into BASE.

    Without --top and --base what IMAGE holds goes into the image below it, and IMAGE is empty afterwards. Otherwise
    images between, and TOP, are not needed any more afterwards; they are left as they are.

    Args:
        image: the active image of the chain; with --connect an image or node of that server.
        top: the uppermost image to merge; by default IMAGE itself.
        base: the image to merge into; by default the one below IMAGE, with --top or --connect the lowest of the chain.
        speed: at most so many bytes a second (100M); 0 is no limit.
        on_error: what an I/O error does: "report" ends the job, "stop" waits, "ignore" tries again.
        connect: path of the server's QMP socket, or host:port.
        job: id of the job.
        keep: do not empty IMAGE; a server never does.
        cache: "none" and "directsync" go past the host's page cache; "unsafe" does not wait for the disk.
        progress: as qemu-img has it; terminals see a bar anyway.
        image_root: a folder besides the image's own in which backing files may be.
        quiet: no progress bar on terminals, only lines.
        json: progress and outcome as JSON, one object a line, on standard output.
    """
    from blockjobs.cli.chains import Shortening

    del progress
    work = Shortening(
        "block-commit",
        image,
        links={"top-node": top, "base-node": base},
        speed=speed,
        on_error=on_error,
        job=job,
        as_json=json,
        quiet=quiet,
        cache=cache,
        empties=not (keep or top or base),
    )
    code = work.there(connect) if connect else work.here(existing, roots=image_root)
    if code == 0 and not (quiet or json):
        print("Image committed.")
    return code


def stream(
    image: str,
    /,
    *,
    base: str | None = None,
    speed: Size = 0,
    on_error: OnError = "report",
    connect: OnServer = None,
    job: JobId = "stream",
    existing: Existing = AN_EXISTING,
    image_root: ImageRoots = None,
    quiet: Quiet = False,
    json: AsJson = False,
) -> int:
    """Pull what the images below hold into an image, so that it does not need them any more.

    Args:
        image: the image to fill; with --connect an image or node of that server.
        base: the image that it goes on needing; by default none.
        speed: at most so many bytes a second (100M); 0 is no limit.
        on_error: what a read error does: "report" ends the job, "stop" waits, "ignore" fails at the end.
        connect: path of the server's QMP socket, or host:port.
        job: id of the job.
        image_root: a folder besides the image's own in which backing files may be.
        quiet: no progress bar on terminals, only lines.
        json: progress and outcome as JSON, one object a line, on standard output.
    """
    from blockjobs.cli.chains import Shortening

    work = Shortening(
        "block-stream",
        image,
        links={"base-node": base},
        speed=speed,
        on_error=on_error,
        job=job,
        as_json=json,
        quiet=quiet,
    )
    return work.there(connect) if connect else work.here(existing, roots=image_root)


def serve(
    images: list[str],
    /,
    *,
    qmp: str,
    existing: Existing = AN_EXISTING,
    read_only: Switch = False,
    image_root: ImageRoots = None,
    json: AsJson = False,
) -> int:
    """Open images and serve QMP until Ctrl-C.

    Args:
        images: become nodes named like the files.
        qmp: the socket to make: a path, or host:port (without any protection: localhost only).
        read_only: never write to them.
        image_root: a folder besides the images' own in which backing files may be.
        json: say where and what as JSON.
    """
    from blockjobs.cli.serve import serve as run_server

    return run_server(images, qmp=qmp, existing=existing, read_only=read_only, as_json=json, roots=image_root)


nbd = App(name="nbd", help="Let NBD clients (QEMU, nbdcopy, the kernel) use images.", default_parameter=NO_NEGATIVES)


@nbd.command(name="serve")
def nbd_serve(
    images: list[str],
    /,
    *,
    socket: str | None = None,
    listen: str = "localhost:10809",
    writable: Switch = False,
    tls: str | None = None,
    max_clients: int = 100,
    qmp: str | None = None,
    existing: Existing = AN_EXISTING,
    image_root: ImageRoots = None,
    json: AsJson = False,
) -> int:
    """Export images over NBD until Ctrl-C; jobs can copy and move them meanwhile (--qmp).

    Args:
        images: each is exported under its file's name without the suffix.
        socket: the unix socket to make.
        listen: host:port to listen at instead; without --tls everybody who reaches it may read.
        writable: clients may write; without it nobody does, and the images may be in use for reading elsewhere.
        tls: a folder with ca-cert.pem, server-cert.pem and server-key.pem: clients must prove themselves with a
            certificate of that authority.
        max_clients: clients at once, 0 for any number.
        qmp: a QMP socket to make besides, a path or host:port, for jobs on the images.
        image_root: a folder besides the images' own in which backing files may be.
        json: say where and what as JSON.
    """
    from blockjobs.cli.serve import Nbd, serve

    return serve(
        images,
        qmp=qmp,
        nbd=Nbd(socket=socket, listen=listen, tls=tls, clients_max=max_clients),
        existing=existing,
        read_only=not writable,
        as_json=json,
        roots=image_root,
    )
