"""The randomness port: seeded in simulation, the system's otherwise."""

import random
from typing import Protocol


class Entropy(Protocol):
    """What the program may draw at random."""

    def below(self, bound: int) -> int:
        """A uniform integer in 0 <= n < bound."""
        ...

    def rarely(self, label: str) -> bool:
        """False in production; a coin in simulation, where `label` names the nasty branch taken."""
        ...


class SystemEntropy:
    """The system's randomness; never takes a nasty branch."""

    def __init__(self) -> None:
        self._random = random.SystemRandom()

    def below(self, bound: int) -> int:
        """See `Entropy`."""
        return self._random.randrange(bound)

    def rarely(self, label: str) -> bool:
        """See `Entropy`."""
        del label
        return False


class SeededEntropy:
    """The same draws for the same seed: simulation replays from it."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)  # not for secrets

    def below(self, bound: int) -> int:
        """See `Entropy`."""
        return self._random.randrange(bound)

    def rarely(self, label: str) -> bool:
        """See `Entropy`."""
        del label
        return self._random.random() < 0.05
