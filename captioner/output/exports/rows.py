"""The rows of an export: captioned rows that its condition and the review select."""

import re
from collections.abc import Iterator
from typing import Literal

import duckdb
import pyarrow as pa
import pyarrow.compute as pc

from captioner.errors import InputError
from captioner.output.decisions import read_decisions
from captioner.output.directory import OutputDirectory
from captioner.output.manifest import read_manifest
from captioner.output.rows import read_rows

__all__ = ["Reviewed", "Rows"]

#: Which captions to export: ``accepted`` includes edited captions, ``all`` leaves out only rejected
#: captions, ``ignore`` exports every caption as the model wrote it.
Reviewed = Literal["ignore", "accepted", "edited", "all"]

_EXPORTED_DECISIONS: dict[Reviewed, tuple[str | None, ...]] = {
    "accepted": ("accepted", "edited"),
    "edited": ("edited",),
    "all": ("accepted", "edited", None),
}
_WINDOW = re.compile(r"\bover\s*\(", re.IGNORECASE)
_MAPS = ("attention", "attention_peak")  # not read unless an export asks for them


class Rows:
    """Rows of an output whose status is ``ok``, in listing order, a row group at a time.

    Args:
        directory: the output.
        where: an SQL condition over the output's columns, in DuckDB's dialect.
        columns: the names of the columns to export, separated by commas.
        reviewed: which captions to export by their review decision: see :data:`Reviewed`.

    Raises:
        InputError: the condition cannot be evaluated, or a column does not exist.
        OutputError: it is not a caption job's output.
    """

    def __init__(
        self,
        directory: OutputDirectory,
        *,
        where: str | None,
        columns: str | None,
        reviewed: Reviewed = "ignore",
    ):
        if where is not None:
            _check_condition(where)
        directory.read_json("run.json")  # refuses what is not an output
        self._directory = directory
        self._where = where
        #: all rows of the output, including rows that are not exported
        self.total = len(read_manifest(directory))
        self._reviewed = reviewed
        self._decisions = {} if reviewed == "ignore" else read_decisions(directory.uri)
        #: rows left out by the condition, by their status, and by the review
        self.filtered = self.not_ok = self.not_reviewed = 0
        schema = next(read_rows(directory)).schema if directory.parts() else None
        if schema is None:
            raise InputError(f"{directory.uri} holds no captions yet: nothing to export")
        self.columns = None if columns is None else [name.strip() for name in columns.split(",")]
        if self.columns is not None and not all(self.columns):
            raise InputError(f"--columns must be names separated by commas, not {columns!r}")
        for name in self.columns or []:
            if name not in schema.names:
                known = ", ".join(schema.names)
                raise InputError(f"--columns {name}: unknown column; choose from {known}")
        self._read = [name for name in schema.names if name not in _MAPS or name in self._wanted]
        # The condition is the user's own, about rows: it reads no file and opens no connection.
        self._connection = duckdb.connect(config={"enable_external_access": "false"})
        self._connection.execute("SET threads = 1")
        self._select(schema.empty_table().select(self._read))

    @property
    def _wanted(self) -> list[str]:
        return self.columns or []

    @property
    def exported(self) -> int:
        """The number of exported rows, once :meth:`tables` has ended."""
        return self.total - self.filtered - self.not_ok - self.not_reviewed

    def chosen(self, default: list[str]) -> list[str]:
        """The columns chosen by the user, or else ``default``."""
        return self.columns if self.columns is not None else default

    def tables(self) -> Iterator[tuple[int, pa.Table]]:
        """Yields the selected rows of each row group, after the number of rows in the group."""
        self.filtered = self.not_ok = self.not_reviewed = 0
        for table in read_rows(self._directory, self._read):
            ok = table.filter(pc.equal(table["status"], "ok"))
            reviewed = self._as_reviewed(ok)
            selected = self._select(reviewed)
            self.not_ok += len(table) - len(ok)
            self.not_reviewed += len(ok) - len(reviewed)
            self.filtered += len(reviewed) - len(selected)
            yield len(table), selected

    def _as_reviewed(self, table: pa.Table) -> pa.Table:
        """The rows that the review decisions select, with edited captions."""
        if self._reviewed == "ignore":
            return table
        made = [self._decisions.get(uri) for uri in table["uri"].to_pylist()]
        kinds = [None if each is None else each.decision for each in made]
        taken = [kind in _EXPORTED_DECISIONS[self._reviewed] for kind in kinds]
        captions = [
            caption if each is None or each.caption is None else each.caption
            for each, caption in zip(made, table["caption"].to_pylist(), strict=True)
        ]
        index = table.schema.get_field_index("caption")
        edited = table.set_column(index, table.schema.field(index), pa.array(captions, pa.string()))
        return edited.filter(pa.array(taken, pa.bool_()))

    def _select(self, table: pa.Table) -> pa.Table:
        if self._where is None:
            return table
        try:
            self._connection.register("captions", table)
            # It is a single expression, which may end in a comment.
            query = f"SELECT ({self._where}\n)::BOOLEAN AS selected FROM captions"  # noqa: S608
            result: pa.Table = self._connection.sql(query).to_arrow_table()
        except duckdb.Error as error:
            raise InputError(f"--where {self._where}: {_reason(error)}") from error
        selected = result["selected"]
        if len(selected) != len(table):
            raise InputError(f"--where {self._where}: not a condition on single rows")
        return table.filter(selected)


def _check_condition(where: str) -> None:
    """Refuses text that is not one SQL expression, such as a second statement."""
    if not where.strip():
        raise InputError(
            '--where is empty: leave it out, or give a condition, such as "score > -1"'
        )
    if _WINDOW.search(where):
        raise InputError(f"--where {where}: window functions are not supported")
    try:
        duckdb.SQLExpression(where)
    except duckdb.Error as error:
        raise InputError(f"--where {where}: {_reason(error)}") from error


def _reason(error: duckdb.Error) -> str:
    """DuckDB's message without the query that it repeats, which is not what the user wrote."""
    return " ".join(str(error).split("\nLINE ")[0].split())
