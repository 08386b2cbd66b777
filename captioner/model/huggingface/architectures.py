"""How each kind of model generates, and how a finished caption is given to it as a whole.

Shapes: B images, L tokens of a sequence, K of them the caption's, P patches of the image.
"""

import math
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import LogitsProcessorList

from captioner.model.huggingface.families import Family
from captioner.model.huggingface.replay import (
    MapHooks,
    Recorded,
    StepMaps,
    layers_of,
    reuse_output,
    token_logprobs,
    with_attention_matrix,
)

__all__ = ["Architecture", "Generated", "Replayed", "architecture_of", "square"]

_MATRIX = 1 << 28  # bytes of one layer's attention matrices in a replay

Inputs = dict[str, Any]


@dataclass
class Generated:
    """Sequences as a model wrote them; the caption's tokens begin at ``start``.

    ``given`` of the caption's tokens were the prompt's. ``state`` is what a replay reuses.
    """

    sequences_BL: Tensor
    start: int
    given: int
    state: Any = None


@dataclass
class Replayed:
    """Log-probabilities of the caption's tokens, and where asked for their maps, for each image."""

    logprobs_BK: Tensor
    maps_BKP: list[Tensor] | None
    grids: list[tuple[int, int]]


class Architecture(Protocol):
    """A kind of model."""

    generator: Any
    """The module whose ``generate`` runs."""

    def context(self) -> int:
        """The longest sequence, in tokens."""

    def generate(self, inputs: Inputs, config: Any, processors: LogitsProcessorList) -> Generated:
        """Generates a caption for each image."""

    def step_maps(self) -> StepMaps | None:
        """Collects maps during generation; None where only a replay computes the matrix."""

    def replay(self, inputs: Inputs, generated: Generated, *, maps: bool) -> Replayed:
        """Gives finished captions to the model."""


def architecture_of(family: Family, model: Any) -> Architecture:
    """The architecture of a family's model."""
    if family.name == "BLIP":
        return _Blip(family, model)
    if family.name in ("ViT-GPT2", "Florence-2"):
        return _EncoderDecoder(family, model)
    if family.name == "GIT":
        return _Git(family, model)
    if family.name == "BLIP-2":
        return _Blip2(family, model)
    return _LanguageModel(family, model)


def _prefix(inputs: Inputs, start_token: int) -> Tensor:
    """The start token and the prompt's tokens, ``(B, 1 + given)``."""
    pixels = inputs["pixel_values"]
    start_B1 = torch.full((len(pixels), 1), start_token, device=pixels.device)
    return torch.cat([start_B1, inputs["input_ids"]], 1) if "input_ids" in inputs else start_B1


def square(patches: int) -> tuple[int, int]:
    """The height and width of a square grid."""
    side = math.isqrt(patches)
    if side * side != patches:
        raise RuntimeError(f"{patches} image tokens are not a square")
    return side, side


class _Base:
    def __init__(self, family: Family, model: Any):
        self.family, self.model, self.generator = family, model, model
        self._layers = layers_of(model, family.attentions) if family.attentions else []
        self._language = model.get_submodule(family.language)

    def context(self) -> int:
        """The longest sequence, in tokens."""
        text = self.model.config.get_text_config(decoder=True)
        return int(text.max_position_embeddings)

    def step_maps(self) -> StepMaps | None:
        """None: the matrix is computed in a replay alone."""
        return None

    def _maps(self, rows: int, columns_BP: Tensor | None, forward: Any) -> tuple[Any, Any]:
        """The logits of a forward pass, and its maps where columns are given."""
        if columns_BP is None:
            return forward().logits[:, -rows:], None
        hooks = MapHooks(self._layers, rows, columns_BP)
        with with_attention_matrix(self._language), hooks:
            logits_BKV = forward().logits[:, -rows:]
        return logits_BKV, hooks.mean_maps()

    def _replayed(self, generated: Generated, columns_BP: Tensor | None, forward: Any) -> Replayed:
        tokens_BK = generated.sequences_BL[:, generated.start :]
        logits_BKV, maps_BKP = self._maps(tokens_BK.shape[1], columns_BP, forward)
        logprobs_BK = token_logprobs(logits_BKV, tokens_BK)
        if columns_BP is None:
            return Replayed(logprobs_BK, None, [])
        grid = square(columns_BP.shape[1])
        return Replayed(logprobs_BK, list(maps_BKP), [grid] * len(tokens_BK))


class _Blip(_Base):
    """A text decoder with cross-attention to the image."""

    def __init__(self, family: Family, model: Any):
        super().__init__(family, model)
        self.generator = model.text_decoder

    def generate(self, inputs: Inputs, config: Any, processors: LogitsProcessorList) -> Generated:
        """As ``BlipForConditionalGeneration.generate``, with the image's features kept."""
        text = self.model.config.text_config
        features = self.model.vision_model(pixel_values=inputs["pixel_values"])[0]
        mask = torch.ones(features.shape[:-1], dtype=torch.long, device=features.device)
        prefix_BL = _prefix(inputs, text.bos_token_id)
        config.eos_token_id, config.pad_token_id = text.sep_token_id, text.pad_token_id
        sequences_BL = self.generator.generate(
            input_ids=prefix_BL,
            attention_mask=torch.ones_like(prefix_BL),
            encoder_hidden_states=features,
            encoder_attention_mask=mask,
            generation_config=config,
            logits_processor=processors,
        )
        return Generated(sequences_BL, 1, prefix_BL.shape[1] - 1, (features, mask))

    def step_maps(self) -> StepMaps:
        """Collects maps during generation: cross-attention always computes its matrix."""
        return StepMaps(self._layers, slice(self.family.special_columns, None))

    def replay(self, inputs: Inputs, generated: Generated, *, maps: bool) -> Replayed:
        """Gives finished captions to the text decoder alone."""
        features, mask = generated.state
        before_BL = generated.sequences_BL[:, :-1]
        columns_BP = None
        if maps:
            first, count = self.family.special_columns, features.shape[1]
            columns_BP = torch.arange(first, count).expand(len(features), -1)
        return self._replayed(
            generated,
            columns_BP,
            lambda: self.generator(
                input_ids=before_BL,
                attention_mask=torch.ones_like(before_BL),
                encoder_hidden_states=features,
                encoder_attention_mask=mask,
                use_cache=False,
            ),
        )


class _EncoderDecoder(_Base):
    """An encoder over the image, and the prompt where there is one; a decoder over its output."""

    def _encoder(self) -> Any:
        return self.model.get_encoder()

    def generate(self, inputs: Inputs, config: Any, processors: LogitsProcessorList) -> Generated:
        """Generates, and keeps the encoder's output."""
        with Recorded(self._encoder()) as recorded:
            sequences_BL = self.model.generate(
                **inputs, generation_config=config, logits_processor=processors
            )
        return Generated(sequences_BL, 1, 0, recorded.output)

    def replay(self, inputs: Inputs, generated: Generated, *, maps: bool) -> Replayed:
        """Gives finished captions to the decoder alone."""
        columns_BP = None
        if maps:
            columns_BP = self._columns(inputs, generated)
        mask = {name: inputs[name] for name in ("attention_mask",) if name in inputs}
        return self._replayed(
            generated,
            columns_BP,
            lambda: self.model(
                encoder_outputs=generated.state,
                decoder_input_ids=generated.sequences_BL[:, :-1],
                use_cache=False,
                **mask,
            ),
        )

    def _columns(self, inputs: Inputs, generated: Generated) -> Tensor:
        first = self.family.special_columns
        if "input_ids" not in inputs:
            count = generated.state[0].shape[1]
            return torch.arange(first, count).expand(len(inputs["pixel_values"]), -1)
        return _image_columns(inputs["input_ids"], _image_token(self.model))[:, first:]


def _image_token(model: Any) -> int:
    config = model.config
    token = getattr(config, "image_token_id", None)
    return int(config.image_token_index if token is None else token)


def _image_columns(ids_BL: Tensor, token: int) -> Tensor:
    """Where the image's tokens are, ``(B, P)``, each row having the same number."""
    where = (ids_BL == token).nonzero()[:, 1]
    return where.view(len(ids_BL), -1)


class _Git(_Base):
    """A decoder whose sequence begins with the image's patches, which are no tokens."""

    def generate(self, inputs: Inputs, config: Any, processors: LogitsProcessorList) -> Generated:
        """Generates, and keeps the image's features."""
        prefix_BL = _prefix(inputs, self.model.config.bos_token_id)
        with Recorded(self.model.get_submodule(self.family.vision)) as recorded:
            sequences_BL = self.model.generate(
                input_ids=prefix_BL,
                attention_mask=torch.ones_like(prefix_BL),
                pixel_values=inputs["pixel_values"],
                generation_config=config,
                logits_processor=processors,
            )
        features = recorded.output if config.num_beams == 1 else None
        return Generated(sequences_BL, 1, prefix_BL.shape[1] - 1, features)

    def step_maps(self) -> StepMaps:
        """Collects maps during generation: the decoder always computes its matrix."""
        return StepMaps(self._layers, slice(self.family.special_columns, self._patches))

    @property
    def _patches(self) -> int:
        """Positions of the image at the sequence's begin."""
        return int(self.model.git.encoder.layer[0].attention.self.image_patch_tokens)

    def replay(self, inputs: Inputs, generated: Generated, *, maps: bool) -> Replayed:
        """Gives finished captions to the decoder, with the image's features from before."""
        vision = self.model.get_submodule(self.family.vision)
        before_BL = generated.sequences_BL[:, :-1]
        columns_BP = None
        if maps:
            columns_BP = torch.arange(self.family.special_columns, self._patches)
            columns_BP = columns_BP.expand(len(before_BL), -1)
        with reuse_output(vision, generated.state):
            return self._replayed(
                generated,
                columns_BP,
                lambda: self.model(
                    input_ids=before_BL,
                    attention_mask=torch.ones_like(before_BL),
                    pixel_values=inputs["pixel_values"],
                    use_cache=False,
                    logits_to_keep=before_BL.shape[1],  # of the image's positions, none
                ),
            )


class _LanguageModel(_Base):
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
            columns = [(row == _image_token(self.model)).nonzero()[:, 0] for row in before_BL]
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


class _Blip2(_LanguageModel):
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
