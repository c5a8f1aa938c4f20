"""Methods inside the language model: each release's own decoder, with seeded weights."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import torch
from clones import enter, load, stand_in
from torch import Tensor
from transformers import LlamaConfig

import golden_inputs as seeded

Found = tuple[dict[str, Tensor], str]
IMAGE = 144


def config(layers: int, **more: Any) -> Any:
    """Of the tiny decoder."""
    return LlamaConfig(**seeded.DECODER, num_hidden_layers=layers, **more)


def prompt(model: Any, name: str, before: int, image: int, behind: int) -> tuple[Tensor, str]:
    """[1, L, D] the embedded prompt, and its checksum."""
    ids = seeded.whole(name, before + behind, seeded.VOCABULARY)
    words = model.embed_tokens(ids)
    seen = seeded.visual(name, image)
    embedded = torch.cat((words[:before], seen, words[before:]))[None]
    return embedded, seeded.checksum(embedded)


def ran(model: Any, run: Callable[[], Any]) -> dict[str, Tensor]:
    """States behind the last layer and the norm, and how many rows each layer got."""
    seen: list[int] = []

    def look(_: Any, args: Any, kwargs: Any) -> None:
        seen.append((args[0] if args else kwargs["hidden_states"]).shape[1])

    hooks = [one.register_forward_pre_hook(look, with_kwargs=True) for one in model.layers]
    states: Tensor = run().last_hidden_state
    for hook in hooks:
        hook.remove()
    return {"states": states[0], "rows": torch.tensor(seen)}


def fastv(folder: Path) -> Found:
    """Rows dropped in place: before layer 2, with 36 of 144 left, and before layer 3, with 20."""
    file = folder / "src/transformers/src/transformers/models/llama/modeling_llama.py"
    module = load("transformers.models.llama.modeling_fastv", file)
    found: dict[str, Tensor] = {}
    inputs = ""
    for layer, keep in ((2, 36), (3, 20)):
        chosen = config(
            6,
            use_fast_v=True,
            fast_v_sys_length=seeded.BEFORE,
            fast_v_image_token_length=IMAGE,
            fast_v_attention_rank=keep,
            fast_v_agg_layer=layer,
            fast_v_inplace=True,
        )
        model = module.LlamaModel(chosen).eval()
        seeded.fill(model, "fastv", 2.0)
        embedded, inputs = prompt(model, "fastv", seeded.BEFORE, IMAGE, seeded.BEHIND)
        given = {"inputs_embeds": embedded, "output_attentions": True, "use_cache": False}
        out = ran(model, partial(model, **given))
        found |= {f"layer{layer}.keep{keep}.{name}": one for name, one in out.items()}
    return found, inputs


class Ascending(set):
    """A set that is walked in ascending order."""

    def __iter__(self) -> Iterator[Any]:
        return iter(sorted(super().__iter__()))


def dart(folder: Path) -> Found:
    """As it is, and with Python's set of places walked in ascending order."""
    stand_in(["einops"])
    place = folder / "llava/model/language_model"
    enter("dart_release", place)
    module = load("dart_release.modeling_llama_self", place / "modeling_llama_self.py")
    found: dict[str, Tensor] = {}
    inputs = ""
    for layer, keep in ((2, 36), (3, 68)):
        chosen = config(6, attn_implementation="sdpa")
        chosen.text_length = None
        chosen.DART_config = {
            "K": layer,
            "image_token_start_index": seeded.BEFORE,
            "image_token_length": IMAGE,
            # Each of eight pivots takes an equal share beside the four visual ones.
            "max_num_trunction": keep - 4,
            "reduction_ratio": 0.0,
            "pivot_image_token": 4,
            "pivot_text_token": 4,
        }
        model = module.DART(chosen).eval()
        seeded.fill(model, "dart", 2.0)
        embedded, inputs = prompt(model, "dart", seeded.BEFORE, IMAGE, seeded.BEHIND)
        for name, kind in (("release", set), ("ascending", Ascending)):
            # The name is looked up in the module first.
            module.set = kind
            kept: list[Tensor] = []
            choose = model.get_retained_image_token

            def noted(*args: Any, choose: Any = choose, kept: Any = kept) -> Tensor:
                kept.append(choose(*args))
                return kept[-1]

            model.get_retained_image_token = noted
            out = ran(model, partial(model, inputs_embeds=embedded, use_cache=True))
            del model.get_retained_image_token
            out["kept"] = kept[0].sort().values - seeded.BEFORE
            key = f"layer{layer}.keep{keep}.{name}"
            found |= {f"{key}.{what}": one for what, one in out.items()}
    return found, inputs


def sparsevlm(folder: Path) -> Found:
    """Version 1 at 192 and 64 of 576; its clocks are of CUDA and are stood in for."""
    stand_in(["einops"])
    place = folder / "llava/model/language_model"
    enter("sparse_release", place)
    module = load("sparse_release.modelling_sparse_llama", place / "modelling_sparse_llama.py")
    clocks: Any = torch.cuda
    clocks.Event, clocks.synchronize = MagicMock(), MagicMock()
    clocks.Event.return_value.elapsed_time.return_value = 0.0
    score: Any = sys.modules["sparse_release.score"]
    model = module.LlamaDynamicvitModel(config(32, attn_implementation="sdpa")).eval()
    seeded.fill(model, "sparsevlm", 2.0)
    before, image = seeded.SPARSE_BEFORE, seeded.SPARSE_IMAGE
    embedded, inputs = prompt(model, "sparsevlm", before, image, seeded.SPARSE_BEHIND)
    run = partial(
        model,
        inputs_embeds=embedded,
        use_cache=True,
        return_dict=True,
        image_shape=image,
        token_length_list=[embedded.shape[1]],
        pre_prompt_length_list=[before],
    )
    found: dict[str, Tensor] = {}
    for keep in (192, 64):
        score.RETAIN_TOKN = keep
        out = ran(model, lambda: run()[2])
        found |= {f"keep{keep}.{name}": one for name, one in out.items()}
    return found, inputs


def pyramiddrop(folder: Path) -> Found:
    """Eight layers, with stages behind 2, 4 and 6; half goes on from each, and three quarters."""
    enter("llava", folder / "llava")
    module = load("pyramiddrop_release", folder / "llava/model/modeling_llama_pdrop.py")
    model = module.LlamaModel(config(8, attn_implementation="sdpa")).eval()
    seeded.fill(model, "pyramiddrop", 2.0)
    embedded, inputs = prompt(model, "pyramiddrop", seeded.BEFORE, IMAGE, seeded.BEHIND)
    # What the release's wrapper tells its decoder of a prompt.
    model.image_token_posi, model.image_tokens = [seeded.BEFORE], [IMAGE]
    model.prompt_len = [seeded.BEFORE + seeded.BEHIND]
    model.layer_list = [2, 4, 6]
    given = {"inputs_embeds": embedded, "use_cache": False, "return_dict": True}
    found: dict[str, Tensor] = {}
    for ratio in (0.5, 0.75):
        model.image_token_ratio_list = [ratio**stage for stage in range(4)]
        out = ran(model, lambda: model.pdrop_forward(**given)[0])
        found |= {f"ratio{ratio}.{name}": one for name, one in out.items()}
    return found, inputs


RUNS = {"fastv": fastv, "dart": dart, "sparsevlm": sparsevlm, "pyramiddrop": pyramiddrop}
