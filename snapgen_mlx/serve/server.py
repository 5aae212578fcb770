"""The application on a socket, with what keeps slow and many clients in bounds."""

import socket

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from ..errors import SnapGenError
from .app import create_app
from .engine import Engine

HEADER_SECONDS = 10  # seconds within which a request's headers must arrive
CONNECTIONS = 512  # connections at once; more get the answer 503


class PatientProtocol(H11Protocol):
    """Closes connections that send no headers in time, which uvicorn would keep."""

    def connection_made(self, transport):
        super().connection_made(transport)
        self._expect_headers()

    def on_response_complete(self):
        super().on_response_complete()
        self._expect_headers()

    def _expect_headers(self):
        self.loop.call_later(HEADER_SECONDS, self._give_up)

    def _give_up(self):
        if self.conn.their_state is h11.IDLE and not self.transport.is_closing():
            self.transport.close()


class Server(uvicorn.Server):
    """Stops drawing when it is told to stop, so that it need not wait for the whole queue."""

    def __init__(self, config: uvicorn.Config, engine: Engine):
        super().__init__(config)
        self.engine = engine

    def handle_exit(self, sig, frame):
        self.engine.stop()
        self.force_exit = self.should_exit  # the second time at once
        self.should_exit = True


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens. Raises SnapGenError when it cannot."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    s = socket.socket(family, socket.SOCK_STREAM)
    s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        s.bind((host, port))
        s.listen(2048)
    except (OSError, OverflowError) as e:
        s.close()
        why = getattr(e, "strerror", None) or e
        raise SnapGenError(f"cannot listen on {host}:{port}: {why}; try another --port") from e
    return s


def configuration(engine: Engine, token: str | None = None) -> uvicorn.Config:
    """How uvicorn serves a started engine."""
    return uvicorn.Config(
        create_app(engine, token),
        http=PatientProtocol,
        ws="none",
        lifespan="off",
        access_log=False,
        log_level="warning",
        server_header=False,
        proxy_headers=False,
        limit_concurrency=CONNECTIONS,
        timeout_keep_alive=5,
        timeout_graceful_shutdown=int(engine.timeout),
    )


def serve(engine: Engine, listening: socket.socket, token: str | None = None) -> None:
    """Answer requests until SIGINT or SIGTERM; what is being drawn then is finished."""
    Server(configuration(engine, token), engine).run(sockets=[listening])
    engine.stop()
    engine.join()
