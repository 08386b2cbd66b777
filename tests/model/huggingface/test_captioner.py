"""Captions, log-probabilities and maps, against transformers alone, one image at a time."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("transformers")
import torch
import transformers
from PIL import Image

import tiny_pretrained
from captioner.model.huggingface import words
from captioner.model.huggingface.families import FAMILIES, Family, family_of
from captioner.model.huggingface.loading import load_directory, load_processor
from captioner.model.huggingface.settings import GenerationSettings

NEW_TOKENS = 10
MAPPED = [name for name in tiny_pretrained.FAMILIES if name != "blip2"]
PREFIXED = ["blip", "git"]


def family(name: str, directory: Path) -> Family:
    return family_of(json.loads((directory / "config.json").read_text()), name)


class Reference:
    """A family's model, used as its documentation says."""

    def __init__(self, name: str, directory: Path):
        self.name = name
        self.model = transformers.AutoModelForImageTextToText.from_pretrained(directory).eval()
        self.processor = load_processor(directory, family(name, directory))

    def inputs(self, image: np.ndarray, prompt: str | None) -> dict[str, Any]:
        picture = Image.fromarray(image)
        processor = self.processor
        if self.name == "vit_gpt2":
            return dict(processor.image_processor(picture, return_tensors="pt"))
        if self.name == "git":
            pixels = processor(images=picture, return_tensors="pt").pixel_values
            if prompt is None:
                return {"pixel_values": pixels}
            ids = processor.tokenizer(prompt, add_special_tokens=False).input_ids
            ids = [processor.tokenizer.cls_token_id, *ids]
            return {"pixel_values": pixels, "input_ids": torch.tensor([ids])}
        if self.name in ("blip", "blip2"):
            texts = {} if prompt is None else {"text": prompt}
            return dict(processor(images=picture, return_tensors="pt", **texts))
        if self.name == "florence2":
            return dict(processor(images=picture, text=prompt or "<CAPTION>", return_tensors="pt"))
        if self.name == "paligemma":
            text = "<image>" + (prompt or "caption en")
            inputs = dict(processor(images=picture, text=text, return_tensors="pt"))
            del inputs["labels"]
            return inputs
        question = prompt or "Describe this image in one sentence."
        content = [{"type": "image"}, {"type": "text", "text": question}]
        text = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
        one_tile = {
            "smolvlm": {"do_image_splitting": False},
            "internvl": {"crop_to_patches": False},
        }
        inputs = processor(
            images=[picture], text=[text], return_tensors="pt", **one_tile.get(self.name, {})
        )
        return {name: value for name, value in inputs.items() if name not in ("rows", "cols")}

    def caption(self, image: np.ndarray, prompt: str | None = None, **settings: Any) -> list[int]:
        """The generated tokens, a prompt that a caption continues included."""
        inputs = self.inputs(image, prompt)
        length = inputs["input_ids"].shape[1] if "input_ids" in inputs else 1
        ids = self.model.generate(**inputs, do_sample=False, max_new_tokens=NEW_TOKENS, **settings)[
            0
        ].tolist()
        if self.name in ("blip", "git", "vit_gpt2", "florence2"):
            length = 1
        elif self.name == "blip2" and prompt is None:
            length = 6 + 1
        return ids[length:]


@pytest.fixture(scope="module")
def images() -> list[np.ndarray]:
    """Images of several sizes and aspects."""
    generator = np.random.default_rng(0)
    sizes = [(40, 64), (64, 40), (90, 90)]
    return [generator.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]


@pytest.fixture(scope="module")
def reference(directory_of: Callable[[str], Path]) -> Callable[[str], Reference]:
    loaded: dict[str, Reference] = {}

    def get(name: str) -> Reference:
        if name not in loaded:
            loaded[name] = Reference(name, directory_of(name))
        return loaded[name]

    return get


def captioner(directory: Path, **settings: Any) -> Any:
    given = {"max_new_tokens": NEW_TOKENS, "attention": "none"} | settings
    return load_directory(directory, GenerationSettings(**given), device="cpu", precision="fp32")


def text(reference: Reference, ids: list[int]) -> str:
    return reference.processor.tokenizer.decode(ids, skip_special_tokens=True).strip()


@pytest.mark.parametrize("name", tiny_pretrained.FAMILIES)
def test_captions_are_those_of_generate_alone_and_in_batches(
    name: str, directory_of: Any, reference: Any, images: list[np.ndarray]
) -> None:
    expected = [text(reference(name), reference(name).caption(image)) for image in images]
    model = captioner(directory_of(name))
    assert len(set(expected)) > 1, "the tiny model says the same of every image"
    assert [model.caption([image])[0].text for image in images] == expected
    assert [caption.text for caption in model.caption(images)] == expected


@pytest.mark.parametrize("name", [name for name in tiny_pretrained.FAMILIES if name != "vit_gpt2"])
def test_prompts_of_several_lengths_in_a_batch_are_as_alone(
    name: str, directory_of: Any, reference: Any, images: list[np.ndarray]
) -> None:
    prompts = ["a photo of a dog", "the", "a red grass"]
    if name == "florence2":
        prompts = ["<CAPTION>", "<DETAILED_CAPTION>", "<MORE_DETAILED_CAPTION>"]
    alone = reference(name)
    expected = [
        text(alone, alone.caption(image, prompt))
        for image, prompt in zip(images, prompts, strict=True)
    ]
    assert [each.text for each in captioner(directory_of(name)).caption(images, prompts)] == (
        expected
    )


@pytest.mark.parametrize("name", tiny_pretrained.FAMILIES)
def test_beams_are_those_of_generate(
    name: str, directory_of: Any, reference: Any, images: list[np.ndarray]
) -> None:
    alone = reference(name)
    expected = [text(alone, alone.caption(image, num_beams=3)) for image in images]
    model = captioner(directory_of(name), beam=3)
    assert [caption.text for caption in model.caption(images)] == expected


#: Where each family's attention to the image is computed: the modules, and the image's columns.
ATTENTIONS = {
    "blip": "text_decoder.bert.encoder.layer.{}.crossattention.self",
    "git": "git.encoder.layer.{}.attention.self",
    "vit_gpt2": "decoder.transformer.h.{}.crossattention",
    "florence2": "model.language_model.decoder.layers.{}.encoder_attn",
    "smolvlm": "model.text_model.layers.{}.self_attn",
}
LAYERS = 2  # of each tiny model


def step_by_step(
    reference: Reference, image: np.ndarray, prompt: str | None, ids: list[int]
) -> tuple[list[float], np.ndarray]:
    """Log-probabilities, and attention over all columns in the upper layer, of greedy generation.

    Each step's own attention matrix and logits are taken, with the matrix computed.
    """
    model, name = reference.model, reference.name
    path = ATTENTIONS.get(name, "model.language_model.layers.{}.self_attn")
    upper = model.get_submodule(path.format(LAYERS - 1))
    generating = model.text_decoder if name == "blip" else model
    rows: list[np.ndarray] = []
    logits: list[torch.Tensor] = []
    hooks = [
        upper.register_forward_hook(lambda _, __, out: rows.append(out[1][0, :, -1].mean(0))),
        generating.register_forward_hook(lambda _, __, out: logits.append(out.logits[0, -1])),
    ]
    usual = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        assert reference.caption(image, prompt) == ids
    finally:
        model.set_attn_implementation(usual)
        for hook in hooks:
            hook.remove()
    logprobs = [float(each.log_softmax(-1)[token]) for each, token in zip(logits, ids, strict=True)]
    width = min(len(row) for row in rows)  # the prompt's columns: those that the first step has
    return logprobs, np.stack([row[:width].numpy() for row in rows])  # type: ignore[attr-defined]


def image_columns(reference: Reference, image: np.ndarray, width: int) -> tuple[slice | Any, Any]:
    """The image's columns, and its grid."""
    name = reference.name
    if name in ("blip", "vit_gpt2"):
        return slice(1, 17), (4, 4)
    if name == "git":
        return slice(1, 17), (4, 4)
    inputs = reference.inputs(image, None)
    config = reference.model.config
    token = getattr(config, "image_token_id", None) or config.image_token_index
    columns = (inputs["input_ids"][0] == token).nonzero()[:, 0].numpy()
    if name == "florence2":
        return columns[1:], (3, 3)
    if "image_grid_thw" in inputs:
        _, height, across = inputs["image_grid_thw"][0].tolist()
        return columns, (height // 2, across // 2)
    side = int(len(columns) ** 0.5)
    return columns, (side, side)


@pytest.mark.parametrize("name", MAPPED)
def test_maps_and_logprobs_are_those_of_generation_step_by_step(
    name: str, directory_of: Any, reference: Any, images: list[np.ndarray]
) -> None:
    alone = reference(name)
    captions = captioner(directory_of(name), attention="tokens").caption(images)
    for image, caption in zip(images, captions, strict=True):
        ids = alone.caption(image)
        logprobs, rows_KC = step_by_step(alone, image, None, ids)
        columns, (height, width) = image_columns(alone, image, rows_KC.shape[1])
        maps = rows_KC[:, columns].reshape(-1, height, width)
        maps = maps / maps.sum((1, 2), keepdims=True)
        end = {alone.processor.tokenizer.eos_token_id, alone.processor.tokenizer.sep_token_id}
        kept = ids[:-1] if ids[-1] in end else ids
        _, tokens, members = words.split_words(alone.processor.tokenizer, kept)
        expected = np.stack([maps[word].mean(0) for word in members]) if members else maps[:0]
        if name not in ("blip", "git", "vit_gpt2", "florence2") and len(expected) > 1:
            expected = expected / expected.mean(0)  # the sinks of self-attention
            expected = expected / expected.sum((1, 2), keepdims=True)
        assert caption.tokens == tokens
        assert caption.attention_THW.shape == (len(tokens), height, width)
        np.testing.assert_allclose(caption.attention_THW, expected, atol=1e-5)
        np.testing.assert_allclose(
            caption.token_logprobs,
            [sum(logprobs[index] for index in word) for word in members],
            atol=1e-5,
        )
        assert caption.score == pytest.approx(np.mean(logprobs), abs=1e-5)


@pytest.mark.parametrize("name", tiny_pretrained.FAMILIES)
def test_logprobs_without_maps_are_the_same_as_with_them(
    name: str, directory_of: Any, images: list[np.ndarray]
) -> None:
    recorded = captioner(directory_of(name)).caption(images)
    replayed = captioner(directory_of(name), beam=1)
    replayed.settings = GenerationSettings(**{**vars(replayed.settings), "attention": "tokens"})
    if name == "blip2":
        return
    for one, other in zip(recorded, replayed.caption(images), strict=True):
        assert one.attention_THW is None
        assert one.text == other.text
        np.testing.assert_allclose(one.token_logprobs, other.token_logprobs, atol=1e-4)
        assert one.score == pytest.approx(other.score, abs=1e-5)


@pytest.mark.parametrize("name", PREFIXED)
def test_a_prefix_is_part_of_the_caption_with_maps_and_logprobs(
    name: str, directory_of: Any, images: list[np.ndarray]
) -> None:
    prompts = ["a photo of"] * len(images)
    model = captioner(directory_of(name), attention="tokens")
    for caption in model.caption(images, prompts):
        assert caption.tokens[:3] == ["a", "photo", "of"]
        assert len(caption.tokens) == len(caption.token_logprobs) == len(caption.attention_THW)
        np.testing.assert_allclose(caption.attention_THW.sum((1, 2)), 1, atol=1e-5)


@pytest.mark.parametrize("name", tiny_pretrained.FAMILIES)
def test_a_sampled_caption_depends_on_seed_and_image_alone(
    name: str, directory_of: Any, images: list[np.ndarray]
) -> None:
    model = captioner(directory_of(name), temperature=1.2, top_p=0.9, seed=3, captions=2)
    together = model.caption(images)
    reversed_ = model.caption(images[::-1])[::-1]
    alone = [model.caption([image])[0] for image in images]
    assert [each.captions for each in together] == [each.captions for each in alone]
    assert [each.captions for each in together] == [each.captions for each in reversed_]
    assert all(each.text == each.captions[0] != each.captions[1] for each in together)
    other = captioner(directory_of(name), temperature=1.2, top_p=0.9, seed=4)
    assert [each.text for each in other.caption(images)] != [each.text for each in together]


def test_sampling_follows_the_probabilities(directory_of: Any, images: list[np.ndarray]) -> None:
    [greedy] = captioner(directory_of("blip"), max_new_tokens=1).caption(images[:1])
    model = captioner(directory_of("blip"), temperature=1.0, max_new_tokens=1, captions=200)
    drawn = model.caption(images[:1])[0].captions
    share = drawn.count(greedy.text) / len(drawn)
    assert share == pytest.approx(np.exp(greedy.token_logprobs[0]), abs=0.1)


def test_the_mean_map_is_the_mean_of_the_words(directory_of: Any, images: list[np.ndarray]) -> None:
    [mean] = captioner(directory_of("blip"), attention="mean").caption(images[:1])
    [tokens] = captioner(directory_of("blip"), attention="tokens").caption(images[:1])
    assert mean.attention_THW.shape == (1, 4, 4)
    np.testing.assert_allclose(mean.attention_THW[0], tokens.attention_THW.mean(0), atol=1e-6)


@pytest.mark.parametrize("name", ["vit_gpt2", "florence2", "qwen2_5_vl"])
def test_a_caption_cut_at_the_limit_says_so(
    name: str, directory_of: Any, images: list[np.ndarray]
) -> None:
    [cut] = captioner(directory_of(name), max_new_tokens=3).caption(images[:1])
    assert cut.finish == "length"


def test_a_caption_that_the_model_ends_says_so(directory_of: Any, images: list[np.ndarray]) -> None:
    model = captioner(directory_of("blip"))
    with torch.no_grad():
        model.model.text_decoder.cls.predictions.bias[3] += 100  # the end
    [caption] = model.caption(images[:1])
    assert (caption.text, caption.tokens, caption.finish) == ("", [], "stop")


def test_an_image_longer_than_the_context_is_refused_with_numbers(
    directory_of: Any, images: list[np.ndarray]
) -> None:
    model = captioner(directory_of("llava"), max_new_tokens=500)
    with pytest.raises(ValueError, match=r"take \d+ tokens .* up to 500; .* holds 512"):
        model.caption(images[:1])


def test_every_family_has_a_tiny_model() -> None:
    assert len(FAMILIES) == len(tiny_pretrained.FAMILIES)


@pytest.mark.parametrize("name", PREFIXED)
def test_maps_taken_during_generation_are_those_of_a_replay(
    name: str, directory_of: Any, images: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without beams and prompts these families need no second pass."""
    model = captioner(directory_of(name), attention="tokens", beam=1)
    with monkeypatch.context() as patched:
        patched.setattr(type(model._architecture), "replay", None)
        taken = model.caption(images)
    monkeypatch.setattr(type(model._architecture), "step_maps", lambda self: None)
    for caption, replayed in zip(taken, model.caption(images), strict=True):
        assert caption.tokens == replayed.tokens
        np.testing.assert_allclose(caption.attention_THW, replayed.attention_THW, atol=1e-6)
        np.testing.assert_allclose(caption.token_logprobs, replayed.token_logprobs, atol=1e-5)
        assert caption.score == pytest.approx(replayed.score, abs=1e-5)


def test_a_caption_that_is_missing_raises(
    directory_of: Any, images: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = captioner(directory_of("blip"))
    caption = model._caption
    monkeypatch.setattr(model, "_caption", lambda *arguments: caption(*arguments)[1:])
    with pytest.raises(ValueError, match="shorter"):
        model.caption(images)
