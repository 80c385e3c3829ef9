"""Serves an engine over HTTP in a thread of this process, for stages that are clients of their own server."""

import contextlib
import threading
from collections.abc import Iterator

from pipeline.engine.engine import Engine
from pipeline.prompts.tokenizer import Tokenizer
from pipeline.serve import server
from pipeline.serve.api import Api
from pipeline.serve.app import create_app
from pipeline.serve.auth import ApiKeys
from pipeline.serve.engine_thread import EngineThread
from pipeline.serve.request_reader import ServedModel

HOST = "127.0.0.1"


@contextlib.contextmanager
def served(engine: Engine, tokenizer: Tokenizer, model: ServedModel) -> Iterator[str]:
    """Serves a model on a free port of this machine while the context is open; yields the server's address."""
    engine_thread = EngineThread(engine)
    with contextlib.closing(server.bind(HOST, 0)) as listener:
        api = Api(engine_thread, engine, tokenizer, model)
        serving = server.create_server(create_app(api, keys=ApiKeys([])), listener, cut=engine_thread.end)
        thread = threading.Thread(target=server.serve, args=(serving, listener), name="background-server")
        engine_thread.start()
        thread.start()
        try:
            yield server.url(listener)
        finally:
            serving.should_exit = True
            thread.join()
            engine_thread.stop()
