"""The images to score on, and the captions that people wrote or accepted for them."""

from collections.abc import Collection, Sequence

from captioner import storage
from captioner.data import dataset
from captioner.data.dataset import CaptionedImage, Dataset
from captioner.errors import InputError
from captioner.model import bundle
from captioner.output.decisions import read_decisions
from captioner.output.directory import OutputDirectory
from captioner.output.rows import read_rows

__all__ = ["choose_images", "describe_seen", "read_references"]


def choose_images(
    data: Dataset, *, split: str | None, names: str | None, allow_missing: bool = False
) -> list[CaptionedImage]:
    """Chooses the images of a dataset to evaluate on.

    Args:
        data: the dataset.
        split: ``train``, ``val``, ``test`` or ``all``.
        names: a file of image names, one per line, instead of a split. If both are None, all
            images are chosen.
        allow_missing: accept a file if more than half of its names are not in the dataset.

    Raises:
        InputError: no image matches, or the file cannot be read.
    """
    if names is not None:
        images = data.listed(names, allow_missing=allow_missing)
    else:
        images = data.choose(split or "all")
    dataset.warn_if_single(images, "score")
    return images


def read_references(
    source: str,
    images_directory: str | None = None,
    *,
    needed: Collection[str] | None = None,
    allow_missing: bool = False,
) -> Dataset:
    """Reads the captions to score against.

    Args:
        source: a dataset; or a reviewed output, whose accepted and edited captions are the
            references.
        images_directory: as for :func:`captioner.data.dataset.read_dataset`; a dataset's only.
        needed: as there.
        allow_missing: as there.

    Raises:
        InputError: the dataset cannot be read, or no caption of the output is accepted.
        OutputError: the output cannot be read.
    """
    output = OutputDirectory(storage.absolute(source))
    if not output.is_begun():
        return dataset.read_dataset(
            source, images_directory, needed=needed, allow_missing=allow_missing
        )
    for option, given in (("--images", images_directory), ("--split", needed)):
        if given is not None:
            raise InputError(
                f"{option} needs a dataset, but {source} is a caption job's output; remove {option}"
            )
    accepted = {
        uri: decision.caption
        for uri, decision in read_decisions(output.uri).items()
        if decision.decision in ("accepted", "edited")
    }
    images: list[CaptionedImage] = []
    output.finish_compaction()
    for rows in read_rows(output, ["uri", "caption", "status"]) if accepted else ():
        images += [
            CaptionedImage(row["uri"], [accepted[row["uri"]] or row["caption"]])
            for row in rows.to_pylist()
            if row["status"] == "ok" and row["uri"] in accepted
        ]
    if not images:
        raise InputError(f"{source} has no accepted captions: accept some in captioner review")
    return Dataset(images)


def describe_seen(
    images: Sequence[CaptionedImage], data: Dataset, model: str, *, split: str | None
) -> str | None:
    """Describes, in one line, how many of the images a model has seen in training.

    Args:
        images: the images to evaluate on.
        data: the dataset that contains them.
        model: a bundle's directory.
        split: the split of the images; None if a file named them.

    Returns:
        The line; None if the model has seen no image or has no record.

    Raises:
        InputError: the model was trained on images of the split ``val`` or ``test``.
        BundleError: the model's record of its images is damaged.
    """
    seen = bundle.load_images(model)
    if seen is None:
        return None
    find, uris = dataset.finder(data.images), {image.uri for image in images}
    seen_names = {"trained on": seen.trained, "validated on": seen.validated - seen.trained}
    counts = {
        use: len(uris & {image.uri for name in names for image in find(name)})
        for use, names in seen_names.items()
    }
    if not any(counts.values()):
        return None
    known = " and ".join(f"{use} {count}" for use, count in counts.items() if count)
    text = f"{model} was {known} of these {len(images)} images, by their names"
    if counts["trained on"] and split in ("val", "test"):
        raise InputError(
            f"{text}: the model was trained on another split; name the images with --list"
        )
    return text
