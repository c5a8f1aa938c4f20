"""Pruners as text: `vispruner:keep=64,important_ratio=0.75|plphp:r=0.4,dr=0.3`.

One or more methods by the names of `METHODS`, left to right as `|` chains them; `+` does the same
and needs no quotes in a shell. Settings follow a colon and are parted by commas. A value is an
integer, a number, `true`, `false`, `none`, or else text; text that could be read as something else,
or that holds one of `, | + "`, stands in double quotes and is written as in JSON. `from=FILE` takes
a method's settings from a file, where the method can read one; settings beside it override it.
"""

from __future__ import annotations

import json
import re
from dataclasses import MISSING, Field, dataclass, field, fields
from functools import reduce
from numbers import Integral, Real
from operator import or_
from pathlib import Path
from typing import Any

from vlmprune.errors import VlmpruneError
from vlmprune.method import Method
from vlmprune.methods import METHODS
from vlmprune.pruner import Pruner

FROM = "from"

_QUOTED = r'"(?:[^"\\]|\\.)*"'
# A plus sign chains only where a method follows, or nothing at all, so that 1e+5 stays one number.
_CHAIN = re.compile(
    rf"({_QUOTED})|(\||\+(?=\s*(?:[A-Za-z_]\w*\s*(?:[:|+]|$)|$)))|(.)", re.DOTALL | re.ASCII
)
_COMMA = re.compile(rf"({_QUOTED})|(,)|(.)", re.DOTALL)
_INTEGER = re.compile(r"[+-]?[0-9]+")
_NUMBER = re.compile(r"[+-]?(?:(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?|inf)|nan")
_WORDS = {"true": True, "false": False, "none": None}
_EXAMPLE = "vispruner:keep=64"


@dataclass
class Stage:
    """One method of a spec, before it is built.

    Attributes:
        name: as in `METHODS`.
        settings: those that were given, by name.
        file: what `from=` named; None without it.
    """

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    file: str | None = None

    @property
    def cls(self) -> Any:
        """The method's class."""
        return METHODS[self.name]

    @property
    def names(self) -> list[str]:
        """All settings that the method has."""
        return [one.name for one in _fields(self.cls)]

    @property
    def missing(self) -> list[str]:
        """Settings without a default that neither the spec nor, it may be, its file gives."""
        if self.file is not None:
            return []
        return [
            one.name
            for one in _fields(METHODS[self.name])
            if required(one) and one.name not in self.settings
        ]

    def build(self) -> Pruner:
        """The pruner.

        Raises:
            VlmpruneError: a required setting is missing, the file cannot be read, or the method
                refuses a value.
        """
        for name in self.missing:
            raise VlmpruneError(
                f"method {self.name!r} needs {name}; write {self.name}:{name}=… with a value."
            )
        cls: Any = METHODS[self.name]
        if self.file is None:
            return cls(**self.settings)
        try:
            return cls.from_file(Path(self.file).expanduser(), **self.settings)
        except OSError as error:
            raise VlmpruneError(
                f"{FROM}={self.file} cannot be read ({error.strerror}); give a file that "
                f"{self.name} can read."
            ) from error


def parse(text: str) -> Pruner:
    """The pruner that a spec stands for.

    Args:
        text: one or more methods with their settings, see the module.

    Returns:
        The pruner; several methods come chained.

    Raises:
        VlmpruneError: the text is empty or cannot be read, a method or a setting is unknown, a
            setting is missing or given twice, or the method refuses a value.
    """
    return build(read(text))


def build(found: list[Stage]) -> Pruner:
    """The pruners of some stages, chained.

    Raises:
        VlmpruneError: as `Stage.build`, or the stages do not go together.
    """
    return reduce(or_, [stage.build() for stage in found])


def read(text: str) -> list[Stage]:
    """The methods of a spec and their settings, which are known but not yet complete.

    Raises:
        VlmpruneError: as `parse`, but for missing settings and refused values.
    """
    if not text.strip():
        raise VlmpruneError(f"the method is empty; write for example {_EXAMPLE}.")
    return [_stage(part, text) for part in _split(_CHAIN, text)]


def dump(pruner: Pruner) -> str:
    """A spec that `parse` turns into an equal pruner; settings at their defaults are left out.

    Raises:
        VlmpruneError: a method is none of `METHODS`, or a setting is no number, text, truth value
            or None, nor a tuple of numbers.
    """
    if not isinstance(pruner, Method):
        raise VlmpruneError(f"{type(pruner).__name__} is no pruner, so it has no spec.")
    return "|".join(_dump(stage) for stage in pruner.links)


def required(one: Field[Any]) -> bool:
    """Whether a setting has no default."""
    return one.default is MISSING and one.default_factory is MISSING


def default_of(one: Field[Any]) -> Any:
    """The default of a setting that has one."""
    return one.default if one.default_factory is MISSING else one.default_factory()


def reads_files(cls: type) -> bool:
    """Whether a method can take its settings from a file."""
    return hasattr(cls, "from_file")


def _fields(cls: type) -> list[Field[Any]]:
    return [one for one in fields(cls) if one.init]


def _split(pattern: re.Pattern[str], text: str) -> list[str]:
    """Parts between the separators that stand outside quotes."""
    parts = [""]
    for match in pattern.finditer(text):
        quoted, separator, other = match.groups()
        if separator:
            parts.append("")
        else:
            parts[-1] += quoted or other
    return parts


def _stage(part: str, text: str) -> Stage:
    name, colon, rest = part.partition(":")
    name = name.strip()
    if not name:
        raise VlmpruneError(
            f"a method is missing in {text!r}; write one on each side of `|` or `+`, as in "
            f"{_EXAMPLE}."
        )
    if name not in METHODS:
        raise VlmpruneError(f"method {name!r} is unknown; use one of {', '.join(METHODS)}.")
    stage = Stage(name)
    if colon and not rest.strip():
        raise VlmpruneError(f"no settings follow the colon of {part.strip()!r}; leave it out.")
    for setting in _split(_COMMA, rest) if colon else ():
        _add(stage, setting)
    return stage


def _add(stage: Stage, setting: str) -> None:
    name, equals, value = (one.strip() for one in setting.partition("="))
    if not equals or not name or not value:
        raise VlmpruneError(
            f"setting {setting.strip()!r} of {stage.name} is not of the form name=value, as in "
            f"{_EXAMPLE}."
        )
    if name in stage.settings or (name == FROM and stage.file is not None):
        raise VlmpruneError(f"setting {name!r} of {stage.name} is given twice; give it once.")
    can_read = reads_files(METHODS[stage.name])
    if name == FROM and can_read:
        # A file is always a name, whatever else it might be read as.
        stage.file = _unquote(value, stage) if value.startswith('"') else value
        return
    if name not in stage.names:
        has = ", ".join(stage.names + [f"{FROM}=FILE"] * can_read)
        raise VlmpruneError(f"method {stage.name!r} has no setting {name!r}; it has {has}.")
    stage.settings[name] = _unquote(value, stage) if value.startswith('"') else value_of(value)


def value_of(text: str) -> Any:
    """A value as a spec writes it, without quotes."""
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    if _INTEGER.fullmatch(text):
        return int(text)
    return float(text) if _NUMBER.fullmatch(text) else text


def _unquote(text: str, stage: Stage) -> str:
    try:
        value = json.loads(text, strict=False)
    except ValueError:
        value = None
    if not isinstance(value, str):
        raise VlmpruneError(
            f"value {text} of {stage.name} is not one text in double quotes; write it as in JSON."
        )
    return value


def _dump(pruner: Method) -> str:
    name = next((name for name, cls in METHODS.items() if cls is type(pruner)), None)
    if name is None:
        raise VlmpruneError(
            f"{type(pruner).__name__} is none of {', '.join(METHODS)}, so it has no name to write."
        )
    settings = []
    for one in _fields(type(pruner)):
        value = getattr(pruner, one.name)
        if not required(one):
            default = default_of(one)
            # 1 and 1.0, and 1 and True, are equal yet can mean different things.
            if type(value) is type(default) and value == default:
                continue
        settings.append(f"{one.name}={_text(one.name, value)}")
    return f"{name}:{','.join(settings)}" if settings else name


def _text(name: str, value: Any) -> str:
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Integral):
        return str(int(value))
    if isinstance(value, Real):
        # "1e+16" would be cut at its plus sign in a longer chain.
        return repr(float(value)).replace("e+", "e")
    if isinstance(value, tuple) and value:
        return ";".join(_text(name, one) for one in value)
    if isinstance(value, str):
        special = not value.isprintable() or set(value) & set(',|+"') or value != value.strip()
        plain = value and not special and isinstance(value_of(value), str)
        return value if plain else json.dumps(value, ensure_ascii=False)
    raise VlmpruneError(
        f"{name}={value!r} cannot be written in a spec; it takes numbers, text, true, false and "
        "none."
    )
