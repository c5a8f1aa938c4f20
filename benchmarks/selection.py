"""VisPruner's choice: as its authors make it, against ours, on a vision tower of real size.

    python benchmarks/selection.py
    python benchmarks/selection.py --crops 1 --crops 5 --keep 64 --device cuda --json out.json
    python benchmarks/selection.py --memory

The tower is CLIP ViT-L/14 at 336 pixels: 577 tokens, 24 layers. Its weights are random and larger
than at the start of a training, so that attention and features differ from token to token.

- Theirs: eager attention, which returns the weights of all layers; the features are normalised
  once and every round gathers its tokens and multiplies them afresh.
- Ours: SDPA with a tap on the one layer whose row is wanted; `select.vispruner`.

All variants take turns within one process. Times are medians; the spread beside them is half
the distance between the quartiles, relative to the median. On a CPU only ratios are printed, as
absolute times say little there (the JSON file holds them).

With --memory nothing is timed: for every method the extra peak of its choice among many visual
tokens is shown instead.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import CLIPVisionConfig, CLIPVisionModel
from vlmprune.learned import Learned

from peaks import peak_of, table
from vlmprune import METHODS, select
from vlmprune.files import write
from vlmprune.hosts.attention import attention_of
from vlmprune.runtime.attention.taps import Tap, tapped
from vlmprune.select import rules

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
        drop = min(rules.ROUND, rest.shape[1] - (keep - important))
        tokens = unit[crop, rest]
        closest = (tokens[:, 0::2] @ tokens[:, 1::2].transpose(1, 2)).max(dim=-1).values
        stay = closest.argsort(dim=-1, descending=True)[:, drop:]
        rest = torch.cat((rest[:, 0::2][crop, stay], rest[:, 1::2]), dim=1)
    return torch.cat((chosen, rest), dim=1).sort(dim=1).values


def clear_inputs(crops: int, device: str) -> tuple[Tensor, Tensor]:
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

    def __init__(self, crops: int, device: str, dtype: torch.dtype) -> None:
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


def in_turns(
    calls: dict[str, Callable[[], Any]], repeat: int, device: str
) -> dict[str, list[float]]:
    """Seconds of each call, all of them taking turns, the order reversed every other time."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeat):
        for name in list(calls)[:: 1 if turn % 2 else -1]:
            _wait(device)
            start = time.perf_counter()
            calls[name]()
            _wait(device)
            seconds[name].append(time.perf_counter() - start)
    return seconds


def peak_bytes(call: Callable[[], Any], device: str) -> int:
    """The most memory that a call holds at once, beyond what was there before."""
    if device != "cpu":
        _wait(device)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        _wait(device)
        return torch.cuda.max_memory_allocated() - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler is chatty
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    held = peak = 0
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def _wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def _spread(seconds: list[float]) -> float:
    if len(seconds) < 2:
        return float("nan")
    low, middle, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return (high - low) / 2 / middle


def _versus(slow: list[float], fast: list[float]) -> float:
    return statistics.median(slow) / statistics.median(fast)


def measure(
    crops: int, keep: int, ratio: float, repeat: int, tower_repeat: int, device: str, dtype: str
) -> dict[str, Any]:
    """All figures for one number of crops."""
    tower = Tower(crops, device, getattr(torch, dtype))
    memory: dict[str, int] = {}
    outputs: dict[str, tuple[Tensor, Tensor]] = {}
    for name, run in (("theirs", tower.theirs), ("ours", tower.ours)):
        memory[f"tower, {name}"] = peak_bytes(lambda: outputs.update({name: run()}), device)  # noqa: B023
    attention, features = (t.float() for t in outputs["theirs"])

    selections: dict[str, Callable[[], Tensor]] = {
        "theirs": lambda: authors_choice(attention, features, keep, ratio),
        "ours": lambda: select.vispruner(attention, features, keep, ratio),
    }
    chosen = {name: call() for name, call in selections.items()}
    memory |= {f"selection, {name}": peak_bytes(call, device) for name, call in selections.items()}
    # A swap of two tokens that rounding alone tells apart changes which places are even in all
    # rounds that follow. How much that does: the authors' procedure against itself in float64.
    chosen["theirs, float64"] = authors_choice(attention.double(), features.double(), keep, ratio)
    chosen["ours, own tower"] = select.vispruner(*outputs["ours"], keep, ratio)
    # Inputs whose similarities are spread out, so that rounding decides nothing.
    clear = clear_inputs(crops, device)
    agree = torch.equal(authors_choice(*clear, keep, ratio), select.vispruner(*clear, keep, ratio))

    in_turns(selections, 2, device)
    selecting = in_turns(selections, repeat, device)
    calls = tower.attention_calls()
    in_turns(calls, 1, device)
    tapping = in_turns(calls, repeat, device)
    running = in_turns({"theirs": tower.theirs, "ours": tower.ours}, tower_repeat, device)
    # Apart from theirs, whose large allocations slow down whatever comes next.
    tower.plain()
    alone = in_turns({"plain": tower.plain, "ours": tower.ours}, tower_repeat, device)
    running["plain"] = alone["plain"]

    extra = [a - b for a, b in zip(tapping["attention, tapped"], tapping["attention"], strict=True)]
    whole = [a / b - 1 for a, b in zip(alone["ours"], alone["plain"], strict=True)]
    seconds = {f"selection, {name}": values for name, values in selecting.items()}
    seconds |= {f"tower, {name}": values for name, values in running.items()}
    seconds |= tapping
    return {
        "crops": crops,
        "keep": keep,
        "important_ratio": ratio,
        "same_choice_on_clear_inputs": agree,
        "tokens_in_common_with_theirs": {
            name: common(chosen["theirs"], tokens) for name, tokens in chosen.items()
        },
        "selection_speedup": _versus(selecting["theirs"], selecting["ours"]),
        "tower_speedup": _versus(running["theirs"], running["ours"]),
        "tap_share_of_tower": statistics.median(extra) / statistics.median(running["plain"]),
        "tap_share_by_whole_towers": statistics.median(whole),
        "peak_bytes": memory,
        "spread": {name: _spread(values) for name, values in seconds.items()},
        "seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "repeats": {"selection and attention": repeat, "tower": tower_repeat},
    }


def show(console: Console, result: dict[str, Any], with_times: bool) -> None:
    """Print one number of crops."""
    table = Table(title=f"{result['crops']} crop(s), keep {result['keep']}", title_justify="left")
    for name in ("", "theirs", "ours", "ratio"):
        table.add_column(name, justify="left" if not name else "right")
    spread, memory, seconds = result["spread"], result["peak_bytes"], result["seconds"]
    for what, ratio in (("selection", "selection_speedup"), ("tower", "tower_speedup")):
        cells = []
        for who in ("theirs", "ours"):
            around = f"± {spread[f'{what}, {who}']:.1%}"
            milliseconds = f"{seconds[f'{what}, {who}'] * 1e3:.2f} ms "
            cells.append(milliseconds + around if with_times else around)
        table.add_row(f"{what} time", *cells, f"{result[ratio]:.2f}x")
    for what in ("selection", "tower"):
        theirs, ours = (memory[f"{what}, {who}"] for who in ("theirs", "ours"))
        sizes = (f"{theirs / 2**20:.1f} MiB", f"{ours / 2**20:.1f} MiB")
        table.add_row(f"{what} peak memory", *sizes, f"{theirs / max(ours, 1):.2f}x")
    console.print(table)
    tap, whole = result["tap_share_of_tower"], result["tap_share_by_whole_towers"]
    console.print(f"tap: {tap:.3%} of the tower, timed on its layer ({whole:+.2%} on whole towers)")
    equal = "the same tokens" if result["same_choice_on_clear_inputs"] else "DIFFERENT tokens"
    console.print(f"choice: {equal} on inputs where rounding decides nothing")
    shared = result["tokens_in_common_with_theirs"]
    console.print(
        f"on the tower's features, of {shared['theirs']} tokens in common with theirs: "
        f"ours {shared['ours']}, from our own tower {shared['ours, own tower']}; "
        f"theirs once more in float64 {shared['theirs, float64']}\n"
    )


def _memory(tokens: int, json_path: Path | None) -> None:
    peaks = [
        peak_of(name, tokens, lambda call: peak_bytes(call, "cpu"))
        # Of those that are trained, the module counts, which is another matter.
        for name in track(
            [name for name, cls in METHODS.items() if not issubclass(cls, Learned)],
            description="Methods",
        )
    ]
    Console().print(table(peaks))
    if json_path is not None:
        text = json.dumps([asdict(one) for one in peaks], indent=2)
        write(json_path, text + "\n")


@torch.inference_mode()
def main(
    crops: Annotated[list[int] | None, typer.Option(help="Crops in a batch; may repeat.")] = None,
    keep: Annotated[int, typer.Option(help="Tokens kept of each crop's 576.")] = 64,
    important_ratio: Annotated[float, typer.Option(help="Share chosen by attention.")] = 0.5,
    repeat: Annotated[int, typer.Option(help="Repeats of selection and attention.")] = 20,
    tower_repeat: Annotated[
        int | None, typer.Option(help="Repeats of the whole tower; 3 on a CPU, else as --repeat.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="The tower's precision.")] = "float32",
    json_path: Annotated[Path | None, typer.Option("--json", help="Write all figures.")] = None,
    memory: Annotated[bool, typer.Option("--memory", help="Peaks of all methods only.")] = False,
    tokens: Annotated[int, typer.Option(help="Visual tokens for --memory.")] = 16384,
) -> None:
    """Compare VisPruner's selection as released with vlmprune's."""
    if memory:
        _memory(tokens, json_path)
        return
    if (TOKENS - int(keep * important_ratio)) % 2:
        raise typer.BadParameter("the authors' procedure fails on lists of odd length; change it.")
    console = Console()
    on_gpu = device != "cpu"
    where = torch.cuda.get_device_name() if on_gpu else f"{platform.machine()} CPU"
    setting = (
        f"{where}, {torch.get_num_threads()} thread(s), {dtype}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}"
    )
    console.print(setting)
    towers = tower_repeat or (repeat if on_gpu else 3)
    results = []
    for number in crops or [1, 5]:
        results.append(measure(number, keep, important_ratio, repeat, towers, device, dtype))
        show(console, results[-1], with_times=on_gpu)
    if json_path is not None:
        note = "measured on a GPU" if on_gpu else "seconds of a CPU: use the ratios only"
        text = json.dumps({"setting": setting, "seconds_are": note, "results": results}, indent=2)
        write(json_path, text + "\n")


if __name__ == "__main__":
    typer.run(main)
