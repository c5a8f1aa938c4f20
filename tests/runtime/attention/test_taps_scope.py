"""Taps end with their block, and act on their own model and thread alone."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.clip import modeling_clip

from tapped_towers import eager_weights, layers_of, nothing_stays, pixels, seen, tower
from vlmprune.hosts.attention import attention_of
from vlmprune.runtime.attention.taps import Tap, tapped

_stays = pytest.fixture(autouse=True)(nothing_stays)


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
