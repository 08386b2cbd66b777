import dataclasses
import io
import typing

import duckdb
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from captioner import schema
from captioner.schema import (
    COLUMNS,
    MANIFEST,
    STATUSES,
    CaptionRow,
    part_schema,
    rows_to_table,
)

GOOD = CaptionRow(
    uri="/photos/a dog.jpg",
    caption="a dog",
    tokens=["a", "dog"],
    token_logprobs=[-0.5, -0.25],
    score=-0.5,
    attention=bytes(range(8)),
    attention_peak=[0.5, 0.25],
    width=640,
    height=480,
    bytes=2**40,
    status="ok",
)
BAD = CaptionRow(uri="/photos/b.jpg", bytes=3, status="undecodable", error="not an image")


def test_the_columns_are_those_of_the_contract():
    assert [(field.name, str(field.type)) for field in COLUMNS] == [
        ("uri", "string"),
        ("caption", "string"),
        ("tokens", "list<item: string>"),
        ("token_logprobs", "list<item: float>"),
        ("score", "float"),
        ("attention", "binary"),
        ("attention_peak", "list<item: float>"),
        ("width", "int32"),
        ("height", "int32"),
        ("bytes", "int64"),
        ("status", "string"),
        ("error", "string"),
        ("attention_height", "int32"),
        ("attention_width", "int32"),
        ("finish", "string"),
        ("captions", "list<item: string>"),
    ]
    assert [field.name for field in COLUMNS if not field.nullable] == ["uri", "status"]


def test_the_manifest_says_what_is_where():
    assert [(field.name, str(field.type)) for field in MANIFEST] == [
        ("uri", "string"),
        ("size", "int64"),
        ("container", "string"),
        ("version", "string"),
        ("column", "string"),
        ("row_group", "int32"),
        ("position", "int64"),
        ("problem", "string"),
        ("shard", "int32"),
        ("row", "int32"),
    ]
    assert [field.name for field in MANIFEST if not field.nullable] == ["uri", "shard", "row"]


def test_the_statuses_are_those_of_the_contract():
    assert STATUSES == ("ok", "unreadable", "undecodable", "rejected", "failed")
    assert typing.get_args(schema.Status) == STATUSES


def test_the_versions_are_those_of_the_contract():
    assert (schema.SCHEMA_VERSION, schema.ATTENTION_VERSION) == (2, 1)


def test_a_row_has_the_columns_fields():
    assert [field.name for field in dataclasses.fields(CaptionRow)] == COLUMNS.names
    optional = {field.name for field in dataclasses.fields(CaptionRow) if field.default is None}
    assert optional == {field.name for field in COLUMNS if field.nullable}


def test_the_repr_of_a_row_leaves_the_maps_out():
    assert "attention=" not in repr(GOOD)


def test_rows_become_a_table_in_order():
    table = rows_to_table([GOOD, BAD])
    assert table.schema.equals(COLUMNS)
    assert table.to_pylist() == [dataclasses.asdict(GOOD), dataclasses.asdict(BAD)]


@pytest.mark.parametrize("rows", [[], [BAD], [BAD] * 3])
def test_types_are_as_declared_where_a_column_is_null_throughout(rows):
    table = rows_to_table(rows)
    assert table.schema.equals(COLUMNS)
    assert len(table) == len(rows)
    assert all(table["caption"].is_null().to_pylist())


def test_a_caption_without_words_is_not_null():
    row = dataclasses.replace(
        GOOD, caption="", tokens=[], token_logprobs=[], attention=b"", attention_peak=[]
    )
    [read] = rows_to_table([row]).to_pylist()
    assert (read["caption"], read["tokens"], read["attention"]) == ("", [], b"")


def test_the_largest_sizes_fit():
    row = dataclasses.replace(GOOD, width=2**31 - 1, height=2**31 - 1, bytes=2**63 - 1)
    assert rows_to_table([row]).to_pylist() == [dataclasses.asdict(row)]


def test_a_part_says_how_to_read_its_maps():
    declared = part_schema(attention="tokens", levels=127)
    assert declared.remove_metadata().equals(COLUMNS)
    assert declared.metadata == {
        b"captioner.schema": b"2",
        b"captioner.attention": b"tokens",
        b"captioner.attention.version": b"1",
        b"captioner.attention.levels": b"127",
    }


def test_parts_are_read_with_their_types_and_metadata(tmp_path):
    """Also where the first part, which readers take the schema from, has no caption at all."""
    declared = part_schema(attention="tokens", levels=127)
    for number, rows in enumerate([[BAD, BAD], [GOOD, BAD]]):
        path = tmp_path / f"part-{number:06d}.parquet"
        table = rows_to_table(rows, declared)
        pq.write_table(table, path)
        read = pq.read_table(path)
        assert read.schema.metadata == declared.metadata
        # Parquet calls a list's values "element", Arrow calls them "item".
        types = [str(kind).replace("element", "item") for kind in read.schema.types]
        assert types == [str(kind) for kind in COLUMNS.types]
        assert read.cast(declared).equals(table)

    frame = pd.read_parquet(tmp_path)
    assert frame["uri"].tolist() == [BAD.uri, BAD.uri, GOOD.uri, BAD.uri]
    assert list(frame["tokens"][2]) == ["a", "dog"]
    query = f"SELECT uri, caption, attention FROM '{tmp_path}/*.parquet' WHERE status = 'ok'"
    assert duckdb.sql(query).fetchall() == [(GOOD.uri, "a dog", GOOD.attention)]


def test_a_row_without_a_uri_is_not_written():
    table = rows_to_table([dataclasses.replace(GOOD, uri=None)])
    with pytest.raises(pa.ArrowInvalid, match=r"uri.* non-nullable"):
        pq.write_table(table, io.BytesIO())
