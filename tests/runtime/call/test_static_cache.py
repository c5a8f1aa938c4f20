"""Methods before the language model on a static cache, and with the decode step compiled.

`generate` compiles the step by itself on a GPU where the cache is static. Here it is told to do so
on the CPU, by a backend that needs no compiler.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import CompileConfig

from answers import DIFFERENT, TOLERANCE, distance, generate
from tiny import model, request
from vlmprune import PLPHP, DivPrune, EViT, FastV, Recall, ToMe, VisionZip, VisPruner, VlmpruneError
from zoo import WINDOWED

STATIC = {"cache_implementation": "static"}
METHODS = {
    "vispruner": VisPruner(keep=5),
    "divprune": DivPrune(keep=5),
    "visionzip": VisionZip(keep=5),
    "tome": ToMe(keep=5),
    "evit": EViT(keep=5),
}


class Graphs:
    """A backend of `torch.compile` that runs what it is given as it is.

    Attributes:
        sizes: calls in each graph.
        runs: graphs that ran.
    """

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.runs = 0

    def __call__(self, graph: Any, inputs: Any) -> Callable[..., Any]:
        calls = ("call_function", "call_method", "call_module")
        self.sizes.append(sum(node.op in calls for node in graph.graph.nodes))

        def run(*given: Any) -> Any:
            self.runs += 1
            return graph.forward(*given)

        return run

    def __deepcopy__(self, memo: Any) -> Graphs:
        """Itself: Transformers copies its settings."""
        return self


@pytest.fixture
def graphs() -> Any:
    torch.compiler.reset()
    yield Graphs()
    torch.compiler.reset()


def compiled(backend: Graphs) -> dict[str, Any]:
    """Settings that have `generate` compile its steps."""
    settings = CompileConfig(backend=backend, mode="default")
    settings._compile_all_devices = True
    return {**STATIC, "compile_config": settings}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("images", [[1], [1, 2]], ids=["alone", "padded"])
def test_a_static_cache_answers_as_a_dynamic_one(name: str, images: list[int]) -> None:
    built = model()
    req = request(built, images)
    plain = generate(built, req.inputs)
    with METHODS[name](built):
        wanted = generate(built, req.inputs)
        found = generate(built, req.inputs, **STATIC)
    assert torch.equal(found.sequences, wanted.sequences)
    assert distance(found, wanted) < TOLERANCE
    assert distance(wanted, plain) > DIFFERENT


@pytest.mark.parametrize("name", ["aya_vision", "gemma3"])
def test_a_static_cache_with_a_sliding_window(name: str) -> None:
    entry = WINDOWED[name]
    built = entry.build()
    req = entry.request(built, [["image"], ["image", "image"]])
    try:
        generate(built, req.inputs, **STATIC)
    except IndexError:
        assert name == "gemma3" and Version(transformers.__version__) < Version("5.17")
        pytest.skip("this release's Gemma 3 takes no static cache, without a pruner either")
    with VisPruner(keep=0.75)(built):
        wanted = generate(built, req.inputs)
        found = generate(built, req.inputs, **STATIC)
    with VisPruner(keep=0.5)(built):
        other = generate(built, req.inputs, **STATIC)
    assert torch.equal(found.sequences, wanted.sequences)
    assert distance(found, wanted) < TOLERANCE
    assert distance(other, wanted) > DIFFERENT


@pytest.mark.filterwarnings("ignore:Dynamo")
@pytest.mark.parametrize("images", [[1], [1, 2]], ids=["alone", "padded"])
def test_compiled_steps(images: list[int], graphs: Graphs) -> None:
    """The same answer, and the steps run in the graphs that the bare model's run in."""
    built = model()
    req = request(built, images)
    settings = compiled(graphs)
    plain = generate(built, req.inputs)
    bare = generate(built, req.inputs, **settings)
    assert distance(bare, plain) < TOLERANCE
    largest = max(graphs.sizes)
    with VisPruner(keep=5)(built):
        wanted = generate(built, req.inputs)
        graphs.sizes.clear()
        for _ in range(2):
            graphs.runs = 0
            found = generate(built, req.inputs, **settings)
            assert torch.equal(found.sequences, wanted.sequences)
            assert distance(found, wanted) < TOLERANCE
            assert graphs.runs >= 5
    assert distance(wanted, plain) > DIFFERENT
    # The decoder is in one piece, as it is without a pruner.
    assert max(graphs.sizes, default=largest) >= 0.9 * largest
    again = generate(built, req.inputs, **settings)
    assert distance(again, plain) < TOLERANCE


INSIDE = {type(one).__name__: one for one in (PLPHP(), Recall(), FastV(keep=5))}


@pytest.mark.parametrize("pruner", INSIDE.values(), ids=INSIDE.keys())
def test_methods_inside_the_language_model_say_what_they_need(pruner: Any) -> None:
    built = model()
    req = request(built, [1])
    with pruner(built), pytest.raises(VlmpruneError, match="'static'; leave it out, for the dyn"):
        generate(built, req.inputs, **STATIC)
    built.forward = torch.compile(built.forward, backend="eager")
    with pruner(built), pytest.raises(VlmpruneError, match="use the model as it is, or prune befo"):
        generate(built, req.inputs)
