"""Calls a function on many items, as tasks on Ray.

The tasks import this module, which does not import torch: that takes seconds and memory.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from typing import TypeVar

from captioner import storage
from captioner.errors import CaptionerError, InputError, one_line
from captioner.runtime.cluster import connected
from captioner.runtime.prefetch import look_ahead, map_in_threads

__all__ = ["map_on_ray"]

_CPUS = 0.5  # logical CPUs of a task; the same as of a decode task, to reuse its processes
_FEW = 16  # calls that threads finish before Ray has started its processes
_LEAST_AHEAD = 32  # fewest tasks in progress, also on a cluster that has no CPU yet
_RETRIES = 2  # retries of a task whose process dies

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_on_ray(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    *,
    web: storage.WebAccess,
    connection: ExitStack,
) -> Iterator[Result]:
    """Calls a function on each item, as tasks on Ray; yields the results in order.

    Up to 16 calls run in threads of this process instead, without Ray.

    Args:
        function: the function to call; the function and its results can be pickled.
        items: the arguments, one for each call.
        web: how the tasks access web servers.
        connection: keeps the connection to Ray open until the caller closes it.

    Raises:
        CaptionerError: a call raised it.
        InputError: Ray cannot be reached, or the process of a task dies repeatedly.
    """
    items = list(items)
    if len(items) <= _FEW:
        yield from map_in_threads(function, items)
        return
    ray = connection.enter_context(connected())
    task = ray.remote(num_cpus=_CPUS, max_retries=_RETRIES)(_call)
    shared = ray.put((function, web))  # sent to each machine once
    ahead = max(_LEAST_AHEAD, int(2 * ray.cluster_resources().get("CPU", 0) / _CPUS))
    for running in look_ahead((task.remote(shared, item) for item in items), lambda: ahead):
        try:
            outcome = ray.get(running)
        except ray.exceptions.RayTaskError:
            raise
        except ray.exceptions.RayError as error:
            raise InputError(f"a task on Ray failed: {one_line(error)}") from error
        if isinstance(outcome, CaptionerError):
            raise outcome
        yield outcome


def _call(shared: tuple[Callable[[Item], Result], storage.WebAccess], item: Item) -> object:
    """Returns a call's result or error; Ray adds a long traceback to an error that is raised."""
    function, web = shared
    storage.set_web_access(web)
    try:
        return function(item)
    except CaptionerError as error:
        return error
