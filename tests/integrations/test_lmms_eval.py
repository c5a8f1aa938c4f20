"""lmms-eval's plugin: what it answers, what it refuses.

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
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from held_out_scenes import SCENES, picture
from repository import ROOT
from vlmprune import VisPruner, VlmpruneError, embedded
from vlmprune.integrations import lmms_eval

PYPROJECT = ROOT / "pyproject.toml"
CLASS = "vlmprune.integrations.lmms_eval_model"
GREEDY = {"max_new_tokens": 5, "temperature": 0, "top_p": 1.0, "num_beams": 1, "do_sample": False}


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
        assert manifest.model_id == "vlmprune"
        assert manifest.simple_class_path == f"{manifest.chat_class_path}Simple"
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


def simple(doc: int, target: Any) -> Any:
    """A request of a model that is given a text and its pictures."""
    args = (DOCS[doc]["question"], target, lambda one: one["images"], doc, "scenes", "test")
    return SimpleNamespace(args=args)


def test_likelihoods_are_those_of_the_masked_model(plugin: Any) -> None:
    """Of each choice a token's mean loss, by the full model that overlooks what was dropped."""
    model, processor = embedded.load()
    own = importlib.import_module(CLASS).VlmpruneSimple(method="vispruner", keep=32, device="cpu")
    own.task_dict["scenes"] = {"test": DOCS}
    asked = [(0, " yes"), (0, " no"), (1, lambda doc: " there is a cup."), (2, " yes"), (3, " two")]
    found = own.loglikelihood([simple(*one) for one in asked])
    assert plugin.is_simple is False and own.is_simple is True
    wrong = []
    for (number, target), (loss, greedy) in zip(asked, found, strict=True):
        doc = DOCS[number]
        answer = target(doc) if callable(target) else target
        text = "USER: " + "<image>\n" * len(doc["images"]) + doc["question"] + " ASSISTANT:"
        inputs = processor(text=text + answer, images=doc["images"] or None, return_tensors="pt")
        ids = inputs["input_ids"]
        with torch.inference_mode(), VisPruner(keep=32)(model) as handle:
            model.generate(**inputs, max_new_tokens=1)
        dropped = torch.zeros_like(ids, dtype=torch.bool)
        (places,) = (ids[0] == model.config.image_token_id).nonzero(as_tuple=True)
        dropped[0, places] = True
        for n, kept in enumerate(handle.report.kept if len(places) else ()):
            dropped[0, places[256 * n : 256 * n + 256][kept]] = False
        assert handle.positions == "original"
        seen = {
            "attention_mask": (~dropped).long(),
            "position_ids": torch.arange(ids.shape[1])[None],
        }
        count = len(processor.tokenizer(answer, add_special_tokens=False)["input_ids"])
        with torch.inference_mode():
            logits = model(**(inputs | seen)).logits[0, -count - 1 : -1]
            whole = model(**inputs).logits[0, -count - 1 : -1]
        wanted = ids[0, -count:]
        due, bare = (
            float(-one.log_softmax(-1).gather(1, wanted[:, None]).mean()) for one in (logits, whole)
        )
        assert abs(loss - due) < 1e-5
        assert greedy == bool((logits.argmax(-1) == wanted).all())
        wrong.append(abs(bare - due))
    # Control: the unpruned model's are others, but without pictures.
    assert min(wrong[:2]) > 1e-4 and wrong[3] < 1e-6
    # In this form it answers as in the other.
    (plain,) = own.generate_until([simple(0, GREEDY)])
    chat = plugin(method="vispruner", keep=32, device="cpu")
    chat.task_dict["scenes"] = {"test": DOCS}
    assert chat.generate_until([request(0, GREEDY)]) == [plain]


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
    with pytest.raises(VlmpruneError, match="continuation '' adds no token"):
        small.loglikelihood([SimpleNamespace(args=("what?", ""))])
    with pytest.raises(VlmpruneError, match="several rounds"):
        small.generate_until_multi_round([])
    small.task_dict["marked"] = {"test": [{"images": [picture(0)], "question": "<image> what?"}]}
    with pytest.raises(VlmpruneError, match="text holds '<image>'"):
        small.generate_until([request(0, GREEDY, "marked")])
    with pytest.raises(VlmpruneError, match=r"batch_size is given twice, as 2 .* as 4"):
        plugin.create_from_arg_string("batch_size=2", {"batch_size": "4"})
    with pytest.raises(VlmpruneError, match=r"argument 'max_batch_size' .*is none of"):
        plugin.create_from_arg_string("", {"batch_size": 1, "max_batch_size": 8})
    with pytest.raises(VlmpruneError, match="keep=0 leaves no"):
        plugin(method="vispruner", keep=0)


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
