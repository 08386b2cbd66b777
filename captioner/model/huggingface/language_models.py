"""Pretrained models that are language models and take the image as part of the prompt.

Shapes: B images, L tokens of a sequence, K of them the caption's, P patches of the image.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList

from captioner.model.huggingface.families import Family
from captioner.model.huggingface.generation import (
    BaseArchitecture,
    Generated,
    Inputs,
    Replayed,
    image_token,
    square,
)
from captioner.model.huggingface.replay import Recorded, reuse_output, token_logprobs

__all__ = ["Blip2", "LanguageModel"]

_MATRIX = 1 << 28  # bytes of one layer's attention matrices in a replay


class LanguageModel(BaseArchitecture):
    """A language model whose prompt holds the image's tokens."""

    def generate(self, inputs: Inputs, config: Any, processors: LogitsProcessorList) -> Generated:
        """Generates, and keeps the image's features."""
        with Recorded(self.model.get_submodule(self.family.vision)) as recorded:
            sequences_BL = self.model.generate(
                **inputs, generation_config=config, logits_processor=processors
            )
        features = recorded.output if config.num_beams == 1 else None
        return Generated(sequences_BL, inputs["input_ids"].shape[1], 0, features)

    def replay(self, inputs: Inputs, generated: Generated, *, maps: bool) -> Replayed:
        """Gives prompts and finished captions to the model: those of one length at once."""
        count = len(generated.sequences_BL)
        logprobs: list[Any] = [None] * count
        maps_of: list[Any] = [None] * count
        grids: list[Any] = [None] * count
        groups = self._groups(inputs, generated)
        for rows in groups:
            whole = len(rows) == count
            part = inputs if whole else _select(inputs, rows)
            sequences_BL = generated.sequences_BL[rows]
            features = generated.state if whole else None
            replayed = self._replay(part, sequences_BL, generated.start, features, maps=maps)
            for place, row in enumerate(rows):
                logprobs[row] = replayed.logprobs_BK[place]
                if replayed.maps_BKP is not None:
                    maps_of[row], grids[row] = replayed.maps_BKP[place], replayed.grids[place]
        return Replayed(torch.stack(logprobs), maps_of if maps else None, grids if maps else [])

    def _groups(self, inputs: Inputs, generated: Generated) -> list[list[int]]:
        """Rows whose prompts have one length, so many that a layer's matrices fit in memory."""
        lengths = inputs["attention_mask"].sum(1).tolist()
        text = self.model.config.get_text_config(decoder=True)
        groups = []
        for length in sorted(set(lengths)):
            rows = [row for row, each in enumerate(lengths) if each == length]
            total = length + generated.sequences_BL.shape[1] - generated.start
            most = max(1, _MATRIX // (4 * text.num_attention_heads * total**2))
            groups += [rows[first : first + most] for first in range(0, len(rows), most)]
        return groups

    def _replay(
        self, inputs: Inputs, sequences_BL: Tensor, start: int, features: Any, *, maps: bool
    ) -> Replayed:
        padding = start - int(inputs["attention_mask"][0].sum())
        before_BL = sequences_BL[:, padding:-1]
        added = before_BL.shape[1] - (start - padding)
        full = dict(inputs) | {
            "input_ids": before_BL,
            "attention_mask": torch.ones_like(before_BL),
            "use_cache": False,
        }
        for name in ("token_type_ids", "mm_token_type_ids"):
            if name in inputs:
                kinds_BL = inputs[name][:, padding:]
                shape = (len(kinds_BL), added)
                fill = 1 if self.family.name == "PaliGemma" else 0  # its caption is causal
                full[name] = torch.cat([kinds_BL, kinds_BL.new_full(shape, fill)], 1)
        full["logits_to_keep"] = added + 1
        generated = Generated(sequences_BL[:, padding:], start - padding, 0)
        columns_BP = None
        if maps:
            columns = [(row == image_token(self.model)).nonzero()[:, 0] for row in before_BL]
            longest = max(len(each) for each in columns)
            columns_BP = torch.stack(
                [torch.nn.functional.pad(each, (0, longest - len(each))) for each in columns]
            )
        vision = self.model.get_submodule(self.family.vision)
        with reuse_output(vision, features):
            return self._replay_columns(generated, columns_BP, full)

    def _replay_columns(
        self, generated: Generated, columns_BP: Tensor | None, full: Inputs
    ) -> Replayed:
        tokens_BK = generated.sequences_BL[:, generated.start :]
        logits_BKV, maps_BKP = self._maps(
            tokens_BK.shape[1], columns_BP, lambda: self.model(**full)
        )
        logprobs_BK = token_logprobs(logits_BKV, tokens_BK)
        if maps_BKP is None:
            return Replayed(logprobs_BK, None, [])
        grids = self._grids(full, maps_BKP.shape[2])
        maps = [
            each[:, : height * width] for each, (height, width) in zip(maps_BKP, grids, strict=True)
        ]
        return Replayed(logprobs_BK, maps, grids)

    def _grids(self, inputs: Inputs, patches: int) -> list[tuple[int, int]]:
        if "image_grid_thw" not in inputs:
            return [square(patches)] * len(inputs["input_ids"])
        merge = self.model.config.vision_config.spatial_merge_size
        sizes = inputs["image_grid_thw"].tolist()
        return [(height // merge, width // merge) for _, height, width in sizes]


def _select(inputs: Inputs, rows: list[int]) -> Inputs:
    """The inputs of some images of a batch."""
    selected = {name: value[rows] for name, value in inputs.items() if name != "pixel_values"}
    pixels = inputs["pixel_values"]
    if "image_grid_thw" in inputs:  # the patches of all images, one after another
        parts = torch.split(pixels, inputs["image_grid_thw"].prod(1).tolist())
        selected["pixel_values"] = torch.cat([parts[row] for row in rows])
    else:
        selected["pixel_values"] = pixels[rows]
    return selected


class Blip2(LanguageModel):
    """A language model that is given 32 queries about the image; its attention is no map."""

    def __init__(self, family: Family, model: Any):
        super().__init__(family, model)
        self.generator = model.language_model

    def generate(self, inputs: Inputs, config: Any, processors: LogitsProcessorList) -> Generated:
        """Generates, with the prompt that transformers takes where there is none."""
        if "input_ids" not in inputs:
            settings = self.model.config
            ids = [settings.image_token_index] * settings.num_query_tokens
            ids.append(settings.text_config.bos_token_id)
            device = inputs["pixel_values"].device
            count = len(inputs["pixel_values"])
            inputs["input_ids"] = torch.tensor([ids], device=device).repeat(count, 1)
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        generated = super().generate(inputs, config, processors)
        if not self.model.config.use_decoder_only_language_model:
            generated.start = 1
        return generated

    def replay(self, inputs: Inputs, generated: Generated, *, maps: bool) -> Replayed:
        """Gives finished captions to the language model."""
        sequences_BL, start = generated.sequences_BL, generated.start
        full = dict(inputs)
        if self.model.config.use_decoder_only_language_model:
            full["input_ids"] = sequences_BL[:, :-1]
            added = sequences_BL.shape[1] - 1 - start
            ones = inputs["attention_mask"].new_ones((len(sequences_BL), added))
            full["attention_mask"] = torch.cat([inputs["attention_mask"], ones], 1)
        else:
            full["decoder_input_ids"] = sequences_BL[:, :-1]
        return self._replayed(generated, None, lambda: self.model(**full))
