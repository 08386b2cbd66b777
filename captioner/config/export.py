"""Settings of an export."""

import re
from dataclasses import dataclass
from typing import Literal

from captioner.config.listing import ListingConfig
from captioner.config.settings import SettingError, Settings, setting

__all__ = ["ExportConfig"]


@dataclass(frozen=True, kw_only=True)
class ExportConfig(Settings):
    """What an export holds, and how it looks."""

    GROUP = "Content"

    where: str | None = setting(
        None,
        'SQL condition that rows must meet, for example "score > -0.5".',
        unset="every row",
    )
    reviewed: Literal["ignore", "accepted", "edited", "all"] = setting(
        "ignore",
        "Captions to export by review decision: accepted (including edited), edited, or all "
        "except rejected; ignore exports the captions as the model wrote them.",
    )
    columns: str | None = setting(
        None, "Columns to export, separated by commas.", unset="those that the format needs"
    )
    prefix: str = setting("", "Text before every caption.")
    suffix: str = setting("", "Text after every caption.")
    existing: Literal["keep", "overwrite", "append", "prepend"] = setting(
        "keep",
        "What to do with a file that the export did not write: keep it and exit with 2, "
        "overwrite it, or, for a sidecar, append or prepend the caption to its text.",
        group="Files",
    )
    extension: str = setting("txt", "File name extension of sidecars.", group="Files")
    root: str | None = setting(
        None,
        "Folder that the paths of sidecars are relative to.",
        unset="the deepest folder that holds all images",
        group="Files",
    )
    id: str | None = setting(
        None,
        "Column with the image ids for the coco format.",
        unset="the number at the end of each file name",
    )
    shard_images: int = setting(
        10_000,
        "Images per tar file of a webdataset.",
        minimum=1,
        maximum=1_000_000,
        group="Files",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not re.fullmatch(r"\.?[\w-]+(\.[\w-]+)*", self.extension):
            raise SettingError("extension", f"must be letters, such as txt, not {self.extension!r}")
        if f".{self.extension.lower()}".endswith(ListingConfig().endings):
            raise SettingError("extension", f"must not be an image's: {self.extension}")
