"""The real HTTP server in a thread, on a loopback port that is free."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator, Sequence

from vlbench.serve.api.api_settings import ApiSettings
from vlbench.serve.api.app import create_app
from vlbench.serve.api.http_server import ApiServer, bind_socket
from vlbench.serve.api.remote_images import RemoteImages
from vlbench.serve.api.served_model import ServedModel


@contextlib.contextmanager
def running_server(
    models: Sequence[ServedModel],
    settings: ApiSettings | None = None,
    remote_images: RemoteImages | None = None,
) -> Iterator[tuple[ApiServer, int]]:
    """Serve models while the context lasts; give the server and its port."""
    settings = settings or ApiSettings()
    listener = bind_socket("127.0.0.1", 0)
    server = ApiServer(create_app(models, settings, remote_images), settings)
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.005)
    try:
        yield server, listener.getsockname()[1]
    finally:
        server.end_now()
        thread.join(20)
        server.close_engines()
        listener.close()
        assert not thread.is_alive()
