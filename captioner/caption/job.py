"""The caption job: shards → decode → caption → part files, in this process or on Ray.

A part is written atomically under its shard's name: a task that runs twice writes the same file
twice, and what was done before a crash stays done.
"""

import logging
import signal
import time
from collections import Counter
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import asdict, replace
from datetime import datetime, timezone
from functools import partial
from typing import Any

import pyarrow as pa

from captioner import storage
from captioner.caption.crash_log import Attempts
from captioner.caption.local import run_local
from captioner.caption.plan import (
    Plan,
    Summary,
    _choose_compile,
    _describe_process,
    _plan,
    choose_engine,
)
from captioner.caption.ray import _Actors, _run_ray
from captioner.caption.steps import CaptionJob, Written
from captioner.caption.timing import Work
from captioner.config import DecodeConfig, ListingConfig, RunConfig
from captioner.data import images
from captioner.data.listing import list_source
from captioner.errors import (
    CaptionerError,
    ErrorRateError,
    IncompleteError,
    StoppedError,
)
from captioner.model.bundle import Bundle
from captioner.model.bundle import load as load_bundle
from captioner.output.compaction import expose
from captioner.output.directory import OutputDirectory
from captioner.output.manifest import Shard, new_shards
from captioner.runtime.cluster import connected
from captioner.runtime.device import choose_device
from captioner.runtime.memory import keep_few_kernels
from captioner.runtime.progress import progress_bar
from captioner.runtime.signals import Signals, catch_signals
from captioner.schema import MANIFEST, SCHEMA_VERSION

__all__ = ["caption_images", "plan_captioning"]


_logger = logging.getLogger(__name__)


def plan_captioning(
    source: str,
    output: str,
    model: str,
    *,
    decode: DecodeConfig | None = None,
    run: RunConfig | None = None,
    listing: ListingConfig | None = None,
    overwrite: bool = False,
) -> Plan:
    """What :func:`caption_images` would do with the same arguments; writes nothing.

    Raises:
        CaptionerError: what :func:`caption_images` would raise before its first image.
    """
    decode, run, listing = decode or DecodeConfig(), run or RunConfig(), listing or ListingConfig()
    directory = OutputDirectory(storage.absolute(output))
    bundle = load_bundle(model)
    listed = list_source(storage.absolute(source), listing)
    goes_on = directory.check(_settings(bundle, decode), overwrite=overwrite) and not overwrite
    manifest = directory.manifest() if goes_on else MANIFEST.empty_table()
    manifest = pa.concat_tables([manifest, new_shards(manifest, listed, run.shard_size)])
    shards = list(directory.remaining(manifest, begun=goes_on))
    if run.retry_failed and goes_on:
        shards += directory.not_ok(manifest)
    if choose_engine(run) == "local":
        return _plan(len(manifest), shards, _describe_process(run))
    with connected() as ray:
        return _plan(len(manifest), shards, _Actors.fitting(ray, run).describe())


def caption_images(
    source: str,
    output: str,
    model: str,
    *,
    decode: DecodeConfig | None = None,
    run: RunConfig | None = None,
    listing: ListingConfig | None = None,
    overwrite: bool = False,
) -> Summary:
    """Captions the images of a source into an output directory; goes on where an earlier run ended.

    Args:
        source: a directory, or a file of URIs: see :func:`captioner.data.listing.list_source`.
        output: see :class:`captioner.output.directory.OutputDirectory`.
        model: a bundle's directory.
        decode: what decides the captions; must be the same when a job is gone on with.
        run: how the job runs.
        listing: which files are images.
        overwrite: delete what an earlier job wrote to the output first.

    Raises:
        InputError: the source cannot be listed.
        BundleError: the model cannot be loaded.
        OutputError: the output is another job's, or cannot be written.
        IncompleteError: the job ended with images that have no row.
        ErrorRateError: more rows of the output than ``run.max_error_rate`` allows are not ok.
        StoppedError: SIGTERM or Ctrl-C ended the job.
    """
    decode, run, listing = decode or DecodeConfig(), run or RunConfig(), listing or ListingConfig()
    choose_engine(run)  # may refuse
    directory = OutputDirectory(storage.absolute(output))
    keep_few_kernels()
    with catch_signals() as signals:
        try:
            bundle = load_bundle(model)
            listed = list_source(storage.absolute(source), listing)
            with directory.locked():
                directory.begin(_settings(bundle, decode), overwrite=overwrite)
                manifest = directory.extend(listed, run.shard_size)
                # A limit leaves images out that are still there.
                found = manifest["uri"] if listing.limit else [each.uri for each in listed]
                gone = len(manifest) - len(found)
                job = CaptionJob(
                    output=directory.uri,
                    image_size=bundle.config.image_size,
                    grid=0 if decode.attention == "none" else bundle.grid,
                    decode=decode,
                    run=run,
                )
                return _caption(job, bundle, directory, manifest, signals, gone=gone)
        except (Exception, KeyboardInterrupt) as problem:
            # After a signal anything else comes of it, as an import that was cut off.
            if signals.received is None and not isinstance(problem, KeyboardInterrupt):
                raise
            raise _stopped(directory, signals.received or signal.SIGINT) from problem


def _caption(
    job: CaptionJob,
    bundle: Bundle,
    directory: OutputDirectory,
    manifest: pa.Table,
    signals: Signals,
    *,
    gone: int,
) -> Summary:
    """Does what is left of a job, and closes the books however that ends."""
    shards = list(directory.remaining(manifest))
    if job.run.retry_failed:
        failed = list(directory.not_ok(manifest))
        directory.delete_held()
        expose(directory, manifest, {shard.number for shard in failed})
        shards += failed
    attempts, written, work = Attempts(job.output), Counter[str](), Work()
    started, begin = _now(), time.monotonic()

    def close(error: str | None = None) -> tuple[Summary, list[str]]:
        seconds = time.monotonic() - begin
        accounts = directory.accounts()
        summary = Summary(
            output=job.output,
            images=accounts.images,
            rows=accounts.rows,
            missing=len(accounts.missing),
            gone=gone,
            captioned=sum(written.values()),
            seconds=seconds,
            started=started,
            ended=_now(),
            work=work,
            error=error,
        )
        directory.write_summary(summary.figures())
        return summary, accounts.missing

    try:
        if shards:
            _run(job, bundle, shards, written, work, signals, total=len(manifest))
        elif job.run.profile is not None:
            _logger.warning("no image is left to caption: %s is not written", job.run.profile)
    except BaseException as problem:
        # What is told already is not to be hidden by what goes wrong now.
        with suppress(CaptionerError):
            directory.tidy()
            if isinstance(problem, (CaptionerError, KeyboardInterrupt)):
                attempts.forgive()
            close(str(problem) or ("stopped" if signals.received else type(problem).__name__))
        raise
    directory.tidy()
    summary, missing = close()
    if missing:
        first = ", ".join(missing[:20])
        raise IncompleteError(f"{len(missing)} images have no row: {first}")
    attempts.clear()
    bad = (summary.images - summary.rows.get("ok", 0)) / summary.images
    if bad > job.run.max_error_rate:
        raise ErrorRateError(
            f"{summary.counts()}: {bad:.1%} are not ok, "
            f"more than --max-error-rate {job.run.max_error_rate:.1%}; captioner report shows why"
        )
    return summary


def _stopped(directory: OutputDirectory, number: int) -> StoppedError:
    manifest = directory.manifest()
    done = len(manifest) - sum(len(shard.uris) for shard in directory.remaining(manifest))
    return StoppedError(
        f"stopped by {signal.Signals(number).name}: {done} of {len(manifest)} images done; "
        "run the same command again to go on",
        number,
    )


def _run(
    job: CaptionJob,
    bundle: Bundle,
    shards: list[Shard],
    written: Counter[str],
    work: Work,
    signals: Signals,
    *,
    total: int,
) -> None:
    """Runs the engine with a progress bar; adds up the rows written, by status, and the work."""
    engine: Callable[[CaptionJob, Bundle, list[Shard]], Written] = run_local
    if choose_engine(job.run) == "ray":
        engine = partial(_run_ray, total=total)
    else:
        on_cpu = choose_device(job.run.device).type == "cpu"
        job = replace(job, run=_choose_compile(job.run, shards, on_cpu=on_cpu))
        _logger.info(_plan(total, shards, _describe_process(job.run)).describe())
    done = total - sum(len(shard.uris) for shard in shards)
    bar = progress_bar(total, unit="image", initial=done)
    with bar as progress, closing(engine(job, bundle, shards)) as running:
        for counts, some in running:
            written.update(counts)
            work += some
            if bad := sum(written.values()) - written["ok"]:
                progress.set_postfix(bad=bad)
            progress.update(sum(counts.values()))
            signals.check()


def _settings(bundle: Bundle, decode: DecodeConfig) -> dict[str, Any]:
    """What decides the rows: the job's fingerprint is made of it."""
    return {
        "model": bundle.digests["model.safetensors"],
        "model settings": bundle.digests["config.json"],
        "vocabulary": bundle.digests["tokenizer.json"],
        "preprocessing version": images.PREPROCESSING_VERSION,
        "schema version": SCHEMA_VERSION,
        **asdict(decode.with_model_defaults(bundle.config)),
    }


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


# On Ray: one chain of the stages in captioner.caption.ray_stages.
