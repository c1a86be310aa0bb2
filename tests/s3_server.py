"""A real S3 server on this machine (moto's), with latency and faults put in front of it."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import fsspec
from werkzeug.serving import WSGIRequestHandler, make_server

BUCKET = "corpus"
_KEYS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}

Environ = dict[str, Any]
App = Callable[[Environ, Callable[..., Any]], Iterable[bytes]]


@dataclass
class S3Server:
    """Serves one bucket; ``fault`` sees each GET of an object before the store does."""

    endpoint: str
    latency_s: float = 0.0
    """Added to every request."""
    fault: Callable[[str], int | None] = lambda path: None
    """Path of the object to an HTTP status to answer with, or None; may sleep."""
    requests: list[str] = field(default_factory=list)
    """Paths of the objects that were asked for, in order of arrival."""

    @property
    def url(self) -> str:
        return f"s3://{BUCKET}"

    def upload(self, folder: Path, to: str) -> str:
        """Copy a folder; returns its URL."""
        url = f"{self.url}/{to}"
        fs, root = fsspec.core.url_to_fs(url)
        fs.put(f"{folder}/", f"{root}/", recursive=True)
        return url

    def shards_requested(self) -> list[str]:
        """``domain/split/shard`` of each shard asked for."""
        return ["/".join(path.split("/")[-3:]) for path in self.requests if "/shard." in path]


@contextmanager
def s3_server() -> Iterator[S3Server]:
    """Serve until the end of the block; this process and its children find the server by environment."""
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app

    app = DomainDispatcherApplication(create_backend_app)
    server: S3Server | None = None

    def front(environ: Environ, start_response: Callable[..., Any]) -> Iterable[bytes]:
        assert server is not None
        time.sleep(server.latency_s)
        path = environ["PATH_INFO"]
        if environ["REQUEST_METHOD"] == "GET" and path.count("/") > 1:
            server.requests.append(path)
            status = server.fault(path)
            if status is not None:
                start_response(f"{status} injected", [("Content-Length", "0")])
                return []
        return app(environ, start_response)

    http = make_server("127.0.0.1", 0, front, threaded=True, request_handler=_Quiet)
    server = S3Server(f"http://127.0.0.1:{http.server_port}")
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    before = dict(os.environ)
    os.environ.update(_KEYS, AWS_ENDPOINT_URL=server.endpoint)
    try:
        # the store's content is the process's: an earlier server's is removed
        urlopen(Request(f"{server.endpoint}/moto-api/reset", method="POST")).close()
        fsspec.filesystem("s3", skip_instance_cache=True).mkdir(BUCKET)
        yield server
    finally:
        os.environ.clear()
        os.environ.update(before)
        http.shutdown()
        thread.join()
        fsspec.get_filesystem_class("s3").clear_instance_cache()


class _Quiet(WSGIRequestHandler):
    def log(self, *args: Any, **kwargs: Any) -> None:
        pass
