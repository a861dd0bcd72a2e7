"""Accounts, credentials, and URLs: what is accepted, what is refused, and where secrets never are."""

from __future__ import annotations

import base64
import json
import pickle
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import cloudpickle
import fsspec
import pytest
from azure.core.credentials import AccessToken, AzureNamedKeyCredential, AzureSasCredential

from azstoragetorch import TransferConfig
from azstoragetorch.filesystem import AzureBlobFileSystem, install
from tests.azurite.container import Container
from tests.faults import FaultService
from tests.filesystem.places import connection_string, on_azurite, on_faults
from tests.support import QUICK, ROOT, run_python

KEY = base64.b64encode(b"the account key of a test, 32 by").decode()
SAS = "sv=2023-11-03&sp=r&sig=c2VjcmV0IHNpZ25hdHVyZSBvZiBhIHRlc3QsIHRoaXJ0eXR3bw%3D%3D"
SECRETS = (KEY, SAS, "c2VjcmV0IHNpZ25hdHVyZ", "client-secret-value")
CONNECTION = f"DefaultEndpointsProtocol=https;AccountName=acct;AccountKey={KEY};EndpointSuffix=core.windows.net"
VARIABLES = ("ACCOUNT_NAME", "ACCOUNT_KEY", "SAS_TOKEN", "CONNECTION_STRING")


class Token:
    def get_token(self, *scopes: str, **options: Any) -> AccessToken:
        return AccessToken("token", 2**40)


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(f"AZURE_STORAGE_{name}", raising=False)
    AzureBlobFileSystem.clear_instance_cache()


def create(**options: Any) -> AzureBlobFileSystem:
    return AzureBlobFileSystem(skip_instance_cache=True, **options)


def sas_of(fs: AzureBlobFileSystem) -> str:
    """What would be sent for a request."""
    return fs.account_client().service.authorizer.query()


class TestAccount:
    @pytest.mark.parametrize(
        ("options", "url"),
        [
            ({"account_name": "acct"}, "https://acct.blob.core.windows.net"),
            ({"account_name": "acct", "account_host": "acct.blob.core.chinacloudapi.cn"}, "https://acct.blob.core.chinacloudapi.cn"),
            ({"account_host": "acct.blob.core.windows.net"}, "https://acct.blob.core.windows.net"),
            ({"account_host": "acct.dfs.core.windows.net"}, "https://acct.blob.core.windows.net"),
            ({"account_name": "acct", "account_host": "http://127.0.0.1:10000", "anon": True}, "http://127.0.0.1:10000/acct"),
            ({"account_host": "http://127.0.0.1:10000/acct", "anon": True}, "http://127.0.0.1:10000/acct"),
            ({"connection_string": CONNECTION}, "https://acct.blob.core.windows.net"),
            ({"connection_string": CONNECTION, "account_name": "acct"}, "https://acct.blob.core.windows.net"),
            ({"connection_string": "UseDevelopmentStorage=true"}, "http://127.0.0.1:10000/devstoreaccount1"),
            ({"connection_string": f"BlobEndpoint=https://data.example.com/;SharedAccessSignature={SAS}"}, "https://data.example.com"),
        ],
    )  # fmt: skip
    def test_of_options(self, options: dict[str, Any], url: str) -> None:
        assert create(**options).account.account_url == url

    def test_of_the_environment(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "envacct")
        assert create().account.account_name == "envacct"
        monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_NAME")
        monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", CONNECTION)
        assert create().account.account_name == "acct"

    def test_of_a_connection_string_for_the_account_that_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        text = f"AccountName=acct;AccountKey={KEY};BlobEndpoint=http://127.0.0.1:10000/acct"
        monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", text)
        assert create(account_name="acct").account.account_url == "http://127.0.0.1:10000/acct"
        assert create(account_name="other").account.account_url == "https://other.blob.core.windows.net"

    @pytest.mark.parametrize(
        ("url", "options"),
        [
            ("abfss://c@acct.dfs.core.windows.net/a/b", {"account_name": "acct"}),
            ("wasbs://c@acct.blob.core.windows.net/a/b", {"account_name": "acct"}),
            ("az://acct.blob.core.windows.net/c/a/b", {"account_name": "acct"}),
            ("azt://c@acct.dfs.core.usgovcloudapi.net/a/b", {"account_host": "acct.blob.core.usgovcloudapi.net"}),
            ("az://c/a/b", {}),
            ("abfs://c/a/b", {}),
            ("c/a/b", {}),
            ("/c/a/b", {}),
        ],
    )
    def test_of_a_url(self, url: str, options: dict[str, str]) -> None:
        assert AzureBlobFileSystem._get_kwargs_from_urls(url) == options
        assert AzureBlobFileSystem._strip_protocol(url) == "c/a/b"

    def test_missing(self) -> None:
        with pytest.raises(ValueError, match="no account: pass the storage option account_name"):
            create()

    def test_a_path_in_another_account_is_refused(self) -> None:
        fs = create(account_name="acct", anon=True)
        assert fs._strip_protocol("abfss://c@acct.dfs.core.windows.net/x") == "c/x"
        with pytest.raises(ValueError, match=r"in the account other\.blob\.core\.windows\.net"):
            fs.exists("abfss://c@other.dfs.core.windows.net/x")

    def test_a_custom_host_of_the_same_account(self) -> None:
        fs = create(account_name="acct", account_host="data.example.com", anon=True)
        assert fs._strip_protocol("abfss://c@acct.dfs.core.windows.net/x") == "c/x"

    @pytest.mark.parametrize("url", ["https://acct.blob.core.windows.net/c/x", "s3://c/x"])
    def test_another_protocol(self, url: str) -> None:
        with pytest.raises(ValueError, match="is not a protocol of this file system"):
            create(account_name="acct", anon=True).info(url)

    def test_a_sas_in_a_path_is_refused_and_not_shown(self) -> None:
        with pytest.raises(ValueError, match="pass it as the storage option sas_token") as raised:
            create(account_name="acct", anon=True).info(f"az://c/x?{SAS}")
        assert "c2Vjcm" not in str(raised.value)


class TestCredential:
    @pytest.mark.parametrize(
        ("options", "expected"),
        [
            ({"account_name": "acct", "account_key": KEY}, "sig="),
            ({"account_name": "acct", "sas_token": SAS}, SAS),
            ({"account_name": "acct", "sas_token": f"?{SAS}"}, SAS),
            ({"account_name": "acct", "credential": SAS}, SAS),
            ({"account_name": "acct", "credential": KEY}, "sig="),
            ({"account_name": "acct", "credential": AzureSasCredential(SAS)}, SAS),
            ({"account_name": "acct", "credential": AzureNamedKeyCredential("acct", KEY)}, "sig="),
            ({"connection_string": CONNECTION}, "sig="),
            ({"account_name": "acct", "anon": True}, ""),
            ({"account_name": "acct", "credential": False}, ""),
        ],
    )
    def test_of_options(self, options: dict[str, Any], expected: str) -> None:
        sent = sas_of(create(**options))
        assert expected in sent
        assert bool(sent) == bool(expected)

    def test_a_token(self) -> None:
        fs = create(account_name="acct", credential=Token())
        assert fs.account_client().service.authorizer.headers() == {"Authorization": "Bearer token"}

    def test_a_service_principal(self) -> None:
        fs = create(account_name="acct", tenant_id="t", client_id="i", client_secret="client-secret-value")
        holder = fs.clients._holder
        assert type(holder._credential).__name__ == "ClientSecretCredential"
        with pytest.raises(ValueError, match="are needed together: pass client_secret"):
            create(account_name="acct", tenant_id="t", client_id="i")

    def test_of_the_environment(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("AZURE_STORAGE_SAS_TOKEN", SAS)
        assert sas_of(create(account_name="acct")) == SAS
        monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", KEY)
        assert "sig=" in sas_of(create(account_name="acct"))
        assert SAS not in sas_of(create(account_name="acct"))

    @pytest.mark.parametrize(
        "variables",
        [
            {"AZURE_STORAGE_ACCOUNT_NAME": "envacct", "AZURE_STORAGE_ACCOUNT_KEY": KEY},
            {"AZURE_STORAGE_ACCOUNT_NAME": "envacct", "AZURE_STORAGE_SAS_TOKEN": SAS},
            {"AZURE_STORAGE_CONNECTION_STRING": CONNECTION.replace("=acct", "=envacct")},
        ],
    )
    def test_a_secret_of_the_environment_is_not_used_for_another_account(
        self, variables: dict[str, str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        assert create(account_name="other").clients._holder._credential is None
        assert create(account_name="envacct").clients._holder._credential is not None

    def test_a_secret_of_the_environment_is_not_sent_outside_azure(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("AZURE_STORAGE_SAS_TOKEN", SAS)
        options = AzureBlobFileSystem._get_kwargs_from_urls("abfss://c@evil.example.com/x")
        with pytest.raises(ValueError, match=r"not sent to the host 'evil\.example\.com'"):
            create(**options).ls("c")
        assert sas_of(create(**options, sas_token=SAS)) == SAS  # passed together with the host

    def test_two_are_refused(self) -> None:
        with pytest.raises(ValueError, match="account_key and sas_token contradict each other"):
            create(account_name="acct", account_key=KEY, sas_token=SAS)
        with pytest.raises(ValueError, match="name two accounts"):
            create(account_name="other", connection_string=CONNECTION)

    def test_a_key_that_is_not_one(self) -> None:
        with pytest.raises(ValueError, match="is not base64") as raised:
            create(account_name="acct", account_key="not a key!")
        assert "not a key!" not in str(raised.value)

    def test_a_connection_string_that_is_not_one_is_not_shown(self) -> None:
        with pytest.raises(ValueError, match="copy the whole string") as raised:
            create(connection_string=f"AccountName=acct;{KEY.replace('=', '')}")
        assert KEY[:10] not in str(raised.value)


class TestNames:
    @pytest.mark.parametrize(
        ("name", "hint"),
        [
            ("acount_name", "did you mean 'account_name'"),
            ("sastoken", "did you mean 'sas_token'"),
            ("listings_expiry", "did you mean 'listings_expiry_time'"),
            ("xyz", "the options are account_name,"),
            ("blocksize", r"is one of adlfs: pass transfer=TransferConfig\(block_size"),
            ("socket_timeout", "is one of adlfs: leave it out"),
        ],
    )
    def test_unknown_options_are_errors(self, name: str, hint: str) -> None:
        with pytest.raises(TypeError, match=hint):
            create(account_name="acct", **{name: "value"})

    def test_options_that_zarr_passes_to_every_file_system_have_no_effect(self) -> None:
        fs = create(account_name="acct", anon=True, asynchronous=True, loop=None)
        assert fs.async_impl is False

    def test_types(self) -> None:
        with pytest.raises(TypeError, match="account_key must be a str, not bytes"):
            create(account_name="acct", account_key=b"key")
        with pytest.raises(TypeError, match="credential must be"):
            create(account_name="acct", credential=object())

    def test_transfer_can_be_a_dict(self) -> None:
        assert create(account_name="acct", anon=True, transfer={"max_concurrency": 3}).transfer.max_concurrency == 3
        assert create(account_name="acct", anon=True, transfer=QUICK).transfer is QUICK


WITH_SECRETS = [
    {"account_name": "acct", "account_key": KEY},
    {"account_name": "acct", "sas_token": SAS},
    {"account_name": "acct", "credential": SAS},
    {"account_name": "acct", "credential": AzureSasCredential(SAS)},
    {"account_name": "acct", "credential": AzureNamedKeyCredential("acct", KEY)},
    {"connection_string": CONNECTION},
    {"account_name": "acct", "tenant_id": "t", "client_id": "i", "client_secret": "client-secret-value"},
]


class TestSecrets:
    @pytest.mark.parametrize("options", WITH_SECRETS, ids=lambda options: "-".join(options))
    def test_are_not_shown(self, options: dict[str, Any]) -> None:
        fs = create(**options)
        shown = [repr(fs), str(fs.storage_options), str(fs.storage_args), fs.to_json(), str(fs.to_dict())]
        shown += [fs._fs_token, fs.fsid, fs.unstrip_protocol("c/x"), str(fs.__dask_tokenize__())]
        shown += [pickle.dumps(fs).decode("latin-1"), cloudpickle.dumps(fs).decode("latin-1")]
        assert [(secret, text) for text in shown for secret in SECRETS if secret in text] == []

    @pytest.mark.parametrize("options", WITH_SECRETS, ids=lambda options: "-".join(options))
    def test_reach_child_processes_that_are_started(self, options: dict[str, Any]) -> None:
        fs = create(**options)
        copy = pickle.loads(bytes(ForkingPickler.dumps(fs)))
        assert copy == fs
        if "client_secret" not in options:
            assert "sig=" in sas_of(copy)

    @pytest.mark.parametrize("options", WITH_SECRETS, ids=lambda options: "-".join(options))
    def test_that_were_left_out_are_asked_for_only_when_they_are_needed(self, options: dict[str, Any]) -> None:
        fs = create(**options)
        copy = pickle.loads(cloudpickle.dumps(fs))
        assert (copy, hash(copy), repr(copy)) == (fs, hash(fs), repr(fs))
        assert copy.account == fs.account
        with pytest.raises(ValueError, match="was left out when it was pickled"):
            copy.ls("c")

    @pytest.mark.parametrize("name", ["account_key", "connection_string"])
    def test_that_were_left_out_come_from_the_environment(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        options = {"connection_string": CONNECTION} if name == "connection_string" else WITH_SECRETS[0]
        copy = pickle.loads(pickle.dumps(create(**options)))
        monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", KEY)
        assert "sig=" in sas_of(copy)

    def test_storage_options_create_the_same(self) -> None:
        fs = create(account_name="acct", account_key=KEY)
        again = AzureBlobFileSystem(**fs.storage_options)
        assert again == fs
        assert "sig=" in sas_of(again)
        assert create(account_name="acct", account_key=base64.b64encode(b"x" * 32).decode()) != fs
        assert create(account_name="other", account_key=KEY) != fs

    def test_two_secrets_never_share_an_instance(self) -> None:
        other = base64.b64encode(b"y" * 32).decode()
        first, second = (AzureBlobFileSystem(account_name="acct", account_key=key) for key in (KEY, other))
        assert AzureBlobFileSystem(**first.storage_options) is not AzureBlobFileSystem(**second.storage_options)

    def test_json(self, monkeypatch: pytest.MonkeyPatch) -> None:
        transfer = TransferConfig(max_concurrency=5, trusted_hosts=["a.example.com"])
        fs = create(connection_string=CONNECTION, transfer=transfer, use_listings_cache=False)
        monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", KEY)
        copy = AzureBlobFileSystem.from_json(fs.to_json())
        assert (copy.account, copy.transfer) == (fs.account, transfer)
        assert "sig=" in sas_of(copy)
        assert json.loads(fs.to_json())["protocol"] == "azt"


class TestProcesses:
    def test_pickles_keep_what_is_no_secret(self, fault_service: FaultService) -> None:
        fs = on_faults(fault_service)
        fs.pipe_file("c/x", b"data")
        for dumps in (pickle.dumps, cloudpickle.dumps):
            copy = pickle.loads(dumps(fs))
            assert copy == fs
            assert copy.cat_file("c/x") == b"data"

    def test_a_file_is_pickled_with_its_position_and_version(self, fault_service: FaultService) -> None:
        fs = on_faults(fault_service)
        fs.pipe_file("c/x", b"data")
        with fs.open("c/x") as file:
            assert file.read(1) == b"d"
            copy = pickle.loads(pickle.dumps(file))
        assert (copy.read(), copy.path, copy.fs) == (b"ata", "c/x", fs)
        copy.seek(0)
        fs.pipe_file("c/x", b"other data")
        with pytest.raises(OSError, match="overwritten"):
            pickle.loads(pickle.dumps(copy)).read()
        copy.close()

    def test_a_forked_child_uses_it(self, container: Container) -> None:
        """With its own connections, and the credential of the parent."""
        program = (
            "import os, sys\n"
            "from azstoragetorch.filesystem import AzureBlobFileSystem\n"
            "fs = AzureBlobFileSystem(connection_string=sys.argv[1])\n"
            "path = sys.argv[2] + '/x'\n"
            "fs.pipe_file(path, b'parent')\n"
            "child = os.fork()\n"
            "if not child:\n"
            "    ok = fs.cat_file(path) == b'parent'\n"
            "    fs.pipe_file(path + '2', b'child')\n"
            "    ok = ok and AzureBlobFileSystem(connection_string=sys.argv[1]).cat_file(path + '2') == b'child'\n"
            "    os._exit(0 if ok else 1)\n"
            "assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0\n"
            "print(fs.cat_file(path + '2'))\n"
        )
        assert run_python(program, connection_string(container), container.name) == "b'child'\n"


class TestProtocols:
    def test_the_entry_point(self, tmp_path: Path) -> None:
        """What the installed package declares leads to the class, for azt alone."""
        project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
        declared = project.partition('[project.entry-points."fsspec.specs"]\n')[2].partition("\n\n")[0]
        info = tmp_path / "azstoragetorch_test-1.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: azstoragetorch-test\nVersion: 1\n")
        (info / "entry_points.txt").write_text(f"[fsspec.specs]\n{declared.replace(chr(34), '')}\n")
        program = (
            "import sys\nsys.path.append(sys.argv[1])\nimport fsspec\n"
            "print(fsspec.get_filesystem_class('azt').__name__, 'azstoragetorch.filesystem' in sys.modules)\n"
            "fs, path = fsspec.url_to_fs('azt://c/x', account_name='acct', anon=True)\nprint(fs, path)"
        )
        assert declared.count("=") == 1
        assert run_python(program, str(tmp_path)).splitlines() == [
            "AzureBlobFileSystem True",
            "<AzureBlobFileSystem https://acct.blob.core.windows.net> c/x",
        ]

    def test_install_takes_over_the_protocols_of_adlfs(self) -> None:
        program = (
            "import fsspec, azstoragetorch.filesystem as f\nf.install()\nf.install()\n"
            "url = '://c@acct.dfs.core.windows.net/x'\n"
            "found = [fsspec.url_to_fs(p + url, anon=True)[0] for p in ('az', 'abfs', 'abfss', 'wasbs', 'azt')]\n"
            "print({type(fs) is f.AzureBlobFileSystem for fs in found}, {fs.account.host for fs in found})"
        )
        assert run_python(program) == "{True} {'acct.blob.core.windows.net'}\n"

    @pytest.mark.parametrize(("value", "expected"), [("1", "True"), ("0", "False"), ("", "False")])
    def test_the_environment_installs_it(self, value: str, expected: str) -> None:
        program = (
            "import warnings\nwarnings.simplefilter('error')\nimport sys, azstoragetorch\n"
            "found = 'azstoragetorch.filesystem' in sys.modules\n"
            "azstoragetorch.TransferConfig()\n"
            "from fsspec.registry import registry\nprint(found and registry['abfss'].__name__ == 'AzureBlobFileSystem')"
        )
        assert run_python(program, AZSTORAGETORCH_FSSPEC=value).strip() == expected

    def test_a_missing_fsspec(self) -> None:
        program = (
            "import sys\nsys.modules['fsspec'] = None\ntry:\n    import azstoragetorch.filesystem\n"
            "except ImportError as error:\n    print(error)"
        )
        assert "pip install 'fsspec>=2024.9'" in run_python(program)

    def test_an_open_url(self, container: Container) -> None:
        install()
        options = {"connection_string": connection_string(container)}
        url = f"abfs://{container.name}/a/x.txt"
        with fsspec.open(url, "w", **options) as file:
            file.write("text")
        with fsspec.open(url, "rb", **options) as file:
            assert file.read() == b"text"
        assert container.get("a/x.txt") == b"text"
        assert on_azurite(container).ls(container.name, detail=False) == [f"{container.name}/a"]
