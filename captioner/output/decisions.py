"""Review decisions on an output's captions: accepted, rejected, edited.

The parts of an output never change. Each decision is written at once as a small file in
``OUT/__captioner/review/``; compaction moves decisions to ``OUT/__captioner/review.parquet``. The
latest decision on an image counts.
"""

import json
import secrets
import threading
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Literal, get_args

import pyarrow as pa
import pyarrow.parquet as pq

from captioner import storage
from captioner.errors import OutputError, one_line
from captioner.output.directory import PRIVATE

__all__ = ["KINDS", "ConflictError", "Decision", "Journal", "Kind", "read_decisions"]

Kind = Literal["accepted", "edited", "rejected"]
KINDS: tuple[Kind, ...] = get_args(Kind)

_SCHEMA = pa.schema(
    {
        "uri": pa.string(),
        "decision": pa.string(),
        "caption": pa.string(),
        "revision": pa.int64(),
    }
)
_COMPACTED_AFTER = 500  # files
_ATTEMPTS = 5  # to read files that a server may be bringing together


@dataclass(frozen=True)
class Decision:
    """The decision on one image.

    Attributes:
        uri: the image.
        decision: None if the reviewer withdrew an earlier decision.
        caption: the edited text.
        revision: the time of the decision, in nanoseconds since 1970.
    """

    uri: str
    decision: Kind | None
    caption: str | None
    revision: int


class ConflictError(Exception):
    """Another decision on the image was made since the reviewer saw it."""

    def __init__(self, current: Decision):
        super().__init__(f"{current.uri} has a newer decision")
        self.current = current


def read_decisions(output: str) -> dict[str, Decision]:
    """The decision on each image of an output that has one, by URI.

    Raises:
        OutputError: they cannot be read.
    """
    decisions, _ = _read(output)
    return {uri: each for uri, each in decisions.items() if each.decision is not None}


class Journal:
    """Reads and records the decisions on an output's captions. Thread-safe."""

    def __init__(self, output: str):
        self._output = output
        self._lock = threading.Lock()
        self._run = _run(output)
        self._decisions, self._files = _read(output)

    def __getitem__(self, uri: str) -> Decision:
        """The decision on an image; an empty decision with revision 0 if there is none."""
        return self._decisions.get(uri, Decision(uri, None, None, 0))

    def all(self) -> list[Decision]:
        """Every decision, including withdrawn decisions."""
        return [*self._decisions.values()]

    def decide(self, uri: str, kind: Kind | None, caption: str | None, *, seen: int) -> Decision:
        """Writes a decision.

        Args:
            uri: the image.
            kind: the decision; None withdraws an earlier decision.
            caption: the text, where it was edited.
            seen: the revision of the decision that the reviewer saw.

        Raises:
            ConflictError: there is a later one.
            OutputError: it cannot be written, or the output was overwritten.
        """
        with self._lock:
            if self.is_overwritten():
                raise OutputError(f"{self._output} was overwritten: start captioner review again")
            current = self[uri]
            if current.revision != seen:
                raise ConflictError(current)
            made = Decision(uri, kind, caption, max(time.time_ns(), current.revision + 1))
            name = f"{made.revision:020d}-{secrets.token_hex(4)}.json"
            target = storage.join(_folder(self._output), name)
            storage.write(target, json.dumps(asdict(made)).encode())
            self._decisions[uri] = made
            self._files.append(target)
            if len(self._files) >= _COMPACTED_AFTER:
                self._compact()
            return made

    def close(self) -> None:
        """Merges all decisions into ``review.parquet``.

        Where the output was overwritten they belong to captions that are gone, and so are they.

        Raises:
            OutputError: it cannot be written.
        """
        with self._lock:
            if self._files and not self.is_overwritten():
                self._compact()

    def is_overwritten(self) -> bool:
        """Whether another job began the output since, or it was deleted."""
        return _run(self._output) != self._run

    def _compact(self) -> None:
        # Another server may have written decisions; keep them.
        decisions, files = _read(self._output)
        self._decisions = _latest([*self._decisions.values(), *decisions.values()])
        rows = [asdict(each) for each in self._decisions.values()]
        sink = pa.BufferOutputStream()
        pq.write_table(pa.Table.from_pylist(rows, schema=_SCHEMA), sink, compression="zstd")
        storage.write(_parquet(self._output), sink.getvalue().to_pybytes())
        for file in files:
            storage.delete(file)
        self._files = []


def _run(output: str) -> bytes | None:
    """The file that identifies the job that began the output."""
    try:
        return storage.read(storage.join(output, f"{PRIVATE}/run.json"))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise OutputError(f"cannot read {output}: {one_line(error)}") from error


def _folder(output: str) -> str:
    return storage.join(output, f"{PRIVATE}/review")


def _parquet(output: str) -> str:
    return storage.join(output, f"{PRIVATE}/review.parquet")


def _read(output: str) -> tuple[dict[str, Decision], list[str]]:
    """The latest decision on each image, and the files that are not in the Parquet file yet."""
    try:
        for attempt in range(_ATTEMPTS):
            names = storage.names(_folder(output))
            found = _read_parquet(output)
            files = [storage.join(_folder(output), n) for n in names if n.endswith(".json")]
            try:
                found += [Decision(**json.loads(storage.read(file))) for file in files]
                break
            except FileNotFoundError:  # a server brought the files together meanwhile
                if attempt == _ATTEMPTS - 1:
                    raise
    except (OSError, ValueError, TypeError, pa.ArrowException) as error:
        reason = " ".join(str(error).split())
        raise OutputError(f"cannot read the review decisions of {output}: {reason}") from error
    return _latest(found), files


def _read_parquet(output: str) -> list[Decision]:
    try:
        data = storage.read(_parquet(output))
    except FileNotFoundError:
        return []
    table = pq.read_table(pa.BufferReader(data), schema=_SCHEMA, use_threads=False)
    return [Decision(**row) for row in table.to_pylist()]


def _latest(decisions: Iterable[Decision]) -> dict[str, Decision]:
    latest: dict[str, Decision] = {}
    for each in decisions:
        if each.uri not in latest or each.revision > latest[each.uri].revision:
            latest[each.uri] = each
    return latest
