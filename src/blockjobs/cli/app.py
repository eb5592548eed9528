"""The command line as a whole: its name, its groups of commands, and the module in which each command is declared."""

from contextvars import ContextVar
from typing import Final

from cyclopts import App, Group, Parameter

from blockjobs import __version__

IMAGES: Final = Group("Images", sort_key=0)
LIVE: Final = Group("Live disks", sort_key=1)
JOBS: Final = Group("Jobs of a server (give its QMP socket with --connect)", sort_key=2)

NO_NEGATIVES: Final = Parameter(negative=(), allow_repeating=True)
"""No `--no-force`; and of what is given again the last one counts, because scripts add options to those of others."""

WORDS: Final[ContextVar[tuple[str, ...]]] = ContextVar("words", default=())
"""The command line as it was typed, for the command whose options are deeds that have an order."""

COMMANDS: Final = {
    IMAGES: (
        "blockjobs.cli.convert_commands:amend",
        "blockjobs.cli.image_commands:backup",
        "blockjobs.cli.bitmap_commands:bitmap",
        "blockjobs.cli.image_commands:check",
        "blockjobs.cli.image_commands:compare",
        "blockjobs.cli.convert_commands:convert",
        "blockjobs.cli.image_commands:create",
        "blockjobs.cli.edit_commands:dd",
        "blockjobs.cli.image_commands:info",
        "blockjobs.cli.image_commands:map",
        "blockjobs.cli.convert_commands:measure",
        "blockjobs.cli.edit_commands:rebase",
        "blockjobs.cli.edit_commands:resize",
        "blockjobs.cli.convert_commands:snapshot",
    ),
    LIVE: (
        "blockjobs.cli.live_commands:commit",
        "blockjobs.cli.live_commands:mirror",
        "blockjobs.cli.live_commands:nbd",
        "blockjobs.cli.live_commands:serve",
        "blockjobs.cli.live_commands:stream",
    ),
    JOBS: (
        "blockjobs.cli.job_commands:cancel",
        "blockjobs.cli.job_commands:complete",
        "blockjobs.cli.job_commands:dismiss",
        "blockjobs.cli.job_commands:finalize",
        "blockjobs.cli.job_commands:jobs",
        "blockjobs.cli.job_commands:pause",
        "blockjobs.cli.job_commands:resume",
        "blockjobs.cli.job_commands:schema",
        "blockjobs.cli.job_commands:speed",
        "blockjobs.cli.job_commands:watch",
    ),
}
"""Functions, or the `App` of a command with commands of its own, by group. Each is loaded when it is wanted."""

app = App(
    name="blockjobs",
    help="""Back up, move, merge and look at disk images, and steer the background jobs of any QMP server.

    Every command takes `--object secret,id=key,file=PATH`: the passphrase of enciphered images.
    """,
    version=__version__,
    suppress_keyboard_interrupt=False,
    default_parameter=NO_NEGATIVES,
)
for _group, _homes in COMMANDS.items():
    for _home in _homes:
        app.command(_home, name=_home.rpartition(":")[2], group=_group)


def whole_app() -> App:
    """The same with all commands loaded, for help, which says what each is about."""
    for name in app:
        assert app[name]
    return app
