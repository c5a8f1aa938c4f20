"""Whether the Hub answers is found out by asking once."""

from __future__ import annotations

from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import pytest
from huggingface_hub import constants

from vlmprune.hosts.pretrained import reachable


class Counted(BaseHTTPRequestHandler):
    """Refuses everything, and counts it."""

    asked = 0

    def do_HEAD(self) -> None:
        type(self).asked += 1
        self.send_error(404)

    def log_message(self, *_: Any) -> None:
        return


def test_what_answers_is_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    with ThreadingHTTPServer(("127.0.0.1", 0), Counted) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        # Even a refusal is an answer.
        assert reachable() and Counted.asked == 1
        server.shutdown()
    assert not reachable() and Counted.asked == 1
