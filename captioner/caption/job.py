"""The caption job: begin, execute the plan, record the outcome.

A part is written atomically under its shard's name. A task that runs twice writes the same file
twice, and what was finished before a crash stays finished.
"""

import logging
import signal
from collections.abc import Iterator
from contextlib import ExitStack, closing, suppress

import pyarrow as pa

from captioner import storage
from captioner.caption.early_failures import EarlyFailures
from captioner.caption.inputs import Inputs
from captioner.caption.local import run_local
from captioner.caption.outcome import Outcome, check_error_rate
from captioner.caption.plan import OnRay, Placement, Plan, make_plan, placed
from captioner.caption.ray import run_on_ray
from captioner.caption.steps import CaptionJob, Results, ShardResult
from captioner.caption.summary import Done, Summary
from captioner.config import DecodeConfig, ListingConfig, RunConfig
from captioner.errors import (
    StoppedError,
)
from captioner.model.base import Model
from captioner.output.audit import count_finished, remaining_shards, shards_to_retry
from captioner.output.compaction import isolate_shards
from captioner.output.directory import OutputDirectory
from captioner.output.manifest import (
    Shard,
    extend_manifest,
    new_shards,
    read_manifest,
    replace_images,
)
from captioner.output.moved import moved_images
from captioner.runtime.memory import keep_few_kernels
from captioner.runtime.progress import Progress, progress_bar
from captioner.runtime.signals import Signals, catch_signals
from captioner.schema import MANIFEST

__all__ = ["caption_images", "plan_captioning"]

_SHOWN = 20  # images without a row that an error names

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
    """Plans what :func:`caption_images` would do with the same arguments; writes nothing.

    Raises:
        CaptionerError: what :func:`caption_images` would raise before its first image.
    """
    run = run or RunConfig()
    with ExitStack() as connection:
        with storage.web_access(run.web):
            inputs = Inputs.read(source, output, model, decode, run, listing, connection)
        directory = inputs.directory
        placement = connection.enter_context(placed(inputs.run, dry=True))
        begun = directory.check(inputs.fingerprint(placement), overwrite=overwrite)
        resumes = begun and not overwrite
        manifest = read_manifest(directory) if resumes else MANIFEST.empty_table()
        added = new_shards(manifest, inputs.listed, inputs.run.shard_size)
        manifest = pa.concat_tables([each for each in (manifest, added) if len(each)] or [added])
        shards = list(remaining_shards(directory, manifest, begun=resumes))
        if inputs.run.retry_failed and resumes:
            shards += shards_to_retry(directory, manifest)
        moved_images(manifest, inputs.listed, shards)  # or says why the job cannot resume
        return make_plan(len(manifest), shards, inputs.run, placement)


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
    """Captions the images of a source into an output directory; resumes where a run ended.

    Args:
        source: a folder of images, tar files or Parquet files; one such file; or a list of URIs
            (``.txt``, ``.csv``, ``.tsv``, ``.jsonl`` or ``.parquet``). Local or in a bucket.
        output: the directory for the Parquet files, local or in a bucket.
        model: a model's directory, or ``owner/name[@revision]`` on a model hub.
        decode: what decides the captions; a resumed job needs the same.
        run: how the job runs.
        listing: which files are images.
        overwrite: delete what an earlier job wrote to the output first.

    Raises:
        InputError: the source cannot be listed, or a setting cannot be used.
        BundleError: the model cannot be loaded.
        OutputError: the output is another job's, or cannot be written.
        IncompleteError: the job ended with images that have no row.
        ErrorRateError: more rows of the listed images than ``run.max_error_rate`` are not ok.
        StoppedError: SIGTERM or Ctrl-C ended the job.
    """
    keep_few_kernels()
    run = run or RunConfig()
    with storage.web_access(run.web), catch_signals() as signals, ExitStack() as connection:
        directory = None
        try:
            inputs = Inputs.read(source, output, model, decode, run, listing, connection)
            directory = inputs.directory
            with directory.locked():
                return _execute(inputs, connection, signals, overwrite=overwrite)
        except (Exception, KeyboardInterrupt) as problem:
            # After a signal, any error may be its consequence, for example an interrupted import.
            if signals.received is None and not isinstance(problem, KeyboardInterrupt):
                raise
            raise _stopped(directory, signals.received or signal.SIGINT) from problem


def _execute(
    inputs: Inputs, connection: ExitStack, signals: Signals, *, overwrite: bool
) -> Summary:
    """Captions the remaining images; records the outcome, also of a failure, after Ray ends."""
    done, outcome = Done(), None
    try:
        with connection, placed(inputs.run) as placement:
            plan, unlisted = _begin(inputs, placement, overwrite=overwrite)
            outcome = Outcome(inputs.directory, plan.images, len(unlisted))
            for result in _results(plan, inputs, signals):
                done.add(result.rows, result.timing)
    except BaseException as problem:
        if outcome is not None:
            with suppress(Exception):  # it must not hide why the job ends
                outcome.close_after(problem, done, signals)
        raise
    summary = outcome.close(done)
    check_error_rate(summary, inputs, unlisted)
    return summary


def _begin(inputs: Inputs, placement: Placement, *, overwrite: bool) -> tuple[Plan, set[str]]:
    """Claims the output for this job; returns the plan and the unlisted images.

    Raises:
        OutputError: the output is another job's, or cannot be written.
    """
    directory = inputs.directory
    directory.begin(
        inputs.fingerprint(placement), low_score=inputs.model.low_score, overwrite=overwrite
    )
    manifest = extend_manifest(directory, inputs.listed, inputs.run.shard_size)
    shards = _shards_to_caption(inputs, manifest)
    if len(moved := moved_images(manifest, inputs.listed, shards)):
        manifest = replace_images(directory, moved)
        shards = _shards_to_caption(inputs, manifest)
    return make_plan(len(manifest), shards, inputs.run, placement), inputs.unlisted(manifest)


def _shards_to_caption(inputs: Inputs, manifest: pa.Table) -> list[Shard]:
    """The shards without a part and, if they are to be retried, the images that failed."""
    directory = inputs.directory
    shards = list(remaining_shards(directory, manifest))
    if inputs.run.retry_failed:
        failed = list(shards_to_retry(directory, manifest))
        directory.delete_replaced_parts()
        isolate_shards(directory, manifest, {shard.number for shard in failed})
        shards += failed
    return shards


def _results(plan: Plan, inputs: Inputs, signals: Signals) -> Iterator[ShardResult]:
    """Runs the engine with a progress bar; yields the results whose rows are written."""
    if not plan.shards:
        if plan.run.profile is not None:
            _logger.warning(
                "--profile: no image is left to caption; %s is not written", plan.run.profile
            )
        return
    _logger.info(plan.describe())
    job = inputs.job(plan)
    failures, bad = EarlyFailures(job), 0
    already = plan.images - plan.remaining
    bar = progress_bar(plan.images, unit="image", initial=already, description="captioning")
    with bar as progress, closing(_engine(plan, job, inputs.model, progress)) as running:
        for result in running:
            if bad := bad + sum(result.rows.values()) - result.rows["ok"]:
                progress.set_postfix(bad=bad)
            yield from failures.admit(result)
            signals.check()
        yield from failures.release()


def _engine(plan: Plan, job: CaptionJob, model: Model, progress: Progress) -> Results:
    """Captions the plan's shards, in this process or on Ray; counts images on the bar."""
    shards, placement = list(plan.shards), plan.placement
    if not isinstance(placement, OnRay):
        yield from run_local(job, model, shards, progress.update)
        return
    engine = run_on_ray(job, model, shards, placement.ray, placement.pool)
    with closing(engine) as running:
        for result in running:
            progress.update(sum(result.rows.values()))
            yield result


def _stopped(directory: OutputDirectory | None, number: int) -> StoppedError:
    name, again = signal.Signals(number).name, "run the same command again to resume"
    manifest = MANIFEST.empty_table()
    with suppress(Exception):  # a further error must not hide the signal
        if directory is not None:
            manifest = read_manifest(directory)
            done = count_finished(directory, manifest)
    if not len(manifest):
        return StoppedError(f"stopped by {name} before the first image; {again}", number)
    return StoppedError(
        f"stopped by {name}: {done} of {len(manifest)} images done; {again}", number
    )
