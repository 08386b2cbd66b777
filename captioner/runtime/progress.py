"""How long work tells where it is: a bar on a terminal, lines in a Ray job's log, else nothing."""

import os
import sys
from typing import Any

from tqdm import tqdm

__all__ = ["in_ray_job", "progress_bar"]

_SECONDS = 5  # between two lines of a log
_LINE = "{desc}{n_fmt} of {total_fmt} {unit}s, {rate_fmt}, {remaining} to go{postfix}"


class _Lines:
    """A stream on which what is drawn over the last line becomes a new one."""

    def write(self, text: str) -> None:
        """Writes what is not only meant for a terminal."""
        if text := text.strip("\r\n "):
            print(text, file=sys.stderr)

    def flush(self) -> None:
        """Hands on what is written."""
        sys.stderr.flush()


def in_ray_job() -> bool:
    """Whether this is what ``ray job submit`` runs, whose output is a log that people follow."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def progress_bar(
    total: int,
    *,
    unit: str,
    initial: int = 0,
    description: str = "",
    logged: bool | None = None,
    quiet: bool = False,
) -> "tqdm[Any]":
    """A bar that counts to ``total``.

    Args:
        total: how much there is to do.
        unit: of what, in the singular.
        initial: how much was done before.
        description: what comes before the numbers.
        logged: where there is no terminal, show lines; None: in a Ray job.
        quiet: show nothing, as on workers beside the first one.
    """
    logged = in_ray_job() if logged is None else logged
    if quiet or sys.stderr.isatty() or not logged:
        disable = True if quiet else None  # None: where there is no terminal
        return tqdm(total=total, initial=initial, unit=unit, desc=description, disable=disable)
    return tqdm(
        total=total,
        initial=initial,
        unit=unit,
        desc=f"{description}: " if description else "",
        file=_Lines(),
        bar_format=_LINE,
        mininterval=_SECONDS,
        maxinterval=_SECONDS,
    )
