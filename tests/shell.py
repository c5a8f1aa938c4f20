"""A stand-in for Python that writes down what a shell script would have it do."""

from __future__ import annotations

import shutil

import pytest

needs_shell = pytest.mark.skipif(shutil.which("sh") is None, reason="needs sh")
STUB = """#!/bin/sh
for word in "$@"; do printf '%s\\n' "$word"; done >> {log}
echo END >> {log}
"""
