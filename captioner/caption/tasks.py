"""Calls of a function as tasks on Ray.

The tasks import this module, and therefore not torch, which takes seconds and memory.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from typing import TypeVar

from captioner import storage
from captioner.errors import CaptionerError, InputError, one_line
from captioner.runtime.cluster import connected
from captioner.runtime.prefetch import look_ahead, map_in_threads

__all__ = ["map_on_ray"]

_CPUS = 0.5  # of a task, as of one that decodes: the same processes serve both
_FEW = 16  # calls: threads are done with them before Ray has started a process for each
_LEAST_AHEAD = 32  # tasks in progress, also on a cluster that has no CPU yet
_RETRIES = 2  # of a task whose process dies

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_on_ray(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    *,
    web: storage.WebAccess,
    connection: ExitStack,
) -> Iterator[Result]:
    """``map``, in order, each call a task on Ray.

    A few calls run in threads of this process. More connect to Ray, until ``connection`` is closed.

    Args:
        function: what to call; it and its results can be pickled.
        items: its arguments.
        web: how the tasks access web servers.
        connection: see above.

    Raises:
        CaptionerError: as a call raised it.
        InputError: Ray cannot be reached, or a task's process dies again and again.
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
    """A call's result, or its error: raised in a task, it would come as pages of Ray's frames."""
    function, web = shared
    storage.set_web_access(web)
    try:
        return function(item)
    except CaptionerError as error:
        return error
