"""Credentials, exit codes and messages, which are the same for all commands."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from tests.azurite.container import Container
from tests.cli.conftest import Command, run_command
from tests.faults.faults import Stall
from tests.faults.service import FaultService
from tests.support import ROOT, run_python
from tests.test_control_characters import NAMES, is_plain


def test_without_its_extra_it_says_what_to_install() -> None:
    program = (
        "import sys\nsys.modules['rich'] = None\nfrom azstoragetorch.cli import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    print(end.code)"
    )
    ended = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ended.stdout == "2\n"
    assert "pip install click rich" in ended.stderr


def test_the_package_runs_as_a_module() -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "azstoragetorch", "--version"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "azstoragetorch" in ended.stdout


def test_importing_it_needs_no_extra() -> None:
    assert "ok" in run_python(
        "import sys\nsys.modules['click'] = sys.modules['rich'] = None\nimport azstoragetorch.cli\nprint('ok')"
    )


@pytest.mark.parametrize(
    "name", [[], ["doctor"], ["ls"], ["cp"], ["rm"], ["bench"], ["completion"], ["checkpoint", "verify"]]
)
def test_every_command_explains_itself(command: Command, name: list[str]) -> None:
    ended = command(*name, "--help")
    assert ended.code == 0
    assert "Usage: azstoragetorch" in ended.out


@pytest.mark.parametrize("name", [[], ["checkpoint"]])
def test_without_a_command_it_lists_them(command: Command, name: list[str]) -> None:
    ended = command(*name)
    assert "\nCommands:\n" in ended.out + ended.err


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_is_a_script_for_the_shell(command: Command, shell: str) -> None:
    ended = command("completion", shell)
    assert ended.code == 0
    assert "_AZSTORAGETORCH_COMPLETE" in ended.out


def test_completion_completes() -> None:
    """What the completion script requests from the program."""
    ended = run_command(_AZSTORAGETORCH_COMPLETE="bash_complete", COMP_WORDS="azstoragetorch che", COMP_CWORD="1")
    assert ended.out.strip().endswith("checkpoint")


def test_ways_in(container: Container, public_container: Container, command: Command) -> None:
    """A SAS in the URL, in a custom variable or the usual one, the key, and none for a public container."""
    container.put("found", b"x")
    public_container.put("found", b"x")
    key = container.service.account_key
    for arguments, environment in [
        ([container.sas_url], {}),
        ([container.url, "--sas-env", "MY_SAS"], {"MY_SAS": container.sas()}),
        ([container.url], {"AZURE_STORAGE_SAS_TOKEN": f"?{container.sas()}"}),
        ([container.url], {"AZURE_STORAGE_KEY": key}),
        ([container.url], {"AZURE_STORAGE_KEY": key, "AZURE_STORAGE_ACCOUNT": container.service.account_name}),
        ([public_container.url, "--anonymous"], {"AZURE_STORAGE_KEY": "bm9uc2Vuc2U="}),
    ]:
        ended = command("ls", *arguments, **{"AZURE_STORAGE_KEY": "", **environment})
        assert (ended.code, ended.out) == (0, "found\n"), ended.err


def test_a_key_of_another_account_is_not_used(container: Container, command: Command) -> None:
    """DefaultAzureCredential is used instead, whose tokens are not sent over plain http."""
    url = container.url.replace(container.service.account_name, "account")
    ended = command("ls", url, AZURE_STORAGE_ACCOUNT="another")
    assert ended.code == 2
    assert "never sent over plain http" in ended.err


def test_a_key_that_is_not_used_is_said(container: Container, command: Command) -> None:
    """The message names the variable to change, once, and only if the key is not used."""
    ended = command("cp", "-r", container.url, container.blob_url("d"), AZURE_STORAGE_ACCOUNT="another")
    assert ended.err.count("AZURE_STORAGE_KEY not used") == 1
    assert "AZURE_STORAGE_ACCOUNT is another" in ended.err
    assert "warning" not in command("ls", container.url, AZURE_STORAGE_ACCOUNT=container.service.account_name).err


def test_a_misspelt_setting_is_said(container: Container) -> None:
    key = container.service.account_key
    ended = run_command("ls", container.url, AZURE_STORAGE_KEY=key, AZSTORAGETORCH_MAX_CONCURENCY="3")
    assert ended.code == 0
    (line,) = [line for line in ended.err.splitlines() if "CONCURENCY" in line]
    assert line.startswith("azstoragetorch: warning: ")
    assert "AZSTORAGETORCH_MAX_CONCURRENCY" in line


def test_without_a_login_it_says_how_to_get_one() -> None:
    """In one line, in the order in which users try, with shell commands."""
    ended = run_command("ls", "https://account.blob.core.windows.net/c", PATH="/nonexistent", timeout=120)
    assert ended.code == 4
    (line,) = ended.err.splitlines()
    ways = [line.index(way) for way in ("az login", "--sas-env", "AZURE_STORAGE_KEY", "--anonymous")]
    assert ways == sorted(ways)
    assert line.count("az login") == line.count("--sas-env") == 1
    assert "credential=" not in line
    assert "\\n" not in line


@pytest.mark.parametrize(
    "arguments", [["ls", "{other}"], ["ls", "{url}", "--anonymous"], ["cp", "{other}/b", "/dev/null"]]
)
def test_advice_is_for_a_shell(container: Container, command: Command, arguments: list[str]) -> None:
    urls = {"url": container.url, "other": container.url.replace(container.service.account_name, "account")}
    ended = command(*(argument.format(**urls) for argument in arguments), AZURE_STORAGE_KEY="")
    assert ended.code in (2, 4)
    assert "credential=" not in ended.err
    assert "--anonymous" in ended.err


@pytest.mark.parametrize(
    "arguments", [["completion"], ["completion", "\x1b[2J"], ["cpp"], ["ls", "--recursiv", "x"], ["ls", "a\tb\x1b[2J"]]
)
def test_hints_are_without_escapes(command: Command, arguments: list[str]) -> None:
    """Line breaks of the parser become spaces; user input is escaped."""
    ended = command(*arguments)
    assert ended.code == 2
    assert "\\n\\t" not in ended.err
    assert "\x1b" not in ended.err
    assert "Try 'azstoragetorch" in ended.err


def test_every_command_has_examples(command: Command) -> None:
    groups: list[list[str]] = [[name] for name in ("doctor", "ls", "cp", "rm", "bench", "azurite", "completion")]
    groups += [["checkpoint", name] for name in ("ls", "inspect", "verify", "export", "import", "prune")]
    for name in groups:
        shown = command(*name, "--help").out.partition("Examples:\n")[2]
        assert f"azstoragetorch {' '.join(name)} " in shown


def test_the_command_line_shows_them_escaped(command: Command, fault_service: FaultService, tmp_path: Path) -> None:
    for name in NAMES:
        fault_service.put("c", f"d/{name}", b"x")
    url, options = fault_service.container_url("c"), ["--anonymous"]
    for arguments in (
        ["ls", url, "-r"],
        ["ls", url, "-l", "-r"],
        ["cp", "-r", "--dry-run", url, f"{url}/copy"],
        ["cp", "-r", f"{url}/d", f"{tmp_path}/files"],
        ["rm", "-r", "--dry-run", url],
        ["checkpoint", "prune", url, "--incomplete", "--min-age", "-1", "--dry-run"],
        ["checkpoint", "ls", f"{url}/{quote(NAMES[0])}"],
        ["cp", f"{url}/{quote(NAMES[4])}", f"{tmp_path}/missing"],
        ["rm", "-r", "--yes", url],
    ):
        for more in ([], ["--json"]):
            ended = command(*arguments, *more, *options)
            assert is_plain(ended.out), (arguments, ended.out)
            assert is_plain(ended.err), (arguments, ended.err)
    assert fault_service.names("c") == []


def test_warnings_do_not_steer_the_terminal() -> None:
    """Also warnings of the library, whatever names they contain."""
    program = (
        "import logging, sys, warnings\nfrom azstoragetorch.cli import _app, _access\n"
        "def warn(*_):\n    warnings.warn('a\\x1b[2J\\nname')\n"
        "    logging.getLogger('azstoragetorch').warning('b\\x1b[2J')\n    raise ValueError('c')\n"
        "_access.ClientFactory.container = warn\n"
        "sys.exit(_app.run(['ls', 'https://account.blob.core.windows.net/c']))"
    )
    ended = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert ended.stderr.splitlines() == [
        "azstoragetorch: warning: a\\x1b[2J name",
        "azstoragetorch: warning: b\\x1b[2J",
        "azstoragetorch: c",
    ]


@pytest.mark.parametrize("name", ["AZURE_STORAGE_KEY", "AZURE_STORAGE_SAS_TOKEN"])
@pytest.mark.parametrize("account", [{}, {"AZURE_STORAGE_ACCOUNT": "account"}])
def test_a_key_goes_to_no_host_that_begins_like_the_account(
    command: Command, name: str, account: dict[str, str]
) -> None:
    """A SAS signed with the key would give another host access to the account."""
    secrets = {"AZURE_STORAGE_KEY": "", "AZURE_STORAGE_SAS_TOKEN": "", name: "a2V5", **account}
    ended = command("ls", "https://account.evil.example/c", **secrets)
    assert ended.code == 2
    for part in ("--trusted-host account.evil.example", "TRUSTED_HOSTS", "AZURE_STORAGE_ACCOUNT", "--anonymous"):
        assert part in ended.err


@pytest.mark.parametrize("account", [{}, {"AZURE_STORAGE_ACCOUNT": "devstoreaccount1"}])
@pytest.mark.parametrize("way", ["option", "variable"])
def test_a_host_that_names_the_account_in_its_path_gets_the_key_if_the_user_trusts_it(
    command: Command, fault_service: FaultService, monkeypatch: pytest.MonkeyPatch, way: str, account: dict[str, str]
) -> None:
    """Any host can have the account's name in its paths: that proves nothing."""
    fault_service.put("c", "name", b"data")
    resolve = socket.getaddrinfo
    asked: list[str] = []

    def resolve_here(host: str, *more: Any, **options: Any) -> Any:
        asked.append(host)
        return resolve("127.0.0.1", *more, **options)

    monkeypatch.setattr(socket, "getaddrinfo", resolve_here)
    url = fault_service.container_url("c").replace("127.0.0.1", "gateway.example")
    refused = command("ls", url, **account)
    assert (refused.code, asked) == (2, [])
    assert "--trusted-host gateway.example" in refused.err
    options = ["--trusted-host", ".example"] if way == "option" else []
    hosts = {"AZSTORAGETORCH_TRUSTED_HOSTS": ".example"} if way == "variable" else {}
    ended = command("ls", url, *options, **account, **hosts)
    assert (ended.code, ended.out) == (0, "name\n"), ended.err
    assert all("sig" in entry.query for entry in fault_service.log)


def test_a_host_that_is_none_is_refused(command: Command) -> None:
    ended = command("ls", "https://account.blob.core.windows.net/c", "--trusted-host", "https://a.example")
    assert ended.code == 2
    assert "'https://a.example' is not a host" in ended.err


def test_a_key_that_is_not_base64_is_named(command: Command) -> None:
    ended = command("ls", "https://account.blob.core.windows.net/c", AZURE_STORAGE_KEY="not base64!")
    assert ended.code == 2
    assert "AZURE_STORAGE_KEY is not base64" in ended.err
    assert "not base64!" not in ended.err


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["ls", "{url}", "--sas-env", "NOT_SET"], 2),
        (["ls", "https://account.blob.core.windows.net"], 2),
        (["ls"], 2),
        (["frobnicate"], 2),
        (["ls", "{url}/nothing"], 3),
        (["cp", "{url}/nothing", "{here}/file"], 3),
        (["cp", "{here}/nothing", "{url}/blob"], 3),
        (["ls", "{account}/nothing-there"], 3),
        (["ls", "{url}", "--anonymous"], 4),
        (["checkpoint", "inspect", "{url}/nothing"], 3),
        (["checkpoint", "prune", "{url}"], 2),
    ],
)
def test_exit_codes(container: Container, command: Command, tmp_path: Path, arguments: list[str], code: int) -> None:
    container.put("blob", b"x")
    places = {"url": container.url, "here": tmp_path, "account": container.service.account_url}
    ended = command(*(argument.format(**places) for argument in arguments))
    assert ended.code == code, ended.err
    assert ended.err.startswith("azstoragetorch: ")
    assert ended.out == ""


def test_a_wrong_key_is_refused(container: Container, command: Command) -> None:
    ended = command("ls", container.url, AZURE_STORAGE_KEY="bm9uc2Vuc2U=")
    assert ended.code == 4
    assert "403" in ended.err


def test_nobody_listens(command: Command) -> None:
    ended = command("ls", "http://127.0.0.1:1/account/container", "--anonymous", AZSTORAGETORCH_MAX_ATTEMPTS="1")
    assert ended.code == 5


def test_errors_are_json_for_machines(command: Command, container: Container) -> None:
    ended = command("ls", f"{container.url}/nothing", "--json")
    assert ended.code == 3
    error = json.loads(ended.err)
    assert error["exit_code"] == 3
    assert "nothing" in error["error"]


def test_no_secret_is_repeated(container: Container, command: Command) -> None:
    """Not even by the argument parser, which quotes invalid arguments."""
    secret = container.sas()
    signature = secret.partition("sig=")[2].partition("&")[0]
    for arguments in (
        ["ls", container.url, f"{container.url}?{secret}"],
        ["ls", f"{container.service.account_url}?{secret}"],
        ["ls", f"{container.url}?{secret}&unknown=1"],
        ["ls", f"{container.url}/nothing?{secret}"],
        ["cp", f"--{container.url}?{secret}", "x"],
        ["completion", f"{container.url}?{secret}"],
    ):
        ended = command(*arguments)
        assert ended.code in (2, 3)
        assert signature not in ended.out + ended.err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_command_ends_at_once(fault_service: FaultService, number: signal.Signals, code: int) -> None:
    """Also while the service does not respond."""
    fault_service.allow_anonymous()
    fault_service.create_container("data")
    fault_service.script("list_blobs", [Stall(seconds=60)], repeat=True)
    process = subprocess.Popen(
        [sys.executable, "-m", "azstoragetorch.cli", "ls", fault_service.container_url("data"), "--anonymous"],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
    )
    fault_service.wait_for_requests(1, timeout=240)
    process.send_signal(number)
    _, err = process.communicate(timeout=240)
    assert process.returncode == code, err
    assert "Traceback" not in err
