"""A server around an engine, in this process."""

import contextlib
import threading

from pipeline.serve import server
from pipeline.serve.api import Api, ServedModel
from pipeline.serve.app import create_app
from pipeline.serve.auth import ApiKeys
from pipeline.serve.engine_thread import EngineThread
from pipeline.serve.limits import DEFAULT

MODEL = "tiny"
LIMIT_SECONDS = 30.0  # until a server has ended, on a machine that does other things too


@contextlib.contextmanager
def serving(engine, tokenizer, **options):
    """The address of a server on a free port, until the context ends."""
    with started(engine, tokenizer, **options) as (address, _):
        yield address


@contextlib.contextmanager
def started(
    engine,
    tokenizer,
    *,
    date=None,
    temperature=0.0,
    keys=(),
    limits=DEFAULT,
    cors_origins=(),
    drain_seconds=server.GRACE_SECONDS,
):
    """A server's address, and the server."""
    worker = EngineThread(engine)
    served = ServedModel(name=MODEL, effort="low", temperature=temperature, date=date)
    api = Api(worker, engine, tokenizer, served, limits)

    def drain():
        api.is_draining = True

    with contextlib.closing(server.bind("127.0.0.1", 0)) as listener:
        address = server.url(listener)
        app = create_app(api, keys=ApiKeys(list(keys)), cors_origins=cors_origins)
        running = server.create_server(
            app, listener, cut=worker.end, limits=limits, on_drain=drain, drain_seconds=drain_seconds
        )
        thread = threading.Thread(target=server.serve, args=(running, listener))
        worker.start()
        thread.start()
        try:
            yield address, running
        finally:
            running.should_exit = True
            thread.join(LIMIT_SECONDS)
            assert worker.stop(LIMIT_SECONDS)
            assert not thread.is_alive()
