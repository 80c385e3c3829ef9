"""A server around an engine, in this process."""

import contextlib
import threading

from pipeline.serve import server
from pipeline.serve.api import Api, create_app
from pipeline.serve.engine_thread import EngineThread

MODEL = "tiny"
LIMIT_SECONDS = 30.0  # until a server has ended, on a machine that does other things too


@contextlib.contextmanager
def serving(engine, tokenizer, **options):
    """A server on a free port, and how many seconds it may take to end."""
    worker = EngineThread(engine)
    api = Api(worker, engine, tokenizer, model=MODEL, effort="low", **options)
    with contextlib.closing(server.bind("127.0.0.1", 0)) as listener:
        address = server.url(listener)
        running = server.create_server(create_app(api), listener, cut=worker.end)
        thread = threading.Thread(target=server.serve, args=(running, listener))
        worker.start()
        thread.start()
        try:
            yield address
        finally:
            running.should_exit = True
            thread.join(LIMIT_SECONDS)
            assert worker.stop(LIMIT_SECONDS)
            assert not thread.is_alive()
