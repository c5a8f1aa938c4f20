"""Processes of their own, and a stand-in for Python that writes down what it is told."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest

from repository import ROOT

needs_shell = pytest.mark.skipif(shutil.which("sh") is None, reason="needs sh")
STUB = """#!/bin/sh
for word in "$@"; do printf '%s\\n' "$word"; done >> {log}
echo END >> {log}
"""


def in_a_process(code: str, **environment: str) -> None:
    """Run what a test's process cannot: it has loaded Triton, and chosen a GPU or none."""
    paths = os.pathsep.join([str(ROOT / "tests"), *sys.path])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env=os.environ | {"PYTHONPATH": paths} | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
