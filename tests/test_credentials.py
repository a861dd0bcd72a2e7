"""Every accepted credential works, and none is shown, or sent to a host that must not get it."""

from __future__ import annotations

import copy
import gc
import multiprocessing
import pickle
import threading
import time
import warnings
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.reduction import ForkingPickler
from types import SimpleNamespace
from typing import Any
from urllib.parse import parse_qs

import pytest
from azure.core.credentials import AccessToken, AzureNamedKeyCredential, AzureSasCredential
from azure.core.exceptions import (
    ClientAuthenticationError,
    HttpResponseError,
    ResourceNotFoundError,
    ServiceRequestError,
)
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from azstoragetorch import TransferConfig
from azstoragetorch._blob import authorizers
from azstoragetorch._blob.credentials import CredentialHolder, check_credential
from azstoragetorch._blob.secret import Secret, SharedString
from azstoragetorch._blob.url import parse_url
from azstoragetorch._engine.process import PerProcess
from azstoragetorch.datapipes import AzureBlobFileLister, AzureBlobFileReader
from azstoragetorch.datasets import BlobDataset, IterableBlobDataset
from azstoragetorch.exceptions import FatalBlobIOWriteError
from azstoragetorch.io import BlobIO
from tests.azurite.container import Container
from tests.azurite.token import AzuriteTokenCredential
from tests.faults import FaultService, Match, Redirect, Status
from tests.faults.fixtures import LoopbackTls
from tests.support import (
    QUICK,
    blob_client,
    collect_garbage,
    container_client,
    content,
    run_python,
    run_threads,
    taking,
)

DATA = content(300_000)
SCOPE = "https://storage.azure.com/.default"
HTTPS = parse_url("https://account.blob.core.windows.net/c/b")
HTTP = parse_url("http://127.0.0.1:10000/account/c/b")


class Tokens:
    """Returns `token-1`, `token-2`, ... and records the times."""

    def __init__(self, lifetime: float = 3600.0, *, delay: float = 0.0) -> None:
        self.lifetime = lifetime
        self.delay = delay
        self.fetched = 0
        self.scopes: list[tuple[str, ...]] = []
        self.failures: list[Exception] = []

    def get_token(self, *scopes: str, **options: Any) -> AccessToken:
        time.sleep(self.delay)
        self.scopes.append(scopes)
        if self.failures:
            raise self.failures.pop(0)
        self.fetched += 1
        return AccessToken(f"token-{self.fetched}", int(time.time() + self.lifetime))


def set_clock_forward(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """For what decides when a token is renewed."""
    clock = SimpleNamespace(monotonic=time.monotonic, sleep=time.sleep, time=lambda: time.time() + seconds)
    monkeypatch.setattr(authorizers, "time", clock)


def read_and_write(container: Container, url: Callable[[str], str], credential: Any) -> None:
    """Read and write small and large blobs, each checked with the SDK, and list them."""
    for name, size in (("small", 1000), ("large", 300_000)):
        with BlobIO(url(name), "wb", credential=credential, transfer=QUICK) as blob:
            blob.write(DATA[:size])
        assert container.get(name) == DATA[:size]
        container.put(name, DATA[:size][::-1])
        with BlobIO(url(name), "rb", credential=credential, transfer=QUICK) as blob:
            assert blob.read() == DATA[:size][::-1]
    listed = container_client(url("").rstrip("/").replace("/?", "?"), credential=credential)
    assert [name for page in listed.pages() for name in page.names] == ["large", "small"]


class TestWaysIn:
    """Azurite verifies every signature."""

    def test_a_sas_in_the_url(self, container: Container) -> None:
        read_and_write(container, container.blob_sas_url, None)

    def test_a_sas_credential(self, container: Container) -> None:
        read_and_write(container, container.blob_url, container.sas_credential)

    def test_a_sas_credential_with_a_question_mark(self, container: Container) -> None:
        read_and_write(container, container.blob_url, AzureSasCredential(f"?{container.sas()}"))

    def test_an_account_key(self, container: Container) -> None:
        read_and_write(container, container.blob_url, container.key)

    def test_a_token_over_https(self, https_container: Container, token_credential: AzuriteTokenCredential) -> None:
        read_and_write(https_container, https_container.blob_url, token_credential)
        assert token_credential.scopes_asked == [(SCOPE,)]

    def test_a_sas_and_a_key_over_https(self, https_container: Container) -> None:
        read_and_write(https_container, https_container.blob_url, https_container.key)
        read_and_write(https_container, https_container.blob_sas_url, None)

    def test_anonymous_reading_of_a_public_container(self, public_container: Container) -> None:
        public_container.put("large", DATA)
        with BlobIO(public_container.blob_url("large"), "rb", credential=False, transfer=QUICK) as blob:
            assert blob.read() == DATA
        pages = container_client(public_container.url, credential=False).pages()
        assert [page.names for page in pages] == [["large"]]

    def test_the_sas_in_the_url_wins(self, container: Container) -> None:
        """Also over an invalid credential."""
        read_and_write(container, container.blob_sas_url, AzureSasCredential("sig=wrong"))
        with BlobIO(container.blob_sas_url("small"), "rb", credential=Tokens()) as blob:
            assert blob.read()

    def test_a_sas_that_is_updated_while_running(self, container: Container) -> None:
        """Objects created with the old signature use the new one."""
        url = container.put("blob", DATA).partition("?")[0]
        credential = AzureSasCredential(container.sas(valid_for=-60))
        with BlobIO(url, "rb", credential=credential, transfer=QUICK) as blob:
            with pytest.raises(ClientAuthenticationError):
                blob.read()
            credential.update(container.sas())
            assert blob.read() == DATA
        credential.update(container.sas("r"))
        writer = BlobIO(url, "wb", credential=credential, transfer=QUICK)
        credential.update(container.sas("rw"))
        writer.write(DATA[::-1])
        writer.close()
        assert container.get("blob") == DATA[::-1]

    def test_a_key_that_is_updated_while_running(self, container: Container) -> None:
        url = container.put("blob", DATA).partition("?")[0]
        name, key = container.key.named_key
        credential = AzureNamedKeyCredential(name, "d3Jvbmc=")
        with BlobIO(url, "rb", credential=credential) as blob:
            with pytest.raises(ClientAuthenticationError):
                blob.read(1)
            credential.update(name, key)
            assert blob.read() == DATA

    def test_a_minted_sas_is_short_lived_and_made_once(self, fault_service: FaultService) -> None:
        """The key itself is never sent."""
        fault_service.put("c", "b", DATA)
        key = "a2V5a2V5a2V5"
        credential = AzureNamedKeyCredential("account", key)
        for _ in range(2):
            with BlobIO(fault_service.blob_url("c", "b"), "rb", credential=credential, transfer=QUICK) as blob:
                blob.read()
        queries = {entry.target.partition("?")[2] for entry in fault_service.log}
        assert len(queries) == 1
        (expiry,) = parse_qs(queries.pop())["se"]
        assert time.strftime("%Y-%m-%dT%H:%M", time.gmtime(time.time() + 3660)) >= expiry[:16]
        assert not any(key in str(entry) for entry in fault_service.log)


class TestRefusedByTheService:
    def test_without_a_credential(self, container: Container) -> None:
        container.put("blob", DATA)
        with (
            BlobIO(container.blob_url("blob"), "rb", credential=False) as blob,
            pytest.raises((ClientAuthenticationError, ResourceNotFoundError), match="credential="),
        ):
            blob.read()

    def test_a_sas_that_may_not_write(self, container: Container) -> None:
        container.put("blob", DATA)
        with pytest.raises(FatalBlobIOWriteError) as caught, BlobIO(container.blob_sas_url("blob", "r"), "wb") as blob:
            blob.write(b"new")
        assert isinstance(caught.value.__cause__, ClientAuthenticationError)
        for part in ("403", "/blob", "PUT", "request id"):
            assert part in str(caught.value)
        assert container.get("blob") == DATA

    def test_a_wrong_token(self, https_container: Container) -> None:
        https_container.put("blob", DATA)
        credential = AzuriteTokenCredential(audience="https://example.com")
        with (
            BlobIO(https_container.blob_url("blob"), "rb", credential=credential) as blob,
            pytest.raises(ClientAuthenticationError, match=r"40[13].*client request id [0-9a-f]{32}"),
        ):
            blob.read()


class TestTheEmulator:
    """The account of Azurite on this machine needs no credential: its key is published."""

    @pytest.mark.parametrize("host", ["127.0.0.1:10000", "localhost", "[::1]:10000", "127.1.2.3"])
    def test_gets_the_published_key(self, host: str) -> None:
        url = parse_url(f"http://{host}/devstoreaccount1/c/b")
        assert "sig=" in CredentialHolder(None).authorizer(url).query()
        assert "sig=" in pickle.loads(pickle.dumps(CredentialHolder(None))).authorizer(url).query()

    @pytest.mark.parametrize(
        "url",
        [
            "http://127.0.0.1:10000/account/c/b",
            "http://10.0.0.1:10000/devstoreaccount1/c/b",
            "http://azurite:10000/devstoreaccount1/c/b",
            "http://devstoreaccount1.blob.core.windows.net/c/b",
        ],
    )
    def test_is_nowhere_else(self, url: str) -> None:
        with pytest.raises(ValueError, match="a token is never sent over plain http"):
            CredentialHolder(None).authorizer(parse_url(url))

    def test_over_https_takes_a_token(self) -> None:
        """A token, which is sent only to a host that the user trusts."""
        with pytest.raises(ValueError, match=r"not sent to the host '127\.0\.0\.1:10000'"):
            CredentialHolder(None).authorizer(parse_url("https://127.0.0.1:10000/devstoreaccount1/c/b"))

    def test_gets_what_the_user_passed(self) -> None:
        url = parse_url("http://127.0.0.1:10000/devstoreaccount1/c/b")
        assert CredentialHolder(False).authorizer(url).query() == ""
        assert CredentialHolder(AzureSasCredential("sv=1&sig=x")).authorizer(url).query() == "sv=1&sig=x"

    def test_is_reached_without_a_credential(self, emulator_container: Container) -> None:
        with BlobIO(emulator_container.blob_url("b"), "wb") as blob:
            blob.write(DATA)
        assert emulator_container.get("b") == DATA


class TestRefusedByUs:
    @pytest.mark.parametrize("credential", [None, Tokens()], ids=["default", "token"])
    @pytest.mark.parametrize("mode", ["rb", "wb"])
    def test_a_token_over_plain_http(self, fault_service: FaultService, mode: Any, credential: Any) -> None:
        """Raised before anything is sent or a token is requested."""
        fault_service.put("c", "b", DATA)
        with pytest.raises(ValueError, match=r"credential: a token is never sent over plain http.*https"):
            BlobIO(f"{fault_service.origin}/account/c/b", mode, credential=credential)
        assert fault_service.connections_opened == 0

    @pytest.mark.parametrize(
        ("credential", "hint"),
        [
            ("sv=2023&sig=x", "wrap a SAS"),
            (True, ""),
            (1, ""),
            (object(), ""),
            (Tokens, "instance"),
            ({"account_key": "x"}, ""),
        ],
    )
    def test_what_is_not_a_credential(self, credential: Any, hint: str) -> None:
        with pytest.raises(TypeError, match=rf"credential must be None.*False.*TokenCredential.*{hint}") as caught:
            BlobIO(str(HTTPS), "rb", credential=credential)
        assert "sig=x" not in str(caught.value)

    def test_an_asynchronous_one(self) -> None:
        class Async:
            """Like the credentials of azure.identity.aio."""

            async def get_token(self, *scopes: str, **options: Any) -> AccessToken:
                raise AssertionError

            async def get_token_info(self, *scopes: str, **options: Any) -> AccessToken:
                raise AssertionError

        with pytest.raises(TypeError, match="synchronous"):
            check_credential(Async())


class TestTokens:
    @pytest.fixture
    def service(self, https_fault_service: FaultService) -> FaultService:
        https_fault_service.put("c", "b", DATA)
        https_fault_service.require_token("token-1")
        return https_fault_service

    def read(self, service: FaultService, credential: Tokens) -> bytes:
        with BlobIO(service.blob_url("c", "b"), "rb", credential=credential, transfer=QUICK) as blob:
            return blob.read()

    def write(self, service: FaultService, credential: Tokens, data: bytes = DATA) -> None:
        with BlobIO(service.blob_url("c", "new"), "wb", credential=credential, transfer=QUICK) as blob:
            blob.write(data)

    def write_little(self, service: FaultService, credential: Tokens) -> None:
        self.write(service, credential, DATA[:1000])

    def test_one_is_fetched_for_all_threads_and_objects(self, service: FaultService) -> None:
        credential = Tokens(delay=0.1)
        assert run_threads(16, lambda _: self.read(service, credential)) == [DATA] * 16
        self.write(service, credential)
        assert credential.fetched == 1
        assert credential.scopes == [(SCOPE,)]

    def test_none_before_the_first_request(self) -> None:
        credential = Tokens()
        BlobIO(str(HTTPS), "rb", credential=credential).close()
        assert credential.fetched == 0

    @pytest.mark.parametrize(("lifetime", "until"), [(400.0, 200.0), (3600.0, 3300.0)])
    def test_it_is_renewed_before_it_expires(
        self, service: FaultService, monkeypatch: pytest.MonkeyPatch, lifetime: float, until: float
    ) -> None:
        """At half of its lifetime, or five minutes before it expires."""
        service.require_token("token-1", "token-2")
        credential = Tokens(lifetime)
        self.read(service, credential)
        set_clock_forward(monkeypatch, until - 120)
        self.read(service, credential)
        assert credential.fetched == 1
        set_clock_forward(monkeypatch, until)
        self.read(service, credential)
        assert credential.fetched == 2
        accepted = [entry.headers["authorization"] for entry in service.log if entry.status == 401]
        assert accepted == []

    def test_a_renewal_that_fails_leaves_the_old_one_in_use(
        self, service: FaultService, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        credential = Tokens(lifetime=400.0)
        self.read(service, credential)
        set_clock_forward(monkeypatch, 200.0)
        credential.failures = [ServiceRequestError("identity is down")]
        assert self.read(service, credential) == DATA
        assert credential.failures == []

    @pytest.mark.parametrize("action", ["read", "write"])
    def test_one_that_is_refused_is_renewed_once(self, service: FaultService, action: str) -> None:
        """As after a revocation, or with a wrong clock."""
        credential = Tokens()
        getattr(self, action)(service, credential)
        service.require_token("token-2")
        service.reset_log()
        getattr(self, action)(service, credential)
        assert credential.fetched == 2
        assert {entry.headers["authorization"] for entry in service.log if entry.status != 401} == {"Bearer token-2"}
        if action == "write":
            assert service.get("c", "new") == DATA

    def test_sixteen_threads_renew_it_once(self, service: FaultService) -> None:
        credential = Tokens(delay=0.05)
        self.read(service, credential)
        service.require_token("token-2")
        assert run_threads(16, lambda _: self.read(service, credential)) == [DATA] * 16
        assert credential.fetched == 2

    @pytest.mark.parametrize("action", ["read", "write_little", "write"])
    def test_one_that_is_refused_again_is_an_error_at_once(self, service: FaultService, action: str) -> None:
        service.require_token("another")
        credential = Tokens()
        with pytest.raises((ClientAuthenticationError, FatalBlobIOWriteError), match="401"):
            getattr(self, action)(service, credential)
        if action == "write":  # a block that begins after another was refused twice gets a new token
            blocks = Counter(entry.query["blockid"] for entry in service.requests("put_block"))
            assert 1 <= max(blocks.values()) <= 2
        else:
            assert (credential.fetched, len(service.log)) == (2, 2)
        assert not service.exists("c", "new")

    def test_a_throttled_identity_is_asked_again(self, service: FaultService) -> None:
        throttled = HttpResponseError("too many requests")
        throttled.status_code = 429
        credential = Tokens()
        credential.failures = [throttled]
        assert self.read(service, credential) == DATA
        assert credential.fetched == 1

    @pytest.mark.parametrize(
        "failure", [ClientAuthenticationError("no: token=x"), ServiceRequestError("cannot reach identity")]
    )
    def test_an_identity_that_refuses_is_reported_as_it_said(self, service: FaultService, failure: Exception) -> None:
        credential = Tokens()
        credential.failures = [failure]
        with pytest.raises(type(failure), match=str(failure)) as caught:
            self.read(service, credential)
        assert type(pickle.loads(pickle.dumps(caught.value))) is type(failure)
        assert self.read(service, credential) == DATA

    def test_an_identity_with_an_error_of_its_own_is_an_azure_error(self, service: FaultService) -> None:
        class RefusedError(ClientAuthenticationError):
            def __init__(self, tenant: str, scopes: list[str]) -> None:
                super().__init__(f"{tenant} refused {scopes}: access_token=topsecret")

        credential = Tokens()
        credential.failures = [RefusedError("tenant", [SCOPE])]
        with pytest.raises(ClientAuthenticationError, match="tenant refused") as caught:
            self.read(service, credential)
        assert "topsecret" not in repr(caught.value)
        assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)

    def test_a_credential_of_the_newer_protocol(self, service: FaultService) -> None:
        class Newer:
            def get_token_info(self, *scopes: str, options: Any = None) -> AccessToken:
                assert scopes == (SCOPE,)
                return AccessToken("token-1", int(time.time() + 3600))

        service.require_token("token-1")
        assert self.read(service, Newer()) == DATA

    def test_default_azure_credential_is_made_when_it_is_needed(
        self, service: FaultService, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """There is one for each process: `None` is the same credential everywhere."""
        made: list[Tokens] = []

        def make() -> Tokens:
            made.append(Tokens())
            return made[-1]

        monkeypatch.setattr("azure.identity.DefaultAzureCredential", make)
        monkeypatch.setattr("azstoragetorch._blob.credentials._registry", PerProcess(dict))
        readers = [BlobIO(service.blob_url("c", "b"), "rb", transfer=QUICK) for _ in range(3)]
        assert made == []
        assert [reader.read() for reader in readers] == [DATA] * 3
        assert [tokens.fetched for tokens in made] == [1]

    def test_azure_identity_is_not_imported_before(self) -> None:
        program = (
            "import sys\nfrom azstoragetorch.io import BlobIO\n"
            "BlobIO('https://account.blob.core.windows.net/c/b', 'rb')\n"
            "print([name for name in sys.modules if name.startswith('azure.identity')])"
        )
        assert run_python(program) == "[]\n"


class TestOtherHosts:
    """A redirect is not followed: neither the token nor the data reaches the other host."""

    @pytest.mark.parametrize("status", [301, 302, 307, 308])
    @pytest.mark.parametrize("operation", ["get_blob", "put_blob", "put_block", "put_block_list", "list_blobs", "head"])
    def test_nothing_goes_there(
        self, https_fault_service: FaultService, fault_service: FaultService, operation: str, status: int
    ) -> None:
        service, other = https_fault_service, fault_service
        service.put("c", "b", DATA)
        other.put("c", "b", b"planted")
        service.script(operation, [Redirect(other.origin, status)], repeat=True)
        url, credential = service.blob_url("c", "b"), Tokens()
        with taking(), pytest.raises((HttpResponseError, FatalBlobIOWriteError), match=str(status)):
            if operation == "get_blob":
                BlobIO(url, "rb", credential=credential, transfer=QUICK).read()
            elif operation == "list_blobs":
                list(container_client(service.container_url("c"), credential=credential).pages())
            elif operation == "head":
                blob_client(url, credential=credential).version()
            else:
                with BlobIO(url, "wb", credential=credential, transfer=QUICK) as blob:
                    blob.write(DATA if operation != "put_blob" else b"new")
        assert other.connections_opened == 0
        assert service.get("c", "b") == DATA
        assert service.requests(operation)

    def test_a_sas_neither(self, fault_service: FaultService) -> None:
        with FaultService() as other:
            fault_service.script(Match(), [Redirect(other.origin)], repeat=True)
            url = fault_service.blob_url("c", "b", sv="1", sig="topsecret")
            with pytest.raises(HttpResponseError) as caught:
                BlobIO(url, "rb", transfer=QUICK).read()
            assert other.connections_opened == 0
        assert "topsecret" not in str(caught.value)


class FixedToken:
    """A token that can be pickled."""

    def get_token(self, *_scopes: str, **_options: Any) -> AccessToken:
        return AccessToken("token", int(time.time()) + 3600)


class TestHosts:
    """Credentials are sent to hosts of Azure and to hosts that the user trusts."""

    KEY = AzureNamedKeyCredential("account", "a2V5")

    def credentials(self) -> list[Any]:
        return [Tokens(), AzureSasCredential("sig=x"), AzureNamedKeyCredential("account", "a2V5")]

    @pytest.mark.parametrize(
        "host",
        [
            "account.blob.core.windows.net",
            "account.privatelink.blob.core.windows.net",
            "account.z12.blob.storage.azure.net",
            "account.dfs.core.windows.net",
            "account.blob.core.chinacloudapi.cn",
        ],
    )
    def test_azure_gets_them_whatever_names_it(self, host: str) -> None:
        for credential in self.credentials():
            assert not CredentialHolder(credential).authorizer(parse_url(f"https://{host}/c")).is_anonymous

    @pytest.mark.parametrize(
        "host",
        [
            "evil.example",
            "account.evil.example",
            "account.blob.core.windows.net.evil.example",
            "evilblob.core.windows.net",
            "10.0.0.1",
            "azurite",
        ],
    )
    def test_another_host_gets_none_unless_the_user_names_it(self, host: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """The error names the host and says how to allow it."""
        url = parse_url(f"https://{host}/account/c")
        for credential in self.credentials():
            with pytest.raises(
                ValueError,
                match=rf'{host}.*trusted_hosts=\["{host}"\].*AZSTORAGETORCH_TRUSTED_HOSTS={host}.*credential=False',
            ):
                CredentialHolder(credential).authorizer(url)
            with pytest.raises(ValueError, match="TRUSTED_HOSTS"):
                CredentialHolder(credential, trusted_url=parse_url("https://other.example/c")).authorizer(url)
            assert CredentialHolder(credential, trusted_url=url).authorizer(url)
        assert CredentialHolder(False).authorizer(url).is_anonymous
        assert CredentialHolder(None, Secret("sig=x")).authorizer(url).query() == "sig=x"
        monkeypatch.setenv("AZSTORAGETORCH_TRUSTED_HOSTS", f"first.example, {host}")
        for trusted in (TransferConfig(), TransferConfig(trusted_hosts=[host])):
            for credential in self.credentials():
                assert CredentialHolder(credential).authorizer(url, trusted.trusted_hosts)

    @pytest.mark.parametrize(
        ("trusted", "host", "is_trusted"),
        [
            (".example.com", "data.example.com", True),
            ("*.example.com", "a.b.example.com", True),
            (".example.com", "example.com", False),
            (".example.com", "badexample.com", False),
            ("example.com", "data.example.com", False),
            ("data.example.com:8443", "data.example.com:8443", True),
            ("data.example.com:8443", "data.example.com", False),
            ("data.example.com:443", "data.example.com", True),
            ("DATA.example.com", "data.example.com:9", True),
        ],
    )
    def test_what_an_entry_means(self, trusted: str, host: str, is_trusted: bool) -> None:
        holder, url = CredentialHolder(AzureSasCredential("sig=x")), parse_url(f"https://{host}/c")
        hosts = TransferConfig(trusted_hosts=[trusted]).trusted_hosts
        if is_trusted:
            assert holder.authorizer(url, hosts)
        else:
            with pytest.raises(ValueError, match="TRUSTED_HOSTS"):
                holder.authorizer(url, hosts)

    def test_emulators_get_keys_and_sas_but_no_token(self) -> None:
        url = parse_url("https://127.0.0.1:1/devstoreaccount1/c")
        token, sas, key = self.credentials()
        assert CredentialHolder(sas).authorizer(url)
        assert CredentialHolder(key).authorizer(url)
        with pytest.raises(ValueError, match="TRUSTED_HOSTS"):
            CredentialHolder(token).authorizer(url)

    def test_a_list_of_urls_sends_no_token_to_a_host_that_it_names(self, https_fault_service: FaultService) -> None:
        """Nothing is sent there and no token is requested; a host passed with the credential is trusted."""
        service, credential = https_fault_service, Tokens()
        service.put("c", "b", b"data")
        urls = ["https://account.blob.core.windows.net/c/a", service.blob_url("c", "b")]
        dataset = BlobDataset.from_blob_urls(urls, credential=credential)
        with pytest.raises(ValueError, match=r"TRUSTED_HOSTS=127\.0\.0\.1"):
            dataset[1]
        pipe = AzureBlobFileReader([urls[1]], credential=credential)
        with pytest.raises(ValueError, match=r"TRUSTED_HOSTS=127\.0\.0\.1"):
            list(pipe)
        assert (service.connections_opened, credential.fetched) == (0, 0)
        listed = list(
            AzureBlobFileReader(
                AzureBlobFileLister(service.container_url("c"), credential=credential), credential=credential
            )
        )
        assert [data for _, data in listed] == [b"data"]
        assert BlobDataset.from_blob_urls(urls[1], credential=Tokens())[0]["data"] == b"data"

    @pytest.mark.parametrize("method", ["fork", "spawn"])
    def test_trusted_hosts_of_a_configuration(
        self, https_fault_service: FaultService, method: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Every face that takes URLs from elsewhere sends the credential to them, in workers too; no other does."""
        service, credential = https_fault_service, FixedToken()
        service.put("c", "b", b"data")
        urls = ["https://account.blob.core.windows.net/c/a", service.blob_url("c", "b")]
        trusting = replace(QUICK, trusted_hosts=["127.0.0.1"])
        for hosts in ("", "127.0.0.1"):
            # A worker of a trusting object trusts; what an argument says counts, not what its process says.
            monkeypatch.setenv("AZSTORAGETORCH_TRUSTED_HOSTS", hosts)
            dataset = BlobDataset.from_blob_urls(urls, credential=credential, transfer=trusting)
            assert dataset[1]["data"] == b"data"
            loader: Any = DataLoader(
                IterableBlobDataset.from_blob_urls(urls[1:] * 2, credential=credential, transfer=trusting),
                None,
                num_workers=1,
                multiprocessing_context=method,
                timeout=240,
            )
            assert [sample["data"] for sample in loader] == [b"data"] * 2
            assert [data for _, data in AzureBlobFileReader(urls[1:], credential=credential, transfer=trusting)] == [
                b"data"
            ]
        distrusting = BlobDataset.from_blob_urls(urls, credential=credential, transfer=replace(QUICK, trusted_hosts=()))
        requests = len(service.log)
        with pytest.raises(ValueError, match=r'trusted_hosts=\["127\.0\.0\.1:\d+"\]'):
            distrusting[1]
        assert len(service.log) == requests

    def test_a_host_that_was_named_is_known_in_another_process(self) -> None:
        url = parse_url("https://data.example.com/c")
        for credential in (AzureSasCredential("sig=x"), self.KEY, None):
            CredentialHolder(credential, trusted_url=url)
            pickled = ForkingPickler.dumps(CredentialHolder(credential))
            assert ForkingPickler.loads(pickled).authorizer(url)


class TestTenants:
    """If the account is in another tenant, its response says so once, and a token of that tenant is requested."""

    TENANT = "11111111-2222-3333-4444-555555555555"

    class Identity:
        """Returns ``home-1``, ``home-2``, ... and, for a tenant, ``<tenant>-1``, ..."""

        def __init__(self) -> None:
            self.asked: list[str | None] = []

        def get_token(self, *scopes: str, tenant_id: str | None = None, **options: Any) -> AccessToken:
            assert (scopes, options) == ((SCOPE,), {})
            self.asked.append(tenant_id)
            return AccessToken(f"{tenant_id or 'home'}-{self.asked.count(tenant_id)}", int(time.time() + 3600))

    def service(self, service: FaultService, challenge: str) -> None:
        service.put("c", "b", DATA)
        service.require_token(f"{self.TENANT}-1")
        service.challenge = challenge

    def challenge(self, tenant: str = TENANT, resource: str = "https://storage.azure.com") -> str:
        where = f"https://login.microsoftonline.com/{tenant}/oauth2/authorize"
        return f"Bearer authorization_uri={where} resource_id={resource}"

    def test_that_tenant_is_asked_once(self, https_fault_service: FaultService) -> None:
        self.service(https_fault_service, self.challenge(resource="https://graph.microsoft.com"))
        identity = self.Identity()
        for _ in range(2):
            with BlobIO(https_fault_service.blob_url("c", "b"), "rb", credential=identity, transfer=QUICK) as blob:
                assert blob.read() == DATA
        with BlobIO(https_fault_service.blob_url("c", "new"), "wb", credential=identity, transfer=QUICK) as blob:
            blob.write(DATA)
        assert identity.asked == [None, self.TENANT]

    def test_an_identity_of_the_newer_protocol_too(self, https_fault_service: FaultService) -> None:
        self.service(https_fault_service, f'Bearer authorization_uri="https://login.microsoftonline.com/{self.TENANT}"')
        tenant = self.TENANT

        class Newer:
            def get_token_info(self, *scopes: str, options: Any = None) -> AccessToken:
                return AccessToken(f"{tenant}-1" if options == {"tenant_id": tenant} else "home", 1 << 40)

        with BlobIO(https_fault_service.blob_url("c", "b"), "rb", credential=Newer(), transfer=QUICK) as blob:
            assert blob.read() == DATA

    @pytest.mark.parametrize(
        "challenge",
        [
            "",
            "Bearer",
            "Basic realm=x",
            "Bearer authorization_uri=https://login.microsoftonline.com/",
            "Bearer authorization_uri=http://login.microsoftonline.com/11111111-2222-3333-4444-555555555555",
            "Bearer authorization_uri=https://login.microsoftonline.com/../11111111-2222-3333-4444-555555555555",
            "Bearer authorization_uri=https://login.microsoftonline.com/evil.example/x",
            "Bearer authorization_uri=https://login.microsoftonline.com/11111111-2222-3333-4444-555555555555%0d",
        ],
    )
    def test_what_names_no_tenant_asks_for_another_token(
        self, https_fault_service: FaultService, challenge: str
    ) -> None:
        self.service(https_fault_service, challenge)
        identity = self.Identity()
        with (
            BlobIO(https_fault_service.blob_url("c", "b"), "rb", credential=identity, transfer=QUICK) as blob,
            pytest.raises(ClientAuthenticationError, match="401"),
        ):
            blob.read(1)
        assert set(identity.asked) == {None}

    def test_each_account_has_its_tenant(self, loopback_tls: LoopbackTls, https_fault_service: FaultService) -> None:
        other, identity = self.TENANT.replace("1", "9"), self.Identity()
        self.service(https_fault_service, self.challenge())
        with FaultService(ssl_context=loopback_tls.server_context) as second:
            second.put("c", "b", DATA)
            second.require_token(f"{other}-1")
            second.challenge = self.challenge(other)
            for service in (https_fault_service, second, https_fault_service, second):
                with BlobIO(service.blob_url("c", "b"), "rb", credential=identity, transfer=QUICK) as blob:
                    assert blob.read() == DATA
        assert identity.asked == [None, self.TENANT, other]

    def test_a_sovereign_cloud_has_its_own_audience(self) -> None:
        asked: list[tuple[str, ...]] = []

        class Identity:
            def get_token(self, *scopes: str, **options: Any) -> AccessToken:
                asked.append(scopes)
                return AccessToken("token", int(time.time() + 3600))

        holder = CredentialHolder(Identity())
        for host in ("account.blob.core.windows.net", "account.blob.core.chinacloudapi.cn"):
            holder.authorizer(parse_url(f"https://{host}/c")).headers()
        assert asked == [(SCOPE,), ("https://account.blob.core.chinacloudapi.cn/.default",)]


class TestWaiting:
    """No thread waits for a lock: a token is fetched on a separate thread."""

    def test_a_signal_handler_gets_a_token_while_the_main_thread_waits_for_it(self, loopback_tls: LoopbackTls) -> None:
        """The handler runs at every line of the wait and of the start of the fetch."""
        program = """
import signal, sys, time
from azure.core.credentials import AccessToken
from azstoragetorch._blob.credentials import CredentialHolder
from azstoragetorch._blob.url import parse_url

url = parse_url("https://account.blob.core.windows.net/c")

class Identity:
    def get_token(self, *scopes, **options):
        time.sleep(0.01)
        return AccessToken("token", int(time.time()) + 3600)

done = 0
for stop in range(1, 400):
    authorizer = CredentialHolder(Identity()).authorizer(url)
    seen = 0
    def trace(frame, event, argument):
        global seen
        name = frame.f_code.co_filename
        if not name.endswith(("authorizers.py", "job.py", "threads.py", "process.py")):
            return None
        if event == "line":
            seen += 1
            if seen == stop:
                sys.settrace(None)
                assert authorizer.headers() == {"Authorization": "Bearer token"}
        return trace
    sys.settrace(trace)
    assert authorizer.headers() == {"Authorization": "Bearer token"}
    sys.settrace(None)
    if seen < stop:
        break
    done = stop
print(done)
"""
        assert int(run_python(program, timeout=100)) > 20

    def test_all_that_wait_get_the_error_of_the_one_fetch(self, https_fault_service: FaultService) -> None:
        credential = Tokens(delay=0.2)
        credential.failures = [ClientAuthenticationError("refused")] * 16
        authorizer = CredentialHolder(credential).authorizer(HTTPS)

        def ask(_: int) -> str:
            with pytest.raises(ClientAuthenticationError, match="refused") as caught:
                authorizer.headers()
            return str(caught.value)

        assert run_threads(8, ask) == ["refused"] * 8
        assert len(credential.failures) > 8

    def test_an_error_is_in_no_cycle(self) -> None:
        credential = Tokens()
        credential.failures = [ClientAuthenticationError("refused")]
        authorizer = CredentialHolder(credential).authorizer(HTTPS)
        collect_garbage()
        gc.disable()
        try:
            try:
                authorizer.headers()
            except ClientAuthenticationError as error:
                known = weakref.ref(error)
            assert known() is None
        finally:
            gc.enable()


def sign_twice(holder: CredentialHolder, pipe: Any) -> None:
    """In a child process: sign, wait, and sign again; sends what has changed, and the key."""
    before = holder.authorizer(HTTP).query()
    pipe.send("signed")
    pipe.recv()
    pipe.send((holder.authorizer(HTTP).query() != before, tuple(holder._credential.named_key)))


class TestUpdates:
    """An update of a SAS or key in the main process reaches running workers."""

    @pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
    def test_of_a_sas(self, fault_service: FaultService, method: str) -> None:
        """Persistent workers continue after the old SAS is refused, in the epoch in which it was updated."""
        for number in range(24):
            fault_service.put("c", f"{number:02}", b"x")
        fault_service.require_sas("old")
        sas = AzureSasCredential("sv=1&sig=old")
        transfer = replace(QUICK, max_connections=2)
        dataset = IterableBlobDataset.from_container_url(
            fault_service.container_url("c"), credential=sas, transfer=transfer
        )
        loader: Any = DataLoader(
            dataset,
            None,
            num_workers=2,
            persistent_workers=True,
            prefetch_factor=1,
            multiprocessing_context=method,
            timeout=240,
        )
        for epoch in range(2):
            count = 0
            for _ in loader:
                count += 1
                if (epoch, count) == (0, 4):
                    sas.update("sv=1&sig=new")
                    fault_service.require_sas("new")
            assert count == 24
        loader._iterator._shutdown_workers()
        assert {entry.query["sig"] for entry in fault_service.log if entry.status in (200, 206)} == {"old", "new"}

    @pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
    def test_of_a_key(self, method: str) -> None:
        credential = AzureNamedKeyCredential("account", "a2V5")
        holder = CredentialHolder(credential)
        before = holder.authorizer(HTTP).query()
        context: Any = multiprocessing.get_context(method)
        ours, theirs = context.Pipe()
        process = context.Process(target=sign_twice, args=(holder, theirs), daemon=True)
        process.start()
        theirs.close()
        assert ours.poll(240)
        assert ours.recv() == "signed"
        credential.update("account", "b3RoZXI=")
        after = holder.authorizer(HTTP).query()
        ours.send("again")
        assert ours.poll(240)
        changed, of_child = ours.recv()
        process.join(240)
        assert changed
        assert after != before
        assert of_child == ("account", "b3RoZXI=")

    @pytest.mark.parametrize("kind", ["sas", "key"])
    def test_a_system_that_cannot_share_memory_says_so(self, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """As on macOS and Windows: a process made by spawn has a copy. One made by fork shares the memory anyway."""
        monkeypatch.delattr("os.memfd_create")
        credential: Any = AzureSasCredential("sig=x") if kind == "sas" else AzureNamedKeyCredential("account", "a2V5")
        value = ["sig=y"] if kind == "sas" else ["account", "b3RoZXI="]
        holder = CredentialHolder(credential)
        pickle.dumps(holder)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            credential.update(*value)
        process = multiprocessing.get_context("spawn").Process(target=repr, args=(holder,))
        process.start()
        process.join(240)
        with pytest.warns(RuntimeWarning, match="does not reach processes that were started .* by spawn") as caught:
            credential.update(*value)
        assert caught[0].filename == __file__
        assert "sig=y" in holder.authorizer(HTTP).query() or kind == "key"

    def test_the_object_stays_what_it_is(self) -> None:
        sas, key = AzureSasCredential("sig=x"), AzureNamedKeyCredential("account", "a2V5")
        for credential in (sas, key):
            CredentialHolder(credential)
        for credential in (sas, copy.copy(sas), copy.deepcopy(sas)):
            assert isinstance(credential, AzureSasCredential)
            assert credential.signature == "sig=x"
        assert pickle.loads(pickle.dumps(key)).named_key == ("account", "a2V5")
        copied = copy.copy(sas)
        copied.update("sig=y")
        assert sas.signature == "sig=x"
        with pytest.raises(TypeError):
            sas.update(1)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="too long"):
            sas.update("sig=" + "x" * 20_000)

    @given(st.lists(st.text(max_size=300), max_size=20))
    def test_shared_memory_holds_what_was_set_last(self, values: list[str]) -> None:
        shared = SharedString("first")
        for value in values:
            shared.set(value)
            assert shared.get() == value
        assert shared.get() == (values[-1] if values else "first")

    def test_the_end_of_an_interpreter_is_silent(self) -> None:
        """It clears the globals of modules, perhaps before the last object goes away."""
        program = (
            "import os, sys, azstoragetorch._blob.secret as module\n"
            "shared, names = module.SharedString('x'), vars(module)\n"
            "fd = shared._fd\n"
            "names.update(dict.fromkeys([name for name in names if name != '__builtins__']))\n"
            "sys.unraisablehook = lambda found: print(found.exc_value)\n"
            "del shared\n"
            "try: os.fstat(fd)\n"
            "except (OSError, TypeError): print('closed')"
        )
        assert run_python(program) == "closed\n"


class TestBadValues:
    """Values that cannot be sent are refused when they are passed, and the error names the argument."""

    @pytest.mark.parametrize("character", ["\r\n", "\n", "\0", " ", "\t", "\x7f", "ü", "\x1b"])
    def test_a_sas_with_a_control_character(self, character: str) -> None:
        for text in (f"sv=1&sig=secret{character}", f"sv=1{character}X: y&sig=secret"):
            with pytest.raises(ValueError, match="credential: the SAS has a space, a line break") as caught:
                BlobIO(str(HTTPS), "rb", credential=AzureSasCredential(text))
            assert "secret" not in str(caught.value)
            assert caught.value.__cause__ is None

    def test_one_that_comes_with_an_update(self, fault_service: FaultService) -> None:
        fault_service.put("c", "b", DATA)
        sas = AzureSasCredential("sig=x")
        with BlobIO(fault_service.blob_url("c", "b"), "rb", credential=sas, transfer=QUICK) as blob:
            sas.update("sig=x\r\nx-evil: 1")
            with pytest.raises(ValueError, match="credential: the SAS"):
                blob.read()
        assert fault_service.connections_opened == 0

    @pytest.mark.parametrize("key", ["not base64!", "YQ", "", "a2V5\r\nX: y", "schlüssel"])
    def test_a_key_that_is_not_base64(self, key: str) -> None:
        with pytest.raises(ValueError, match="credential: the account key of 'account' is not base64") as caught:
            BlobIO(str(HTTPS), "rb", credential=AzureNamedKeyCredential("account", key))
        assert not key or key not in str(caught.value)

    def test_a_key_from_a_file_may_end_with_a_line_break(self) -> None:
        holder = CredentialHolder(AzureNamedKeyCredential("account", "a2V5\n"))
        assert "sig=" in holder.authorizer(HTTPS).query()

    def test_a_token_with_a_line_break(self) -> None:
        class Identity:
            def get_token(self, *scopes: str, **options: Any) -> AccessToken:
                return AccessToken("token\r\nx-evil: 1", int(time.time() + 3600))

        with pytest.raises(ValueError, match="credential: Identity returned a token with a space or line break"):
            CredentialHolder(Identity()).authorizer(HTTPS).headers()

    @pytest.mark.parametrize("host", ["evil\r\nHost: x", "a b.example.com", "a\x00b.blob.core.windows.net"])
    def test_a_host_with_a_control_character(self, host: str) -> None:
        with pytest.raises(ValueError, match=r"blob_url (contains a control character|has invalid characters)"):
            BlobIO(f"https://{host}/c/b", "rb", credential=False)


def test_somebody_who_is_not_signed_in_reads_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error has the ways to sign in, in the order to try them, then what DefaultAzureCredential tried."""
    text = "DefaultAzureCredential failed to retrieve a token.\nAttempted credentials:\n\tEnvironmentCredential: no"
    tokens = Tokens()
    tokens.failures = [ClientAuthenticationError(text)]
    monkeypatch.setattr("azure.identity.DefaultAzureCredential", lambda: tokens)
    monkeypatch.setattr("azstoragetorch._blob.credentials._registry", PerProcess(dict))
    with pytest.raises(ClientAuthenticationError) as caught:
        CredentialHolder(None).authorizer(HTTPS).headers()
    said = str(caught.value)
    first = said.splitlines()[0]
    places = [first.index(way) for way in ("az login", "SAS", "--sas-env", "AZURE_STORAGE_KEY", "credential=False")]
    assert places == sorted(places)
    assert said.count("EnvironmentCredential") == 1
    assert "\t" not in said
    assert "\\n" not in said


class TestPickling:
    def test_a_key_that_was_left_out_is_missed_when_it_is_used(self) -> None:
        holder = pickle.loads(pickle.dumps(CredentialHolder(AzureNamedKeyCredential("account", "a2V5"))))
        with pytest.raises(ValueError, match="create the object again with its credential"):
            holder.authorizer(HTTP).query()

    def test_whatever_came_out_of_pickles_shares_one_signature(self) -> None:
        """Like the blobs that a worker sends: a SAS is not created for each."""
        pickled = ForkingPickler.dumps(CredentialHolder(AzureNamedKeyCredential("account", "a2V5")))
        first, second = (ForkingPickler.loads(pickled).authorizer(HTTP) for _ in range(2))
        assert first is second
        other = ForkingPickler.dumps(CredentialHolder(AzureNamedKeyCredential("account", "b3RoZXI=")))
        assert ForkingPickler.loads(other).authorizer(HTTP) is not first

    def test_a_sas_that_was_left_out_too(self) -> None:
        holder = pickle.loads(pickle.dumps(CredentialHolder(AzureSasCredential("sig=x"))))
        with pytest.raises(ValueError, match="create the object again with its credential"):
            holder.authorizer(HTTP)

    @pytest.mark.parametrize("credential", [None, False], ids=["default", "anonymous"])
    def test_what_is_not_a_secret_stays(self, credential: Any) -> None:
        holder = pickle.loads(pickle.dumps(CredentialHolder(credential)))
        assert holder.authorizer(HTTPS).is_anonymous is (credential is False)

    def test_no_repr_shows_anything(self) -> None:
        holders = [
            CredentialHolder(None, Secret("sig=topsecret")),
            CredentialHolder(AzureSasCredential("sig=topsecret")),
            CredentialHolder(AzureNamedKeyCredential("account", "topsecret")),
        ]
        assert "topsecret" not in repr(holders)


def test_a_refresh_is_not_forgotten_when_the_service_is_slow(https_fault_service: FaultService) -> None:
    """A request in flight with the old token that is refused late does not drop the new token."""
    service = https_fault_service
    service.put("c", "b", DATA)
    service.require_token("token-1")
    credential, barrier = Tokens(), threading.Barrier(2)
    client = blob_client(service.blob_url("c", "b"), credential=credential)
    client.read()
    old = client.service.authorizer.headers()
    service.require_token("token-2")

    def renew(number: int) -> None:
        barrier.wait(60)
        client.service.authorizer.renew(old)
        client.read()

    run_threads(2, renew)
    client.service.authorizer.renew(old)
    client.read()
    assert credential.fetched == 2


def test_a_503_is_not_a_reason_to_renew(https_fault_service: FaultService) -> None:
    service = https_fault_service
    service.put("c", "b", DATA)
    service.script("get_blob", [Status(503)])
    credential = Tokens()
    assert blob_client(service.blob_url("c", "b"), credential=credential).read()[0] == DATA
    assert credential.fetched == 1
