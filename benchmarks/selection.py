"""VisPruner's choice: as its authors make it, against ours, on a vision tower of real size.

    OMP_NUM_THREADS=1 python benchmarks/selection.py
    python benchmarks/selection.py --crops 1 --crops 5 --keep 64 --device cuda --json out.json
    python benchmarks/selection.py --memory

The tower is CLIP ViT-L/14 at 336 pixels: 577 tokens, 24 layers. Its weights are random and larger
than at the start of a training, so that attention and features differ from token to token.

- Theirs: eager attention, which returns the weights of all layers; the features are normalised
  once and every round gathers its tokens and multiplies them afresh.
- Ours: SDPA with a tap on the one layer whose row is wanted; `select.vispruner`.

All variants take turns within one process. Ratios are medians over turns of the ratio within one
turn, with half the distance between the quartiles; the JSON file holds the seconds, which say
little on a CPU. With --memory nothing is timed: for every method the extra peak of its choice among
many visual tokens is shown instead.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.progress import track
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel

import peaks
from page_parts import around, mib, table
from program import about, command, content, place, refuse, save
from turns import in_turns, ratio, seconds
from vlmprune import METHODS, select
from vlmprune.hosts.attention import attention_of
from vlmprune.method import Method
from vlmprune.methods.bases.learned import Learned
from vlmprune.runtime.attention.taps import Tap, tapped
from vlmprune.select import duplicates
from vlmprune.study.bench.tables import on_gpu
from vlmprune.study.measure import peak_bytes

# Hidden state -2 is the output of this layer.
LAYER = 22
TOKENS = 576


def authors_choice(attention: Tensor, features: Tensor, keep: int, ratio: float) -> Tensor:
    """VisPruner by its released procedure, all crops as a batch (even residual lists only)."""
    crop = torch.arange(len(attention), device=attention.device)[:, None]
    important = int(keep * ratio)
    order = attention.argsort(dim=1, descending=True)
    chosen, rest = order[:, :important], order[:, important:]
    unit = features / features.norm(dim=-1, keepdim=True)
    while rest.shape[1] > keep - important:
        drop = min(duplicates.ROUND, rest.shape[1] - (keep - important))
        tokens = unit[crop, rest]
        closest = (tokens[:, 0::2] @ tokens[:, 1::2].transpose(1, 2)).max(dim=-1).values
        stay = closest.argsort(dim=-1, descending=True)[:, drop:]
        rest = torch.cat((rest[:, 0::2][crop, stay], rest[:, 1::2]), dim=1)
    return torch.cat((chosen, rest), dim=1).sort(dim=1).values


def clear_inputs(crops: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Attention, and features of 12 kinds, mixed and noisy, as of an image with 12 things in it."""
    generator = torch.Generator().manual_seed(0)
    attention = torch.randn(crops, TOKENS, generator=generator).softmax(dim=1)
    kinds = torch.randn(crops, 12, 128, generator=generator)
    mix = (torch.randn(crops, TOKENS, 12, generator=generator) * 3).softmax(dim=2)
    features = mix @ kinds + torch.randn(crops, TOKENS, 128, generator=generator) * 0.3
    return attention.to(device), features.to(device)


def common(left: Tensor, right: Tensor) -> int:
    """Tokens that two choices [B, T] share, over all crops."""
    return int((left[:, :, None] == right[:, None, :]).sum())


class Tower:
    """CLIP ViT-L/14-336 with random weights, run in each of the ways that are compared."""

    def __init__(self, crops: int, device: torch.device, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        config = CLIPVisionConfig(
            hidden_size=1024,
            intermediate_size=4096,
            num_hidden_layers=24,
            num_attention_heads=16,
            image_size=336,
            patch_size=14,
        )
        self.model: Any = CLIPVisionModel(config)
        for name, weight in self.model.named_parameters():
            if "embedding" in name:
                weight.normal_(0, 0.5)
            elif weight.ndim > 1:
                weight.normal_(0, 1.5 / weight.shape[1] ** 0.5)
        self.model.to(device=device, dtype=dtype).eval()
        self.pixels = torch.randn(crops, 3, 336, 336).to(device=device, dtype=dtype)
        lists = (m for m in self.model.modules() if isinstance(m, torch.nn.ModuleList))
        self.layer = next(m for m in lists if len(m) == config.num_hidden_layers)[LAYER]

    def theirs(self) -> tuple[Tensor, Tensor]:
        """(attention [B, N], features [B, N, C]) with eager attention and all its weights."""
        self.model.set_attn_implementation("eager")
        out = self.model(self.pixels, output_attentions=True, output_hidden_states=True)
        return out.attentions[LAYER].mean(dim=1)[:, 0, 1:], out.hidden_states[-2][:, 1:]

    def plain(self) -> Tensor:
        """Features alone: the tower of a model that is not pruned."""
        self.model.set_attn_implementation("sdpa")
        return self.model(self.pixels, output_hidden_states=True).hidden_states[-2][:, 1:]

    def ours(self) -> tuple[Tensor, Tensor]:
        """The same pair by SDPA and a tap."""
        tap = Tap("cls")
        with tapped(self.layer, tap):
            features = self.plain()
        return tap.rows_seen[0][:, 1:], features

    def attention_calls(self) -> dict[str, Callable[[], Any]]:
        """The tapped attention module alone, with and without its tap."""
        self.model.set_attn_implementation("sdpa")
        module, hidden = attention_of(self.layer), torch.randn(len(self.pixels), TOKENS + 1, 1024)
        hidden = hidden.to(self.pixels)

        def call(with_tap: bool) -> None:
            with tapped(self.layer, Tap("cls")) if with_tap else nullcontext():
                module(hidden)

        return {"attention": lambda: call(False), "attention, tapped": lambda: call(True)}


def measure(
    crops: int,
    keep: int,
    share: float,
    repeat: int,
    tower_repeat: int,
    device: torch.device,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """All figures for one number of crops."""
    tower = Tower(crops, device, dtype)
    memory: dict[str, int | None] = {}
    outputs: dict[str, tuple[Tensor, Tensor]] = {}
    for name, run in (("theirs", tower.theirs), ("ours", tower.ours)):
        memory[f"tower, {name}"] = peak_bytes(lambda: outputs.update({name: run()}), device)  # noqa: B023
    attention, features = (t.float() for t in outputs["theirs"])

    selections: dict[str, Callable[[], Tensor]] = {
        "theirs": lambda: authors_choice(attention, features, keep, share),
        "ours": lambda: select.vispruner(attention, features, keep, share),
    }
    chosen = {name: call() for name, call in selections.items()}
    memory |= {f"selection, {name}": peak_bytes(call, device) for name, call in selections.items()}
    # A swap of two tokens that rounding alone tells apart changes which places are even in all
    # rounds that follow. How much that does: the authors' procedure against itself in float64.
    chosen["theirs, float64"] = authors_choice(attention.double(), features.double(), keep, share)
    chosen["ours, own tower"] = select.vispruner(*outputs["ours"], keep, share)
    # Inputs whose similarities are spread out, so that rounding decides nothing.
    clear = clear_inputs(crops, device)
    agree = torch.equal(authors_choice(*clear, keep, share), select.vispruner(*clear, keep, share))

    def timed(calls: Mapping[str, Callable[[], Any]], times: int) -> dict[str, list[float]]:
        return in_turns(calls, lambda name: seconds(calls[name], device), times)

    timed(selections, 2)
    selecting = timed(selections, repeat)
    calls = tower.attention_calls()
    timed(calls, 1)
    tapping = timed(calls, repeat)
    running = timed({"theirs": tower.theirs, "ours": tower.ours}, tower_repeat)
    # Apart from theirs, whose large allocations slow down whatever comes next.
    tower.plain()
    alone = timed({"plain": tower.plain, "ours": tower.ours}, tower_repeat)

    tap = [a - b for a, b in zip(tapping["attention, tapped"], tapping["attention"], strict=True)]
    return {
        "crops": crops,
        "keep": keep,
        "important_ratio": share,
        "same_choice_on_clear_inputs": agree,
        "tokens_in_common_with_theirs": {
            name: common(chosen["theirs"], tokens) for name, tokens in chosen.items()
        },
        "selection": ratio(selecting["theirs"], selecting["ours"]),
        "tower": ratio(running["theirs"], running["ours"]),
        "tap_share_of_tower": statistics.median(tap) / statistics.median(alone["plain"]),
        "tap_share_by_whole_towers": ratio(alone["ours"], alone["plain"])[0] - 1,
        "peak_bytes": memory,
        "seconds": {
            **{f"selection, {name}": values for name, values in selecting.items()},
            **{f"tower, {name}": values for name, values in running.items()},
            "tower, plain": alone["plain"],
            **tapping,
        },
    }


def markdown(found: Mapping[str, Any]) -> str:
    """What was measured, as a table and sentences."""

    def peak(one: Mapping[str, Any], what: str) -> str:
        theirs, ours = (one["peak_bytes"][f"{what}, {who}"] for who in ("theirs", "ours"))
        return f"{theirs / max(1, ours):.1f} ({mib(theirs)} → {mib(ours)} MiB)"

    def time(one: Mapping[str, Any], what: str) -> str:
        ours = 1e3 * statistics.median(one["seconds"][f"{what}, ours"])
        return around(one[what]) + (f" ({ours:.2f} ms)" if on_gpu(found) else "")

    heads = ["crops", "selection", "tower", "peak of selection", "peak of tower"]
    heads += ["tap, share of the tower", "tap, by whole towers"]
    rows = [
        [
            str(one["crops"]),
            *(time(one, what) for what in ("selection", "tower")),
            *(peak(one, what) for what in ("selection", "tower")),
            *(f"{100 * one[f'tap_share_{by}']:.2f} %" for by in ("of_tower", "by_whole_towers")),
        ]
        for one in found["results"]
    ]
    lines = [
        "The authors' procedure ÷ ours, and what the tap takes (`benchmarks/selection.py`); "
        f"{about(found['setting'], found['setting']['dtype'])}.",
        table(heads, rows),
    ]
    for one in found["results"]:
        equal = "the same tokens" if one["same_choice_on_clear_inputs"] else "DIFFERENT tokens"
        shared = one["tokens_in_common_with_theirs"]
        lines.append(
            f"- {one['crops']} crop(s): {equal} on inputs where rounding decides nothing; on the "
            f"tower's features, of {shared['theirs']} tokens in common with theirs: ours "
            f"{shared['ours']}, from our own tower {shared['ours, own tower']}, theirs once more "
            f"in float64 {shared['theirs, float64']}."
        )
    return "\n\n".join(lines)


def memory_of_all(tokens: int, json_path: Path | None) -> None:
    """Peaks of all methods that choose among a prompt's tokens by a rule.

    Of those that are trained the module counts, and Recall chooses at each step.
    """
    names = [
        name
        for name, cls in METHODS.items()
        if not issubclass(cls, Learned) and cls.recall is Method.recall
    ]
    found = [peaks.peak_of(name, tokens) for name in track(names, description="Methods")]
    print(peaks.markdown(found))
    save(json_path, [asdict(one) for one in found])


@torch.inference_mode()
def main(
    crops: Annotated[list[int] | None, typer.Option(help="Crops in a batch; may repeat.")] = None,
    keep: Annotated[int, typer.Option(help="Tokens kept of each crop's 576.")] = 64,
    important_ratio: Annotated[float, typer.Option(help="Share chosen by attention.")] = 0.5,
    repeat: Annotated[int, typer.Option(help="Turns of selection and attention.", min=1)] = 20,
    tower_repeat: Annotated[
        int | None,
        typer.Option(help="Turns of the whole tower; 3 on a CPU, else as --repeat.", min=1),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="The tower's precision.")] = "float32",
    json_path: Annotated[Path | None, typer.Option("--json", help="Write all figures.")] = None,
    memory: Annotated[bool, typer.Option("--memory", help="Peaks of all methods only.")] = False,
    tokens: Annotated[int, typer.Option(help="Visual tokens for --memory.", min=256)] = 16384,
) -> None:
    """Compare VisPruner's selection as released with vlmprune's."""
    if memory:
        memory_of_all(tokens, json_path)
        return
    odd = (TOKENS - int(keep * important_ratio)) % 2 == 1
    refuse({"the authors' procedure fails on lists of odd length; change --keep.": odd})
    where, kind = place(device, dtype)
    towers = tower_repeat or (3 if where.type == "cpu" else repeat)
    results = [
        measure(number, keep, important_ratio, repeat, towers, where, kind)
        for number in crops or [1, 5]
    ]
    found = content(where, {"dtype": dtype}, results=results)
    print(markdown(found))
    save(json_path, found)


if __name__ == "__main__":
    command(main)()
