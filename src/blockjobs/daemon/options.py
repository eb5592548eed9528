"""The command line of qemu-storage-daemon: options in order, long names may be shortened while they stay unique."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from blockjobs.base.errors import UsageError

PROGRAM: Final = "blockjobs-storage-daemon"
VALUED: Final = (
    "blockdev",
    "chardev",
    "export",
    "monitor",
    "nbd-server",
    "object",
    "pidfile",
    "image-root",
    "qmp-user",
    "trace",
)
FLAGS: Final = ("allow-remote-qmp", "daemonize", "help", "version")
SHORT: Final = {"h": "help", "T": "trace", "V": "version"}

_HELP_WORDS: Final = ("help", "?")


@dataclass(frozen=True, slots=True)
class Option:
    """One option as given; `value` is empty for a flag."""

    name: str
    value: str = ""
    spelt: str = ""

    def __str__(self) -> str:
        """As given, for messages."""
        return f"{self.spelt or '--' + self.name} {self.value}"


def parse_arguments(arguments: Sequence[str]) -> list[Option]:
    """Split a command line into options, keeping their order, because each may use what an earlier one made.

    Args:
        arguments: without the program's name.

    Raises:
        UsageError: an unknown or ambiguous option, a missing or superfluous value, a stray word; QSD's text.
    """
    options: list[Option] = []
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        if word == "--":
            break  # what follows are words, which QEMU does not look at
        if word.startswith("--"):
            name, has_value, value = word[2:].partition("=")
            options.append(_long(name, value if has_value else None, rest))
        elif word.startswith("-") and word != "-":
            options.extend(_short(word[1:], rest))
        else:
            raise UsageError(f"{word}: Unexpected argument")
        if any(option.name in ("help", "version") for option in options):
            break  # nothing behind it is looked at
    return options


def wants_help(value: str) -> bool:
    """Whether one of the words between commas is `help` or `?`."""
    return any(word in _HELP_WORDS for word in value.split(","))


def _long(name: str, value: str | None, rest: list[str]) -> Option:
    full = _complete(name)
    if full in FLAGS:
        if value is not None:
            raise UsageError(f"option '--{full}' doesn't allow an argument")
        return Option(full)
    if value is None:
        if not rest:
            raise UsageError(f"option '--{full}' requires an argument")
        value = rest.pop(0)
    return Option(full, value)


def _complete(name: str) -> str:
    known = VALUED + FLAGS
    if name in known:
        return name
    matches = [each for each in known if each.startswith(name)]
    if not matches or not name:
        raise UsageError(f"unrecognized option '--{name}'")
    if len(matches) > 1:
        possibilities = " ".join(f"'--{each}'" for each in matches)
        raise UsageError(f"option '--{name}' is ambiguous; possibilities: {possibilities}")
    return matches[0]


def _short(letters: str, rest: list[str]) -> Iterator[Option]:
    for place, letter in enumerate(letters, 1):
        if letter not in SHORT:
            raise UsageError(f"invalid option -- '{letter}'")
        if SHORT[letter] in FLAGS:
            yield Option(SHORT[letter])
            continue
        value = letters[place:] or (rest.pop(0) if rest else None)
        if value is None:
            raise UsageError(f"option requires an argument -- '{letter}'")
        yield Option(SHORT[letter], value, f"-{letter}")
        return


HELP: Final = """\
Usage: blockjobs-storage-daemon [options]
Disk images, jobs on them, and a QMP monitor: takes the place of qemu-storage-daemon

  -h, --help             display this help and exit
  -T, --trace [[enable=]<pattern>][,events=<file>][,file=<file>]
                         tell what happens, on stderr or in a file;
                         --trace help lists the patterns
  -V, --version          output version information and exit

  --allow-remote-qmp     monitors on TCP may be reached by other machines without
                         a certificate (default: they need tls-creds)

  --blockdev [driver=]<driver>[,node-name=<N>][,discard=ignore|unmap]
             [,cache.direct=on|off][,cache.no-flush=on|off]
             [,read-only=on|off][,auto-read-only=on|off]
             [,force-share=on|off][,detect-zeroes=on|off|unmap]
             [,driver specific parameters...]
                         open a block node

  --chardev socket,id=<id>,path=<path>[,server=on|off][,wait=on|off]
  --chardev socket,id=<id>,host=<host>,port=<port>[,server=on|off][,wait=on|off]
             [,reconnect=<seconds>][,tls-creds=<id>][,tls-authz=<id>]
  --chardev stdio,id=<id>
  --chardev null,id=<id>
                         a character device for a monitor to talk through

  --daemonize            go to the background once start-up is complete

  --export [type=]nbd,id=<id>,node-name=<node-name>[,name=<export-name>]
           [,description=<text>][,writable=on|off][,writethrough=on|off]
           [,bitmaps.<n>=<name>][,allocation-depth=on|off]
                         offer a node to NBD clients; --nbd-server comes first

  --image-root <dir>     images may name backing and data files below this
                         directory only; may be given several times
                         (default: the directories of the images given)

  --monitor [chardev=]<id>[,mode=control][,pretty[=on|off]]
                         a QMP monitor on a character device

  --nbd-server addr.type=inet,addr.host=<host>,addr.port=<port>
               [,tls-creds=<id>][,tls-authz=<id>]
               [,max-connections=<n>][,handshake-max-seconds=<n>]
  --nbd-server addr.type=unix,addr.path=<path>[,...]
                         start the NBD server

  --object throttle-group,id=<id>[,limits.<limit>=<value>...]
  --object secret,id=<id>,data=<text>|file=<path>[,format=raw|base64]
  --object tls-creds-x509,id=<id>,dir=<dir>,endpoint=client|server[,verify-peer=on|off]
  --object tls-creds-psk,id=<id>,dir=<dir>,endpoint=client|server[,username=<name>]
  --object authz-list,id=<id>[,policy=deny|allow][,rules.<n>.match=<name>,rules.<n>.policy=deny|allow]
  --object authz-list-file,id=<id>,filename=<path>[,refresh=on|off]
                         an object for block nodes to use

  --pidfile <path>       write the process id to a file

  --qmp-user <user>      monitors on unix sockets are for this user and the
                         daemon's own; may be given several times
                         (default: for the daemon's own user only)

--object help, --object <type>,help, --chardev help and --chardev <kind>,help
list what there is.

A value is key=value pairs with commas (dots for members: file.driver=file),
or JSON if it starts with '{'. Options are processed in order.
"""
