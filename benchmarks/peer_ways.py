"""The ways that `peers.py` compares with ours, each one function of a job."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from selection import authors_choice, clear_inputs, common
from turns import clock, in_turns, ratio
from vlmprune import PLPHP, VisPruner, select
from vlmprune.hosts.release import cache_returned, with_cache
from vlmprune.io.models import attached
from vlmprune.study.measure import stored_bytes

RATIO = 0.5  # VisPruner's share of tokens chosen by attention, the authors' default.
CLEAR_KEEP = 64  # Tokens kept of the 576 on which rounding decides nothing.
SNAP_WINDOW = 64  # Queries that kvpress's score asks, its default.
ALL, THEIRS, OURS = "all", "theirs", "ours"
Choose = Callable[[Tensor, Tensor, int, float], Tensor]


class SkippedError(Exception):
    """A peer that cannot run here; the message is one sentence that says why."""


@dataclass(frozen=True)
class Job:
    """What all ways have to do.

    Attributes:
        model: a LLaVA whose tower has a CLS token, in eval mode.
        inputs: one row, as a processor makes it.
        keep: visual tokens that VisPruner keeps of each picture.
        retention: share of visual tokens that PLPHP keeps.
        new_tokens: that each call generates, or decode steps of a turn.
        repeat: turns.
    """

    model: Any
    inputs: dict[str, Tensor]
    keep: int
    retention: float
    new_tokens: int
    repeat: int

    def now(self) -> float:
        """Seconds, by the clock of `turns`."""
        return clock(self.model.device)


def ratios(
    seconds: Mapping[str, list[float]], pairs: Iterable[tuple[str, str]]
) -> dict[str, tuple[float, float]]:
    """How some ways stand to others, by what is divided by what."""
    return {f"{a} / {b}": ratio(seconds[a], seconds[b]) for a, b in pairs}


# The authors' procedure


def encoded(model: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """(attention [crops, N], features [crops, N, C]) of a tower whose attention is eager."""
    out = model.model.vision_tower(pixels, output_attentions=True, output_hidden_states=True)
    layer = model.config.vision_feature_layer
    # Counted from the end, hidden state and attention have the same number.
    return out.attentions[layer].mean(dim=1)[:, 0, 1:], out.hidden_states[layer][:, 1:]


def authors_prompt(
    model: Any, inputs: dict[str, Tensor], keep: int, choose: Choose = authors_choice
) -> tuple[Tensor, Tensor]:
    """(kept [crops, T], the pruned prompt's embeddings [1, L, C]) by the released procedure."""
    attention, features = encoded(model, inputs["pixel_values"])
    kept = choose(attention, features, keep, RATIO)
    chosen = features.gather(1, kept[..., None].expand(-1, -1, features.shape[2]))
    ids = inputs["input_ids"][0]
    stays = ids != model.config.image_token_id
    places = (~stays).nonzero()[:, 0].view(len(kept), -1).gather(1, kept)
    embeds = model.get_input_embeddings()(ids).clone()
    embeds[places.flatten()] = model.model.multi_modal_projector(chosen).flatten(0, 1)
    stays[places.flatten()] = True
    return kept, embeds[stays][None]


@contextmanager
def eager_tower(model: Any) -> Iterator[None]:
    """The tower with eager attention, the one that returns its weights."""
    tower = model.model.vision_tower
    before = tower.config._attn_implementation
    tower.set_attn_implementation("eager")
    try:
        yield
    finally:
        tower.set_attn_implementation(before)


def answer(job: Job, prompt: Callable[[], dict[str, Tensor]]) -> tuple[Tensor, float, float]:
    """(new tokens [1, T], seconds to the first, seconds of the call), the prompt's making in it."""
    marks: list[float] = []

    def mark(input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        if not marks:
            marks.append(job.now())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    start = job.now()
    length = {"min_new_tokens": job.new_tokens, "max_new_tokens": job.new_tokens}
    out = job.model.generate(**prompt(), **length, do_sample=False, stopping_criteria=[mark])
    end = job.now()
    return out[:, -job.new_tokens :], marks[0] - start, end - start


def authors(job: Job) -> dict[str, Any]:
    """VisPruner as released, against ours attached to the same model, and against no pruning."""
    model, pixels = job.model, job.inputs["pixel_values"]
    whole: dict[str, list[float]] = {}
    said: dict[str, Tensor] = {}
    kept: dict[str, Tensor] = {}

    def theirs(choose: Choose = authors_choice) -> dict[str, Tensor]:
        kept[THEIRS], embeds = authors_prompt(model, job.inputs, job.keep, choose)
        mask = torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device)
        return {"inputs_embeds": embeds, "attention_mask": mask}

    def turn(name: str) -> float:
        if name == THEIRS:
            with eager_tower(model):
                said[name], first, all_of_it = answer(job, theirs)
        else:
            # The release numbers what is kept anew.
            ours = VisPruner(job.keep, RATIO, positions="compact") if name == OURS else None
            with attached(ours, model) as handle:
                said[name], first, all_of_it = answer(job, lambda: job.inputs)
                if handle is not None:
                    kept[OURS] = torch.stack(handle.report.kept).to(model.device)
        whole.setdefault(name, []).append(all_of_it)
        return first

    ways = (ALL, THEIRS, OURS)
    in_turns(ways, turn, 1)
    chosen = dict(kept)
    with eager_tower(model):
        attention, features = (x.double() for x in encoded(model, pixels))
        again = authors_choice(attention, features, job.keep, RATIO)
        # Given our choice, their procedure must say what ours says.
        same_choice, _, _ = answer(job, lambda: theirs(lambda *_: chosen[OURS]))
    clear = clear_inputs(len(pixels), model.device)
    by = [call(*clear, CLEAR_KEEP, RATIO) for call in (authors_choice, select.vispruner)]
    whole.clear()
    first = in_turns(ways, turn, job.repeat)
    pairs = ((THEIRS, OURS), (ALL, OURS), (ALL, THEIRS))
    return {
        "same_choice_on_clear_inputs": torch.equal(*by),
        "kept": int(chosen[OURS].numel()),
        "kept_by_both": common(chosen[THEIRS], chosen[OURS]),
        "kept_by_theirs_in_float64_too": common(chosen[THEIRS], again),
        "same_answer_given_the_same_tokens": torch.equal(same_choice, said[OURS]),
        "first_token": ratios(first, pairs),
        "whole_call": ratios(whole, pairs),
        "seconds": {"first_token": first, "whole_call": whole},
    }


# kvpress


class _Patch:
    """kvpress, whose import changes all attention functions, kept apart from everybody else's."""

    def __init__(self) -> None:
        self.before = dict(ALL_ATTENTION_FUNCTIONS.items())
        import kvpress

        self.kvpress = kvpress
        self.after = dict(ALL_ATTENTION_FUNCTIONS.items())
        self._set(self.before)

    def _set(self, functions: dict[str, Any]) -> None:
        for name, function in functions.items():
            ALL_ATTENTION_FUNCTIONS[name] = function

    @contextmanager
    def on(self, model: Any) -> Iterator[None]:
        """Its attention functions in use, and nothing of it left on the model."""
        self._set(self.after)
        try:
            yield
        finally:
            self._set(self.before)
            for layer in model.get_decoder().layers:
                for name in ("rotary_emb", "masked_key_indices"):
                    if hasattr(layer.self_attn, name):
                        delattr(layer.self_attn, name)


_patch: list[_Patch] = []


def the_patch() -> _Patch:
    """kvpress, imported once.

    Raises:
        SkippedError: it is not installed, or cannot be imported with what is.
    """
    if not _patch:
        if importlib.util.find_spec("kvpress") is None:
            raise SkippedError(
                "kvpress is not installed; `pip install --no-deps kvpress`, then its needs."
            )
        logging.getLogger("kvpress").setLevel(logging.ERROR)
        try:
            _patch.append(_Patch())
        except ImportError as error:
            raise SkippedError(
                f"kvpress {version_of('kvpress')} cannot be imported: {error}."
            ) from error
    return _patch[0]


def kvpress(job: Job) -> dict[str, Any]:
    """AdaKV by masks, against PLPHP with heads of their own lengths, at as many pairs."""
    patch = the_patch()
    model, length = job.model, job.inputs["input_ids"].shape[1]
    layers = model.get_decoder().layers
    ours = PLPHP(r=job.retention, dr=0, per_head="adaptive")
    held: dict[str, int] = {}
    attended: dict[str, int] = {}

    def prefill(**more: Any) -> Any:
        return model(**job.inputs, use_cache=True, logits_to_keep=1, **more)

    def steps(out: Any) -> float:
        token = out.logits[:, -1:].argmax(dim=-1)
        held_by = with_cache(type(model), {}, cache_returned(out))
        # The first step is not timed: what was there before is not this turn's.
        out, start = model(input_ids=token, **held_by), job.now()
        for _ in range(job.new_tokens):
            token = out.logits[:, -1:].argmax(dim=-1)
            out = model(input_ids=token, **held_by)
        return (job.now() - start) / job.new_tokens

    def theirs() -> float:
        kept = attended[OURS] / attended[ALL]
        score = patch.kvpress.SnapKVPress(1 - kept, window_size=min(SNAP_WINDOW, length // 2))
        with patch.on(model):
            try:
                with patch.kvpress.AdaKVPress(score)(model):
                    # It reads this name, which newer Transformers hand on but no longer make.
                    out = prefill(cache_position=torch.arange(length, device=model.device))
            except (AttributeError, KeyError, TypeError) as error:
                raise SkippedError(
                    f"kvpress {version_of('kvpress')} does not run on Transformers "
                    f"{version_of('transformers')} ({type(error).__name__}: {error})."
                ) from error
            held[THEIRS] = stored_bytes(cache_returned(out))
            masked = sum(len(layer.self_attn.masked_key_indices[0]) for layer in layers)
            attended[THEIRS] = attended[ALL] - masked
            return steps(out)

    def turn(name: str) -> float:
        if name == THEIRS:
            return theirs()
        with attached(ours if name == OURS else None, model) as handle:
            out = prefill()
            held[name] = stored_bytes(cache_returned(out))
            if handle is not None:
                masks = [layer.mask for layer in handle.report.layers]
                attended[OURS] = attended[ALL] - sum(int((~mask).sum()) for mask in masks)
            else:
                heads = cache_returned(out).layers[0].keys.shape[1]
                attended[ALL] = len(layers) * length * heads
            return steps(out)

    for name in (ALL, OURS, THEIRS):  # Theirs is given as many pairs as ours keeps.
        turn(name)
    seconds = in_turns((ALL, THEIRS, OURS), turn, job.repeat)
    pairs = ((THEIRS, ALL), (OURS, ALL), (OURS, THEIRS))
    return {
        "pairs_attended": {name: n / attended[ALL] for name, n in attended.items()},
        "bytes_held_after_prefill": {name: n / held[ALL] for name, n in held.items()},
        "decode_step": ratios(seconds, pairs),
        "seconds": {"decode_step": seconds},
    }


def version_of(package: str) -> str:
    """The version of a package that is installed here."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "(unknown version)"
