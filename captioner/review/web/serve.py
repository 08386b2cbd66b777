"""Serves the review page until the reviewer stops it."""

import contextlib
import socket
import urllib.parse
import webbrowser
from collections.abc import Callable

import uvicorn
from starlette.applications import Starlette

from captioner.errors import InputError
from captioner.output.decisions import Journal
from captioner.output.directory import OutputDirectory
from captioner.review.web.app import make_app
from captioner.review.web.index import RowIndex
from captioner.review.web.security import Guard, is_loopback
from captioner.runtime.signals import catch_signals

__all__ = ["serve"]

_BACKLOG = 100  # connections that wait to be accepted
_LAST_ANSWERS = 5  # seconds in which requests are answered after Ctrl-C


def serve(
    output: str,
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    token: str | None = None,
    open_browser: bool = False,
    announce: Callable[[str], object] = print,
) -> None:
    """Serves the page until Ctrl-C or SIGTERM; then merges the decisions into one file.

    Args:
        output: a caption job's output, local or in a bucket, finished or still growing.
        host: the address to listen on.
        port: the port to listen on; 0 chooses a free port.
        token: the token that the page's address must contain; required unless ``host`` is loopback.
        open_browser: whether to open the page in a browser.
        announce: called with the page's address once the server listens.

    Raises:
        InputError: the address cannot be listened on, or it needs a token and has none.
        OutputError: ``output`` is not an output, or cannot be read or written.
    """
    if not is_loopback(host) and not token:
        raise InputError(
            f"--host {host} is reachable from other machines; protect the page with --token SECRET"
        )
    directory = OutputDirectory(output)
    directory.read_json("run.json")
    with _listen(host, port) as listener:
        port = listener.getsockname()[1]
        # Uvicorn raises the signal that ended it once more; an exception lets the rest clean up.
        with contextlib.ExitStack() as stack:
            stack.enter_context(contextlib.suppress(KeyboardInterrupt))
            stack.enter_context(catch_signals())
            journal = stack.enter_context(contextlib.closing(Journal(output)))
            index = stack.enter_context(contextlib.closing(RowIndex(directory)))
            app = make_app(index, journal, Guard(port, token))
            address = _address(host, port, token)
            announce(address)
            if open_browser:
                webbrowser.open(address)
            _run(app, listener)


def _address(host: str, port: int, token: str | None) -> str:
    """The page's address, with the token that it must contain."""
    shown = f"[{host}]" if ":" in host else host
    query = f"?token={urllib.parse.quote(token, safe='')}" if token else ""
    return f"http://{shown}:{port}/{query}"


def _run(app: Starlette, listener: socket.socket) -> None:
    """Answers requests until a signal ends the server."""
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        lifespan="off",
        timeout_graceful_shutdown=_LAST_ANSWERS,
    )
    uvicorn.Server(config).run(sockets=[listener])


def _listen(host: str, port: int) -> socket.socket:
    """Opens the socket first: a browser may connect before the server is ready."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(_BACKLOG)
    except (OSError, OverflowError) as error:
        listener.close()
        raise InputError(f"cannot listen on {host}:{port}: {error}") from error
    return listener
