"""How connections to other programs' servers are used."""

import httpx

REUSE_SECONDS = 2.0


def limits() -> httpx.Limits:
    """Returns httpx's limits for another server: as many connections as requests, idle ones reused for a moment only.

    vLLM, SGLang and sglang-jax run on uvicorn, which closes a connection that was idle for 5 seconds; httpx reuses one
    for as long, and a request that meets the closing is lost.
    """
    return httpx.Limits(max_connections=None, keepalive_expiry=REUSE_SECONDS)
