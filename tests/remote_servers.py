"""HTTP and S3 servers on this machine, with faults that a test chooses: latency, dropped connections, 503s, ..."""

import hashlib
import random
import socket
import threading
import time
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Faults:
    """What goes wrong with requests for shards. Every fault is a fraction of them.

    Attributes:
        latency: Seconds before each answer.
        drop: Connections that are closed without an answer.
        unavailable: Answers with status 503.
        truncate: Bodies that end after half of their bytes.
        corrupt: Bodies with one changed byte.
        stall: Requests that are never answered; their connections stay open.
        requests: Requests that were answered or dropped.
        most_at_once: Most requests at the same time.
    """

    def __init__(self, seed=0):
        self.latency = self.drop = self.unavailable = self.truncate = self.corrupt = self.stall = 0.0
        self.requests = self.most_at_once = self.sent = 0
        self.injected = {"drop": 0, "unavailable": 0, "truncate": 0, "corrupt": 0, "stall": 0}
        self._now = 0
        self._random, self._lock = random.Random(seed), threading.Lock()

    def draw(self):
        """Return which fault the next request has, or None."""
        with self._lock:
            self.requests += 1
            for name in self.injected:
                if self._random.random() < getattr(self, name):
                    self.injected[name] += 1
                    return name
        return None

    @contextmanager
    def answering(self):
        """Count a request as being answered, and wait for the latency."""
        with self._lock:
            self._now += 1
            self.most_at_once = max(self.most_at_once, self._now)
        try:
            time.sleep(self.latency)
            yield
        finally:
            with self._lock:
                self._now -= 1


class FolderServer:
    """An HTTP server of a folder, with ranges and ETags as nginx gives them.

    Attributes:
        url: Its URL.
        faults: What goes wrong.
        ranges: Whether it honours ranges.
        status: A status for every answer, None for normal ones.
        ranges_sent: Path, first byte and length of each range.
    """

    def __init__(self, folder):
        self.folder, self.faults = Path(folder), Faults()
        self.ranges, self.status = True, None
        self.ranges_sent = []
        self._server = Server(("127.0.0.1", 0), _handler(self))
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self):
        self._server.shutdown()
        self._server.server_close()


class Proxy:
    """An HTTP proxy in front of another server, such as an S3 server, that injects faults into GET requests of shards.

    Attributes:
        url: Its URL.
        faults: What goes wrong.
    """

    def __init__(self, target):
        self.faults = Faults()
        self._server = Server(("127.0.0.1", 0), _proxy_handler(target, self.faults))
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self):
        self._server.shutdown()
        self._server.server_close()


class Server(ThreadingHTTPServer):
    """A server whose threads end with the process."""

    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request, client_address):
        """Ignore clients that went away."""


class Handler(BaseHTTPRequestHandler):
    """Sends answers with a fault, if there is one; subclasses define the methods."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_):
        pass

    def send(self, status, headers, body, fault=None):
        """Send an answer, or what a fault makes of it."""
        if fault == "stall":
            self.connection.settimeout(120)
            with suppress(OSError):
                self.connection.recv(1)  # returns when the client gives up
            self.close_connection = True
            return
        if fault == "drop":
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        if fault == "unavailable":
            status, headers, body = 503, {"Retry-After": "0"}, b"SlowDown"
        if fault == "corrupt" and body:
            middle = len(body) // 2
            body = body[:middle] + bytes([body[middle] ^ 4]) + body[middle + 1 :]
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault == "truncate":
            self.wfile.write(body[: len(body) // 2])
            self.close_connection = True
            return
        self.wfile.write(body)


def _handler(server):
    class FolderHandler(Handler):
        def do_GET(self):
            fault = server.faults.draw() if ".h5" in self.path and self.command == "GET" else None
            with server.faults.answering():
                self.send(*self.answer(), fault)

        do_HEAD = do_GET

        def answer(self):
            if server.status is not None:
                return server.status, {}, b"no"
            path = server.folder / self.path.lstrip("/")
            if not path.is_file():
                return 404, {}, b"not found"
            status = path.stat()
            etag = hashlib.sha256(f"{status.st_ino} {status.st_mtime_ns} {status.st_size}".encode()).hexdigest()[:16]
            headers = {"ETag": f'"{etag}"'}
            wanted = self.headers.get("Range")
            if self.command == "HEAD":
                return 200, {**headers, "Content-Length": str(status.st_size)}, b""
            if wanted is None or not server.ranges:
                return 200, headers, path.read_bytes()
            first, last = wanted.removeprefix("bytes=").split("-")
            if int(first) >= status.st_size:
                return 416, headers, b""
            with path.open("rb") as file:
                file.seek(int(first))
                body = file.read(int(last) - int(first) + 1)
            server.faults.sent += len(body)
            server.ranges_sent.append((path, int(first), len(body)))
            stop = int(first) + len(body) - 1
            return 206, {**headers, "Content-Range": f"bytes {first}-{stop}/{status.st_size}"}, body

    return FolderHandler


def _proxy_handler(target, faults):
    import http.client
    from urllib.parse import urlsplit

    host = urlsplit(target).netloc

    class ProxyHandler(Handler):
        def do_GET(self):
            reading = self.command == "GET" and ".h5" in self.path and "Range" in self.headers
            fault = faults.draw() if reading else None
            with faults.answering():
                length = int(self.headers.get("Content-Length") or 0)
                body = self.rfile.read(length) if length else None
                connection = http.client.HTTPConnection(host)
                connection.request(self.command, self.path, body, dict(self.headers))
                answer = connection.getresponse()
                data = answer.read()
                connection.close()
                kept = {
                    name: value
                    for name, value in answer.getheaders()
                    if name.lower() not in ("connection", "transfer-encoding", "date", "server", "content-length")
                }
                if self.command == "HEAD":
                    kept["Content-Length"] = answer.getheader("Content-Length") or "0"
                faults.sent += len(data)
                self.send(answer.status, kept, data, fault)

        do_HEAD = do_PUT = do_POST = do_DELETE = do_GET

    return ProxyHandler


@contextmanager
def s3_server():
    """Run moto's S3 server; yields its URL."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    try:
        yield f"http://{host}:{port}"
    finally:
        server.stop()
