"""A pretrained model that captions batches of images."""

import itertools
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch

from captioner.model import words as grouping
from captioner.model.base import Caption
from captioner.model.huggingface.architectures import architecture_of
from captioner.model.huggingface.families import Family
from captioner.model.huggingface.generation import Generated, Replayed, square
from captioner.model.huggingface.prompts import prepare
from captioner.model.huggingface.sampling import (
    RecordLogprobs,
    end_tokens,
    generation_config,
    sampler,
)
from captioner.model.huggingface.settings import GenerationSettings
from captioner.model.huggingface.words import split_words

__all__ = ["PretrainedCaptioner"]


class PretrainedCaptioner:
    """Captions batches of images with one model on one device.

    Args:
        family: the model's.
        model: transformers' model, in evaluation mode, on its device.
        processor: its processor.
        settings: resolved for the family.
    """

    def __init__(self, family: Family, model: Any, processor: Any, settings: GenerationSettings):
        self.family, self.model, self.processor, self.settings = family, model, processor, settings
        self._architecture = architecture_of(family, model)

    @property
    def device(self) -> torch.device:
        """The device that holds the model."""
        return torch.device(self.model.device)

    @property
    def dtype(self) -> torch.dtype:
        """The type of number that the model computes in."""
        dtype: torch.dtype = self.model.dtype
        return dtype

    @torch.inference_mode()
    def caption(
        self, images: Sequence[np.ndarray], prompts: Sequence[str] | None = None
    ) -> list[Caption]:
        """Captions uint8 RGB images ``(H, W, 3)``, one caption each, in order.

        Args:
            images: of any size; the model's processor resizes them.
            prompts: one for each image; None where all have the settings' prompt.

        Raises:
            ValueError: an image and its prompt are longer than the model's context.
        """
        if prompts is None:
            prompts = [self.settings.prompt or ""] * len(images)
        captions: dict[int, Caption] = {}
        for rows in self._groups(prompts):
            some = self._caption([images[row] for row in rows], [prompts[row] for row in rows])
            captions |= zip(rows, some, strict=True)
        return [captions[row] for row in range(len(images))]

    def _groups(self, prompts: Sequence[str]) -> list[list[int]]:
        """The images that go through the model together: a prefix is not padded."""
        everything = list(range(len(prompts)))
        if self.family.prompt not in ("prefix", "task"):
            return [everything]
        tokenizer = self.processor.tokenizer
        lengths = {
            prompt: len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
            for prompt in set(prompts)
        }
        ordered = sorted(everything, key=lambda row: lengths[prompts[row]])
        return [
            list(rows) for _, rows in itertools.groupby(ordered, lambda row: lengths[prompts[row]])
        ]

    def _caption(self, images: Sequence[np.ndarray], prompts: Sequence[str]) -> list[Caption]:
        inputs = self._inputs(images, prompts)
        generated, replayed = self._generate(inputs, images, prompts, 0)
        captions = list(self._captions(generated, replayed))
        if self.settings.captions == 1:
            return captions
        texts = [[caption.text] for caption in captions]
        for number in range(1, self.settings.captions):
            more, _ = self._generate(inputs, images, prompts, number, text_only=True)
            for row, kept in enumerate(texts):
                ids, _, _ = self._cut(more, row)
                kept.append(split_words(self._tokenizer, ids)[0])
        return [
            Caption(**{**vars(caption), "captions": kept})
            for caption, kept in zip(captions, texts, strict=True)
        ]

    @property
    def _tokenizer(self) -> Any:
        return self.processor.tokenizer

    def _inputs(self, images: Sequence[np.ndarray], prompts: Sequence[str]) -> dict[str, Any]:
        inputs = prepare(self.family, self.processor, images, prompts, self.settings.system_prompt)
        floating, device = self.model.dtype, self.model.device
        for name, value in inputs.items():
            if isinstance(value, torch.Tensor):
                dtype = floating if value.is_floating_point() else value.dtype
                inputs[name] = value.to(device, dtype)
        return inputs

    def _new_tokens(self, inputs: dict[str, Any]) -> int:
        """The largest number of tokens of a caption: the settings', or what the context leaves."""
        asked = self.settings.max_new_tokens or self.family.new_tokens
        context = self._architecture.context()
        if self.family.prompt in (None, "prefix", "task"):
            given = (
                inputs["input_ids"].shape[1]
                if self.family.prompt == "prefix" and ("input_ids" in inputs)
                else 0
            )
            return max(1, min(asked, context - given - 1))
        if "attention_mask" not in inputs:
            return asked
        longest = int(inputs["attention_mask"].sum(1).max())
        if longest + asked > context:
            raise ValueError(
                f"the image and its prompt take {longest} tokens and the caption up to {asked}; "
                f"the model's context holds {context}: lower --max-new-tokens or shorten --prompt"
            )
        return asked

    def _generate(
        self,
        inputs: dict[str, Any],
        images: Sequence[np.ndarray],
        prompts: Sequence[str],
        number: int,
        *,
        text_only: bool = False,
    ) -> tuple[Generated, Replayed | None]:
        """One caption of each image, and what is known of its tokens."""
        architecture = self._architecture
        config = generation_config(architecture.generator, self.settings, self._new_tokens(inputs))
        processors = sampler(self.settings, images, prompts, number)
        self._end, self._forced_end = end_tokens(config), config.forced_eos_token_id is not None
        maps = self.settings.attention != "none"
        given = self.family.prompt == "prefix" and "input_ids" in inputs
        steps = architecture.step_maps() if maps else None
        replays = (maps and steps is None) or given or config.num_beams > 1
        if text_only or replays:
            generated = architecture.generate(inputs, config, processors)
            self._new = config.max_new_tokens
            self._end = end_tokens(config)
            if text_only:
                return generated, None
            return generated, architecture.replay(inputs, generated, maps=maps)
        with RecordLogprobs(architecture.generator) as recorded, steps or nullcontext():
            processors.append(recorded)
            generated = architecture.generate(inputs, config, processors)
        self._new = config.max_new_tokens
        self._end = end_tokens(config)
        logprobs_BK = torch.from_numpy(recorded.result(generated.sequences_BL))
        if steps is None:
            return generated, Replayed(logprobs_BK, None, [])
        maps_BKP = steps.mean_maps()
        grid = square(maps_BKP.shape[2])
        return generated, Replayed(logprobs_BK, list(maps_BKP), [grid] * len(maps_BKP))

    def _cut(self, generated: Generated, row: int) -> tuple[list[int], bool, int]:
        """A caption's tokens without its end, whether it ended, and how many were generated."""
        ids = generated.sequences_BL[row, generated.start :].tolist()
        given = generated.given
        end = next((i for i in range(given, len(ids)) if ids[i] in self._end), None)
        if end is None:
            return ids, False, len(ids) - given
        forced = self._forced_end and end - given + 1 >= self._new
        return ids[:end], not forced, end - given + 1

    def _captions(self, generated: Generated, replayed: Replayed | None) -> Iterator[Caption]:
        assert replayed is not None
        logprobs_BK = replayed.logprobs_BK.float().cpu().numpy()
        for row in range(len(generated.sequences_BL)):
            ids, ended, count = self._cut(generated, row)
            text, words, members = split_words(self._tokenizer, ids)
            logprobs = logprobs_BK[row]
            new = logprobs[generated.given : generated.given + count]
            yield Caption(
                text=text,
                tokens=words,
                token_logprobs=grouping.join_logprobs(logprobs.tolist(), members),
                score=float(new.mean()),
                attention_THW=self._word_maps(replayed, row, len(ids), members),
                finish="stop" if ended else "length",
            )

    def _word_maps(
        self, replayed: Replayed, row: int, count: int, members: list[list[int]]
    ) -> np.ndarray | None:
        if replayed.maps_BKP is None:
            return None
        height, width = replayed.grids[row]
        maps_KHW = replayed.maps_BKP[row][:count].float().cpu().numpy()
        maps_KHW = grouping.normalise(maps_KHW.reshape(count, height, width))
        maps_THW = grouping.join_maps(maps_KHW, members)
        if self.family.prompt in ("chat", "text"):
            maps_THW = grouping.remove_sinks(maps_THW)
        if self.settings.attention == "mean":
            maps_THW = (
                grouping.normalise(maps_THW.mean(0, keepdims=True)) if len(maps_THW) else (maps_THW)
            )
        return maps_THW
