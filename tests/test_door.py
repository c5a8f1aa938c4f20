"""What the package knows of Transformers stands in few rooms; `scripts/door.py` finds the rest.

So does what it imports of itself past the contracts that hold the arrows between its rooms.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from repository import ROOT

sys.path.insert(0, str(ROOT / "scripts"))

import door

PLACE = "runtime.py"
# Modules under former names, in the planted packages.
FORMER = ("__init__.py", "budget.py", "calibrate.py")

IMPORTS = {
    "plain": "import transformers",
    "several": "import os, transformers",
    "renamed": "import transformers as library",
    "part": "import transformers.cache_utils",
    "name": "from transformers import AutoConfig",
    "part's name": "from transformers.cache_utils import Cache as Held",
    "inside": "def f():\n    from transformers import AutoConfig  # here\n    return AutoConfig",
    "hints": "if TYPE_CHECKING:\n    from transformers import AutoConfig",
    "tried": "try:\n    import transformers  # here\nexcept ImportError:\n    pass",
    "importlib": "import importlib\nimportlib.import_module('transformers')",
    "import_module": "import_module('transformers.cache_utils')",
    "formatted": "import_module(f'transformers.{part}')",
    "joined": "import_module('transformers.' + part)",
    "constant": "HOME = 'transformers.models'\nimport_module(HOME)",
    "dunder": "__import__('transformers')",
    "found": "importlib.util.find_spec('transformers')",
    "modules": "sys.modules['transformers']",
    "modules.get": "sys.modules.get('transformers.cache_utils')",
}
ARGUMENTS = {
    "get": "def f(**kwargs):\n    return kwargs.get('cache')",
    "pop": "NAME = 'cache'\ndef f(**kwargs):\n    return kwargs.pop(NAME)",
    "setdefault": "kwargs.setdefault('use_cache', True)",
    "subscript": "kwargs['hidden_states']",
    "deleted": "del kwargs['hidden_states']",
    "constant": "NAME = 'mask'\nkwargs[NAME]",
    "constant of a module": "from names import MASK\nkwargs.get(MASK)",
    "constant of another": "kwargs.get(names.MASK)",
    "bound": "def f(kwargs):\n    name = 'mask'\n    return kwargs.get(name)",
    "in turn": "for name in ('mask', 'cache'):\n    kwargs.get(name)",
    "comprehension": "[inputs.get(name) for name in ['pixel_values']]",
    "asked": "found = 'attention_mask' in kwargs",
    "not asked": "found = MASK not in kwargs",
    "inputs": "inputs['input_ids']",
    "named alike": "out_kwargs['mask']",
    "held": "self.kwargs.get('mask')",
    "of another": "call.inputs['pixel_values']",
    "rest": "def f(**more):\n    return more.get('mask')",
    "copy": "def f(**kwargs):\n    more = dict(kwargs)\n    return more.get('mask')",
    "copy of a copy": "more = kwargs.copy()\nthird = more\nthird.pop('mask')",
    "joined": "more = kwargs | {'a': 1}\nmore.get('mask')",
    "spread": "more = {**kwargs, 'a': 1}\nmore['mask']",
    "chosen": "more = {k: v for k, v in kwargs.items() if v}\nmore['mask']",
    "either": "more = kwargs or {}\nmore.get('mask')",
    "typed": "more: dict = dict(kwargs)\nmore.get('mask')",
    "paired": "more, other = kwargs, 1\nmore.get('mask')",
    "walrus": "(more := kwargs)['mask']",
    "at once": "dict(kwargs).get('mask')",
    "kept": "get = kwargs.get",
    "handed on": "check(handle, kwargs.get)",
    "vars": "vars(config).get('use_cache')",
    "dict": "config.__dict__['use_cache']",
}
ATTRIBUTES = {
    "default": "getattr(config, 'use_cache', None)",
    "constant": "getattr(model, NAME, 0)",
    "hasattr": "hasattr(layer, 'is_causal')",
    "of an attribute": "hasattr(self.model, 'visual')",
    "of a type": "hasattr(type(model), 'get_base_model')",
    "any receiver": "getattr(thing, 'size', None)",
    "inside": "def f(model):\n    return [one for one in model if hasattr(one, 'attn')]",
    "alias": "get = getattr",
    "alias of hasattr": "has = hasattr",
    "imported": "import builtins\nbuiltins.getattr(config, 'use_cache', None)",
    "handed on": "any(map(hasattr, layers, names))",
    "partial": "partial(getattr, config)",
    "spread": "getattr(config, *names)",
}
FORMERS = {
    "plain": "import vlmprune.calibrate",
    "renamed": "import vlmprune.calibrate as held",
    "several": "import os, vlmprune.budget",
    "part": "import vlmprune.calibrate.plot",
    "from": "from vlmprune.calibrate import measure",
    "from part": "from vlmprune.calibrate.plot import plot",
    "of the package": "from vlmprune import calibrate",
    "of the package, renamed": "from vlmprune import calibrate as held",
    "among others": "from vlmprune import budget, select",
    "relative": "from .calibrate import measure",
    "relative, of the package": "from . import calibrate",
    "inside": "def f():\n    from vlmprune.budget import Budget  # here\n    return Budget",
    "hints": "if TYPE_CHECKING:\n    from vlmprune.budget import Budget  # here",
    "attribute": "import vlmprune\nvlmprune.calibrate.measure",
    "in a string": "HOME = 'vlmprune.budget'",
    "modules": "sys.modules.get('vlmprune.calibrate')",
}
BY_NAME = {
    "importlib": "import importlib\nimportlib.import_module('vlmprune.select')",
    "import_module": "import_module('vlmprune.hosts.config')",
    "package": "import_module('vlmprune')",
    "formatted": "import_module(f'vlmprune.{name}')",
    "joined": "import_module('vlmprune.' + name)",
    "constant": "HOME = 'vlmprune.select'\nimport_module(HOME)",
    "relative": "import_module('.select', 'vlmprune')",
    "own package": "import_module(f'{__package__}.{name}')",
    "own package, joined": "import_module(__package__ + name)",
    "dunder": "__import__('vlmprune.select')",
    "found": "importlib.util.find_spec('vlmprune.select')",
    "modules": "sys.modules['vlmprune.select']",
}
HARMLESS = {
    "strings": "NAMES = ('transformers', 'kwargs.get')",
    "a version's name": "versions = {'transformers': release.version()}",
    "other libraries": "import transformers_stream\nfrom mytransformers import x",
    "own modules": "from vlmprune.hosts import release\nfrom vlmprune import embedded, select",
    "own modules named alike": "from vlmprune.select import budget\nimport vlmprune.budgets",
    "own modules of a room": "from vlmprune.study.calibrate import run\nfrom vlmprune import study",
    "others named alike": "from calibrate import x\nimport_module('vlmprune_embedded')",
    "said": "raise ValueError('vlmprune.budget is a former name')",
    "an attribute": "handle.budget\nself.vlmprune.calibrate",
    "relative": "from .transformers import x",
    "other dictionaries": "content = {}\ncontent.get('model_type')\nsettings['keep']",
    "written": "kwargs['use_cache'] = False\nmore = kwargs | {'use_cache': False}",
    "variables": "def f(medium, inputs):\n    return [inputs[name] for name in medium.inputs]",
    "places": "medium.inputs[0]",
    "each": "for name, value in kwargs.items():\n    print(name, value)",
    "plain": "getattr(report, f'visual_tokens_{part}')\nconfig.hidden_size",
    "own": "getattr(self, 'budget', 'crop')\nhasattr(cls, 'x')\nhasattr(type(self), 'x')",
    "own dictionary": "vars(self).get('x')",
    "parameters": "def f(get=None, *, getattr_=1):\n    return get",
}


def found(tmp_path: Path, code: str, place: str = PLACE) -> list[door.Finding]:
    file = tmp_path / place
    for path in (file, *(tmp_path / "former" / name for name in FORMER)):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("", encoding="utf-8")
    file.write_text(f"# first line\n{code}\n", encoding="utf-8")
    return door.findings(tmp_path)


def test_the_package_is_clean() -> None:
    assert [str(one) for one in door.findings(door.PACKAGE)] == []


def test_each_exception_is_needed_and_has_its_reason() -> None:
    for (name, receiver), why in door.NO_HOSTS.items():
        assert why and receiver in (door.PACKAGE / name).read_text(encoding="utf-8")
    for name, why in door.BY_NAME.items():
        assert why and "import_module(" in (door.PACKAGE / name).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("rule", "code"),
    [
        pytest.param(rule, code, id=f"{rule}-{name}")
        for rule, cases in (
            ("import", IMPORTS),
            ("argument", ARGUMENTS),
            ("attribute", ATTRIBUTES),
            ("former", FORMERS),
            ("by name", BY_NAME),
        )
        for name, code in cases.items()
    ],
)
def test_a_violation_is_found_with_its_line(tmp_path: Path, rule: str, code: str) -> None:
    places = found(tmp_path, code)
    assert {one.rule for one in places} == {rule}, code
    assert {one.path for one in places} == {PLACE}
    lines = f"# first line\n{code}".split("\n")
    marked = [number for number, line in enumerate(lines, start=1) if line.endswith("# here")]
    assert {one.line for one in places} == set(marked or [len(lines)]), code
    for one in places:
        assert str(one).startswith(f"{PLACE}:{one.line}: {rule}: ")


@pytest.mark.parametrize("code", HARMLESS.values(), ids=HARMLESS.keys())
def test_harmless_code_is_let_through(tmp_path: Path, code: str) -> None:
    assert found(tmp_path, code) == []


@pytest.mark.parametrize("room", ["hosts", "io", "training", "integrations/vllm"])
@pytest.mark.parametrize("code", ["import transformers", "kwargs['x']", "hasattr(model, 'x')"])
def test_rooms_that_may_know_are_let_through(tmp_path: Path, room: str, code: str) -> None:
    assert found(tmp_path, code, f"{room}/some.py") == []


def test_a_familys_record_knows_names_but_imports_nothing(tmp_path: Path) -> None:
    assert found(tmp_path, "inputs['pixel_values']", "hosts/families/some.py") == []
    (one,) = found(tmp_path, "import transformers", "hosts/families/some.py")
    assert (one.path, one.line, one.rule) == ("hosts/families/some.py", 2, "import")


@pytest.mark.parametrize("room", ["cli", "hosts", "io", "training", "integrations/vllm", "methods"])
@pytest.mark.parametrize(
    "code", ["from vlmprune import calibrate", "from ..budget import x", "from .. import budget"]
)
def test_no_room_takes_a_former_name(tmp_path: Path, room: str, code: str) -> None:
    deep = code.replace("..", "." * (room.count("/") + 2))
    (one,) = found(tmp_path, deep, f"{room}/some.py")
    assert (one.line, one.rule) == (2, "former")
    # A room's own module of that name is another one.
    own = "from . import budget\nfrom .calibrate import x"
    assert found(tmp_path, own, f"{room}/some.py") == []


@pytest.mark.parametrize("code", FORMERS.values(), ids=FORMERS.keys())
def test_former_modules_may_name_one_another(tmp_path: Path, code: str) -> None:
    assert found(tmp_path, code, "former/other.py") == []


def test_a_former_name_by_a_string_breaks_both_rules(tmp_path: Path) -> None:
    rules = [one.rule for one in found(tmp_path, "import_module('vlmprune.calibrate')")]
    assert rules == ["by name", "former"]


@pytest.mark.parametrize("place", door.BY_NAME)
@pytest.mark.parametrize("code", BY_NAME.values(), ids=BY_NAME.keys())
def test_few_files_import_by_a_string(tmp_path: Path, place: str, code: str) -> None:
    assert found(tmp_path, code, place) == []


def test_the_command_names_what_it_finds(tmp_path: Path) -> None:
    """On a copy of the script, whose package is a planted one."""
    script = tmp_path / "scripts" / "door.py"
    script.parent.mkdir()
    script.write_text(Path(door.__file__).read_text(encoding="utf-8"), encoding="utf-8")
    package = tmp_path / "src" / "vlmprune"
    package.mkdir(parents=True)
    (package / "good.py").write_text("import torch\n", encoding="utf-8")
    (package / "bad.py").write_text("import os\nimport transformers\n", encoding="utf-8")

    def run(*paths: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(script), *paths]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    whole = run()
    assert whole.returncode == 1
    assert whole.stdout.startswith("src/vlmprune/bad.py:2: import: import transformers")
    assert whole.stdout.count("\n") == 1
    one = run(str(package / "good.py"))
    assert (one.returncode, one.stdout) == (0, "")
