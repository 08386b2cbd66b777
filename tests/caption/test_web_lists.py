"""Lists of web addresses, on a server that misbehaves: one row each, with its reason."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from captioner import storage
from captioner.caption.job import caption_images, plan_captioning
from captioner.cli import main
from captioner.config import RunConfig
from captioner.errors import InputError
from conftest import write_photos
from web_server import WebServer, serving

_PAGE = b"<!DOCTYPE html><html><body>Sign in to see this photo</body></html>"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[WebServer]:
    with serving() as running:
        for path in write_photos(tmp_path / "photos", 4):
            running.files[path.name] = path.read_bytes()
        running.files["page.jpg"] = _PAGE
        running.files["huge.jpg"] = running.files["photo-0000.jpg"] + bytes(300_000)
        yield running


#: Paths on the server, with the status of each row and the reason.
_EXPECTED = {
    "photo-0000.jpg": ("ok", None),
    "photo-0001.jpg?size=large": ("ok", None),
    "to/photo-0000.jpg": ("ok", None),
    "once/503/0/photo-0001.jpg": ("ok", None),
    "once/429/1/photo-0002.jpg": ("ok", None),
    "nolength/photo-0003.jpg": ("ok", None),
    "chunked/photo-0000.jpg": ("ok", None),
    "gzip/photo-0001.jpg": ("ok", None),
    "status/404": ("unreadable", "HTTP status 404 Not Found"),
    "status/500": ("unreadable", "HTTP status 500 Internal Server Error"),
    "cut/photo-0002.jpg": ("unreadable", "the body is cut off"),
    "loop/1": ("unreadable", "more than 5 redirects"),
    "slow/body": ("unreadable", "the request took more than 2 seconds"),
    "garbage/1": ("unreadable", "the connection broke off, or the answer is not HTTP"),
    "short/photo-0003.jpg": ("undecodable", None),
    "page.jpg": ("undecodable", None),
    "huge.jpg": ("rejected", "more than 200000 bytes"),
    "endless/1": ("rejected", "more than 200000 bytes"),
}


def _list(directory: Path, server: WebServer, paths: list[str]) -> str:
    place = directory / "list.txt"
    place.write_text("".join(f"{server.address}/{path}\n" for path in paths))
    return str(place)


@pytest.mark.parametrize("engine", ["local", pytest.param("ray", marks=pytest.mark.thorough)])
def test_each_address_has_one_row_with_its_reason(
    engine, server, model_directory, tmp_path, request
):
    if engine == "ray":
        request.getfixturevalue("local_ray")
    run = RunConfig(
        engine=engine,
        retries=1,
        max_bytes=200_000,
        max_error_rate=1,
        shard_size=7,
        http_timeout=2,
        user_agent="tests/1",
        allow_private_hosts=True,
    )
    source, output = _list(tmp_path, server, list(_EXPECTED)), str(tmp_path / "o")

    caption_images(source, output, str(model_directory), run=run)

    rows = pq.read_table(output).to_pylist()
    got = {row["uri"].removeprefix(f"{server.address}/"): row for row in rows}
    assert len(rows) == len(_EXPECTED)
    assert {path: row["status"] for path, row in got.items()} == {
        path: status for path, (status, _) in _EXPECTED.items()
    }
    for path, (_, error) in _EXPECTED.items():
        if error is not None:
            assert got[path]["error"] == error, path
    for path in ("to/photo-0000.jpg", "chunked/photo-0000.jpg"):
        assert got[path]["caption"] == got["photo-0000.jpg"]["caption"]
    assert {headers["User-Agent"] for _, headers in server.requests} == {"tests/1"}
    asked = Counter(server.paths())
    assert (asked["/status/404"], asked["/status/500"]) == (1, 2)  # retried once

    requests = len(server.requests)
    caption_images(source, output, str(model_directory), run=run)
    assert len(server.requests) == requests  # a finished job asks nobody


@pytest.mark.parametrize("engine", ["local", "ray"])
def test_private_hosts_are_rows_unless_allowed(engine, server, model_directory, tmp_path, request):
    if engine == "ray":
        request.getfixturevalue("local_ray")
    refused = RunConfig(engine=engine, max_error_rate=1)
    source, output = _list(tmp_path, server, ["photo-0000.jpg"]), str(tmp_path / "o")

    caption_images(source, output, str(model_directory), run=refused)
    [row] = pq.read_table(output).to_pylist()
    assert row["status"] == "unreadable"
    assert row["error"] == (
        "the host is 127.0.0.1, a loopback address; to allow it, add --allow-private-hosts"
    )
    assert not server.requests

    # The setting is not a part of the fingerprint: the same job goes on with it.
    allowed = RunConfig(engine=engine, retry_failed=True, allow_private_hosts=True)
    caption_images(source, output, str(model_directory), run=allowed)
    [row] = pq.read_table(output).to_pylist()
    assert row["status"] == "ok"


def test_the_settings_of_a_job_end_with_it(server, model_directory, tmp_path):
    source = _list(tmp_path, server, ["photo-0000.jpg"])
    run = RunConfig(engine="local", allow_private_hosts=True)
    caption_images(source, str(tmp_path / "o"), str(model_directory), run=run)
    with pytest.raises(PermissionError):
        storage.read(f"{server.address}/photo-0000.jpg")


def test_a_list_itself_may_be_on_the_web(server, model_directory, tmp_path):
    server.files["list.csv"] = f"uri\n{server.address}/photo-0001.jpg\nphoto-0002.jpg\n".encode()
    source = f"{server.address}/list.csv"
    run = RunConfig(engine="local", allow_private_hosts=True)
    caption_images(source, str(tmp_path / "o"), str(model_directory), run=run)
    assert pq.read_table(tmp_path / "o")["status"].to_pylist() == ["ok", "ok"]
    with pytest.raises(InputError, match="a loopback address"):
        plan_captioning(source, str(tmp_path / "p"), str(model_directory), run=RunConfig())


def test_a_dry_run_asks_no_host(server, model_directory, tmp_path):
    source = _list(tmp_path, server, ["photo-0000.jpg"])
    run = RunConfig(engine="local", allow_private_hosts=True)
    plan = plan_captioning(source, str(tmp_path / "o"), str(model_directory), run=run)
    assert (plan.images, server.requests) == (1, [])


def test_credentials_in_a_list_are_refused_and_not_shown(model_directory, tmp_path):
    (tmp_path / "list.txt").write_text("https://me:secret@example.com/a.jpg\n")
    command = ["caption", str(tmp_path / "list.txt"), str(tmp_path / "o")]
    result = CliRunner().invoke(main, [*command, "--model", str(model_directory)])
    assert result.exit_code == 2
    assert "contains credentials" in result.output
    assert "secret" not in result.output


@pytest.mark.parametrize("agent", ["", " ", "two\nlines", "ünicode"])
def test_a_user_agent_is_one_line_of_ascii(agent):
    with pytest.raises(InputError, match="user_agent must be ASCII text on one line"):
        RunConfig(user_agent=agent)
