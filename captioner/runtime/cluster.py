"""Ray: connects to a cluster, or starts one on this machine."""

import logging
import os
import secrets
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Any

from captioner.errors import InputError
from captioner.runtime.signals import keep_handlers

__all__ = ["connected", "is_known_to_grow"]


def is_known_to_grow(ray: Any) -> bool:
    """Whether an autoscaler has reported a maximum size to Ray; not every autoscaler does.

    Ray 2.60 has no public function for that.
    """
    state = getattr(getattr(ray, "_private", None), "state", None)
    ask = getattr(getattr(state, "state", None), "get_max_resources_from_cluster_config", None)
    return ask is not None and bool(ask())


@contextmanager
def connected(*, log_to_driver: bool = False) -> Iterator[Any]:
    """Joins the cluster that RAY_ADDRESS names, or starts Ray here for this job alone.

    Args:
        log_to_driver: show the workers' output, as Ray Train needs it.

    Raises:
        InputError: the cluster cannot be reached, or Ray cannot be started.
    """
    if not os.environ.get("RAY_ADDRESS"):
        # Read when Ray is imported. Without a token in the environment Ray writes one to the home
        # directory, and clusters that are started later fail because of it.
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    address = os.environ.get("RAY_ADDRESS") or "local"
    if address.startswith("http"):
        raise InputError(
            f"RAY_ADDRESS is {address}, an address for ray job submit only; unset it, or set it to "
            "the cluster's address"
        )
    import ray

    if ray.is_initialized():
        yield ray
        return
    options: dict[str, Any] = {"log_to_driver": log_to_driver, "logging_level": logging.WARNING}
    if address == "local":
        options["include_dashboard"] = log_to_driver  # Ray Train asks it for the state of actors
    logging.getLogger("ray._private.worker").addFilter(_is_not_about_handlers)
    # Another thread starts Ray: there Ray leaves the handler of SIGTERM alone, and a signal
    # interrupts the wait for the thread, never Ray while it starts its processes. The processes end
    # with the thread that started them; it therefore lives until Ray is shut down.
    with ThreadPoolExecutor(1, thread_name_prefix="ray") as pool:
        beginning = pool.submit(ray.init, address=address, **options)
        try:
            try:
                with keep_handlers():  # one of Ray's C++ libraries replaces them
                    beginning.result()
            except (OSError, RuntimeError, ValueError) as error:
                what = "start Ray" if address == "local" else f"reach Ray at RAY_ADDRESS, {address}"
                raise InputError(f"cannot {what}: {' '.join(str(error).split())}") from error
            yield ray
        finally:
            wait([beginning])
            ray.shutdown(wait_for_processes=True)


def _is_not_about_handlers(record: logging.LogRecord) -> bool:
    """Whether a record is anything but Ray's warning that it left the handler of SIGTERM alone."""
    return "SIGTERM handler is not set" not in record.getMessage()
