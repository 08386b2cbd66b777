"""Ray: connecting to a cluster, or starting one on this machine."""

import logging
import os
import secrets
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Any

from captioner.errors import (
    InputError,
)
from captioner.runtime.signals import keep_handlers

__all__ = ["connected", "is_known_to_grow"]


def is_known_to_grow(ray: Any) -> bool:
    """Whether an autoscaler has told Ray how large the cluster can be; not all of them do.

    That is not public in Ray 2.60.
    """
    state = getattr(getattr(ray, "_private", None), "state", None)
    ask = getattr(getattr(state, "state", None), "get_max_resources_from_cluster_config", None)
    return ask is not None and bool(ask())


@contextmanager
def connected(*, log_to_driver: bool = False) -> Iterator[Any]:
    """Joins the cluster that RAY_ADDRESS names, or starts Ray here for this job alone."""
    if not os.environ.get("RAY_ADDRESS"):
        # Read when Ray is imported. Without a token of our own Ray leaves one in the home
        # directory, where clusters that are started later trip over it.
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    address = os.environ.get("RAY_ADDRESS") or "local"
    if address.startswith("http"):
        raise InputError(
            f"RAY_ADDRESS is {address}, which is for ray job submit: unset it, or give "
            "--engine local"
        )
    import ray

    if ray.is_initialized():
        yield ray
        return
    options: dict[str, Any] = {"log_to_driver": log_to_driver, "logging_level": logging.WARNING}
    if address == "local":
        options["include_dashboard"] = log_to_driver  # Ray Train asks it what has become of actors
    logging.getLogger("ray._private.worker").addFilter(_is_not_of_handlers)
    # A thread of its own begins: there Ray leaves the handler of SIGTERM alone, and a signal
    # interrupts the waiting for it, never Ray in the midst of starting its processes. They end with
    # the thread that started them, so that it stays.
    with ThreadPoolExecutor(1, thread_name_prefix="ray") as pool:
        beginning = pool.submit(ray.init, address=address, **options)
        try:
            try:
                with keep_handlers():  # one of Ray's C++ libraries puts its own in their place
                    beginning.result()
            except (OSError, RuntimeError, ValueError) as error:
                what = "start Ray" if address == "local" else f"reach Ray at RAY_ADDRESS, {address}"
                raise InputError(f"cannot {what}: {' '.join(str(error).split())}") from error
            yield ray
        finally:
            wait([beginning])
            ray.shutdown(wait_for_processes=True)


def _is_not_of_handlers(record: logging.LogRecord) -> bool:
    """Whether it is not Ray's warning that it left SIGTERM's handler alone."""
    return "SIGTERM handler is not set" not in record.getMessage()
