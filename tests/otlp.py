"""An OpenTelemetry collector for tests: it listens on the loopback and keeps the spans that it gets."""

from __future__ import annotations

import gzip
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest


@dataclass(frozen=True)
class Span:
    """One span as it arrived. parent: hexadecimal, empty for none. resource: of the sending process."""

    name: str
    trace: str
    id: str
    parent: str
    began: float
    ended: float
    failed: bool
    values: dict[str, Any]
    resource: dict[str, Any]


class Collector:
    """endpoint: where to send spans."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.endpoint = ""

    def named(self, name: str, count: int = 1, seconds: float = 20.0) -> list[Span]:
        """The spans of this name, once there are `count`."""
        end = time.monotonic() + seconds
        while True:
            found = [span for span in list(self.spans) if span.name == name]
            if len(found) >= count:
                return found
            names = sorted(span.name for span in self.spans)
            assert time.monotonic() < end, f"{len(found)} spans {name}, not {count}; others: {names}"
            time.sleep(0.02)


@contextmanager
def collecting() -> Iterator[Collector]:
    collector = Collector()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            if self.headers.get("content-encoding") == "gzip":
                body = gzip.decompress(body)
            collector.spans += _spans(ExportTraceServiceRequest.FromString(body))
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    collector.endpoint = f"http://127.0.0.1:{server.server_address[1]}/v1/traces"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield collector
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _spans(request: ExportTraceServiceRequest) -> Iterator[Span]:
    for group in request.resource_spans:
        resource = _values(group.resource.attributes)
        for scope in group.scope_spans:
            for span in scope.spans:
                yield Span(
                    span.name,
                    span.trace_id.hex(),
                    span.span_id.hex(),
                    span.parent_span_id.hex(),
                    span.start_time_unix_nano / 1e9,
                    span.end_time_unix_nano / 1e9,
                    span.status.code == 2,
                    _values(span.attributes),
                    resource,
                )


def _values(attributes: Any) -> dict[str, Any]:
    return {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in attributes}
