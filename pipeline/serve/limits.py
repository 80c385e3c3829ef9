"""How much of a server one client, or all of them together, may take."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """Holds what a server allows.

    A body has at most `max_body_bytes`, and a request's headers `max_header_bytes`. `max_waiting` requests may wait for
    a slot, and `max_connections` connections be open. A client has `client_seconds` to send its headers, again for its
    body, and to take what it was sent before more is written. Stored responses take at most `max_stored_bytes`. A key
    has at most `max_requests_per_key` requests at a time, and a request `request_seconds` for its answers; None is no
    limit.
    """

    max_body_bytes: int = 4 * 2**20
    max_header_bytes: int = 64 * 2**10
    max_waiting: int = 512
    max_connections: int = 1024
    client_seconds: float = 30.0
    max_stored_bytes: int = 64 * 2**20
    max_requests_per_key: int | None = None
    request_seconds: float | None = None


DEFAULT = Limits()
