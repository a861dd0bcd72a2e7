"""The commands by name, and the only place where a command starts and ends."""

from __future__ import annotations

import logging
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

import click
from click.shell_completion import get_completion_class

from azstoragetorch import __version__
from azstoragetorch._blob.secret import redact
from azstoragetorch._files.paths import printable
from azstoragetorch.cli._output import in_a_shell, one_line
from azstoragetorch.cli._session import FAILED, INTERRUPTED, examples

_EXIT_CODES = """Exit codes: 0 success, 1 failure, 2 incorrect usage, 3 not found, 4 no credential or permission denied,
5 service not reachable, 130 interrupted.

Credentials, in this order: a SAS in the URL; --anonymous; --sas-env NAME; AZURE_STORAGE_KEY or
AZURE_STORAGE_SAS_TOKEN (only for the account in AZURE_STORAGE_ACCOUNT, if that is set); DefaultAzureCredential."""

# Newer releases of click raise this error, with the help as its message. Older ones print the help and return.
_NO_ARGUMENTS: tuple[type[click.ClickException], ...] = tuple(
    filter(None, [getattr(click.exceptions, "NoArgsIsHelpError", None)])
)


class _Commands(click.Group):
    """Imports a command when it is used, so that `ls` does not wait for the imports of `checkpoint`."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        return ["doctor", "ls", "cp", "rm", "checkpoint", "safetensors", "manifest", "bench", "azurite", "completion"]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        if cmd_name == "doctor":
            from azstoragetorch.cli._doctor import doctor

            return doctor
        if cmd_name == "ls":
            from azstoragetorch.cli._ls import ls

            return ls
        if cmd_name == "cp":
            from azstoragetorch.cli._cp import cp

            return cp
        if cmd_name == "rm":
            from azstoragetorch.cli._rm import rm

            return rm
        if cmd_name == "checkpoint":
            from azstoragetorch.cli._checkpoint import checkpoint

            return checkpoint
        if cmd_name == "safetensors":
            from azstoragetorch.cli._safetensors import safetensors

            return safetensors
        if cmd_name == "manifest":
            from azstoragetorch.cli._manifest import manifest

            return manifest
        if cmd_name == "bench":
            from azstoragetorch.cli._bench import bench

            return bench
        if cmd_name == "azurite":
            from azstoragetorch.cli._azurite import azurite

            return azurite
        return completion if cmd_name == "completion" else None


@click.group(cls=_Commands, epilog=_EXIT_CODES, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="azstoragetorch")
def app() -> None:
    """Copy, list, and delete blobs, manage checkpoints, and measure transfers."""


@click.command(epilog=examples("completion bash\ncompletion fish"))
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print a script for SHELL that completes commands and options.

    For bash, add this line to ~/.bashrc: eval "$(azstoragetorch completion bash)"
    """
    kind = get_completion_class(shell)
    assert kind is not None
    click.echo(kind(app, {}, "azstoragetorch", "_AZSTORAGETORCH_COMPLETE").source())


def run(arguments: Sequence[str]) -> int:
    """Run the command in *arguments*; returns the exit code."""
    # Clean up also when a cluster's scheduler ends the job.
    signal.signal(signal.SIGTERM, _end)
    with _plain_warnings():
        return _run(arguments)


def _run(arguments: Sequence[str]) -> int:
    try:
        code = app.main(list(arguments), prog_name="azstoragetorch", standalone_mode=False)
    except click.ClickException as error:
        if isinstance(error, _NO_ARGUMENTS):
            click.echo(error.format_message(), err=True)
            return error.exit_code
        text = printable(redact(in_a_shell(one_line(error.format_message()))))
        context = error.ctx if isinstance(error, click.UsageError) else None
        hint = f"\nTry '{context.command_path} --help'." if context is not None else ""
        click.echo(f"azstoragetorch: {text}{hint}", err=True)
        return error.exit_code
    except (KeyboardInterrupt, click.Abort):
        click.echo("azstoragetorch: interrupted", err=True)
        return INTERRUPTED
    except BrokenPipeError:
        sys.stdout = None  # the reader is gone, so the flush at exit would fail
        return FAILED
    return code if isinstance(code, int) else 0


@contextmanager
def _plain_warnings() -> Iterator[None]:
    """Print each warning and each logged warning as one line on stderr, with control characters escaped."""
    handler = logging.StreamHandler()
    handler.setFormatter(_OneLine())
    handler.setLevel(logging.WARNING)
    log = logging.getLogger("azstoragetorch")
    silent = logging.NullHandler()  # the error repeats what azure-identity logs
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        log.addHandler(handler)
        logging.getLogger("azure").addHandler(silent)
        try:
            yield
        finally:
            log.removeHandler(handler)
            logging.getLogger("azure").removeHandler(silent)


class _OneLine(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return _warning(record.getMessage())


def _show_warning(message: Warning | str, *_where: object, **_more: object) -> None:
    click.echo(_warning(str(message)), err=True)


def _warning(message: str) -> str:
    return printable(f"azstoragetorch: warning: {redact(in_a_shell(one_line(message)))}")


def _end(number: int, _frame: FrameType | None) -> None:
    raise SystemExit(128 + number)
