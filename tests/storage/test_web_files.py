"""Single files of web servers that misbehave."""

import re
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest

from captioner import __version__, storage
from captioner.errors import InputError, StorageError
from captioner.storage import WebAccess
from captioner.storage.web import addresses, hosts
from captioner.storage.web.files import web_file_system
from web_server import WebServer, serving

_PROXIES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")


@pytest.fixture(autouse=True)
def _no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in _PROXIES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.fixture
def server() -> Iterator[WebServer]:
    """A server, with private hosts allowed."""
    access = WebAccess(allow_private_hosts=True, timeout=10)
    with serving() as running, storage.web_access(access):
        yield running


def _read(server: WebServer, path: str, limit: int | None = None, retries: int = 0) -> bytes:
    return storage.read(f"{server.address}/{path}", limit, retries=retries)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("status/404", "HTTP status 404 Not Found"),
        ("status/410", "HTTP status 410 Gone"),
        ("status/403", "HTTP status 403 Forbidden"),
        ("status/401", "HTTP status 401 Unauthorized"),
        ("status/500", "HTTP status 500 Internal Server Error"),
        ("status/304", "HTTP status 304 Not Modified"),
        ("cut/hello", "the body is cut off"),
        ("chunked/cut/hello", "the body is cut off"),
        ("gzip/cut/hello", "the compressed body is cut off"),
        ("gzip/bad/hello", "the compressed body is damaged"),
        ("brotli/hello", "the body is encoded as 'br', which was not asked for"),
        ("loop/1", "more than 5 redirects"),
        ("nowhere/x", "HTTP status 302 without an address to go to"),
        ("to/file:///etc/passwd", "it redirects to an address that is not allowed or not valid"),
        ("to/ftp://example.com/x", "it redirects to an address that is not allowed or not valid"),
        ("to/http://u:p@127.0.0.1/", "it redirects to an address that is not allowed or not valid"),
        ("garbage/x", "the connection broke off, or the answer is not HTTP"),
    ],
)
def test_the_reason_is_on_one_line_without_the_address(path, message, server):
    with pytest.raises(OSError, match=f"^{re.escape(message)}$"):
        _read(server, f"{path}?token=secret")


@pytest.mark.parametrize(
    "path",
    [
        "hello",
        "to/hello",
        "to/to/to/to/to/hello",
        "nolength/hello",
        "chunked/hello",
        "gzip/hello",
        "length/nonsense/hello",
    ],
)
def test_a_file_comes_whole_however_it_is_sent(path, server):
    assert _read(server, path) == b"hello"
    assert all("HEAD" not in request for request, _ in server.requests)


def test_a_body_longer_than_its_length_is_cut_there(server):
    assert _read(server, "short/hello") == b"he"
    assert _read(server, "hello") == b"hello"


@pytest.mark.parametrize(("status", "count"), [(404, 1), (403, 1), (501, 1), (500, 3), (520, 3)])
def test_only_errors_of_the_server_are_retried(status, count, server):
    with pytest.raises(OSError, match=f"HTTP status {status}"):
        _read(server, f"status/{status}", retries=2)
    assert len(server.requests) == count


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize("is_date", [False, True])
def test_a_retry_waits_as_long_as_the_server_asks(status, is_date, server):
    after = "1"
    if is_date:  # whole seconds, of which the first has begun
        after = format_datetime(datetime.now(UTC) + timedelta(seconds=2), usegmt=True)
    begin = time.monotonic()
    path = f"once/{status}/{after.replace(' ', '_')}/hello"
    assert _read(server, path, retries=1) == b"hello"
    assert time.monotonic() - begin > 0.9


def test_other_requests_to_the_host_wait_too(server):
    with pytest.raises(OSError, match="429"):
        _read(server, "busy/1")
    begin = time.monotonic()
    assert _read(server, "hello") == b"hello"
    assert time.monotonic() - begin > 0.9


def test_a_host_that_asks_to_wait_for_long_is_not_asked_again(server):
    with pytest.raises(OSError, match=r"refuses requests for another 3\d\d\d seconds"):
        _read(server, "busy/3600", retries=3)
    with pytest.raises(OSError, match="--retry-failed"):
        _read(server, "hello", retries=3)
    assert server.paths() == ["/busy/3600"]


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("7", 7),
        (" 7 ", 7),
        ("", 0),
        (None, 0),
        ("-3", 0),
        ("soon", 0),
        ("9" * 5000, 999_999_999),
        ("Wed, 21 Oct 2015 07:28:00 GMT", 0),
        ("Wed, 99 Oct 2015 07:28:00", 0),
    ],
)
def test_retry_after_is_a_number_or_a_date(value, seconds):
    assert hosts.retry_after(value) == seconds


def test_hosts_that_are_done_are_forgotten():
    known = hosts.Hosts(2)
    with known.connection("a"), known.connection("a"), known.connection("b"):
        assert set(known._hosts) == {"a", "b"}
    assert not known._hosts


@pytest.mark.parametrize("limit", [1, 3])
def test_threads_share_the_connections_to_a_host(limit, server):
    access = WebAccess(allow_private_hosts=True, connections_per_host=limit)
    with storage.web_access(access), ThreadPoolExecutor(8) as pool:
        assert set(pool.map(lambda _: _read(server, "pause/hello"), range(9))) == {b"hello"}
    assert server.most_active == limit


def test_a_connection_is_used_again(server):
    for path in ("hello", "status/404", "hello", "to/hello"):
        try:
            _read(server, path)
        except FileNotFoundError:
            continue
    [manager] = web_file_system()._client._managers.values()
    [pool] = [manager.pools[key] for key in manager.pools.keys()]  # noqa: SIM118
    assert (pool.num_connections, pool.num_requests) == (1, 5)


def test_nothing_is_read_past_the_limit(server):
    server.files["big"] = bytes(50_000_000)
    for path in ("big", "chunked/big", "nolength/big", "endless/x"):
        before = server.sent
        assert _read(server, path, limit=1000) == bytes(1001)
        time.sleep(0.05)
        assert server.sent - before < 20_000_000, path  # what buffers of the system hold


def test_a_small_body_that_stands_for_a_large_one_is_not_unpacked(server):
    server.files["bomb"] = bytes(50_000_000)
    assert _read(server, "gzip/bomb", limit=1000) == bytes(1001)


@pytest.mark.parametrize("kind", ["body", "headers", "nothing"])
def test_a_slow_server_has_a_limited_time_in_all(kind, server):
    access = WebAccess(allow_private_hosts=True, timeout=0.5)
    begin = time.monotonic()
    with (
        storage.web_access(access),
        pytest.raises(TimeoutError, match=r"^the request took more than 0.5 seconds$"),
    ):
        _read(server, f"slow/{kind}")
    assert time.monotonic() - begin < 5


def test_a_handshake_that_does_not_end_has_a_limited_time(server):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        access = WebAccess(allow_private_hosts=True, timeout=0.5)
        with (
            storage.web_access(access),
            pytest.raises(TimeoutError, match=r"more than 0\.5 seconds"),
        ):
            storage.read(f"https://127.0.0.1:{listener.getsockname()[1]}/x", retries=0)


def test_a_request_says_who_asks(server):
    _read(server, "hello")
    with storage.web_access(
        WebAccess(allow_private_hosts=True, user_agent="me/1 (me@example.com)")
    ):
        _read(server, "to/hello")
    agents = [headers["User-Agent"] for _, headers in server.requests]
    assert agents == [f"captioner/{__version__} (image captioning)", *["me/1 (me@example.com)"] * 2]


def test_a_range_is_one_request(server):
    assert storage.read_range(f"{server.address}/ranges/hello", 1, 3) == b"el"
    assert len(server.requests) == 1
    with pytest.raises(OSError, match="another range"):
        storage.read_range(f"{server.address}/ranges/wrong/hello", 1, 3)
    with pytest.raises(OSError, match="does not send ranges"):
        storage.read_range(f"{server.address}/hello", 1, 3)


def test_the_size_is_what_the_server_tells(server):
    assert storage.size(f"{server.address}/hello") == 5
    assert storage.size(f"{server.address}/nolength/hello") is None
    assert storage.size(f"{server.address}/gzip/hello") is None
    assert storage.version(f"{server.address}/status/404") == ""


def test_a_folder_of_a_web_server_cannot_be_listed(server):
    with pytest.raises(InputError, match="make a list of their addresses"):
        storage.find(server.address, (".jpg",))


# What a list from outside must not reach.


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "2130706433", "0x7f000001", "0177.0.0.1", "127.1", "localhost", "0.0.0.0"],
)
def test_this_machine_is_refused_by_any_name(host, server):
    address = f"http://{host}:{server.server_port}/hello"
    assert storage.read(address, retries=0) == b"hello"
    server.requests.clear()
    with (
        storage.web_access(WebAccess()),
        pytest.raises(PermissionError, match=r"a loopback address; to allow it, add"),
    ):
        storage.read(address, retries=3)
    assert not server.requests


def test_a_private_address_is_not_even_connected_to(monkeypatch):
    monkeypatch.setattr(socket.socket, "connect", lambda *arguments: pytest.fail("connects"))
    for host in ("10.0.0.1", "169.254.169.254", "[::ffff:169.254.169.254]", "[fd00:ec2::254]"):
        for scheme in ("http", "https"):
            with pytest.raises(PermissionError, match="address; to allow it, add"):
                storage.read(f"{scheme}://{host}/latest/meta-data", retries=0)


def _resolve(monkeypatch: pytest.MonkeyPatch, names: dict[str, list[list[str]]]) -> list[str]:
    """Makes names resolve, at each look-up to the next answer; returns the names looked up."""
    looked_up: list[str] = []
    real = socket.getaddrinfo

    def resolve(host, port, *arguments, **keywords):
        if host not in names:
            return real(host, port, *arguments, **keywords)
        looked_up.append(host)
        answers = names[host]
        addresses = answers.pop(0) if len(answers) > 1 else answers[0]
        return [
            each for address in addresses for each in real(address, port, *arguments, **keywords)
        ]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    return looked_up


def test_a_name_is_refused_by_its_address(server, monkeypatch):
    _resolve(monkeypatch, {"innocent.example": [["127.0.0.1"]]})
    address = f"http://innocent.example:{server.server_port}/hello"
    assert storage.read(address, retries=0) == b"hello"
    with storage.web_access(WebAccess()), pytest.raises(PermissionError, match=r"127\.0\.0\.1"):
        storage.read(address, retries=0)


def test_the_address_that_is_checked_is_the_one_connected_to(server, monkeypatch):
    """A name that answers with a public address first and a private one later gains nothing."""
    names = {"rebinding.example": [["203.0.114.7"], ["127.0.0.1"]]}
    looked_up = _resolve(monkeypatch, names)
    connected = []

    def connect(place, *arguments, **keywords):
        connected.append(place[0])
        raise ConnectionRefusedError(111, "Connection refused")

    monkeypatch.setattr("captioner.storage.web.connections.create_connection", connect)
    with storage.web_access(WebAccess()), pytest.raises(OSError, match="Connection refused"):
        storage.read(f"http://rebinding.example:{server.server_port}/hello", retries=0)
    assert (looked_up, connected) == (["rebinding.example"], ["203.0.114.7"])
    assert not server.requests


def test_of_several_addresses_only_the_public_ones_are_tried(monkeypatch):
    _resolve(monkeypatch, {"both.example": [["10.0.0.1", "203.0.114.7", "127.0.0.1"]]})
    connected = []

    def connect(place, *arguments, **keywords):
        connected.append(place[0])
        raise ConnectionRefusedError(111, "Connection refused")

    monkeypatch.setattr("captioner.storage.web.connections.create_connection", connect)
    with pytest.raises(OSError, match="Connection refused"):
        storage.read("http://both.example/x", retries=0)
    assert connected == ["203.0.114.7"]


def test_each_redirect_is_checked(server, monkeypatch):
    """The first host counts as public here; where it leads to does not."""
    real = addresses.private_kind
    monkeypatch.setattr(
        "captioner.storage.web.connections.private_kind",
        lambda address: None if address == "127.0.0.1" else real(address),
    )
    with storage.web_access(WebAccess()):
        assert _read(server, "to/hello") == b"hello"
        for target in ("169.254.169.254/latest", "127.0.0.2/x", "[::1]/x", "0x7f000002/x"):
            with pytest.raises(PermissionError, match="--allow-private-hosts"):
                _read(server, f"to/http://{target}")
    assert len(server.requests) == 6


@pytest.mark.parametrize("user", ["user:password", "token", "user:pass/word"])
def test_credentials_in_an_address_are_refused_and_not_repeated(user):
    with pytest.raises(InputError, match="contains credentials") as caught:
        storage.absolute(f"https://{user}@example.com/a.jpg")
    assert user not in str(caught.value)
    assert storage.absolute("https://example.com/a@b.jpg?c=d@e") == (
        "https://example.com/a@b.jpg?c=d@e"
    )


# Proxies


def test_a_proxy_connects_and_is_not_checked(server, monkeypatch):
    monkeypatch.setenv("http_proxy", server.address)
    server.files["photo.jpg"] = b"by proxy"
    with storage.web_access(WebAccess()):
        # A proxy is sent the whole address.
        assert storage.read("http://photos.example/photo.jpg", retries=0) == b"by proxy"
        assert server.paths() == ["http://photos.example/photo.jpg"]
        for host in ("127.0.0.1", "2130706433", "localhost", "169.254.169.254"):
            with pytest.raises(PermissionError, match="--allow-private-hosts"):
                storage.read(f"http://{host}/photo.jpg", retries=0)
    assert len(server.requests) == 1


def test_no_proxy_leaves_the_check_to_the_connection(server, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with storage.web_access(WebAccess()), pytest.raises(PermissionError, match="loopback"):
        _read(server, "hello")
    with storage.web_access(WebAccess(allow_private_hosts=True)):
        assert _read(server, "hello") == b"hello"


def test_a_proxy_that_cannot_be_used_stops_the_job(monkeypatch):
    monkeypatch.setenv("http_proxy", "socks5://user:secret@127.0.0.1:9")
    with (
        storage.web_access(WebAccess(timeout=5)),
        pytest.raises(StorageError, match="cannot use the proxy") as caught,
    ):
        storage.read("http://photos.example/photo.jpg", retries=0)
    assert "secret" not in str(caught.value)


def test_an_environment_variable_allows_private_hosts_for_all_commands(server, monkeypatch):
    storage.set_web_access(None)
    with pytest.raises(PermissionError):
        _read(server, "hello")
    monkeypatch.setenv("CAPTIONER_ALLOW_PRIVATE_HOSTS", "1")
    assert _read(server, "hello") == b"hello"
