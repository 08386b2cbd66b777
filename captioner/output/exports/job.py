"""The inputs of an export, and its counts."""

from collections.abc import Callable
from dataclasses import dataclass, field

from captioner import storage
from captioner.config import ExportConfig
from captioner.output.exports.ledger import Ledger
from captioner.output.exports.rows import Rows
from captioner.output.images import OutputImages

__all__ = ["ExportJob", "ExportSummary"]

_EXAMPLES = 5  # files named in a message


@dataclass
class ExportSummary:
    """What an export wrote and what it left out, counted in images."""

    destination: str
    written: int = 0
    unchanged: int = 0
    filtered: int = 0
    not_ok: int = 0
    not_reviewed: int = 0
    unreadable: int = 0
    kept: int = 0
    kept_examples: list[str] = field(default_factory=list)
    shared: int = 0
    shared_example: str = ""

    def describe(self) -> str:
        """One line for a person."""
        counts = {
            "unchanged": self.unchanged,
            "left out by --where": self.filtered,
            "left out because their status is not ok": self.not_ok,
            "left out by --reviewed": self.not_reviewed,
            "left out because they cannot be read": self.unreadable,
            "not exported because a file is in the way": self.kept,
            "not exported because another image has the same sidecar": self.shared,
        }
        rest = "".join(f", {count} {what}" for what, count in counts.items() if count)
        return f"{self.destination}: {self.written} images written{rest}"

    def keep(self, target: str, images: int = 1) -> None:
        """Counts images that are not exported because ``target`` is in the way."""
        self.kept += images
        if len(self.kept_examples) < _EXAMPLES:
            self.kept_examples.append(target)

    def share(self, target: str) -> None:
        """Counts an image whose sidecar is another image's too."""
        self.shared += 1
        self.shared_example = self.shared_example or target


@dataclass(frozen=True)
class ExportJob:
    """The inputs of a format's writer.

    ``destination`` is a file or a folder, or empty for sidecars beside their images. The writer
    calls ``advance`` with the number of images that it has processed.
    """

    rows: Rows
    images: OutputImages
    destination: str
    config: ExportConfig
    ledger: Ledger
    summary: ExportSummary
    advance: Callable[[int], object]

    def text(self, caption: str) -> str:
        """The text of a caption in the export."""
        return f"{self.config.prefix}{caption}{self.config.suffix}"

    def may_write(self, target: str) -> bool:
        """Whether a file does not exist, was written by this export, or may be replaced."""
        version = storage.version(target)
        return (
            not version
            or self.config.existing == "overwrite"
            or self.ledger.version(target) == version
        )
