"""Shared by all commands: common options, the parsing of URLs, and exit codes."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass
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

from azstoragetorch._blob.url import BlobURL, parse_url
from azstoragetorch._engine.config import TransferConfig
from azstoragetorch.cli._access import CredentialOptions
from azstoragetorch.cli._output import SIGN_IN, Output
from azstoragetorch.exceptions import AZStorageTorchError, CheckpointNotFoundError

FAILED, USAGE, NOT_FOUND, REFUSED, UNREACHABLE, INTERRUPTED = 1, 2, 3, 4, 5, 130


@dataclass(frozen=True)
class Session:
    """The common options of a command."""

    access: CredentialOptions
    output: Output


class Url(click.ParamType):  # type: ignore[type-arg]  # generic in newer releases only
    """The URL of a container, a folder, or a blob."""

    name = "url"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> BlobURL:
        """Parse *value*."""
        if isinstance(value, BlobURL):
            return value
        try:
            return parse_url(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


def common(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add the common options to a command, which receives a `Session` as its first argument."""

    @click.option("--anonymous", is_flag=True, help="Send no credential; for public containers.")
    @click.option("--sas-env", metavar="NAME", help="Use the SAS in the environment variable NAME.")
    @click.option(
        "--trusted-host",
        "trusted",
        metavar="HOST",
        multiple=True,
        help="Also send the key or SAS of the environment to HOST: data.example.com, or .example.com for a domain.",
    )
    @click.option("--json", "is_json", is_flag=True, help="Print one JSON object per line, and no progress.")
    @click.option("--quiet", "-q", "is_quiet", is_flag=True, help="Print no progress and no notes.")
    @functools.wraps(function)
    def wrapped(
        anonymous: bool, sas_env: str | None, trusted: tuple[str, ...], is_json: bool, is_quiet: bool, **arguments: Any
    ) -> Any:
        output = Output(is_json=is_json, is_quiet=is_quiet)
        try:
            hosts = (*TransferConfig().trusted_hosts, *TransferConfig(trusted_hosts=trusted).trusted_hosts)
            options = CredentialOptions(output.warn, anonymous, sas_env, hosts)
            return function(Session(options, output), **arguments)
        except (AzureError, AZStorageTorchError, OSError, ValueError) as error:
            if isinstance(error, BrokenPipeError):
                raise
            code = exit_code(error)
            output.error(advice(error), code)
            raise click.exceptions.Exit(code) from error

    return wrapped


def examples(lines: str) -> str:
    """The examples of a command, for the end of its help: one per line, ready to paste."""
    shown = (
        line if line.startswith(("tar ", "for ")) else f"azstoragetorch {line}" for line in lines.strip().split("\n")
    )
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in shown)


def advice(error: BaseException) -> str:
    """The message of *error*. If nobody is signed in, it starts with how to sign in."""
    text = str(error)
    cause = error if isinstance(error, ClientAuthenticationError) else error.__cause__
    if isinstance(cause, ClientAuthenticationError) and cause.status_code is None:
        first = text.strip().split("\n", 1)[0].strip()
        of_az = re.search(r"AzureCliCredential: ([^\n]*)", text)
        # DefaultAzureCredential's error starts with the same advice, for Python programs.
        reason = "" if first.startswith("no credential was found") else f" Reason: {first}"
        return f"not signed in. {SIGN_IN}{reason}" + (f" `az`: {of_az[1]}." if of_az else "")
    return text


def exit_code(error: BaseException) -> int:
    """The exit code of a process that *error* ends."""
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
