"""What a person names as an image: a path, an NBD URI, or the options of a node, in one form.

`--image-opts` takes `driver=qcow2,file.filename=a.qcow2,...`: the members of `blockdev-add` with dots. As in qemu-img
the driver of a file may be left out; the format may be too where name and content of the file agree on one.
`json:{"driver": "qcow2", "file": {...}}` says the same, wherever an image is asked for that is there already.
`blkdebug:RULES:IMAGE` is an image with faults on purpose, by the rules in a file.
"""

import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final

from msgspec import Struct, structs

from blockjobs.base.errors import BlockjobsError, UsageError
from blockjobs.block.nbd_uri import is_export
from blockjobs.cli.formats import format_of, local_name
from blockjobs.cli.images import (
    bitmap_file,
    encryption_of,
    file_options,
    image_defaults,
    named,
    open_described,
    open_image,
)

if TYPE_CHECKING:
    from blockjobs.block.node import Node
    from blockjobs.host import ImageHost

Members = dict[str, Any]
_JSON: Final = "json:"
_WITH_FAULTS: Final = "blkdebug:"
_WITHOUT_FILE: Final = ("null-co://", "null-aio://")


class Image(Struct, frozen=True):
    """An image that exists already.

    Attributes:
        given: as it was named, for messages.
        path: of the file or device that holds it, or its URI; empty if it is neither, such as a described NBD export.
        format: driver of the node that shows the disk.
        options: what `--image-opts` says of that node, typed as `blockdev-add` wants it; None if it was named by path.
    """

    given: str
    path: str
    format: str
    options: Members | None = None

    @property
    def folder_of(self) -> tuple[str, ...]:
        """The path, if there is one: for `image_roots`."""
        return (self.path,) if self.path else ()

    def file(self) -> Members:
        """Options of the node that holds the image; for a driver without one below it, its own.

        Raises:
            UsageError: an URI that makes no sense.
        """
        if self.options is None:
            return file_options(self.path)
        below = self.options.get("file", self.options)
        assert isinstance(below, dict), "references are refused when the options are read"
        return below

    async def open(self, host: "ImageHost", *, name: str, read_only: bool = True, **more: Any) -> "Node":
        """Open it with its backing chain; what the user said of the node goes before what the command needs.

        Args:
            name: of the node.
            read_only: whether nobody may write.
            more: further options of the node.

        Raises:
            UsageError: it cannot be opened; the text names it.
        """
        if self.options is None:
            return await open_image(host, self.path, self.format, name=name, read_only=read_only, **more)
        defaults = image_defaults(host, self.path, self.format, read_only=read_only) | more
        return await open_described(host, self.path or self.given, defaults | self.options | {"node-name": name})

    async def open_recording(self, host: "ImageHost", *, name: str, changes: bool) -> "Node":
        """As `open`; with `changes` its dirty bitmaps may change and be made, also those beside a raw image.

        Raises:
            UsageError: it cannot be opened.
        """
        beside = bitmap_file(self.path, self.format) if changes and self.path else {}
        return await self.open(host, name=name, read_only=not changes, **beside)

    async def open_snapshot(
        self, host: "ImageHost", snapshot: str | None, *, name: str, **more: Any
    ) -> "tuple[Node, int]":
        """As `open`, to be read; with `snapshot` the disk is what it was when that one was made.

        Returns:
            The node, and the length of the disk as it is, which a snapshot need not have had.

        Args:
            snapshot: a number or a name, or `snapshot.id=NUMBER`, `snapshot.name=NAME`, or both with a comma.

        Raises:
            UsageError: it cannot be opened, or has no such snapshot.
        """
        node = await self.open(host, name=name, **more)
        length = node.length
        if snapshot is not None:
            try:
                await _view(node, snapshot)
            except BlockjobsError as error:
                raise self.named(UsageError(f"Failed to load snapshot: {error}")) from error
        return node, length

    def named(self, error: BlockjobsError) -> UsageError:
        """The same error with the image in front where its text does not mention it."""
        return named(self.path or self.given, error)


def given_image(text: str, format: str | None, *, image_opts: bool = False) -> Image:
    """What `text` names.

    Args:
        text: a path or URI, or the options of a node (also as `json:{...}`).
        format: what the user chose with -f.
        image_opts: whether it is options.

    Raises:
        UsageError: no such file, options that make no sense, or the format must be said.
    """
    if not image_opts and is_description(text):
        return _by_json(text, format)
    if not image_opts and text.startswith(_WITH_FAULTS):
        return _with_faults(text, format)
    if not image_opts and text in _WITHOUT_FILE:
        driver = format or "raw"
        return Image(text, "", driver, {"driver": driver, "file": {"driver": text.removesuffix("://")}})
    if not image_opts:
        return Image(text, local_name(text), format_of(text, format))
    if format is not None:
        raise UsageError("--image-opts and --format are mutually exclusive: say driver=... in the options")
    try:
        return _described(text)
    except UsageError as error:
        raise UsageError(str(error) if text in str(error) else f"--image-opts '{text}': {error}") from error


async def _view(node: "Node", wanted: str) -> None:
    snapshots = node.driver.internal_snapshots
    if snapshots is None:
        raise UsageError(f"a {node.driver_name} image has none")
    parts = dict(part.partition("=")[::2] for part in wanted.split(","))
    exact = bool(parts) and set(parts) <= {"snapshot.id", "snapshot.name"}
    shown = [each for each in snapshots.entries if each.is_shown]
    if exact:
        found = [
            each
            for each in shown
            if parts.get("snapshot.id", each.id) == each.id and parts.get("snapshot.name", each.name) == each.name
        ]
    else:
        found = [each for each in shown if each.id == wanted] or [each for each in shown if each.name == wanted]
    if not found:
        raise UsageError("Can't find snapshot")
    await snapshots.view(found[0].id)


def given_images(texts: Sequence[str], format: str | None, *, image_opts: bool = False) -> list[Image]:
    """As `given_image`, for several that the same options hold for."""
    return [given_image(text, format, image_opts=image_opts) for text in texts]


def is_description(name: str) -> bool:
    """Whether a name is `json:{...}`."""
    return name.startswith(_JSON)


def _by_json(text: str, format: str | None) -> Image:
    """As `_described`, for `json:{...}`; there keys may be nested, or have dots.

    Raises:
        UsageError: it makes no sense; the text names it.
    """
    try:
        try:
            members = json.loads(text.removeprefix(_JSON))
        except ValueError as error:
            raise UsageError(f"Could not parse the JSON options: {error}") from error
        if not isinstance(members, dict):
            raise UsageError("Could not parse the JSON options: Expecting an object")
        if format is not None and members.setdefault("driver", format) != format:
            raise UsageError(f"-f {format}: the description says driver '{members['driver']}'")
        image = _described(",".join(_pairs(members, "")))
    except UsageError as error:
        raise UsageError(f"Could not open '{text}': {error}") from error
    options = image.options
    if options is not None and "backing" in members and members["backing"] is None:
        options["backing"] = None
    return structs.replace(image, given=text)


def _with_faults(text: str, format: str | None) -> Image:
    """Raises UsageError: no such image, or rules that make no sense."""
    from blockjobs.block.options import BlockdevOptions
    from blockjobs.cli.fault_rules import blkdebug_members
    from blockjobs.schema.keyval import typed

    rules, colon, name = text.removeprefix(_WITH_FAULTS).partition(":")
    if not colon:
        raise UsageError(f"Could not open '{text}': blkdebug requires both config file and image path")
    driver, path = format_of(name, format), local_name(name)
    below = blkdebug_members(rules, file_options(name))
    try:
        return Image(text, path, driver, typed({"driver": driver, "file": below}, BlockdevOptions))
    except UsageError as error:
        raise UsageError(f"Could not open '{text}': {error}") from error


def _pairs(value: Any, key: str) -> Iterator[str]:
    """A JSON value as `key=value` of --image-opts."""
    if isinstance(value, dict | list):
        for name, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _pairs(item, f"{key}.{name}" if key else str(name))
    elif isinstance(value, bool):
        yield f"{key}={'on' if value else 'off'}"
    elif value is not None:
        yield f"{key}={value}".replace(",", ",,")


def _described(text: str) -> Image:
    from blockjobs.block.options import BlockdevOptions, driver_named
    from blockjobs.schema.keyval import parse_members, typed

    members = parse_members(text)
    _complete(members)
    path = _path(members)
    if "driver" not in members:
        if "file" not in members:
            raise UsageError("Must specify either driver or file")
        if not path or is_export(path):
            raise UsageError("say the format with driver=raw or driver=qcow2")
        members["driver"] = format_of(path, None)
    driver = str(members["driver"])
    encrypt = members.get("encrypt")
    if driver == "qcow2" and isinstance(encrypt, dict) and "format" not in encrypt and (kind := encryption_of(path)):
        encrypt["format"] = kind
    if driver_named(driver) is None:
        raise UsageError(f"Unknown driver '{driver}'")
    if driver in ("qcow2", "raw", "luks") and "file" not in members:
        raise UsageError('A block device must be specified for "file" (file.filename=...)')
    return Image(text, path, driver, typed(members, BlockdevOptions))


def _complete(members: Members) -> None:
    """Say the driver of every member that is only a file name; there are no other nodes to refer to."""
    for name, value in members.items():
        if name in ("file", "backing", "data-file") and isinstance(value, str) and value:
            raise UsageError(f"Cannot find node-name='{value}': describe the node ({name}.filename=...)")
        if isinstance(value, dict):
            _complete(value)
            if "driver" not in value and isinstance(value.get("filename"), str):
                members[name] = file_options(value["filename"]) | {
                    key: item for key, item in value.items() if key != "filename"
                }


def _path(members: Members) -> str:
    """Of the file at the bottom of `file` members."""
    below: Any = members
    while isinstance(below.get("file"), dict):
        below = below["file"]
    return str(below.get("filename", ""))
