"""Tokens that see the patches of a vision tower and are not seen by them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import tiny
from vlmprune.errors import VlmpruneError
from vlmprune.runtime.encoder import semantic_tokens
from vlmprune.runtime.family import family_of

TOWERS = ["clip", "siglip", "dinov2"]
FEATURE = 1  # of three layers, the one whose output is hidden state -2


def parts(built: Any) -> tuple[Any, Any]:
    medium = family_of(built).media[0]
    return medium, medium.encoder(built, {})


def pixels(count: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randn(count, 3, tiny.SIDE, tiny.SIDE, generator=generator)


def tokens(count: int = 5, width: int = 32) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(8))


def states(built: Any, given: Tensor) -> list[Tensor]:
    """What enters the first layer, and what leaves each one, of the host alone."""
    _, encoder = parts(built)
    seen: list[Tensor] = []
    hooks = [encoder.layers[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))]
    hooks += [
        layer.register_forward_hook(lambda *a: seen.append(first(a[2]))) for layer in encoder.layers
    ]
    with torch.no_grad():
        built.model.vision_tower(given)
    for hook in hooks:
        hook.remove()
    return seen


def first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


@contextmanager
def attending(name: str, mask: Tensor) -> Iterator[None]:
    """Every attention call by a formula of this file's own: softmax with a mask, True is seen."""

    def plain(
        module: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, **kwargs: Any
    ) -> tuple[Tensor, None]:
        scaling = kwargs.get("scaling") or query.shape[-1] ** -0.5
        scores = (query @ key.transpose(2, 3) * scaling).masked_fill(~mask, -torch.inf)
        return (scores.softmax(-1) @ value).transpose(1, 2).contiguous(), None

    ALL_ATTENTION_FUNCTIONS[name] = plain
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS[name]


def masked_pass(built: Any, given: Tensor, added: Tensor, isolated: bool = True) -> Tensor:
    """Patches and tokens through the layers together, in one pass."""
    _, encoder = parts(built)
    both = states(built, given)[0]
    patches = both.shape[1]
    both = torch.cat((both, added.expand(len(both), -1, -1)), dim=1)
    mask = torch.ones(both.shape[1], both.shape[1], dtype=torch.bool)
    if isolated:
        mask[:patches, patches:] = False
    with attending("sdpa", mask):
        for layer in encoder.layers[: FEATURE + 1]:
            takes_mask = "Dinov2" not in type(layer).__name__
            both = first(layer(both, None) if takes_mask else layer(both))
    return both


def recorded_pass(built: Any, given: Tensor, added: Tensor) -> tuple[Any, list[Tensor]]:
    _, encoder = parts(built)
    with semantic_tokens.recorded(encoder) as patches:
        out = built.model.vision_tower(given, output_hidden_states=True)
    return out, patches.run(added)


@pytest.mark.parametrize("kind", TOWERS)
def test_equals_one_masked_pass(kind: str) -> None:
    built = tiny.model(kind=kind)
    with torch.no_grad():
        together = masked_pass(built, pixels(), tokens())
        _, (own,) = recorded_pass(built, pixels(), tokens())
        seen_by_patches = masked_pass(built, pixels(), tokens(), isolated=False)
    assert own.shape == (3, 5, 32)
    assert torch.allclose(own, together[:, -5:], atol=1e-5)
    # The control: with no mask the patches see the tokens, and the tokens other patches.
    assert (own - seen_by_patches[:, -5:]).abs().max() > 1e-3
    assert (together[:, :-5] - seen_by_patches[:, :-5]).abs().max() > 1e-3
    # The tokens do see patches: those of another image give something else.
    assert (own[0] - own[1]).abs().max() > 1e-3
    # And one another.
    with torch.no_grad():
        _, (alone,) = recorded_pass(built, pixels(), tokens()[:1])
    assert (own[:, :1] - alone).abs().max() > 1e-3


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", TOWERS)
def test_patches_are_unchanged_to_the_bit(kind: str, attention: str) -> None:
    built = tiny.model(kind=kind, attention=attention)
    before = states(built, pixels())
    with torch.no_grad():
        out, (own,) = recorded_pass(built, pixels(), tokens())
        sdpa = recorded_pass(tiny.model(kind=kind), pixels(), tokens())[1][0]
    for ours, theirs in zip(out.hidden_states[:3], before[:3], strict=True):
        assert torch.equal(ours, theirs)
    # Nothing of it stays behind.
    after = states(built, pixels())
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert torch.allclose(own, sdpa, atol=1e-5)


def test_call_by_call_and_in_any_batch() -> None:
    built = tiny.model()
    _, encoder = parts(built)
    given = pixels(3)
    with torch.no_grad():
        with semantic_tokens.recorded(encoder) as patches:
            built.model.vision_tower(given[:1])
            built.model.vision_tower(given[1:])
        one, two = patches.run(tokens())
        _, (whole,) = recorded_pass(built, given, tokens())
    assert [len(one), len(two)] == [1, 2]
    assert torch.allclose(torch.cat((one, two)), whole, atol=1e-6)


@pytest.mark.parametrize("kind", TOWERS)
def test_gradients_reach_the_tokens_and_no_patch(kind: str) -> None:
    built = tiny.model(kind=kind)  # not frozen
    given, added = pixels(2).requires_grad_(), tokens().requires_grad_()
    _, (own,) = recorded_pass(built, given, added)
    weight = torch.randn(own.shape, generator=torch.Generator().manual_seed(9))
    (own * weight).sum().backward()
    assert given.grad is None
    assert all(p.grad is None and p.requires_grad for p in built.parameters())
    assert added.grad is not None and (added.grad.abs().amax(dim=1) > 0).all()
    # By the slow way the gradient is the same.
    plain = tokens().requires_grad_()
    (masked_pass(built, pixels(2), plain)[:, -5:] * weight).sum().backward()
    assert plain.grad is not None
    assert torch.allclose(added.grad, plain.grad, atol=1e-4)


def test_gradient_checkpointing_changes_nothing() -> None:
    built = tiny.model().requires_grad_(False)
    expected = tokens().requires_grad_()
    recorded_pass(built, pixels(), expected)[1][0].square().sum().backward()
    tower = built.model.vision_tower
    later = getattr(tower, "activation_checkpointing_enable", None)  # the newer name
    (later or tower.gradient_checkpointing_enable)()
    built.train()
    layers = parts(built)[1].layers
    assert all(layer.gradient_checkpointing for layer in layers)
    added = tokens().requires_grad_()
    recorded_pass(built, pixels(), added)[1][0].square().sum().backward()
    assert expected.grad is not None and added.grad is not None
    assert torch.allclose(added.grad, expected.grad, atol=1e-5)
    assert all(layer.gradient_checkpointing for layer in layers)


def test_other_threads_are_not_recorded() -> None:
    built = tiny.model()
    _, encoder = parts(built)
    with torch.no_grad(), semantic_tokens.recorded(encoder) as patches:
        built.model.vision_tower(pixels(1))
        other = threading.Thread(target=lambda: built.model.vision_tower(pixels(2)))
        other.start()
        other.join()
    with torch.no_grad():
        assert [len(own) for own in patches.run(tokens())] == [1]


def test_half_precision_follows_the_tower() -> None:
    built = tiny.model().to(torch.bfloat16)
    with torch.no_grad():
        _, (own,) = recorded_pass(built, pixels().to(torch.bfloat16), tokens())
    assert own.dtype == torch.bfloat16


class TestRefusals:
    def layouts(self, built: Any, req: Any) -> Any:
        medium, _ = parts(built)
        visual = req.inputs["input_ids"] == tiny.IMAGE
        return medium.layouts(built, req.inputs, visual)

    def check(self, built: Any, width: int = 32, **inputs: Any) -> None:
        req = tiny.request(built, [1])
        medium, _ = parts(built)
        given = {**req.inputs, **inputs}
        semantic_tokens.check(built, medium, given, self.layouts(built, req), width, "VisToG")

    @pytest.mark.parametrize("kind", TOWERS)
    @pytest.mark.parametrize("family", ["llava", "llava_next"])
    def test_known_towers_pass(self, family: str, kind: str) -> None:
        self.check(tiny.model(family, kind=kind))

    def test_width(self) -> None:
        with pytest.raises(VlmpruneError, match=r"are 48 wide and the tower .* 32; use a"):
            self.check(tiny.model(), width=48)

    def test_several_feature_layers(self) -> None:
        with pytest.raises(VlmpruneError, match=r"vision_feature_layer=\[-2, -1\] takes features"):
            self.check(tiny.model(), vision_feature_layer=[-2, -1])

    def test_other_layers_by_name(self) -> None:
        built = tiny.model()

        class RotaryLayer(torch.nn.Module):
            pass

        built.model.vision_tower.encoder.layers[1] = RotaryLayer()
        with pytest.raises(VlmpruneError, match="RotaryLayer is not among the layers it knows"):
            self.check_without_request(built)

    def test_own_resolution(self) -> None:
        from vlmprune.hosts.families import FAMILIES

        medium = FAMILIES["qwen2_5_vl"].media[0]
        assert "own resolution" in (semantic_tokens.unfit(tiny.model(), medium) or "")

    def check_without_request(self, built: Any) -> None:
        medium, _ = parts(built)
        semantic_tokens.check(built, medium, {}, [], 32, "VisToG")

    def test_a_mask_in_the_tower(self) -> None:
        built = tiny.model()
        _, encoder = parts(built)

        def masked(_: Any, args: Any, kwargs: Any) -> Any:
            kwargs["attention_mask"] = torch.zeros(1, 1, 17, 17)
            return args[:1], kwargs

        hook = encoder.layers[0].register_forward_pre_hook(masked, with_kwargs=True)
        with (
            pytest.raises(VlmpruneError, match="CLIPEncoderLayer masks its patches"),
            semantic_tokens.recorded(encoder),
        ):
            built.model.vision_tower(pixels(1))
        hook.remove()
