"""The output directory of a caption job: its identity, lock, JSON files and clean-up."""

import hashlib
import json
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import fields
from datetime import UTC, datetime
from typing import Any

from captioner import __version__, storage
from captioner.config import DecodeConfig, ListingConfig, RunConfig, parse_json
from captioner.errors import FingerprintError, InputError, OutputError, one_line
from captioner.output.parts import Part, delete_parts, find_parts
from captioner.schema import SCHEMA_VERSION

__all__ = ["PRIVATE", "OutputDirectory", "by_number", "with_ids"]

#: The folder of an output directory that holds the job's own files.
PRIVATE = "__captioner"
#: Settings that are options of the command line.
_OPTIONS = {
    each.name for config in (DecodeConfig, ListingConfig, RunConfig) for each in fields(config)
}


class OutputDirectory:
    """The directory that a caption job writes.

    ::

        part-000000.parquet …                one for each shard, rows in listing order
        part-000000-000255.parquet …         or one for many: see :mod:`captioner.output.parts`
        __captioner/run.json                  settings and fingerprint of the job that began it
        __captioner/manifest-0000.parquet …   see :mod:`captioner.output.manifest`
        __captioner/summary.json              the last run's counts and times
        __captioner/lock                      locked while a job runs; not in a bucket
        __captioner/attempts/…                see :mod:`captioner.caption.crash_log`
    """

    def __init__(self, uri: str):
        self.uri = uri

    def _within(self, *names: str) -> str:
        return "/".join([self.uri.rstrip("/"), *names])

    def private(self, name: str) -> str:
        """The URI of one of the job's own files."""
        return self._within(PRIVATE, name)

    def is_begun(self) -> bool:
        """Whether a caption job began the output; False if that is unknown, as for a file."""
        try:
            return storage.is_directory(self.uri) and "run.json" in storage.names(self.private(""))
        except OSError:
            return False

    @property
    def id_column(self) -> str | None:
        """The column that names the images in messages; None if they have only their URIs.

        Raises:
            OutputError: it is not a caption job's output.
        """
        settings = self.read_json("run.json").get("settings")
        column = settings.get("id") if isinstance(settings, dict) else None
        return column if isinstance(column, str) else None

    @property
    def low_score(self) -> float:
        """The score below which captions are probably wrong; -inf if nobody measured it.

        Raises:
            OutputError: it is not a caption job's output.
        """
        score = self.read_json("run.json").get("low_score")
        return score if isinstance(score, float) else -math.inf

    def names(self, *folders: str) -> list[str]:
        """The sorted names in the directory, or in a subfolder; empty if it does not exist.

        Raises:
            OutputError: it cannot be listed.
        """
        try:
            return storage.names(self._within(*folders))
        except OSError as error:
            reason = error.strerror or one_line(error)
            raise OutputError(f"cannot use {self.uri} for output: {reason}") from error

    def refuse_own(self, target: str) -> None:
        """Refuses to write a file that a caption job keeps here: a part, or one of its own.

        Args:
            target: the file, or the folder of files, that another command is to write.

        Raises:
            OutputError: it is one.
        """
        place, own = _real(target), _real(self.uri)
        folder, _, name = place.rpartition("/")
        is_part = folder == own and any(map(bool, find_parts([name])))
        if is_part or f"{place}/".startswith(f"{own}/{PRIVATE}/"):
            raise OutputError(
                f"{target} belongs to the caption job of {self.uri}: write to another place"
            )

    def parts(self) -> list[Part]:
        """The parts that count, in order.

        Raises:
            OutputError: two parts overlap, or the directory cannot be listed.
        """
        return find_parts(self.names())[0]

    def begin(
        self,
        settings: dict[str, Any],
        *,
        low_score: float | None = None,
        overwrite: bool = False,
    ) -> None:
        """Claims the directory for this job: a new directory, or a job with the same settings.

        Args:
            settings: what decides the captions, by name; its SHA-256 is the job's fingerprint.
            low_score: the score below which the model's captions are probably wrong.
            overwrite: delete what an earlier job wrote.

        Raises:
            FingerprintError: a job with other settings began it.
            OutputError: it holds files that no caption job wrote, or cannot be written.
        """
        ours = self.check(settings, overwrite=overwrite)
        if ours and overwrite:
            self._delete()
        if overwrite or not ours:
            run = {
                "schema_version": SCHEMA_VERSION,
                "fingerprint": _fingerprint(settings),
                "settings": settings,
                "low_score": low_score,
                "captioner_version": __version__,
                "created": datetime.now(UTC).isoformat(timespec="seconds"),
            }
            try:
                self._write_json("run.json", run, new=not overwrite)
            except FileExistsError:  # another job begins in the same bucket at this moment
                self._compare(settings)
        self.delete_leftovers()

    def check(self, settings: dict[str, Any], *, overwrite: bool = False) -> bool:
        """Whether a caption job began it; raises what :meth:`begin` would, and writes nothing."""
        ours = self._is_ours()
        if ours and not overwrite:
            self._compare(settings)
        return ours

    def _is_ours(self) -> bool:
        """Whether a caption job began it; raises OutputError if it holds other files."""
        present = self.names()
        if "run.json" in self.names(PRIVATE):
            return True
        if any(not name.startswith(".") for name in present if name != PRIVATE):
            raise OutputError(
                f"{self.uri} is not empty, and not a caption job's output: use another directory"
            )
        return False

    def _compare(self, settings: dict[str, Any]) -> None:
        before = self.read_json("run.json").get("settings")
        if not isinstance(before, dict):
            raise OutputError(f"{self.private('run.json')} has no settings")
        current = json.loads(json.dumps(settings))
        differing = [
            _difference(name, before.get(name), current.get(name))
            for name in sorted(before.keys() | current.keys())
            if before.get(name) != current.get(name)
        ]
        if differing:
            raise FingerprintError(
                f"{self.uri} was begun with other settings: {'; '.join(differing)}. "
                "Give the earlier settings, use another directory, or --overwrite"
            )

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Holds the directory's lock: no other job can use it meanwhile. A bucket has no locks.

        The lock is the kernel's, on a file: it is released when its process ends, however it ends.

        Raises:
            OutputError: another job uses the directory, it holds files of others, or it cannot be
                written.
        """
        self._is_ours()
        with storage.locked(self.private("lock")):
            yield

    def delete_leftovers(self) -> None:
        """Deletes temporary files of killed writers and, where there are locks, replaced parts.

        A bucket has no locks: another job may be splitting a part into the smaller parts.

        Raises:
            OutputError: a file cannot be deleted.
        """
        if storage.is_local(self.uri):
            self.delete_replaced_parts()
            for folders in ([], [PRIVATE], [PRIVATE, "attempts"]):
                for name in filter(storage.is_temporary, self.names(*folders)):
                    storage.delete(self._within(*folders, name))

    def delete_replaced_parts(self) -> None:
        """Deletes parts within the range of others; no other job may be at work on the directory.

        Raises:
            OutputError: a part cannot be deleted.
        """
        _, replaced = find_parts(self.names())
        delete_parts(self.uri, replaced)

    def finish_compaction(self) -> None:
        """Deletes the parts that a killed compaction left, if no job is at work; for readers."""
        if storage.is_local(self.uri) and find_parts(self.names())[1]:
            with suppress(OutputError), self.locked():  # a job at work does it itself
                self.delete_replaced_parts()

    def _delete(self) -> None:
        """Deletes parts first and run.json last: an interrupted deletion stays recognisable.

        The last manifest goes first: the rest are then numbered without a gap.
        """
        counting, replaced = find_parts(self.names())
        delete_parts(self.uri, [*replaced, *counting])
        names = sorted(self.names(PRIVATE), key=by_number, reverse=True)
        for name in sorted(names, key="run.json".__eq__):
            if name != "lock":  # another job would lock the next file of that name
                storage.delete(self.private(name))

    def read_json(self, name: str) -> dict[str, Any]:
        """Reads one of the job's JSON files.

        Raises:
            OutputError: it is missing or broken.
        """
        try:
            parsed = parse_json(storage.read(self.private(name)))
        except FileNotFoundError as error:
            raise OutputError(
                f"{self.uri} is not a caption job's output: it has no {name}"
            ) from error
        except (OSError, InputError) as error:
            raise OutputError(f"cannot read {self.private(name)}: {error}") from error
        if not isinstance(parsed, dict):
            raise OutputError(f"{self.private(name)} is not a JSON object")
        return parsed

    def _write_json(self, name: str, values: dict[str, Any], *, new: bool = False) -> None:
        storage.write(self.private(name), (json.dumps(values, indent=2) + "\n").encode(), new=new)

    def write_summary(self, values: dict[str, Any]) -> None:
        """Writes summary.json."""
        self._write_json("summary.json", values)

    def read_summary(self) -> dict[str, Any]:
        """Reads summary.json; empty if no run has ended.

        Raises:
            OutputError: it is broken.
        """
        return self.read_json("summary.json") if "summary.json" in self.names(PRIVATE) else {}


def with_ids(uris: Sequence[str], ids: Sequence[Any] | None) -> list[str]:
    """The names of images for messages: their URIs, each after its id if there are ids."""
    if ids is None:
        return list(uris)
    return [f"{id_} ({uri})" for uri, id_ in zip(uris, ids, strict=True)]


def by_number(name: str) -> tuple[int, str]:
    """Sorts names that differ in a number with leading zeros by the number."""
    return len(name), name


def _fingerprint(settings: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def _difference(name: str, before: Any, now: Any) -> str:
    if isinstance(before, str) and isinstance(now, str) and len(before) == len(now) == 64:
        return f"another {name}"  # SHA-256 digests mean nothing to a reader
    if isinstance(before, list) or isinstance(now, list):
        before, now = (", ".join(map(str, each or [])) or "nothing" for each in (before, now))
    option = f"--{name.replace('_', '-')}" if name in _OPTIONS else name
    return f"{option} was {before}, is {now}"


def _real(uri: str) -> str:
    """A place's one spelling; for a local one without links."""
    uri = storage.absolute(uri).rstrip("/")
    return os.path.realpath(uri) if storage.is_local(uri) and uri.startswith("/") else uri
