"""The page of runs that are still writing, from a server on this machine alone.

It answers three paths, to GET: / (the page), /data (what the page holds, packed anew) and /version (which changes when
a run has written). There is nothing else in it to ask for: no path is ever made a file name. It listens on the loopback
address, and answers only who calls it by a name of that, so that a page of another site cannot read it under its own.
"""

from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from gspo.report.view.pack import packed
from gspo.report.view.page import page
from gspo.run import tokens
from gspo.types import UserError

HOST = "127.0.0.1"


def version(folders: list[Path]) -> str:
    """A text that changes whenever a run writes a line of metrics or a record of tokens."""
    marks = []
    for folder in folders:
        records = [path for paths in tokens.files(folder).values() for path in paths]
        for path in [folder / "metrics.jsonl", *records]:
            try:
                stat = path.stat()
                marks.append(f"{path.name}:{stat.st_size}:{stat.st_mtime_ns}")
            except FileNotFoundError:
                continue
    return " ".join(marks)


def make_server(folders: list[Path], limit: int, port: int = 0) -> ThreadingHTTPServer:
    """A server that has begun to listen; port 0: any that is free. Raises UserError where it cannot."""
    answers: dict[str, tuple[str, Callable[[], str]]] = {
        "/": ("text/html", lambda: page(packed(folders, limit), live=True)),
        "/data": ("text/plain", lambda: packed(folders, limit)),
        "/version": ("text/plain", lambda: version(folders)),
    }

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            port = self.server.server_address[1]
            if self.headers.get("Host") not in (f"{HOST}:{port}", f"localhost:{port}"):
                return self.answer(403, "text/plain", "this server is for its own machine\n")
            if self.path not in answers:
                return self.answer(404, "text/plain", "there is no such page\n")
            kind, make = answers[self.path]
            try:
                return self.answer(200, kind, make())
            except UserError as error:
                return self.answer(503, "text/plain", f"{error}\n")

        def answer(self, code: int, kind: str, text: str) -> None:
            content = text.encode()
            self.send_response(code)
            self.send_header("Content-Type", f"{kind}; charset=utf-8")
            self.send_header("Content-Length", str(len(content)))
            self.send_header("Cache-Control", "no-store")
            self.send_header("X-Content-Type-Options", "nosniff")
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            """A line for each look would bury all others."""

    try:
        return ThreadingHTTPServer((HOST, port), Handler)
    except OSError as error:
        raise UserError(f"--port={port}: {error.strerror}; leave it out for any that is free") from None
