"""Scores of captions, as a table, JSON or Parquet."""

import io
import json
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from captioner import __version__
from captioner.config import TEXT_SETTINGS
from captioner.errors import InputError
from captioner.evaluation import metrics
from captioner.evaluation.captions import Captioned
from captioner.evaluation.metrics import Scores

__all__ = ["Evaluation", "evaluate"]


@dataclass(frozen=True)
class Evaluation:
    """Captions and their scores, as a table, JSON or Parquet.

    Attributes:
        captioned: the captions that are scored, with their images.
        scores: the scores of all captions together and of each caption.
    """

    captioned: Captioned
    scores: Scores

    def lines(self) -> list[str]:
        """An aligned table: scores times 100, number of images, decoding settings."""
        rows = [
            (metrics.NAMES[name], f"{100 * value:.1f}")
            for name, value in self.scores.corpus.items()
        ]
        rows += [("images", str(len(self.captioned.images))), ("tokenizer", self.scores.tokenizer)]
        decoding = {name: v for name, v in self.captioned.settings.items() if name in TEXT_SETTINGS}
        rows += [
            (name.replace("_", " "), "none" if value is None else str(value))
            for name, value in decoding.items()
        ]
        name_width, value_width = (max(map(len, column)) for column in zip(*rows, strict=True))
        return [f"{name:<{name_width}}  {value:>{value_width}}" for name, value in rows]

    def to_json(self) -> str:
        """Returns the unscaled scores, and every URI that was left out, as JSON."""
        values = {
            "scores": self.scores.corpus,
            "images": len(self.captioned.images),
            "tokenizer": self.scores.tokenizer,
            "settings": self.captioned.settings,
            "left_out": self.captioned.left_out,
            "metrics_left_out": self.scores.left_out,
            "captioner_version": __version__,
        }
        return json.dumps(values, indent=2)

    def to_parquet(self) -> bytes:
        """A Parquet file with a row per image, the lowest CIDEr first.

        The columns are ``uri``, ``caption``, the model's own ``score``, ``tokens`` and
        ``token_logprobs``, ``references``, and all scores except BLEU-1 to 3.
        """
        columns = {
            "uri": [image.uri for image in self.captioned.images],
            "caption": self.captioned.captions,
            "score": self.captioned.scores,
            "tokens": self.captioned.tokens,
            "token_logprobs": self.captioned.token_logprobs,
            "references": [image.captions for image in self.captioned.images],
        }
        shown = {
            name: values
            for name, values in self.scores.images.items()
            if name not in ("bleu_1", "bleu_2", "bleu_3")
        }
        order = np.argsort(self.scores.images["cider"], kind="stable")
        sink = io.BytesIO()
        pq.write_table(pa.table(columns | shown).take(order), sink, compression="zstd")
        return sink.getvalue()


def evaluate(captioned: Captioned, *, tokenizer: str = "auto", spice: bool = False) -> Evaluation:
    """Scores captions with BLEU, METEOR, ROUGE-L, CIDEr and SPICE.

    CIDEr weighs words by the number of images that have them in their references. Scores of
    different sets of images therefore do not compare, and the CIDEr of a single image is 0.

    Args:
        captioned: captions and their references.
        tokenizer: ``ptb``, which needs Java; ``simple``, which leaves out METEOR and SPICE; or
            ``auto``: ``ptb`` if Java runs, else ``simple``.
        spice: compute SPICE, which is slow and downloads its models at its first use.

    Raises:
        InputError: there is nothing to score, an image has no reference, no reference has a word,
            pycocoevalcap is not installed, or ``ptb`` is chosen and Java does not run.
        CaptionerError: PTBTokenizer failed.
    """
    if not captioned.images:
        raise InputError("no image has both a caption and references")
    references = [image.captions for image in captioned.images]
    scores = metrics.score(captioned.captions, references, tokenizer=tokenizer, spice=spice)
    return Evaluation(captioned, scores)
