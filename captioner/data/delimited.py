"""Comma-separated text, row by row; what is damaged is refused with its line, never guessed at.

RFC 4180: a field in double quotes may hold commas, line breaks, and quotes that are doubled. The
danger of the format is a quote that belongs to a text (``"Stop, says a sign``) and is not doubled:
it joins rows until another quote closes it, and the rows between are lost. Such text is an error.
"""

import csv
import io
import re
import sys
from collections.abc import Iterator
from typing import NamedTuple

from captioner.errors import InputError, counted

__all__ = ["CsvTable", "Row", "decode_text"]

_IMAGE = re.compile(r"\S.*\.(?:jpe?g|jpe|jfif|png|webp|bmp|gif|tiff?|avif|hei[cf]|jp2|jxl)", re.I)
_ENDING = re.compile(r"\.[A-Za-z]\w{1,4}$")
_GZIP = b"\x1f\x8b"
_NAMES = {",": "comma", "\t": "tab"}
_REMEDY = 'a quote that belongs to the text is doubled (""), and its whole field is in quotes'


class Row(NamedTuple):
    """A row and the number of the line where it begins, from 1."""

    line: int
    fields: list[str]


class CsvTable:
    """A table whose first line names its columns.

    Attributes:
        columns: the names of the columns, in their order.
    """

    def __init__(self, uri: str, data: bytes, *, separator: str = ",", is_quoted: bool = True):
        """Reads the names of the columns.

        Args:
            uri: where the data come from, for messages.
            data: UTF-8 text.
            separator: what stands between fields.
            is_quoted: whether a quote at the begin of a field ends at another quote; otherwise
                quotes are characters as others are, and each line is a row.

        Raises:
            InputError: the data are not text, are empty, or the first line is damaged.
        """
        self._uri = uri
        self._lines = _Recorder(decode_text(uri, data))
        self._reader = csv.reader(
            self._lines,
            strict=True,
            delimiter=separator,
            quoting=csv.QUOTE_MINIMAL if is_quoted else csv.QUOTE_NONE,
        )
        self._separator = separator
        first = self._next()
        if first is None:
            raise InputError(f"{uri} is empty: its first line must name the columns")
        self.columns = first.fields

    def rows(self, name: str) -> Iterator[Row]:
        """The rows below the names; empty lines are passed over.

        Args:
            name: the column of images, which tells where an unclosed quote joins rows.

        Raises:
            InputError: a row is damaged, or has more or fewer fields than there are columns.
        """
        count, place = len(self.columns), self.columns.index(name)
        while row := self._next():
            if len(row.fields) != count:
                raise InputError(
                    f"{self._uri}, line {row.line}: {counted(len(row.fields), 'field')}, but "
                    f"{counted(count, 'column')}: put a field that contains a "
                    f"{_NAMES[self._separator]} in quotes"
                )
            if self._joins_rows(place):
                last = row.line + len(self._lines.recorded) - 1
                raise InputError(
                    f"{self._uri}, line {row.line}: the quote that opens here is closed on line "
                    f"{last}, with other rows between: {_REMEDY}"
                )
            yield row

    def _next(self) -> Row | None:
        """The next row that is not an empty line; None at the end."""
        while True:
            line = self._reader.line_num + 1
            self._lines.recorded.clear()
            # csv's own limit on a field, 131,072 characters, is the process's.
            limit = csv.field_size_limit(sys.maxsize)
            try:
                fields = next(self._reader, None)
            except csv.Error as error:
                raise InputError(f"{self._uri}, line {line}: {self._explain(error)}") from error
            finally:
                csv.field_size_limit(limit)
            if fields is None:
                return None
            if fields:
                return Row(line, fields)

    def _joins_rows(self, place: int) -> bool:
        """Whether lines that were read as one row look like several, by the names of images."""
        opening, *later = self._lines.recorded
        first_names = self._names(opening, place) if later else set()
        return any(
            _alike(name, first)
            for line in later
            for name in self._names(line, place)
            for first in first_names
        )

    def _names(self, line: str, place: int) -> set[str]:
        """What stands in the place of the image, counted from the left and from the right."""
        fields = [field.strip(' "\r\n') for field in line.split(self._separator)]
        if len(fields) < len(self.columns):
            return set()
        return {fields[place], fields[place - len(self.columns)]} - {""}

    def _explain(self, error: csv.Error) -> str:
        if "unexpected end of data" in str(error):
            return f"the quote that opens here is never closed: {_REMEDY}"
        if "expected after" in str(error):
            return f"text follows a closing quote on line {self._reader.line_num}: {_REMEDY}"
        return str(error)


class _Recorder:
    """The lines of a text, which remembers those of the row that is read."""

    def __init__(self, text: str):
        self._lines = io.StringIO(text, newline="")
        self.recorded: list[str] = []

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = next(self._lines)
        self.recorded.append(line)
        return line


def decode_text(uri: str, data: bytes) -> str:
    """A file's text, without a byte order mark.

    Raises:
        InputError: it is not UTF-8, or has a zero byte; with the line.
    """
    if data.startswith(_GZIP):
        raise InputError(f"{uri} is compressed by gzip: add .gz to its name")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(
            f"{uri}, line {line}: not UTF-8 text (byte {data[error.start]:#04x}): "
            "convert the file to UTF-8"
        ) from error
    if (place := text.find("\0")) >= 0:
        line = text.count("\n", 0, place) + 1
        raise InputError(f"{uri}, line {line}: a zero byte, which text cannot contain")
    return text


def _alike(name: str, first: str) -> bool:
    """Whether both look like names of images."""
    if _IMAGE.fullmatch(name) and _IMAGE.fullmatch(first):
        return True
    ending, first_ending = _ENDING.search(name), _ENDING.search(first)
    if ending or first_ending:
        return bool(ending and first_ending and ending[0].lower() == first_ending[0].lower())
    if "://" in name and "://" in first:
        return True
    return all(re.fullmatch(r"\S*\d\S*", each) for each in (name, first))
