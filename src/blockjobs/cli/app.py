"""The command line as a whole: its name, its groups of commands, and the object that commands are declared on."""

from typing import Final

from cyclopts import App, Group, Parameter

from blockjobs import __version__

IMAGES: Final = Group("Images", sort_key=0)
LIVE: Final = Group("Live disks", sort_key=1)
JOBS: Final = Group("Jobs of a server (give its QMP socket with --connect)", sort_key=2)

NO_NEGATIVES: Final = Parameter(negative=())

app = App(
    name="blockjobs",
    help="""Back up, move, merge and look at disk images, and steer the background jobs of any QMP server.

    Every command takes `--object secret,id=key,file=PATH`: the passphrase of enciphered images.
    """,
    version=__version__,
    suppress_keyboard_interrupt=False,
    default_parameter=NO_NEGATIVES,
)
