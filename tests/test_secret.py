"""Secrets are used, never shown, and passed on to child processes only."""

from __future__ import annotations

import copy
import pickle
from multiprocessing.reduction import ForkingPickler

import pytest
from azure.core.credentials import AzureNamedKeyCredential, AzureSasCredential

from azstoragetorch._blob.credentials import CredentialHolder
from azstoragetorch._blob.secret import Secret, redact
from azstoragetorch._blob.url import parse_url

TEXT = "dG9wc2VjcmV0"
URL = parse_url("http://127.0.0.1:10000/account/c")


@pytest.mark.parametrize(
    "text",
    [
        f"https://a/c/b?sv=1&sig={TEXT}&se=2",
        f"https://a/c/b?SIG={TEXT}",
        f"sig%3D{TEXT}%26se%3D2",
        f"Authorization: Bearer {TEXT}.{TEXT}.x",
        f"{{'Authorization': 'bearer {TEXT}'}}",
        f"SharedKey account:{TEXT}=",
        f"AccountKey={TEXT}==;EndpointSuffix=x",
        f'{{"access_token": "{TEXT}"}}',
        f"access_token={TEXT}",
    ],
)
def test_redaction_takes_out_what_opens_something(text: str) -> None:
    assert TEXT not in redact(text)
    assert "[redacted]" in redact(text)


@pytest.mark.parametrize("text", ["GET https://a/c/b?sv=1&se=2: 404", "signal=5 design=6", "the bearer of news"])
def test_redaction_leaves_the_rest(text: str) -> None:
    assert redact(text) == text


def test_it_is_in_no_text_and_no_plain_pickle() -> None:
    secret = Secret(TEXT)
    assert secret.reveal() == TEXT
    for text in (str(secret), repr(secret), f"{secret}", repr([secret]), pickle.dumps(secret).decode("latin-1")):
        assert TEXT not in text


def test_out_of_a_plain_pickle_it_says_what_to_do() -> None:
    with pytest.raises(ValueError, match="create the object again with its credential"):
        pickle.loads(pickle.dumps(Secret(TEXT))).reveal()


def test_it_travels_to_another_process() -> None:
    assert pickle.loads(ForkingPickler.dumps(Secret(TEXT))).reveal() == TEXT


def test_it_compares_and_hashes_by_its_text() -> None:
    assert Secret("a") == Secret("a") != Secret("b")
    assert len({Secret("a"), Secret("a"), Secret("b")}) == 2


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy])
class TestCopies:
    """A copy in the same process works like the original."""

    def test_of_a_secret(self, duplicate: type) -> None:
        assert duplicate(Secret(TEXT)).reveal() == TEXT

    def test_of_a_credential(self, duplicate: type) -> None:
        credential = AzureSasCredential("sig=old")
        holder = duplicate(CredentialHolder(credential))
        credential.update("sig=new")
        assert holder.authorizer(URL).query() == "sig=new"

    def test_of_a_key(self, duplicate: type) -> None:
        holder = duplicate(CredentialHolder(AzureNamedKeyCredential("account", "a2V5")))
        assert "sig=" in holder.authorizer(URL).query()
