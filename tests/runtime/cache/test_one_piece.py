"""A cut prompt and its tail in one piece: the same numbers, masks, and when it is laid so."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from answers import DIFFERENT, TOLERANCE, generate
from cut_cache import SETTINGS
from stock import CACHE, cache_of
from tiny import model, request
from vlmprune import PLPHP
from vlmprune.hosts.attention import AttentionCall
from vlmprune.runtime.attention import ragged
from vlmprune.runtime.attention.ragged import Ragged
from vlmprune.runtime.cache import one_piece
from vlmprune.runtime.cache.binding import Binding
from vlmprune.runtime.cache.one_piece import OnePiece
from vlmprune.runtime.cache.ragged_layer import RaggedLayer

EVEN = torch.tensor([[[1, 0, 1, 1], [1, 1, 1, 0]]]).bool().expand(2, -1, -1)
UNEVEN = torch.tensor([[[1, 0, 1, 1], [0, 0, 1, 0]], [[1, 1, 1, 1], [0, 0, 0, 0]]]).bool()


def laid(keep: Tensor, tail: int) -> tuple[Ragged, Tensor, Tensor]:
    """A prefix, and keys and values of a tail."""
    torch.manual_seed(0)
    keys, values = torch.randn(2, 2, 4, 8), torch.randn(2, 2, 4, 6)
    return Ragged.cut(keys, values, keep), torch.randn(2, 2, tail, 8), torch.randn(2, 2, tail, 6)


@pytest.mark.parametrize("keep", [EVEN, UNEVEN], ids=["even", "uneven"])
@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("masked", [None, "bool", "added", "padding"])
def test_it_is_attended_to_as_prefix_and_tail_are(
    keep: Tensor, queries: int, masked: str | None
) -> None:
    """Against the plain backend over both; a mask that leaves the filled places in differs."""
    prefix, keys, values = laid(keep, 5)
    piece = OnePiece.of(prefix, keys[:, :, :2], values[:, :, :2])
    held = piece.append(keys[:, :, 2:], values[:, :, 2:])
    assert piece.used == prefix.longest + 5 == held[0].shape[2]
    query = torch.randn(2, 4, queries, 8)
    mask: Any = None
    if masked is not None:
        sees = torch.ones(2, 1, queries, 5, dtype=torch.bool).tril(5 - queries)
        sees[1, :, :, 0] = False
        mask = sees
    if masked == "added":
        mask = torch.zeros(sees.shape).masked_fill(~sees, torch.finfo(torch.float32).min)
    if masked == "padding":
        mask = torch.tensor([[1, 1, 1, 1, 1], [0, 1, 1, 1, 1]])
    made = piece.mask(mask, queries, 4)
    ours = ragged.dense_partial(query, *held, made, 0.3)[0]
    call = AttentionCall(torch.nn.Module(), query, keys, values, None, {"scaling": 0.3})
    plain = mask
    if masked in (None, "padding"):
        plain = torch.ones(2, 1, queries, 5, dtype=torch.bool).tril(5 - queries)
        plain[1, :, :, 0] &= masked is None
    theirs = ragged.attend(call.with_mask(plain), prefix, "reference")
    assert float((ours - theirs).abs().max()) < TOLERANCE
    if keep is UNEVEN:
        assert made is not None
        made = made.clone()
        made[..., : piece.lead] = made.dtype == torch.bool
        whole = ragged.dense_partial(query, *held, made, 0.3)[0]
        assert float((whole - theirs).abs().max()) > DIFFERENT


@pytest.mark.parametrize("keep", [EVEN, UNEVEN], ids=["even", "uneven"])
def test_it_gives_back_what_it_was_made_of(keep: Tensor) -> None:
    prefix, keys, values = laid(keep, 3)
    piece = OnePiece.of(prefix, keys, values)
    for _ in range(2):
        found = piece.prefix
        assert (found.lengths, found.batch, found.heads) == (prefix.lengths, 2, 2)
        for name in ("keys", "values", "columns", "offsets"):
            assert torch.equal(getattr(found, name), getattr(prefix, name)), name
        assert torch.equal(piece.tails[0], keys) and torch.equal(piece.tails[1], values)
        # Growing keeps it, too.
        more = torch.randn(2, 2, 40, 8), torch.randn(2, 2, 40, 6)
        piece.append(*more)
        keys, values = torch.cat((keys, more[0]), 2), torch.cat((values, more[1]), 2)


def test_where_it_is_laid_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even prefixes always are, uneven ones where little is filled up, empty ones never."""
    assert one_piece.serves(laid(EVEN, 0)[0]) and one_piece.serves(laid(UNEVEN, 0)[0])
    assert not one_piece.serves(laid(torch.zeros_like(EVEN), 0)[0])
    monkeypatch.setattr(one_piece, "BYTES", 0)
    assert one_piece.serves(laid(EVEN, 0)[0]) and not one_piece.serves(laid(UNEVEN, 0)[0])
    # One place of sixteen is filled up, and fifteen are kept.
    keep = torch.ones(2, 2, 4, dtype=torch.bool)
    keep[1, 1, 0] = False
    assert not one_piece.serves(laid(keep, 0)[0])
    monkeypatch.setattr(one_piece, "SHARE", 1 / 15)
    assert one_piece.serves(laid(keep, 0)[0])


def test_all_that_it_holds_is_counted() -> None:
    prefix, keys, values = laid(UNEVEN, 3)
    piece = OnePiece.of(prefix, keys, values)
    assert piece.added() is not None
    held = [piece.keys, piece.values, piece.seen, piece._added]
    held += [one for one in vars(piece.rest).values() if isinstance(one, Tensor)]
    storages = {one.untyped_storage().data_ptr(): one.untyped_storage() for one in held}
    assert piece.nbytes == sum(one.nbytes() for one in storages.values())


def test_layers_on_other_devices_have_masks_of_their_own() -> None:
    binding, seen = Binding(), list[Any]()
    module = model().get_decoder().layers[0].self_attn
    for device in ("cpu", "meta", "cpu"):
        prefix, keys, values = laid(EVEN, 3)
        piece = OnePiece.of(prefix, keys, values).to(torch.device(device))
        query = torch.empty(2, 4, 2, 8, device=device)
        tails = piece.append(*(torch.empty(2, 2, 2, n, device=device) for n in (8, 6)))
        call = AttentionCall(module, query, *tails, None, {"scaling": 0.3})
        layer = RaggedLayer(binding, 0)
        layer._attend_piece(piece, call, lambda one: seen.append(one.mask))
    assert [one.device.type for one in seen] == ["cpu", "meta", "cpu"]
    # What is alike is made once.
    assert seen[0] is seen[2]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("images", [[1], [2, 0, 1]], ids=["alone", "padded"])
@pytest.mark.parametrize("per_head", ["equal", "adaptive"])
def test_calls_answer_as_apart(
    attention: str, images: list[int], per_head: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = model(attention=attention)
    req = request(built, images)
    pruner = PLPHP(**SETTINGS, per_head=per_head)
    wanted = generate(built, req.inputs)

    def logits() -> Any:
        with pruner(built):
            found = generate(built, req.inputs)
        laid = [layer.piece is not None for layer in cache_of(found).layers]
        return torch.stack(found.logits), laid

    ours, pieces = logits()
    assert all(pieces)
    monkeypatch.setattr(one_piece, "serves", lambda prefix: False)
    theirs, pieces = logits()
    assert not any(pieces)
    assert float((ours - theirs).abs().max()) < TOLERANCE
    assert float((ours - torch.stack(wanted.logits)).abs().max()) > DIFFERENT


def test_a_later_turn_takes_it_apart_and_lays_it_anew() -> None:
    built = model()
    first, later = request(built, [1]), request(built, [1], seed=5)

    def answered() -> Any:
        with PLPHP(**SETTINGS)(built):
            found = generate(built, first.inputs)
            held, ids = cache_of(found), found.sequences
            turn = torch.cat((ids, later.inputs["input_ids"]), dim=1)
            inputs = {**later.inputs, "input_ids": turn, "attention_mask": torch.ones_like(turn)}
            return generate(built, inputs, **{CACHE: held})

    ours = answered()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(one_piece, "serves", lambda prefix: False)
        theirs = answered()
    assert all(layer.piece is not None for layer in cache_of(ours).layers)
    assert torch.equal(ours.sequences, theirs.sequences)
    for mine, other in zip(cache_of(ours).layers, cache_of(theirs).layers, strict=True):
        assert mine.prefix.lengths == other.prefix.lengths
        assert float((mine.prefix.keys - other.prefix.keys).abs().max()) < TOLERANCE
