from blockjobs.block.rooms import KEPT_BYTES_MAX, Rooms

MiB = 1 << 20


def test_a_room_is_used_again_but_never_by_two_at_once() -> None:
    rooms = Rooms()
    with rooms.room(MiB) as first, rooms.room(MiB) as second, rooms.room(4096) as small:
        assert first is not second
        assert (len(first), len(small)) == (MiB, 4096)
    with rooms.room(MiB) as again, rooms.room(4096) as small_again, rooms.room(MiB) as third:
        assert {id(again), id(third)} == {id(first), id(second)}
        assert small_again is small


def test_no_more_is_kept_than_the_bound_however_many_were_out() -> None:
    rooms = Rooms()
    contexts = [rooms.room(MiB) for _ in range(100)]
    before = {id(each.__enter__()) for each in contexts}
    for each in contexts:
        each.__exit__(None, None, None)
    assert len(before) == 100
    assert sum(len(room) for room in rooms._kept) == rooms._kept_bytes == KEPT_BYTES_MAX
