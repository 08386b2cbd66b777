"""A cache that the threads of a process share; each value is computed once."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from typing import Generic, TypeVar

__all__ = ["SharedCache"]

Value = TypeVar("Value")


class SharedCache(Generic[Value]):
    """Keeps the values that were used last. Thread-safe.

    Args:
        capacity: the largest sum of the values' weights; the latest value is kept whatever it
            weighs.
        weigh: a value's weight; by default each weighs 1.
    """

    def __init__(self, capacity: int, weigh: Callable[[Value], int] = lambda value: 1):
        self._capacity, self._weigh = capacity, weigh
        self._lock = threading.Lock()
        self._values: OrderedDict[Hashable, Future[Value]] = OrderedDict()
        self._weights: dict[Hashable, int] = {}

    def get(self, key: Hashable, make: Callable[[], Value]) -> Value:
        """The value of a key; threads that ask for it meanwhile wait while one thread makes it.

        Raises:
            Exception: what ``make`` raises, in every thread that waits; the next call tries again.
        """
        with self._lock:
            future = self._values.get(key)
            is_maker = future is None
            if future is None:
                future = self._values[key] = Future()
            self._values.move_to_end(key)
        if not is_maker:
            return future.result()
        try:
            value = make()
        except BaseException as error:
            with self._lock:
                del self._values[key]
            future.set_exception(error)
            raise
        future.set_result(value)
        with self._lock:
            self._weights[key] = self._weigh(value)
            self._shrink(key)
        return value

    def clear(self) -> None:
        """Forgets everything that is made."""
        with self._lock:
            for key in list(self._weights):
                del self._values[key], self._weights[key]

    def _shrink(self, latest: Hashable) -> None:
        excess = sum(self._weights.values()) - self._capacity
        for key in list(self._values):
            if excess <= 0:
                return
            if key != latest and key in self._weights:
                del self._values[key]
                excess -= self._weights.pop(key)
