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


Format = Literal["qcow2", "raw"]
Size = Annotated[int, Parameter(converter=read_size)]
SourceFormat = Annotated[Format | None, Parameter(name=("-f", "--format"))]
TargetFormat = Annotated[Format | None, Parameter(name=("-O", "--target-format"))]
Options = Annotated[list[str] | None, Parameter(name=("-o", "--options"), negative=())]
AsJson = Annotated[bool, Parameter(name="--json", negative=())]
Switch = Annotated[bool, Parameter(negative=())]
Connect = Annotated[str, Parameter(name="--connect", env_var=CONNECT_VARIABLE)]
ImageRoots = Annotated[list[str] | None, Parameter(name="--image-root", negative=())]
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
    """

    sync: Literal["full", "top"] = "full"
    compress: Literal["zlib", "zstd"] | None = None
    level: Literal["fast", "default", "best"] = "default"
    speed: Size = 0
    on_source_error: OnError = "report"
    on_target_error: OnError = "report"


DEFAULT_COPYING: Final = Copying()


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
