"""Commands that show captions: ``review``, ``gallery``, ``show`` and ``demo``."""

import typing

import click

from captioner.commands.importing import importing
from captioner.errors import InputError, printable
from captioner.options import BUNDLED_DEFAULT, GroupedCommand, option

__all__ = ["demo", "gallery", "review", "show"]


@click.command(cls=GroupedCommand, short_help="Serve a page to find, view and correct captions.")
@click.argument("output")
@option(
    "--open",
    "open_browser",
    is_flag=True,
    group="Options",
    help="Open the page in a browser.  [default: off]",
)
@option(
    "--port",
    type=click.IntRange(0, 65535),
    metavar="PORT",
    default=0,
    show_default=True,
    group="Options",
    help="Port to listen on; 0 takes a free one.",
)
@option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    group="Options",
    help="Address to listen on; any other than this machine's own needs --token.",
)
@option(
    "--token",
    metavar="SECRET",
    group="Options",
    help="Secret that the page's address must contain.  [default: none]",
)
def review(output: str, host: str, port: int, token: str | None, open_browser: bool) -> None:
    """Serve a page to find, view and correct the captions in OUTPUT, until Ctrl-C.

    The caption job may still be running. Decisions are written to
    OUTPUT/__captioner/review.parquet; the part files do not change.
    """
    with importing():
        from captioner import storage
        from captioner.review.web.serve import serve

    serve(
        storage.absolute(output),
        host=host,
        port=port,
        token=token,
        open_browser=open_browser,
        announce=lambda address: click.echo(f"review page: {address}  (press Ctrl-C to end)"),
    )


@click.command(cls=GroupedCommand, short_help="Write a page of images, captions and maps.")
@click.argument("output")
@option(
    "-o",
    "--page",
    "target",
    required=True,
    metavar="FILE",
    group="Options",
    help="HTML file to write, local or in a bucket.",
)
@option(
    "--images",
    "count",
    default=100,
    show_default=True,
    group="Options",
    help="Largest number of images on the page.",
)
@option(
    "--order",
    type=click.Choice(["random", "best", "worst", "listed"]),
    default="random",
    show_default=True,
    group="Options",
    help="Which images: a random sample, the highest or lowest scores, or the first listed.",
)
@option("--seed", default=0, show_default=True, group="Options", help="Seed of the random sample.")
def gallery(output: str, target: str, count: int, order: typing.Any, seed: int) -> None:
    """Write a page of images and captions from OUTPUT, with the attention map of each word.

    Point at a word to see where the model looked. The page is one file without scripts or links.
    """
    if not target.lower().endswith((".html", ".htm")):
        raise InputError(f"--page {target}: not an HTML file; use a name that ends with .html")
    with importing():
        from captioner import storage
        from captioner.review.gallery import make_gallery

    place = storage.absolute(target)
    storage.check_target(place)
    page = make_gallery(storage.absolute(output), count=count, order=order, seed=seed)
    storage.write(place, page.encode())
    click.echo(printable(f"wrote {target}"))


@click.command(cls=GroupedCommand, short_help="Draw where the model looked in an image.")
@click.argument("output")
@click.argument("uri")
@option(
    "-o",
    "--image",
    "target",
    required=True,
    metavar="FILE",
    group="Options",
    help="PNG file to write, local or in a bucket.",
)
def show(output: str, uri: str, target: str) -> None:
    """Draw where the model looked in the image URI, word by word, from the captions in OUTPUT.

    URI is the image's URI in OUTPUT, or the end of it if only one image ends so.
    """
    if not target.lower().endswith(".png"):
        raise InputError(f"--image {target}: not a PNG file; use a name that ends with .png")
    with importing():
        from captioner import storage
        from captioner.review import rows

    output, place = storage.absolute(output), storage.absolute(target)
    row = rows.find_row(output, uri)
    rows.refuse_listed(output, place)
    storage.write(place, rows.draw(output, row))
    click.echo(printable(row.caption))
    click.echo(printable(f"wrote {target}"))


@click.command(cls=GroupedCommand, short_help="Caption the photos that come with scikit-image.")
@click.argument("output", default="captioner-demo")
@option("--model", metavar="MODEL", group="Options", help="Model directory." + BUNDLED_DEFAULT)
def demo(output: str, model: str | None) -> None:
    """Caption scikit-image's photos into OUTPUT, and draw where the model looked."""
    with importing():
        from captioner import storage
        from captioner.model import bundle
        from captioner.review.demo import run_demo

    output = storage.absolute(output)
    for drawing, row in run_demo(output, model or bundle.DEFAULT):
        low = " (low score: probably wrong)" if row.is_low else ""
        click.echo(f"{printable(row.caption)}{low}  {printable(drawing)}")
    click.echo(f"gallery of all photos: {printable(storage.join(output, 'gallery.html'))}")
