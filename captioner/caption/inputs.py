"""The inputs that a caption job reads before it begins, and their fingerprint."""

from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from captioner import storage
from captioner.caption.plan import Placement, Plan, choose_engine
from captioner.caption.steps import CaptionJob
from captioner.caption.tasks import map_on_ray
from captioner.config import DecodeConfig, ListingConfig, RunConfig
from captioner.data import images
from captioner.data.listing import list_source
from captioner.model.base import Model
from captioner.model.loading import load_model
from captioner.output.directory import OutputDirectory
from captioner.runtime.prefetch import Mapper, map_in_threads
from captioner.schema import SCHEMA_VERSION, kept_fields

__all__ = ["Inputs", "mapper_of"]


@dataclass(frozen=True)
class Inputs:
    """The inputs of a job, read before it begins.

    Attributes:
        model: the model; a pretrained model's weights are not read yet.
        listed: the images of the source: :data:`captioner.schema.LISTING`.
        directory: the output.
        decode: what decides the captions, with the model's defaults.
        run: how the job runs.
        limited: only some images of the source are listed.
        id_column: the column that names the images in messages.
    """

    model: Model
    listed: pa.Table
    directory: OutputDirectory
    decode: DecodeConfig
    run: RunConfig
    limited: bool
    id_column: str | None

    @classmethod
    def read(
        cls,
        source: str,
        output: str,
        model: str,
        decode: DecodeConfig | None,
        run: RunConfig | None,
        listing: ListingConfig | None,
        connection: ExitStack,
    ) -> "Inputs":
        """Finds the model and lists the source; None means the default settings.

        Tar files are listed where the job runs; if that is on Ray, ``connection`` keeps this
        process connected to the cluster.

        Raises:
            InputError: the source cannot be listed, or a setting cannot be used.
            BundleError: the model cannot be loaded.
        """
        listing = listing or ListingConfig()
        run = run or RunConfig()
        mapper = mapper_of(run, connection)  # rejects invalid settings before anything is read
        directory = OutputDirectory(storage.absolute(output))
        if run.profile is not None:
            storage.check_target(storage.absolute(run.profile))
        found = load_model(model)
        decode = decode or DecodeConfig()
        seed = decode.seed
        decode = found.resolve(decode)
        listed = list_source(
            storage.absolute(source), listing, prompt=decode.prompt, seed=seed, mapper=mapper
        )
        _check_schemes(listed)
        return cls(
            model=found,
            listed=listed,
            directory=directory,
            decode=decode,
            run=run,
            limited=listing.limit is not None or listing.sample is not None,
            id_column=listing.id,
        )

    def fingerprint(self, placement: Placement) -> dict[str, Any]:
        """Everything that can change a row, by name."""
        return {
            **self.model.identity,
            "preprocessing version": images.PREPROCESSING_VERSION,
            "schema version": SCHEMA_VERSION,
            "id": self.id_column,
            "keep": [f"{each.name}: {each.type}" for each in kept_fields(self.listed.schema)],
            **asdict(self.decode),
            **self.run.row_settings(),
            "precision": placement.precision,
        }

    def unlisted(self, manifest: pa.Table) -> set[str]:
        """The images that only earlier runs listed; empty if only some of the source is listed."""
        if self.limited:
            return set()
        return set(manifest["uri"].to_pylist()).difference(self.listed["uri"].to_pylist())

    def job(self, plan: Plan) -> CaptionJob:
        """The settings for each process of the job."""
        return CaptionJob(
            output=self.directory.uri,
            preparation=self.model.preparation,
            decode=self.decode,
            run=plan.run,
        )


def mapper_of(run: RunConfig, connection: ExitStack) -> Mapper:
    """What lists the files of a source in parallel, where the job runs.

    Args:
        run: the job's settings.
        connection: ends the connection to Ray, if one is made.

    Raises:
        InputError: the settings contradict each other.
    """
    if choose_engine(run) == "local":
        return map_in_threads
    return partial(map_on_ray, web=run.web, connection=connection)


def _check_schemes(listed: pa.Table) -> None:
    """Checks before the first shard that the URIs of every scheme can be opened.

    Raises:
        StorageError: the package for some of the URIs is missing.
    """
    files = pc.unique(pc.coalesce(listed["container"], listed["uri"])).to_pylist()
    first = {uri.split("://")[0]: uri for uri in reversed(files) if "://" in uri}
    for uri in first.values():
        storage.is_local(uri)
