"""Settings: frozen, keyword-only dataclasses, validated when they are made.

A field carries its help, limits and group. The command-line options (:mod:`captioner.options`)
and ``config.json`` both come from the fields. Reading settings needs neither torch nor Ray.
"""

from captioner.config.decode import PRETRAINED_SETTINGS, TEXT_SETTINGS, DecodeConfig
from captioner.config.export import ExportConfig
from captioner.config.listing import ListingConfig
from captioner.config.model import ModelConfig
from captioner.config.parsing import parse_json
from captioner.config.run import RunConfig
from captioner.config.settings import SettingError, from_mapping
from captioner.config.training import PRESETS, LaunchConfig, Preset, TrainConfig

__all__ = [
    "PRESETS",
    "PRETRAINED_SETTINGS",
    "TEXT_SETTINGS",
    "DecodeConfig",
    "ExportConfig",
    "LaunchConfig",
    "ListingConfig",
    "ModelConfig",
    "Preset",
    "RunConfig",
    "SettingError",
    "TrainConfig",
    "from_mapping",
    "parse_json",
]
