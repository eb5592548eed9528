from dataclasses import replace
from pathlib import Path

from growth import Curve, Point
from publication import BEGIN, END, Figure, Occasion, Results, load, occasions, publish, save, table
from rows import Row

MACHINE = "2 cores, ext4, Linux 6.1"
MONDAY = Occasion("2026-11-23", f"{MACHINE}; load 0.3 at the start")
TUESDAY = Occasion("2026-11-24", f"{MACHINE}; load 1.5 at the start")
CURVES = [Curve("allocated size", "MiB", [Point(16, 0.1, 0.2), Point(64, 0.3, 0.5)])]


def figure(suite: str, operation: str, occasion: Occasion = MONDAY, peer: str = "QSD", ratio: float = 1.0) -> Figure:
    row = Row(operation, peer, "1 s", "2 s", (ratio, 2.0, 3.0), (2.5,), (1.5,), at_least=1.2, aim=2, limit="cp 0.1 s")
    return Figure(suite, occasion, row)


BEFORE = Results(
    [figure("mirror", "raw"), figure("mirror", "raw", peer="cp"), figure("mirror", "qcow2"), figure("nbd", "read")],
    CURVES,
    MONDAY,
)


def names(results: Results) -> list[str]:
    return [f"{each.row.described} {each.row.peer} {each.occasion.date[-2:]}" for each in results.figures]


def test_a_suite_measured_again_takes_its_places_and_all_else_stays() -> None:
    newer = Results(
        [figure("mirror", "qcow2", TUESDAY), figure("mirror", "raw", TUESDAY), figure("mirror", "new", TUESDAY)]
    )
    found = BEFORE.merged(newer)
    assert names(found) == ["raw QSD 24", "raw cp 23", "qcow2 QSD 24", "new QSD 24", "read QSD 23"]
    assert (found.growth, found.grown) == (CURVES, MONDAY)


def test_measured_anew_a_suite_loses_the_rows_that_it_has_no_more() -> None:
    found = BEFORE.merged(Results([figure("mirror", "raw", TUESDAY)]), anew=True)
    assert names(found) == ["raw QSD 24", "read QSD 23"]


def test_the_same_in_another_folder_is_another_row() -> None:
    elsewhere = figure("mirror on /dev/shm", "raw", TUESDAY)
    elsewhere = replace(elsewhere, row=replace(elsewhere.row, folder="/dev/shm"))
    found = BEFORE.merged(Results([elsewhere]))
    assert names(found) == [*names(BEFORE), "raw, on /dev/shm QSD 24"]


def test_growth_is_replaced_by_growth_only() -> None:
    curves = [Curve("chain", "images", [Point(1, 0.1, 0.2)])]
    found = BEFORE.merged(Results([], curves, TUESDAY))
    assert (found.figures, found.growth, found.grown) == (BEFORE.figures, curves, TUESDAY)


def test_what_is_saved_is_what_is_loaded(tmp_path: Path) -> None:
    results = BEFORE.merged(Results([figure("nbd", "read", TUESDAY, ratio=4.0)]))
    save(tmp_path / "results.json", results)
    assert load(tmp_path / "results.json") == results
    assert load(tmp_path / "none.json") == Results()


def test_the_day_of_each_suite_is_told_where_it_differs() -> None:
    assert occasions(BEFORE) == f"Measured on 2026-11-23: {MACHINE}; load 0.3 at the start."
    again = BEFORE.merged(Results([figure("nbd", "read", TUESDAY), figure("mirror", "raw", TUESDAY)], CURVES, TUESDAY))
    again.figures.append(figure("scale", "jobs"))
    assert occasions(again) == (
        f"Measured on 2026-11-23: {MACHINE}; load 0.3 at the start; "
        "1 of 3 rows of mirror, nbd on 2026-11-24 (load 1.5 at the start); "
        "how time grows on 2026-11-24 (load 1.5 at the start)."
    )


def test_another_machine_is_told_in_full() -> None:
    other = Occasion("2026-11-24", "64 cores, xfs, Linux 6.1; load 0.3 at the start")
    found = occasions(BEFORE.merged(Results([figure("nbd", "read", other)])))
    assert found.endswith("; nbd on 2026-11-24 (64 cores, xfs, Linux 6.1; load 0.3 at the start).")


def test_the_table_takes_the_place_of_the_one_before(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{BEGIN}old\n{END}behind\n")
    publish(readme, BEFORE)
    publish(readme, BEFORE)
    assert readme.read_text() == f"before\n{BEGIN}{table(BEFORE)}{END}behind\n"
    assert "| raw | cp | 1 s | 2 s | **2.00** (1.00 to 3.00) | 2.50 | 1.50 | 3 | 1.2 / 2 | cp 0.1 s |" in table(BEFORE)
