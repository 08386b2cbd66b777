"""How web servers are accessed."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from captioner import __version__

__all__ = ["ALLOW_PRIVATE_HOSTS", "WebAccess", "current_access", "set_web_access", "web_access"]

#: The environment variable that allows private hosts where a command has no option for it.
ALLOW_PRIVATE_HOSTS = "CAPTIONER_ALLOW_PRIVATE_HOSTS"


@dataclass(frozen=True, kw_only=True)
class WebAccess:
    """Settings of all requests to web servers.

    Attributes:
        user_agent: the header ``User-Agent``; None stands for captioner's name and version.
        connections_per_host: connections to one host at a time, of all threads of a process.
        timeout: seconds for one request with its redirects, from the connection to the last byte.
        allow_private_hosts: also connect to addresses that are not public.
    """

    user_agent: str | None = None
    connections_per_host: int = 6
    timeout: float = 60.0
    allow_private_hosts: bool = False

    @property
    def agent(self) -> str:
        """The header ``User-Agent``."""
        if self.user_agent is not None:
            return self.user_agent
        return f"captioner/{__version__} (image captioning)"


_access: WebAccess | None = None  # of this process


def current_access() -> WebAccess:
    """How this process accesses web servers."""
    if _access is not None:
        return _access
    return WebAccess(allow_private_hosts=os.environ.get(ALLOW_PRIVATE_HOSTS) == "1")


def set_web_access(access: WebAccess | None) -> None:
    """Sets how this process accesses web servers; None stands for the defaults."""
    global _access
    _access = access


@contextmanager
def web_access(access: WebAccess) -> Iterator[None]:
    """Sets how this process accesses web servers until the block ends."""
    before = _access
    set_web_access(access)
    try:
        yield
    finally:
        set_web_access(before)
