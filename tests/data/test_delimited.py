import csv
import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from captioner.data.delimited import CsvTable, decode_text
from captioner.errors import InputError


def _read(text: str, name: str = "image") -> list[list[str]]:
    return [row.fields for row in CsvTable("t.csv", text.encode()).rows(name)]


@given(
    rows=st.lists(
        st.lists(
            st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\r\n")),
            min_size=2,
            max_size=2,
        )
    ),
    end=st.sampled_from(["\n", "\r\n", "\r"]),
)
def test_what_a_csv_writer_writes_is_read_back(rows: list[list[str]], end: str):
    sink = io.StringIO()
    csv.writer(sink, lineterminator=end, quoting=csv.QUOTE_ALL).writerows(
        [["image", "caption"], *rows]
    )
    assert _read(sink.getvalue()) == rows


def test_rows_have_the_line_where_they_begin():
    text = 'image,caption\n\na.jpg,"Two lines,\nnot rows"\n\nb.jpg,A dog'
    rows = list(CsvTable("t.csv", text.encode()).rows("image"))
    assert [(row.line, row.fields[0]) for row in rows] == [(3, "a.jpg"), (6, "b.jpg")]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        # Never closed: at the end, in the middle, in the first of the columns.
        ('image,caption\na.jpg,A\nb.jpg,"Stop says\nc.jpg,A', "line 3: the quote .* is never"),
        ('image,caption\na.jpg,"A', "line 2: the quote .* is never closed"),
        ('image,caption\n"a.jpg,A\nb.jpg,A\n', "line 2: the quote .* is never closed"),
        ('"image,caption\na.jpg,A\n', "line 1: the quote .* is never closed"),
        # Closed by a quote of a later row.
        ('image,caption\na.jpg,"Stop\nb.jpg,A\nc.jpg,says a"\n', "line 2: .* closed on line 4"),
        ('image,caption\na.jpg,"Stop\nb.jpg,"\n', "line 2: .* closed on line 3, with other"),
        ('image,caption\na.jpg,"Stop\nb.jpg,"A, B"\n', "line 2: text follows .* on line 3"),
        ('caption,image\n"Stop,a.jpg\nA,b.jpg\n B",c.jpg\n', "line 2: .* closed on line 4"),
        ('image,n,caption\na,1,"Stop\nb,2,A"\n', None),  # no sign that b is an image
        ('image,n,caption\n10,1,"Stop\n11,2,A"\n', "line 2: .* closed on line 3, with other"),
        ('image,n,caption\ns3://b/a,1,"Stop\ns3://b/b,2,A"\n', "line 2: .* closed on line 3"),
        ('image,n,caption\na.raw,1,"Stop\nb.RAW,2,A"\n', "line 2: .* closed on line 3, with other"),
        ('image\n"a.jpg\nb.jpg"\n', "line 2: .* closed on line 3, with other"),
        # Captions of several lines.
        ('image,caption\na.jpg,"At 10.30, a dog\nAt 11.45, a cat.\nAnd, a b.jpg c"\n', None),
        ('caption,image\n"A dog.\nA cat, too.",a.jpg\n', None),
        ('image\n"line\nbreak.jpg"\n', None),
        # Other damage.
        ('image,caption\na.jpg,"Stop" sign\n', "line 2: text follows .* on line 2"),
        ("image,caption\na.jpg\n", "line 2: 1 field, but 2 columns"),
        ("image\na.jpg\n\nb.jpg,A dog, red\n", "line 4: 3 fields, but 1 column: put a field"),
        ("image,caption\na.jpg,A\0B\n", "line 2: a zero byte"),
        ("", r"t\.csv is empty: its first line must name the columns"),
        ("\n\n", r"t\.csv is empty"),
    ],
)  # fmt: skip
def test_damage_is_named_with_its_line(text: str, problem: str | None):
    if problem is None:
        assert len(_read(text)) == 1
    else:
        with pytest.raises(InputError, match=problem) as error:
            _read(text)
        assert str(error.value).startswith("t.csv")


def test_a_quote_within_a_field_is_a_quote():
    assert _read('image,caption\na.jpg,A 6" pipe\nb.jpg,"A ""dog"""\n') == [
        ["a.jpg", 'A 6" pipe'],
        ["b.jpg", 'A "dog"'],
    ]


def test_a_field_may_be_long_and_the_process_keeps_its_limit():
    limit = csv.field_size_limit()
    long = "x" * (limit + 1)
    assert _read(f"image,caption\na.jpg,{long}\n") == [["a.jpg", long]]
    with pytest.raises(InputError, match=r"line 2: the quote .* is never closed"):
        _read(f'image,caption\na.jpg,"{long}\n')
    assert csv.field_size_limit() == limit


def test_text_in_another_encoding_is_named_with_its_line():
    assert decode_text("t", b"\xef\xbb\xbfa") == "a"
    for data, byte in ((b"a\nb\n\xe9t\xe9", "0xe9"), ("a\nb\né".encode("latin-1"), "0xe9")):
        with pytest.raises(InputError, match=rf"^t, line 3: not UTF-8 text \(byte {byte}\): conv"):
            decode_text("t", data)
