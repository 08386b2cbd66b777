"""Merges the parts of a finished output into larger files; splits them where rows change."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import pyarrow as pa

from captioner import storage
from captioner.errors import InputError, OutputError
from captioner.output.audit import audit
from captioner.output.directory import OutputDirectory
from captioner.output.manifest import parts_with_images, read_manifest
from captioner.output.parts import Part, rewrite
from captioner.runtime.progress import progress_bar

__all__ = ["Compaction", "compact", "isolate_shards"]


@dataclass(frozen=True)
class Compaction:
    """The number of an output's images, and of its parts before and after."""

    output: str
    images: int
    before: int
    after: int

    def describe(self) -> str:
        """One line for a person."""
        return f"{self.output}: {self.images} images, {self.before} parts before, {self.after} now"


def compact(output: str, size: int) -> Compaction:
    """Merges an output's parts into larger ones; does nothing if they are large enough.

    Args:
        output: the output of a finished caption job: every image has its row.
        size: the largest size of a part, in bytes. A part of half that size is large enough.

    Raises:
        InputError: the size is not positive.
        OutputError: it is not a caption job's output or not finished, another job is at work on
            it, or a part cannot be read or written.
    """
    if size < 1:
        raise InputError(f"the part size must be positive, not {size} bytes")
    directory = OutputDirectory(output)
    directory.read_json("run.json")  # the lock would make a directory where there is none
    with directory.locked():
        directory.delete_leftovers()
        directory.delete_replaced_parts()
        if missing := len(audit(directory).missing):
            raise OutputError(
                f"{output} is not finished: {missing} images have no row; "
                "run its caption job again first"
            )
        manifest = read_manifest(directory)
        rows = {part: len(listed) for part, listed in parts_with_images(directory, manifest)}
        try:
            sizes = storage.sizes(output)
        except OSError as error:
            raise OutputError(f"cannot list {output}: {error}") from error
        groups = [*_groups([*rows], sizes, size)]
        total = sum(rows[part] for group in groups for part in group)
        with progress_bar(total, unit="image") as progress:
            for group in groups:
                merged = Part(group[0].first, group[-1].last)
                count = sum(rows[part] for part in group)
                rewrite(output, group, {merged: count}, progress.update)
        return Compaction(output, len(manifest), len(rows), len(directory.parts()))


def _groups(parts: list[Part], sizes: dict[str, int], size: int) -> Iterator[list[Part]]:
    """The parts to merge: consecutive small parts whose total size is within the limit."""
    group: list[Part] = []
    full = 0
    for part in parts:
        own = sizes[part.name]
        if full + own > size or 2 * own >= size:
            if len(group) > 1:
                yield group
            group, full = [], 0
        if 2 * own < size:
            group.append(part)
            full += own
    if len(group) > 1:
        yield group


def isolate_shards(directory: OutputDirectory, manifest: pa.Table, shards: Collection[int]) -> None:
    """Splits parts so that each of ``shards``, whose rows will change, has its own part.

    Raises:
        OutputError: a part cannot be read or written.
    """
    for part, listed in parts_with_images(directory, manifest):
        wanted = sorted(set(part.shards).intersection(shards))
        if wanted and part.first != part.last:
            numbers = listed["shard"].to_numpy()
            rows = {
                piece: int(((numbers >= piece.first) & (numbers <= piece.last)).sum())
                for piece in _pieces(part, wanted)
            }
            rewrite(directory.uri, [part], rows, lambda _: None)


def _pieces(part: Part, shards: list[int]) -> Iterator[Part]:
    """Cuts a part's range of shards so that each of ``shards`` is a piece by itself."""
    begin = part.first
    for shard in shards:
        if begin < shard:
            yield Part(begin, shard - 1)
        yield Part(shard, shard)
        begin = shard + 1
    if begin <= part.last:
        yield Part(begin, part.last)
