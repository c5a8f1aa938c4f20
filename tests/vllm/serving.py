"""A real `vllm serve` on loopback, started for tests and stopped by its own process id."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path

NAME = "served"
VLLM = Path(sys.executable).parent / "vllm"
ARGUMENTS = (
    "--host=127.0.0.1",
    f"--served-model-name={NAME}",
    "--dtype=float32",
    "--enforce-eager",
    "--max-num-seqs=8",
    # Of 128 tokens by default on the CPU: short prompts would never share one.
    "--block-size=32",
    "--enable-prompt-tokens-details",
    "--trust-request-mm-kwargs",
    "--disable-uvicorn-access-log",
)
SETTINGS = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    # One core is left to the server's own process and to the tests.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
}
# The engine and its worker in one process, which starts sooner.
ONE_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
OURS = ("VLMPRUNE", "VLMPRUNE_VLLM_RECORD", "VLLM_PLUGINS")


def environment(changes: Mapping[str, str]) -> dict[str, str]:
    """This process's, without what may have been set for the plugin."""
    kept = {name: value for name, value in os.environ.items() if name not in OURS}
    return {**kept, **SETTINGS, **changes}


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


class Server:
    """One running server.

    Attributes:
        url: where it listens.
        log: file with all that it has printed.
        seconds: it took to start.
    """

    def __init__(
        self, model: Path, log: Path, changes: Mapping[str, str], arguments: Sequence[str] = ()
    ) -> None:
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        self.log = log
        self.command = [str(VLLM), "serve", str(model), f"--port={port}", *ARGUMENTS, *arguments]
        began = time.monotonic()
        with log.open("w") as out:
            self.process: subprocess.Popen[str] = subprocess.Popen(
                self.command,
                env=environment(changes),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                text=True,
                # Its children are in its group, so that none is left behind.
                start_new_session=True,
            )
        try:
            self._wait(limit=300)
        except BaseException:
            self.stop()
            raise
        self.seconds = time.monotonic() - began

    def _wait(self, limit: float) -> None:
        end = time.monotonic() + limit
        while time.monotonic() < end:
            if self.process.poll() is not None:
                break
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=5):
                    return
            except OSError:
                time.sleep(0.3)
        tail = self.log.read_text(errors="replace")[-4000:]
        raise RuntimeError(f"the server did not start (exit {self.process.poll()}):\n{tail}")

    def metric(self, name: str, label: str = "") -> float:
        """Sum of one of vLLM's counters or gauges over its labels, or over those with `label`."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=30) as answer:
            lines = answer.read().decode().splitlines()
        found = [
            float(line.rsplit(" ", 1)[1])
            for line in lines
            if line.split("{")[0].split(" ")[0] == name and label in line
        ]
        if not found:
            raise KeyError(f"{name} {label}")
        return sum(found)

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(30)
        kill(self.process)


def refused(model: Path, spec: str, *arguments: str) -> tuple[int, str]:
    """Start a server that is to stop by itself: its exit status and what it printed."""
    process = subprocess.Popen(
        [str(VLLM), "serve", str(model), f"--port={free_port()}", *ARGUMENTS, *arguments],
        env=environment({"VLMPRUNE": spec}),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=300)
    finally:
        kill(process)
    return process.returncode, output


def kill(process: subprocess.Popen[str]) -> None:
    """End a process and its children, which are in a group of their own."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(30)
