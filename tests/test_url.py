"""URLs of blobs and containers: every form, names that round-trip, errors that say what to do."""

from __future__ import annotations

import pickle
from urllib.parse import quote, urlsplit

import pytest
from hypothesis import given
from hypothesis import strategies as st

from azstoragetorch import join_url
from azstoragetorch._blob.url import BlobURL, parse_blob_url, parse_container_url, parse_url, url_of_name, why_refused

ACCOUNT = "https://account.blob.core.windows.net"
AZURITE = "http://127.0.0.1:10000/devstoreaccount1"
SECRET = "c2VjcmV0%2Bsignature%3D"
SAS = f"sv=2023-11-03&st=2024-01-01T00%3A00%3A00Z&se=2034-01-01&sr=c&sp=rl&sig={SECRET}"

names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40).filter(
    lambda name: not {".", ".."} & set(name.split("/"))
)


class TestForms:
    @pytest.mark.parametrize(
        ("url", "account_url", "container", "blob"),
        [
            (f"{ACCOUNT}/c/b", ACCOUNT, "c", "b"),
            (f"{ACCOUNT}/c/d/e.txt", ACCOUNT, "c", "d/e.txt"),
            ("HTTPS://Account.Blob.Core.Windows.Net/c/B", ACCOUNT, "c", "B"),
            ("https://account.blob.core.chinacloudapi.cn/c/b", "https://account.blob.core.chinacloudapi.cn", "c", "b"),
            ("https://account.z01.blob.storage.azure.net/c/b", "https://account.z01.blob.storage.azure.net", "c", "b"),
            ("https://data.example.com/c/b", "https://data.example.com", "c", "b"),
            ("https://data.example.com:8443/c/b", "https://data.example.com:8443", "c", "b"),
            (f"{AZURITE}/c/b", AZURITE, "c", "b"),
            ("http://10.1.2.3/acc/c/b", "http://10.1.2.3/acc", "c", "b"),
            ("http://localhost:10000/acc/c/b", "http://localhost:10000/acc", "c", "b"),
            ("http://azurite:10000/acc/c/b", "http://azurite:10000/acc", "c", "b"),
            ("http://[::1]:10000/acc/c/b", "http://[::1]:10000/acc", "c", "b"),
            ("http://emulator.local/devstoreaccount1/c/b", "http://emulator.local/devstoreaccount1", "c", "b"),
            ("abfss://c@account.dfs.core.windows.net/d/b", ACCOUNT, "c", "d/b"),
            ("abfs://c@account.dfs.core.windows.net/d/b", ACCOUNT, "c", "d/b"),
            ("https://account.dfs.core.windows.net/c/b", ACCOUNT, "c", "b"),
            ("abfss://c@account.z01.dfs.storage.azure.net/b", "https://account.z01.blob.storage.azure.net", "c", "b"),
            (
                "https://account.privatelink.dfs.core.windows.net/c/b",
                "https://account.privatelink.blob.core.windows.net",
                "c",
                "b",
            ),
            ("https://dfs.example.com/c/b", "https://dfs.example.com", "c", "b"),
            ("az://account.blob.core.windows.net/c/d/b", ACCOUNT, "c", "d/b"),
            ("azt://account.blob.core.windows.net/c/d/b", ACCOUNT, "c", "d/b"),
            ("az://c@account.blob.core.windows.net/d/b", ACCOUNT, "c", "d/b"),
            (f"{ACCOUNT}/$root/b", ACCOUNT, "$root", "b"),
            ("wasbs://c@account.blob.core.windows.net/d/b", ACCOUNT, "c", "d/b"),
            ("wasb://c@account.blob.core.windows.net/d/b", ACCOUNT, "c", "d/b"),
        ],
    )
    def test_every_form_names_account_container_and_blob(
        self, url: str, account_url: str, container: str, blob: str
    ) -> None:
        parsed = parse_blob_url(url)
        assert (parsed.account_url, parsed.container, parsed.blob) == (account_url, container, blob)
        assert parse_blob_url(str(parsed)) == parsed

    @pytest.mark.parametrize(
        "url", [f"{ACCOUNT}/c", f"{ACCOUNT}/c/", f"{AZURITE}/c", "abfss://c@a.dfs.core.windows.net/"]
    )
    def test_a_container_with_or_without_a_slash(self, url: str) -> None:
        parsed = parse_container_url(url)
        assert (parsed.container, parsed.blob) == ("c", "")
        assert str(parsed).endswith("/c")

    @pytest.mark.parametrize("scheme", ["az", "abfs", "abfss"])
    def test_an_account_from_the_environment(self, scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """As in adlfs; it does not affect a URL with an account."""
        monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "fromenv")
        parsed = parse_blob_url(f"{scheme}://c/d/b?{SAS}")
        assert str(parsed) == "https://fromenv.blob.core.windows.net/c/d/b"
        assert parsed.sas is not None
        assert str(parse_blob_url(f"{scheme}://c@account.blob.core.windows.net/d/b")) == f"{ACCOUNT}/c/d/b"
        assert str(parse_container_url(f"{scheme}://c")) == "https://fromenv.blob.core.windows.net/c"

    @pytest.mark.parametrize("value", ["evil.example/", "account.blob", "UPPER", "a", "a@b"])
    def test_the_account_of_the_environment_is_the_name_of_one(
        self, value: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", value)
        with pytest.raises(ValueError, match="AZURE_STORAGE_ACCOUNT_NAME"):
            parse_blob_url("az://c/b")

    @pytest.mark.parametrize("slash", ["", "/"])
    def test_a_container_as_the_portal_and_other_tools_give_it(self, slash: str) -> None:
        for query in (f"sp=rl&st=2024-01-01T00:00:00Z&spr=https&sv=2022-11-02&sr=c&sig={SECRET}", SAS):
            for other in ("", "&restype=container&comp=list"):
                parsed = parse_container_url(f"{ACCOUNT}/c{slash}?{query}{other}")
                assert (str(parsed), parsed.sas and parsed.sas.reveal()) == (f"{ACCOUNT}/c", query)

    def test_snapshot_and_version_are_read_and_cannot_be_written(self) -> None:
        stamp = "2024-01-01T00:00:00.1234567Z"
        for option in ("snapshot", "versionid"):
            parsed = parse_blob_url(f"{ACCOUNT}/c/b?{option}={quote(stamp)}")
            assert getattr(parsed, option) == stamp
            assert parsed.is_read_only
        assert not parse_blob_url(f"{ACCOUNT}/c/b").is_read_only
        assert parse_blob_url(f"{ACCOUNT}/c/b?snapshot={stamp}").with_blob("d").snapshot is None


class TestNames:
    NAME = "a b%2F?#ü//x/"

    def test_an_awkward_name_round_trips(self) -> None:
        parsed = parse_blob_url(f"{ACCOUNT}/c/{quote(self.NAME)}")
        assert parsed.blob == self.NAME
        assert parsed.path == "/c/a%20b%252F%3F%23%C3%BC//x/"

    def test_what_is_not_encoded_is_taken_as_it_stands(self) -> None:
        assert parse_blob_url(f"{ACCOUNT}/c/a b#ü//x/").blob == "a b#ü//x/"
        assert parse_blob_url(f"{ACCOUNT}/c/a+b").blob == "a+b"

    @pytest.mark.parametrize("blob", ["/", "//a", "a/", " a", "a ", "~", "a/.b/..c/...", "%", "%zz"])
    def test_no_part_of_a_name_is_lost(self, blob: str) -> None:
        assert parse_blob_url(f"{ACCOUNT}/c/{quote(blob, safe='/')}").blob == blob

    @given(names)
    def test_any_name_round_trips(self, name: str) -> None:
        parsed = parse_blob_url(url_of_name(f"{AZURITE}/c", name))
        assert parsed.blob == name
        assert parse_blob_url(str(parsed)) == parsed
        assert parse_container_url(f"{AZURITE}/c").with_blob(name) == parsed
        assert parsed.path.isascii()
        assert not set(parsed.path) & set(" ?#%\r\n") - {"%"}

    def test_the_longest_name(self) -> None:
        assert len(parse_blob_url(f"{ACCOUNT}/c/{'x' * 1024}").blob) == 1024
        with pytest.raises(ValueError, match=r"1,025|1025"):
            parse_blob_url(f"{ACCOUNT}/c/{'x' * 1025}")

    @pytest.mark.parametrize("name", ["..", "a/../b", "./a", "a/.", "%2e%2e/a", "a/%2E%2E/b"])
    def test_names_that_servers_would_resolve_to_others_are_refused(self, name: str) -> None:
        with pytest.raises(ValueError, match="segment"):
            parse_blob_url(f"{ACCOUNT}/c/{name}")

    @pytest.mark.parametrize("name", ["..", "a/../b", "x" * 1025])
    def test_so_are_names_that_come_from_elsewhere(self, name: str) -> None:
        """A listing can contain names that are not allowed in URLs: reading them must not read another blob."""
        with pytest.raises(ValueError, match="blob name"):
            parse_container_url(f"{ACCOUNT}/c").with_blob(name)

    @pytest.mark.parametrize("name", ["d/../c1", "..", "./a", "a/.", "x" * 1025, "\ud800"])
    def test_a_face_can_ask_which_listed_names_are_refused(self, name: str) -> None:
        """The same names as in URLs, decided in one place."""
        reason = why_refused(name)
        assert reason
        with pytest.raises(ValueError, match="blob name"):
            parse_container_url(f"{ACCOUNT}/c").with_blob(name)

    @pytest.mark.parametrize("name", ["a", "/a", "a//b", "a/...", ".a", "a\x1b[31m", "ü", "x" * 1024])
    def test_and_which_are_not(self, name: str) -> None:
        assert why_refused(name) is None
        assert parse_container_url(f"{ACCOUNT}/c").with_blob(name).blob == name


class TestHosts:
    """Hosts of Azure are recognized by whole labels, and only those have the account in a label."""

    @pytest.mark.parametrize(
        ("host", "account"),
        [
            ("account.blob.core.windows.net", "account"),
            ("account.blob.core.windows.net:443", "account"),
            ("account.blob.core.windows.net.", "account"),
            ("account-secondary.blob.core.windows.net", "account"),
            ("account.privatelink.blob.core.windows.net", "account"),
            ("account.z12.blob.storage.azure.net", "account"),
            ("account.dfs.core.windows.net", "account"),
            ("account.z12.dfs.storage.azure.net", "account"),
            ("account.blob.core.chinacloudapi.cn", "account"),
            ("account.blob.core.usgovcloudapi.net", "account"),
        ],
    )
    def test_those_of_azure(self, host: str, account: str) -> None:
        parsed = parse_url(f"https://{host}/c/b")
        assert parsed.is_azure
        assert parsed.account_name == account
        assert parse_url(f"https://{host.upper()}/c/b").is_azure

    @pytest.mark.parametrize(
        "host",
        [
            "account.evil.example",
            "account.blob.core.windows.net.evil.example",
            "evilblob.core.windows.net",
            "blob.core.windows.net",
            "account.blob.core.windows.net-evil.example",
            "account.xblob.core.windows.net",
            "account.web.core.windows.net",
            "account.blob.core.windows.netx",
            "account.\uff42lob.core.windows.net",
            "data.example.com",
        ],
    )
    def test_those_of_others(self, host: str) -> None:
        parsed = parse_url(f"https://{host}/c/b")
        assert not parsed.is_azure
        assert parsed.account_name == ""

    def test_a_path_names_its_account(self) -> None:
        assert parse_url(f"{AZURITE}/c").account_name == "devstoreaccount1"

    @pytest.mark.parametrize("host", ["127.0.0.1:1", "127.1.2.3", "localhost", "[::1]:10000"])
    def test_this_machine(self, host: str) -> None:
        assert parse_url(f"http://{host}/account/c").is_loopback

    @pytest.mark.parametrize("host", ["10.0.0.1", "localhost.example.com", "azurite", "[fe80::1]"])
    def test_other_machines(self, host: str) -> None:
        assert not parse_url(f"http://{host}/account/c").is_loopback

    @pytest.mark.parametrize(
        ("host", "audience"),
        [
            ("account.blob.core.windows.net", "https://storage.azure.com"),
            ("account.z1.blob.storage.azure.net", "https://storage.azure.com"),
            ("data.example.com", "https://storage.azure.com"),
            ("account.blob.core.usgovcloudapi.net", "https://account.blob.core.usgovcloudapi.net"),
            ("account.privatelink.blob.core.chinacloudapi.cn", "https://account.blob.core.chinacloudapi.cn"),
            ("account-secondary.dfs.core.chinacloudapi.cn", "https://account.blob.core.chinacloudapi.cn"),
        ],
    )
    def test_a_token_is_for_the_cloud_that_it_is_sent_to(self, host: str, audience: str) -> None:
        assert parse_url(f"https://{host}/c").audience == audience


class TestJoining:
    @pytest.mark.parametrize("url", [f"{ACCOUNT}/c", f"{ACCOUNT}/c/", f"{ACCOUNT}/c?{SAS}", f"{ACCOUNT}/c/?{SAS}"])
    def test_names_go_before_the_query(self, url: str) -> None:
        joined = join_url(url, "runs/50% off?", "ü #1.txt")
        parsed = parse_blob_url(joined)
        assert parsed.blob == "runs/50% off?/ü #1.txt"
        assert parsed.sas == parse_url(url).sas
        assert str(parsed).startswith(f"{ACCOUNT}/c/runs/")

    @given(names)
    def test_any_name(self, name: str) -> None:
        if name.startswith("/") or not name.strip("/"):
            with pytest.raises(ValueError, match="start with"):
                join_url(f"{ACCOUNT}/c", name)
        else:
            assert parse_blob_url(join_url(f"{ACCOUNT}/c?{SAS}", "a/", name)).blob == f"a/{name}"

    @pytest.mark.parametrize("name", ["", "/", "/a", "..", "a/../b"])
    def test_what_does_not_name_something_inside_is_refused(self, name: str) -> None:
        with pytest.raises(ValueError, match="name"):
            join_url(f"{ACCOUNT}/c", name)

    def test_types(self) -> None:
        with pytest.raises(TypeError, match="url must be a str"):
            join_url(None, "a")  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="name must be a str"):
            join_url(f"{ACCOUNT}/c", 1)  # type: ignore[arg-type]

    @pytest.mark.parametrize(
        "sas",
        [
            SAS,
            "sv=1&sig=x",
            "sig=x&se=2034-01-01",
            "sv=2023-11-03&sig=ab/cd%2Bef%3D",
            "sv=1&sig=" + "a/" * 21 + "b%3D",
            "sr=c&sig=x&sp=rl",
            "sig=x&snapshot=2024",
        ],
    )
    def test_a_path_behind_the_sas_is_refused_with_the_right_spelling(self, sas: str) -> None:
        """``f"{url}/step-1"`` would be an invalid SAS."""
        with pytest.raises(ValueError, match=rf"{ACCOUNT}/c/<name>\?<SAS>.*azstoragetorch\.join_url") as caught:
            parse_url(f"{ACCOUNT}/c?{sas}/step-1")
        assert "step-1" not in str(caught.value)
        assert "sig=" not in str(caught.value)

    def test_a_slash_in_a_signature_is_not_a_path(self) -> None:
        parsed = parse_url(f"{ACCOUNT}/c?sv=1&sig={'a/' * 21}b=&rsct=text/plain")
        assert parsed.sas is not None


class TestSecrets:
    URL = f"{ACCOUNT}/c/b?{SAS}&snapshot=2024"

    def test_a_sas_is_kept_as_it_was_signed_and_out_of_sight(self) -> None:
        parsed = parse_blob_url(self.URL)
        assert parsed.sas is not None
        assert parsed.sas.reveal() == SAS
        assert parsed.snapshot == "2024"
        for text in (str(parsed), repr(parsed), f"{parsed}", str(parsed.sas), pickle.dumps(parsed).decode("latin-1")):
            assert "c2VjcmV0" not in text

    @pytest.mark.parametrize("field", ["skoid", "sduoid", "skdutid", "srh", "srq", "ses", "rsct"])
    def test_every_field_that_is_signed_is_part_of_it(self, field: str) -> None:
        parsed = parse_blob_url(f"{ACCOUNT}/c/b?{SAS}&{field}=x%2Fy")
        assert parsed.sas is not None
        assert parsed.sas.reveal() == f"{SAS}&{field}=x%2Fy"

    def test_it_goes_with_every_blob_of_the_container(self) -> None:
        parsed = parse_container_url(f"{ACCOUNT}/c?{SAS}")
        assert parsed.with_blob("b").sas == parsed.sas

    def test_two_sas_are_two_addresses(self) -> None:
        assert parse_blob_url(self.URL) != parse_blob_url(self.URL.replace("c2Vj", "d2Vj"))

    @pytest.mark.parametrize(
        "url",
        [
            f"{ACCOUNT}/c/b?{SAS}&weird=1",
            f"ftp://host/c/b?{SAS}",
            f"{ACCOUNT}?{SAS}",
            f"https://user:{SECRET}@host.net/c/b",
            f"{ACCOUNT}/c/../b?{SAS}",
            f"no url at all sig={SECRET}",
            f"{ACCOUNT}/c/%ff?{SAS}",
            f"https://[::1/c/b?{SAS}",
            f"{ACCOUNT}:port/c/b?{SAS}",
            f"{ACCOUNT}/c?{SAS}/step-1",
            f"{ACCOUNT}/c?{SAS} ",
            f"account.blob.core.windows.net/c?{SAS}",
            SAS,
            f"/home/me?{SAS}",
            f"<account>?{SAS}",
        ],
    )
    def test_no_complaint_repeats_a_signature(self, url: str) -> None:
        with pytest.raises(ValueError, match="blob_url") as caught:
            parse_blob_url(url)
        assert "c2VjcmV0" not in str(caught.value)
        assert caught.value.__cause__ is None
        assert caught.value.__suppress_context__ or caught.value.__context__ is None


class TestRefusals:
    @pytest.mark.parametrize(
        ("url", "reason"),
        [
            ("", "not a URL"),
            ("blob.txt", "not a URL"),
            ("/c/b", "not a URL"),
            ("//account.blob.core.windows.net/c/b", "not a URL"),
            ("ftp://account.blob.core.windows.net/c/b", "not a URL"),
            ("file:///c/b", "not a URL"),
            ("s3://bucket/key", "not a URL"),
            ("https://", "not a URL"),
            ("https:///c/b", "not a URL"),
            (ACCOUNT, "no container"),
            (f"{ACCOUNT}/", "no container"),
            (f"{ACCOUNT}//b", "no container"),
            (AZURITE, "no container"),
            ("http://127.0.0.1:10000/", "no account"),
            (f"{ACCOUNT}/c", "URL of a container, not of a blob"),
            (f"{ACCOUNT}/c/", "URL of a container, not of a blob"),
            ("abfss://account.dfs.core.windows.net/b", "no container"),
            ("abfss://c@account/b", "no host of an account"),
            ("az://c/b", "no host of an account"),
            ("https://user@account.blob.core.windows.net/c/b", "user name"),
            (f"{ACCOUNT}/c/b?x=1", "'x'"),
            (f"{ACCOUNT}/c/b?se=2034&sp=r", "sig"),
            (f"{ACCOUNT}/c/b&sv=2025&sig={SECRET}", "SAS in its path"),
            (f"{ACCOUNT}/c/%C3%28", "UTF-8"),
            (f"{ACCOUNT}/c/a\nb", "control"),
            (f"{ACCOUNT}/c/a\tb", "control"),
            (f"{ACCOUNT}/c/b\r\n", "control"),
            ("https://acc ount.blob.core.windows.net/c/b", "invalid characters in its host"),
            ("https://account:99999/c/b", "not a valid URL"),
            (f"{ACCOUNT}/c/a\0b", "control"),
            (f"{ACCOUNT}/c/b?{SAS} ", "SAS with a space"),
            (f"{ACCOUNT}/c/b?sig=ü", "SAS with a space or another invalid character"),
            ("http://127.0.0.1:10000/acc%0d%0aount/c/b", "no account"),
            ("account.blob.core.windows.net/c/b", "write https://account.blob.core.windows.net/"),
            ("acc.privatelink.blob.core.windows.net/c/b", "has no scheme"),
            ("/home/me/model.pt", "/home/me/model.pt is a local path"),
            ("C:\\models\\a.pt", "local path"),
            ("file:///models/a.pt", "local path"),
            ("data/a.pt", "'data/a.pt' does not start with https://"),
            ("s3://bucket/a.pt", "s3:// is not a supported scheme"),
            ("https://<account>.blob.core.windows.net/c/b", "'<account>' is a placeholder"),
            ("https://%3Caccount%3E.blob.core.windows.net/c/b", "is a placeholder"),
            (f"{ACCOUNT}/<container>/b", "'<container>' is a placeholder"),
            ("https://{account}.blob.core.windows.net/c/b", "is a placeholder"),
            ("azureml://subscriptions/1/resourcegroups/r/workspaces/w/datastores/d/paths/p", "az ml datastore show"),
            ("azureml:cats:1", "pass https://<account>.blob.core.windows.net/<container>"),
            ("az://c/b", "AZURE_STORAGE_ACCOUNT_NAME"),
            (f"{ACCOUNT}/c?comp=metadata&sig=x", "comp="),
        ],
    )
    def test_what_is_not_a_blob_is_refused_with_the_argument_and_the_reason(self, url: str, reason: str) -> None:
        with pytest.raises(ValueError, match=f"blob_url.*{reason}"):
            parse_blob_url(url)

    @pytest.mark.parametrize("url", [f"{ACCOUNT}/c/b", f"{ACCOUNT}/c//"])
    def test_a_blob_is_not_a_container(self, url: str) -> None:
        with pytest.raises(ValueError, match=r"container_url.*prefix="):
            parse_container_url(url)

    @pytest.mark.parametrize("option", ["snapshot", "versionid"])
    def test_a_container_has_no_versions(self, option: str) -> None:
        with pytest.raises(ValueError, match=r"container_url.*versionid"):
            parse_container_url(f"{ACCOUNT}/c?{option}=2024")

    @pytest.mark.parametrize("url", [None, 1, b"https://account.blob.core.windows.net/c/b", ["x"]])
    def test_what_is_not_a_string_is_a_type_error(self, url: object) -> None:
        with pytest.raises(TypeError, match="blob_url must be a str"):
            parse_blob_url(url)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="container_url must be a str"):
            parse_container_url(url)  # type: ignore[arg-type]

    @given(st.text(max_size=60) | st.text("abc/:?#@%&=.[]+ \\\n2eF", max_size=30))
    def test_any_text_is_an_address_or_a_value_error(self, text: str) -> None:
        """No input raises another error, and every accepted URL parses to itself."""
        for url in (text, f"https://{text}", f"{ACCOUNT}/{text}", f"{AZURITE}/c/{text}"):
            try:
                parsed = parse_url(url)
            except ValueError:
                continue
            assert parse_url(str(parsed)) == BlobURL(
                parsed.scheme, parsed.host, parsed.account_path, parsed.container, parsed.blob
            )
            assert urlsplit(str(parsed)).path == parsed.path
