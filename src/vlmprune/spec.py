"""Pruners as text: `vispruner:keep=64,important_ratio=0.75|plphp:r=0.4,dr=0.3`.

One or more methods by the names of `METHODS`, left to right as `|` chains them; `+` does the same
and needs no quotes in a shell. Settings follow a colon and are parted by commas. A value is an
integer, a number, a share as `25%`, `true`, `false`, `none`, or else text; text that could be read
as something else, or that holds one of `, | + "`, stands in double quotes and is written as in
JSON. `from=FILE` takes a method's settings from a file, where the method can read one; settings
beside it override it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from functools import reduce
from numbers import Integral, Real
from operator import or_
from typing import Any

from vlmprune.errors import VlmpruneError, meant
from vlmprune.files import path_of
from vlmprune.method import Method
from vlmprune.methods import METHODS
from vlmprune.pruner import Pruner

FROM = "from"
CONTROL = "control"
"""What a control gives as its paper."""

_QUOTED = r'"(?:[^"\\]|\\.)*"'
# A plus sign chains only where a method follows, or nothing at all, so that 1e+5 stays one number.
_CHAIN = re.compile(
    rf"({_QUOTED})|(\||\+(?=\s*(?:[A-Za-z_]\w*\s*(?:[:|+]|$)|$)))|(.)", re.DOTALL | re.ASCII
)
_COMMA = re.compile(rf"({_QUOTED})|(,)|(.)", re.DOTALL)
_SETTING = re.compile(r"[A-Za-z_]\w*\s*=")
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
    def is_control(self) -> bool:
        """Whether the method is there to be compared with, which is what it gives as its paper."""
        return bool(self.cls.paper == CONTROL)

    @property
    def for_videos(self) -> bool:
        """Whether the method works on videos alone."""
        return bool(self.cls.needs.startswith("a video"))

    @property
    def names(self) -> list[str]:
        """All settings that the method has."""
        return [one.name for one in settings_of(self.cls)]

    @property
    def missing(self) -> list[str]:
        """Settings without a default that neither the spec nor, it may be, its file gives."""
        if self.file is not None:
            return []
        return [
            one.name
            for one in settings_of(self.cls)
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
        if self.file is None:
            made: Pruner = self.cls(**self.settings)
            return made
        try:
            return self.cls.from_file(path_of(self.file), **self.settings)
        except OSError as error:
            raise VlmpruneError(
                f"{FROM}={self.file} cannot be read ({error.strerror}); give a file that "
                f"{self.name} can read."
            ) from error

    def text(self, without: Collection[str] = ()) -> str:
        """The stage as a spec has it, without some settings."""
        given = {k: _text(k, v) for k, v in self.settings.items() if k not in without}
        if self.file is not None:
            given[FROM] = self.file
        return _joined(self.name, given)


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


def listed(text: str) -> list[str]:
    """The specs of a list parted by commas, although commas also part a method's settings.

    A part of the form name=value is a setting of the method before it.
    """
    found: list[str] = []
    for part in map(str.strip, _split(_COMMA, text)):
        if found and _SETTING.match(part):
            found[-1] += f",{part}"
        else:
            found.append(part)
    return found


def pair(text: str) -> tuple[str, str] | None:
    """Name and value of `name=value`, without white space around them; None where one lacks."""
    name, _, value = (one.strip() for one in text.partition("="))
    return (name, value) if name and value else None


def fill(stages: Sequence[Stage], name: str, value: Any) -> int | None:
    """Give a setting to each stage that has it and leaves it open.

    Returns:
        How many took it; None where no stage has such a setting.
    """
    having = [stage for stage in stages if name in stage.names]
    unset = [stage for stage in having if name not in stage.settings]
    for stage in unset:
        stage.settings[name] = value
    return len(unset) if having else None


def class_of(name: str) -> type[Pruner]:
    """The method of a name.

    Raises:
        VlmpruneError: there is none.
    """
    if name not in METHODS:
        near = meant(name, METHODS)
        raise VlmpruneError(f"method {name!r} is unknown{near}; use one of {', '.join(METHODS)}.")
    return METHODS[name]


def name_of(method: Method) -> str | None:
    """The name of a method; None where it is none of `METHODS`."""
    return next((name for name, cls in METHODS.items() if cls is type(method)), None)


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


def settings_of(cls: type) -> list[Field[Any]]:
    """The settings of a method, those that go by name only behind the others."""
    return sorted((one for one in fields(cls) if one.init), key=lambda one: bool(one.kw_only))


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
    class_of(name)
    stage = Stage(name)
    if colon and not rest.strip():
        raise VlmpruneError(f"no settings follow the colon of {part.strip()!r}; leave it out.")
    for setting in _split(_COMMA, rest) if colon else ():
        _add(stage, setting)
    return stage


def _add(stage: Stage, setting: str) -> None:
    parts = pair(setting)
    if parts is None:
        raise VlmpruneError(
            f"setting {setting.strip()!r} of {stage.name} is not of the form name=value, as in "
            f"{_EXAMPLE}."
        )
    name, value = parts
    if name in stage.settings or (name == FROM and stage.file is not None):
        raise VlmpruneError(f"setting {name!r} of {stage.name} is given twice; give it once.")
    can_read = reads_files(stage.cls)
    if name == FROM and can_read:
        # A file is always a name, whatever else it might be read as.
        stage.file = _unquote(value, stage) if value.startswith('"') else value
        return
    if name not in stage.names:
        has = ", ".join(stage.names + [f"{FROM}=FILE"] * can_read)
        near = meant(name, [*stage.names, *[FROM] * can_read])
        raise VlmpruneError(f"method {stage.name!r} has no setting {name!r}{near}; it has {has}.")
    stage.settings[name] = _unquote(value, stage) if value.startswith('"') else value_of(value)


def value_of(text: str) -> Any:
    """A value as a spec writes it, without quotes; `25%` is 0.25."""
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    if _INTEGER.fullmatch(text):
        return int(text)
    if text.endswith("%") and _NUMBER.fullmatch(text[:-1]):
        return float(text[:-1]) / 100
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
    name = name_of(pruner)
    if name is None:
        raise VlmpruneError(
            f"{type(pruner).__name__} is none of {', '.join(METHODS)}, so it has no name to write."
        )
    settings = {}
    for one in settings_of(type(pruner)):
        value = getattr(pruner, one.name)
        if not required(one):
            default = default_of(one)
            # 1 and 1.0, and 1 and True, are equal yet can mean different things.
            if type(value) is type(default) and value == default:
                continue
        settings[one.name] = _text(one.name, value)
    return _joined(name, settings)


def _joined(name: str, settings: Mapping[str, str]) -> str:
    text = ",".join(f"{setting}={value}" for setting, value in settings.items())
    return f"{name}:{text}" if text else name


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
