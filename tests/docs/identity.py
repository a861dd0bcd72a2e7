"""Ways to sign in to Azurite as the guide shows them: a managed identity's endpoint, and a signed-in ``az``."""

from __future__ import annotations

import http.server
import json
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.azurite.token import AzuriteTokenCredential

_AZ = """#!{python}
import json
print(json.dumps({{"accessToken": {token!r}, "expires_on": {expires_on}, "tokenType": "Bearer"}}))
"""


class _Endpoint(http.server.BaseHTTPRequestHandler):
    """What App Service offers to the identity of an app."""

    def do_GET(self) -> None:
        if self.headers.get("X-IDENTITY-HEADER") != "secret":
            self.send_error(401)
            return
        token = AzuriteTokenCredential().get_token()
        answer = {"access_token": token.token, "expires_on": str(token.expires_on), "token_type": "Bearer"}
        body = json.dumps(answer | {"resource": "https://storage.azure.com"}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: object) -> None:  # noqa: A002
        pass


@contextmanager
def signed_in(folder: Path) -> Iterator[dict[str, str]]:
    """The environment of a machine with a managed identity, where ``az`` in *folder* is signed in too."""
    token = AzuriteTokenCredential().get_token()
    az = folder / "az"
    az.write_text(_AZ.format(python=sys.executable, token=token.token, expires_on=token.expires_on))
    az.chmod(0o755)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Endpoint)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield {"IDENTITY_ENDPOINT": f"http://127.0.0.1:{server.server_port}/token", "IDENTITY_HEADER": "secret"}
    finally:
        server.shutdown()
        server.server_close()
