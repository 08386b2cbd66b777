"""Prefetching: threads work on the next items before they are needed."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, TypeVar

__all__ = ["Mapper", "look_ahead", "map_ahead", "map_in_threads"]

Item = TypeVar("Item")
Result = TypeVar("Result")

_THREADS = 16  # of calls that mostly wait, for a bucket


class Mapper(Protocol):
    """``map``, in order, several calls at a time."""

    def __call__(
        self, function: Callable[[Item], Result], items: Iterable[Item], /
    ) -> Iterator[Result]:
        """Yields the result of each call, in the order of the items."""


def look_ahead(items: Iterable[Item], count: Callable[[], int]) -> Iterator[Item]:
    """Yields items in order, each after the ``count()`` items behind it have been requested.

    If requesting an item starts work on it, as with futures, ``count()`` items are in progress.
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

    If the consumer stops early, pending calls are cancelled and running calls are not awaited.
    """
    pool = ThreadPoolExecutor(threads)
    try:
        futures = (pool.submit(function, item) for item in items)
        for future in look_ahead(futures, lambda: 2 * threads):
            yield future.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def map_in_threads(
    function: Callable[[Item], Result], items: Iterable[Item], /
) -> Iterator[Result]:
    """A :class:`Mapper` of threads, for calls that mostly wait."""
    return map_ahead(function, items, _THREADS)
