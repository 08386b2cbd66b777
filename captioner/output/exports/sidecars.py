"""A text file for each image, beside it or in a parallel folder, as training tools read it."""

import os
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

from captioner import storage
from captioner.data.reading import is_in_container
from captioner.errors import InputError, OutputError
from captioner.output.exports.job import ExportJob
from captioner.output.exports.paths import common_folder, relative

__all__ = ["write"]

_THREADS = 16  # they wait for the disk or a bucket
_LARGEST = 1 << 20  # bytes of a text that a caption is added to

_Outcome = Literal["written", "unchanged", "kept"]


def write(job: ExportJob) -> None:
    """Writes ``photo.txt`` for ``photo.jpg``, whose text is the caption.

    Two images whose names differ in their extension alone have one sidecar: the first in listing
    order gets it, the others are not exported.

    Raises:
        InputError: an image is not below the root, or is on the web and there is no destination.
        OutputError: a sidecar cannot be written.
    """
    root = None if job.config.root is None else storage.absolute(job.config.root)
    if job.destination and root is None:
        tables = (table["uri"].to_pylist() for _, table in job.rows.tables())
        root = common_folder(uri for uris in tables for uri in uris)
    taken: set[int] = set()  # hashes of the targets, which take less memory than the names
    with ThreadPoolExecutor(_THREADS) as pool:
        for count, table in job.rows.tables():
            jobs = []
            for uri, caption in zip(
                table["uri"].to_pylist(), table["caption"].to_pylist(), strict=True
            ):
                target = _target(job, uri, root)
                if hash(target) in taken:
                    job.summary.share(target)
                    continue
                taken.add(hash(target))
                jobs.append((target, pool.submit(_write, job, target, job.text(caption))))
            for target, running in jobs:
                outcome, added = running.result()
                if outcome == "kept":
                    job.summary.keep(target)
                elif outcome == "written":
                    job.summary.written += 1
                    job.ledger.note(target, added)
                else:
                    job.summary.unchanged += 1
            job.advance(count)


def _target(job: ExportJob, uri: str, root: str | None) -> str:
    extension = "." + job.config.extension.lstrip(".")
    if not job.destination:
        if is_in_container(uri):
            raise InputError(f"{uri} is in a file of many images: give a DESTINATION to write to")
        path = storage.as_path(uri)
        if path.startswith(("http://", "https://")):
            raise InputError(f"{uri} is a web address: give a DESTINATION to write to")
        return os.path.splitext(path)[0] + extension
    assert root is not None, "a destination has a root"
    return storage.join(job.destination, os.path.splitext(relative(uri, root))[0] + extension)


def _write(job: ExportJob, target: str, text: str) -> tuple[_Outcome, str]:
    """Writes one sidecar unless it would not change; returns the outcome and the added text."""
    mode = job.config.existing
    try:
        before = storage.read(target, _LARGEST).decode()
    except FileNotFoundError:
        storage.write(target, text.encode())
        return "written", text
    except (OSError, UnicodeDecodeError) as error:
        raise OutputError(f"cannot read {target}: {error}") from error
    added = job.ledger.content(target)
    ours = added is not None and job.ledger.version(target) == storage.version(target)
    if mode in ("append", "prepend"):
        if ours and added is not None:
            before = _without(before, added)
        after = _together(before, text, first=mode == "prepend")
        if not ours and _is_part(before, text, first=mode == "prepend"):
            return "unchanged", text  # a killed export wrote it and did not save its ledger
    elif before == text:
        return "unchanged", text
    elif ours or mode == "overwrite":
        after = text
    else:
        return "kept", text
    if storage.read(target, _LARGEST).decode() == after:
        return "unchanged", text
    storage.write(target, after.encode())
    return "written", text


def _together(before: str, text: str, *, first: bool) -> str:
    """Joins two texts with a space; returns ``text`` alone if ``before`` is blank."""
    if not before.strip():
        return text
    return f"{text} {before.lstrip()}" if first else f"{before.rstrip()} {text}"


def _is_part(before: str, text: str, *, first: bool) -> bool:
    return before.startswith(text) if first else before.rstrip().endswith(text)


def _without(whole: str, added: str) -> str:
    """The text of a sidecar before a caption was added to it."""
    if whole.endswith(added):
        return whole[: -len(added)].rstrip()
    return whole[len(added) :].lstrip() if whole.startswith(added) else whole
