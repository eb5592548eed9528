"""`python tests/fuzz/fuzz.py FIRST COUNT` tries spoiled images by number; `--seconds N` goes on with new ones for long.

Bitmap files beside raw images are among them. Every complaint is printed with the recipe that leads to it, for
`corpus/found.json` or `corpus/found_side.json`. Exit code 1 if there is any.
"""

import json
import logging
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from bench import MEMORY, Bench
from recipes import Mutator
from side import SideTrial, side_recipe
from trial import Trial

SIDE_EVERY = 4


def shortest(recipe, directory, bench):
    """The recipe without the patches that do not matter."""
    for patch in list(recipe.patches):
        fewer = replace(recipe, patches=[each for each in recipe.patches if each != patch])
        if fewer.patches and Trial(fewer, directory, bench).run():
            recipe = fewer
    return recipe


def show(number, complaints, recipe):
    """One line for each that has done harm."""
    print(json.dumps({"number": number, "complaints": complaints, "recipe": json.loads(recipe.to_json())}), flush=True)


def main(words):
    """See the module."""
    logging.disable()  # an image that cannot be closed properly is said so each time
    seconds = float(words[1]) if words[0] == "--seconds" else None
    first = time.time_ns() // 1_000_000 if seconds else int(words[0])
    end = time.monotonic() + seconds if seconds else None
    number, failed = first, 0
    with tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as directory, Bench() as bench:
        while time.monotonic() < end if end else number < first + int(words[1]):
            recipe = Mutator(number).recipe()
            if complaints := Trial(recipe, Path(directory), bench).run():
                failed += 1
                show(number, complaints, shortest(recipe, Path(directory), bench))
            if number % SIDE_EVERY == 0:
                recipe = side_recipe(number)
                if complaints := SideTrial(recipe, Path(directory), bench).run():
                    failed += 1
                    show(number, complaints, recipe)
            number += 1
    print(json.dumps({"tried": number - first, "failed": failed}), flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
