"""A server around an engine, in this process."""

import contextlib
import socket
import threading

import openai

from pipeline.serve import server
from pipeline.serve.api import Api
from pipeline.serve.app import create_app
from pipeline.serve.auth import ApiKeys
from pipeline.serve.engine_thread import EngineThread
from pipeline.serve.limits import DEFAULT
from pipeline.serve.request_reader import ServedModel

MODEL = "tiny"
LIMIT_SECONDS = 30.0  # until a server has ended, on a machine that does other things too


@contextlib.contextmanager
def serving(engine, tokenizer, **options):
    """The address of a server on a free port, until the context ends."""
    with started(engine, tokenizer, **options) as (address, _):
        yield address


def client_of(address, **options):
    """OpenAI's client of a server, which asks once."""
    return openai.OpenAI(**{"base_url": f"{address}/v1", "api_key": "none", "max_retries": 0, "timeout": 20} | options)


@contextlib.contextmanager
def started(
    engine,
    tokenizer,
    *,
    temperature=0.0,
    date=None,
    keys=(),
    limits=DEFAULT,
    cors_origins=(),
    send_buffer=None,
    **network,
):
    """A server's address, and the server; `plain` is a second engine, `network` further options of `create_server`."""
    plain = network.pop("plain", None)
    worker = EngineThread(engine)
    workers = [worker] if plain is None else [worker, EngineThread(plain)]
    served = ServedModel(name=MODEL, effort="low", temperature=temperature, date=date)
    api = Api(worker, engine, tokenizer, served, limits)
    alone = None if plain is None else Api(workers[1], plain, tokenizer, served, limits)

    def drain():
        api.is_draining = True

    with contextlib.closing(server.bind("127.0.0.1", 0)) as listener:
        if send_buffer is not None:  # of the connections too
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
        address = server.url(listener)
        app = create_app(api, keys=ApiKeys(list(keys)), plain=alone, cors_origins=cors_origins)
        running = server.create_server(app, listener, cut=worker.end, limits=limits, on_drain=drain, **network)
        thread = threading.Thread(target=server.serve, args=(running, listener))
        for one in workers:
            one.start()
        thread.start()
        try:
            yield address, running
        finally:
            running.should_exit = True
            thread.join(LIMIT_SECONDS)
            assert all(one.stop(LIMIT_SECONDS) for one in workers)
            assert not thread.is_alive()
