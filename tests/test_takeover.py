"""Which response fills the memory: one writer at a time, one version, every byte once, in any order of events."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from azstoragetorch import metrics
from azstoragetorch._blob.takeover import Attempt, Begun, Takeover, UnfitError
from azstoragetorch._engine.scope import Scope

ID = "x-ms-client-request-id"
HEADERS = {ID: "id", "x-ms-range": "bytes=10-"}


class Line:
    """A connection, as far as an attempt needs one."""

    def __init__(self) -> None:
        self.times_closed = 0

    def close(self) -> None:
        self.times_closed += 1


class Sent(Attempt):
    """An attempt, with what the server made of it."""

    __slots__ = ("asked", "sent", "version")
    connection: Any
    version: int
    asked: tuple[int, str | None]  # the first byte of the blob, and the ETag in the condition
    sent: int  # bytes of its body


def sent(takeover: Takeover[Sent], headers: dict[str, str], start: int) -> Sent:
    connection: Any = Line()
    attempt = Sent(connection, Scope().holding(lambda: None), "GET", headers, takeover.hedges, start)
    first = int(headers["x-ms-range"].removeprefix("bytes=").partition("-")[0])
    attempt.asked, attempt.sent = (first, headers.get("If-Match")), 0
    takeover.enter(attempt)
    return attempt


class TakeoverMachine(RuleBasedStateMachine):
    """A server that answers each attempt when it likes, ignores conditions, and has a blob that is overwritten."""

    @initialize(size=st.integers(1, 40))
    def begin(self, size: int) -> None:
        self.size = size  # bytes of the blob after the first ten
        self.takeover: Takeover[Sent] = Takeover(None, "GET", HEADERS, self.close)
        self.all = [sent(self.takeover, HEADERS, 0)]
        self.memory: list[tuple[int, int, Sent]] = []  # the place in the blob, its version, and who wrote it
        self.becoming: Sent | None = None  # while `begin` makes it the owner
        self.is_over = False

    def close(self, attempt: Sent) -> None:
        assert self.becoming is None or self.takeover.owner is not self.becoming, "two may write"
        attempt.close()

    def attempt(self, number: int) -> Sent:
        return self.takeover.attempts[number % len(self.takeover.attempts)]

    @precondition(lambda self: not self.is_over and len(self.all) < 6)
    @rule()
    def hedge(self) -> None:
        headers, start = self.takeover.rest()
        self.all.append(sent(self.takeover, headers, start))
        begun = self.takeover.begun
        assert self.all[-1].asked == ((10, None) if begun is None else (10 + len(self.memory), begun.etag))
        assert self.all[-1].request_id not in {each.request_id for each in self.all[:-1]}

    @precondition(lambda self: not self.is_over)
    @rule(number=st.integers(0, 9), version=st.integers(0, 1), status=st.sampled_from([206, 206, 206, 200, 403, 412]))
    def answer(self, number: int, version: int, status: int) -> None:
        """The head arrives, of whichever version; the server need not look at the condition."""
        attempt, before = self.attempt(number), self.takeover.owner
        if attempt is before or (status != 206 and attempt.number == 0):  # the caller judges the first response
            return
        if status == 200 and self.takeover.begun is None:  # a document
            return
        first = attempt.asked[0]
        head = Begun(status, f'"{version}"', first, 9 + self.size, 10 + self.size, 10 + self.size - first)
        self.becoming = attempt
        try:
            self.takeover.begin(attempt, head, attempt.request_id)
        except UnfitError:
            begun = self.takeover.begun
            assert status != 206 or (begun is not None and begun.etag != head.etag)
            assert self.takeover.owner is before
            self.takeover.end(attempt)
            self.is_over = not self.takeover.attempts
            return
        finally:
            self.becoming = None
        attempt.version = version
        assert self.takeover.attempts == [attempt]
        assert all(each.connection.times_closed for each in self.all if each is not attempt)

    @precondition(lambda self: not self.is_over)
    @rule(count=st.integers(1, 20))
    def receive(self, count: int) -> None:
        """Some bytes of the owner arrive, and are written unless they are known."""
        owner = self.takeover.owner
        if owner is None or owner not in self.takeover.attempts:
            return
        for _ in range(min(count, 10 + self.size - owner.asked[0] - owner.sent)):
            place = owner.asked[0] + owner.sent
            owner.sent += 1
            if self.takeover.skip:
                self.takeover.skip -= 1
            else:
                self.memory.append((place, owner.version, owner))
                self.takeover.reached += 1

    @precondition(lambda self: len(self.takeover.attempts) > 1)
    @rule(number=st.integers(0, 9))
    def fail(self, number: int) -> None:
        self.takeover.end(self.attempt(number))

    @rule()
    def wait(self) -> None:
        """Nothing happens, also after the end."""

    @invariant()
    def holds(self) -> None:
        if not hasattr(self, "memory"):
            return
        assert [place for place, _, _ in self.memory] == list(range(10, 10 + len(self.memory)))
        assert len({version for _, version, _ in self.memory}) <= 1, "bytes of two versions"
        assert len(self.memory) == self.takeover.reached <= self.size
        assert [each.connection.times_closed for each in self.all] == [
            0 if each in self.takeover.attempts else 1 for each in self.all
        ]


TestTakeoverMachine = TakeoverMachine.TestCase


def document(takeover: Takeover[Sent], attempt: Sent, status: int) -> None:
    takeover.begin(attempt, Begun(status, "", 0, -1, 0, 0), attempt.request_id)


def test_a_document_is_requested_as_a_whole() -> None:
    """A page of a listing has no range, so what another response sends replaces what had arrived."""
    takeover: Takeover[Sent] = Takeover(None, "GET (list)", HEADERS, Sent.close)
    document(takeover, sent(takeover, HEADERS, 0), 200)
    headers, start = takeover.rest()
    assert (headers["x-ms-range"], start, "If-Match" in headers) == ("bytes=10-", 0, False)
    another = sent(takeover, headers, start)
    document(takeover, another, 200)
    assert takeover.owner is another
    assert takeover.skip == 0


@pytest.mark.parametrize("status", [204, 403, 404, 503])
def test_a_refused_document_does_not_replace_one(status: int) -> None:
    takeover: Takeover[Sent] = Takeover(None, "GET (list)", HEADERS, Sent.close)
    first = sent(takeover, HEADERS, 0)
    document(takeover, first, 200)
    headers, start = takeover.rest()
    with pytest.raises(UnfitError, match=f"status {status}"):
        document(takeover, sent(takeover, headers, start), status)
    assert takeover.owner is first


@pytest.mark.parametrize("is_conditional", [False, True])
def test_the_end_of_the_blob_is_an_answer_unless_a_version_was_named(is_conditional: bool) -> None:
    """416 to a read of the first bytes means that the blob is empty; with a condition it may be another blob."""
    headers = {**HEADERS, "If-Match": '"1"'} if is_conditional else HEADERS
    takeover: Takeover[Sent] = Takeover(None, "GET", headers, Sent.close)
    sent(takeover, headers, 0)
    another = sent(takeover, *takeover.rest())
    if is_conditional:
        with pytest.raises(UnfitError):
            document(takeover, another, 416)
    else:
        document(takeover, another, 416)
    assert (takeover.owner is another) == (not is_conditional)


def test_a_response_to_another_request_is_refused() -> None:
    takeover: Takeover[Sent] = Takeover(None, "GET", HEADERS, Sent.close)
    sent(takeover, HEADERS, 0)
    another = sent(takeover, *takeover.rest())
    with pytest.raises(UnfitError, match="another request"):
        takeover.begin(another, Begun(200, "", 0, -1, 0, 0), "id")


def test_hedges_are_counted_once() -> None:
    """Each is in flight, won, or was canceled."""
    takeover: Takeover[Sent] = Takeover(None, "GET", HEADERS, Sent.close)
    before = metrics()
    sent(takeover, HEADERS, 0)
    second, third = sent(takeover, *takeover.rest()), sent(takeover, *takeover.rest())
    takeover.begin(third, Begun(206, '"1"', 10, 19, 20, 10), third.request_id)
    takeover.end(second)
    takeover.close()
    seen = metrics() - before
    assert (seen.hedged, seen.hedges_won, seen.hedges_canceled) == (2, 1, 1)


REST = Begun(206, '"1"', 14, 19, 20, 6)


@pytest.mark.parametrize(
    "head",
    [
        REST._replace(etag='"2"'),
        REST._replace(etag=""),
        REST._replace(status=200),
        REST._replace(first=13, length=7),
        REST._replace(last=18, length=5),
        REST._replace(size=21),
        REST._replace(length=0),
    ],
)
def test_only_the_rest_of_the_same_version_continues_a_body(head: Begun) -> None:
    takeover: Takeover[Sent] = Takeover(None, "GET", HEADERS, Sent.close)
    first = sent(takeover, HEADERS, 0)
    takeover.begin(first, Begun(206, '"1"', 10, 19, 20, 10), first.request_id)
    takeover.reached = 4
    another = sent(takeover, *takeover.rest())
    takeover.reached = 7
    with pytest.raises(UnfitError, match="refused"):
        takeover.begin(another, head, another.request_id)
    assert takeover.owner is first
    takeover.begin(another, REST, another.request_id)
    assert (takeover.owner, takeover.skip, first.connection.times_closed) == (another, 3, 1)
