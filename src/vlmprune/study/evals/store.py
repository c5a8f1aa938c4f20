"""Results of an evaluation on disk, line by line, so that a run that was killed goes on."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import IO

from vlmprune.errors import VlmpruneError
from vlmprune.study.evals.results import FORMAT, Evaluation
from vlmprune.study.tasks.answered import Answered

_NAMES = ("task", "method", "model")


class Store:
    """A JSONL file: a first line that says what of, then a line a sample; a context manager.

    A last line that was torn by a kill is cut off on entering, and its sample answered again.

    Args:
        path: the file; made with its folder if absent.
        evaluation: whose task, method and model the results are of.

    Attributes:
        results: what it held on entering, by sample.
    """

    def __init__(self, path: str | Path, evaluation: Evaluation) -> None:
        self.path = Path(path).expanduser()
        self.head = {"format": FORMAT} | {name: getattr(evaluation, name) for name in _NAMES}
        self.results: dict[str, Answered] = {}
        self.file: IO[str] | None = None

    def __enter__(self) -> Store:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.touch()
            whole = self._whole()
            lines = whole.decode("utf-8").splitlines()
            if lines:
                self._read(lines)
            with self.path.open("rb+") as file:
                file.truncate(len(whole))
            self.file = self.path.open("a", encoding="utf-8", newline="\n")
        except OSError as error:
            raise VlmpruneError(
                f"store {str(self.path)!r} cannot be written ({error.strerror}); give another path."
            ) from error
        if not lines:
            self._write(self.head)
        return self

    def __exit__(self, *_: object) -> None:
        if self.file is not None:
            self.file.close()

    def append(self, result: Answered) -> None:
        """Add a sample's result, at once on its way to the disk."""
        self._write(asdict(result))

    def _write(self, line: dict[str, object]) -> None:
        assert self.file is not None
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()

    def _whole(self) -> bytes:
        """The file up to its last line end: what a kill left behind it is torn."""
        content = self.path.read_bytes()
        return content[: content.rfind(b"\n") + 1]

    def _read(self, lines: list[str]) -> None:
        try:
            head, *rest = [json.loads(line) for line in lines]
        except ValueError as error:
            raise VlmpruneError(
                f"store {str(self.path)!r} holds no results of an evaluation; give another path."
            ) from error
        for name, value in self.head.items():
            there = head.get(name) if isinstance(head, dict) else None
            if there != value:
                raise VlmpruneError(
                    f"store {str(self.path)!r} is of another {name} ({there}) than this ({value}); "
                    "give another path."
                )
        for one in rest:
            result = Answered.from_dict(one)
            self.results[result.id] = result
