"""The review page's server: what it answers, what it refuses, outputs that grow and change."""

import io
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import time
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import httpx2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from PIL import Image
from starlette.testclient import TestClient

from captioner import storage
from captioner.caption.job import caption_images
from captioner.cli import main
from captioner.config import ListingConfig, RunConfig
from captioner.output import attention
from captioner.output.compaction import compact
from captioner.output.decisions import Journal, read_decisions
from captioner.output.directory import OutputDirectory
from captioner.review.web.app import make_app
from captioner.review.web.index import RowIndex
from captioner.review.web.pictures import PictureCache
from captioner.review.web.security import Guard
from captioner.review.web.view import View
from conftest import write_photos

PORT = 8000
RUN = RunConfig(engine="local", shard_size=4)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, model_directory: Path) -> Path:
    folder = tmp_path_factory.mktemp("web")
    write_photos(folder / "photos", 10)
    (folder / "photos" / "<script>.jpg").write_bytes(b"no image")
    caption_images(str(folder / "photos"), str(folder / "out"), str(model_directory), run=RUN)
    return folder / "out"


@pytest.fixture
def output(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "out"))


class Page:
    """A client of a page over an output."""

    def __init__(self, output: str, token: str | None = None):
        self.index = RowIndex(OutputDirectory(output))
        self.journal = Journal(output)
        self.guard = Guard(PORT, token)
        app = make_app(self.index, self.journal, self.guard)
        self.client = TestClient(app, base_url=f"http://127.0.0.1:{PORT}")
        self.index.wait(1 << 30)  # until all of it is indexed

    def get(self, path: str, **options: Any) -> Any:
        return self.client.get(path, **options)

    def decide(
        self, number: int, decision: str | None, caption: str | None, seen: str = "0"
    ) -> Any:
        return self.client.post(
            f"/decision/{number}",
            json={"decision": decision, "caption": caption, "revision": seen},
            headers={"X-Captioner-Token": self.guard.write_token},
        )

    def close(self) -> None:
        self.client.close()
        self.index.close()
        self.journal.close()


@pytest.fixture
def page(output: Path) -> Iterator[Page]:
    opened = Page(str(output))
    yield opened
    opened.close()


def _numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r'data-number="(\d+)"', text)]


def test_every_answer_has_the_headers_that_confine_the_page(page):
    for path in ("/", "/row/0", "/photo/small/1", "/static/review.js", "/nowhere"):
        headers = page.get(path).headers
        assert "default-src 'none'" in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
        assert "access-control-allow-origin" not in headers


def test_photos_in_tar_files_are_shown_and_their_columns_are_filters(tmp_path, model_directory):
    photos = write_photos(tmp_path / "photos", 5)
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for number, photo in enumerate(photos):
            tar.add(photo, photo.name)
            text = json.dumps({"place": "sea" if number % 2 else "town"}).encode()
            info = tarfile.TarInfo(f"{photo.stem}.json")
            info.size = len(text)
            tar.addfile(info, io.BytesIO(text))
    caption_images(
        f"{tmp_path}/a.tar",
        f"{tmp_path}/out",
        str(model_directory),
        run=RUN,
        listing=ListingConfig(keep="place"),
    )
    page = Page(f"{tmp_path}/out")
    try:
        for number in range(5):
            shown = page.get(f"/photo/large/{number}")
            assert (shown.status_code, shown.headers["content-type"]) == (200, "image/jpeg")
            with (
                Image.open(io.BytesIO(shown.content)) as picture,
                Image.open(photos[number]) as own,
            ):
                assert picture.width / picture.height == pytest.approx(own.width / own.height, 0.01)
        assert _numbers(page.get("/?column=place&value=sea").text) == [1, 3]
        assert "town" in page.get("/row/0").text
    finally:
        page.close()


def test_an_unexpected_error_has_the_headers_too(page, monkeypatch):
    monkeypatch.setattr(page.index, "read_row", lambda _: 1 / 0)
    client = TestClient(page.client.app, page.client.base_url, raise_server_exceptions=False)

    answer = client.get("/row/1")

    assert answer.status_code == 500
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert "division" not in answer.text


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1", f"127.0.0.1.evil.example:{PORT}", ""]
)
def test_another_name_for_this_machine_is_refused(page, host):
    assert page.get("/", headers={"host": host}).status_code == 421
    assert page.get("/", headers={"host": f"localhost:{PORT}"}).status_code == 200


def test_a_decision_needs_the_pages_own_token(page, output):
    body = {"decision": "accepted", "caption": None, "revision": "0"}
    for headers in ({}, {"X-Captioner-Token": "guessed"}):
        assert page.client.post("/decision/1", json=body, headers=headers).status_code == 403
    assert read_decisions(str(output)) == {}


def test_where_other_machines_are_let_in_the_token_is_asked_for(output):
    page = Page(str(output), token="secret")
    try:
        assert page.get("/").status_code == 403
        assert page.get("/?token=guessed").status_code == 403
        assert page.get("/photo/small/0").status_code == 403
        answer = page.get("/?token=secret&status=ok", follow_redirects=False)
        assert answer.status_code == 303
        assert answer.headers["location"] == "/?status=ok"
        assert "HttpOnly" in answer.headers["set-cookie"]
        assert page.get("/").status_code == 200
    finally:
        page.close()


@pytest.mark.parametrize("token", ["a&b=c#d;e f", "schlüssel-✓"])
def test_a_token_may_have_any_characters(output, token):
    page = Page(str(output), token=token)
    try:
        quoted = urllib.parse.quote(token, safe="")
        assert page.get(f"/?token={quoted}").status_code == 200
        assert page.get("/row/1").status_code == 200
        answer = page.get(f"/%2F/evil.example/?token={quoted}", follow_redirects=False)
        assert not answer.headers["location"].startswith("//")
    finally:
        page.close()


def test_names_and_captions_are_escaped(page):
    assert page.decide(1, "edited", "<img src=x onerror=alert(1)> & more").status_code == 200
    for path in ("/", "/row/0", "/row/1"):
        text = page.get(path).text
        assert "<script>.jpg" not in text
        assert "<img src=x" not in text
    assert "&lt;img src=x onerror=alert(1)&gt; &amp; more" in page.get("/row/1").text


@pytest.mark.parametrize(
    "path",
    [
        "/photo/small/11",
        "/photo/small/-1",
        "/photo/huge/1",
        "/photo/small/..%2F..%2Fetc%2Fpasswd",
        "/map/1/99",
        "/map/0/0",
        "/row/4000000000",
        f"/photo/small/{10**60}",
        f"/row/{10**60}",
        "/static/..%2Fapp.py",
        "/static/app.py",
    ],
)
def test_nothing_but_the_rows_pictures_is_served(page, path):
    answer = page.get(path)
    assert answer.status_code == 404
    assert len(answer.text) < 200


@pytest.mark.parametrize(
    "body",
    [
        b"{",
        b"[]",
        b'{"decision": "accepted"}',
        b'{"decision": "deleted", "caption": null, "revision": "0"}',
        b'{"decision": "edited", "caption": null, "revision": "0"}',
        b'{"decision": "edited", "caption": "  ", "revision": "0"}',
        b'{"decision": "accepted", "caption": "text", "revision": "0"}',
        b'{"decision": "accepted", "caption": null, "revision": 0}',
        b'{"decision": "accepted", "caption": null, "revision": "-1"}',
        b'{"decision": "edited", "caption": "half \\ud800", "revision": "0"}',
        b'{"decision": "edited", "caption": "\\u0000", "revision": "0"}',
        json.dumps({"decision": "edited", "caption": "a" * 20_000, "revision": "0"}).encode(),
    ],
)
def test_a_decision_that_makes_no_sense_is_refused(page, output, body):
    headers = {"X-Captioner-Token": page.guard.write_token}
    assert page.client.post("/decision/1", content=body, headers=headers).status_code == 400
    assert read_decisions(str(output)) == {}


def test_a_body_that_does_not_tell_its_length_is_bounded(page):
    headers = {"X-Captioner-Token": page.guard.write_token}
    body = (bytes(50_000) for _ in range(20))

    assert page.client.post("/decision/1", content=body, headers=headers).status_code == 413


def test_an_output_that_is_overwritten_is_neither_shown_nor_decided_on(page, output, finished):
    assert page.decide(2, "accepted", None).status_code == 200
    run = output / "__captioner" / "run.json"
    shutil.rmtree(output / "__captioner" / "review")  # as caption --overwrite does
    run.write_text(run.read_text().replace('"created": "2', '"created": "3'))

    answer = page.decide(3, "accepted", None)
    assert answer.status_code == 500
    assert "overwritten" in answer.text
    assert "overwritten" in page.get("/row/3").text
    assert "overwritten" in page.get("/").text
    page.journal.close()
    assert read_decisions(str(output)) == {}


def test_decisions_filter_at_once_and_conflicts_are_told(page):
    made = page.decide(2, "accepted", None).json()

    assert _numbers(page.get("/?decision=accepted").text) == [2]
    assert len(_numbers(page.get("/?decision=undecided").text)) == 10
    conflict = page.decide(2, "rejected", None)
    assert conflict.status_code == 409
    assert conflict.json() == made
    assert page.decide(2, None, None, seen=made["revision"]).status_code == 200
    assert _numbers(page.get("/?decision=accepted").text) == []


def test_an_edited_caption_is_found_by_its_new_words(page):
    page.decide(3, "edited", "A zebra, running.")

    assert _numbers(page.get("/?words=zebra+running").text) == [3]
    assert 3 not in _numbers(page.get("/?without=Zebra").text)
    assert _numbers(page.get("/?words=zebr").text) == []


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("status=undecodable", lambda rows: rows == [0]),
        ("status=ok&status=undecodable", lambda rows: len(rows) == 11),
        ("words=%27%3B+DROP+TABLE+captions%3B--", lambda rows: rows == []),
        ("column=__row%22+OR+TRUE+--&value=1", lambda rows: len(rows) == 11),
        ("column=width&value=80", lambda rows: len(rows) == 10),
        ("least=abc&page=x&sort=sideways&seed=nan", lambda rows: len(rows) == 11),
        ("least=-1e300", lambda rows: len(rows) == 11),
        ("least=0.5", lambda rows: rows == []),
        ("page=2", lambda rows: rows == []),
        ("page=-3", lambda rows: len(rows) == 11),
    ],
)
def test_a_view_is_its_address(page, query, expected):
    answer = page.get(f"/?{query}")

    assert answer.status_code == 200
    assert expected(_numbers(answer.text))


def test_orders(page):
    rows = page.index.query("SELECT __row, score, caption FROM captions WHERE status = 'ok'", [])
    by_score = [row["__row"] for row in sorted(rows, key=lambda row: -row["score"])]

    assert _numbers(page.get("/?sort=best").text) == [*by_score, 0]
    assert _numbers(page.get("/?sort=random&seed=1").text) == _numbers(
        page.get("/?sort=random&seed=1").text
    )
    assert _numbers(page.get("/?sort=random&seed=1").text) != _numbers(
        page.get("/?sort=random&seed=2").text
    )


def test_the_next_image_is_the_views_next(page):
    order = _numbers(page.get("/?sort=worst").text)

    text = page.get(f"/row/{order[3]}?sort=worst").text

    assert f'rel="prev" href="/row/{order[2]}?sort=worst"' in text
    assert f'rel="next" href="/row/{order[4]}?sort=worst"' in text


def test_a_photo_that_is_gone_is_a_404_and_its_row_is_still_shown(page, finished):
    photo = finished.parent / "photos" / "photo-0009.jpg"
    data = photo.read_bytes()
    photo.unlink()
    try:
        assert page.get("/photo/small/10").status_code == 404
        assert page.get("/row/10").status_code == 200
    finally:
        photo.write_bytes(data)


def test_rows_that_are_written_meanwhile_appear(model_directory, tmp_path):
    write_photos(tmp_path / "photos", 3)
    arguments = (str(tmp_path / "photos"), str(tmp_path / "out"), str(model_directory))
    caption_images(*arguments, run=RUN)
    page = Page(str(tmp_path / "out"))
    try:
        assert _numbers(page.get("/").text) == [0, 1, 2]
        write_photos(tmp_path / "photos", 9)
        caption_images(*arguments, run=RUN)
        _wait_for(lambda: page.get("/progress").json()["rows"] == 9)
        assert len(_numbers(page.get("/").text)) == 9
    finally:
        page.close()


def test_merged_parts_are_indexed_again(page, output):
    before = page.get("/row/7").text
    compact(str(output), 10_000_000)
    _wait_for(lambda: len(page.index.directory.parts()) == 1 and page.index.rows == 11)
    _wait_for(lambda: page.get("/row/7").status_code == 200)

    assert page.get("/row/7").text == before


def _wait_for(condition: Any) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end, "it did not become true in time"
        time.sleep(0.1)


def test_an_output_in_a_bucket(finished, memory_bucket):
    fs = fsspec.filesystem("memory")
    fs.put(f"{finished}/", f"{memory_bucket}/out/", recursive=True)
    page = Page(f"{memory_bucket}/out")
    try:
        assert len(_numbers(page.get("/").text)) == 11
        assert page.get("/map/1/0").status_code == 200
        assert page.decide(1, "accepted", None).status_code == 200
    finally:
        page.close()
    assert storage.size(f"{memory_bucket}/out/__captioner/review.parquet")


def test_pictures_are_made_once_and_the_oldest_are_dropped():
    cache, made = PictureCache(limit=25), []

    def get(key: str) -> bytes:
        return cache.get(key, lambda: made.append(key) or bytes(10))

    for key in ("a", "b", "a", "c", "a", "b"):
        get(key)

    assert made == ["a", "b", "c", "b"]


def test_a_views_address_says_all_of_it():
    view = View(status=("ok",), words="a dog", least=-1.5, sort="best", page=3)

    assert view.url() == "status=ok&words=a+dog&least=-1.5&sort=best&page=3"
    assert view.toggled("status", "ok") == "words=a+dog&least=-1.5&sort=best"


def test_the_command_refuses_other_machines_without_a_token(output):
    result = CliRunner().invoke(main, ["review", str(output), "--host", "0.0.0.0"])

    assert result.exit_code == 2
    assert "--token" in result.output


def test_the_command_refuses_what_is_no_output(tmp_path):
    result = CliRunner().invoke(main, ["review", str(tmp_path)])

    assert result.exit_code == 2
    assert result.output.count("\n") == 1


def test_a_port_that_is_taken_is_told_in_one_line(output):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        result = CliRunner().invoke(main, ["review", str(output), "--port", port])

    assert result.exit_code == 2
    assert result.output.startswith(f"captioner: cannot listen on 127.0.0.1:{port}: ")
    assert result.output.count("\n") == 1


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_server_with_one_file_of_decisions(output, number, host):
    command = [sys.executable, "-m", "captioner.cli", "review", str(output), "--host", host]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        address = process.stdout.readline().split()[2]
        with httpx2.Client(base_url=address, timeout=30) as client:  # its connection stays open
            text = client.get("/").text
            token = re.search(r'write-token" content="([^"]+)"', text)
            assert token is not None
            body = {"decision": "accepted", "caption": None, "revision": "0"}
            headers = {"X-Captioner-Token": token[1]}
            assert client.post("/decision/1", json=body, headers=headers).status_code == 200
            process.send_signal(number)
            _, errors = process.communicate(timeout=30)
    finally:
        process.kill()
        process.wait()

    assert process.returncode == 0, errors
    assert errors == ""
    assert len(read_decisions(str(output))) == 1
    assert storage.names(f"{output}/__captioner/review") == []
    assert (output / "__captioner" / "review.parquet").exists()


@pytest.fixture
def pretrained(output: Path) -> Path:
    """The output with several captions a row and maps of two rows and three columns."""
    maps_THW = np.zeros((2, 2, 3), np.float32)
    maps_THW[0, 0, 2] = maps_THW[1, 1, 0] = 1
    data, peaks = attention.encode(maps_THW)
    for path in output.glob("part-*.parquet"):
        table = pq.read_table(path)
        rows = table.to_pylist()
        for row in rows:
            if row["status"] == "ok":
                row |= {"tokens": ["a", "dog"], "token_logprobs": [-0.1, -0.2]}
                row |= {"attention": data, "attention_peak": peaks}
                row |= {"attention_height": 2, "attention_width": 3}
                row |= {"captions": ["a dog", "<b>a cat</b>"], "finish": "length"}
        pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), path)
    return output


def test_all_captions_and_maps_that_are_not_square(pretrained):
    page = Page(str(pretrained))
    try:
        text = page.get("/row/1").text
        assert re.findall("<li><bdi>(.*?)</bdi></li>", text) == [
            "a dog",
            "&lt;b&gt;a cat&lt;/b&gt;",
        ]
        with Image.open(io.BytesIO(page.get("/map/1/0").content)) as picture:
            assert picture.size == (3, 2)
            pixels = np.asarray(picture).astype(int).sum(2)
        assert np.unravel_index(pixels.argmax(), pixels.shape) == (0, 2)
        assert 'id="captions"' not in page.get("/row/0").text
        assert len(_numbers(page.get("/?finish=length").text)) == 10
        assert "finish=length" in page.get("/").text
    finally:
        page.close()
