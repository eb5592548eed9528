"""`ImageHost`: what a program needs that opens, makes and looks at images, and runs no jobs.

It is a `Host` without jobs, exports and a machine, and without the time that loading those takes.
"""

from blockjobs.host.bitmaps import Bitmaps
from blockjobs.host.looks import Looks


class ImageHost(Looks, Bitmaps):
    """Nodes, what can be seen of images, and their dirty bitmaps. Attributes: see `Nodes`."""
