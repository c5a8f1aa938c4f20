"""lmms-eval's plugin and VLMEvalKit's launcher: what they read, what they answer, what they refuse.

Without lmms-eval a stand-in states the contract that the class relies on, as its release 0.7.3 has
it; with lmms-eval the last test runs the plugin in it for real.
"""

from __future__ import annotations

import abc
import importlib
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from vlmprune import PLPHP, VisPruner, VlmpruneError, embedded, spec
from vlmprune.integrations import arguments, lmms_eval, vlmevalkit
from vlmprune.integrations.answering import conversation, cut, generation
from vlmprune.methods import METHODS

PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"
CLASS = "vlmprune.integrations.lmms_eval_model"
SCENES = json.loads((embedded.held_out() / "scenes.json").read_text(encoding="utf-8"))
GREEDY = {"max_new_tokens": 5, "temperature": 0, "top_p": 1.0, "num_beams": 1, "do_sample": False}


def picture(number: int) -> Image.Image:
    return Image.open(embedded.held_out() / SCENES[number]["file"]).convert("RGB")


# Arguments.


def test_settings_are_merged_into_the_method() -> None:
    read = arguments.read(
        arguments.split("pretrained=,method=vispruner,keep=128,important_ratio=0.75,batch_size=4")
    )
    assert read.pruner == VisPruner(keep=128, important_ratio=0.75)
    assert (read.pretrained, read.batch_size, read.max_new_tokens) == (None, 4, 128)
    assert arguments.read({"keep": 0.25, "method": "vispruner"}).pruner == VisPruner(keep=0.25)


def test_chains_and_quotes() -> None:
    chain = VisPruner(keep=64, important_ratio=0.25) | PLPHP(r=0.3)
    for text in (
        "method=vispruner+plphp,keep=64,important_ratio=0.25,r=0.3",
        'method="vispruner:keep=64,important_ratio=0.25+plphp:r=0.3"',
        "method='vispruner:keep=64,important_ratio=0.25|plphp',r=0.3",
    ):
        assert spec.dump(arguments.read(arguments.split(text)).pruner) == spec.dump(chain)


@pytest.mark.parametrize("given", ["", "method=", "method=none", "pretrained=embedded"])
def test_no_method_is_the_unpruned_embedded_model(given: str) -> None:
    read = arguments.read(arguments.split(given))
    assert read.pruner is None
    assert read.pretrained is None


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("method=vispruner,keep=64,kept=3", "argument 'kept' is none of pretrained, .*vispruner"),
        ("keep=64", "argument 'keep' is none of .*without method="),
        ("method=vispruner", "needs keep"),
        ("method=vispruner:keep=3,keep=4", "keep is given twice"),
        ("method=vispruner,keep=3,keep=4", "'keep' is given twice"),
        ("method=vispruner,keep", "'keep' is not of the form"),
        ("method=visprune,keep=3", "'visprune' is unknown"),
        ("batch_size=auto", "batch_size=auto is no whole number"),
        ("batch_size=0", "batch_size=0 is no whole number"),
        ("max_new_tokens=1.5", "max_new_tokens=1.5 is no whole number"),
    ],
)
def test_refused_arguments(given: str, said: str) -> None:
    with pytest.raises(VlmpruneError, match=said):
        arguments.read(arguments.split(given))


def test_no_setting_of_a_method_hides_behind_an_argument() -> None:
    settings = {one.name for cls in METHODS.values() for one in fields(cls)}
    assert "keep" in settings
    assert not settings & set(arguments.NAMES)


# Requests.


@pytest.mark.parametrize(
    ("given", "drawn", "limit"),
    [
        (None, False, 5),
        ({"temperature": 0, "do_sample": True, "top_p": 0.9}, False, 5),
        ({"temperature": 0.7, "do_sample": False, "max_new_tokens": 9}, False, 9),
        ({"temperature": 0.7, "top_p": 0.9, "until": ["\n"]}, True, 5),
        ({"do_sample": True}, True, 5),
        ({"image_aspect_ratio": "original", "top_p": None}, False, 5),
    ],
)
def test_generation_settings(given: Any, drawn: bool, limit: int) -> None:
    chosen = generation(given, 5)
    assert (chosen["do_sample"], chosen["max_new_tokens"], chosen["num_beams"]) == (drawn, limit, 1)
    assert ("temperature" in chosen) == (drawn and "temperature" in given)
    assert not {"until", "image_aspect_ratio"} & set(chosen)


def test_unknown_generation_settings_are_refused_by_name() -> None:
    with pytest.raises(VlmpruneError, match="'visual_cot' is not supported"):
        generation({"visual_cot": "x"}, 5)


def test_answers_end_at_the_first_stop() -> None:
    assert cut("\n yes.\n\nno", ["\n\n", "."]) == "yes"
    assert cut(" yes. ", None) == "yes."
    assert cut("a;b", ";") == "a"


def test_messages_become_parts_and_pictures(tmp_path: Path) -> None:
    path = tmp_path / "one.png"
    Image.new("L", (3, 2)).save(path)
    one = conversation(
        [
            {"role": "system", "content": "be brief."},
            {
                "role": "user",
                "content": [
                    {"type": "image", "url": str(path)},
                    {"type": "text", "text": "what?"},
                    {"type": "image", "url": Image.new("RGB", (5, 4))},
                ],
            },
        ]
    )
    assert [image.size for image in one.images] == [(3, 2), (5, 4)]
    assert [image.mode for image in one.images] == ["RGB", "RGB"]
    assert one.messages == [
        {"role": "system", "content": [{"type": "text", "text": "be brief."}]},
        {
            "role": "user",
            "content": [{"type": "image"}, {"type": "text", "text": "what?"}, {"type": "image"}],
        },
    ]
    with pytest.raises(VlmpruneError, match="holds 'video'"):
        conversation([{"role": "user", "content": [{"type": "video", "url": "a.mp4"}]}])
    with pytest.raises(VlmpruneError, match="picture is a int"):
        conversation([{"role": "user", "content": [{"type": "image", "url": 3}]}])


# The plugin. What follows states what it relies on in lmms-eval.


@dataclass(frozen=True)
class ModelManifest:
    """`lmms_eval.models.registry_v2.ModelManifest`."""

    model_id: str
    simple_class_path: str | None = None
    chat_class_path: str | None = None
    aliases: tuple[str, ...] = ()


class Lmms(abc.ABC):
    """`lmms_eval.api.model.lmms`: what a model must have, and what it is given."""

    is_simple = True

    def __init__(self) -> None:
        self._rank, self._world_size = 0, 1
        self.seen: list[tuple[Any, ...]] = []
        self.cache_hook = SimpleNamespace(add_partial=lambda *one: self.seen.append(one))
        # By task and split the documents; the harness fills it in.
        self.task_dict: dict[str, dict[str, list[Any]]] = {}

    @abc.abstractmethod
    def loglikelihood(self, requests: list[Any]) -> Any: ...

    @abc.abstractmethod
    def generate_until(self, requests: list[Any]) -> list[str]: ...

    @abc.abstractmethod
    def generate_until_multi_round(self, requests: list[Any]) -> list[str]: ...

    @property
    def rank(self) -> int:
        return self._rank

    def clean(self) -> None:
        self.cleaned = True


LOGGED: list[dict[str, Any]] = []


def stand_in() -> dict[str, ModuleType]:
    """Modules of lmms-eval that the plugin imports, by name."""
    contents: dict[str, dict[str, Any]] = {
        "lmms_eval": {},
        "lmms_eval.api": {},
        "lmms_eval.api.model": {"lmms": Lmms},
        "lmms_eval.models": {},
        "lmms_eval.models.registry_v2": {"ModelManifest": ModelManifest},
        "lmms_eval.models.model_utils": {},
        "lmms_eval.models.model_utils.gen_metrics": {
            "log_metrics": lambda **metrics: LOGGED.append(metrics)
        },
    }
    modules = {}
    for name, content in contents.items():
        modules[name] = ModuleType(name)
        vars(modules[name]).update(content, __path__=[])
    return modules


@pytest.fixture(scope="module")
def plugin() -> Iterator[Any]:
    """The class that the manifest names, on the stand-in."""
    with pytest.MonkeyPatch.context() as patch:
        for name, module in stand_in().items():
            patch.setitem(sys.modules, name, module)
        manifest = lmms_eval.manifest()
        assert (manifest.model_id, manifest.simple_class_path) == ("vlmprune", None)
        home, _, name = manifest.chat_class_path.rpartition(".")
        assert home == CLASS
        yield getattr(importlib.import_module(home), name)
    sys.modules.pop(CLASS, None)


def request(number: int, settings: dict[str, Any], task: str = "scenes") -> Any:
    """A request of a chat model: context, what makes a document's messages, settings, which one."""

    def to_messages(doc: dict[str, Any]) -> list[dict[str, Any]]:
        parts = [{"type": "image", "url": one} for one in doc["images"]]
        return [{"role": "user", "content": [*parts, {"type": "text", "text": doc["question"]}]}]

    return SimpleNamespace(args=("ctx", to_messages, dict(settings), number, task, "test"))


DOCS = [
    {"images": [picture(0)], "question": "can you see a bell?"},
    {"images": [picture(1)], "question": "describe the picture."},
    {"images": [], "question": "can you see a bell?"},
    {"images": [picture(0), picture(2)], "question": "how many burgers are there?"},
]


def by_hand(model: Any, processor: Any, doc: dict[str, Any], limit: int) -> str:
    """One answer by the model's own processor and `generate`, without the integration."""
    text = "USER: " + "<image>\n" * len(doc["images"]) + doc["question"] + " ASSISTANT:"
    inputs = processor(text=text, images=doc["images"] or None, return_tensors="pt")
    with torch.inference_mode():
        out = model.generate(**inputs, max_new_tokens=limit, do_sample=False)
    new = out[0, inputs["input_ids"].shape[1] :]
    return str(processor.decode(new, skip_special_tokens=True)).strip()


def test_it_answers_what_the_model_answers_by_hand(plugin: Any) -> None:
    model, processor = embedded.load()
    # Requests as document and limit: another limit makes another batch, the order stays.
    some = [(0, 5), (1, 3), (1, 5), (2, 5), (3, 5)]
    found = []
    for given, pruner, asked in (
        ("pretrained=,device=cpu,batch_size=3", None, some[:3]),
        ("method=vispruner,keep=32,device=cpu,batch_size=3", VisPruner(keep=32), some),
    ):
        handle = pruner.attach(model) if pruner else None
        expected = [by_hand(model, processor, DOCS[number], limit) for number, limit in asked]
        if handle is not None:
            handle.detach()
        own = plugin.create_from_arg_string(given, {"batch_size": 1, "device": None})
        own.task_dict["scenes"] = {"test": DOCS}
        LOGGED.clear()
        requests = [request(number, GREEDY | {"max_new_tokens": n}) for number, n in asked]
        assert own.generate_until(requests) == expected
        assert len(own.seen) == len(requests)
        extra = LOGGED[0]["additional_metrics"]
        pictures = sum(len(DOCS[number]["images"]) for number, _ in asked)
        assert extra.get("visual_tokens") == (None if pruner is None else 32 * pictures)
        assert extra.get("visual_tokens_before") == (None if pruner is None else 256 * pictures)
        found.append(expected[:3])
    assert plugin.is_simple is False
    assert found[0] != found[1]


@pytest.fixture(scope="module")
def small(plugin: Any) -> Any:
    own = plugin(method="vispruner", keep=16, device="cpu")
    own.task_dict["scenes"] = {"test": DOCS}
    return own


def test_until_cuts_the_answer(small: Any) -> None:
    whole, short = small.generate_until(
        [request(0, GREEDY), request(0, GREEDY | {"until": [".", "o"]})]
    )
    assert whole
    # A second call logs its own figures alone.
    LOGGED.clear()
    small.generate_until([request(0, GREEDY)])
    assert LOGGED[0]["additional_metrics"]["visual_tokens_before"] == 256
    assert short == re.split(r"[.o]", whole)[0].strip() != whole


def test_it_refuses_in_one_sentence(small: Any, plugin: Any) -> None:
    with pytest.raises(VlmpruneError, match="no loglikelihood requests"):
        small.loglikelihood([])
    with pytest.raises(VlmpruneError, match="several rounds"):
        small.generate_until_multi_round([])
    small.task_dict["marked"] = {"test": [{"images": [picture(0)], "question": "<image> what?"}]}
    with pytest.raises(VlmpruneError, match="text holds '<image>'"):
        small.generate_until([request(0, GREEDY, "marked")])
    with pytest.raises(VlmpruneError, match=r"batch_size is given twice, as 2 .* as 4"):
        plugin.create_from_arg_string("batch_size=2", {"batch_size": "4"})
    with pytest.raises(VlmpruneError, match="argument 'max_batch_size' is none of"):
        plugin.create_from_arg_string("", {"batch_size": 1, "max_batch_size": 8})
    with pytest.raises(VlmpruneError, match="keep=300"):
        plugin(method="vispruner", keep=300)


def test_clean_gives_the_model_back(plugin: Any) -> None:
    own = plugin(method="vispruner", keep=16, device="cpu")
    model = own.answerer.loaded.model
    assert "generate" in vars(model) or "forward" in vars(model)
    own.clean()
    assert own.cleaned
    assert not {"generate", "forward", "get_image_features"} & set(vars(model))


def test_the_entry_point_names_the_manifest() -> None:
    text = PYPROJECT.read_text(encoding="utf-8")
    group = text.partition('[project.entry-points."lmms_eval.models"]')[2]
    module, name = re.findall(r'^vlmprune = "([\w.]+):(\w+)"$', group, re.MULTILINE)[0]
    assert getattr(importlib.import_module(module), name) is lmms_eval.manifest


def test_no_harness_is_imported_by_the_package() -> None:
    code = (
        "import sys\n"
        "for name in ('lmms_eval', 'vlmeval'): sys.modules[name] = None\n"
        "import vlmprune, vlmprune.cli, vlmprune.integrations.lmms_eval\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    package = Path(lmms_eval.__file__).parents[1]
    importing = re.compile(r"^\s*(from|import) (lmms_eval|vlmeval)\b", re.MULTILINE)
    found = {path.name for path in package.rglob("*.py") if importing.search(path.read_text())}
    assert found == {"lmms_eval.py", "lmms_eval_model.py"}


# VLMEvalKit. The stand-in has what the launcher relies on: a run.py with `supported_VLM`, `main`
# and `load_env`, whose main reads sys.argv, makes models by name and logs what goes wrong.

RUN = """
import functools, sys
from vlmprune import embedded

class Llava:
    def __init__(self, path, verbose=False):
        self.path, self.verbose = path, verbose
        self.model, self.processor = embedded.load()

class Api:
    def __init__(self):
        self.model = "a name"

supported_VLM = {"small": functools.partial(Llava, "here", verbose=False), "remote": Api}
made, order = {}, []

def load_env():
    order.append("env")

def main():
    order.append("main")
    argv = sys.argv[1:]
    supported_VLM[argv[argv.index("--model") + 1]]
    for maker in supported_VLM.values():
        if hasattr(maker, "keywords") and "verbose" in maker.keywords:
            maker.keywords["verbose"] = True
    for name in argv[argv.index("--model") + 1 : argv.index("--data")]:
        try:
            made[name] = supported_VLM[name]()
        except Exception as error:
            order.append(f"skipped {name}")

if __name__ == "__main__":
    raise SystemExit("the launcher starts main itself")
"""


@pytest.fixture
def kit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    path = tmp_path / "run.py"
    path.write_text(RUN)
    monkeypatch.setattr(sys, "argv", ["launcher"])
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield str(path)
    sys.modules.pop("vlmevalkit_run", None)


def test_the_launcher_attaches_the_pruner(kit: str) -> None:
    method = "vispruner:keep=64,important_ratio=0.75"
    rest = ["--", "--model", "small", "--data", "MME", "--verbose"]
    assert vlmevalkit.main(["--method", method, "--run", kit, *rest]) == 0
    run: Any = sys.modules["vlmevalkit_run"]
    new = "small_vispruner-keep-64-important_ratio-0.75"
    assert sys.argv[1:] == ["--model", new, "--data", "MME", "--verbose"]
    assert run.order == ["env", "main"]
    wrapper = run.made[new]
    assert (wrapper.path, wrapper.verbose) == ("here", True)
    inputs = wrapper.processor(
        text="USER: <image>\nhow many? ASSISTANT:", images=picture(0), return_tensors="pt"
    )
    wrapper.model.generate(**inputs, max_new_tokens=1)
    assert len(wrapper.vlmprune.report.kept[0]) == 64
    # The model as it is stays there under its own name.
    assert not hasattr(run.supported_VLM["small"](), "vlmprune")


def test_the_launcher_tells_what_the_kit_would_only_log(kit: str, capsys: Any) -> None:
    rest = ["--", "--model", "remote", "--data", "MME"]
    assert vlmevalkit.main(["--method", "vispruner:keep=64", "--run", kit, *rest]) == 2
    assert sys.modules["vlmevalkit_run"].order[-1].startswith("skipped remote_")
    assert "remote: VLMEvalKit's Api holds no model of Transformers" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("rest", "said"),
    [
        (["--model", "large", "--data", "MME"], "no model 'large'"),
        (["--data", "MME"], "no `--model NAME` follows"),
        (["--config", "a.json"], "--config is not supported"),
        (["--model", "small", "--use-vllm"], "--use-vllm is not supported"),
    ],
)
def test_the_launcher_refuses(kit: str, rest: list[str], said: str, capsys: Any) -> None:
    assert vlmevalkit.main(["--method", "vispruner:keep=64", "--run", kit, "--", *rest]) == 2
    assert said in capsys.readouterr().err


def test_the_launcher_needs_the_kit_and_a_method(tmp_path: Path, capsys: Any) -> None:
    rest = ["--", "--model", "small"]
    assert vlmevalkit.main(["--method", "vispruner:keep=64", "--run", "none.py", *rest]) == 2
    assert "'none.py' is no file" in capsys.readouterr().err
    assert vlmevalkit.main(["--method", "visprune", *rest]) == 2
    assert "'visprune' is unknown" in capsys.readouterr().err
    other = tmp_path / "run.py"
    other.write_text("")
    assert vlmevalkit.main(["--method", "vispruner:keep=64", "--run", str(other), *rest]) == 2
    assert "no supported_VLM" in capsys.readouterr().err


# The real lmms-eval, where it is installed.

TASK = """
task: vlmprune_tiny
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: generate_until
doc_to_visual: !function functions.to_visual
doc_to_text: !function functions.to_text
doc_to_target: answer
generation_kwargs: {{max_new_tokens: 40, temperature: 0, do_sample: false}}
process_results: !function functions.process
metric_list: [{{metric: right, aggregation: mean, higher_is_better: true}}]
metadata: [{{version: 0.0}}]
"""
FUNCTIONS = """
from PIL import Image

def to_visual(doc):
    return [Image.open(doc["image"])]

def to_text(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]

def process(doc, results):
    return {"right": float(results[0] == doc["answer"])}
"""


@pytest.mark.skipif(find_spec("lmms_eval") is None, reason="lmms-eval is not installed")
def test_lmms_eval_itself(tmp_path: Path) -> None:
    docs = [
        {
            "image": str(embedded.held_out() / scene["file"]),
            "question": asked["question"],
            "answer": asked["answer"],
        }
        for scene in SCENES[:3]
        for asked in scene["questions"]
    ]
    (tmp_path / "docs.jsonl").write_text("\n".join(map(json.dumps, docs)))
    (tmp_path / "functions.py").write_text(FUNCTIONS)
    (tmp_path / "tiny.yaml").write_text(TASK.format(data=tmp_path / "docs.jsonl"))
    model, processor = embedded.load()
    for given, pruner in (("", None), ("method=vispruner,keep=64,", VisPruner(keep=64))):
        out = tmp_path / ("pruned" if pruner else "full")
        command = [sys.executable, "-m", "lmms_eval", "--model", "vlmprune", "--log_samples"]
        command += ["--model_args", f"{given}pretrained=embedded,device=cpu"]
        command += ["--tasks", "vlmprune_tiny", "--include_path", str(tmp_path)]
        command += ["--batch_size", "4", "--output_path", str(out)]
        subprocess.run(command, check=True)
        (samples,) = out.rglob("*samples_vlmprune_tiny.jsonl")
        lines = [json.loads(line) for line in samples.read_text().splitlines()]
        answers = {line["doc_id"]: line["filtered_resps"] for line in lines}
        handle = pruner.attach(model) if pruner else None
        for number, doc in enumerate(docs):
            asked = {"images": [Image.open(doc["image"])], "question": doc["question"]}
            expected = by_hand(model, processor, asked, 40)
            # A list of one in some releases.
            assert answers[number] in (expected, [expected])
        if handle is not None:
            handle.detach()
