"""The listing pipes, on Azurite and, for rare behavior of a service, on the fault service."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
from azure.core.credentials import AzureSasCredential
from azure.core.exceptions import ClientAuthenticationError, ResourceNotFoundError
from torch.utils.data import DataLoader

from azstoragetorch._blob.url import parse_blob_url
from azstoragetorch.datapipes import AzureBlobFileLister, AzureBlobInfoLister, BlobInfo
from azstoragetorch.datapipes._base import IterableWrapper
from tests.azurite.container import Container
from tests.faults import EmptyPageWithMarker, FaultService

NAMES = [
    "a.txt",
    "train",
    "train-0.tar",
    "train/0.jpg",
    "train/1.png",
    "train/deep/2.jpg",
    "train2/3.jpg",
    "x/ü #%.jpg",
]


def fill(container: Container, names: list[str] = NAMES) -> None:
    for name in names:
        container.put(name, name.encode())


def names_of(pipe: Any, container: Container) -> list[str]:
    urls = [parse_blob_url(url) for url in pipe]
    assert all(str(url).startswith(f"{container.url}/") and url.sas is None for url in urls)
    return [url.blob for url in urls]


@pytest.mark.parametrize(
    ("root", "expected"),
    [
        ("", NAMES),
        ("/", NAMES),
        ("/train/", ["train/0.jpg", "train/1.png", "train/deep/2.jpg"]),
        ("/train/deep", ["train/deep/2.jpg"]),
        ("/train2", ["train2/3.jpg"]),
        ("/train-", ["train-0.tar"]),
        ("/tr", ["train", "train-0.tar", "train/0.jpg", "train/1.png", "train/deep/2.jpg", "train2/3.jpg"]),
        ("/train", ["train"]),
        ("/a.txt", ["a.txt"]),
        ("/x/%C3%BC%20%23%25.jpg", ["x/ü #%.jpg"]),
    ],
)
def test_a_root_is_a_container_a_folder_a_blob_or_the_beginning_of_names(
    container: Container, root: str, expected: list[str]
) -> None:
    """A blob with exactly that name comes first, then the folder; the results are in lexicographic order."""
    fill(container)
    assert names_of(AzureBlobFileLister(container.url + root, credential=container.key), container) == expected


def test_a_folder_without_its_slash_is_not_taken_for_the_beginning_of_other_names(container: Container) -> None:
    fill(container, ["train/0", "train-0", "train.txt", "train2/0"])
    assert names_of(AzureBlobFileLister(f"{container.url}/train", credential=container.key), container) == ["train/0"]


@pytest.mark.parametrize(
    ("masks", "recursive", "expected"),
    [
        ("*.jpg", True, ["train/0.jpg", "train/deep/2.jpg", "train2/3.jpg", "x/ü #%.jpg"]),
        (["*.png", "*.tar"], True, ["train-0.tar", "train/1.png"]),
        ("train/*.jpg", True, ["train/0.jpg", "train/deep/2.jpg"]),
        (["train2/*", "a.*"], True, ["a.txt", "train2/3.jpg"]),
        ("*.JPG", True, None),
        ("", False, ["a.txt", "train", "train-0.tar"]),
        ("*.tar", False, ["train-0.tar"]),
    ],
)
def test_masks_and_one_level(container: Container, masks: Any, recursive: bool, expected: list[str] | None) -> None:
    fill(container)
    pipe = AzureBlobFileLister(container.url, masks, recursive=recursive, credential=container.key)
    if expected is None:
        with pytest.raises(ResourceNotFoundError, match=r"\*\.JPG"):
            list(pipe)
    else:
        assert names_of(pipe, container) == expected


def test_one_level_of_a_folder(container: Container) -> None:
    fill(container)
    for root in ("train/", "train2"):
        pipe = AzureBlobFileLister(f"{container.url}/{root}", recursive=False, credential=container.key)
        assert names_of(pipe, container) == (["train/0.jpg", "train/1.png"] if root == "train/" else ["train2/3.jpg"])


def test_several_roots_and_a_pipe_of_roots(container: Container) -> None:
    """In the order of the roots; a pipe of roots can be iterated again."""
    fill(container)
    roots = [f"{container.url}/x", f"{container.url}/a.txt"]
    expected = ["x/ü #%.jpg", "a.txt"]
    assert names_of(AzureBlobFileLister(roots, credential=container.key), container) == expected
    piped = IterableWrapper(roots).list_files_by_azure("*", credential=container.key)
    assert names_of(piped, container) == expected
    assert names_of(piped, container) == expected


@pytest.mark.parametrize("root", ["/nothing", "/nothing/", "/train/no"])
def test_a_root_that_holds_nothing_is_an_error_that_names_it(container: Container, root: str) -> None:
    fill(container)
    with pytest.raises(ResourceNotFoundError, match=f"{container.url}{root}"):
        list(AzureBlobFileLister(container.url + root, credential=container.key))


def test_an_error_of_one_level_does_not_deny_the_levels_below(container: Container) -> None:
    container.put("only/folders/x", b"1")
    pipe = AzureBlobFileLister(f"{container.url}/only", recursive=False, credential=container.key)
    with pytest.raises(ResourceNotFoundError, match=r"no blobs are directly below it \(recursive=False\)"):
        list(pipe)


def test_an_empty_container_is_empty_and_a_missing_one_an_error(container: Container) -> None:
    assert list(AzureBlobFileLister(container.url, credential=container.key)) == []
    with pytest.raises(ResourceNotFoundError, match="-missing"):
        list(AzureBlobFileLister(f"{container.url}-missing", credential=container.key))


def test_an_error_in_a_worker_keeps_its_type_and_url(container: Container) -> None:
    fill(container)
    pipe = AzureBlobFileLister(container.url, "*.none", credential=container.key).sharding_filter()
    with pytest.raises(ResourceNotFoundError, match=container.url):
        list(DataLoader(pipe, num_workers=1, batch_size=None))


def test_info_reports_size_and_etag(container: Container) -> None:
    container.put("a", b"12345")
    (info,) = AzureBlobInfoLister(container.url, credential=container.key)
    expected = container.client.get_blob_client("a").get_blob_properties()
    assert info == BlobInfo(container.blob_url("a"), 5, expected.etag)
    assert list(IterableWrapper([container.url]).list_blobs_by_azure(credential=container.key)) == [info]


def test_a_snapshot_lists_as_itself(container: Container) -> None:
    container.put("a", b"old")
    snapshot = container.client.get_blob_client("a").create_snapshot()["snapshot"]
    container.put("a", b"newer")
    root = f"{container.blob_url('a')}?snapshot={snapshot}"
    (info,) = AzureBlobInfoLister(root, credential=container.key)
    assert (info.url, info.size) == (root, 3)
    assert [data for _, data in IterableWrapper([info]).read_files_by_azure(credential=container.key)] == [b"old"]


def test_a_sas_in_the_root_lists_and_goes_no_further(container: Container) -> None:
    """Not into URLs, reprs, plain pickles or error messages; readers need a separate credential."""
    fill(container)
    secret = container.sas()
    signature = secret.partition("sig=")[2].partition("&")[0]
    pipe = AzureBlobFileLister(f"{container.url}?{secret}")
    urls = list(pipe)
    assert len(urls) == len(NAMES)
    assert signature not in "".join(urls) + repr(pipe) + str(vars(pipe)) + repr(pickle.dumps(pipe))
    with pytest.raises(ClientAuthenticationError, match="No credential was sent: pass credential="):
        list(pipe.read_files_by_azure(credential=False))
    read = pipe.read_files_by_azure(credential=AzureSasCredential(secret))
    assert [data.decode() for _, data in read] == NAMES
    with pytest.raises(ResourceNotFoundError) as caught:
        list(AzureBlobFileLister(f"{container.url}/none?{secret}"))
    assert signature not in str(caught.value)


def test_a_refused_list_without_credential_says_so(container: Container) -> None:
    fill(container)
    with pytest.raises((ClientAuthenticationError, ResourceNotFoundError), match="No credential was sent"):
        list(AzureBlobFileLister(container.url, credential=False))


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"source": "no url"}, ValueError, "source"),
        ({"source": ["https://account.blob.core.windows.net/c", 7]}, TypeError, "source"),
        ({"source": "https://account.blob.core.windows.net/c", "masks": [b"*.jpg"]}, TypeError, "masks"),
        ({"source": "https://account.blob.core.windows.net/c", "credential": "key"}, TypeError, "credential"),
        ({"source": "https://account.blob.core.windows.net/c", "transfer": {}}, TypeError, "transfer"),
        ({"source": "https://account.blob.core.windows.net/c", "credentails": False}, TypeError, "credentails"),
    ],
)
def test_wrong_arguments_fail_at_once(arguments: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        AzureBlobFileLister(**arguments)


def test_its_length_is_not_known(container: Container) -> None:
    with pytest.raises(TypeError):
        len(AzureBlobFileLister(container.url, credential=container.key))


def test_it_lists_lazily_by_page(fault_service: FaultService, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is requested before the first item, and one page is read ahead, not the whole listing."""
    for number in range(12_000):
        fault_service.put("data", f"{number:06d}", b"")
    pipe = AzureBlobFileLister(fault_service.container_url("data"), credential=False)
    assert fault_service.requests("list_blobs") == []
    blobs = iter(pipe)
    next(blobs)
    assert len(fault_service.requests("list_blobs")) <= 2
    assert 1 + sum(1 for _ in blobs) == 12_000
    assert len(fault_service.requests("list_blobs")) == 3


def test_an_empty_page_is_not_the_end(fault_service: FaultService) -> None:
    fault_service.put("data", "train/0", b"")
    fault_service.script("list_blobs", [EmptyPageWithMarker()])
    for root in ("data", "data/train"):
        fault_service.script("list_blobs", [EmptyPageWithMarker()])
        url = fault_service.container_url("data").replace("/data", f"/{root}")
        assert len(list(AzureBlobFileLister(url, credential=False))) == 1


def test_a_long_list_of_roots_costs_no_graph_traversal() -> None:
    """Traversal pickles collections, so the roots must not be in one."""
    pipe = AzureBlobFileLister([f"https://account.blob.core.windows.net/c/{i}" for i in range(10)])
    assert not any(isinstance(value, (list, tuple, dict)) for value in vars(pipe).values())
