"""The same command lines to QEMU's storage daemon and to ours: same exit code, same words, but where a reason is given.

Lines that would serve end with a pidfile that cannot be written, which is the last thing that start-up does.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import player
import pytest

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(120)]

STARTS = "--pidfile no/p"
"""What a line ends with that is right as far as it goes."""

SAME = [
    # the options themselves
    "nope",
    "-",
    "--nope",
    "--nope --help",
    "-x",
    "--v=1",
    "--version=1",
    "--daemonize=yes",
    "--blockdev",
    "--bl",
    "--pidfile",
    "--daemonize help",
    "--pidfile no/x",
    "--pidfile=no/x",
    "--pidfile a.raw/x",
    "--daemonize --pidfile no/x",
    "--daemonize --daemonize --pidfile no/x",
    "--daemonize --blockdev foo",
    f"{STARTS} -- nope",
    # block nodes
    "--blockdev ''",
    "--blockdev foo",
    "--blockdev driver",
    "--blockdev =x",
    "--blockdev driver=raw",
    "--blockdev '{}'",
    "--blockdev '{'",
    "--blockdev '[]'",
    """--blockdev '{"driver":"file"}'""",
    "--blockdev driver=file,filename=a.raw",
    "--blockdev driver=file,filename=nope,node-name=n",
    f"--blockdev driver=file,filename=a.raw,node-name=n {STARTS}",
    f"--blockdev file,filename=a.raw,node-name=n --blockdev=raw,node-name=r,file=n {STARTS}",
    f"""--blockdev '{{"driver":"raw","node-name":"r","file":{{"driver":"file","filename":"a.raw"}}}}' {STARTS}""",
    "--blockdev raw,node-name=r,file=n",
    "--blockdev file,filename=a.raw,node-name=n --blockdev file,filename=a.raw,node-name=n",
    "--blockdev file,filename=a.raw,node-name=n,bogus=1",
    "--blockdev file,filename=a.raw,node-name=n,read-only=maybe",
    "--blockdev file,filename=a.raw,node-name=n,,x=1",
    "--blockdev driver=file,,filename=a.raw",
    "--blockdev driver=raw,file.driver=file,file=x",
    "--blockdev help",
    "--blockdev '?'",
    "--blockdev driver=help",
    "--blockdev raw,help",
    # objects
    "--object ''",
    "--object secret",
    "--object secret,id=s",
    f"--object secret,id=s,data=x {STARTS}",
    "--object secret,id=s,data=x --object secret,id=s,data=y",
    "--object secret,id=1,data=x",
    "--object nope,id=x",
    f"--object throttle-group,id=t,limits.iops-total=5 {STARTS}",
    "--object throttle-group,id=t,limits.iops-total=x",
    f"--object iothread,id=i {STARTS}",
    "--object qom-type=help",
    "--object secret,help",
    "--object authz-list,help",
    "--object tls-creds-psk,help",
    # the NBD server and exports
    "--nbd-server foo",
    "--nbd-server help",
    "--nbd-server addr.type=unix",
    "--nbd-server addr.type=unix,addr.path=no/no",
    "--nbd-server addr.type=unix,addr.path=a.sock --nbd-server addr.type=unix,addr.path=b.sock",
    "--nbd-server addr.type=unix,addr.path=a.sock,max-connections=x",
    "--nbd-server addr.type=unix,addr.path=a.sock,tls-creds=zz",
    "--export ''",
    "--export foo",
    "--export nbd",
    "--export help",
    "--export nbd,help",
    "--export type=help",
    "--export nbd,id=e,node-name=nope",
    "--blockdev file,filename=a.raw,node-name=n --export nbd,id=e,node-name=n",
    "--blockdev file,filename=a.raw,node-name=n --nbd-server addr.type=unix,addr.path=a.sock"
    f" --export type=nbd,id=e,node-name=n,name=x,writable=on {STARTS}",
    # character devices and monitors
    "--chardev ''",
    "--chardev foo",
    "--chardev foo,id=c",
    "--chardev stdio",
    "--chardev id=x",
    "--chardev stdio,id=1",
    "--chardev socket,id=x,host=127.0.0.1",
    "--chardev socket,id=x,path=a.sock,host=foo,port=1",
    "--chardev socket,id=x,path=no/no.sock,server=on,wait=off",
    "--chardev socket,id=x,path=a.sock,server=maybe",
    "--chardev socket,id=x,path=a.sock,bogus=1",
    "--chardev socket,id=x,path=a.sock,wait=on",
    "--chardev socket,id=x,path=a.sock,server=on,reconnect=1",
    "--chardev socket,id=x,path=nope.sock",
    "--chardev socket,id=x,path=a.sock,tls-creds=zz,server=on,wait=off",
    f"--chardev socket,id=x,path=a.sock,server=on,wait=off --monitor x,pretty=on {STARTS}",
    f"--chardev null,id=n --monitor n {STARTS}",
    "--chardev stdio,id=a --chardev stdio,id=b",
    "--daemonize --chardev stdio,id=s --monitor s",
    "--monitor ''",
    "--monitor foo",
    "--monitor help",
    "--monitor m,help",
    "--monitor chardev=foo,mode=readline",
    "--chardev null,id=s --monitor s,mode=readline",
    "--chardev null,id=s --monitor s,mode=bogus",
    "--chardev null,id=s --monitor s --monitor s",
    "--chardev null,id=s --monitor s,pretty=maybe",
    # tracing
    f"--trace nope {STARTS}",
    "--trace enable=nope,bogus=1",
    "-T file=no/x",
    "-T",
]


@dataclass(frozen=True)
class Ours:
    """A line that we answer otherwise, on purpose."""

    line: str
    code: int
    text: str
    """Part of what we print."""
    reason: str


DIFFERENT = [
    Ours("--help", 0, "Usage: blockjobs-storage-daemon", "Our options, in our words."),
    Ours("-h", 0, "--blockdev", "As --help."),
    Ours("--help --nope", 0, "Usage:", "As --help: the rest is not looked at."),
    Ours("--blockdev foo --help", 0, "Usage:", "As --help: nothing is carried out before it."),
    Ours("-Vh", 0, "blockjobs-storage-daemon version", "Our version."),
    Ours("--object help", 0, "  throttle-group\n", "Only object types that exist are listed."),
    Ours("--object nope,help", 0, "  throttle-group\n", "As QEMU does, of our types."),
    Ours("--object throttle-group,help", 0, "  limits=<ThrottleLimits>\n", "Deprecated members are left out."),
    Ours("--chardev help", 0, "  socket\n", "Only kinds that exist are listed."),
    Ours("--chardev socket,help", 0, "  path=<string>\n", "QEMU lists the members of all kinds, and exits with 1."),
    Ours("--trace help", 0, "qmp_command", "Our own events."),
    Ours("--chardev socket,id=x", 1, "a 'path', or a 'host' and a 'port' are needed", "QEMU asks for a descriptor."),
    Ours("-T events=nope", 1, "nope: No such file or directory", "QEMU leaves out which option it was."),
    Ours(
        f"--chardev socket,id=x,path=a.sock,server,nowait {STARTS}",
        1,
        "cannot create PID file",
        "QEMU warns of short booleans on every line.",
    ),
    Ours(
        f"--nbd-server addr.type=inet,addr.host=127.0.0.1,addr.port=70000 {STARTS}",
        1,
        "Servname not supported",
        "QEMU takes the port modulo 65536.",
    ),
    Ours(
        f"--chardev socket,id=x,host=0.0.0.0,port=0,server=on,wait=off {STARTS}",
        1,
        "Other machines could reach 0.0.0.0",
        "A QMP client may do all that the daemon may.",
    ),
    Ours(
        f"--chardev socket,id=x,host=0.0.0.0,port=0,server=on,wait=off --allow-remote-qmp {STARTS}",
        1,
        "cannot create PID file",
        "The switch that is named there.",
    ),
]


@dataclass(frozen=True)
class Said:
    code: int
    out: str
    err: str


def run(program: player.Program, line: str, directory: Path) -> Said:
    """What a program says to a command line, with a name in place of its own."""
    directory.mkdir()
    (directory / "a.raw").write_bytes(bytes(1 << 16))
    env = {**os.environ, "LC_ALL": "C"}
    words = [*program.words, *shlex.split(line)]
    done = subprocess.run(
        words, cwd=directory, env=env, stdin=subprocess.DEVNULL, capture_output=True, timeout=30, check=False
    )
    # QEMU repeats the option as it was spelt; we in full.
    err = re.sub(r"^(\S+: )--(bl|v)\b", r"\1--", done.stderr.decode(), flags=re.MULTILINE)
    return Said(done.returncode, done.stdout.decode(), err.replace(program.name, "PROGRAM"))


def both(lines: list[str], tmp_path: Path) -> dict[str, tuple[Said, Said]]:
    with ThreadPoolExecutor(4) as pool:
        answers = {
            line: [pool.submit(run, program, line, tmp_path / f"{number}{program.name}") for program in player.PROGRAMS]
            for number, line in enumerate(lines)
        }
    return {line: (theirs.result(), mine.result()) for line, (theirs, mine) in answers.items()}


def test_both_programs_answer_alike(tmp_path: Path) -> None:
    answers = both(SAME, tmp_path)
    differ = {line: (theirs, mine) for line, (theirs, mine) in answers.items() if theirs != mine}
    assert not differ, "\n".join(f"{line}\n  {theirs}\n  {mine}" for line, (theirs, mine) in differ.items())
    assert not any("Traceback" in mine.err for _, mine in answers.values())


def test_what_we_do_otherwise(tmp_path: Path) -> None:
    answers = both([each.line for each in DIFFERENT], tmp_path)
    for each in DIFFERENT:
        theirs, mine = answers[each.line]
        assert theirs != mine, f"{each.line}: no difference any more: {each.reason}"
        assert mine.code == each.code and each.text in mine.out + mine.err, f"{each.line}: {mine}"
