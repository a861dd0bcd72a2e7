"""Clients for URLs: the fast path returns the same client as parsing does."""

from __future__ import annotations

from hypothesis import example, given, settings
from hypothesis import strategies as st

from azstoragetorch._blob.client import ClientFactory
from azstoragetorch._blob.url import parse_blob_url

CONTAINER = "https://account.blob.core.windows.net/c"
TAIL = st.text(st.sampled_from("ab/.%2F~?#-_ ü&="), max_size=12)


def outcome(clients: ClientFactory, url: str) -> object:
    try:
        return clients.blob(url).url
    except ValueError as error:
        return str(error)


@settings(max_examples=500)
@given(tail=TAIL)
@example(tail="a/../b")
@example(tail="a/.b")
@example(tail="a" * 1100)
@example(tail="a//b/")
def test_a_url_means_the_same_whatever_came_before(tail: str) -> None:
    url = f"{CONTAINER}/{tail}"
    used = ClientFactory(False)
    used.blob(f"{CONTAINER}/before")
    assert outcome(used, url) == outcome(ClientFactory(False), url)


def test_containers_do_not_mix() -> None:
    clients = ClientFactory(False)
    for url in (f"{CONTAINER}/a", f"{CONTAINER}2/a", "https://other.blob.core.windows.net/c/a", f"{CONTAINER}/b/c.d"):
        client = clients.blob(url)
        assert client.url == parse_blob_url(url)
        assert str(clients.container(client.url).url) == url.rsplit("/", 1 if "b/c" not in url else 2)[0]


def test_a_sas_is_used_for_its_url_only() -> None:
    clients = ClientFactory(False)
    assert clients.blob(f"{CONTAINER}/a?sig=x").url.sas is not None
    assert clients.blob(f"{CONTAINER}/b").url.sas is None
