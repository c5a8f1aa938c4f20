"""Taps: the attention rows of fast attention are those of eager attention, and nothing stays."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from beartype import beartype
from jaxtyping import Float, jaxtyped
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import CLIPVisionConfig, CLIPVisionModel, Dinov2Config, Dinov2Model
from transformers.models.clip import modeling_clip
from transformers.models.dinov2 import modeling_dinov2

from vlmprune.hosts.attention import attention_of, read
from vlmprune.runtime.attention import interception, taps
from vlmprune.runtime.attention.taps import Tap, tapped
from vlmprune.views.settings import TapRows

REGISTRIES = (modeling_clip.ALL_ATTENTION_FUNCTIONS, modeling_dinov2.ALL_ATTENTION_FUNCTIONS)
SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
TOWERS = ("clip", "dinov2")


def tower(kind: str, attention: str, seed: int = 0) -> Any:
    """A tiny tower whose weights are scaled up, so that attention is far from uniform."""
    torch.manual_seed(seed)
    model: Any
    if kind == "clip":
        model = CLIPVisionModel(CLIPVisionConfig(intermediate_size=64, **SHAPE))
    else:
        model = Dinov2Model(Dinov2Config(mlp_ratio=2, **SHAPE))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1 or "embedding" in name:
                weight.normal_(0, 0.4)
    model.set_attn_implementation(attention)
    return model.eval()


def layers_of(model: nn.Module) -> nn.ModuleList:
    return next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == 3)


def pixels(seed: int = 0, images: int = 2) -> Tensor:
    return torch.randn(images, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def eager_weights(kind: str, seed: int = 0, images: int = 2) -> tuple[Tensor, ...]:
    """[B, heads, L, L] of each layer, as the library returns them."""
    return tower(kind, "eager", seed)(pixels(images=images), output_attentions=True).attentions


@torch.no_grad()
def seen(model: Any, layer: int, rows: TapRows, images: int = 2) -> Tensor:
    tap = Tap(rows)
    with tapped(layers_of(model)[layer], tap):
        model(pixels(images=images))
    (row,) = tap.rows_seen
    return row


@jaxtyped(typechecker=beartype)
def attention_rows(
    query: Float[Tensor, "B H L D"], key: Float[Tensor, "B G L D"], scaling: float, rows: TapRows
) -> Float[Tensor, "B L"]:
    return taps.attention_rows(query, key, scaling, rows)


@pytest.fixture(autouse=True)
def nothing_stays() -> Iterator[None]:
    """After each test the registries hold the very functions they held before."""
    before = [dict(registry) for registry in REGISTRIES]
    local = [dict(registry._local_mapping) for registry in REGISTRIES]
    shared = [dict(registry._global_mapping) for registry in REGISTRIES]
    yield
    assert [dict(registry) for registry in REGISTRIES] == before
    assert [dict(registry._local_mapping) for registry in REGISTRIES] == local
    assert [dict(registry._global_mapping) for registry in REGISTRIES] == shared
    assert not interception._dispatchers


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", TOWERS)
def test_cls_row_is_that_of_eager_attention(kind: str, attention: str) -> None:
    want = eager_weights(kind)
    model = tower(kind, attention)
    for layer in range(3):
        row = seen(model, layer, "cls")
        assert row.dtype == torch.float32
        torch.testing.assert_close(row, want[layer].mean(dim=1)[:, 0], rtol=0, atol=1e-6)
        # Controls: another layer's row, another query's, one head's, are far away.
        assert (row - want[layer - 1].mean(dim=1)[:, 0]).abs().max() > 1e-2
        assert (row - want[layer].mean(dim=1)[:, 1]).abs().max() > 1e-2
        assert (row - want[layer][:, 0, 0]).abs().max() > 1e-2


@pytest.mark.parametrize("chunk", [1, 5, 128])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", TOWERS)
def test_received_is_the_column_mean(
    kind: str, attention: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(taps, "CHUNK", chunk)
    want = [weights.mean(dim=(1, 2)) for weights in eager_weights(kind)]
    row = seen(tower(kind, attention), 1, "received")
    torch.testing.assert_close(row, want[1], rtol=0, atol=1e-6)
    torch.testing.assert_close(row.sum(dim=1), torch.ones(2))
    assert (row - want[0]).abs().max() > 1e-3
    assert (row - eager_weights(kind)[1].mean(dim=1)[:, 0]).abs().max() > 1e-2


@pytest.mark.parametrize("kind", TOWERS)
def test_a_tap_changes_nothing_in_the_output(kind: str) -> None:
    model = tower(kind, "sdpa")
    with torch.no_grad():
        plain = model(pixels()).last_hidden_state
        with tapped(layers_of(model)[1], Tap("cls")):
            assert torch.equal(model(pixels()).last_hidden_state, plain)


def test_one_row_a_forward() -> None:
    model, tap = tower("clip", "sdpa"), Tap("cls")
    with torch.no_grad(), tapped(layers_of(model)[1], tap):
        for images in (1, 3):
            model(pixels(images=images))
    assert [tuple(row.shape) for row in tap.rows_seen] == [(1, 17), (3, 17)]
    with torch.no_grad():
        model(pixels())
    assert len(tap.rows_seen) == 2, "nothing is recorded after the block"


def test_several_taps_on_one_model() -> None:
    model = tower("clip", "sdpa")
    want = [weights.mean(dim=1) for weights in eager_weights("clip")]
    rows = [Tap("cls"), Tap("received"), Tap("cls")]
    with torch.no_grad(), ExitStack() as stack:
        for layer, tap in zip((1, 1, 2), rows, strict=True):
            stack.enter_context(tapped(layers_of(model)[layer], tap))
        model(pixels())
    for layer, tap, row in zip((1, 1, 2), rows, (0, None, 0), strict=True):
        expected = want[layer].mean(dim=1) if row is None else want[layer][:, row]
        torch.testing.assert_close(tap.rows_seen[0], expected, rtol=0, atol=1e-6)


def test_two_models_interleaved() -> None:
    models = [tower("clip", "sdpa", seed=0), tower("clip", "eager", seed=1)]
    want = [eager_weights("clip", seed)[1].mean(dim=1)[:, 0] for seed in (0, 1)]
    first, second = Tap("cls"), Tap("cls")
    with torch.no_grad(), tapped(layers_of(models[0])[1], first):
        models[1](pixels())
        with tapped(layers_of(models[1])[1], second):
            models[0](pixels())
            models[1](pixels())
        models[0](pixels())
    assert len(first.rows_seen) == 2 and len(second.rows_seen) == 1
    for row in first.rows_seen:
        torch.testing.assert_close(row, want[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(second.rows_seen[0], want[1], rtol=0, atol=1e-6)
    assert (want[0] - want[1]).abs().max() > 1e-2


class BoomError(Exception):
    pass


def explode(*_: Any, **__: Any) -> None:
    raise BoomError


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_registry_is_restored_after_an_exception(attention: str) -> None:
    """`nothing_stays` looks at the registry; here the layer fails inside its attention."""
    model = tower("clip", attention)
    registry = modeling_clip.ALL_ATTENTION_FUNCTIONS
    during: list[Any] = []
    broken = attention_of(layers_of(model)[1]).out_proj
    watch = broken.register_forward_pre_hook(lambda *_: during.append(registry.get(attention)))
    bomb = broken.register_forward_hook(explode)
    before = registry.get(attention)
    tap = Tap("cls")
    with tapped(layers_of(model)[1], tap):
        with pytest.raises(BoomError), torch.no_grad():
            model(pixels())
        assert registry.get(attention) is before, "at once, not only at the end of the block"
    assert during[0] is not before, "control: the function was replaced while the layer ran"
    assert len(tap.rows_seen) == 1
    watch.remove()
    bomb.remove()
    assert torch.equal(seen(model, 1, "cls"), tap.rows_seen[0])


def test_other_layers_see_the_plain_function() -> None:
    model = tower("clip", "sdpa")
    registry = modeling_clip.ALL_ATTENTION_FUNCTIONS
    plain = registry["sdpa"]
    functions: list[Any] = []
    for layer in layers_of(model):
        attention_of(layer).q_proj.register_forward_pre_hook(
            lambda *_: functions.append(registry["sdpa"])
        )
    seen(model, 1, "cls")
    assert [function is plain for function in functions] == [True, False, True]


def test_a_local_override_comes_back() -> None:
    """A modeling file, or a user, may have put an own function into the registry."""
    registry = modeling_clip.ALL_ATTENTION_FUNCTIONS
    plain = registry["sdpa"]
    calls: list[nn.Module] = []

    def own(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        calls.append(module)
        return plain(module, *args, **kwargs)

    registry["sdpa"] = own
    try:
        seen(tower("clip", "sdpa"), 1, "cls")
        assert registry["sdpa"] is own and len(calls) == 3
    finally:
        del registry["sdpa"]


def test_hooks_are_gone_after_the_block() -> None:
    model = tower("clip", "sdpa")
    with pytest.raises(BoomError), tapped(layers_of(model)[1], Tap("cls")):
        raise BoomError
    for module in model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks


def test_a_layer_without_attention_is_refused() -> None:
    with (
        pytest.raises(LookupError, match="Linear has no attention"),
        tapped(nn.Linear(2, 2), Tap("cls")),
    ):
        pass


def in_thread(work: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def test_threads_see_their_own_rows_only() -> None:
    """Two threads stand in one layer at the same time, each with a tap and another batch."""
    model = tower("clip", "sdpa")
    want = {n: eager_weights("clip", images=n)[1].mean(dim=1)[:, 0] for n in (1, 3)}
    recorded: dict[int, list[Tensor]] = {}
    errors: list[BaseException] = []
    meet = threading.Barrier(2, timeout=20)

    def work(images: int) -> None:
        try:
            tap = Tap("cls")
            recorded[images] = tap.rows_seen
            with torch.no_grad(), tapped(layers_of(model)[1], tap):
                meet.wait()
                for _ in range(5):
                    model(pixels(images=images))
                meet.wait()
        except BaseException as error:
            errors.append(error)

    def wait(*_: Any) -> None:
        meet.wait()

    # Both wait inside the tapped layer, after both have entered it.
    waits = attention_of(layers_of(model)[1]).q_proj.register_forward_pre_hook(wait)
    threads = [in_thread(lambda n=n: work(n)) for n in (1, 3)]
    for thread in threads:
        thread.join(30)
    waits.remove()
    assert not errors
    for images, rows in recorded.items():
        assert len(rows) == 5
        for row in rows:
            torch.testing.assert_close(row, want[images], rtol=0, atol=1e-6)


def test_a_thread_that_leaves_does_not_take_the_tap_away() -> None:
    """A plain forward of another thread ends its layer while this thread is about to start."""
    model = tower("clip", "sdpa")
    inside, go_on, left = threading.Event(), threading.Event(), threading.Event()

    def hold(module: nn.Module, *_: Any) -> None:
        if threading.current_thread() is not threading.main_thread():
            inside.set()
            assert go_on.wait(20)
        else:
            go_on.set()
            assert left.wait(20)

    held = attention_of(layers_of(model)[1]).q_proj.register_forward_pre_hook(hold)

    @torch.no_grad()
    def other() -> None:
        model(pixels(images=1))
        left.set()

    thread = in_thread(other)
    assert inside.wait(20)
    row = seen(model, 1, "cls", images=3)
    thread.join(30)
    held.remove()
    want = eager_weights("clip", images=3)[1].mean(dim=1)[:, 0]
    torch.testing.assert_close(row, want, rtol=0, atol=1e-6)


def test_another_threads_forward_is_not_recorded() -> None:
    model, tap = tower("clip", "sdpa"), Tap("cls")

    def other() -> None:
        with torch.no_grad():
            model(pixels(images=3))

    with tapped(layers_of(model)[1], tap):
        in_thread(other).join(30)
        assert tap.rows_seen == []
        with torch.no_grad():
            model(pixels(images=1))
    assert [len(row) for row in tap.rows_seen] == [1]


class Sizes(TorchDispatchMode):
    """Remembers the largest tensor that any operation returned."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.largest = max(self.largest, leaf.numel())
        return out


def largest(query: Tensor, key: Tensor, rows: TapRows) -> int:
    with Sizes() as sizes:
        attention_rows(query, key, 0.5, rows)
    return sizes.largest


def test_memory_is_linear_in_the_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    H, L, D = 4, 600, 8
    query, key = torch.randn(2, 1, H, L, D)
    assert largest(query, key, "cls") == H * L * D, "the keys themselves, nothing larger"
    monkeypatch.setattr(taps, "CHUNK", 32)
    assert largest(query, key, "received") == H * 32 * L
    # Control: with one chunk for all, L × L would be seen.
    monkeypatch.setattr(taps, "CHUNK", L)
    assert largest(query, key, "received") == H * L * L


@pytest.mark.parametrize("rows", ["cls", "received"])
def test_grouped_keys(rows: TapRows) -> None:
    """Several query heads share a key head, in the order that Transformers uses."""
    torch.manual_seed(0)
    query, key = torch.randn(2, 6, 9, 4), torch.randn(2, 2, 9, 4)
    weights = torch.stack(
        [(query[:, h] @ key[:, h // 3].mT * 0.7).softmax(dim=-1) for h in range(6)], dim=1
    ).mean(dim=1)
    want = weights[:, 0] if rows == "cls" else weights.mean(dim=1)
    torch.testing.assert_close(attention_rows(query, key, 0.7, rows), want, rtol=0, atol=1e-6)
    # Control: heads dealt out in turn are another grouping.
    turned = attention_rows(query, key.flip(1), 0.7, rows)
    assert (turned - want).abs().max() > 1e-2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_softmax_is_in_float32(dtype: torch.dtype) -> None:
    query, key = torch.randn(2, 1, 4, 50, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    row = attention_rows(query, key, 0.5, "cls")
    assert row.dtype == torch.float32
    assert torch.equal(row, attention_rows(query.float(), key.float(), 0.5, "cls"))


def test_no_gradient_is_kept() -> None:
    model = tower("clip", "sdpa")
    tap = Tap("cls")
    with tapped(layers_of(model)[1], tap):
        model(pixels())
    assert not tap.rows_seen[0].requires_grad


@pytest.mark.parametrize("form", ["bool", "additive", "two-dimensional"])
def test_padding_neither_gives_nor_receives(form: str) -> None:
    """A padded batch scores each row as the row alone would be scored."""
    torch.manual_seed(3)
    query, key = torch.randn(2, 4, 300, 8), torch.randn(2, 4, 300, 8)
    real = torch.ones(2, 300, dtype=torch.bool)
    real[1, 170:] = False
    mask = real[:, None, None]
    if form == "additive":
        mask = torch.zeros(2, 1, 300, 300).masked_fill(~mask, torch.finfo(torch.float32).min)
    elif form == "two-dimensional":
        mask = real.long()
    found = taps.attention_rows(query, key, 0.3, "received", mask)
    assert torch.allclose(found[:1], taps.attention_rows(query[:1], key[:1], 0.3, "received"))
    alone = taps.attention_rows(query[1:, :, :170], key[1:, :, :170], 0.3, "received")
    assert torch.allclose(found[1:, :170], alone) and not found[1, 170:].any()


def test_images_in_one_masked_sequence_are_scored_apart() -> None:
    """Towers that pack images into one sequence keep them apart by a block-diagonal mask."""
    torch.manual_seed(3)
    query, key = torch.randn(1, 4, 200, 8), torch.randn(1, 4, 200, 8)
    lengths = [60, 140]
    mask = torch.block_diag(*[torch.ones(n, n, dtype=torch.bool) for n in lengths])[None, None]
    found = taps.attention_rows(query, key, 0.3, "received", mask)
    alone = [
        taps.attention_rows(q, k, 0.3, "received")
        for q, k in zip(query.split(lengths, 2), key.split(lengths, 2), strict=True)
    ]
    assert torch.allclose(found, torch.cat(alone, dim=1))
    tap = taps.Tap("received")
    ends = torch.tensor([0, 60, 200])
    tap.see(read(nn.Identity(), query, key, 0.3, ends))
    assert torch.equal(torch.cat(tap.rows_seen, dim=1), torch.cat(alone, dim=1))
