"""The command line: the group of :mod:`captioner.commands`, its streams, errors and exit codes."""

import io
import logging
import os
import sys
import threading
import warnings
from typing import Any, NoReturn

import click

from captioner import __version__
from captioner.commands.cache import cache
from captioner.commands.caption import caption
from captioner.commands.evaluate import evaluate
from captioner.commands.importing import INTERRUPTED
from captioner.commands.models import average_models, import_model
from captioner.commands.output import compact, export, report
from captioner.commands.review import demo, gallery, review, show
from captioner.commands.train import train
from captioner.errors import CaptionerError, printable, without_signatures
from captioner.options import option
from captioner.runtime.signals import limit_stopping
from captioner.runtime.streams import error_of_stdout, has_own_streams, protect_streams

__all__ = ["main"]

_COMMANDS = (  # in the order of --help: those that most people need come first
    caption,
    review,
    gallery,
    show,
    report,
    export,
    compact,
    train,
    evaluate,
    average_models,
    import_model,
    cache,
    demo,
)
_MOST_SECONDS_TO_STOP = 20  # after a signal: Kubernetes grants 30 seconds


class _Echo(logging.Handler):
    """Sends the library's log lines to stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        click.echo(printable(without_signatures(record.getMessage())), err=True)


class _Commands(click.Group):
    """Prints captioner's errors as one line and exits with their code; ``--debug`` shows more."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The commands in the order in which they are added: by need, not by name."""
        return list(self.commands)

    def main(self, *arguments: Any, **keywords: Any) -> Any:
        """Runs a command; neither a broken stream nor a read that hangs outlives it."""
        protect_streams()
        if has_own_streams():
            limit_stopping(_MOST_SECONDS_TO_STOP)
        try:
            return super().main(*arguments, **keywords)
        except SystemExit as end:
            if not end.code and (reason := error_of_stdout()):
                click.echo(f"captioner: cannot write to standard output: {reason}", err=True)
                raise SystemExit(1) from end
            if end.code and has_own_streams() and _is_at_work():
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(end.code if isinstance(end.code, int) else 1)
            raise

    def parse_args(self, context: click.Context, arguments: list[str]) -> list[str]:
        """Takes arguments as UTF-8, as file names are, in a locale of another encoding too."""
        if sys.getfilesystemencoding() != "utf-8":
            from captioner import storage

            arguments = [storage.from_operating_system(argument) for argument in arguments]
        given = bool(arguments)
        try:
            return super().parse_args(context, arguments)
        except click.UsageError as error:
            if not given:
                raise  # click prints the help
            _exit_with_usage(context, error)

    def invoke(self, context: click.Context) -> Any:
        try:
            return super().invoke(context)
        except CaptionerError as error:
            if context.params.get("debug"):
                raise
            click.echo(_line_of(str(error)), err=True)
            context.exit(error.exit_code)
        except click.UsageError as error:
            _exit_with_usage(context, error)
        except KeyboardInterrupt:
            click.echo(INTERRUPTED, err=True)
            context.exit(130)


def _line_of(message: str) -> str:
    return f"captioner: {printable(without_signatures(message))}"


def _exit_with_usage(context: click.Context, error: click.UsageError) -> NoReturn:
    """Prints an error in the arguments as one line; click's own are three."""
    message = error.format_message()
    end = "" if message.endswith((".", "?")) else "."
    command = (error.ctx or context).command_path
    click.echo(_line_of(f"{message}{end} See {command} --help."), err=True)
    context.exit(error.exit_code)


def _silence_libraries() -> None:
    """Keeps warnings of libraries from the terminal; ``--debug`` and ``python -W`` show them."""
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    logging.lastResort = logging.NullHandler()  # it prints the warnings of loggers without handlers


def _is_at_work() -> bool:
    """Whether threads would keep the process from ending, such as reads that hang."""
    return any(
        not each.daemon for each in threading.enumerate() if each is not threading.main_thread()
    )


@click.group(cls=_Commands, context_settings={"max_content_width": 100})
@click.version_option(__version__, prog_name="captioner")
@option("--debug", is_flag=True, help="Show the traceback of an error.  [default: off]")
def main(debug: bool) -> None:
    """Caption images into Parquet, review and export the captions, train and score models."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr's are: names in any script
    if has_own_streams() and not debug:
        _silence_libraries()
    logger = logging.getLogger("captioner")
    if not any(isinstance(handler, _Echo) for handler in logger.handlers):
        logger.addHandler(_Echo())
    logger.setLevel(logging.INFO)
    logger.propagate = False


for _command in _COMMANDS:
    main.add_command(_command)


if __name__ == "__main__":
    main()
