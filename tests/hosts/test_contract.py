"""What is checked of the contract with Transformers, when, and how often.

That the checks notice a changed host is the sabotage table's to show (`test_sabotage.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import tiny
from vlmprune import PLPHP, FastV, VisPruner, VlmpruneError
from vlmprune.hosts import contract, release
from vlmprune.hosts.attention import AttentionCall
from vlmprune.hosts.contract import ContractError, Ledger, Reached, check_rows
from vlmprune.io.models import attached
from vlmprune.pruner import Pruner
from vlmprune.runtime.encoder import proof
from zoo import ZOO

METHODS: dict[str, Callable[[], Pruner]] = {
    "VisPruner": lambda: VisPruner(keep=4),
    "PLPHP": lambda: PLPHP(r=0.4),
    "FastV": lambda: FastV(keep=0.5, layer=1),
    "chain": lambda: VisPruner(keep=4) | PLPHP(r=0.4),
}


class Counted(TorchDispatchMode):
    """Counts the operations on tensors inside the block."""

    count = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.count += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ZOO)
def test_attaching_works_on_no_tensor(name: str) -> None:
    built = ZOO[name].build()
    for method in (METHODS["VisPruner"], METHODS["PLPHP"]):
        with Counted() as work:
            try:
                handle = method().attach(built)
            except VlmpruneError:
                continue
        handle.detach()
        assert work.count == 0


@pytest.mark.parametrize("method", METHODS)
def test_what_the_first_call_proves_no_later_one_proves_again(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, cells = list[AttentionCall](), list[Any]()

    def rows_checked(call: AttentionCall, out: Any, causal: bool) -> bool:
        rows.append(call)
        return check_rows(call, out, causal)

    def cells_checked(one: Any) -> None:
        cells.append(one)
        check(one)

    check = proof.check
    monkeypatch.setattr(contract, "check_rows", rows_checked)
    monkeypatch.setattr(proof, "check", cells_checked)
    built = tiny.model()
    inputs = tiny.request(built, [1]).inputs
    with METHODS[method]()(built):
        built.generate(**inputs, max_new_tokens=3)
        first = len(rows), len(cells)
        assert first[0] >= 1 and first[1] == (method in ("VisPruner", "chain"))
        built.generate(**inputs, max_new_tokens=3)
        assert (len(rows), len(cells)) == first
        # Another configuration is another fact.
        built.to(torch.bfloat16)
        inputs["pixel_values"] = inputs["pixel_values"].to(torch.bfloat16)
        built.generate(**inputs, max_new_tokens=3)
        assert len(rows) == 2 * first[0] and len(cells) == 2 * first[1]
    with contract.switched_off(), METHODS[method]()(built):
        built.generate(**inputs, max_new_tokens=3)
    assert len(rows) == 2 * first[0] and len(cells) == 2 * first[1]


def test_what_is_measured_are_calls_behind_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of a bench share what was proved; those of a user do not."""
    cells, check = list[Any](), proof.check

    def counted(one: Any) -> None:
        cells.append(one)
        check(one)

    monkeypatch.setattr(proof, "check", counted)
    built = tiny.model()
    inputs = tiny.request(built, [1]).inputs
    for block, count in ((attached, 1), (attached, 1), (lambda one, model: one(model), 2)):
        with block(VisPruner(keep=4), built):
            built.generate(**inputs, max_new_tokens=2)
        assert len(cells) == count


def test_a_broken_contract_gives_the_model_back() -> None:
    built = tiny.model()
    inputs = tiny.request(built, [1]).inputs
    before = {name: dict(vars(one)) for name, one in built.named_modules()}
    expected = built.generate(**inputs, max_new_tokens=3)
    layer = built.model.language_model.layers[1]
    plain = type(layer).forward
    layer.forward = lambda *args, **kwargs: plain(layer, *args, **kwargs)
    # Called around its hooks, as a host might call its layers.
    type(layer).__call__ = lambda self, *args, **kwargs: self.forward(*args, **kwargs)
    handle = FastV(keep=0.5, layer=2).attach(built)
    try:
        with pytest.raises(ContractError) as told:
            built.generate(**inputs, max_new_tokens=3)
    finally:
        del type(layer).__call__
        del layer.forward
    said = str(told.value)
    assert said.startswith("LlavaForConditionalGeneration cannot be pruned rightly in")
    assert release.version() in said and "\n" not in said and said.endswith(".")
    assert {name: dict(vars(one)) for name, one in built.named_modules()} == before
    # Nothing acts any more, and it may be said once more.
    assert torch.equal(built.generate(**inputs, max_new_tokens=3), expected)
    handle.detach()


class Attending(nn.Module):
    """Stands for an attention module."""

    num_key_value_groups = 1
    training = False

    def __init__(self, groups: int, causal: bool, name: str) -> None:
        super().__init__()
        self.num_key_value_groups, self.is_causal = groups, causal
        self.config = type("Config", (), {"_attn_implementation": name})()


def attended(
    call: AttentionCall, scale: float, cap: float | None, sink: float | None, causal: bool
) -> Tensor:
    """[B, Q, H, Dv] attention in the call's own type, as a host might compute it."""
    groups = call.query.shape[1] // call.key.shape[1]
    key, value = (t.repeat_interleave(groups, dim=1) for t in (call.key, call.value))
    scores = call.query @ key.transpose(2, 3) * scale
    if cap is not None:
        scores = (scores / cap).tanh() * cap
    queries, columns = scores.shape[2:]
    if call.mask is not None:
        scores = scores + call.mask
    elif causal:
        seen = torch.ones(queries, columns, dtype=torch.bool).tril(columns - queries)
        scores = scores.masked_fill(~seen, torch.finfo(scores.dtype).min)
    if sink is not None:
        scores = torch.cat((scores, torch.full_like(scores[..., :1], sink)), dim=-1)
    weights = scores.float().softmax(dim=-1).to(scores.dtype)[..., :columns]
    return (weights @ value).transpose(1, 2)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 999),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    heads=st.sampled_from([(4, 4), (4, 2), (6, 1)]),
    ahead=st.integers(0, 5),
    causal=st.booleans(),
    capped=st.booleans(),
    wrong=st.sampled_from(["", "scale", "sink", "cap"]),
)
def test_a_row_tells_what_is_read_wrongly(
    seed: int,
    dtype: torch.dtype,
    heads: tuple[int, int],
    ahead: int,
    causal: bool,
    capped: bool,
    wrong: str,
) -> None:
    """A right reading passes in every type, and a wrong one does not."""
    generator = torch.Generator().manual_seed(seed)

    def noise(count: int, tokens: int) -> Tensor:
        return torch.randn(2, count, tokens, 8, generator=generator).to(dtype)

    tokens, scale = 12, 0.5
    module = Attending(heads[0] // heads[1], causal, "eager")
    others: dict[str, Any] = {"scaling": scale} | ({"softcap": 2.0} if capped else {})
    call = AttentionCall(
        module,
        noise(heads[0], tokens),
        noise(heads[1], tokens + ahead),
        noise(heads[1], tokens + ahead),
        None,
        others,
    )
    real = scale * 1.3 if wrong == "scale" else scale
    cap = (1.0 if wrong == "cap" else 2.0) if capped or wrong == "cap" else None
    sink = 1.0 if wrong == "sink" else None

    def function(module: Any, query: Any, key: Any, value: Any, mask: Any, **_: Any) -> Any:
        asked = AttentionCall(module, query, key, value, mask, others)
        return attended(asked, real, cap, sink, causal), None

    call.function = function
    out = call.run()[0]
    if wrong:
        with pytest.raises(ContractError, match="a row of its attention is off by"):
            check_rows(call, out, causal)
    else:
        assert check_rows(call, out, causal)


def test_a_mask_that_is_misread_is_told() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 2, 9, 8, generator=generator) for _ in range(3))
    call = AttentionCall(Attending(1, True, "eager"), query, key, value, None, {"scaling": 0.4})
    out = attended(call, 0.4, None, None, causal=True)
    assert check_rows(call, out, True)
    with pytest.raises(
        ContractError, match=r"a row of its attention is off by .* from the softmax"
    ):
        check_rows(call, out, False)


def test_a_model_that_overflows_is_not_the_contracts_to_tell() -> None:
    query = torch.full((1, 2, 4, 8), torch.nan)
    call = AttentionCall(Attending(1, True, "eager"), query, query, query, None, {})
    assert not check_rows(call, query.transpose(1, 2), True)


def test_layers_are_reached_in_order_and_all() -> None:
    who, reached = nn.Linear(1, 1), Reached()
    reached.note(1, who)
    with pytest.raises(ContractError, match="decoder layers 2, 3 were left out"):
        reached.check(who, [1, 2, 3], "were left out")
    with pytest.raises(ContractError, match="decoder layer 1 runs after layer 1"):
        reached.note(1, who)
    with contract.switched_off():
        reached.check(who, [1, 2, 3], "were left out")


def test_a_ledger_keeps_what_was_proved() -> None:
    own = Ledger()
    assert own.due("a", 1) and own.due("a", 1)
    own.prove("a", 1)
    assert not own.due("a", 1) and own.due("a", 2)
    with contract.switched_off():
        assert not own.due("a", 2)
