"""Reads rows of an output: all rows, one image's row, or the lowest-ranked rows."""

import heapq
import itertools
from collections.abc import Callable, Iterator
from operator import itemgetter

import numpy as np
import pyarrow as pa

from captioner.output.directory import OutputDirectory
from captioner.output.manifest import parts_with_images, read_manifest
from captioner.output.parts import Part, open_part, row_groups
from captioner.schema import COLUMNS

__all__ = ["lowest_ranked_rows", "read_row", "read_rows"]

_SELECTED_AT_LEAST = 10_000  # rows are collected before the lowest are selected

#: A row's rank, part, row group and number in the row group.
_Ranked = tuple[float, Part, int, int]


def read_rows(directory: OutputDirectory, columns: list[str] | None = None) -> Iterator[pa.Table]:
    """All rows, or some of their columns, in order: a table for each row group.

    Raises:
        OutputError: a part cannot be read.
    """
    for part in directory.parts():
        yield from row_groups(directory.uri, part, columns)


def read_row(directory: OutputDirectory, shard: int, row: int) -> pa.Table | None:
    """The row of an image as a table with one row; None if it has no row yet.

    Raises:
        OutputError: it cannot be read.
    """
    for part, listed in parts_with_images(directory, read_manifest(directory)):
        if shard in part.shards:
            index = int(np.searchsorted(listed["shard"].to_numpy(), shard)) + row
            with open_part(directory.uri, part) as file:
                for number, rows in enumerate(file.rows):
                    if index < rows:
                        return file.row_group(number).slice(index, 1)
                    index -= rows
    return None


def lowest_ranked_rows(
    directory: OutputDirectory, rank: Callable[[np.ndarray], np.ndarray], count: int
) -> pa.Table:
    """The rows with the lowest ranks, the lowest first, and in listing order among equals.

    Args:
        directory: the output.
        rank: maps the scores of some rows (NaN for a row without a score) to their ranks. A row
            whose rank is NaN is left out.
        count: the largest number of rows.

    Raises:
        OutputError: a part cannot be read.
    """
    found = _lowest_ranked(directory, rank, count)
    places = sorted(place for _, *place in found)
    tables = [COLUMNS.empty_table()]
    for part, of_part in itertools.groupby(places, itemgetter(0)):
        with open_part(directory.uri, part) as file:
            for number, of_group in itertools.groupby(of_part, itemgetter(1)):
                rows = [row for _, _, row in of_group]
                tables.append(file.row_group(number).take(rows))
    index = {tuple(place): number for number, place in enumerate(places)}
    order = [index[tuple(place)] for _, *place in found]
    return pa.concat_tables(tables[1:] or tables).take(pa.array(order, pa.int64()))


def _lowest_ranked(
    directory: OutputDirectory, rank: Callable[[np.ndarray], np.ndarray], count: int
) -> list[_Ranked]:
    found: list[_Ranked] = []
    for part in directory.parts():
        for number, some in enumerate(row_groups(directory.uri, part, ["score"])):
            ranks = rank(some["score"].to_numpy())
            lowest = np.argsort(ranks, kind="stable")[:count]
            lowest = lowest[~np.isnan(ranks[lowest])]
            found += [(float(ranks[i]), part, number, int(i)) for i in lowest]
            if len(found) > 2 * count + _SELECTED_AT_LEAST:
                found = heapq.nsmallest(count, found)
    return heapq.nsmallest(count, found)
