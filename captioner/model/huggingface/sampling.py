"""Generation settings in transformers' form, and sampling that no other image influences."""

import copy
import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from captioner.model.huggingface.settings import GenerationSettings

__all__ = ["RecordLogprobs", "end_tokens", "generation_config", "sampler"]


def generation_config(module: Any, settings: GenerationSettings, new_tokens: int) -> Any:
    """A model's own generation settings, changed as the job asks."""
    config = copy.deepcopy(module.generation_config)
    config.max_length, config.max_new_tokens = None, new_tokens
    config.do_sample, config.temperature, config.top_p, config.top_k = False, None, None, None
    config.return_dict_in_generate, config.num_return_sequences = False, 1
    if settings.beam is not None:
        config.num_beams = settings.beam
    if settings.length_penalty is not None:
        config.length_penalty = settings.length_penalty
    if settings.repetition_penalty is not None:
        config.repetition_penalty = settings.repetition_penalty
    config.num_beams = config.num_beams or 1
    if config.num_beams == 1:
        config.length_penalty, config.early_stopping = None, None
    return config


def end_tokens(config: Any) -> set[int]:
    """The tokens that end a caption."""
    end = config.eos_token_id
    return set(end) if isinstance(end, (list, tuple)) else {end}


def sampler(
    settings: GenerationSettings, images: Sequence[np.ndarray], prompts: Sequence[str], number: int
) -> LogitsProcessorList:
    """What samples one caption of each image; empty where captions are not sampled.

    The random numbers of a caption come from the seed, the image's pixels, its prompt and the
    caption's ``number`` among the image's captions.
    """
    if not settings.temperature:
        return LogitsProcessorList()
    count = settings.max_new_tokens or 0
    rows = []
    for image, prompt in zip(images, prompts, strict=True):
        digest = hashlib.blake2b(np.ascontiguousarray(image).data, digest_size=16)
        digest.update(repr((image.shape, prompt, settings.seed, number)).encode())
        generator = np.random.default_rng(int.from_bytes(digest.digest(), "little"))
        rows.append(generator.random(count))
    processors = LogitsProcessorList()
    if settings.temperature != 1:
        processors.append(TemperatureLogitsWarper(float(settings.temperature)))
    if settings.top_p < 1:
        processors.append(TopPLogitsWarper(top_p=settings.top_p))
    processors.append(_Draw(torch.from_numpy(np.stack(rows))))
    return processors


class _Draw:
    """Leaves each row one token, drawn by one random number."""

    def __init__(self, uniform_BT: Tensor):
        self._uniform_BT, self._step = uniform_BT, 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        cumulative_BV = scores.double().softmax(-1).cumsum(-1)
        draw_B1 = self._uniform_BT[:, self._step, None].to(scores.device)
        self._step += 1
        chosen_B1 = torch.searchsorted(cumulative_BV, draw_B1 * cumulative_BV[:, -1:], right=True)
        chosen_B1 = chosen_B1.clamp(max=scores.shape[1] - 1)
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen_B1, 0.0)


class RecordLogprobs:
    """Keeps the log-probability of each generated token, before any setting changes the logits.

    It is a context in which the module's outputs are seen, and goes last among the processors of
    ``generate``. It cannot follow beams.
    """

    def __init__(self, module: Any):
        self._module = module
        self._logits_BV = self._previous_BV = torch.empty(0)  # of this step, and of the one before
        self._steps, self._kept = 0, list[Tensor]()

    def __enter__(self) -> "RecordLogprobs":
        self._hook = self._module.register_forward_hook(self._see)
        return self

    def __exit__(self, *problem: object) -> None:
        self._hook.remove()

    def _see(self, module: Any, inputs: Any, output: Any) -> None:
        self._logits_BV = output.logits[:, -1]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Keeps the last step's token; changes nothing."""
        if self._steps:
            self._keep(self._previous_BV, input_ids[:, -1])
        self._steps += 1
        self._previous_BV = self._logits_BV
        return scores

    def _keep(self, logits_BV: Tensor, tokens_B: Tensor) -> None:
        logits_BV = logits_BV.float()
        tokens_B1 = tokens_B[:, None].to(logits_BV.device)
        self._kept.append(logits_BV.gather(1, tokens_B1)[:, 0] - logits_BV.logsumexp(1))

    def result(self, sequences_BL: Tensor) -> np.ndarray:
        """The log-probabilities ``(B, T)`` of the ``T`` generated tokens."""
        self._keep(self._previous_BV, sequences_BL[:, -1])
        return torch.stack(self._kept, 1).cpu().numpy()
