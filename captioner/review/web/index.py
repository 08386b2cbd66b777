"""Indexes an output's rows for searching, even while the output is large or still growing.

The parts are read once, without their attention maps, into a DuckDB database in a temporary folder.
A row's number is the order in which it was indexed, which is the listing order of a finished
output.
"""

import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa

from captioner.errors import CaptionerError, OutputError
from captioner.output.decisions import Decision
from captioner.output.directory import OutputDirectory
from captioner.output.manifest import read_manifest
from captioner.output.parts import Part, open_part, row_groups
from captioner.review.web.view import NUMBER, WORDS, words_of

__all__ = ["RowIndex"]

_DETAIL_COLUMNS = (
    "attention",
    "attention_peak",
    "token_logprobs",
    "tokens",
)  # read for a single row
_READERS = 8  # threads that read parts
_MEMORY = "512MB"  # of DuckDB; what does not fit goes to the temporary folder
_POLL_SECONDS = 2.0  # between checks for new parts


class RowIndex:
    """The rows of an output in a database of this process.

    Args:
        directory: the output.

    Raises:
        OutputError: it is not an output.
    """

    def __init__(self, directory: OutputDirectory):
        self.directory = directory
        self._run = directory.read_json("run.json")
        self.total = len(read_manifest(directory))
        self._folder = tempfile.TemporaryDirectory(prefix="captioner-review-")
        self._database = duckdb.connect(str(Path(self._folder.name) / "index.duckdb"))
        self._database.execute(f"SET memory_limit = '{_MEMORY}'")
        self._database.execute("SET temp_directory = ?", [self._folder.name])
        self._database.execute(
            "CREATE TABLE decisions (uri VARCHAR PRIMARY KEY, decision VARCHAR, edited VARCHAR, "
            "revision BIGINT)"
        )
        self._indexed: dict[Part, int] = {}  # the number of each part's first row
        self._rows = 0
        self._has_captions = False
        self._stopped = threading.Event()
        self._progress = threading.Condition()
        self._complete = False
        #: whether another job began the output since
        self.overwritten = False
        #: why the last check could not read the parts; the page shows it
        self.problem: str | None = None
        self._thread = threading.Thread(target=self._follow, name="index", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends the thread that reads parts, and deletes the database."""
        self._stopped.set()
        self._thread.join()
        self._database.close()
        self._folder.cleanup()

    @property
    def rows(self) -> int:
        """The number of indexed rows."""
        return self._rows

    @property
    def complete(self) -> bool:
        """Whether every part that the last check found is indexed."""
        return self._complete

    def wait(self, rows: int, seconds: float = 10.0) -> None:
        """Waits until ``rows`` rows, or all parts, are indexed, or until the time is up."""
        with self._progress:
            self._progress.wait_for(lambda: self._rows >= rows or self._complete, seconds)

    def query(self, sql: str, parameters: list[Any]) -> list[dict[str, Any]]:
        """Runs SQL on the tables ``captions`` and ``decisions``; returns the resulting rows."""
        if not self._has_captions:
            return []
        with self._database.cursor() as cursor:
            cursor.execute(sql, parameters)
            names = [column[0] for column in cursor.description or []]
            return [dict(zip(names, row, strict=True)) for row in cursor.fetchall()]

    @property
    def columns(self) -> dict[str, str]:
        """The indexed columns, including the source's, and their types in DuckDB."""
        described = self.query("DESCRIBE captions", [])
        return {row["column_name"]: row["column_type"] for row in described}

    def decide(self, decision: Decision) -> None:
        """Indexes a decision of the journal."""
        with self._database.cursor() as cursor:
            cursor.execute(
                "INSERT OR REPLACE INTO decisions VALUES (?, ?, ?, ?)",
                [decision.uri, decision.decision, decision.caption, decision.revision],
            )

    def read_row(self, number: int) -> tuple[dict[str, Any], pa.Schema] | None:
        """Reads all columns of a row, and its part's schema; None if the row is not indexed.

        Raises:
            OutputError: its part cannot be read.
        """
        for part, first in reversed(self._indexed.items()):
            if first <= number < self._rows:
                with open_part(self.directory.uri, part) as file:
                    index = number - first
                    for group, rows in enumerate(file.rows):
                        if index < rows:
                            table = file.row_group(group).slice(index, 1)
                            return table.to_pylist()[0], table.schema
                        index -= rows
        return None

    def _follow(self) -> None:
        """Indexes the existing parts, then new parts as they appear."""
        while not self._stopped.is_set():
            try:
                self._index_new_parts()
                self.problem = None
            except CaptionerError as error:
                self.problem = str(error)
            with self._progress:
                self._complete = True
                self._progress.notify_all()
            self._stopped.wait(_POLL_SECONDS)

    def check(self) -> None:
        """Raises OutputError where the rows are no longer those of the output."""
        if self.overwritten or self.directory.read_json("run.json") != self._run:
            self.overwritten = True
            raise OutputError(f"{self.directory.uri} was overwritten: start captioner review again")

    def _index_new_parts(self) -> None:
        self.check()
        parts = self.directory.parts()
        if self._indexed.keys() - set(parts):
            self._start_over()  # parts were merged or split
        new = [part for part in parts if part not in self._indexed]
        if not new:
            return
        with self._progress:
            self._complete = False
        self.total = len(read_manifest(self.directory))
        with ThreadPoolExecutor(_READERS) as pool, self._database.cursor() as cursor:
            waiting = []
            for part in new:
                waiting.append((part, pool.submit(self._read, part)))
                if len(waiting) >= 2 * _READERS:
                    first, reading = waiting.pop(0)
                    self._insert(cursor, first, reading.result())
                if self._stopped.is_set():
                    return
            for part, reading in waiting:
                self._insert(cursor, part, reading.result())

    def _read(self, part: Part) -> pa.Table:
        with open_part(self.directory.uri, part) as file:
            names = [name for name in file.schema.names if name not in _DETAIL_COLUMNS]
        tables = [*row_groups(self.directory.uri, part, names)]
        return pa.concat_tables(tables).replace_schema_metadata(None)

    def _insert(self, cursor: Any, part: Part, table: pa.Table) -> None:
        first = self._rows
        numbers = pa.array(range(first, first + len(table)), pa.int64())
        table = table.add_column(0, NUMBER, numbers)
        cursor.register("new", table)
        selected = f"SELECT *, {words_of('caption')} AS {WORDS} FROM new"  # noqa: S608
        try:
            if not self._has_captions:
                cursor.execute(f"CREATE TABLE captions AS {selected}")
                self._has_captions = True
            else:
                cursor.execute(f"INSERT INTO captions BY NAME {selected}")
        except duckdb.Error as error:
            raise OutputError(
                f"{part.name} does not have the columns of the earlier parts"
            ) from error
        finally:
            cursor.unregister("new")
        with self._progress:
            self._indexed[part] = first
            self._rows = first + len(table)
            self._progress.notify_all()

    def _start_over(self) -> None:
        with self._database.cursor() as cursor:
            cursor.execute("DROP TABLE IF EXISTS captions")
        self._has_captions, self._indexed, self._rows = False, {}, 0
