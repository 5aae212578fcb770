"""A server in this process, for the tests of its API and of its page."""

import threading
import time
from contextlib import contextmanager

import uvicorn

from snapgen_mlx.serve.engine import Engine
from snapgen_mlx.serve.gallery import Gallery
from snapgen_mlx.serve.server import configuration, listen


@contextmanager
def serving(model, folder, token=None, **options):
    """Yields (address, engine) of a server that draws with ``model`` (None: the embedded one)."""
    engine = Engine({"model": model}, Gallery(folder), **options)
    engine.start()
    listening = listen("127.0.0.1", 0)
    server = uvicorn.Server(configuration(engine, token))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}", engine
    finally:
        engine.stop()
        server.should_exit = True
        thread.join()
        engine.join()
