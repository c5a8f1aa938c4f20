"""Results of an evaluation on disk, line by line, so that a run that was killed goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import IO

from vlmprune.errors import VlmpruneError
from vlmprune.files import path_of, writing
from vlmprune.io.outputs import Output
from vlmprune.method import defaults_then
from vlmprune.pruner import Pruner
from vlmprune.study.evals.results import FORMAT, Evaluation
from vlmprune.study.tasks.answered import Answered
from vlmprune.version import __version__

_NAMES = ("task", "method", "model")
# How every store begins.
_BEGINNING = json.dumps({"format": FORMAT}).removesuffix("}").encode()


class Store:
    """A JSONL file: a first line that says what of, then a line a sample; a context manager.

    A last line that was torn by a kill is cut off on entering, and its sample answered again.

    Args:
        path: the file; made with its folder if absent.
        evaluation: whose task, method and model the results are of.
        pruner: the method, of which the settings to add are told where a store is of a version
            with other defaults.

    Attributes:
        results: what it held on entering, by sample.
    """

    def __init__(
        self, path: str | Path, evaluation: Evaluation, pruner: Pruner | None = None
    ) -> None:
        self.path = path_of(path)
        self.stages = () if pruner is None else pruner.links
        self.head: dict[str, object] = {"format": FORMAT, "version": __version__}
        self.head |= {name: getattr(evaluation, name) for name in _NAMES}
        self.results: dict[str, Answered] = {}
        self.file: IO[str] | None = None

    def __enter__(self) -> Store:
        with writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.touch()
            whole, lines = self._lines()
            if lines:
                self._read(lines)
            with self.path.open("rb+") as file:
                file.truncate(len(whole))
            self.file = self.path.open("a", encoding="utf-8", newline="\n")
        if not lines:
            self._write(self.head)
        return self

    def check(self) -> None:
        """Refuse a file that holds something else, without writing anything.

        Raises:
            VlmpruneError: it does.
        """
        with writing(self.path):
            if self.path.exists():
                _, lines = self._lines()
                if lines:
                    self._read(lines)

    def __exit__(self, *_: object) -> None:
        if self.file is not None:
            self.file.close()

    def append(self, result: Answered) -> None:
        """Add a sample's result, at once on its way to the disk."""
        self._write(result.as_dict())

    def _write(self, line: dict[str, object]) -> None:
        assert self.file is not None
        with writing(self.path):
            self.file.write(json.dumps(line) + "\n")
            self.file.flush()

    def _lines(self) -> tuple[bytes, list[str]]:
        """The file up to its last line end, and its lines: what a kill left behind it is torn.

        Raises:
            VlmpruneError: it is no text, or has no line and is not the beginning of a first one.
        """
        content = self.path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if not whole and not json.dumps(self.head).encode().startswith(content):
            raise self._foreign()
        try:
            return whole, whole.decode("utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise self._foreign() from error

    def _foreign(self) -> VlmpruneError:
        return VlmpruneError(
            f"store {str(self.path)!r} holds no results of an evaluation; give another path."
        )

    def _read(self, lines: list[str]) -> None:
        try:
            head, *rest = [json.loads(line) for line in lines]
        except ValueError as error:
            raise self._foreign() from error
        if isinstance(head, dict) and head.get("format") == FORMAT and "version" not in head:
            settings = defaults_then(self.stages)
            instead = f"; {settings} was the default then" if settings else ""
            raise VlmpruneError(
                f"store {str(self.path)!r} is of vlmprune 0.2 or earlier, and answers of two "
                f"versions are not mixed; give another path{instead}."
            )
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


class StoreFile(Output):
    """A store's file as one of a command's outputs; of which evaluation it is, `Store` looks at."""

    def ours(self) -> bool:
        """Whether it is a store, an empty one or one that a kill tore in its first line."""
        with self.path.open("rb") as file:
            head = file.read(len(_BEGINNING))
        return _BEGINNING.startswith(head)
