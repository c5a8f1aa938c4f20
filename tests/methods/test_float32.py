"""Tokens are chosen in float32, of a view in half precision and under autocast too.

Rules that compare near-equals step by step choose other tokens where cosines are rounded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tiny import model, request
from vlmprune.hosts.attention import read
from vlmprune.hosts.towers import pooled_attention
from vlmprune.method import Method
from vlmprune.methods import METHODS
from vlmprune.methods.bases.learned import Learned
from vlmprune.runtime.attention import taps
from vlmprune.runtime.decoder.looks import asked_attention
from vlmprune.runtime.encoder.relevance import mean_cosine
from vlmprune.select import bipartite, precision, row_rules
from vlmprune.views import EncoderView

CROPS, GRID, N = 3, (16, 16), 256
BEFORE = [
    name
    for name, cls in METHODS.items()
    if cls.select is not Method.select and not issubclass(cls, Learned)
]
# Methods whose choice hangs on products of what they see.
PRODUCTS = ("vispruner", "divprune", "cdpruner", "visionzip", "prumerge")
CHOICES = ("select", "raters", "drop", "retain", "retain_together")


def upcast(values: Any) -> Any:
    """A view, or a tensor, with the same numbers in float32."""
    if isinstance(values, Tensor):
        return values.float() if values.is_floating_point() else values
    if isinstance(values, Mapping):
        return {name: upcast(one) for name, one in values.items()}
    if hasattr(values, "__dataclass_fields__"):
        return replace(values, **{f.name: upcast(getattr(values, f.name)) for f in fields(values)})
    return values


def view_of(dtype: torch.dtype) -> EncoderView:
    """What a half-precision tower shows, in a type: attention is float32 in any."""
    generator = torch.Generator().manual_seed(0)

    def scores() -> Tensor:
        return torch.rand(CROPS, N, generator=generator)

    def states(size: int) -> Tensor:
        # Neighbours are alike, as in a picture.
        shared = torch.randn(CROPS, 1, size, generator=generator)
        own = torch.randn(CROPS, N, size, generator=generator)
        return (2 * shared + own).to(dtype)

    return EncoderView(
        scores(),
        states(48),
        torch.ones(CROPS, N, dtype=torch.bool),
        (0, 0, 1),
        (GRID,) * CROPS,
        (True, False),
        {layer: scores() for layer in (1, 2, 3)},
        scores(),
        scores(),
        states(32),
        states(40),
        scores(),
        joined=scores(),
        joined_keys=states(64),
    )


def parts(name: str, view: EncoderView) -> list[Tensor]:
    """What a method keeps, and of what it is made."""
    made = METHODS[name](keep=0.5).select(view)
    if made.merge is None:
        return [made.kept]
    return [made.kept, made.merge.into, made.merge.source, made.merge.weight]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", BEFORE)
def test_a_view_in_half_precision_gives_the_tokens_of_float32(
    name: str, dtype: torch.dtype
) -> None:
    view = view_of(dtype)
    assert view.features.dtype == dtype
    made, wanted = parts(name, view), parts(name, upcast(view))
    assert len(made) == len(wanted) and all(map(torch.equal, made, wanted))


@pytest.mark.parametrize("name", PRODUCTS)
def test_what_is_rounded_further_gives_others(name: str) -> None:
    """A control: as if cosines were of vectors that half precision has brought to length one."""
    view = view_of(torch.bfloat16)

    def unit(values: Tensor | None) -> Tensor:
        assert values is not None
        return nn.functional.normalize(values, dim=-1)

    rounded = replace(
        view,
        features=unit(view.features),
        projected=unit(view.projected),
        keys=unit(view.keys),
        joined_keys=unit(view.joined_keys),
    )
    assert not all(map(torch.equal, parts(name, rounded), parts(name, view)))


@pytest.mark.parametrize("name", PRODUCTS)
def test_rules_are_not_rounded_by_autocast(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def same() -> bool:
        with torch.autocast("cpu", torch.bfloat16):
            try:
                made = parts(name, view)
            except RuntimeError:
                # Types that do not go together.
                return False
        return all(map(torch.equal, made, wanted))

    view = view_of(torch.bfloat16)
    wanted = parts(name, view)
    assert same()
    # Control: autocast would have rounded.
    monkeypatch.setattr(precision.torch.amp, "is_autocast_available", lambda _: False)
    assert not same()


def test_scores_are_not_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention, relevance, partners and raters: the same of half precision and of float32."""
    generator = torch.Generator().manual_seed(1)
    query, key = (torch.randn(2, 4, 32, 16, generator=generator).bfloat16() for _ in range(2))
    states = torch.randn(2, 32, 24, generator=generator).bfloat16()
    text = torch.randn(2, 7, 24, generator=generator).bfloat16() / 4
    rows = torch.tensor([[31, 5], [31, 6]])
    there, images = torch.ones(2, 7, dtype=torch.bool), torch.zeros(2, 32, dtype=torch.long)

    def found(kind: torch.dtype) -> list[Tensor]:
        call = read(nn.Identity(), query.to(kind), key.to(kind), 0.25)
        made = [taps.attention_rows(call, which) for which in ("cls", "received")]
        made.append(taps.patch_attention(call, None))
        made.append(taps.attention_rows(call.of_one_head(), "cls"))
        made.append(asked_attention(call, rows, torch.ones_like(rows, dtype=torch.bool)))
        made.append(mean_cosine(states.to(kind), text[0].to(kind)))
        made.append(bipartite.match(states.to(kind), 9, cls=True))
        made.append(row_rules.text_raters(states.to(kind), images, text.to(kind), there))
        return made

    wanted = found(torch.float32)
    assert all(one.dtype == torch.float32 for one in wanted[:6])
    assert all(map(torch.equal, found(torch.bfloat16), wanted))
    with torch.autocast("cpu", torch.bfloat16):
        assert all(map(torch.equal, found(torch.bfloat16), wanted))
        # Control: autocast would have rounded.
        monkeypatch.setattr(precision.torch.amp, "is_autocast_available", lambda _: False)
        rounded = found(torch.bfloat16)
    assert not any(map(torch.equal, rounded[:6], wanted[:6]))


def test_a_pooling_heads_softmax_is_in_float32() -> None:
    head = model(kind="siglip").model.vision_tower.head.bfloat16()
    hidden = torch.randn(2, 16, 32, generator=torch.Generator().manual_seed(2)).bfloat16()
    seen = pooled_attention(head, hidden)
    probe = head.probe.expand(2, -1, -1)
    theirs = head.attention(probe, hidden, hidden, need_weights=True)[1][:, 0]
    assert seen.dtype == torch.float32 and theirs.dtype == torch.bfloat16
    assert (seen.sum(dim=1) - 1).abs().max() < 1e-6
    assert (seen - theirs.float()).abs().max() < 0.02
    # Control: what is rounded has equals that are none.
    assert seen.unique().numel() > theirs.unique().numel()


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("vispruner", {"keep": 7}),
        ("visionzip", {"keep": 7}),
        ("prumerge", {"keep": 7}),
        ("divprune", {"keep": 7}),
        ("cdpruner", {"keep": 7}),
        ("tome", {"keep": 7}),
        ("evit", {"keep": 7}),
        ("fastv", {"keep": 0.5, "layer": 1}),
        ("dart", {"keep": 0.5, "layer": 1, "image_pivots": 2}),
        ("sparsevlm", {"keep": 0.5}),
        ("pyramiddrop", {"stages": 1}),
        ("plphp", {"r": 0.4}),
        ("zipvl", {"tau": 0.8}),
    ],
)
def test_a_call_under_autocast_chooses_in_float32(
    name: str, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each choice of a call, made again outside of autocast of the same numbers in float32."""
    cls, calls = METHODS[name], list[tuple[Any, tuple[Any, ...], Any]]()
    for one in CHOICES:
        plain = getattr(cls, one)
        if plain is getattr(Method, one):
            continue

        def noting(self: Any, *given: Any, plain: Any = plain) -> Any:
            assert not torch.is_autocast_enabled("cpu")
            found = plain(self, *given)
            calls.append((plain, (self, *given), found))
            return found

        monkeypatch.setattr(cls, one, noting)
    built = model()
    with torch.autocast("cpu", torch.bfloat16), cls(**settings)(built):
        built.generate(**request(built, [2, 1]).inputs, max_new_tokens=2, do_sample=False)
    monkeypatch.undo()
    assert calls
    for plain, given, found in calls:
        again = plain(*map(upcast, given))
        if isinstance(found, Tensor):
            assert torch.equal(found, again)
        elif found is not None:
            assert torch.equal(found.kept, again.kept)
