"""The pipelines to copy do what they say, on Azurite."""

from __future__ import annotations

import io
import json
from collections import Counter
from typing import Any

import pytest
import torch
from PIL import Image
from torchdata.stateful_dataloader import StatefulDataLoader

from recipes.pipelines import image_nodes, images, jsonlines, webdataset
from tests.azurite.container import Container


def test_webdataset_trains_and_resumes(container: Container) -> None:
    folder = f"{container.url}/shards"
    urls = webdataset.pack(webdataset.make_samples(200), folder, container.key)
    assert urls == [container.blob_url("shards/train-000000.tar")]
    torch.manual_seed(0)
    losses = webdataset.train(folder, container.key, epochs=3, workers=0)
    assert len(losses) == 3 * 7
    assert sum(losses[-7:]) < sum(losses[:7])

    def loader() -> StatefulDataLoader:
        return StatefulDataLoader(webdataset.make_dataset(folder, container.key), batch_size=32)

    whole = [labels.tolist() for _, labels in loader()]
    interrupted, resumed = loader(), loader()
    batches = iter(interrupted)
    for _ in range(3):
        next(batches)
    resumed.load_state_dict(interrupted.state_dict())
    assert [labels.tolist() for _, labels in resumed] == whole[3:]


def test_webdataset_with_workers_sees_every_sample_once(container: Container) -> None:
    for part in range(3):
        webdataset.pack(webdataset.make_samples(10 + part), f"{container.url}/shards/{part}", container.key)
    loader = StatefulDataLoader(
        webdataset.make_dataset(f"{container.url}/shards", container.key), batch_size=4, num_workers=2
    )
    labels = Counter(label for _, labels in loader for label in labels.tolist())
    assert labels == Counter(number % 10 for part in range(3) for number in range(10 + part))


@pytest.mark.parametrize("workers", [0, 2])
def test_jsonlines_reads_each_record_once(container: Container, workers: int) -> None:
    for blob in range(2):
        lines = [json.dumps({"id": f"{blob}-{line}", "text": "ü" * (line % 90)}) for line in range(500)]
        container.put(f"logs/{blob}.jsonl", "\n".join(lines).encode())
    loader = jsonlines.make_loader(
        f"{container.url}/logs/", container.key, chunk_size=4096, batch_size=64, workers=workers
    )
    ids = Counter(record["id"] for batch in loader for record in batch)
    assert ids == Counter(f"{blob}-{line}" for blob in range(2) for line in range(500))


def put_images(container: Container) -> list[str]:
    for number in range(9):
        file = io.BytesIO()
        Image.new("RGB", (8 + number, 8), (number, 0, 0)).save(file, "PNG")
        container.put(f"photos/{number}.png", file.getvalue())
    container.put("photos/empty.png", b"")
    container.put("photos/notes.txt", b"x" * 1000)
    return [container.blob_url(f"photos/{number}.png") for number in range(9)]


def check(batches: list[Any], urls: list[str]) -> None:
    assert [tuple(pixels.shape[1:]) for _, pixels in batches] == [(3, 32, 32)] * len(batches)
    found = {
        url: round(image[0].max().item() * 255)
        for names, pixels in batches
        for url, image in zip(names, pixels, strict=True)
    }
    assert found == {url: number for number, url in enumerate(urls)}
    assert sum(len(names) for names, _ in batches) == len(urls)


def test_images_are_picked_by_size_and_batched(container: Container) -> None:
    urls = put_images(container)
    check(list(images.make_loader(f"{container.url}/photos/", container.key, least=50, batch_size=4, workers=2)), urls)


def test_image_nodes_do_the_same_and_resume(container: Container) -> None:
    urls = put_images(container)

    def loader() -> Any:
        return image_nodes.make_loader(f"{container.url}/photos/", container.key, least=50, batch_size=4)

    whole = list(loader())
    check(whole, urls)
    interrupted, resumed = loader(), loader()
    next(iter(interrupted))
    resumed.load_state_dict(interrupted.state_dict())
    assert [names for names, _ in resumed] == [names for names, _ in whole[1:]]


def test_a_sas_in_the_url_will_do(container: Container) -> None:
    """For what is written, listed and read; no URL that comes out holds it."""
    place, sas = container.sas_url.split("?")
    urls = webdataset.pack(webdataset.make_samples(10), f"{place}/shards?{sas}", None)
    assert urls == [container.blob_url("shards/train-000000.tar")]
    assert len(list(webdataset.make_dataset(f"{place}/shards?{sas}", None))) == 10
    container.put("logs/0.jsonl", b'{"id": 1}\n{"id": 2}\n')
    batches = list(jsonlines.make_loader(f"{place}/logs/?{sas}", None, workers=0))
    assert batches == [[{"id": 1}, {"id": 2}]] or batches == [[{"id": 2}, {"id": 1}]]
