"""Summarises an output directory: counts, best and worst captions, missing images."""

import heapq
from collections import Counter
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from captioner.errors import OutputError
from captioner.output.audit import Audit, audit
from captioner.output.decisions import KINDS, read_decisions
from captioner.output.directory import OutputDirectory, with_ids
from captioner.output.rows import read_rows
from captioner.review.findings import COLUMNS, Findings
from captioner.schema import STATUSES

__all__ = [
    "Report",
    "summarise",
]

_COLUMNS = ("score", "caption", "uri", "status", "error", "finish")
_SHOWN = 5
_MISSING_SHOWN = 20


@dataclass(frozen=True)
class Report:
    """A summary of an output directory.

    Attributes:
        audit: the number of images, the rows by status, and the images without a row.
        examples: for each status other than ok, the error and URI of one row.
        last_run: the last run in a line; empty if no run has ended.
        worst: captions with the lowest scores: ``(score, caption, uri)``.
        best: captions with the highest scores.
        findings: captions that look wrong.
        decisions: how many captions a reviewer accepted, edited and rejected.
    """

    audit: Audit
    examples: dict[str, tuple[str, str]]
    last_run: str
    worst: list[tuple[float, str, str]]
    best: list[tuple[float, str, str]]
    findings: Findings
    decisions: Counter[str]

    def lines(self) -> list[str]:
        """The report as text."""
        lines = [f"{self.audit.images} images listed"]
        for status in STATUSES:
            if count := self.audit.rows.get(status):
                lines.append(f"  {count} {status}")
                if status in self.examples:
                    error, uri = self.examples[status]
                    lines[-1] += f", for example {uri}: {error}"
        if self.last_run:
            lines.append(self.last_run)
        if self.decisions:
            counts = ", ".join(f"{self.decisions[kind]} {kind}" for kind in KINDS)
            lines.append(f"{self.decisions.total()} captions reviewed: {counts}")
        for title, captions in (("best", self.best), ("worst", self.worst)):
            lines.append(f"{title} scores (mean natural log-probability per word):")
            lines += [f"  {score:7.3f}  {caption}  {uri}" for score, caption, uri in captions]
        lines += self.findings.lines()
        missing = self.audit.missing_names
        lines.append(f"{len(missing)} images have no row" + (":" if missing else ""))
        lines += [f"  {uri}" for uri in missing[:_MISSING_SHOWN]]
        if len(missing) > _MISSING_SHOWN:
            lines.append("  --missing lists every image; run captioner caption again to resume")
        return lines


def summarise(output: str) -> Report:
    """Summarises an output directory.

    Raises:
        OutputError: ``output`` is not a caption job's output, or a part cannot be read.
    """
    directory = OutputDirectory(output)
    directory.read_json("run.json")
    directory.finish_compaction()
    accounts = audit(directory)
    last_run = _last_run(directory)
    worst: list[tuple[float, str, str]] = []
    best: list[tuple[float, str, str]] = []
    examples: dict[str, tuple[str, str]] = {}
    findings = Findings(directory.low_score)
    reviewed = read_decisions(output)
    decisions: Counter[str] = Counter()
    id_column = directory.id_column
    columns = [*_COLUMNS, *([] if id_column is None else [id_column])]
    for some in read_rows(directory, columns):
        if reviewed:
            made = (reviewed.get(uri) for uri in some["uri"].to_pylist())
            decisions.update(each.decision for each in made if each and each.decision)
        if id_column is not None:
            names = with_ids(some["uri"].to_pylist(), some[id_column].to_pylist())
            some = some.set_column(columns.index("uri"), "uri", pa.array(names, pa.string()))
        findings.add(some.select(COLUMNS).to_pylist())
        for status in set(STATUSES) - {"ok", *examples}:
            for row in some.filter(pc.equal(some["status"], status)).slice(0, 1).to_pylist():
                examples[status] = (row["error"], row["uri"])
        scored = some.filter(pc.is_valid(some["score"])).select(["score", "caption", "uri"])
        rows = list(zip(*(scored[name].to_pylist() for name in scored.column_names), strict=True))
        best = heapq.nlargest(_SHOWN, best + rows)
        worst = heapq.nsmallest(_SHOWN, worst + rows)
    return Report(accounts, examples, last_run, worst, best, findings, decisions)


def _last_run(directory: OutputDirectory) -> str:
    if not (last := directory.read_summary()):
        return ""
    try:
        if last["captioned"] == 0:
            return f"last run: no image captioned, ended {last['ended']}"
        return (
            f"last run: {last['captioned']:d} images in {last['seconds']:.1f} s, "
            f"{last['images_per_second']:.1f} images/s, ended {last['ended']}"
        )
    except (KeyError, TypeError, ValueError) as error:
        raise OutputError(f"{directory.uri}: summary.json is damaged; delete it") from error
