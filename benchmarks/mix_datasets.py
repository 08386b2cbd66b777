r"""Writes a dataset that mixes others, as the bundled model was trained on.

python benchmarks/mix_datasets.py MIX --data flickr8k:flickr8k/train.txt \
  --data everyday:everyday_train.txt --repeat everyday=2

Each DATA is a folder with Images/ and captions.txt; MIX links to its photos. Captions are written
in Flickr8k's style: in lower case, with spaces around punctuation and a full stop at the end.
"""

import csv
import math
import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

import click
import numpy as np

from captioner.model.tokenization import scoring_words

Ngram = tuple[str, ...]

_LONGEST = 2  # words of an n-gram that captions are compared by


def in_flickr_style(caption: str) -> str:
    """A caption in lower case without punctuation, but for the full stop that ends it."""
    return " ".join([*scoring_words(caption), "."])


def read_captions(data: Path, names: set[str]) -> dict[str, list[str]]:
    """The captions of the named photos of a dataset."""
    captions: dict[str, list[str]] = defaultdict(list)
    with (data / "captions.txt").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            if row["image"] in names:
                captions[row["image"]].append(row["caption"])
    return captions


class NearestCaptions:
    """Finds the captions among many that say most nearly the same: the cosine of TF-IDF vectors.

    Args:
        texts: the captions to find.
    """

    def __init__(self, texts: Sequence[str]):
        self._texts = texts
        places: dict[Ngram, list[int]] = defaultdict(list)
        counts: dict[Ngram, list[int]] = defaultdict(list)
        for place, text in enumerate(texts):
            for ngram, times in _ngrams(text).items():
                places[ngram].append(place)
                counts[ngram].append(times)
        self._weights = {
            ngram: math.log(len(texts) / len(found))
            for ngram, found in places.items()
            if len(found) > 1
        }
        self._found = {
            ngram: (np.array(places[ngram]), np.array(counts[ngram]) * weight)
            for ngram, weight in self._weights.items()
        }
        squares = np.zeros(len(texts))
        for found, weights in self._found.values():
            squares[found] += weights**2
        self._norms = np.sqrt(np.maximum(squares, 1e-9))

    def find(self, captions: Sequence[str], most: int, least: float) -> list[str]:
        """The captions nearest to all of ``captions`` together, nearest first.

        Args:
            captions: what to compare with.
            most: how many captions to return at most.
            least: the cosine that a caption must exceed.
        """
        counted: Counter[Ngram] = sum(map(_ngrams, captions), Counter())
        products, square = np.zeros(len(self._texts)), 0.0
        for ngram in counted.keys() & self._found.keys():
            weight = counted[ngram] * self._weights[ngram]
            found, weights = self._found[ngram]
            products[found] += weight * weights
            square += weight**2
        cosines = products / (self._norms * math.sqrt(max(square, 1e-9)))
        best = np.argsort(-cosines, kind="stable")[:most]
        return [self._texts[i] for i in best if cosines[i] > least]


def _ngrams(caption: str) -> Counter[Ngram]:
    words = scoring_words(caption)
    return Counter(
        tuple(words[begin : begin + n])
        for n in range(1, _LONGEST + 1)
        for begin in range(len(words) - n + 1)
    )


def read_teacher(output: Path) -> dict[str, str]:
    """The captions in the output of ``captioner caption`` by the names of their photos."""
    import pyarrow.parquet as pq

    table = pq.read_table(output, columns=["uri", "caption"])
    uris, captions = table["uri"].to_pylist(), table["caption"].to_pylist()
    return {uri.rsplit("/", 1)[-1]: text for uri, text in zip(uris, captions, strict=True) if text}


@click.command()
@click.argument("mix", type=click.Path(path_type=Path, file_okay=False))
@click.option("--data", multiple=True, required=True, help="DIR:LIST of photos to train on.")
@click.option("--validate", multiple=True, help="DIR:LIST of photos to validate on.")
@click.option("--repeat", multiple=True, help="NAME=TIMES: take each photo of DIR/NAME again.")
@click.option("--part", multiple=True, help="NAME=PHOTOS: take only so many, drawn at random.")
@click.option("--texts", type=click.Path(path_type=Path), help="Captions without photos.")
@click.option("--nearest", multiple=True, help="NAME=COUNT: add the nearest of the texts.")
@click.option("--least", default=0.35, show_default=True, help="Smallest cosine of such a text.")
@click.option("--teacher", type=click.Path(path_type=Path), help="A caption job's output.")
@click.option("--teacher-captions", default=2, show_default=True, help="Copies of its captions.")
@click.option("--human-captions", default=3, show_default=True, help="Captions kept beside them.")
@click.option("--seed", default=0, show_default=True)
def main(
    mix: Path,
    data: Sequence[str],
    validate: Sequence[str],
    repeat: Sequence[str],
    part: Sequence[str],
    texts: Path | None,
    nearest: Sequence[str],
    least: float,
    teacher: Path | None,
    teacher_captions: int,
    human_captions: int,
    seed: int,
) -> None:
    """Writes the dataset MIX: Images/, captions.txt, train.txt and val.txt."""
    times, parts, counts = (
        {name: int(value) for name, value in (each.split("=") for each in option)}
        for option in (repeat, part, nearest)
    )
    generator = random.Random(seed)
    finder = NearestCaptions(texts.read_text(encoding="utf-8").splitlines()) if texts else None
    taught = read_teacher(teacher) if teacher else {}
    (mix / "Images").mkdir(parents=True)
    rows: list[tuple[str, str]] = []
    lists: dict[str, list[str]] = {"train": [], "val": []}
    for which, source in [
        *(("train", each) for each in data),
        *(("val", each) for each in validate),
    ]:
        folder, _, list_file = source.partition(":")
        root = Path(folder).resolve()
        names = Path(list_file).read_text(encoding="utf-8").split()
        captions = read_captions(root, set(names))
        added = 0
        if which == "train" and root.name in parts:
            names = sorted(generator.sample(names, parts[root.name]))
        for name in names:
            own = captions[name]
            if which == "train" and name in taught:
                own = [*[taught[name]] * teacher_captions, *own[:human_captions]]
            if which == "train" and finder is not None and root.name in counts:
                found = finder.find(own, counts[root.name], least)
                own, added = [*own, *found], added + len(found)
            for copy in range(times.get(root.name, 1) if which == "train" else 1):
                link = f"{copy}_{name}" if copy else name
                (mix / "Images" / link).symlink_to(root / "Images" / name)
                lists[which].append(link)
                rows += [(link, in_flickr_style(caption)) for caption in own]
        click.echo(f"{which}: {len(names)} photos of {root.name}, {added} captions added")
    with (mix / "captions.txt").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("image", "caption"), *rows])
    for which, listed in lists.items():
        (mix / f"{which}.txt").write_text("".join(f"{n}\n" for n in listed), encoding="utf-8")


if __name__ == "__main__":
    main()
