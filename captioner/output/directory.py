"""What is to be captioned, and what is done: the output directory's books.

A listing becomes numbered shards; a shard is done when, and only when, its rows are in a part file.
Nothing is ever renumbered: images that turn up later become new shards at the end.
"""

import hashlib
import heapq
import io
import itertools
import json
import logging
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import fields
from datetime import datetime, timezone
from operator import itemgetter
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from captioner import __version__, storage
from captioner.config import DecodeConfig, RunConfig, parse_json
from captioner.errors import FingerprintError, InputError, OutputError
from captioner.output.manifest import Accounts, Shard, _by_shard, new_shards
from captioner.output.parts import Part, PartFile, delete_parts, find_parts, open_part, row_groups
from captioner.schema import COLUMNS, MANIFEST, SCHEMA_VERSION, STATUSES
from captioner.storage import Listed

__all__ = [
    "PRIVATE",
    "OutputDirectory",
]

#: The folder of an output directory that holds its books.
PRIVATE = "__captioner"
#: Settings that are options of the command line.
_OPTIONS = {each.name for config in (DecodeConfig, RunConfig) for each in fields(config)}
_READERS = 16  # threads that read parts: mostly waiting, for a bucket
_READ_AHEAD = 65_536  # rows of parts in memory, unless a part has more

_logger = logging.getLogger(__name__)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


class OutputDirectory:
    """The directory that a caption job writes.

    ::

        part-000000.parquet …                one a shard, rows in listing order
        part-000000-000255.parquet …         or one for many: see :mod:`captioner.output.parts`
        __captioner/run.json                  settings and fingerprint of the job that began it
        __captioner/manifest-0000.parquet …   uri, size, shard, row; one more when images turn up
        __captioner/summary.json              the last run's counts and times
        __captioner/lock                      locked while a job runs; not in a bucket
        __captioner/attempts/…                see :mod:`captioner.caption.crash_log`
    """

    def __init__(self, uri: str):
        self.uri = uri

    def _within(self, *names: str) -> str:
        return "/".join([self.uri.rstrip("/"), *names])

    def _private(self, name: str) -> str:
        return self._within(PRIVATE, name)

    def begin(self, settings: dict[str, Any], *, overwrite: bool = False) -> None:
        """Makes the directory this job's: new, or begun before with the same settings.

        Args:
            settings: what decides the captions, by name; its SHA-256 is the job's fingerprint.
            overwrite: delete what an earlier job wrote.

        Raises:
            FingerprintError: it was begun with other settings.
            OutputError: it holds files that are not ours, or it cannot be written.
        """
        ours = self.check(settings, overwrite=overwrite)
        if ours and overwrite:
            self._delete()
        if overwrite or not ours:
            run = {
                "schema_version": SCHEMA_VERSION,
                "fingerprint": _fingerprint(settings),
                "settings": settings,
                "captioner_version": __version__,
                "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            }
            try:
                self._write_json("run.json", run, new=not overwrite)
            except FileExistsError:  # another job begins in the same bucket at this moment
                self._compare(settings)
        self.tidy()

    def check(self, settings: dict[str, Any], *, overwrite: bool = False) -> bool:
        """Whether a caption job began it; raises what :meth:`begin` would, and writes nothing."""
        ours = self._is_ours()
        if ours and not overwrite:
            self._compare(settings)
        return ours

    def _is_ours(self) -> bool:
        """Whether a caption job began it; False where nobody did, an error where others use it."""
        present = self._names()
        if "run.json" in self._names(PRIVATE):
            return True
        if any(not name.startswith(".") for name in present if name != PRIVATE):
            raise OutputError(f"{self.uri} is not empty, and no caption job's output")
        return False

    def _names(self, *folders: str) -> list[str]:
        """What stands in it, or in a folder of it; nothing where there is none."""
        try:
            return storage.names(self._within(*folders))
        except OSError as error:
            reason = error.strerror or _one_line(error)
            raise OutputError(f"cannot use {self.uri} for output: {reason}") from error

    @contextmanager
    def locked(self) -> Iterator[None]:
        """While entered, no other job can use the directory. In a bucket there is no such lock.

        The lock is the kernel's, on a file: it goes when its process does, however that ends.

        Raises:
            OutputError: another job uses it, it holds files that are not ours, or it cannot be
                written.
        """
        self._is_ours()
        with storage.locked(self._private("lock")):
            yield

    def tidy(self) -> None:
        """Deletes temporary files that killed writers left; with a lock also parts within others.

        In a bucket, where there is no lock, those may be what another job is splitting a part into.
        """
        if storage.is_local(self.uri):
            self.delete_held()
            for folders in ([], [PRIVATE], [PRIVATE, "attempts"]):
                for name in filter(storage.is_temporary, self._names(*folders)):
                    storage.delete(self._within(*folders, name))

    def delete_held(self) -> None:
        """Deletes the parts that went into others; nobody else may be at work on the directory."""
        _, held = find_parts(self._names())
        delete_parts(self.uri, held)

    def _delete(self) -> None:
        """Parts first, run.json last: an interrupted deletion is still recognised as ours.

        The last manifest goes first, so that those which are left are numbered without a gap.
        """
        counting, held = find_parts(self._names())
        delete_parts(self.uri, [*held, *counting])
        names = sorted(self._names(PRIVATE), key=_by_number, reverse=True)
        for name in sorted(names, key="run.json".__eq__):
            if name != "lock":  # another job would lock the next file of that name
                storage.delete(self._private(name))

    def _compare(self, settings: dict[str, Any]) -> None:
        before = self.read_json("run.json").get("settings")
        if not isinstance(before, dict):
            raise OutputError(f"{self._private('run.json')} has no settings")
        now = json.loads(json.dumps(settings))
        differing = [
            _difference(name, before.get(name), now.get(name))
            for name in sorted(before.keys() | now.keys())
            if before.get(name) != now.get(name)
        ]
        if differing:
            raise FingerprintError(
                f"{self.uri} was begun with other settings: {'; '.join(differing)}. "
                "Give the earlier settings, use another directory, or --overwrite"
            )

    def read_json(self, name: str) -> dict[str, Any]:
        """A JSON file of ours.

        Raises:
            OutputError: it is missing or broken.
        """
        try:
            parsed = parse_json(storage.read(self._private(name)))
        except FileNotFoundError as error:
            raise OutputError(f"{self.uri} is no caption job's output: it has no {name}") from error
        except (OSError, InputError) as error:
            raise OutputError(f"cannot read {self._private(name)}: {error}") from error
        if not isinstance(parsed, dict):
            raise OutputError(f"{self._private(name)} is not a JSON object")
        return parsed

    def _write_json(self, name: str, values: dict[str, Any], *, new: bool = False) -> None:
        storage.write(self._private(name), (json.dumps(values, indent=2) + "\n").encode(), new=new)

    def write_summary(self, values: dict[str, Any]) -> None:
        """Writes summary.json."""
        self._write_json("summary.json", values)

    def read_summary(self) -> dict[str, Any]:
        """What :meth:`write_summary` wrote; empty where no run has ended.

        Raises:
            OutputError: it is broken.
        """
        return self.read_json("summary.json") if "summary.json" in self._names(PRIVATE) else {}

    def manifest(self) -> pa.Table:
        """All images ever listed, by shard and row: :data:`captioner.schema.MANIFEST`.

        Raises:
            OutputError: a manifest cannot be read, or is not one.
        """
        return self._read_manifest(self._manifests())

    def _manifests(self) -> list[str]:
        names = (name for name in self._names(PRIVATE) if name.startswith("manifest-"))
        return sorted(names, key=_by_number)

    def _read_manifest(self, names: Sequence[str]) -> pa.Table:
        try:
            tables = [
                PartFile(io.BytesIO(storage.read(self._private(name)))).read().cast(MANIFEST)
                for name in names
            ]
        except (OSError, pa.ArrowException, ValueError) as error:
            raise OutputError(
                f"the manifest of {self.uri} cannot be read: {_one_line(error)}"
            ) from error
        return pa.concat_tables([MANIFEST.empty_table(), *tables])

    def extend(self, listing: Sequence[Listed], shard_size: int) -> pa.Table:
        """Adds what is not in the manifest yet, as new shards; returns the whole manifest."""
        while True:
            names = self._manifests()
            manifest = self._read_manifest(names)
            if not len(added := new_shards(manifest, listing, shard_size)):
                return manifest
            sink = io.BytesIO()
            pq.write_table(added, sink, compression="zstd")
            name = self._private(f"manifest-{len(names):04d}.parquet")
            try:
                storage.write(name, sink.getvalue(), new=True)
            except FileExistsError:  # another job was quicker, in a bucket: see what it listed
                continue
            return pa.concat_tables([manifest, added])

    def parts(self) -> list[Part]:
        """The parts that there are, in order.

        Raises:
            OutputError: two of them hold the same shard.
        """
        return find_parts(self._names())[0]

    def settle(self) -> None:
        """Finishes what a killed compaction left, for a command that only reads, where it can."""
        if storage.is_local(self.uri) and find_parts(self._names())[1]:
            with suppress(OutputError), self.locked():  # a job at work does it itself
                self.delete_held()

    def done(self) -> set[int]:
        """The numbers of the shards whose rows are there."""
        return {shard for part in self.parts() for shard in part.shards}

    def remaining(self, manifest: pa.Table, *, begun: bool = True) -> Iterator[Shard]:
        """The shards that have no part yet, in order; all, where the job has not begun."""
        done = self.done() if begun else set()
        for number, table in _by_shard(manifest):
            if number not in done:
                yield Shard(number, table["uri"].to_pylist(), table["size"].to_pylist())

    def not_ok(self, manifest: pa.Table) -> Iterator[Shard]:
        """Of the shards that are done, the images whose rows are not ``ok``.

        Their sizes are not said: since they were listed the files may have been replaced.
        """
        for _, listed, rows in self._parts(manifest):
            bad = np.flatnonzero(pc.not_equal(rows["status"], "ok").to_numpy())
            for number, images in _by_shard(listed.take(bad)):
                uris = images["uri"].to_pylist()
                yield Shard(number, uris, [None] * len(uris), images["row"].to_pylist())

    def accounts(self) -> Accounts:
        """Counts the rows of every part by status, and holds them against the manifest.

        Raises:
            OutputError: a part cannot be read, does not hold its shards' images, each once and in
                their order, or is no shard's.
        """
        manifest = self.manifest()
        missing = [uri for shard in self.remaining(manifest) for uri in shard.uris]
        rows: Counter[str] = Counter()
        for _, _, part in self._parts(manifest):
            for each in pc.value_counts(part["status"]).to_pylist():
                rows[each["values"]] += each["counts"]
        by_status: dict[str, int] = {status: rows[status] for status in STATUSES if status in rows}
        return Accounts(len(manifest), by_status, missing)

    def of_parts(self, manifest: pa.Table) -> list[tuple[Part, pa.Table]]:
        """The parts that there are, each with its images.

        Raises:
            OutputError: a part is no shard's of the manifest.
        """
        numbers, parts = manifest["shard"].to_numpy(), self.parts()
        begins = np.searchsorted(numbers, np.array([p.first for p in parts], numbers.dtype))
        ends = np.searchsorted(numbers, np.array([p.last for p in parts], numbers.dtype), "right")
        found = []
        for part, begin, end in zip(parts, begins.tolist(), ends.tolist(), strict=True):
            if begin == end or part.last > numbers[-1]:
                raise OutputError(f"{part.name} is no shard's of the manifest")
            found.append((part, manifest.slice(begin, end - begin)))
        return found

    def _parts(self, manifest: pa.Table) -> Iterator[tuple[Part, pa.Table, pa.Table]]:
        """The parts there are, each with its images, and its URIs and statuses."""
        waiting: deque[tuple[Part, pa.Table, Future[pa.Table]]] = deque()
        rows = 0
        with ThreadPoolExecutor(_READERS) as pool:
            for part, listed in self.of_parts(manifest):
                while waiting and rows + len(listed) > _READ_AHEAD:
                    rows -= len(waiting[0][1])
                    yield _checked(*waiting.popleft())
                rows += len(listed)
                waiting.append((part, listed, pool.submit(self._read, part, ["uri", "status"])))
            while waiting:
                yield _checked(*waiting.popleft())

    def _read(self, part: Part, columns: list[str] | None) -> pa.Table:
        with open_part(self.uri, part) as file:
            return file.read(columns)

    def read_part(self, number: int, columns: list[str] | None = None) -> pa.Table:
        """A shard's own part, or some of its columns.

        Raises:
            OutputError: it cannot be read.
        """
        return self._read(Part(number, number), columns)

    def rows(self, columns: list[str] | None = None) -> Iterator[pa.Table]:
        """All rows that there are, in order, or some of their columns: some at a time.

        Raises:
            OutputError: a part cannot be read.
        """
        for part in self.parts():
            yield from row_groups(self.uri, part, columns)

    def lowest(self, rank: Callable[[np.ndarray], np.ndarray], count: int) -> pa.Table:
        """The rows with the lowest ranks, the lowest first, and in listing order among equals.

        Args:
            rank: makes numbers of the scores of some rows, NaN where there is none; a row whose
                number is NaN is not taken.
            count: how many at most.

        Raises:
            OutputError: a part cannot be read.
        """
        found: list[tuple[float, Part, int, int]] = []  # rank, part, row group, row
        for part in self.parts():
            for number, some in enumerate(row_groups(self.uri, part, ["score"])):
                ranks = rank(some["score"].to_numpy())
                first = [
                    i for i in np.argsort(ranks, kind="stable")[:count] if ranks[i] == ranks[i]
                ]
                found += [(float(ranks[i]), part, number, int(i)) for i in first]
            found = heapq.nsmallest(count, found)
        places = sorted(place for _, *place in found)
        tables = [COLUMNS.empty_table()]
        for part, of_part in itertools.groupby(places, itemgetter(0)):
            with open_part(self.uri, part) as file:
                for number, of_group in itertools.groupby(of_part, itemgetter(1)):
                    rows = [row for _, _, row in of_group]
                    tables.append(file.row_group(number).take(rows))
        order = [places.index(place) for _, *place in found]
        return pa.concat_tables(tables[1:] or tables).take(order)

    def find_row(self, shard: int, row: int) -> pa.Table | None:
        """The row of an image, in a table of its own; None where it has none yet.

        Raises:
            OutputError: it cannot be read.
        """
        for part, listed in self.of_parts(self.manifest()):
            if shard in part.shards:
                index = int(np.searchsorted(listed["shard"].to_numpy(), shard)) + row
                with open_part(self.uri, part) as file:
                    for number, rows in enumerate(file.rows):
                        if index < rows:
                            return file.row_group(number).slice(index, 1)
                        index -= rows
        return None


def _checked(
    part: Part, listed: pa.Table, reading: "Future[pa.Table]"
) -> tuple[Part, pa.Table, pa.Table]:
    rows = reading.result()
    if len(rows) != len(listed):
        whose = "shard" if part.first == part.last else "shards"
        raise OutputError(f"{part.name} has {len(rows)} rows, its {whose} {len(listed)}")
    if not rows["uri"].equals(listed["uri"]):
        raise OutputError(f"{part.name} holds other images than its shard")
    return part, listed, rows


def _by_number(name: str) -> tuple[int, str]:
    """Sorts names that end in numbers of at least so many digits by their numbers."""
    return len(name), name


def _fingerprint(settings: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def _difference(name: str, before: Any, now: Any) -> str:
    if isinstance(before, str) and isinstance(now, str) and len(before) == len(now) == 64:
        return f"another {name}"  # SHA-256 digests tell the reader nothing
    option = f"--{name.replace('_', '-')}" if name in _OPTIONS else name
    return f"{option} was {before}, is {now}"
