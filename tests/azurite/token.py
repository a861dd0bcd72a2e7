"""Bearer tokens that Azurite accepts: the right claims, no signature."""

from __future__ import annotations

import base64
import json
import time
from dataclasses import dataclass, field
from typing import Any

from azure.core.credentials import AccessToken


@dataclass
class AzuriteTokenCredential:
    """A ``TokenCredential`` that creates tokens and records its arguments."""

    lifetime: float = 3600.0  # seconds
    audience: str = "https://storage.azure.com"
    scopes_asked: list[tuple[str, ...]] = field(default_factory=list)
    tokens: list[str] = field(default_factory=list, repr=False)

    def get_token(self, *scopes: str, **options: Any) -> AccessToken:
        now = int(time.time())
        expires_on = int(now + self.lifetime)
        claims = {
            "aud": self.audience,
            "iss": "https://sts.windows.net/00000000-0000-0000-0000-000000000000/",
            "iat": now - 60,
            "nbf": now - 60,
            "exp": expires_on,
            "jti": len(self.tokens),  # every token is different
        }
        token = ".".join([_encode({"alg": "none", "typ": "JWT"}), _encode(claims), ""])
        self.scopes_asked.append(scopes)
        self.tokens.append(token)
        return AccessToken(token, expires_on)


def _encode(part: dict[str, Any]) -> str:
    return base64.urlsafe_b64encode(json.dumps(part).encode()).rstrip(b"=").decode()
