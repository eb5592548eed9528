"""Identifiers as QEMU accepts them (spec/lifecycle.md §1, Id rules)."""

import re
from typing import Final

from blockjobs.base.entropy import Entropy

_WELL_FORMED: Final = re.compile(r"[A-Za-z][A-Za-z0-9._-]*", re.ASCII)


def is_well_formed(text: str) -> bool:
    """Whether `text` may name a job, node or object: an ASCII letter, then letters, digits, `-`, `.`, `_`."""
    return _WELL_FORMED.fullmatch(text) is not None


class NodeNames:
    """Makes names for nodes that nobody named: `#block` + counter + two random digits (spec/block-layer.md §1)."""

    def __init__(self, entropy: Entropy) -> None:
        self._entropy = entropy
        self._counter = 0

    def next(self) -> str:
        """A name that no user can choose, since `#` is not well formed."""
        name = f"#block{self._counter}{self._entropy.below(100):02d}"
        self._counter += 1
        return name
