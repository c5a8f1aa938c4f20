"""What the standard sets have in common: a local copy, read in the format it is published in."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from vlmprune.errors import VlmpruneError
from vlmprune.files import is_file, parsed, path_of
from vlmprune.runtime.encoder.bare_question import WORD_OR_PHRASE as WORD_OR_PHRASE
from vlmprune.study.tasks.base import Sample, Task

_SHORT = 16


@dataclass(frozen=True)
class Listed:
    """One question, before its picture has been looked for.

    Attributes:
        id: its name.
        picture: what it is about; questions of the same stand together.
        files: where the picture may be, below the folder; the first that exists is taken.
        question: what is asked, with the suffix.
        answers: all that count as true.
        kind: of the question.
    """

    id: str
    picture: str
    files: tuple[str, ...]
    question: str
    answers: tuple[str, ...] = ()
    kind: str = ""


@dataclass(frozen=True)
class Local(Task):
    """A local copy of a standard set; subclasses implement `found`, `entries` and `score`.

    Attributes:
        path: the folder of the copy, or the file with its questions.
    """

    path: Path

    names: ClassVar[str] = ""
    """The files that are expected, in words."""

    @property
    def label(self) -> str:
        """The task and its copy."""
        return f"{self.name}:{self.path}"

    @property
    def given(self) -> Path:
        """The path as the system takes it."""
        return path_of(self.path)

    @property
    def folder(self) -> Path:
        """What pictures are looked for below."""
        return self.given.parent if is_file(self.given) else self.given

    def found(self) -> Sequence[Path]:
        """The files with questions and answers.

        Raises:
            VlmpruneError: they are not there.
        """
        raise NotImplementedError

    def entries(self) -> Iterable[Listed]:
        """All questions, in the files' order.

        Raises:
            VlmpruneError: a file cannot be read.
        """
        raise NotImplementedError

    def read_from(self) -> tuple[Path, ...]:
        """The same as `found`."""
        return tuple(self.found())

    def samples(self, limit: int | None = None) -> list[Sample]:
        """The questions, in the files' order but those about the same picture together."""
        groups: dict[str, list[Listed]] = {}
        seen: set[str] = set()
        for one in self.entries():
            if one.id in seen:
                raise VlmpruneError(
                    f"{self.label} has question {one.id} twice; give a copy as it is published."
                )
            seen.add(one.id)
            groups.setdefault(one.picture, []).append(one)
        if not groups:
            raise VlmpruneError(f"{self.label} holds no questions; {self._expects()}.")
        ordered = [entry for group in groups.values() for entry in group][:limit]
        known = {one.picture: one for one in ordered}
        pictures = {name: self._picture(one) for name, one in known.items()}
        return [
            Sample(
                id=one.id,
                images=(pictures[one.picture],),
                question=one.question,
                answers=one.answers,
                kind=one.kind,
                group=one.picture,
            )
            for one in ordered
        ]

    def max_new_tokens(self, sample: Sample) -> int:
        """Enough for a word or a short phrase."""
        return _SHORT

    def pick(self, *names: str) -> Path:
        """The first of these files below the folder that exists, or the file that was given.

        Raises:
            VlmpruneError: there is none of them.
        """
        if is_file(self.given):
            return self.given
        for name in names:
            path = self.folder / name
            if is_file(path):
                return path
        raise self.missing()

    def missing(self) -> VlmpruneError:
        """What to say where files are not there."""
        return VlmpruneError(f"{str(self.path)!r} holds no copy of {self.name}; {self._expects()}.")

    def _expects(self) -> str:
        return f"{self.name}:PATH takes a folder with {self.names}"

    def _picture(self, one: Listed) -> Path:
        for name in one.files:
            path = self.folder / name
            if is_file(path):
                return path
        raise VlmpruneError(
            f"question {one.id} of {self.label} is about {Path(one.files[0]).name}, which is not "
            f"there; {self._expects()}."
        )


def below(places: Sequence[str], name: str) -> tuple[str, ...]:
    """A file's name in each of some folders."""
    return tuple(f"{place}/{name}" for place in places)


def read_json(path: Path) -> Any:
    """What a JSON file holds.

    Raises:
        VlmpruneError: it cannot be read.
    """
    try:
        return parsed(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error


def read_lines(path: Path) -> Iterator[Any]:
    """What each line of a file of JSON lines holds; empty lines are passed over.

    Raises:
        VlmpruneError: it cannot be read.
    """
    try:
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.strip():
                yield parsed(line)
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> VlmpruneError:
    why = error.strerror if isinstance(error, OSError) else error
    return VlmpruneError(f"{path} cannot be read as JSON ({why}); give it as it is published.")


def field(path: Path, one: Any, name: str, kind: type | tuple[type, ...] = (str, int)) -> Any:
    """A field of an object of a file.

    Raises:
        VlmpruneError: it is missing or of another type.
    """
    value = one.get(name) if isinstance(one, Mapping) else None
    # A bool is an int to Python, and neither a name nor a number here.
    if value is None or isinstance(value, bool) or not isinstance(value, kind):
        raise VlmpruneError(
            f"{path} has an entry without a usable {name!r}; give it as it is published."
        )
    return value
