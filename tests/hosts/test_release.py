"""What releases of Transformers differ in: bounds, names, classes that are absent or cannot run."""

from __future__ import annotations

import ast
import importlib.util
import re
import shutil
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import transformers
from packaging.specifiers import SpecifierSet
from packaging.version import Version
from PIL import Image
from torch import nn

from repository import ROOT
from stock import CACHE
from tiny import model
from vlmprune import PLPHP, FastV, RandomTokens, VisPruner, VlmpruneError, embedded
from vlmprune.hosts import release
from vlmprune.hosts.decoder import decoder_layers
from vlmprune.hosts.families import FAMILIES
from vlmprune.io.models import Loaded, prepare
from zoo import EVERY, UNATTENDED, ZOO
from zoo.mended import forwards, runs

sys.path.insert(0, str(ROOT / "scripts"))

import first_run

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
FORMER = "past_key_values"
HERE = Version(transformers.__version__)


MAJOR, LOWEST, BEYOND = re.fullmatch(r">=(\d+)\.(\d+),<\1\.(\d+)", release.TESTED).groups()
LAST = int(BEYOND) - 1
REFUSED = [f"{MAJOR}.{int(LOWEST) - 1}.1", f"{MAJOR}.{BEYOND}.0", f"{int(MAJOR) + 1}.0.0"]
REFUSED += [f"{MAJOR}.{LAST}.0.dev0", f"{MAJOR}.{BEYOND}.0rc1"]


def bound(name: str) -> SpecifierSet:
    """What the package asks of another."""
    asked = [one for one in PROJECT["dependencies"] if re.match(rf"{name}\b", one)]
    return SpecifierSet(asked[0].removeprefix(name))


# --- Bounds


def test_the_same_releases_are_named_everywhere() -> None:
    assert SpecifierSet(release.TESTED) == bound("transformers")
    span = f"{MAJOR}.{LOWEST} to {MAJOR}.{LAST}"
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"transformers {span}" in readme
    page = (ROOT / "docs" / "stability.md").read_text(encoding="utf-8")
    assert f"| Transformers | {span} |" in page

    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    oldest = dict(re.findall(r"^OLDEST_(\w+) = (.*)$", makefile, re.M))
    assert oldest["TRANSFORMERS"] == f"{MAJOR}.{LOWEST}.0"
    lowest = {str(one) for one in bound("torch")}
    assert {f">={oldest['TORCH'].removesuffix('.0')}"} == lowest
    assert f"| torch | from {oldest['TORCH']} |" in page

    python = PROJECT["requires-python"].removeprefix(">=")
    assert f"| Python | from {python} |" in page
    shell = (ROOT / "scripts" / "setup.sh").read_text(encoding="utf-8")
    assert f"sys.version_info < ({python.replace('.', ', ')})" in shell
    assert f"Python ≥ {python}" in readme


@pytest.mark.parametrize("here", REFUSED)
def test_an_untested_release_is_refused(here: str, monkeypatch: pytest.MonkeyPatch) -> None:
    built = model()
    monkeypatch.delenv(release.UNTESTED, raising=False)
    monkeypatch.setattr(release.transformers, "__version__", here)
    for pruner in (VisPruner(keep=4), PLPHP(), FastV(keep=4)):
        with pytest.raises(VlmpruneError) as said:
            pruner.attach(built)
        sentence = str(said.value)
        assert here in sentence and release.TESTED in sentence
        assert "VLMPRUNE_UNTESTED=1" in sentence and "\n" not in sentence
    assert "generate" not in vars(built) and "forward" not in vars(built)
    # Only the value that the sentence names lets it through.
    monkeypatch.setenv(release.UNTESTED, "0")
    with pytest.raises(VlmpruneError, match="was tested on"):
        VisPruner(keep=4).attach(built)
    monkeypatch.setenv(release.UNTESTED, "1")
    VisPruner(keep=4).attach(built).detach()


@pytest.mark.parametrize("here", [f"{MAJOR}.{LOWEST}.0", f"{MAJOR}.19.0", f"{MAJOR}.{LAST}.3"])
def test_a_tested_release_is_not_refused(here: str, monkeypatch: pytest.MonkeyPatch) -> None:
    built = model()
    monkeypatch.delenv(release.UNTESTED, raising=False)
    monkeypatch.setattr(release.transformers, "__version__", here)
    VisPruner(keep=4).attach(built).detach()


def test_the_bound_moves_wherever_it_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = importlib.util.spec_from_file_location("releases", ROOT / "scripts" / "releases.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    major, lowest, beyond = script.allowed()
    assert bound("transformers") == SpecifierSet(f">={major}.{lowest},<{major}.{beyond}")
    for name in script.PLACES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    before = {name: (tmp_path / name).read_text(encoding="utf-8") for name in script.PLACES}
    monkeypatch.setattr(script, "ROOT", tmp_path)
    # The index has two minors more, of which the second fails.
    monkeypatch.setattr(script, "environment", lambda name, requirement: Path(name))
    newest = {"newest": f"{major}.{beyond + 1}.0"}
    monkeypatch.setattr(script, "version", lambda python: newest.get(str(python), f"{python}.0"))
    ran = []

    def run(python: Path, *more: str, **settings: str) -> bool:
        ran.append((str(python), more, settings))
        return str(python) == f"{major}.{beyond}"

    monkeypatch.setattr(script, "run", run)
    assert script.newest(move=False) is False
    assert script.allowed() == (major, lowest, beyond)
    assert ran == [
        (f"{major}.{minor}", (), {"VLMPRUNE_UNTESTED": "1"}) for minor in (beyond, beyond + 1)
    ]
    assert script.newest(move=True) is False
    assert script.allowed() == (major, lowest, beyond + 1)
    after = {name: (tmp_path / name).read_text(encoding="utf-8") for name in script.PLACES}
    assert all(after[name] != before[name] for name in before)
    assert f'TESTED = ">={major}.{lowest},<{major}.{beyond + 1}"' in "".join(after.values())
    assert f"transformers {major}.{lowest} to {major}.{beyond}" in after["README.md"]
    assert f"transformers {major}.{beyond} is allowed" in capsys.readouterr().out
    newest["newest"] = f"{major}.{beyond}.2"
    assert script.newest(move=True) is True and len(ran) == 4

    # A place that says something else is an error, before anything is written.
    (tmp_path / "README.md").write_text(before["README.md"], encoding="utf-8")
    with pytest.raises(SystemExit, match=r"README\.md does not say transformers"):
        script.allow(major, lowest, beyond + 1, beyond + 2)
    assert script.allowed() == (major, lowest, beyond + 1)


def test_public_modules_are_those_that_the_documents_use() -> None:
    page = (ROOT / "docs" / "stability.md").read_text(encoding="utf-8")
    table = page[page.index("| module |") : page.index("Public, too:")]
    public = set(re.findall(r"`(vlmprune[\w.]*)`", table))
    for name in public:
        __import__(name)
    used = set()
    for path in (*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md"):
        for block in re.findall(r"```python\n(.*?)```", path.read_text(encoding="utf-8"), re.S):
            for node in ast.walk(ast.parse(block)):
                if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("vlmprune"):
                    own = [f"{node.module}.{one.name}" for one in node.names]
                    modules = {one for one in own if one in sys.modules and one != node.module}
                    used |= modules or {node.module}
    assert used <= public and len(used) > 5


# --- Names


def test_no_other_file_knows_the_caches_name() -> None:
    """Who asks for a name that a release does not have gets nothing, and no error."""
    own = ROOT / "src" / "vlmprune" / "hosts" / "release.py"
    files = [
        path for part in ("src", "benchmarks", "training") for path in (ROOT / part).rglob("*.py")
    ]
    assert [path for path in files if FORMER in path.read_text(encoding="utf-8")] == [own]


@pytest.mark.oracle
@pytest.mark.parametrize("name", ZOO)
def test_names_of_every_family(name: str) -> None:
    built = ZOO[name].make()
    assert release.cache_name(type(built)) == CACHE
    for layer in decoder_layers(built):
        assert release.cache_name(type(layer)) == CACHE


def test_a_name_that_nobody_knows_is_an_error() -> None:
    class Layer(nn.Module):
        def forward(self, hidden_states: Any, kv: Any = None, **kwargs: Any) -> Any:
            return hidden_states

    with pytest.raises(VlmpruneError, match=r"Layer of transformers .* takes a KV cache neither"):
        release.cache_given(Layer, {"kv": 1})

    built = model()
    plain = type(built)
    # The host's own class, with the argument renamed once more.
    renamed = type(plain.__name__, (plain,), {"forward": Layer.forward})
    built.__class__ = renamed
    with pytest.raises(VlmpruneError, match=f"{plain.__name__} .* takes a KV cache neither"):
        PLPHP().attach(built)
    assert "generate" not in vars(built)


def test_a_cache_under_either_name() -> None:
    class Newer(nn.Module):
        def forward(self, hidden: Any, cache: Any = None, **kwargs: Any) -> Any: ...

    class Older(nn.Module):
        def forward(self, hidden: Any, past_key_values: Any = None, **kwargs: Any) -> Any: ...

    given = release.cache_given
    assert given(Newer, {"cache": 1}) == given(Older, {FORMER: 1}) == 1
    assert given(Newer, {}) is given(Newer, {"cache": None, FORMER: 2}) is None
    # A former name is taken by the host; a later one is not, and would be lost.
    assert given(Newer, {FORMER: 1}) == 1
    with pytest.raises(VlmpruneError, match=r"^cache is called past_key_values in transformers"):
        given(Older, {"cache": 1})
    # `generate` of later releases takes a third name, a forward overlooks it.
    with pytest.raises(VlmpruneError, match=r"^cache_params is called cache in transformers"):
        given(Newer, {"cache_params": 1})
    assert given(Older, {"cache": None}) is None
    more = release.with_cache(Newer, {FORMER: 1, "use_cache": True}, 2)
    assert more == {"cache": 2, "use_cache": True}
    assert release.with_cache(Older, {FORMER: 1}, None) == {FORMER: None}


def test_the_rest_of_the_arguments_may_have_any_name() -> None:
    def forward(a: int, b: int = 0, *, c: int = 0, **lm_kwargs: int) -> None: ...

    assert release.by_name(forward, 1, c=3, d=4, kwargs=5) == {"a": 1, "c": 3, "d": 4, "kwargs": 5}
    with pytest.raises(TypeError, match="multiple values"):
        release.by_name(forward, 1, a=2)


# --- Classes


@pytest.mark.oracle
@pytest.mark.parametrize("name", FAMILIES)
def test_every_class_is_where_its_record_says(name: str) -> None:
    """Absent from a release that should have it, a class fails; it is not passed over."""
    family = FAMILIES[name]
    since = Version(family.since)
    assert since in SpecifierSet(release.TESTED)
    assert hasattr(transformers, family.cls) == (since <= HERE), family.cls


@pytest.mark.oracle
@pytest.mark.parametrize("name", EVERY)
def test_a_class_with_a_fault_is_refused(name: str) -> None:
    """It fails by itself just where its record says so, and attaching names the reason."""
    entry = EVERY[name]
    tested = entry.build()
    stock = getattr(transformers, type(tested).__name__)
    plain = entry.make().eval() if type(tested) is stock else stock(tested.config).eval()
    records = [one for one in FAMILIES.values() if one.cls == type(plain).__name__]
    said = {why for one in records for at, why in one.fails.items() if HERE in SpecifierSet(at)}
    inputs = entry.request(tested, [[*entry.modalities, "image"]]).inputs
    if not forwards(inputs):
        inputs = entry.request(tested, [["image", "image"]]).inputs
    assert runs(plain, **inputs) == (not said)
    served = name in ZOO or name in UNATTENDED
    assert served == runs(tested, **inputs)
    if said:
        with pytest.raises(VlmpruneError, match=re.escape(said.pop())):
            RandomTokens(keep=4).attach(plain)
        assert "generate" not in vars(plain)
    if served:
        RandomTokens(keep=4).attach(tested).detach()


def test_a_record_may_say_that_a_class_has_a_fault() -> None:
    built = model()
    here = transformers.__version__
    with pytest.raises(
        VlmpruneError, match=rf"cannot be pruned in transformers {here}, where it is gone;"
    ):
        release.check_class(built, {f"=={here}": "it is gone"})
    release.check_class(built, {"==4.0.0": "it is gone"})
    # Somebody's subclass may have mended it.
    built.__class__ = type(type(built).__name__, (type(built),), {})
    release.check_class(built, {f"=={here}": "it is gone"})


# --- What a newcomer sees first


@pytest.mark.oracle
def test_the_demo_answers_alike_with_and_without() -> None:
    built, processor = embedded.load()
    picture = Image.open(embedded.scenes() / first_run.SCENE)
    inputs = prepare(Loaded(built, processor), [picture], first_run.QUESTION)

    def answer() -> str:
        ids = built.generate(**inputs, max_new_tokens=16, do_sample=False)
        new = ids[0, inputs["input_ids"].shape[1] :]
        return str(processor.decode(new, skip_special_tokens=True)).strip()

    whole = answer()
    with VisPruner(keep=first_run.KEEP)(built) as handle:
        pruned = answer()
    assert whole == pruned == "a sign."
    before, after = handle.report.visual_tokens_before, handle.report.visual_tokens_after
    assert after == first_run.KEEP * before < before
    # The control: what is kept matters to the answer.
    with VisPruner(keep=1)(built):
        assert answer() != whole


def test_a_layer_is_computed_once_inside_a_block_alone() -> None:
    name = release._RECOMPUTES
    told, never = nn.Identity(), nn.Identity()
    setattr(told, name, True)
    for layer, before in ((told, True), (never, None)):
        with pytest.raises(ZeroDivisionError), release.computed_once(layer):
            assert not getattr(layer, name, False)
            raise ZeroDivisionError
        assert getattr(layer, name, None) is before
