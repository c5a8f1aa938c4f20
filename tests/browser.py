"""A headless Chromium over its DevTools pipe, for tests of pages; where one is installed."""

from __future__ import annotations

import json
import os
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

VARIABLE = "VLMPRUNE_TEST_CHROMIUM"
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
# Seconds until an answer counts as missing; generous, since machines are slow and busy.
PATIENCE = 60.0

# Chromium reads commands from descriptor 3 and answers on 4.
_START = """
import fcntl, os, sys
read, write = (fcntl.fcntl(int(fd), fcntl.F_DUPFD, 10) for fd in sys.argv[1:3])
os.dup2(read, 3)
os.dup2(write, 4)
os.execvp(sys.argv[3], sys.argv[3:])
"""


def find() -> str | None:
    """The browser: the one that the variable names, else one of the usual names."""
    named = os.environ.get(VARIABLE)
    if os.name != "posix":
        return None
    return named or next((found for name in NAMES if (found := shutil.which(name))), None)


class Browser:
    """One page; notes all that it asks for and all that it complains of.

    Attributes:
        complaints: errors of scripts, of the console, and of the content security policy.
        requests: addresses that were asked for; those of inlined pictures are left out.
    """

    def __init__(self, program: str, profile: Path) -> None:
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self._rest, self._number, self._events = b"", 0, list[str]()
        read, self._write = os.pipe()
        self._read, write = os.pipe()
        flags = ["--headless", "--remote-debugging-pipe", "--no-sandbox", "--disable-gpu"]
        flags += ["--no-first-run", "--disable-background-networking", "--disable-dev-shm-usage"]
        start = [sys.executable, "-c", _START, str(read), str(write), program]
        self._process = subprocess.Popen(
            [*start, *flags, f"--user-data-dir={profile}", "about:blank"],
            pass_fds=(read, write),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(read)
        os.close(write)
        self._session = ""
        try:
            target = self.ask("Target.createTarget", url="about:blank")["targetId"]
            attached = self.ask("Target.attachToTarget", targetId=target, flatten=True)
            self._session = attached["sessionId"]
            for domain in ("Page", "Runtime", "Log", "Network"):
                self.ask(f"{domain}.enable")
        except BaseException:
            self.close()
            raise

    def ask(self, method: str, **params: Any) -> dict[str, Any]:
        """A command's answer."""
        self._number += 1
        session = {"sessionId": self._session} if self._session else {}
        message = {"id": self._number, "method": method, "params": params, **session}
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            got = self._next()
            if got.get("id") == self._number:
                assert "error" not in got, f"{method}: {got['error']}"
                found: dict[str, Any] = got["result"]
                return found

    def open(self, page: Path | str) -> None:
        """Show a file, or what stands at an address; wait until it is loaded and drawn."""
        self.complaints.clear()
        self.requests.clear()
        self._events.clear()
        self.ask("Page.navigate", url=page.as_uri() if isinstance(page, Path) else page)
        while "Page.loadEventFired" not in self._events:
            self._next()
        # Asks for a whole frame, with what is drawn lazily, whether scripts may run or not.
        self.ask("Page.captureScreenshot", format="jpeg")

    def value(self, expression: str) -> Any:
        """What an expression has in the page; a promise is waited for."""
        found = self.ask(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def press(self, key: str, code: int, text: str = "") -> None:
        """A key of the keyboard, down and up."""
        about = {"key": key, "code": key if len(key) > 1 else "Space"}
        about |= {"windowsVirtualKeyCode": code}  # type: ignore[dict-item]
        typed = {"text": text} if text else {}
        self.ask("Input.dispatchKeyEvent", type="keyDown", **about, **typed)
        self.ask("Input.dispatchKeyEvent", type="keyUp", **about)

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()
        os.close(self._read)
        os.close(self._write)

    def _next(self) -> dict[str, Any]:
        end = time.monotonic() + PATIENCE
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._read], [], [], max(0.0, end - time.monotonic()))
            data = os.read(self._read, 1 << 20) if ready else b""
            assert data, "the browser does not answer"
            self._rest += data
        line, _, self._rest = self._rest.partition(b"\0")
        got: dict[str, Any] = json.loads(line)
        self._note(got.get("method", ""), got.get("params", {}))
        return got

    def _note(self, event: str, about: dict[str, Any]) -> None:
        self._events.append(event)
        if event == "Runtime.exceptionThrown":
            self.complaints.append(str(about["exceptionDetails"]))
        if event == "Runtime.consoleAPICalled":
            self.complaints.append(str(about["args"]))
        if event == "Log.entryAdded":
            self.complaints.append(about["entry"]["text"])
        if event == "Network.requestWillBeSent":
            address = about["request"]["url"]
            if not address.startswith("data:"):
                self.requests.append(address)
