"""Clients that send too much, too slowly, or do not read; keys, TLS, and the end of a server."""

import contextlib
import datetime
import ipaddress
import json
import re
import signal
import socket
import ssl
import threading
import time

import httpx
import openai
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from fastapi import FastAPI

from pipeline.errors import PipelineError
from pipeline.serve import server
from pipeline.serve.auth import ApiKeys, read_keys, require_guarded
from pipeline.serve.limits import Limits
from tests.serve.test_api import create_engine, metric, until
from tests.support.serving import MODEL, serving, started

SHORT = Limits(max_body_bytes=20_000, max_header_bytes=4000, client_seconds=0.5)
BODY = {"model": MODEL, "prompt": [7, 7], "max_tokens": 150}


@pytest.fixture
def engine(tokenizer):
    return create_engine(tokenizer)


@pytest.fixture
def address(engine, tokenizer):
    with serving(engine, tokenizer, limits=SHORT) as address:
        yield address


@contextlib.contextmanager
def connected(address, receive_buffer=None):
    with socket.socket() as connection:
        if receive_buffer is not None:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        connection.settimeout(20)
        connection.connect(("127.0.0.1", int(address.rsplit(":", 1)[1])))
        yield connection


def received(connection) -> str:
    """All that comes until the server closes the connection."""
    parts = []
    with contextlib.suppress(ConnectionResetError):
        while part := connection.recv(65536):
            parts.append(part)
    return b"".join(parts).decode()


def head(address, **headers):
    lines = [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join(["POST /v1/completions HTTP/1.1", "Host: x", *lines, "", ""]).encode()


def test_a_body_that_is_too_large_is_refused_before_it_is_read(address, engine):
    with connected(address) as connection:
        connection.sendall(head(address, Content_Length=60_000_000))
        assert connection.recv(65536).startswith(b"HTTP/1.1 413 ")
    reply = httpx.post(f"{address}/v1/completions", json={**BODY, "prompt": "a" * 30_000})
    assert reply.status_code == 413
    assert reply.json()["error"]["code"] == "request_too_large"
    assert re.search(
        r"the body has 30\d\d\d bytes; this server reads 20000: .* larger serve.max_body_bytes", reply.text
    )
    assert not engine.has_work


def test_a_body_without_a_length_is_counted(address):
    pieces = (b" " * 1000 for _ in range(100))
    reply = httpx.post(f"{address}/v1/completions", content=pieces)
    assert reply.status_code == 413
    assert "the body has more than 20000 bytes" in reply.text


def test_headers_that_are_too_large_are_refused(address):
    for filler in ("x" * 10_000, "x" * 4100):
        with connected(address) as connection:
            connection.sendall(head(address, X_Filler=filler, Content_Length=0))
            assert connection.recv(65536).startswith(b"HTTP/1.1 431 ")
    with connected(address) as connection:  # and never end
        connection.sendall(b"GET /health HTTP/1.1\r\nX-A: ")
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            for _ in range(100):
                connection.sendall(b"x" * 1000)
                time.sleep(0.001)
        assert "431" in received(connection)


@pytest.mark.parametrize(
    ("sent", "part"),
    [
        (b"", "headers"),
        (b"POST /v1/comple", "headers"),
        (b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nX-A:", "headers"),
        (b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{", "body"),
    ],
    ids=["nothing", "half a line", "half of the headers", "half a body"],
)
def test_a_client_that_stops_in_the_middle_is_answered_and_closed(address, sent, part):
    with connected(address) as connection:
        connection.sendall(sent)
        started = time.monotonic()
        reply = received(connection)
        assert time.monotonic() - started < 5
    assert reply.startswith("HTTP/1.1 408 ")
    assert f"the request's {part} did not come within 0.5 seconds" in reply


def test_a_body_that_was_refused_and_never_ends_is_closed_without_a_second_answer(address):
    with connected(address) as connection:
        connection.sendall(head(address, Content_Length=60_000_000) + b"{")
        started = time.monotonic()
        reply = received(connection)
        assert time.monotonic() - started < 5
    assert reply.startswith("HTTP/1.1 413 ")
    assert reply.count("HTTP/1.1") == 1


def test_there_are_only_so_many_connections(engine, tokenizer):
    limits = Limits(max_connections=6)
    with serving(engine, tokenizer, limits=limits) as address:
        with contextlib.ExitStack() as stack:
            for _ in range(limits.max_connections):
                stack.enter_context(connected(address)).sendall(b"G")
            last = stack.enter_context(connected(address))
            assert received(last).startswith("HTTP/1.1 503 ")
        assert until(lambda: httpx.get(f"{address}/health").status_code == 200)


def test_a_client_that_does_not_read_is_closed_and_its_answer_ends(tokenizer):
    engine = create_engine(tokenizer, max_length=200_000, block_size=None, round_tokens=20)
    engine.step_seconds = 0.005
    with (
        serving(engine, tokenizer, limits=SHORT, send_buffer=4096) as address,
        connected(address, receive_buffer=4096) as connection,  # so that little is on its way
    ):
        text = json.dumps({**BODY, "max_tokens": 190_000, "stream": True, "return_token_ids": True}).encode()
        connection.sendall(head(address, Content_Length=len(text)) + text)
        assert until(lambda: engine.num_running == 1)
        assert until(lambda: len(engine.cancelled) == 1)
        assert until(lambda: metric(address, 'serve_requests_total{outcome="cancelled"}') == 1)


def test_more_requests_than_may_wait_are_sent_away(engine, tokenizer):
    engine.step_seconds = 0.2
    limits = Limits(max_waiting=2)
    with serving(engine, tokenizer, limits=limits) as address, contextlib.ExitStack() as stack:
        for _ in range(engine.config.num_slots + limits.max_waiting):
            body = {**BODY, "stream": True}
            stack.enter_context(httpx.stream("POST", f"{address}/v1/completions", json=body, timeout=20))
        assert until(lambda: engine.num_waiting == 2)
        reply = httpx.post(f"{address}/v1/completions", json=BODY)
        assert (reply.status_code, reply.headers["retry-after"]) == (429, "1")
        assert reply.json()["error"]["code"] == "server_overloaded"


def test_a_key_has_so_many_requests_at_a_time_and_others_theirs(engine, tokenizer):
    engine.step_seconds = 0.05
    limits = Limits(max_requests_per_key=2)
    keys = [{"Authorization": f"Bearer {name}"} for name in ("first", "second")]
    with serving(engine, tokenizer, limits=limits, keys=["first", "second"]) as address:
        url = f"{address}/v1/completions"
        endless = {**BODY, "prompt": [7, 7], "max_tokens": 150, "stream": True}
        with contextlib.ExitStack() as stack:
            for _ in range(2):
                stack.enter_context(httpx.stream("POST", url, json=endless, headers=keys[0], timeout=20))
            refused = httpx.post(url, json=BODY, headers=keys[0])
            assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
            assert refused.json()["error"]["code"] == "rate_limit_exceeded"
            assert httpx.post(url, json=BODY, headers=keys[1]).status_code == 200
        assert until(lambda: httpx.post(url, json=BODY, headers=keys[0]).status_code == 200)


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_takes_too_long_ends(engine, tokenizer, stream):
    engine.step_seconds = 0.1
    endless = {**BODY, "prompt": [7, 7], "max_tokens": 190, "stream": stream}
    with serving(engine, tokenizer, limits=Limits(request_seconds=0.5)) as address:
        reply = httpx.post(f"{address}/v1/completions", json=endless, timeout=20)
        assert reply.status_code == (200 if stream else 408)
        error = json.loads(reply.text.split("\n\n")[-2].removeprefix("data: ") if stream else reply.text)["error"]
        assert error["code"] == "request_timeout"
        assert "0.5 s" in error["message"]
        assert until(lambda: not engine.has_work)
        assert metric(address, 'serve_requests_total{outcome="failed"}') == 1
        assert httpx.post(f"{address}/v1/completions", json={**BODY, "max_tokens": 1}).status_code == 200


def test_pipelined_requests_are_answered_in_turn(address):
    with connected(address) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n" * 20)
        found = b""
        while found.count(b"HTTP/1.1 200 OK") < 20:
            found += connection.recv(65536)


def test_a_connection_outlives_the_seconds_for_which_clients_reuse_it(address):
    with connected(address) as connection:
        for pause in (0, 5.5):  # httpx, and so openai's client, reuses a connection for 5 seconds
            time.sleep(pause)
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            assert connection.recv(65536).startswith(b"HTTP/1.1 200 OK")


def test_head_and_options_and_other_origins(engine, tokenizer):
    with serving(engine, tokenizer, cors_origins=["https://app.example"]) as address:
        for path in ("/health", "/ready", "/metrics", "/v1/models"):
            reply = httpx.head(f"{address}{path}")
            assert (reply.status_code, reply.content) == (200, b"")
        asked = {"Origin": "https://app.example", "Access-Control-Request-Method": "POST"}
        reply = httpx.options(f"{address}/v1/chat/completions", headers=asked)
        assert reply.headers["access-control-allow-origin"] == "https://app.example"
        reply = httpx.options(f"{address}/v1/chat/completions", headers={**asked, "Origin": "https://other.example"})
        assert "access-control-allow-origin" not in reply.headers


def test_a_request_is_named_as_its_client_names_it(address):
    assert httpx.get(f"{address}/health", headers={"X-Request-Id": "mine-1"}).headers["x-request-id"] == "mine-1"
    odd = httpx.get(f"{address}/health", headers={"X-Request-Id": "a b"}).headers["x-request-id"]
    assert re.fullmatch("[0-9a-f]{24}", odd)


def test_a_server_with_keys_answers_who_has_one(engine, tokenizer):
    with serving(engine, tokenizer, keys=["secret-1", "secret-2"]) as address:
        for key in ("secret-1", "secret-2"):
            with openai.OpenAI(base_url=f"{address}/v1", api_key=key, max_retries=0) as client:
                assert [model.id for model in client.models.list()] == [MODEL]
        assert httpx.get(f"{address}/v1/models", headers={"X-API-Key": "secret-1"}).status_code == 200
        for headers in ({}, {"Authorization": "Bearer secret"}, {"Authorization": "secret-1"}, {"X-API-Key": "é"}):
            encoded = {name: value.encode() for name, value in headers.items()}
            reply = httpx.post(f"{address}/v1/completions", json=BODY, headers=encoded)
            assert (reply.status_code, reply.json()["error"]["code"]) == (401, "invalid_api_key")
            assert "secret" not in reply.text
        assert httpx.get(f"{address}/metrics").status_code == 401
        assert httpx.get(f"{address}/health").status_code == httpx.get(f"{address}/ready").status_code == 200


def test_keys_come_from_a_file_and_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("PIPELINE_API_KEYS", "a, b")
    file = tmp_path / "keys"
    file.write_text("# of the team\nc\n\n")
    assert len(read_keys(str(file))) == 3
    monkeypatch.delenv("PIPELINE_API_KEYS")
    assert len(read_keys(None)) == 0
    file.write_text("# none\n")
    with pytest.raises(PipelineError, match="which has no key; write one a line"):
        read_keys(str(file))
    with pytest.raises(PipelineError, match=r"serve.api_keys is .*missing, which cannot be read"):
        read_keys(str(tmp_path / "missing"))


@pytest.mark.parametrize("host", ["0.0.0.0", "192.0.2.1", "::", "server.example"])
def test_other_machines_need_a_key_or_an_owner_who_says_that_they_do_not(host):
    with pytest.raises(PipelineError, match=r"PIPELINE_API_KEYS or serve.api_keys=FILE, .* serve.insecure=true"):
        require_guarded(host, ApiKeys([]), insecure=False)
    require_guarded(host, ApiKeys([]), insecure=True)
    require_guarded(host, ApiKeys(["a"]), insecure=False)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.9", "::1", "localhost"])
def test_this_machine_needs_none(host):
    require_guarded(host, ApiKeys([]), insecure=False)


def asking(address, engine):
    """A thread whose request runs, and the list in which its reply will be."""
    replies = []
    thread = threading.Thread(
        target=lambda: replies.append(httpx.post(f"{address}/v1/completions", json=BODY, timeout=20))
    )
    thread.start()
    assert until(lambda: engine.num_running == 1)
    return thread, replies


def test_a_server_that_drains_finishes_what_runs_and_takes_no_more(tokenizer):
    engine = create_engine(tokenizer)
    engine.step_seconds = 0.05
    with started(engine, tokenizer, drain_seconds=20.0) as (address, running):
        thread, replies = asking(address, engine)
        with httpx.Client(base_url=address) as client:
            assert client.get("/ready").status_code == 200
            running.handle_exit(signal.SIGTERM, None)
            assert client.get("/ready").status_code == 503
            assert client.get("/health").status_code == 200
            refused = client.post("/v1/completions", json=BODY)
            assert (refused.status_code, "shutting down" in refused.text) == (503, True)
        thread.join()
        assert replies[0].status_code == 200
        assert replies[0].json()["usage"]["completion_tokens"] == 150
        assert until(lambda: running.should_exit)
        running._captured_signals.clear()


def test_a_second_signal_ends_a_server_at_once(tokenizer):
    engine = create_engine(tokenizer)
    engine.step_seconds = 0.1
    with started(engine, tokenizer, drain_seconds=60.0) as (address, running):
        thread, replies = asking(address, engine)
        begun = time.monotonic()
        running.handle_exit(signal.SIGINT, None)
        time.sleep(0.3)
        assert not running.should_exit
        running.handle_exit(signal.SIGINT, None)
        running._captured_signals.clear()
    assert time.monotonic() - begun < 5
    thread.join()
    assert replies[0].status_code == 503


def test_files_that_are_no_certificate_are_named(tmp_path, engine, tokenizer):
    file = tmp_path / "chain.pem"
    file.write_text("nothing")
    with (
        contextlib.closing(server.bind("127.0.0.1", 0)) as listener,
        pytest.raises(PipelineError, match=r"serve.tls_certificate is .*chain.pem and serve.tls_key .*: .*PEM"),
    ):
        server.create_server(FastAPI(), listener, cut=lambda: None, certificate=(str(file), str(file)))


@pytest.fixture
def certificate(tmp_path):
    """Files of a certificate of this machine's own, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    signed = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now)
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .sign(key, hashes.SHA256())
    )
    chain, secret = tmp_path / "chain.pem", tmp_path / "key.pem"
    chain.write_bytes(signed.public_bytes(serialization.Encoding.PEM))
    secret.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return str(chain), str(secret)


def test_a_server_with_a_certificate_speaks_tls(engine, tokenizer, certificate):
    context = ssl.create_default_context(cafile=certificate[0])
    with started(engine, tokenizer, certificate=certificate) as (address, _):
        reply = httpx.get(f"{address.replace('http:', 'https:')}/v1/models", verify=context)
        assert reply.json()["data"][0]["id"] == MODEL
        with pytest.raises(httpx.TransportError):
            httpx.get(f"{address}/v1/models")
