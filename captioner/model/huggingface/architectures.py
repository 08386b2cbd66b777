"""The architecture of each family, and the models that take the image beside the text.

Shapes: B images, L tokens of a sequence, K of them the caption's, P patches of the image.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList

from captioner.model.huggingface.families import Family
from captioner.model.huggingface.generation import (
    Architecture,
    BaseArchitecture,
    Generated,
    Inputs,
    Replayed,
    image_columns,
    image_token,
    prefix,
)
from captioner.model.huggingface.language_models import Blip2, LanguageModel
from captioner.model.huggingface.replay import Recorded, StepMaps, reuse_output

__all__ = ["architecture_of"]


def architecture_of(family: Family, model: Any) -> Architecture:
    """The architecture of a family's model."""
    if family.name == "BLIP":
        return _Blip(family, model)
    if family.name in ("ViT-GPT2", "Florence-2"):
        return _EncoderDecoder(family, model)
    if family.name == "GIT":
        return _Git(family, model)
    if family.name == "BLIP-2":
        return Blip2(family, model)
    return LanguageModel(family, model)


class _Blip(BaseArchitecture):
    """A text decoder with cross-attention to the image."""

    def __init__(self, family: Family, model: Any):
        super().__init__(family, model)
        self.generator = model.text_decoder

    def generate(self, inputs: Inputs, config: Any, processors: LogitsProcessorList) -> Generated:
        """As ``BlipForConditionalGeneration.generate``, with the image's features kept."""
        text = self.model.config.text_config
        features = self.model.vision_model(pixel_values=inputs["pixel_values"])[0]
        mask = torch.ones(features.shape[:-1], dtype=torch.long, device=features.device)
        prefix_BL = prefix(inputs, text.bos_token_id)
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


class _EncoderDecoder(BaseArchitecture):
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
        return image_columns(inputs["input_ids"], image_token(self.model))[:, first:]


class _Git(BaseArchitecture):
    """A decoder whose sequence begins with the image's patches, which are no tokens."""

    def generate(self, inputs: Inputs, config: Any, processors: LogitsProcessorList) -> Generated:
        """Generates, and keeps the image's features."""
        prefix_BL = prefix(inputs, self.model.config.bos_token_id)
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
