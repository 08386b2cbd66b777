"""The part files of an output directory: their names, which parts count, how to rewrite parts.

``part-000007.parquet`` holds the rows of shard 7, ``part-000000-000255.parquet`` those of the
shards 0 to 255, merged. One rule makes it safe to merge and to split at any moment: a part within
another part's range does not count. A merge writes the large part and then deletes the small ones;
a split writes the small parts and then deletes the large one. Either takes effect in one step, when
the large part appears or disappears. The next job recognises what a crash leaves within its range
by name, and deletes it. No row is missing at any moment; a reader that does not know the rule may
see rows twice between that step and the last deletion.
"""

import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from captioner import storage
from captioner.errors import OutputError, one_line

__all__ = [
    "Part",
    "PartFile",
    "delete_parts",
    "find_parts",
    "open_part",
    "part_name",
    "read_part",
    "rewrite",
    "row_groups",
]

_NAME = re.compile(r"part-(\d{6,})(?:-(\d{6,}))?\.parquet")
_ROW_GROUP = 8192  # rows of a merged part in memory at once: some 10 MB
_GAP = 64_000  # bytes between columns; fewer are read along rather than cost a request
_DAMAGED = "; delete the file, and run the caption job again to caption its images again"
_THREADS = 16  # that delete: mostly waiting, for a bucket


@dataclass(frozen=True, order=True)
class Part:
    """The rows of the shards from ``first`` to ``last``, in one file."""

    first: int
    last: int

    @property
    def name(self) -> str:
        """The file name."""
        last = "" if self.first == self.last else f"-{self.last:06d}"
        return f"part-{self.first:06d}{last}.parquet"

    @property
    def shards(self) -> range:
        """The numbers of its shards."""
        return range(self.first, self.last + 1)


def part_name(shard: int) -> str:
    """The file name of a shard's own part."""
    return Part(shard, shard).name


def find_parts(names: Iterable[str]) -> tuple[list[Part], list[Part]]:
    """The parts that count, in order, and the parts within another's range, from a folder's names.

    Raises:
        OutputError: two parts overlap, and neither is within the other.
    """
    matches = (_NAME.fullmatch(name) for name in names)
    found = {Part(int(match[1]), int(match[2] or match[1])) for match in matches if match}
    counting: list[Part] = []
    replaced: list[Part] = []
    for part in sorted(found, key=lambda part: (part.first, -part.last)):
        if not counting or part.first > counting[-1].last:
            counting.append(part)
        elif part.last <= counting[-1].last:
            replaced.append(part)
        else:
            raise OutputError(f"{counting[-1].name} and {part.name} hold the same images")
    return counting, replaced


def delete_parts(directory: str, parts: Sequence[Part]) -> None:
    """Deletes the files of parts.

    Raises:
        OutputError: one cannot be deleted.
    """
    with ThreadPoolExecutor(_THREADS) as pool:
        list(pool.map(lambda part: storage.delete(storage.join(directory, part.name)), parts))


class PartFile:
    """A part that is open.

    Arrow reads it in this thread alone. Arrow's own threads may hold memory or files of Python for
    a moment longer than needed; a process that ends in that moment aborts.
    """

    def __init__(self, file: BinaryIO):
        self._file, self._parquet = file, pq.ParquetFile(file, pre_buffer=False)
        self.schema: pa.Schema = self._parquet.schema_arrow
        metadata = self._parquet.metadata
        self._groups = [metadata.row_group(n) for n in range(metadata.num_row_groups)]
        #: rows of each row group
        self.rows: list[int] = [group.num_rows for group in self._groups]

    def row_group(self, number: int, columns: list[str] | None = None) -> pa.Table:
        """The rows that were written at once, or some of their columns."""
        self._fetch([number], columns)
        return self._parquet.read_row_group(number, columns=columns, use_threads=False)

    def read(self, columns: list[str] | None = None) -> pa.Table:
        """All rows, or some of their columns."""
        self._fetch(range(len(self.rows)), columns)
        return self._parquet.read(columns=columns, use_threads=False)

    def _fetch(self, numbers: Iterable[int], columns: list[str] | None) -> None:
        """Asks a bucket for some columns of row groups at once, those near each other together."""
        if not isinstance(self._file, storage.Ranges):
            return
        spans: list[tuple[int, int]] = []
        for group in (self._groups[number] for number in numbers):
            for chunk in map(group.column, range(group.num_columns)):
                if columns is None or chunk.path_in_schema.split(".")[0] in columns:
                    begin = chunk.dictionary_page_offset or chunk.data_page_offset
                    end = begin + chunk.total_compressed_size
                    if spans and begin - spans[-1][1] <= _GAP:
                        begin = spans.pop()[0]
                    spans.append((begin, end))
        self._file.fetch(spans)


@contextmanager
def open_part(directory: str, part: Part) -> Iterator[PartFile]:
    """Opens a part to read. Of a merged part in a bucket, only what is read is transferred.

    Raises:
        OutputError: it cannot be opened or read.
    """
    uri = storage.join(directory, part.name)
    try:
        with storage.open_binary(uri, ranges=part.first != part.last) as file:
            yield PartFile(file)
    except (OSError, pa.ArrowException) as error:
        advice = "" if isinstance(error, OSError) else _DAMAGED
        raise OutputError(f"cannot read {uri}: {one_line(error).rstrip('.')}{advice}") from error


def read_part(directory: str, part: Part, columns: list[str] | None = None) -> pa.Table:
    """All rows of a part, or some of their columns.

    Raises:
        OutputError: it cannot be read.
    """
    with open_part(directory, part) as file:
        return file.read(columns)


def row_groups(directory: str, part: Part, columns: list[str] | None = None) -> Iterator[pa.Table]:
    """A part's rows, a row group at a time.

    Raises:
        OutputError: it cannot be read.
    """
    with open_part(directory, part) as file:
        for number in range(len(file.rows)):
            yield file.row_group(number, columns)


def rewrite(
    directory: str,
    sources: Sequence[Part],
    targets: Mapping[Part, int],
    advance: Callable[[int], object],
) -> None:
    """Writes the rows of some parts as other parts, and deletes the original parts.

    Args:
        directory: where they are.
        sources: parts that count, one after another.
        targets: parts of the same shards, in order, with the number of their rows.
        advance: called with the number of rows after each write.

    Raises:
        OutputError: a part cannot be read or written, has disappeared, or does not hold
            exactly one row per image.
    """
    with open_part(directory, sources[0]) as file:
        schema = file.schema
    tables = _all_rows(directory, sources, schema)
    sizes = {part: [*_split(rows)] for part, rows in targets.items()}
    pieces = _regroup(tables, itertools.chain.from_iterable(sizes.values()))
    last = [*targets][-1]
    for part in targets:
        with (
            storage.writing(storage.join(directory, part.name)) as sink,
            pq.ParquetWriter(sink, schema, compression="zstd") as writer,
        ):
            for piece in itertools.islice(pieces, len(sizes[part])):
                writer.write_table(piece, row_group_size=len(piece))
                advance(len(piece))
            if part == last:
                next(pieces, None)  # raises, before the file is in its place, where rows are left
    for part in targets:
        if not storage.version(storage.join(directory, part.name)):
            raise OutputError(
                f"{part.name} is gone: another job is using {directory}; run the command again "
                "when that job has ended"
            )
    delete_parts(directory, sources)


def _all_rows(directory: str, parts: Sequence[Part], schema: pa.Schema) -> Iterator[pa.Table]:
    for part in parts:
        for table in row_groups(directory, part):
            if not table.schema.equals(schema, check_metadata=True):
                raise OutputError(f"{part.name} has other columns than {parts[0].name}")
            yield table


def _split(rows: int) -> Iterator[int]:
    """The sizes of the row groups for a number of rows."""
    for begin in range(0, rows, _ROW_GROUP):
        yield min(_ROW_GROUP, rows - begin)


def _regroup(tables: Iterator[pa.Table], sizes: Iterator[int]) -> Iterator[pa.Table]:
    """The rows of tables, in order, in tables of these sizes.

    Raises:
        OutputError: there are fewer or more rows.
    """
    rest: list[pa.Table] = []
    for size in sizes:
        while sum(map(len, rest)) < size:
            table = next(tables, None)
            if table is None:
                raise OutputError("parts to be rewritten hold fewer rows than images")
            rest.append(table)
        whole = pa.concat_tables(rest)
        yield whole.slice(0, size)
        rest = [whole.slice(size)]
    if any(map(len, rest)) or next(tables, None) is not None:
        raise OutputError("parts to be rewritten hold more rows than images")
