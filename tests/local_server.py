"""A local HTTP server that answers JSON, as often as asked badly."""

import contextlib
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@contextlib.contextmanager
def serve(answer):
    """A server for POST requests of JSON, as an object with its `url`.

    `faults` are what it does first, in order: a status, dropped, slow, broken, or what `answer(asked, fault)` makes of
    it; None is no fault. `seen` holds what it was asked, `answered` how often it answered without a fault.
    """

    class Handler(BaseHTTPRequestHandler):
        faults, reply, seen, answered = [], "", [], 0

        def do_POST(self):
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            Handler.seen.append(asked)
            fault = Handler.faults.pop(0) if Handler.faults else None
            body = json.dumps(answer(asked, fault)).encode()
            if fault == "dropped":
                self.close_connection = True
                self.connection.shutdown(2)
                return
            if fault == "slow":
                time.sleep(1.5)
            if fault == "broken":
                body = body[:30]
            Handler.answered += fault is None
            self.send_response(fault if isinstance(fault, int) else 200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Retry-After", "0")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    Handler.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    try:
        yield Handler
    finally:
        server.shutdown()
        server.server_close()
