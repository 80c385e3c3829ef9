import http.server
import threading
import time

import httpx
import pytest

from pipeline.external import connections


class OneAnswer(http.server.BaseHTTPRequestHandler):
    """Answers a connection's first request and closes it when a second one comes, as servers close idle ones."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        if getattr(self, "has_answered", False):
            self.close_connection = True
            return
        self.has_answered = True
        self.send_response(200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"ok")

    def log_message(self, *arguments):
        pass


@pytest.fixture
def address():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), OneAnswer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def test_a_connection_that_was_idle_is_not_used_again(address):
    with httpx.Client(limits=connections.limits(), trust_env=False) as client:
        assert client.get(address).text == "ok"
        with pytest.raises(httpx.RemoteProtocolError):  # so the server does close it
            client.get(address)
        assert client.get(address).text == "ok"
        time.sleep(connections.REUSE_SECONDS + 0.2)
        assert client.get(address).text == "ok"
