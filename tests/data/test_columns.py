"""Columns of a list that come along into the output."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from captioner.config import ListingConfig
from captioner.data.columns import Keep
from captioner.data.listing import list_source
from captioner.errors import InputError
from captioner.schema import KEPT
from conftest import skips_what_pyarrow_cannot_write, write_photos

COLUMNS = ["url", "id", "licence", "caption"]


def _kept(source: object, keep: str, **listing: object) -> pa.Table:
    table = list_source(str(source), ListingConfig(keep=keep, **listing))
    struct = table[KEPT].combine_chunks()
    return pa.table({field.name: struct.field(field.name) for field in struct.type})


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ("id", {"id": "id"}),
        (" licence , id ", {"licence": "licence", "id": "id"}),
        ("id=number,caption=alt", {"id": "number", "caption": "alt"}),
        ("all,caption=alt", {"id": "id", "licence": "licence", "caption": "alt"}),
    ],
)
def test_columns_are_chosen_and_renamed(option, expected):
    assert Keep(option).choose(COLUMNS, "list.csv", "url") == expected


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (
            "width",
            r"^--keep width: no column 'width' in list.csv; the columns are url, id, licence, "
            "caption$",
        ),
        (
            "caption",
            r"column caption of list.csv would have the name caption, .*; rename it",
        ),
        ("all", r"for example --keep all,caption=source_caption$"),
        ("id=score", r"the column id of list.csv would have the name score, .* of the output"),
        ("id=licence,licence", r"a column would be called licence twice; rename it, for example"),
        ("id=", r"a column would be without a name"),
        ("id,", r"^--keep must be names separated by commas, not 'id,'$"),
    ],
)
def test_columns_that_cannot_be_kept_are_refused(option, message):
    with pytest.raises(InputError, match=message):
        Keep(option).choose(COLUMNS, "list.csv", "url")


def test_the_columns_of_the_prompt_and_of_the_ids_are_kept():
    keep = Keep("licence=terms", prompt="{terms} {url}", id_column="id")
    assert keep.choose(COLUMNS, "", "url") == {"licence": "terms", "url": "url", "id": "id"}
    keep = Keep("id=number", prompt="{number}", id_column="number")
    assert keep.choose(COLUMNS, "", "url") == {"id": "number"}
    with pytest.raises(
        InputError, match=r"^--id number: no column 'number' in list.csv; the columns are url,"
    ):
        Keep(None, id_column="number").choose(COLUMNS, "list.csv", "url")
    with pytest.raises(InputError, match=r"^--id: photos has no columns; remove"):
        Keep(None, id_column="number").refuse("photos")


def test_a_column_called_all_or_with_an_equals_sign_is_a_name():
    assert Keep("all").choose(["url", "all", "id"], "", "url") == {"all": "all"}
    assert Keep("a=b").choose(["url", "a=b", "a"], "", "url") == {"a=b": "a=b"}


@pytest.mark.parametrize(("ending", "separator"), [("csv", ","), ("tsv", "\t")])
def test_columns_of_text_stay_text(ending, separator, tmp_path):
    rows = [["url", "id", "size"], ["a.jpg", "007", "1"], ["b.jpg", "008", ""]]
    path = tmp_path / f"list.{ending}"
    path.write_text("\n".join(separator.join(row) for row in rows))
    assert _kept(path, "id,size").to_pydict() == {"id": ["007", "008"], "size": ["1", ""]}


def test_columns_of_json_lines_have_the_types_of_their_values(tmp_path):
    rows = [{"url": "a.jpg", "n": 1, "tags": ["x"]}, {"url": "b.jpg", "n": 2.5, "of": {"k": "v"}}]
    path = tmp_path / "list.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    kept = _kept(path, "all")
    assert [str(each) for each in kept.schema.types] == [
        "double",
        "list<item: string>",
        "struct<k: string>",
    ]
    assert kept.to_pylist() == [
        {"n": 1.0, "tags": ["x"], "of": None},
        {"n": 2.5, "tags": None, "of": {"k": "v"}},
    ]


def test_columns_of_json_lines_without_a_common_type_are_refused(tmp_path):
    rows = [{"url": "a.jpg", "n": 1}, {"url": "b.jpg", "n": "two"}]
    path = tmp_path / "list.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(InputError, match=r"n: 'two' in line 2 has another type than 1; leave"):
        _kept(path, "n")


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ('"x": {}', r"the column x holds \{\}, an object without names"),
        ('"x": [{"y": {}}]', r"the column x holds \{\}, an object without names"),
        ('"x": ' + "[" * 60 + "]" * 60, "the column x has lists or objects .* more than 40 deep"),
        ('"x": "\\ud800"', "x: the text in line 1 is not valid Unicode"),
        ('"x": 18446744073709551616', "x: 18446744073709551616 in line 1 has more than 64 bits"),
        ('"x": 1' + "0" * 5000, "line 1: not valid JSON: a number has more than 4300 digits"),
        ('"\\ud800": 1', r"the name of the column '\\ud800' .* is not valid Unicode"),
    ],
)
def test_values_that_parquet_cannot_store_are_refused(tmp_path, column, message):
    path = tmp_path / "list.jsonl"
    path.write_text('{"url": "a.jpg", ' + column + "}")
    with pytest.raises(InputError, match=message):
        _kept(path, "all")


def test_views_of_strings_become_strings(tmp_path):
    names = pa.array(["a", "b"], pa.string_view())
    table = pa.table({"url": ["a.jpg", "b.jpg"], "x": names})
    with skips_what_pyarrow_cannot_write():
        pq.write_table(table, tmp_path / "list.parquet")
    assert _kept(tmp_path / "list.parquet", "x")["x"].to_pylist() == ["a", "b"]


def test_columns_of_parquet_keep_their_types(tmp_path):
    table = pa.table(
        {
            "url": ["a.jpg", "b.jpg", "a.jpg", None],
            "id": pa.array([1, 2, 3, 4], pa.uint16()),
            "when": pa.array([0, 1, 2, 3], pa.timestamp("ms", "UTC")),
            "kind": pa.array(["x", "y", "x", "y"]).dictionary_encode(),
        }
    )
    pq.write_table(table, tmp_path / "list.parquet")
    kept = _kept(tmp_path / "list.parquet", "id,when,kind")
    assert kept["id"].type == pa.uint16()
    assert kept["when"].type == pa.timestamp("ms", "UTC")
    assert kept["id"].to_pylist() == [1, 2]  # the first row of a URI counts
    assert kept["kind"].to_pylist() == ["x", "y"]


def test_columns_are_refused_where_there_are_none(tmp_path: Path):
    write_photos(tmp_path, 1)
    with pytest.raises(InputError, match=r"^--keep: .* has no columns; remove --keep"):
        list_source(str(tmp_path), ListingConfig(keep="id"))
    (tmp_path / "list.txt").write_text("0.jpg")
    with pytest.raises(InputError, match=r"^--keep: .*list.txt has no columns"):
        list_source(f"{tmp_path}/list.txt", ListingConfig(keep="id"))
