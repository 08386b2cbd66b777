import dataclasses
import json
import re
import subprocess
import sys
import typing
from typing import Literal

import pytest

from captioner.config import (
    PRESETS,
    DecodeConfig,
    ListingConfig,
    ModelConfig,
    Preset,
    RunConfig,
    TrainConfig,
    from_mapping,
)
from captioner.errors import InputError

KINDS = [ModelConfig, TrainConfig, DecodeConfig, ListingConfig, RunConfig]
FIELDS = [(kind, field) for kind in KINDS for field in dataclasses.fields(kind)]
NAMES = [f"{kind.__name__}.{field.name}" for kind, field in FIELDS]


def _refused(kind: type, message: str, **values: object) -> None:
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        kind(**values)
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        from_mapping(kind, values)


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (ModelConfig, {"width": "wide"}, "width must be a whole number, not 'wide'"),
        (ModelConfig, {"width": 384.0}, "width must be a whole number, not 384.0"),
        (ModelConfig, {"layers": True}, "layers must be a whole number, not True"),
        (ModelConfig, {"layers": None}, "layers must be a whole number, not None"),
        (ModelConfig, {"layers": 0}, "layers must be at least 1, not 0"),
        (ModelConfig, {"image_size": 31}, "image_size must be at least 32, not 31"),
        (ModelConfig, {"grid": 0}, "grid must be at least 1, not 0"),
        (ModelConfig, {"grid": 1.5}, "grid must be a whole number or null, not 1.5"),
        (ModelConfig, {"backbone": 50}, "backbone must be text, not 50"),
        (ModelConfig, {"pre_norm": 1}, "pre_norm must be true or false, not 1"),
        (ModelConfig, {"pre_norm": "yes"}, "pre_norm must be true or false, not 'yes'"),
        (ModelConfig, {"width": 1000, "heads": 6}, "width 1000 does not divide into 6 heads"),
        (ModelConfig, {"std": (0.2, 0.0, 0.2)}, "std must be above 0"),
        (ModelConfig, {"head_dropout": True}, "head_dropout must be a finite number, not True"),
        (ModelConfig, {"head_dropout": -0.1}, "head_dropout must be at least 0, not -0.1"),
        (ModelConfig, {"head_dropout": 1.5}, "head_dropout must be at most 1, not 1.5"),
        (TrainConfig, {"captions": "some"}, "captions must be one of first, all, not 'some'"),
        (
            TrainConfig,
            {"learning_rate": "1e-4"},
            "learning_rate must be a finite number, not '1e-4'",
        ),
        (TrainConfig, {"learning_rate": -1}, "learning_rate must be at least 0, not -1"),
        (TrainConfig, {"average": -5}, "average must be at least 0, not -5"),
        (DecodeConfig, {"length_penalty": 182}, "length_penalty must be at most 10, not 182"),
        (TrainConfig, {"clip_norm": "1"}, "clip_norm must be a finite number or null, not '1'"),
        (TrainConfig, {"label_smoothing": 2}, "label_smoothing must be at most 1, not 2"),
        (TrainConfig, {"seed": 10**20}, f"seed must be at most 4294967295, not {10**20}"),
        (
            TrainConfig,
            {"precision": "fp16"},
            "precision must be one of auto, fp32, bf16, not 'fp16'",
        ),
        (DecodeConfig, {"beam": 0}, "beam must be at least 1, not 0"),
        (DecodeConfig, {"beam": 100_000}, "beam must be at most 100, not 100000"),
        (DecodeConfig, {"max_words": 10**9}, "max_words must be at most 1024, not 1000000000"),
        (ModelConfig, {"beam": 101}, "beam must be at most 100, not 101"),
        (
            ModelConfig,
            {"tokenizer": "chars"},
            "tokenizer must be one of whitespace, ptb, bpe, not 'chars'",
        ),
        (
            DecodeConfig,
            {"attention_levels": 100},
            "attention_levels must be one of 15, 31, 63, 127, 255, not 100",
        ),
        (
            DecodeConfig,
            {"attention_levels": 127.0},
            "attention_levels must be one of 15, 31, 63, 127, 255, not 127.0",
        ),
        (
            DecodeConfig,
            {"attention": None},
            "attention must be one of auto, tokens, mean, none, not None",
        ),
        (ListingConfig, {"limit": 0}, "limit must be at least 1, not 0"),
        (
            ListingConfig,
            {"extensions": "jpg,,png"},
            "extensions must be words separated by commas, not 'jpg,,png'; use for example jpg,png",
        ),
        (ListingConfig, {"exclude": "a"}, "exclude must be a tuple, each text, not 'a'"),
        (ListingConfig, {"exclude": ("a", 1)}, "exclude must be a tuple, each text, not ('a', 1)"),
        (
            ListingConfig,
            {"exclude": ("a", "/")},
            "exclude must be a pattern; use for example '*-draft.jpg' or old",
        ),
        (
            ListingConfig,
            {"extensions": ""},
            "extensions must be words separated by commas, not ''; use for example jpg,png",
        ),
        (
            ListingConfig,
            {"extensions": "."},
            "extensions must be words separated by commas, not '.'; use for example jpg,png",
        ),
        (RunConfig, {"engine": "spark"}, "engine must be one of auto, local, ray, not 'spark'"),
        (RunConfig, {"shard_size": 0}, "shard_size must be at least 1, not 0"),
        (
            RunConfig,
            {"shard_size": 10**20},
            f"shard_size must be at most 1000000, not {10**20}",
        ),
        (
            RunConfig,
            {"batch_size": 10**20},
            f"batch_size must be at most 1000000, not {10**20}",
        ),
    ],
)
def test_wrong_values_are_named(kind, values, message):
    _refused(kind, message, **values)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 10**400])
def test_numbers_that_are_not_finite_are_refused(value):
    _refused(
        TrainConfig,
        f"learning_rate must be a finite number, not {value!r}",
        learning_rate=value,
    )
    triple = (0.2, value, 0.2)
    number = "a finite number"
    _refused(ModelConfig, f"std must be {number}, {number}, {number}, not {triple}", std=triple)


@pytest.mark.parametrize(
    "value", [(0.5, 0.5), (0.5,) * 4, 0.5, "abc", ("a", "b", "c"), (True,) * 3]
)
def test_three_numbers_are_three_numbers(value):
    with pytest.raises(
        InputError, match=r"^mean must be a finite number, a finite number, a finite"
    ):
        ModelConfig(mean=value)


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        (ModelConfig, {"grid": None, "head_dropout": 0, "residual_dropout": 1}),
        (ModelConfig, {"image_size": 32, "vocabulary_size": 4, "max_length": 2}),
        (TrainConfig, {"clip_norm": None, "fine_tune_from": None, "label_smoothing": 1.0}),
        (TrainConfig, {"fine_tune_from": 0, "seed": 0, "warmup_steps": 0}),
        (DecodeConfig, {"max_words": 1, "attention_levels": 15}),
        (RunConfig, {"decoders": 1, "max_pixels": 1}),
    ],
)
def test_the_least_and_greatest_values_are_allowed(kind, values):
    made = kind(**values)
    assert {name: getattr(made, name) for name in values} == values


def test_branches_are_dropped_of_a_trained_encoder_only():
    text = "drop_path needs a trained encoder; add --fine-tune-from"
    _refused(TrainConfig, text, drop_path=0.1, fine_tune_from=None)
    assert TrainConfig(drop_path=0.9, fine_tune_from=4).drop_path == 0.9


def test_a_whole_number_is_a_number():
    """Otherwise the same settings would give two fingerprints."""
    first, second = DecodeConfig(length_penalty=1), DecodeConfig(length_penalty=1.0)
    assert json.dumps(dataclasses.asdict(first)) == json.dumps(dataclasses.asdict(second))
    assert type(from_mapping(DecodeConfig, {"length_penalty": 2}).length_penalty) is float


# Parsed JSON.


def test_an_unknown_key_is_refused():
    with pytest.raises(InputError, match=r"^unknown setting colour, size$"):
        from_mapping(ModelConfig, {"size": 1, "width": 64, "colour": 2})


def test_missing_keys_have_their_defaults():
    assert from_mapping(ModelConfig, {"width": 64}) == ModelConfig(width=64)
    assert from_mapping(TrainConfig, {}) == TrainConfig()


@pytest.mark.parametrize("kind", KINDS)
def test_settings_survive_json(kind):
    made = kind()
    assert from_mapping(kind, json.loads(json.dumps(dataclasses.asdict(made)))) == made


def test_a_list_is_three_numbers_and_nothing_else():
    assert from_mapping(ModelConfig, {"mean": [0, 0.5, 1]}).mean == (0, 0.5, 1)
    with pytest.raises(InputError, match=r"^width must be a whole number, not \(64,\)$"):
        from_mapping(ModelConfig, {"width": [64]})


# The settings that there are.


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_valid(preset):
    model, train = PRESETS[preset].model, PRESETS[preset].train
    assert from_mapping(ModelConfig, dataclasses.asdict(model)) == model
    assert from_mapping(TrainConfig, dataclasses.asdict(train)) == train


def test_the_notebooks_preset_is_the_notebook():
    assert PRESETS["notebook"] == Preset(model=ModelConfig(), train=TrainConfig())
    model, train = PRESETS["notebook"].model, PRESETS["notebook"].train
    assert model.backbone == "resnet50.tv_in1k"
    assert (model.image_size, model.grid, model.max_length) == (256, 14, 50)
    assert (model.layers, model.heads, model.width) == (6, 8, 1024)
    assert (model.mean, model.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    dropouts = ("embedding", "attention", "residual", "head")
    assert [getattr(model, f"{name}_dropout") for name in dropouts] == [0.2] * 4
    assert (model.pre_norm, model.tied_embeddings, model.shared_dropout) == (False,) * 3
    assert (train.batch_size, train.learning_rate, train.epochs) == (64, 1e-4, 4)
    assert (train.captions, train.minimum_count) == ("first", 5)
    assert (train.weight_decay, train.weight_decay_of) == (0.01, "all")  # AdamW's own defaults


@pytest.mark.parametrize(("kind", "field"), FIELDS, ids=NAMES)
def test_every_field_has_help_of_one_or_two_sentences(kind, field):
    text = field.metadata["help"]
    assert text == text.strip()
    assert text.isprintable()
    assert text[0].isupper()
    assert text.endswith(".")
    assert len(text) <= 150


@pytest.mark.parametrize(("kind", "field"), FIELDS, ids=NAMES)
def test_a_setting_without_a_value_says_what_happens_then(kind, field):
    if kind is not TrainConfig:  # each preset gives a value, or `none`, which the help explains
        assert field.default is not None or field.metadata["unset"]


@pytest.mark.parametrize(("kind", "field"), FIELDS, ids=NAMES)
def test_every_field_refuses_what_is_of_no_type(kind, field):
    with pytest.raises(InputError, match=rf"^{field.name} must be .+, not <object object at"):
        kind(**{field.name: object()})


@pytest.mark.parametrize(("kind", "field"), FIELDS, ids=NAMES)
def test_every_default_is_within_its_limits(kind, field):
    assert getattr(kind(), field.name) == field.default
    for word, limit, step in (("least", "minimum", -1), ("most", "maximum", 1)):
        value = field.metadata[limit]
        if value is not None:
            with pytest.raises(InputError, match=f"^{field.name} must be at {word} {value}, not "):
                kind(**{field.name: value + step})


@pytest.mark.parametrize("kind", KINDS)
def test_settings_are_frozen_and_named(kind):
    made = kind()
    name = dataclasses.fields(kind)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(made, name, getattr(made, name))
    with pytest.raises(TypeError):
        kind("a value without its name")
    assert hash(made) == hash(kind())


def test_a_changed_copy_is_checked_too():
    with pytest.raises(InputError, match=r"^beam must be at least 1, not 0$"):
        dataclasses.replace(DecodeConfig(), beam=0)


def test_the_endings_of_the_files_to_list():
    assert ListingConfig(extensions=" JPG, .png,tar.gz ").endings == (".jpg", ".png", ".tar.gz")
    assert {".jpg", ".jpeg", ".jfif", ".png", ".webp", ".avif"} <= set(ListingConfig().endings)


def test_no_two_settings_of_a_job_share_a_name():
    """The command line makes options of the fields of all three."""
    for kinds in ([DecodeConfig, RunConfig, ListingConfig], [ModelConfig, TrainConfig]):
        names = [field.name for kind in kinds for field in dataclasses.fields(kind)]
        assert len(names) == len(set(names))


def test_annotations_are_of_the_kinds_that_are_checked():
    for kind, field in FIELDS:
        hint = typing.get_type_hints(kind)[field.name]
        parts = typing.get_args(hint) or (hint,)
        simple = {int, float, str, bool, type(None), Literal["auto"], ...}
        assert typing.get_origin(hint) is typing.Literal or simple.issuperset(parts)


def test_settings_need_neither_torch_nor_ray():
    code = "import sys, captioner.config; print({'torch', 'ray', 'numpy'} & set(sys.modules))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout == "set()\n"


def test_small_splits_punctuation_and_the_notebook_splits_at_white_space():
    assert PRESETS["small"].model.tokenizer == "ptb"
    assert PRESETS["notebook"].model.tokenizer == "whitespace"


def test_the_notebooks_maps_are_the_last_blocks():
    assert PRESETS["notebook"].model.attention_map == "last"
    assert PRESETS["notebook"].model.attention_blur == 0
    assert not PRESETS["notebook"].model.attention_norms
    assert PRESETS["small"].model.attention_map == "mean"
    assert PRESETS["small"].model.attention_blur > 0
    assert PRESETS["small"].model.attention_norms
