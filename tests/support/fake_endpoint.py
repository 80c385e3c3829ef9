"""An endpoint that answers as a script says: with statuses, headers and bodies, or not at all."""

import contextlib
import dataclasses
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclasses.dataclass(frozen=True)
class Reply:
    """What goes back. `body` bytes go as they are, all else as JSON; `hangs` keeps the client waiting."""

    body: Any = b""
    status: int = 200
    headers: dict[str, str] = dataclasses.field(default_factory=dict)
    hangs: bool = False


@dataclasses.dataclass
class Fake:
    """What came: bodies and Authorization headers, in order, and how often each prompt was asked."""

    url: str
    bodies: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    keys: list[str | None] = dataclasses.field(default_factory=list)
    most_at_once: int = 0
    at_once: int = 0


Script = Callable[[str, dict[str, Any], int], Reply]


@contextlib.contextmanager
def endpoint(script: Script) -> Iterator[Fake]:
    """`script(path, body, count)` answers the count-th time (from 0) that this body came."""
    lock, over = threading.Lock(), threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                count = fake.bodies.count(body)
                fake.bodies.append(body)
                fake.keys.append(self.headers["Authorization"])
                fake.at_once += 1
                fake.most_at_once = max(fake.most_at_once, fake.at_once)
            reply = script(self.path, body, count)
            if reply.hangs:
                over.wait(30)
            with lock:
                fake.at_once -= 1
            data = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body).encode()
            with contextlib.suppress(ConnectionError):
                self.send_response(reply.status)
                headers = {"Content-Type": "application/json", "Content-Length": str(len(data)), **reply.headers}
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    fake = Fake(f"http://127.0.0.1:{server.server_port}/v1")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield fake
    finally:
        over.set()
        server.shutdown()
        thread.join()
        server.server_close()
