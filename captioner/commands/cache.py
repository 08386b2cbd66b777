"""``captioner cache``."""

import click

from captioner.errors import printable
from captioner.options import GroupedCommand, option

__all__ = ["cache"]


@click.command(cls=GroupedCommand, short_help="Show or clear what captioner keeps on this machine.")
@click.argument("action", type=click.Choice(["show", "clear"]), default="show")
@option(
    "--kind",
    type=click.Choice(["all", "features", "compiled", "models"]),
    default="all",
    show_default=True,
    group="Options",
    help="What to show or clear: images' features, compiled models, or models from buckets.",
)
def cache(action: str, kind: str) -> None:
    """Show or clear what captioner keeps on this machine to avoid computing it again.

    ACTION is show, the default, which prints the files and their size; or clear, which deletes
    them. Clear the cache while no job runs. Before train writes new features, it deletes the least
    recently used ones that it does not need until all fit into 50 GB.
    """
    from captioner import storage

    names = storage.CACHES if kind == "all" else (kind,)
    handle = storage.clear_cache if action == "clear" else storage.inspect_cache
    for each in map(handle, names):
        text = f"{each.path}: files {each.files}, {each.size / 1e6:,.1f} MB"
        click.echo(printable(f"deleted {text}" if action == "clear" else text))
