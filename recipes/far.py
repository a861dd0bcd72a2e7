"""Put a network between a client and the emulator: a proxy that adds latency and limits the rate of each connection.

On one machine the emulator answers at once and a connection carries gigabytes a second, so the number of
connections hardly matters there. Across a network a request takes a round trip, and the service limits the rate of each
connection.

``python -m recipes.far PORT`` is the proxy itself; ``with far_away(url) as url`` runs it in a separate process.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import urlsplit

CHUNK = 64 << 10  # bytes that travel together
LOOPBACK = "127.0.0.1"


@contextmanager
def far_away(url: str, *, latency: float = 0.02, rate: float = 4 << 20) -> Iterator[str]:
    """Yield *url*, whose server listens on this machine, as it looks from *latency* seconds and *rate* bytes/s away."""
    port = urlsplit(url).port
    if port is None:
        raise ValueError(f"url {url!r} does not name a port: expected the URL of an emulator on this machine")
    command = [sys.executable, "-m", "recipes.far", str(port), "--latency", str(latency), "--rate", str(rate)]
    # The proxy ends when its standard input does: with this block, or with this process however that ends.
    with subprocess.Popen(
        command, cwd=Path(__file__).parents[1], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as proxy:
        assert proxy.stdin is not None
        assert proxy.stdout is not None
        near = proxy.stdout.readline().strip()
        if not near:
            raise RuntimeError(f"the proxy ended with status {proxy.wait()} before it listened; its error is above")
        try:
            yield url.replace(f":{port}", f":{near}", 1)
        finally:
            proxy.stdin.close()


async def pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, latency: float, rate: float) -> None:
    """Pass on what *reader* receives, each chunk after *latency* seconds and the time it takes at *rate* bytes/s."""
    with suppress(ConnectionError):
        while data := await reader.read(CHUNK):
            await asyncio.sleep(latency + len(data) / rate)
            writer.write(data)
            await writer.drain()
    writer.close()


async def serve(port: int, latency: float, rate: float) -> None:
    """Forward connections to *port* until standard input ends."""

    async def connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection(LOOPBACK, port)
        await asyncio.gather(pass_on(reader, back, latency, rate), pass_on(there, writer, 0, rate))

    async with await asyncio.start_server(connect, LOOPBACK, 0) as server:
        print(server.sockets[0].getsockname()[1], flush=True)
        await asyncio.to_thread(sys.stdin.read)
        os._exit(0)  # open connections end with the process; canceling their tasks would print a traceback for each


def main() -> None:
    parser = argparse.ArgumentParser(description="Make a port of this machine look far away.")
    parser.add_argument("port", type=int)
    parser.add_argument("--latency", type=float, default=0.02, help="seconds added to each request")
    parser.add_argument("--rate", type=float, default=4 << 20, help="bytes/s of each connection")
    options = parser.parse_args()
    asyncio.run(serve(options.port, options.latency, options.rate))


if __name__ == "__main__":
    main()
