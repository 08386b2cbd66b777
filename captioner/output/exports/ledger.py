"""Records what an export wrote: the next run recognises its own files."""

import hashlib

import pyarrow as pa
import pyarrow.parquet as pq

from captioner import storage
from captioner.errors import OutputError
from captioner.output.directory import PRIVATE, OutputDirectory

__all__ = ["Ledger"]

_COLUMNS = pa.schema({"target": pa.string(), "version": pa.string(), "content": pa.string()})
_SAVED_EVERY = 10_000  # files


class Ledger:
    """The files that exports of an output wrote to one destination.

    Each has its version (size and time, or ETag) after it was written and, in ``content``, what the
    writer needs to recognise it: the text that was added to a sidecar, or the digest of a tar's
    rows. A killed export may have written files that the ledger lacks: a writer recognises them by
    their content. The ledger is stored in ``__captioner/exports/``.
    """

    def __init__(self, directory: OutputDirectory, destination: str):
        name = hashlib.sha256(destination.encode(errors="surrogateescape")).hexdigest()[:16]
        self._uri = storage.join(directory.uri, f"{PRIVATE}/exports/{name}.parquet")
        self._entries: dict[str, tuple[str, str]] = {}
        self._unsaved = 0
        try:
            data = storage.read(self._uri)
        except FileNotFoundError:
            return
        except OSError as error:
            raise OutputError(f"cannot read {self._uri}: {error}") from error
        try:
            table = pq.read_table(pa.BufferReader(data), schema=_COLUMNS, use_threads=False)
        except pa.ArrowException as error:
            raise OutputError(f"cannot read {self._uri}: delete it to export again") from error
        for row in table.to_pylist():
            self._entries[row["target"]] = (row["version"], row["content"])

    def version(self, target: str) -> str | None:
        """The version of a file as it was written; None if the export did not write it."""
        return self._entries[target][0] if target in self._entries else None

    def content(self, target: str) -> str | None:
        """What the writer recorded about a file; None if the export did not write it."""
        return self._entries[target][1] if target in self._entries else None

    def note(self, target: str, content: str = "") -> None:
        """Records a file, with its current version, that was just written."""
        self._entries[target] = (storage.version(target), content)
        self._unsaved += 1
        if self._unsaved >= _SAVED_EVERY:
            self.save()

    def save(self) -> None:
        """Writes the ledger.

        Raises:
            OutputError: it cannot be written.
        """
        if not self._unsaved:
            return
        targets = [*self._entries]
        columns = [
            targets,
            [version for version, _ in self._entries.values()],
            [content for _, content in self._entries.values()],
        ]
        sink = pa.BufferOutputStream()
        table = pa.Table.from_arrays(
            [pa.array(each, pa.string()) for each in columns], schema=_COLUMNS
        )
        pq.write_table(table, sink, compression="zstd")
        storage.write(self._uri, sink.getvalue().to_pybytes())
        self._unsaved = 0
