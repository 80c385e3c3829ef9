"""API keys: who may use a server that is reached from other machines."""

import hashlib
import hmac
import ipaddress
import os
from pathlib import Path

from starlette.datastructures import Headers

from pipeline.errors import PipelineError
from pipeline.serve.errors import ApiError

VARIABLE = "PIPELINE_API_KEYS"
DOCS_FILES = "/docs-files/"  # the script and style of the page at /docs
# the pages, which have a field for a key, and what load balancers ask
OPEN_PATHS = ("/", "/docs", "/openapi.json", "/health", "/ready")
SCHEME = "bearer "


class ApiKeys:
    """Holds keys as their sha256; a request needs one of them, unless there are none."""

    def __init__(self, keys: list[str]) -> None:
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    def __len__(self) -> int:
        return len(self._digests)

    def check(self, path: str, headers: Headers) -> int | None:
        """Returns the number of the key that a request has, None where none is needed.

        Raises ApiError when it has no key of this server's, as `Authorization: Bearer` or `X-API-Key`.
        """
        if not self._digests or path in OPEN_PATHS or path.startswith(DOCS_FILES):
            return None
        authorization = headers.get("authorization", "")
        key = authorization[len(SCHEME) :] if authorization.lower().startswith(SCHEME) else headers.get("x-api-key", "")
        digest = hashlib.sha256(key.strip().encode()).digest()
        # every one is compared, so that the time says nothing of which it was
        found_in = [hmac.compare_digest(digest, known) for known in self._digests]
        if not any(found_in):
            found = "a key that this server does not know" if key else "no key"
            raise ApiError(
                f"the request has {found}; send one as Authorization: Bearer KEY",
                code="invalid_api_key",
                status=401,
                kind="authentication_error",
            )
        return found_in.index(True)


def read_keys(path: str | None) -> ApiKeys:
    """Returns the keys in a file, one a line, and in the environment variable; raises PipelineError."""
    text = os.environ.get(VARIABLE, "").replace(",", "\n")
    if path is not None:
        try:
            text += "\n" + Path(path).read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise PipelineError(f"serve.api_keys is {path}, which cannot be read: {error}; name a text file") from error
    keys = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]
    if path is not None and not keys:
        raise PipelineError(f"serve.api_keys is {path}, which has no key; write one a line")
    return ApiKeys(keys)


def require_guarded(host: str, keys: ApiKeys, *, insecure: bool) -> None:
    """Raises PipelineError when other machines could use a server without a key, and nobody said that they may."""
    if insecure or len(keys) or is_loopback(host):
        return
    raise PipelineError(
        f"serve.host is {host!r}, which other machines reach, and there is no API key; set {VARIABLE} or "
        "serve.api_keys=FILE, or allow everybody: serve.insecure=true"
    )


def is_loopback(host: str) -> bool:
    """Returns whether a host is this machine alone; a name other than localhost may be anything."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
