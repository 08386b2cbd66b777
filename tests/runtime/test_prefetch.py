import itertools
import threading
import time

import pytest

from captioner.runtime.prefetch import look_ahead, map_ahead


@pytest.mark.parametrize("count", [0, 1, 3, 100])
def test_look_ahead_keeps_the_order(count):
    assert list(look_ahead(range(10), lambda: count)) == list(range(10))


def test_look_ahead_asks_for_as_many_items_as_its_count_says():
    asked: list[int] = []
    count = 2
    items = look_ahead((asked.append(number) or number for number in range(9)), lambda: count)
    assert (next(items), len(asked)) == (0, 3)
    assert (next(items), len(asked)) == (1, 4)
    count = 4  # larger batches
    assert (next(items), len(asked)) == (2, 7)
    count = 0
    assert (next(items), len(asked)) == (3, 7)
    assert list(items) == [4, 5, 6, 7, 8]


def test_map_ahead_computes_in_threads_and_keeps_the_order():
    def square(number: int) -> int:
        time.sleep(0.002 * (number % 3))
        return number * number

    assert list(map_ahead(square, range(30), 4)) == [number * number for number in range(30)]


def test_map_ahead_raises_where_the_item_is_due_and_drops_the_rest():
    begun: list[int] = []

    def fail(number: int) -> int:
        begun.append(number)
        if number == 3:
            raise ValueError("three")
        return number

    results = map_ahead(fail, range(1000), 2)
    assert list(itertools.islice(results, 3)) == [0, 1, 2]
    with pytest.raises(ValueError, match="three"):
        next(results)
    assert len(begun) < 12


def test_a_consumer_that_stops_waits_for_no_work_and_begins_no_more():
    """As at Ctrl-C: neither a read that hangs nor the items ahead keep it."""
    hangs, begun = threading.Event(), []

    def read(number: int) -> int:
        begun.append(number)
        if number:
            hangs.wait(30)
        return number

    results = map_ahead(read, range(100), 2)
    assert next(results) == 0
    begin = time.monotonic()
    results.close()  # type: ignore[attr-defined]
    assert time.monotonic() - begin < 5
    hangs.set()
    time.sleep(0.1)
    assert len(begun) <= 3
