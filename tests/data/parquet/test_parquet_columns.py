"""Which column of a Parquet file holds images."""

import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from captioner.data.parquet.columns import image_column, image_columns
from captioner.errors import InputError

datasets = pytest.importorskip("datasets")  # does not admit our lowest versions

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
IMAGE_FEATURE = {"_type": "Image"}


def _features(**features: object) -> dict[bytes, bytes]:
    return {b"huggingface": json.dumps({"info": {"features": features}}).encode()}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"id": pa.int64(), "image": IMAGE}, ["image"]),
        ({"first": IMAGE, "second": IMAGE}, ["first", "second"]),
        ({"scan": IMAGE, "image": pa.binary()}, ["scan"]),
        ({"jpg": pa.binary(), "embedding": pa.binary()}, ["jpg"]),
        ({"Image": pa.large_binary(), "hash": pa.binary()}, ["Image"]),
        ({"scan": pa.binary_view(), "id": pa.string()}, ["scan"]),
        ({"one": pa.binary(), "two": pa.binary()}, ["one", "two"]),
        ({"url": pa.string(), "embedding": pa.binary()}, []),
        ({"url": pa.string(), "jpg": pa.binary()}, ["jpg"]),
        ({"path": pa.binary()}, []),
        ({"image": pa.string(), "id": pa.int64()}, []),
        ({"images": pa.list_(IMAGE)}, []),
        ({"image": pa.struct([("bytes", pa.string()), ("path", pa.string())])}, []),
        ({"image": pa.struct([("bytes", pa.binary())])}, ["image"]),
    ],
)
def test_columns_are_found_by_type_and_name(fields, expected):
    assert image_columns(pa.schema(fields)) == expected


def test_features_of_hugging_face_come_first():
    schema = pa.schema({"photo": pa.binary(), "depth": IMAGE, "label": pa.int64()})
    declared = _features(photo=IMAGE_FEATURE, depth={"_type": "Value"}, label=IMAGE_FEATURE)
    assert image_columns(schema.with_metadata(declared)) == ["photo"]


@pytest.mark.parametrize("text", [b"", b"[]", b'{"info": 1}', b"[" * 100_000, b"\xff"])
def test_broken_features_are_passed_over(text):
    schema = pa.schema({"image": IMAGE}).with_metadata({b"huggingface": text})
    assert image_columns(schema) == ["image"]


def test_what_datasets_writes_is_known():
    features = datasets.Features({"mask": datasets.Value("binary"), "scene": datasets.Image()})
    data = {"mask": [b"1"], "scene": [{"bytes": b"2", "path": None}]}
    file = io.BytesIO()
    datasets.Dataset.from_dict(data, features=features).to_parquet(file)
    assert image_column(pq.read_schema(io.BytesIO(file.getvalue())), "f.parquet") == "scene"


def test_of_several_columns_one_is_to_be_chosen():
    schema = pa.schema({"left": IMAGE, "right": IMAGE, "url": pa.string()})
    with pytest.raises(
        InputError, match=r"^f: each of the columns left and right may be .* with --column$"
    ):
        image_column(schema, "f")
    assert image_column(schema, "f", "right") == "right"
    assert image_column(schema, "f", "url") is None
    with pytest.raises(
        InputError, match=r"^--column up: f has no column up; its columns are left, right, url"
    ):
        image_column(schema, "f", "up")


def test_lists_of_images_are_refused_where_they_are_named():
    schema = pa.schema({"images": pa.list_(IMAGE), "url": pa.string()})
    with pytest.raises(InputError, match="has lists of images in images, which are not supported"):
        image_column(schema, "f", "images")
