"""Captions the photos that scikit-image contains: a demonstration that needs no network."""

from collections.abc import Iterator
from importlib import resources

from captioner import storage
from captioner.caption.job import caption_images
from captioner.config import RunConfig
from captioner.errors import InputError
from captioner.review import gallery, rows

__all__ = ["PHOTOS", "run_demo"]

#: The pictures in scikit-image that show everyday things.
PHOTOS = (
    "astronaut.png",
    "camera.png",
    "chelsea.png",
    "coffee.png",
    "motorcycle_left.png",
    "rocket.jpg",
)


def run_demo(output: str, model: str) -> Iterator[tuple[str, rows.CaptionedRow]]:
    """Captions the photos and draws where the model looked.

    Args:
        output: the directory to write. Its ``photos/`` holds the photos, ``captions/`` the
            captions, ``overlays/`` the drawings, and ``gallery.html`` a page of all photos.
        model: a bundle's directory.

    Yields:
        The URI of each drawing and the captioned row.

    Raises:
        InputError: scikit-image is not installed.
        CaptionerError: see :func:`captioner.caption.job.caption_images`.
    """
    try:
        pictures = resources.files("skimage") / "data"
    except ModuleNotFoundError as error:
        raise InputError(
            "the photos come with scikit-image: install the extra demo (pip install -e '.[demo]')"
        ) from error
    photos, captions = storage.join(output, "photos"), storage.join(output, "captions")
    for name in PHOTOS:
        storage.write(storage.join(photos, name), (pictures / name).read_bytes())
    caption_images(photos, captions, model, run=RunConfig(engine="local"), overwrite=True)
    page = gallery.make_gallery(captions, order="listed")
    storage.write(storage.join(output, "gallery.html"), page.encode())
    for name in PHOTOS:
        row = rows.find_row(captions, name)
        target = storage.join(output, f"overlays/{name.rsplit('.', 1)[0]}.png")
        storage.write(target, rows.draw(captions, row))
        yield target, row
