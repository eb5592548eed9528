"""Looking for the next request pays, or it gets rare."""

import itertools

from blockjobs.base.patience import LOOKS_MAX, SKIPS_MAX, Patience

RECEIPTS_MAX = 7


class Client:
    """Sends so many requests at once, and then nothing for a while."""

    def __init__(self, sends: int = 0) -> None:
        self.sends, self.looks = sends, 0

    def take(self) -> bool:
        self.looks += 1
        if not self.sends:
            raise BlockingIOError
        self.sends -= 1
        return True


def test_looks_in_vain_get_rare_and_one_find_brings_them_back() -> None:
    patience = Patience(RECEIPTS_MAX)
    looked = []
    for answer in range(100_000):
        client = Client()
        assert not patience.stay(client.take)
        if client.looks:
            looked.append(answer)
    gaps = [after - before for before, after in itertools.pairwise(looked)]
    assert gaps[:4] == [2, 4, 8, 16]
    assert gaps[-1] == SKIPS_MAX + 1
    client = Client(1)
    while not client.looks:
        patience.stay(client.take)
    assert client.looks == 1 + LOOKS_MAX
    for _ in range(3):
        client = Client(1)
        patience.stay(client.take)
        assert not client.sends


def test_others_have_their_turn() -> None:
    client = Client(RECEIPTS_MAX + 1)
    assert Patience(RECEIPTS_MAX).stay(client.take)
    assert client.looks == RECEIPTS_MAX


def test_what_has_to_wait_ends_it() -> None:
    client = Client(5)
    assert not Patience(RECEIPTS_MAX).stay(lambda: client.take() and client.sends > 3)
    assert client.sends == 3


def test_a_broken_connection_is_left_to_the_loop() -> None:
    def take() -> bool:
        raise ConnectionResetError

    assert not Patience(RECEIPTS_MAX).stay(take)
