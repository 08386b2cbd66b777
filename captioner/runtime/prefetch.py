"""Look-ahead: work that other threads begin a few items before it is needed."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

__all__ = ["look_ahead", "map_ahead"]

Item = TypeVar("Item")
Result = TypeVar("Result")


def look_ahead(items: Iterable[Item], count: Callable[[], int]) -> Iterator[Item]:
    """Hands items on, in order, each after ``count()`` more have been asked for.

    Where asking for an item begins work on it, such as a future, so many items are in work.
    """
    waiting: deque[Item] = deque()
    for item in items:
        waiting.append(item)
        while len(waiting) > count():
            yield waiting.popleft()
    yield from waiting


def map_ahead(
    function: Callable[[Item], Result], items: Iterable[Item], threads: int
) -> Iterator[Result]:
    """``map``, in order, computed by threads up to two items a thread ahead of its consumer.

    When the consumer stops early, what has not begun is dropped, and what has is not waited for.
    """
    pool = ThreadPoolExecutor(threads)
    try:
        futures = (pool.submit(function, item) for item in items)
        for future in look_ahead(futures, lambda: 2 * threads):
            yield future.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
