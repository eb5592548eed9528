"""The types of command line parameters, and errors in one line that says what to do."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal

from cyclopts import Parameter, Token
from cyclopts.exceptions import (
    CycloptsError,
    MissingArgumentError,
    UnknownCommandError,
    UnknownOptionError,
    UnusedCliTokensError,
)

from blockjobs.base.units import parse_size

CONNECT_VARIABLE: Final = "BLOCKJOBS_CONNECT"


def read_size(type_: Any, tokens: Sequence[Token]) -> int:
    """Convert one word, for cyclopts.

    Raises:
        ValueError: it is no size; the text says what a size looks like.
    """
    del type_
    return parse_size(tokens[0].value)


Format = Literal["qcow2", "raw", "luks"]
Size = Annotated[int, Parameter(converter=read_size)]
SourceFormat = Annotated[Format | None, Parameter(name=("-f", "--format"))]
TargetFormat = Annotated[Format | None, Parameter(name=("-O", "--target-format"))]
Options = Annotated[list[str] | None, Parameter(name=("-o", "--options"))]
AsJson = Annotated[bool, Parameter(name="--json")]
Output = Annotated[Literal["human", "json"], Parameter(name="--output")]
ForceShare = Annotated[bool, Parameter(name=("-U", "--force-share"))]
Progress = Annotated[bool, Parameter(name=("-p", "--progress"))]
Quiet = Annotated[bool, Parameter(name=("-q", "--quiet"))]
Switch = bool
CacheMode = Literal["none", "writeback", "writethrough", "directsync", "unsafe"]
Connect = Annotated[str, Parameter(name="--connect", env_var=CONNECT_VARIABLE)]
OnServer = Annotated[str | None, Parameter(name="--connect")]
JobId = Annotated[str, Parameter(name="--job")]
ImageRoots = Annotated[list[str] | None, Parameter(name="--image-root")]
OnError = Literal["report", "ignore", "enospc", "stop"]


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Copying:
    """How a backup copies.

    Attributes:
        sync: "full" copies what the disk shows, "top" only what the image holds itself, on the same backing file.
        compress: store compressed clusters of this kind (qcow2 targets).
        level: how hard to compress.
        speed: at most so many bytes a second (100M); 0 is no limit.
        on_source_error: what a read error does: "report" ends the backup, "stop" waits until you `kill -CONT` it,
            "ignore" tries again until it works, "enospc" stops if space ran out and reports the rest.
        on_target_error: the same for write errors.
        bitmap: a dirty bitmap of the source that is to record what changes after this backup, so that the next one can
            be incremental; it is made if the source has none of that name, else it begins anew.
        incremental: copy only what this dirty bitmap has recorded since the last backup, and begin it anew.
        base: the backup that an incremental one builds on; it becomes the backing file of TARGET.
        connect: path of a server's QMP socket, or host:port: SOURCE is an image or node of that server.
        job: id of the job there.
    """

    sync: Literal["full", "top"] = "full"
    compress: Literal["zlib", "zstd"] | None = None
    level: Literal["fast", "default", "best"] = "default"
    speed: Size = 0
    on_source_error: OnError = "report"
    on_target_error: OnError = "report"
    bitmap: str | None = None
    incremental: str | None = None
    base: str | None = None
    connect: OnServer = None
    job: JobId = "backup"


DEFAULT_COPYING: Final = Copying()


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Existing:
    """How an image that exists is named.

    Attributes:
        format: qcow2, raw or luks; without it, name and content must agree on one.
        image_opts: images are named by no path but by the options of a node: driver=qcow2,file.filename=a.qcow2,...
    """

    format: SourceFormat = None
    image_opts: Switch = False


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Answer:
    """In which form a command answers.

    Attributes:
        output: "human" for people, "json" with the members that qemu-img has.
        json: the same as --output=json.
    """

    output: Literal["human", "json"] = "human"
    json: AsJson = False

    @property
    def as_json(self) -> bool:
        """Either way to say it."""
        return self.json or self.output == "json"


AN_EXISTING: Final = Existing()
FOR_PEOPLE: Final = Answer()


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Mirror:
    """How a mirror copies, and how it ends.

    Attributes:
        converge: passes=N or deadline=TIME (90s, 10m): if the copy has not caught up by then, writes wait for it
            (write-blocking), and if that does not help within the same again, the mirror is given up with an error.
        pivot: let the server use TARGET in place of SOURCE from the end on.
        stay: keep TARGET in step until Ctrl-C.
        sync: "full" copies what the disk shows, "top" only what the image holds itself, on the same backing file.
        speed: at most so many bytes a second (100M); 0 is no limit.
        granularity: what is looked at as a whole, a power of two from 512 to 64M; by default as the target's clusters.
        buf_size: how many bytes may be under way at once.
        copy_mode: "background" copies what is written later, "write-blocking" lets every write wait for its copy.
        on_source_error: what a read error does: "report" ends the job, "stop" waits until it is resumed, "ignore"
            tries again until it works, "enospc" stops if space ran out and reports the rest.
        on_target_error: the same for write errors.
    """

    converge: str | None = None
    pivot: Switch = False
    stay: Switch = False
    sync: Literal["full", "top"] = "full"
    speed: Size = 0
    granularity: Size | None = None
    buf_size: Size | None = None
    copy_mode: Literal["background", "write-blocking"] = "background"
    on_source_error: OnError = "report"
    on_target_error: OnError = "report"


DEFAULT_MIRROR: Final = Mirror()


def explain(error: CycloptsError, words: Sequence[str]) -> str:
    """What was wrong with the command line, in one line."""
    command = next((word for word in words if not word.startswith("-")), "")
    name = error.argument.name if error.argument is not None else ""
    match error:
        case MissingArgumentError(keyword=str() as keyword):
            what = f"{keyword} needs a value"
        case MissingArgumentError() if name == "--connect":
            what = f"--connect is missing: name a QMP socket (a path, or host:port), or set {CONNECT_VARIABLE}"
        case MissingArgumentError():
            what = f"{name} is missing"
        case UnknownOptionError(token=token):
            what = f"unknown option '{token.keyword or token.value}'"
        case UnusedCliTokensError(unused_tokens=[first, *_]):
            what = f"'{first}' is one argument too many"
        case UnknownCommandError():
            return f"there is no command '{command}' (see blockjobs --help)"
        case _:
            what = " ".join(str(error).split()).rstrip(".")
            name = getattr(getattr(error, "token", None), "keyword", None) or name
            if name and name not in what:
                what = f"{name}: {what}"
    return f"{what} (see blockjobs {command} --help)" if command else f"{what} (see blockjobs --help)"
