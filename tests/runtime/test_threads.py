"""Threads, each with a pruner of its own on one model, answer as each would alone."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from vlmprune import PLPHP, FastV, Recall, UniformGrid, VisPruner, VlmpruneError
from zoo import ZOO

FAMILIES = ["llava", "llava_next", "internvl", "gemma3"]
RECALL = Recall(read=2, floor=0, always=True, rest="none")
PRUNERS = [VisPruner(keep=2), VisPruner(keep=5), UniformGrid(keep=3), PLPHP(r=0.3), RECALL]
PRUNERS += [FastV(keep=2, layer=1)]
OPTIONS: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False}


def together(*works: Callable[[], Any]) -> list[Any]:
    """Run works at the same time, each in a thread of its own; raises what they raise."""
    barrier = threading.Barrier(len(works))

    def run(work: Callable[[], Any]) -> Any:
        barrier.wait(60)
        return work()

    with ThreadPoolExecutor(len(works)) as pool:
        return [one.result(300) for one in [pool.submit(run, work) for work in works]]


def asked() -> tuple[Any, Callable[[], int]]:
    """A model, and what runs it and tells how many columns it worked on."""
    model = ZOO["llava"].build()
    inputs = ZOO["llava"].request(model, [["image"]]).inputs

    def width() -> int:
        with torch.no_grad():
            return int(model(**inputs).logits.shape[1])

    return model, width


@pytest.mark.parametrize("family", FAMILIES)
def test_each_block_acts_in_its_own_thread(family: str) -> None:
    model = ZOO[family].build()
    requests = [
        ZOO[family].request(model, [["image"]], text=5 + n, seed=n).inputs for n in range(3)
    ]
    alone: list[list[tuple[Tensor, Any]]] = []
    for pruner in PRUNERS:
        with pruner(model) as handle:
            alone.append([])
            for inputs in requests:
                found = model.generate(**inputs, **OPTIONS)
                alone[-1].append((found, handle.report.visual_tokens_after))
    assert len({str(one) for one in alone}) == len(PRUNERS)

    def work(number: int) -> Callable[[], None]:
        def run() -> None:
            for _ in range(2):
                with PRUNERS[number](model) as handle:
                    for inputs, (due, kept) in zip(requests, alone[number], strict=True):
                        assert torch.equal(model.generate(**inputs, **OPTIONS), due)
                        assert handle.report.visual_tokens_after == kept
                        assert handle.report.method == repr(PRUNERS[number])

        return run

    together(*(work(n) for n in range(len(PRUNERS))))
    assert not {"forward", "generate"} & vars(model).keys()


def test_an_attachment_is_for_every_thread_and_a_block_for_its_own() -> None:
    model, width = asked()
    whole = width()
    handle = VisPruner(keep=5).attach(model)
    opened, done = threading.Event(), threading.Event()

    def block() -> int:
        with VisPruner(keep=2)(model):
            opened.set()
            assert done.wait(60)
            return width()

    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(block)
        assert opened.wait(60)
        assert width() == whole - 16 + 5
        done.set()
        assert other.result(60) == whole - 16 + 2
    handle.detach()
    assert width() == whole


def test_a_thread_that_a_block_starts_goes_by_it() -> None:
    """As a streamer's reader has it: `generate` runs in a thread of its own."""
    model = ZOO["llava"].build()
    inputs = ZOO["llava"].request(model, [["image"]]).inputs
    out: list[Any] = []
    with VisPruner(keep=2)(model) as handle:
        due = model.generate(**inputs, **OPTIONS)
        thread = threading.Thread(target=lambda: out.append(model.generate(**inputs, **OPTIONS)))
        thread.start()
        thread.join()
    assert torch.equal(out[0], due)
    assert handle.report.visual_tokens_after == 2


def test_a_thread_without_a_block_among_several_is_told_to_open_one() -> None:
    model = ZOO["llava"].build()
    inputs = ZOO["llava"].request(model, [["image"]]).inputs
    ready, done = threading.Barrier(3), threading.Event()

    def block(keep: int) -> None:
        with VisPruner(keep=keep)(model):
            ready.wait(60)
            assert done.wait(60)

    threads = [threading.Thread(target=block, args=(keep,)) for keep in (2, 5)]
    for thread in threads:
        thread.start()
    ready.wait(60)
    found: list[Any] = []

    def call() -> None:
        try:
            found.append(model(**inputs))
        except VlmpruneError as error:
            found.append(str(error))

    third = threading.Thread(target=call)
    third.start()
    third.join()
    done.set()
    for thread in threads:
        thread.join()
    assert "open a block in this thread too" in found[0]


def test_a_context_that_is_handed_on_brings_its_block_along() -> None:
    model, width = asked()
    whole, out = width(), {}
    with VisPruner(keep=5)(model):

        def other() -> None:
            with VisPruner(keep=2)(model):
                for name, run in (("own", width), ("handed", None)):
                    held = contextvars.copy_context()
                    run = run or (lambda held=held: held.run(width))
                    with ThreadPoolExecutor(1) as pool:
                        out[name] = pool.submit(run).result(60) if name == "handed" else run()

        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        assert width() == whole - 16 + 5
    assert out == {"own": whole - 16 + 2, "handed": whole - 16 + 2}


def test_a_report_is_that_of_the_threads_own_call() -> None:
    model = ZOO["llava"].build()
    one = ZOO["llava"].request(model, [["image"]]).inputs
    two = ZOO["llava"].request(model, [["image", "image"]]).inputs
    handle = VisPruner(keep=2).attach(model)
    called = threading.Barrier(2)

    def call(inputs: Any) -> int:
        model.generate(**inputs, **OPTIONS)
        called.wait(60)
        return len(handle.report.kept)

    assert together(lambda: call(one), lambda: call(two)) == [1, 2]
    assert len(handle.report.kept) in (1, 2)
    handle.detach()


def test_a_thread_that_had_a_block_on_another_model_goes_by_the_only_one() -> None:
    """As the worker of a pool that streams, which has served another model before."""
    models = [ZOO["llava"].build() for _ in range(2)]
    inputs = ZOO["llava"].request(models[0], [["image"]]).inputs

    def generated(model: Any) -> Tensor:
        return model(**inputs).logits.detach()

    def in_a_block(model: Any) -> Tensor:
        with VisPruner(keep=5)(model):
            return generated(model)

    whole = generated(models[1])
    with ThreadPoolExecutor(1) as pool, VisPruner(keep=2)(models[1]):
        due = generated(models[1])
        assert due.shape != whole.shape
        pool.submit(in_a_block, models[0]).result(60)
        assert torch.equal(pool.submit(generated, models[1]).result(60), due)
        # One that had a block on this very model knows that it has none.
        pool.submit(in_a_block, models[1]).result(60)
        assert torch.equal(pool.submit(generated, models[1]).result(60), whole)


def test_the_last_attachment_acts_whoever_made_it() -> None:
    model, width = asked()
    whole = width()
    first = VisPruner(keep=5).attach(model)
    (second,) = together(lambda: VisPruner(keep=2).attach(model))
    assert [width(), *together(width)] == [whole - 16 + 2] * 2
    second.detach()
    assert [width(), *together(width)] == [whole - 16 + 5] * 2
    first.detach()
