"""A local HTTP server with JSON responses and faults on demand."""

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@contextlib.contextmanager
def serve(answer: Callable[[dict, Any], dict]) -> Iterator[Any]:
    """Run a server for POST requests with JSON bodies in a thread of this process.

    Args:
        answer: `answer(body, fault)` returns the JSON response to a request.

    Yields:
        An object with these attributes. `url`: address of the server. `faults`: faults of the next requests, in order:
        an HTTP status, "dropped" (the connection ends), "slow" (the response takes 1.5 s), "broken" (the response is
        cut), any value that `answer` understands, or None for no fault. `seen`: bodies of all requests. `answered`:
        number of requests without a fault. `reply`: a text that `answer` may use. `raw`: None, or the status, content
        type and body of every response.
    """

    class Handler(BaseHTTPRequestHandler):
        faults, reply, seen, answered, raw = [], "", [], 0, None

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            Handler.seen.append(body)
            fault = Handler.faults.pop(0) if Handler.faults else None
            status = fault if isinstance(fault, int) else 200
            status, kind, content = Handler.raw or (
                status,
                "application/json",
                json.dumps(answer(body, fault)).encode(),
            )
            if fault == "dropped":
                self.close_connection = True
                self.connection.shutdown(2)
                return
            if fault == "slow":
                time.sleep(1.5)
            if fault == "broken":
                content = content[:30]
            Handler.answered += fault is None
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("Retry-After", "0")
            self.end_headers()
            with contextlib.suppress(BrokenPipeError):  # the client no longer waits for a slow response
                self.wfile.write(content)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    Handler.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    try:
        yield Handler
    finally:
        server.shutdown()
        server.server_close()
