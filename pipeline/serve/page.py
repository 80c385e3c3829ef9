"""The page at `/`: a prompt, its answer as it comes, and what of it was drafted. It loads nothing from elsewhere."""

import base64
import hashlib
import re
from importlib import resources

from starlette.responses import HTMLResponse


def page(*, compares: bool) -> HTMLResponse:
    """Returns the page, which asks the plain arm too where the server `compares`; its own script alone may run."""
    html = resources.files("pipeline.serve").joinpath("static/index.html").read_text(encoding="utf-8")
    html = html.replace("<html ", f'<html data-compare="{str(compares).lower()}" ', 1)
    policy = (
        f"default-src 'none'; script-src {_hash_of(html, 'script')}; style-src {_hash_of(html, 'style')}; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return HTMLResponse(
        html,
        headers={
            "Content-Security-Policy": policy,
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cache-Control": "no-cache",
        },
    )


def _hash_of(html: str, element: str) -> str:
    """Returns the hash by which a policy names the only element of a kind."""
    (content,) = re.findall(rf"<{element}>(.*?)</{element}>", html, re.DOTALL)
    digest = hashlib.sha256(content.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"
