"""An HTTP server on 127.0.0.1 that gives out the files of a folder, and fails as it is told to."""

import contextlib
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class FailingServer(ThreadingHTTPServer):
    """The server; ``requests`` counts what it was asked for, ``sent`` the bytes of each path.

    ``fault(path, number)`` names the fault of the number-th request for a path: '' for none, '503' or another code,
    'break' after half of the content, 'stall' there until the server ends. ``ranges`` lets it send the rest of a file.
    """

    daemon_threads = True

    def __init__(self, folder: Path, fault: Callable[[str, int], str], ranges: bool = True):
        super().__init__(('127.0.0.1', 0), _Handler)
        self.folder, self.fault, self.ranges = folder, fault, ranges
        self.requests: Counter[str] = Counter()
        self.sent: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()
        self.ends = threading.Event()
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f'http://127.0.0.1:{self.server_port}'

    def handle_error(self, request, client_address) -> None:
        """Say nothing: clients that are killed break their connections."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'
    server: FailingServer

    def do_GET(self) -> None:
        server, path = self.server, self.path.partition('?')[0].lstrip('/')
        with server.lock:
            fault = server.fault(path, server.requests[path])
            server.requests[path] += 1
            server.faults[fault] += 1
        file = server.folder / path
        if fault.isdecimal() or not file.is_file():
            self.send_response(int(fault) if fault else 404)
            self.send_header('Content-Length', '0')
            self.end_headers()
            return
        content, start = file.read_bytes(), 0
        wanted = self.headers.get('Range', '')
        etag = f'"{len(content)}"'
        if server.ranges and wanted and self.headers.get('If-Range') == etag:
            start = int(wanted.removeprefix('bytes=').rstrip('-'))
            self.send_response(206)
            self.send_header('Content-Range', f'bytes {start}-{len(content) - 1}/{len(content)}')
        else:
            self.send_response(200)
        self.send_header('ETag', etag)
        self.send_header('Content-Length', str(len(content) - start))
        self.end_headers()
        end = start + (len(content) - start) // 2 if fault else len(content)
        with server.lock:
            server.sent[path] += end - start
        self.wfile.write(content[start:end])
        if fault == 'stall':
            self.wfile.flush()
            server.ends.wait()
        self.close_connection = True

    def log_message(self, format: str, *args) -> None:
        """Say nothing."""


@contextlib.contextmanager
def serve(
        folder: Path,
        fault: Callable[[str, int], str] = lambda path, number: '',
        **options,
) -> Iterator[FailingServer]:
    """Run a server during the block."""
    server = FailingServer(folder, fault, **options)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.ends.set()
        server.shutdown()
        server.server_close()
        thread.join()


def fail_now_and_then(path: str, number: int) -> str:
    """Fail every other request for the files 0, 1 and 2, by 503, a broken connection and silence."""
    return {'0': '503', '1': 'break', '2': 'stall'}.get(re.sub(r'\D', '', path), '') if number % 2 == 0 else ''
