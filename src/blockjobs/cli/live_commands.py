"""Commands on disks in use, declared; the work is in the modules that they import when run."""

from blockjobs.cli.app import LIVE, app
from blockjobs.cli.arguments import AsJson, ImageRoots, SourceFormat, Switch


@app.command(group=LIVE)
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
