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
        "Pattern of file and folder names to leave out, such as '*-draft.jpg'; a pattern with a "
        "slash matches the path below SOURCE. Repeatable.",
    )
    column: str | None = setting(
        None,
        "Column of image URIs in a list, or of images in Parquet files.",
        unset="uri, or the only column with a usual name such as url, image, file_name or path",
    )
    keep: str | None = setting(
        None,
        "Columns of the source to copy into the output, separated by commas; all copies every "
        "column, old=new renames one.",
        unset="no columns",
    )
    id: str | None = setting(
        None,
        "Column of the source to show in messages beside an image's URI; it is also kept.",
        unset="no column",
    )
    sample: int | None = setting(
        None,
        "Caption only a random sample of N images, which depends on --seed.",
        minimum=1,
        unset="all images",
    )
    limit: int | None = setting(
        None,
        "Caption only the first N images; finished images count.",
        minimum=1,
        unset="all images",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not all(self.endings):
            raise SettingError(
                "extensions",
                f"must be words separated by commas, not {self.extensions!r}; use for example "
                "jpg,png",
            )
        if not all(pattern.strip("/") for pattern in self.exclude):
            raise SettingError("exclude", "must be a pattern; use for example '*-draft.jpg' or old")

    @property
    def endings(self) -> tuple[str, ...]:
        """The extensions, lower case, each with its dot."""
        words = (word.strip().lstrip(".").lower() for word in self.extensions.split(","))
        return tuple(f".{word}" if word else "" for word in words)
