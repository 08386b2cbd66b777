"""Settings of listing: which images of a source are captioned."""

from dataclasses import dataclass

from captioner.config.settings import SettingError, Settings, setting

__all__ = ["ListingConfig"]


@dataclass(frozen=True, kw_only=True)
class ListingConfig(Settings):
    """Which images of a source are captioned."""

    GROUP = "Images"

    extensions: str = setting(
        "jpg,jpeg,jfif,png,webp,avif,jp2,j2k,bmp,gif,tif,tiff",
        "Extensions of the image files in a folder, separated by commas.",
        option="--ext",
    )
    exclude: tuple[str, ...] = setting(
        (),
        "Pattern of names to leave out, files and folders, such as '*-draft.jpg'; one with a slash "
        "is for the path from SOURCE. Repeatable.",
    )
    column: str | None = setting(
        None,
        "Column of image URIs in a list, or of images in Parquet files.",
        unset="uri, or the only column with a usual name such as url, image, file_name or path",
    )
    keep: str | None = setting(
        None,
        "Columns of the source to copy into the output, separated by commas; all for every column, "
        "old=new to rename one.",
        unset="no columns",
    )
    id: str | None = setting(
        None,
        "Column of the source that names its images in messages, beside their URIs; it is kept.",
        unset="no column",
    )
    sample: int | None = setting(
        None,
        "List only a random sample of N images, which --seed chooses; for a first look.",
        minimum=1,
        unset="all images",
    )
    limit: int | None = setting(
        None,
        "List only the first N images, including those already captioned.",
        minimum=1,
        unset="all images",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not all(self.endings):
            raise SettingError(
                "extensions", f"must be words separated by commas, not {self.extensions!r}"
            )
        if not all(pattern.strip("/") for pattern in self.exclude):
            raise SettingError("exclude", "must be a pattern, for example '*-draft.jpg' or old")

    @property
    def endings(self) -> tuple[str, ...]:
        """The extensions, lower case, each with its dot."""
        words = (word.strip().lstrip(".").lower() for word in self.extensions.split(","))
        return tuple(f".{word}" if word else "" for word in words)
