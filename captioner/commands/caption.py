"""``captioner caption``."""

from pathlib import Path
from typing import Any

import click

from captioner.commands.importing import importing
from captioner.commands.settings_file import config_options, format_config
from captioner.config import DecodeConfig, ListingConfig, RunConfig
from captioner.errors import InputError, printable
from captioner.options import BUNDLED_DEFAULT, GroupedCommand, configure, option, options_of

__all__ = ["caption"]


@click.command(cls=GroupedCommand, short_help="Caption images into Parquet files.")
@click.argument("source")
@click.argument("output")
@option(
    "--model",
    metavar="MODEL",
    group="Captions",
    help="Model: a directory, local or in a bucket, or OWNER/NAME[@REVISION] on the Hugging Face "
    "hub." + BUNDLED_DEFAULT,
)
@options_of(DecodeConfig)
@option(
    "--prompt-file",
    metavar="FILE",
    group="Pretrained models",
    help="Text file that holds the prompt, instead of --prompt.  [default: none]",
)
@options_of(ListingConfig)
@option(
    "--dry-run",
    is_flag=True,
    group="Job",
    help="Print what the job would do, and write nothing.  [default: off]",
)
@option(
    "--overwrite",
    is_flag=True,
    group="Job",
    help="First delete what an earlier job wrote to OUTPUT.  [default: off, which resumes]",
)
@options_of(RunConfig)
@config_options
def caption(
    source: str,
    output: str,
    model: str | None,
    prompt_file: str | None,
    overwrite: bool,
    dry_run: bool,
    print_config: bool,
    **options: Any,
) -> None:
    """Caption every image of SOURCE into Parquet files in OUTPUT.

    SOURCE is a folder, which is searched recursively, or a list of image URIs: a .txt, .csv, .tsv,
    .jsonl or .parquet file. SOURCE and OUTPUT may be local or in a bucket. Run the same command
    again to resume a job that was stopped, or to caption new images.
    """
    listing = configure(ListingConfig(), options)
    if prompt_file is not None:
        options["prompt"] = _read_prompt(prompt_file, options["prompt"])
    decode = configure(DecodeConfig(), options)
    run = configure(RunConfig(), options)
    if print_config:
        click.echo(
            format_config(
                click.get_current_context(), [listing, decode, run], replaced=["prompt_file"]
            )
        )
        return
    with importing():
        from captioner.caption.job import caption_images, plan_captioning
        from captioner.model import bundle

    do = plan_captioning if dry_run else caption_images
    done = do(
        source,
        output,
        model or bundle.DEFAULT,
        listing=listing,
        decode=decode,
        run=run,
        overwrite=overwrite,
    )
    click.echo(printable(done.describe()))


def _read_prompt(path: str, given: str | None) -> str:
    """The prompt in a text file.

    Raises:
        InputError: there are two prompts, or the file cannot be read or holds none.
    """
    if given is not None:
        raise InputError("give --prompt or --prompt-file, not both")
    try:
        prompt = Path(path).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read --prompt-file {path}: {error}") from error
    if not prompt:
        raise InputError(f"--prompt-file {path} is empty")
    return prompt
