"""The page to look through an output's captions."""

import base64
import html.parser
import io
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from PIL import Image

from captioner import storage
from captioner.caption.job import caption_images
from captioner.cli import main
from captioner.config import DecodeConfig, RunConfig
from captioner.errors import InputError
from captioner.output import attention
from captioner.output.compaction import compact
from captioner.output.directory import OutputDirectory
from captioner.output.rows import read_rows
from captioner.review.gallery import make_gallery
from captioner.review.rows import refuse_listed
from conftest import write_photos

RUN = RunConfig(engine="local", shard_size=4, device="cpu", max_error_rate=1.0)


class _Page(html.parser.HTMLParser):
    """What a browser would find: figures with their texts and pictures, and all tags there are."""

    def __init__(self, page: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.figures: list[dict[str, list[str]]] = []
        self.text = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.tags.append((tag, values))
        if tag == "figure":
            self.figures.append({"photo": [], "map": [], "text": []})
        if tag == "img":
            self.figures[-1][values["class"]].append(values["src"])

    def handle_data(self, data):
        self.text += data
        if self.figures and data.strip():
            self.figures[-1]["text"].append(data.strip())

    def uris(self) -> list[str]:
        return [figure["text"][-1] for figure in self.figures]


def _pixels(data_uri: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data_uri.partition(",")[2]))))


def _caption(photos: Path, output: Path, model: Path, **decode: object) -> pd.DataFrame:
    caption_images(str(photos), str(output), str(model), decode=DecodeConfig(**decode), run=RUN)
    return pd.read_parquet(sorted(output.glob("part-*.parquet")))


@pytest.fixture(scope="module")
def output(tmp_path_factory, model_directory) -> Path:
    """Three parts: eleven photos, of which one is broken."""
    folder = tmp_path_factory.mktemp("gallery")
    write_photos(folder / "photos", 11)[5].write_bytes(b"no image")
    _caption(folder / "photos", folder / "out", model_directory)
    return folder / "out"


@pytest.mark.parametrize("merged", [False, True])
def test_the_order_says_which_rows_are_shown(output, merged, tmp_path):
    rows = pd.concat(pd.read_parquet(part) for part in sorted(output.glob("part-*.parquet")))
    assert (rows["status"] != "ok").sum() == 1
    if merged:
        copy = tmp_path / "copy"
        for path in output.rglob("*"):
            if path.is_file():
                storage.write(str(copy / path.relative_to(output)), path.read_bytes())
        compact(str(copy), 10**9)
        output = copy
        assert len(list(output.glob("part-*.parquet"))) == 1
    scored = rows.dropna(subset="score").sort_values("score", kind="stable")

    def shown(order: str, count: int, seed: int = 0) -> list[str]:
        return _Page(make_gallery(str(output), count=count, order=order, seed=seed)).uris()

    assert shown("worst", 3) == scored["uri"].head(3).tolist()
    assert shown("best", 3) == scored["uri"].tail(3).tolist()[::-1]
    assert shown("best", 100) == scored["uri"].tolist()[::-1]
    assert shown("listed", 7) == rows["uri"].head(7).tolist()
    assert shown("listed", 100) == rows["uri"].tolist()
    drawn = {seed: shown("random", 5, seed) for seed in range(4)}
    assert drawn == {seed: shown("random", 5, seed) for seed in range(4)}
    assert len({frozenset(uris) for uris in drawn.values()}) > 1
    assert all(len(set(uris)) == 5 and set(uris) <= set(rows["uri"]) for uris in drawn.values())
    assert sorted(shown("random", 100)) == rows["uri"].tolist()


def test_each_word_has_the_map_of_its_row(output):
    rows = pd.concat(pd.read_parquet(part) for part in sorted(output.glob("part-*.parquet")))
    page = _Page(make_gallery(str(output), order="listed"))
    for figure, (_, row) in zip(page.figures, rows.iterrows(), strict=True):
        if row["status"] != "ok":
            assert figure["photo"] == figure["map"] == []
            assert figure["text"][0] == f"{row['status']}: {row['error']}"
            continue
        assert figure["text"][: len(row["tokens"])] == row["tokens"].tolist()
        [photo] = figure["photo"]
        with Image.open(row["uri"]) as original:
            wanted = np.asarray(original.resize((320, 240))).astype(int)
        assert np.abs(_pixels(photo) - wanted).mean() < 4
        maps_TGG = attention.decode(row["attention"], row["attention_peak"])
        *of_words, mean = figure["map"]
        for drawn, map_GG in zip(of_words, maps_TGG, strict=True):
            np.testing.assert_array_equal(_pixels(drawn), np.asarray(attention.colour(map_GG)))
        np.testing.assert_array_equal(_pixels(mean), np.asarray(attention.colour(maps_TGG.mean(0))))
    likely = [values["title"] for tag, values in page.tags if values.get("class") == "look word"]
    logprobs = np.concatenate(rows["token_logprobs"].dropna().tolist())
    assert likely == [f"{100 * value:.0f}%" for value in np.exp(logprobs)]


@pytest.mark.parametrize(("kind", "maps"), [("mean", 1), ("none", 0)])
def test_a_page_without_maps_for_words(kind, maps, tmp_path, model_directory):
    write_photos(tmp_path / "photos", 2)
    _caption(tmp_path / "photos", tmp_path / "out", model_directory, attention=kind)
    page = _Page(make_gallery(str(tmp_path / "out")))
    assert [len(figure["map"]) for figure in page.figures] == [maps, maps]
    assert all(len(figure["text"]) > 3 for figure in page.figures)


def test_names_and_captions_cannot_do_anything_in_the_page(tmp_path, model_directory):
    photos = tmp_path / "p<script>alert(1)</script>"
    names = [
        "<img src=x onerror=alert(1)>.jpg",
        '"><script>alert(1)<',
        "'onmouseover='alert(1)",
        "{{ 7 * 7 }}{% raw %}",
        "</style><style>*{display:none}",
        "\u202egpj.exe",
    ]
    data = write_photos(tmp_path / "one", 1)[0].read_bytes()
    for name in names:
        path = photos / (name.replace("/", "⁄") + ".jpg")
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_bytes(data)
    output = tmp_path / "o</title><script>alert(1)</script>"
    _caption(photos, output, model_directory)
    part = output / "part-000000.parquet"
    rows = pd.read_parquet(part)
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pq.read_table(part)
    hostile = [["</bdi><script>alert(1)</script>"] * len(tokens) for tokens in rows["tokens"]]
    column = pa.array(hostile, table.schema.field("tokens").type)
    table = table.set_column(table.schema.get_field_index("tokens"), "tokens", column)
    pq.write_table(table, part)
    page = _Page(make_gallery(str(output)))
    assert {tag for tag, _ in page.tags} == {
        *("html", "meta", "title", "style", "h1", "p", "i", "main"),
        *("figure", "figcaption", "img", "div", "span", "bdi"),
    }
    for tag, values in page.tags:
        assert not [name for name in values if name.startswith("on") or name == "href"]
        if tag == "img":
            assert str(values["src"]).startswith(("data:image/png;", "data:image/jpeg;"))
    policy = [v["content"] for _, v in page.tags if "http-equiv" in v]
    assert policy == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]
    assert len(page.figures) == len(names)
    assert page.text.count("</bdi><script>alert(1)</script>") > len(names)
    assert "{{ 7 * 7 }}{% raw %}" in page.text
    assert "\u202e" not in page.text


def test_photos_that_are_gone_are_told(output, tmp_path, model_directory):
    photos = write_photos(tmp_path / "photos", 3)
    _caption(photos[0].parent, tmp_path / "out", model_directory)
    photos[1].unlink()
    photos[2].write_bytes(b"now a text")
    page = _Page(make_gallery(str(tmp_path / "out"), order="listed"))
    assert [len(figure["photo"]) for figure in page.figures] == [1, 0, 0]
    problems = [figure["text"][0] for figure in page.figures]
    assert "No such file" in problems[1]
    assert problems[2] == f"cannot decode {photos[2]}: not an image in a known format"


def test_the_command_writes_the_page(output, tmp_path):
    target = tmp_path / "new" / "page.html"
    arguments = ["gallery", str(output), "-o", str(target), "--images", "2", "--order", "best"]
    result = CliRunner().invoke(main, arguments)
    assert (result.exit_code, result.output) == (0, f"wrote {target}\n")
    assert target.read_text() == make_gallery(str(output), count=2, order="best")
    for arguments, message in (
        (
            ["gallery", str(output), "-o", str(target), "--images", "0"],
            "--images must be at least 1, not 0",
        ),
        (["gallery", str(tmp_path), "-o", str(target)], "is not a caption job's output"),
        (["gallery", str(output), "-o", str(tmp_path)], "not an HTML file"),
    ):
        result = CliRunner().invoke(main, arguments)
        assert result.exit_code == 2, result.output
        [line] = result.output.splitlines()
        assert message in line


def test_a_command_writes_over_no_image_and_no_part(output):
    photo = next(read_rows(OutputDirectory(str(output))))["uri"][0].as_py()
    with pytest.raises(InputError, match="is an image of"):
        refuse_listed(str(output), photo)
    for page in ("part-000000.parquet", "page.html"):
        arguments = ["gallery", str(output), "--page", f"{output}/{page}", "--seed", "-1"]
        result = CliRunner().invoke(main, arguments)
        assert (result.exit_code, result.output.count("\n")) == (2, 1), result.output
    assert not (output / "page.html").exists()
