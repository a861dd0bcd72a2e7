"""The commands by name, the options that all of them take, and what their exit codes mean."""

from __future__ import annotations

import functools
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any

import click
from azure.core.exceptions import (
    AzureError,
    ClientAuthenticationError,
    HttpResponseError,
    ResourceNotFoundError,
    ServiceRequestError,
    ServiceResponseError,
)
from click.shell_completion import get_completion_class

from azstoragetorch import __version__
from azstoragetorch._blob.secret import redact
from azstoragetorch._blob.url import BlobURL, parse_url
from azstoragetorch.cli._access import Access
from azstoragetorch.cli._output import Output, printable
from azstoragetorch.exceptions import AZStorageTorchError, CheckpointNotFoundError

FAILED, USAGE, NOT_FOUND, REFUSED, UNREACHABLE, INTERRUPTED = 1, 2, 3, 4, 5, 130

_EXIT_CODES = """Exit codes: 0 done, 1 something failed, 2 wrong usage, 3 not found, 4 no credential or not permitted,
5 the service could not be reached, 130 interrupted.

Credentials: a SAS in the URL; --anonymous; --sas-env NAME; AZURE_STORAGE_KEY or AZURE_STORAGE_SAS_TOKEN, for the
account that AZURE_STORAGE_ACCOUNT names or, without it, any; else DefaultAzureCredential."""


@dataclass(frozen=True)
class Session:
    """What the common options of a command say."""

    access: Access
    output: Output


class Url(click.ParamType[BlobURL]):
    """The URL of a container, a folder or a blob."""

    name = "url"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> BlobURL:
        """Parse *value*."""
        if isinstance(value, BlobURL):
            return value
        try:
            return parse_url(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


class _Commands(click.Group):
    """Finds commands when they are asked for: `ls` should not wait for what `checkpoint` imports."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        return ["doctor", "ls", "cp", "checkpoint", "bench", "completion"]

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
        if cmd_name == "checkpoint":
            from azstoragetorch.cli._checkpoint import checkpoint

            return checkpoint
        if cmd_name == "bench":
            from azstoragetorch.cli._bench import bench

            return bench
        return completion if cmd_name == "completion" else None


@click.group(cls=_Commands, epilog=_EXIT_CODES, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="azstoragetorch")
def app() -> None:
    """PyTorch on Azure Blob Storage, from the shell."""


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print what makes SHELL complete commands and options.

    bash: eval "$(azstoragetorch completion bash)" in ~/.bashrc.
    """
    kind = get_completion_class(shell)
    assert kind is not None
    click.echo(kind(app, {}, "azstoragetorch", "_AZSTORAGETORCH_COMPLETE").source())


def common(function: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the options that all have; it gets a `Session` as its first argument."""

    @click.option("--anonymous", is_flag=True, help="Send no credential: public containers.")
    @click.option("--sas-env", metavar="NAME", help="Use the SAS in the environment variable NAME.")
    @click.option("--json", "is_json", is_flag=True, help="Print JSON, one object a line, and no progress.")
    @click.option("--quiet", "-q", "is_quiet", is_flag=True, help="No progress and no remarks.")
    @functools.wraps(function)
    def wrapped(anonymous: bool, sas_env: str | None, is_json: bool, is_quiet: bool, **arguments: Any) -> Any:
        output = Output(is_json=is_json, is_quiet=is_quiet)
        try:
            return function(Session(Access(anonymous, sas_env), output), **arguments)
        except (AzureError, AZStorageTorchError, OSError, ValueError) as error:
            if isinstance(error, BrokenPipeError):
                raise
            code = exit_code(error)
            output.error(str(error), code)
            raise click.exceptions.Exit(code) from error

    return wrapped


def exit_code(error: BaseException) -> int:
    """What a process ends with that *error* ended."""
    if isinstance(error, (ResourceNotFoundError, CheckpointNotFoundError, FileNotFoundError)):
        return NOT_FOUND
    if isinstance(error, ClientAuthenticationError):
        return REFUSED
    if isinstance(error, (ServiceRequestError, ServiceResponseError)):
        return UNREACHABLE
    if isinstance(error, ValueError):
        return USAGE
    if isinstance(error, AZStorageTorchError) and error.__cause__ is not None:
        return exit_code(error.__cause__) if isinstance(error.__cause__, AzureError) else FAILED
    if isinstance(error, HttpResponseError) and error.status_code in (401, 403):
        return REFUSED
    return FAILED


def run(arguments: Sequence[str]) -> int:
    """Run the command in *arguments*; returns the exit code."""
    # Clean up what was begun, also when the scheduler of a cluster is in a hurry.
    signal.signal(signal.SIGTERM, _end)
    try:
        code = app.main(list(arguments), prog_name="azstoragetorch", standalone_mode=False)
    except click.ClickException as error:
        text = printable(redact(error.format_message()))
        context = error.ctx if isinstance(error, click.UsageError) else None
        hint = f"\nTry '{context.command_path} --help'." if context is not None else ""
        click.echo(f"azstoragetorch: {text}{hint}", err=True)
        return error.exit_code
    except (KeyboardInterrupt, click.Abort):
        click.echo("azstoragetorch: interrupted", err=True)
        return INTERRUPTED
    except BrokenPipeError:
        sys.stdout = None  # whoever read it is gone; so is the flush at exit
        return FAILED
    return code if isinstance(code, int) else 0


def _end(number: int, _frame: FrameType | None) -> None:
    raise SystemExit(128 + number)
