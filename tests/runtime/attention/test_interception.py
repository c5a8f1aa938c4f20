"""The one interception: nested, in its own thread, and free to attend to something else."""

from __future__ import annotations

import threading
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from stock import CACHE, cache_of
from tapped_towers import layers_of, nothing_stays, pixels, tower
from tiny import IMAGE, model, request
from vlmprune.hosts import contract
from vlmprune.hosts.attention import AttentionCall, attention_of
from vlmprune.runtime.attention import ragged
from vlmprune.runtime.attention.interception import Changing, Proceed, intercepting
from vlmprune.runtime.attention.ragged import Ragged
from vlmprune.select.softmax import scores

_stays = pytest.fixture(autouse=True)(nothing_stays)


class Noted:
    """Notes when it is reached and left, and with which queries."""

    def __init__(self, name: str, journal: list[Any]) -> None:
        self.name, self.journal = name, journal

    def around(self, call: AttentionCall, proceed: Proceed) -> Any:
        self.journal.append((self.name, float(call.query.sum())))
        result = proceed(call)
        self.journal.append(self.name)
        return result


@torch.no_grad()
def test_the_first_registered_is_the_outermost() -> None:
    built = tower("clip", "sdpa")
    module, journal = attention_of(layers_of(built)[1]), list[Any]()
    with (
        intercepting(Noted("outer", journal), module),
        intercepting(Changing(lambda call: replace(call, query=call.query * 2)), module),
        intercepting(Noted("inner", journal), module),
    ):
        built(pixels())
    (first, given), (second, changed), *back = journal
    assert (first, second, *back) == ("outer", "inner", "inner", "outer")
    assert changed == pytest.approx(2 * given) and given


@torch.no_grad()
def test_one_interceptor_around_several_modules_and_no_others() -> None:
    built, journal = tower("clip", "eager"), list[Any]()
    modules = [attention_of(layer) for layer in layers_of(built)]
    with intercepting(Noted("one", journal), modules[0], modules[2]):
        built(pixels())
    assert len(journal) == 4


@torch.no_grad()
def test_other_threads_do_not_reach_it() -> None:
    built, journal = tower("clip", "sdpa"), list[Any]()
    module = attention_of(layers_of(built)[1])
    with intercepting(Noted("one", journal), module):
        thread = threading.Thread(target=torch.no_grad()(lambda: built(pixels())))
        thread.start()
        thread.join(30)
        assert not journal
        built(pixels())
    assert len(journal) == 2


@torch.no_grad()
def test_a_call_in_another_form_is_refused_where_it_matters() -> None:
    built = tower("clip", "sdpa")
    module = attention_of(layers_of(built)[1])
    plain = type(module).forward

    def odd(self: Any, *args: Any, **kwargs: Any) -> Any:
        registry = __import__("sys").modules[type(self).__module__].ALL_ATTENTION_FUNCTIONS
        return registry["sdpa"](self, query=None)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(module), "forward", odd)
        with (
            intercepting(Noted("one", []), module),
            pytest.raises(contract.ContractError, match=r"otherwise \(no query comes\)"),
        ):
            module(torch.zeros(1))
        with (
            intercepting(Noted("one", []), attention_of(layers_of(built)[0])),
            pytest.raises(TypeError),
        ):
            module(torch.zeros(1))
    assert type(module).forward is plain


class Reselecting:
    """Attends, at each step anew, to all text keys and to each KV head's best visual one."""

    def __init__(self, index: int, layer: Any, visual: Tensor) -> None:
        self.index, self.layer, self.visual = index, layer, visual
        self.steps: list[tuple[int, int, Tensor]] = []

    def around(self, call: AttentionCall, proceed: Proceed) -> Any:
        batch, heads, columns, _ = call.key.shape
        if call.query.shape[2] > 1:
            return contract.run(proceed, call, causal=True)
        # What the cache layer holds is what the host hands on.
        assert call.key.shape == self.layer.keys.shape
        visual = torch.nn.functional.pad(self.visual, (0, columns - self.visual.shape[1]))
        found = scores(call.query, call.key, call.scale).view(batch, heads, -1, columns).amax(dim=2)
        best = found.masked_fill(~visual[:, None], -torch.inf).argmax(dim=-1, keepdim=True)
        keep = (~visual)[:, None].expand(-1, heads, -1).scatter(2, best, True)
        prefix = Ragged.cut(call.key, call.value, keep)
        tail = replace(call, key=call.key[:, :, :0], value=call.value[:, :, :0], mask=None)
        self.steps.append((self.index, columns, keep))
        return ragged.attend(tail, prefix).transpose(1, 2).contiguous(), None


@torch.no_grad()
def test_an_interceptor_attends_by_itself_at_each_step() -> None:
    """By layer and step, for each KV head other keys; equal to the host with a mask a head."""
    built = model()
    req = request(built, [1])
    ids, visual = req.inputs["input_ids"], req.inputs["input_ids"] == IMAGE

    def steps(around: Any) -> tuple[list[Tensor], list[Any]]:
        held = cache_of(built(**req.inputs, use_cache=True))
        layers = built.model.language_model.layers
        made = [around(i, held.layers[i], visual) for i in range(len(layers))]
        out = list[Tensor]()
        with ExitStack() as stack:
            for one, layer in zip(made, layers, strict=True):
                stack.enter_context(intercepting(one, attention_of(layer)))
            for token in (7, 9):
                out.append(built(input_ids=torch.tensor([[token]]), **{CACHE: held}).logits)
        return out, made

    class Masked(Reselecting):
        """The same by the host's own function under a mask."""

        def around(self, call: AttentionCall, proceed: Proceed) -> Any:
            super().around(call, proceed)
            keep = self.steps[-1][2]
            heads = keep.repeat_interleave(call.query.shape[1] // keep.shape[1], dim=1)
            return proceed(replace(call, mask=heads[:, :, None]))

    class Plain(Reselecting):
        def around(self, call: AttentionCall, proceed: Proceed) -> Any:
            return proceed(call)

    ours, made = steps(Reselecting)
    theirs, _ = steps(Masked)
    whole, _ = steps(Plain)
    for mine, want, other in zip(ours, theirs, whole, strict=True):
        torch.testing.assert_close(mine, want, rtol=0, atol=1e-5)
        assert float((mine - other).abs().max()) > 1e-3, "control: attention to all"
    length = ids.shape[1]
    for index, one in enumerate(made):
        assert [(layer, columns) for layer, columns, _ in one.steps] == [
            (index, length + 1),
            (index, length + 2),
        ]
