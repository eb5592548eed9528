"""Looking for the next request pays, or it gets rare."""

import itertools

from blockjobs.export.patience import LOOKS_MAX, SKIPS_MAX, Patience


def test_looks_in_vain_get_rare_and_one_find_brings_them_back() -> None:
    patience = Patience()
    looked = []
    for answer in range(100_000):
        if patience.looks():
            looked.append(answer)
            patience.missed()
    gaps = [after - before for before, after in itertools.pairwise(looked)]
    assert gaps[:4] == [2, 4, 8, 16]
    assert gaps[-1] == SKIPS_MAX + 1
    while not patience.looks():
        pass
    patience.found()
    assert [patience.looks() for _ in range(3)] == [LOOKS_MAX] * 3
