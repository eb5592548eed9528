"""Programs under measurement, run as a user has them: compiled once, at the first start, and not at each."""

import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

from pairs import Took

OURS = (sys.executable, "-m", "blockjobs")
_COMPILED = tempfile.TemporaryDirectory(prefix="blockjobs-bench-")
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
ENVIRONMENT["PYTHONPYCACHEPREFIX"] = _COMPILED.name


def run_process(words: Sequence[str]) -> Took:
    """One process, its output thrown away."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    began_s = time.perf_counter()
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL, env=ENVIRONMENT)
    wall_s = time.perf_counter() - began_s
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return Took(wall_s, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, wall_s)
