"""Tiny pretrained captioners with random weights: whole directories, as transformers saves them.

``python tests/tiny_pretrained.py blip DIRECTORY`` writes one.
"""

import re
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

WORDS = ["a", "photo", "of", "dog", "cat", "on", "the", "grass", "red", "run", "and"]
WORDS += ["blue", "sky", "with", "two", "people", "in"]
_VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
_TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
}
_SIZE = {"height": 32, "width": 32}
_CHAT = (
    "{% for message in messages %}{{ message['role'] }}: "
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}IMAGE{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


def _word_piece() -> transformers.PreTrainedTokenizerFast:
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]"]
    pieces = [*special, *WORDS, "##s", "##ning", "##y", ",", ".", "'"]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        bos_token="[DEC]",
        model_input_names=["input_ids", "attention_mask"],
    )


def _byte_pairs(**special: str) -> transformers.PreTrainedTokenizerFast:
    """Byte-level pairs, as GPT-2's: letters, and the words with a space before them."""
    names = ["<pad>", "<s>", "</s>", *(name for name in special.values())]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {name: index for index, name in enumerate(dict.fromkeys(names + alphabet))}
    merges = []
    for word in WORDS:
        token = "Ġ"
        for letter in word:
            merged = token + letter
            if (token, letter) not in merges:
                merges.append((token, letter))
            vocabulary.setdefault(merged, len(vocabulary))
            token = merged
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens=special,
        model_input_names=["input_ids", "attention_mask"],
    )


def _ids(tokenizer: transformers.PreTrainedTokenizerFast) -> dict[str, int]:
    return {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


Built = tuple[object, list[object]]  # the model, and what is saved beside it


def blip() -> Built:
    tokenizer = _word_piece()
    config = transformers.BlipConfig(
        vision_config=_VISION,
        text_config={
            **_TEXT,
            "vocab_size": len(tokenizer),
            "encoder_hidden_size": 32,
            "bos_token_id": 5,
            "eos_token_id": 3,
            "pad_token_id": 0,
            "sep_token_id": 3,
        },
    )
    images = transformers.BlipImageProcessor(size=_SIZE)
    model = transformers.BlipForConditionalGeneration(config)
    return model, [transformers.BlipProcessor(images, tokenizer)]


def git() -> Built:
    tokenizer = _word_piece()
    config = transformers.GitConfig(
        vision_config=_VISION,
        **_TEXT,
        vocab_size=len(tokenizer),
        bos_token_id=2,
        eos_token_id=3,
        pad_token_id=0,
    )
    images = transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=_SIZE)
    return transformers.GitForCausalLM(config), [transformers.GitProcessor(images, tokenizer)]


def vit_gpt2() -> Built:
    tokenizer = _byte_pairs()
    encoder = transformers.ViTConfig(**_VISION)
    decoder = transformers.GPT2Config(
        n_embd=32, n_layer=2, n_head=4, n_positions=64, **_ids(tokenizer)
    )
    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    model = transformers.VisionEncoderDecoderModel(config=config)
    settings = {"decoder_start_token_id": 1, "pad_token_id": 0, "eos_token_id": 2}
    for name, value in settings.items():
        setattr(model.config, name, value)
        setattr(model.generation_config, name, value)
    return model, [tokenizer, transformers.ViTImageProcessor(size=_SIZE)]


def florence2() -> Built:
    tokenizer = _byte_pairs(image_token="<image>")
    config = transformers.Florence2Config(
        text_config={
            "model_type": "bart",
            "d_model": 32,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 64,
            "decoder_ffn_dim": 64,
            "max_position_embeddings": 128,
            "decoder_start_token_id": tokenizer.eos_token_id,
            "forced_eos_token_id": tokenizer.eos_token_id,
            **_ids(tokenizer),
        },
        vision_config={
            "patch_size": [7, 3, 3, 3],
            "patch_stride": [4, 2, 2, 2],
            "patch_padding": [3, 1, 1, 1],
            "patch_prenorm": [False, True, True, True],
            "embed_dim": [8, 8, 8, 8],
            "num_heads": [2, 2, 2, 2],
            "num_groups": [2, 2, 2, 2],
            "depths": [1, 1, 1, 1],
            "window_size": 4,
            "projection_dim": 32,
            "max_position_embeddings": 10,
            "max_temporal_embeddings": 10,
        },
        image_token_id=tokenizer.image_token_id,
    )
    images = transformers.CLIPImageProcessor(
        size={"height": 96, "width": 96}, crop_size={"height": 96, "width": 96}
    )
    images.image_seq_length = 10  # type: ignore[attr-defined]
    model = transformers.Florence2ForConditionalGeneration(config)
    return model, [transformers.Florence2Processor(images, tokenizer)]


def blip2() -> Built:
    tokenizer = _byte_pairs()
    images = transformers.BlipImageProcessor(size=_SIZE)
    processor = transformers.Blip2Processor(images, tokenizer, num_query_tokens=6)
    config = transformers.Blip2Config(
        vision_config=_VISION,
        qformer_config={**_TEXT, "encoder_hidden_size": 32, "vocab_size": 50},
        text_config={
            "model_type": "opt",
            "hidden_size": 32,
            "ffn_dim": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "word_embed_proj_dim": 32,
            "max_position_embeddings": 128,
            **_ids(tokenizer),
        },
        num_query_tokens=6,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    return transformers.Blip2ForConditionalGeneration(config), [processor]


def paligemma() -> Built:
    tokenizer = _byte_pairs()
    images = transformers.SiglipImageProcessor(size=_SIZE)
    images.image_seq_length = 16  # type: ignore[attr-defined]
    processor = transformers.PaliGemmaProcessor(images, tokenizer)  # adds a thousand tokens
    config = transformers.PaliGemmaConfig(
        vision_config={
            "model_type": "siglip_vision_model",
            "projection_dim": 32,
            "vision_use_head": False,
            **_VISION,
        },
        text_config={
            "model_type": "gemma",
            "head_dim": 8,
            "num_key_value_heads": 2,
            **_TEXT,
            **_ids(tokenizer),
        },
        image_token_index=processor.image_token_id,
        projection_dim=32,
        hidden_size=32,
    )
    return transformers.PaliGemmaForConditionalGeneration(config), [processor]


def gemma3() -> Built:
    tokenizer = _byte_pairs(image_token="<soft>", boi_token="<start>", eoi_token="<end>")
    images = transformers.Gemma3ImageProcessor(size=_SIZE)
    processor = transformers.Gemma3Processor(
        images, tokenizer, chat_template=_CHAT.replace("IMAGE", "<start>"), image_seq_length=4
    )
    config = transformers.Gemma3Config(
        vision_config={"model_type": "siglip_vision_model", "vision_use_head": False, **_VISION},
        text_config={
            "model_type": "gemma3_text",
            "head_dim": 8,
            "num_key_value_heads": 2,
            "sliding_window": 64,
            **_TEXT,
            **_ids(tokenizer),
        },
        image_token_index=tokenizer.image_token_id,
        mm_tokens_per_image=4,
        boi_token_index=tokenizer.boi_token_id,
        eoi_token_index=tokenizer.eoi_token_id,
    )
    return transformers.Gemma3ForConditionalGeneration(config), [processor]


def llava() -> Built:
    tokenizer = _byte_pairs(image_token="<image>")
    images = transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=_SIZE)
    processor = transformers.LlavaProcessor(
        images,
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=_CHAT.replace("IMAGE", "<image>"),
    )
    config = transformers.LlavaConfig(
        vision_config={"model_type": "clip_vision_model", **_VISION},
        text_config={"model_type": "llama", "num_key_value_heads": 2, **_TEXT, **_ids(tokenizer)},
        image_token_index=tokenizer.image_token_id,
        vision_feature_layer=-1,
    )
    return transformers.LlavaForConditionalGeneration(config), [processor]


def smolvlm() -> Built:
    tokenizer = _byte_pairs(
        image_token="<image>",
        fake_image_token="<fake_token_around_image>",
        global_image_token="<global-img>",
        end_of_utterance_token="<end_of_utterance>",
    )
    images = transformers.SmolVLMImageProcessor(
        size={"longest_edge": 64}, max_image_size={"longest_edge": 32}
    )
    processor = transformers.SmolVLMProcessor(
        images,
        tokenizer,
        transformers.SmolVLMVideoProcessor(),
        image_seq_len=4,
        chat_template=_CHAT.replace("IMAGE", "<image>"),
    )
    config = transformers.SmolVLMConfig(  # type: ignore[call-arg]
        vision_config=_VISION,
        text_config={"model_type": "llama", "num_key_value_heads": 2, **_TEXT, **_ids(tokenizer)},
        image_token_id=tokenizer.image_token_id,
        scale_factor=2,
        pad_token_id=tokenizer.pad_token_id,
    )
    return transformers.SmolVLMForConditionalGeneration(config), [processor]


def internvl() -> Built:
    tokenizer = _byte_pairs(
        start_image_token="<img>",
        end_image_token="</img>",
        context_image_token="<IMG_CONTEXT>",
        video_token="<video>",
    )
    images = transformers.GotOcr2ImageProcessor(
        size=_SIZE, crop_to_patches=True, min_patches=1, max_patches=4
    )
    processor = transformers.InternVLProcessor(
        images,
        tokenizer,
        transformers.InternVLVideoProcessor(),
        image_seq_length=4,
        chat_template=_CHAT.replace("IMAGE", "<IMG_CONTEXT>"),
    )
    config = transformers.InternVLConfig(
        vision_config={**_VISION, "image_size": [32, 32], "patch_size": [8, 8]},
        text_config={"model_type": "qwen2", "num_key_value_heads": 2, **_TEXT, **_ids(tokenizer)},
        image_token_id=tokenizer.context_image_token_id,
        image_seq_length=4,
        downsample_ratio=0.5,
    )
    return transformers.InternVLForConditionalGeneration(config), [processor]


def _qwen(version: str) -> Built:
    tokenizer = _byte_pairs(
        image_token="<|image_pad|>",
        video_token="<|video_pad|>",
        vision_start="<|vision_start|>",
        vision_end="<|vision_end|>",
    )
    old = version == "2.5"
    patch = 14 if old else 16
    template = _CHAT.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>")
    images = transformers.Qwen2VLImageProcessor(
        patch_size=patch,
        merge_size=2,
        size={"shortest_edge": 4 * patch**2 * 4, "longest_edge": 40 * patch**2},
    )
    if old:
        video = transformers.Qwen2VLVideoProcessor(patch_size=patch)
        kind = transformers.Qwen2_5_VLProcessor
    else:
        video = transformers.Qwen3VLVideoProcessor(patch_size=patch)
        kind = transformers.Qwen3VLProcessor
    processor = kind(images, tokenizer, video, chat_template=template)
    tokens = {
        "image_token_id": tokenizer.image_token_id,
        "video_token_id": tokenizer.video_token_id,
        "vision_start_token_id": tokenizer.vision_start_id,
        "vision_end_token_id": tokenizer.vision_end_id,
    }
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 4,
        "patch_size": patch,
        "out_hidden_size": 32,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    }
    text = {**_TEXT, "num_key_value_heads": 2, **_ids(tokenizer)}
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    if old:
        return transformers.Qwen2_5_VLForConditionalGeneration(
            transformers.Qwen2_5_VLConfig(
                vision_config={**vision, "window_size": 112, "fullatt_block_indexes": [1]},
                text_config={**text, "rope_parameters": {**rope, "mrope_section": [1, 1, 2]}},
                **tokens,
            )
        ), [processor]
    return transformers.Qwen3VLForConditionalGeneration(
        transformers.Qwen3VLConfig(
            vision_config={
                **vision,
                "deepstack_visual_indexes": [0],
                "num_position_embeddings": 64,
            },
            text_config={
                **text,
                "head_dim": 8,
                "rope_parameters": {**rope, "mrope_section": [2, 1, 1]},
            },
            **tokens,
        )
    ), [processor]


def qwen2_5_vl() -> Built:
    return _qwen("2.5")


def qwen3_vl() -> Built:
    return _qwen("3")


FAMILIES: dict[str, Callable[[], Built]] = {
    each.__name__: each
    for each in (
        blip,
        git,
        vit_gpt2,
        florence2,
        blip2,
        paligemma,
        gemma3,
        llava,
        smolvlm,
        internvl,
        qwen2_5_vl,
        qwen3_vl,
    )
}


def write(family: str, directory: Path, seed: int = 0) -> Path:
    """Writes a family's tiny model; its random weights are large, so that captions differ."""
    torch.manual_seed(seed)
    model, others = FAMILIES[family]()
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # type: ignore[attr-defined]
            if parameter.ndim >= 2:
                parameter.normal_(0, 1.0 if re.search("projector|connector", name) else 0.15)
        head = model.get_output_embeddings()  # type: ignore[attr-defined]
        if family in ("paligemma", "gemma3", "smolvlm"):  # else they say little but special tokens
            tokenizer = others[0].tokenizer  # type: ignore[attr-defined]
            if "gemma" in family:  # tied to the embeddings: else each word follows itself
                head.weight.normal_(0, 0.02)
            head.weight[tokenizer.vocab_size :] = 0
            head.weight[list(tokenizer.all_special_ids)] = 0
    model.save_pretrained(directory)  # type: ignore[attr-defined]
    for each in others:
        each.save_pretrained(directory)  # type: ignore[attr-defined]
    return directory


if __name__ == "__main__":
    write(sys.argv[1], Path(sys.argv[2]))
