"""Python's cycle collector, set for programs that plan copies. A library must leave it alone: it is the process's."""

import gc
from typing import Final

ALLOCATIONS: Final = 50_000
"""Between two looks at young objects. Planning makes tens of thousands of tuples that live for one batch and never form
cycles; at the default of 700, looking for cycles among them was a sixth of a scattered backup's processor time."""


def relax_collector() -> None:
    """Call it in a program of our own before it imports the rest of itself, and once more after that.

    Importing makes tens of thousands of objects that stay: looking for cycles among them is a twelfth of a start.
    """
    gc.freeze()
    gc.set_threshold(ALLOCATIONS, 20, 20)
