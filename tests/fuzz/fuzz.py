"""`python tests/fuzz/fuzz.py FIRST COUNT` tries spoiled images by number; `--seconds N` goes on with new ones for long.

Every complaint is printed with the recipe that leads to it, for `corpus/found.json`. Exit code 1 if there is any.
"""

import json
import sys
import tempfile
import time
from pathlib import Path

from recipes import Mutator
from trial import Trial

MEMORY = Path("/dev/shm")


def shortest(recipe, directory):
    """The recipe without the patches that do not matter."""
    for patch in list(recipe.patches):
        fewer = type(recipe)(recipe.seed, [each for each in recipe.patches if each != patch], recipe.length)
        if fewer.patches and Trial(fewer, directory).run():
            recipe = fewer
    return recipe


def main(words):
    """See the module."""
    seconds = float(words[1]) if words[0] == "--seconds" else None
    first = time.time_ns() // 1_000_000 if seconds else int(words[0])
    end = time.monotonic() + seconds if seconds else None
    number, failed = first, 0
    with tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as directory:
        while time.monotonic() < end if end else number < first + int(words[1]):
            recipe = Mutator(number).recipe()
            complaints = Trial(recipe, Path(directory)).run()
            if complaints:
                failed += 1
                small = shortest(recipe, Path(directory))
                print(json.dumps({"number": number, "complaints": complaints, "recipe": json.loads(small.to_json())}))
            number += 1
    print(json.dumps({"tried": number - first, "failed": failed}), flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
