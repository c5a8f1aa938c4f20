"""The decode step over PLPHP's cut cache, against caches that are whole, shorter, or masked.

    python benchmarks/decode.py
    python benchmarks/decode.py --shape llava-1.5-7b --batch 16 --tokens 2880 --device cuda
    python benchmarks/decode.py --attention-only --device cuda    # each backend, without a model
    python benchmarks/decode.py --memory                          # peak memory of a long decode

All kinds of cache take turns within one process, on the same weights:

- dense: the stock cache of the whole prompt. It copies itself at every step to grow.
- dense, in place: the same with room to grow, as a static cache has; tells what holding less
  gains from what copying less does.
- masked: the stock cache with a mask for each KV head, as libraries hold it that only mask.
- floor: a stock cache that is cut to as many bytes, every layer to its mean length.
- floor, in place: the same with room to grow.
- equal, adaptive: vlmprune's ragged cache; with "adaptive" each head has a length of its own.

A step is the model's own forward of one token: embedding, all layers, head. Weights are random.
Caches are filled with random keys and values instead of by prefill, and cut by random masks at
PLPHP's three rates (r + dr, r, r - dr; by default a third of the layers each), while 64 text
tokens stay. Before anything is timed, each case checks that the ragged caches give the logits
of a full cache with the same masks, and that those of the dense cache differ.

Times are medians over turns of ratios within one turn; the spread beside them is half the
distance between the quartiles, relative to the median. On a CPU only ratios are printed, as
absolute times say little there (the JSON file holds them); with --threads 1 they are of
processor time, which bears other work on the machine better.
"""

from __future__ import annotations

import json
import math
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

import caches
from caches import CUTS, KINDS, SHAPES, Case, Decoder, Setting
from vlmprune import VlmpruneError, __version__
from vlmprune.files import write
from vlmprune.runtime.attention import ragged

# Largest difference of logits, relative to the largest logit; what must differ, does by more.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.15, torch.float16: 0.03}
CHECKED_STEPS = 3
THIRDS = (1 / 3, 1 / 3)
GIB, MIB = 2**30, 2**20
# Columns of the tail when attention is timed alone.
TAIL = 16
DEFAULT_SHAPES = {True: ["llava-1.5-7b", "qwen2.5-vl-7b"], False: ["small", "small-gqa"]}
DEFAULT_BATCHES = {True: [1, 4, 16, 64], False: [1, 4]}
BACKENDS = ", ".join(ragged.BACKENDS)
MEMORY_KINDS = ("model", "dense", "masked", "floor", *CUTS)


def check(case: Case) -> dict[str, float]:
    """Logits of each ragged cache and of a full one with the same masks.

    Raises:
        VlmpruneError: they are not the same, or not different from the unpruned ones.
    """
    decoder, setting = case.decoder, case.setting
    size = setting.batch, CHECKED_STEPS
    ids = torch.randint(decoder.shape.vocabulary, size, device=decoder.device)

    def logits(kind: str, cut: str = "equal") -> Tensor:
        cache = case.cache(kind)
        with case.around(kind, cut):
            columns = enumerate(ids.split(1, dim=1), setting.length)
            return torch.stack([decoder.step(cache, new, at) for at, new in columns]).float()

    dense, limit, found = logits("dense"), TOLERANCE[decoder.dtype], {}
    for cut in CUTS:
        masked = logits("masked", cut)
        largest = masked.abs().max()
        same = float((logits(cut) - masked).abs().max() / largest)
        other = float((dense - masked).abs().max() / largest)
        if not same <= limit or not other > 2 * limit:
            raise VlmpruneError(
                f"logits of the {cut} cache differ by {same:.1e} of the largest from those of a "
                f"masked one, which differ by {other:.1e} from the dense one's; {limit:g} at most "
                f"and {2 * limit:g} at least are right."
            )
        found |= {f"{cut} to masked": same, f"{cut}, masked to dense": other}
    return found


def timed(call: Callable[[], Any], device: str) -> float:
    """Seconds of one call; of processor time where one thread does all, whoever else is busy."""
    if device == "cpu":
        clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
        start = clock()
        call()
        return clock() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3


def turns(
    names: tuple[str, ...], turn: Callable[[str], float], repeat: int
) -> dict[str, list[float]]:
    """Seconds by name, all names taking turns, the order reversed every other time."""
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(repeat):
        for name in names[:: 1 if number % 2 else -1]:
            seconds[name].append(turn(name))
    return seconds


def ratio(upper: list[float], lower: list[float]) -> tuple[float, float]:
    """Median of the ratios within each turn, and their spread."""
    ratios = [a / b for a, b in zip(upper, lower, strict=True)]
    middle = statistics.median(ratios)
    if len(ratios) < 2:
        return middle, math.nan
    low, _, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return middle, (high - low) / 2 / middle


def step_times(case: Case, steps: int, repeat: int) -> dict[str, Any]:
    """Every kind's decode step, and what its cache holds at the end of a turn."""
    decoder, setting = case.decoder, case.setting
    held: dict[str, int] = {}

    def turn(kind: str) -> float:
        cache, at = case.cache(kind), setting.length
        ids = torch.zeros(setting.batch, 1, dtype=torch.long, device=decoder.device)
        with case.around(kind):
            # What the turn before left in the processor's caches is not this one's.
            decoder.step(cache, ids, at)

            def run() -> None:
                token = ids
                for i in range(steps):
                    token = decoder.step(cache, token, at + 1 + i).argmax(dim=-1, keepdim=True)

            seconds = timed(run, decoder.device)
        held[kind] = caches.held_bytes(cache)
        return seconds / steps

    turns(KINDS, turn, 1)
    seconds = turns(KINDS, turn, repeat)
    formula = {kind: case.formula(kind, steps + 1) for kind in KINDS}
    return {"seconds": seconds, "held_bytes": held, "formula_bytes": formula}


def attention_times(case: Case, repeat: int) -> dict[str, Any]:
    """Attention of one step over all layers' caches, by every backend, without a model."""
    shape, setting, decoder = case.decoder.shape, case.setting, case.decoder
    like = {"device": decoder.device, "dtype": decoder.dtype}
    query = torch.randn(setting.batch, shape.heads, 1, shape.head_dim, **like)
    tail = [torch.randn(setting.batch, shape.kv_heads, TAIL, shape.head_dim, **like)] * 2
    scale = shape.head_dim**-0.5

    def dense(held: list[tuple[Tensor, Tensor, int]]) -> None:
        for *pair, length in held:
            keys, values = (x[:, :, : length + TAIL] for x in pair)
            torch.nn.functional.scaled_dot_product_attention(query, keys, values, enable_gqa=True)

    def ours(cut: str, backend: str) -> None:
        for prefix in case.ragged[cut]:
            ragged.attend(query, prefix, *tail, None, scale, backend)

    full = [(keys, values, setting.length) for keys, values in case.full]
    calls = {"dense": partial(dense, full), "floor": partial(dense, case.floor)}
    for backend in ragged.BACKENDS[1:]:  # The first is the plain reference.
        try:
            ours("equal", backend)
        except ValueError:  # It does not run here.
            continue
        for cut in CUTS:
            calls[f"{cut}, {backend}"] = partial(ours, cut, backend)

    def turn(name: str) -> float:
        return timed(calls[name], decoder.device)

    turns(tuple(calls), turn, 2)
    return {"seconds": turns(tuple(calls), turn, repeat)}


def measure(
    decoder: Decoder, setting: Setting, room: int, steps: int, repeat: int, attention_only: bool
) -> dict[str, Any]:
    """All figures of one case."""
    case = Case(decoder, setting, room)
    if attention_only:
        result = attention_times(case, repeat)
    else:
        result = {"logits": check(case), **step_times(case, steps, repeat)}
    return result | {"ratios": summary(result)}


def peaks(job: dict[str, Any]) -> dict[str, Any]:
    """Peak memory of every kind's long decode, each in a process of its own."""
    found = {}
    for kind in MEMORY_KINDS:
        command = [sys.executable, __file__, "--child", json.dumps(job | {"kind": kind})]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise VlmpruneError(f"the process with the {kind} cache failed: {reason}")
        found[kind] = json.loads(done.stdout.splitlines()[-1])
    above = {
        when: [found[kind][when] - found["model"][when] for kind in MEMORY_KINDS[1:]]
        for when in ("decoding", "filling")
    }
    return {"peak_above_model_bytes": above, "processes": found}


def summary(result: dict[str, Any]) -> dict[str, Any]:
    """Ratios of one case's times: to the dense cache and, of the ragged ones, to the floor."""
    seconds = result["seconds"]
    dense, out = seconds["dense"], {}
    for name, times in seconds.items():
        if name != "dense":
            out[f"{name} / dense"] = ratio(times, dense)
        for floor in ("floor", "floor, in place"):
            if name.startswith(CUTS) and floor in seconds:
                out[f"{name} / {floor}"] = ratio(times, seconds[floor])
    return out


def show(console: Console, shape: str, results: list[dict[str, Any]]) -> None:
    """Tables of one shape: a group of ratios each, and bytes; or peaks of memory."""

    def table(what: str, columns: list[str], cells: Callable[[dict[str, Any]], list[str]]) -> None:
        out = Table(title=f"{shape}: {what}", title_justify="left")
        for name in ("batch x visual", *columns):
            out.add_column(name, justify="right")
        for one in results:
            prompt = one["setting"]
            out.add_row(f"{prompt['batch']} x {prompt['visual']}", *cells(one))
        console.print(out)

    for when in results[0].get("peak_above_model_bytes", ()):

        def above(one: dict[str, Any], when: str = when) -> list[str]:
            return [f"{n / MIB:.0f}" for n in one["peak_above_model_bytes"][when]]

        table(f"peak memory {when}, above the model's, MiB", list(MEMORY_KINDS[1:]), above)

    def around(one: dict[str, Any], name: str) -> str:
        middle, spread = one["ratios"].get(name, (math.nan, math.nan))
        return f"{middle:.2f}±{spread:.0%}"

    def milliseconds(one: dict[str, Any]) -> list[str]:
        return [f"{1e3 * statistics.median(times):.2f}" for times in one["seconds"].values()]

    if results[0]["on_gpu"] and "seconds" in results[0]:
        table("milliseconds", list(results[0]["seconds"]), milliseconds)
    ratios = list(dict.fromkeys(name for one in results for name in one.get("ratios", ())))
    for to in ("dense", "floor", "floor, in place"):
        names = [name for name in ratios if name.endswith(f" / {to}")]
        if names:
            columns = [name.split(" / ")[0] for name in names]
            table(f"time, {to} = 1", columns, lambda one: [around(one, n) for n in names])  # noqa: B023
    if "held_bytes" in results[0]:
        columns = ["dense, MiB", *CUTS, *(f"{cut} / formula" for cut in CUTS)]

        def sizes(one: dict[str, Any]) -> list[str]:
            held, formula = one["held_bytes"], one["formula_bytes"]
            shares = [f"{held[cut] / held['dense']:.1%}" for cut in CUTS]
            exact = [f"{held[cut] / formula[cut]:.3f}" for cut in CUTS]
            return [f"{held['dense'] / MIB:.1f}", *shares, *exact]

        table("bytes held", columns, sizes)


@torch.inference_mode()
def main(
    shape: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(SHAPES)}.")] = None,
    batch: Annotated[list[int] | None, typer.Option(help="Samples; may repeat.")] = None,
    tokens: Annotated[list[int] | None, typer.Option(help="Visual tokens; may repeat.")] = None,
    text: Annotated[int, typer.Option(help="Other tokens of the prompt; all stay.")] = 64,
    steps: Annotated[int | None, typer.Option(help="Decoded tokens in a turn.")] = None,
    repeat: Annotated[int, typer.Option(help="Turns.")] = 5,
    r: Annotated[float, typer.Option(help="Retention rate of an ordinary layer.")] = 0.4,
    dr: Annotated[float, typer.Option(help="What the other layers keep more or less.")] = 0.3,
    shares: Annotated[tuple[float, float], typer.Option(help="At r + dr, at r.")] = THIRDS,
    by_sample: Annotated[bool, typer.Option(help="Samples differ in layers' rates.")] = False,
    device: Annotated[str | None, typer.Option(help="cpu or cuda.")] = None,
    dtype: Annotated[str | None, typer.Option(help="bfloat16 on CUDA, else float32.")] = None,
    threads: Annotated[int | None, typer.Option(help="Of the CPU; default: torch's own.")] = None,
    backend: Annotated[str | None, typer.Option(help=f"Force one of {BACKENDS}.")] = None,
    attention_only: Annotated[bool, typer.Option(help="Attention by each backend, alone.")] = False,
    memory: Annotated[bool, typer.Option(help="Peaks, each in its own process.")] = False,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write all figures.")] = None,
    job: Annotated[str | None, typer.Option("--child", hidden=True)] = None,
) -> None:
    """Compare the decode step's time, or its memory, over a cut cache and over others."""
    if job is not None:
        print(json.dumps(caches.peak_bytes(json.loads(job))))
        return
    console = Console()
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = device != "cpu"
    shapes = shape or DEFAULT_SHAPES[on_gpu]
    kind = getattr(torch, dtype or ("bfloat16" if on_gpu else "float32"), None)
    steps = steps or (64 if memory else 4 if on_gpu else 3)
    dtypes = ", ".join(map(_name, TOLERANCE))
    problems = {
        f"--shape must be one of {', '.join(SHAPES)}.": not {*shapes} <= {*SHAPES},
        f"--device {device} is not here; use cpu.": on_gpu and not torch.cuda.is_available(),
        f"--dtype must be one of {dtypes}.": kind not in TOLERANCE,
        f"--backend must be one of {BACKENDS}.": backend not in (None, *ragged.BACKENDS),
        "--memory and --attention-only are two things; choose one.": memory and attention_only,
        "r - dr and r + dr must lie within 0 and 1.": min(r - dr, 1 - r - dr) < -1e-9,
        "--shares must add up to 1 at most.": min(*shares, 1 - sum(shares)) < -1e-9,
    }
    for problem, is_so in problems.items():
        if is_so:
            raise typer.BadParameter(problem)
    if threads is not None:
        torch.set_num_threads(threads)
    if backend is not None:
        ragged.choose_backend = lambda *_: backend  # type: ignore[assignment]
    setting = {
        "command": " ".join(["decode.py", *sys.argv[1:]]),
        "device": torch.cuda.get_device_name() if on_gpu else f"{platform.machine()} CPU",
        "threads": torch.get_num_threads(),
        "dtype": _name(kind),
        "backend": backend or "auto",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "vlmprune": __version__,
    }
    console.print(", ".join(f"{name} {value}" for name, value in setting.items()))
    prompts = [
        Setting(b, n, text, r, dr, shares, by_sample)
        for n in tokens or ((8192,) if memory else (576, 2880, 8192))
        for b in batch or ([4] if memory else DEFAULT_BATCHES[on_gpu])
    ]
    results, decoder = [], None
    for name in shapes:
        decoder = None  # Not two models at once.
        needed = int(1.1 * SHAPES[name].parameters * kind.itemsize)
        if needed > caches.free_bytes(device):
            console.print(f"skipped {name}: its weights take {needed / GIB:.1f} GiB")
            continue
        decoder = None if memory else Decoder(SHAPES[name], device, kind)
        done: list[dict[str, Any]] = []
        for prompt in prompts:
            label = f"{name}, batch {prompt.batch}, {prompt.visual} visual tokens"
            room = max(steps + 1, CHECKED_STEPS, TAIL)
            needed = caches.case_bytes(SHAPES[name], prompt, room, kind)
            if needed > caches.free_bytes(device):
                console.print(f"skipped {label}: it takes about {needed / GIB:.1f} GiB")
                continue
            result: dict[str, Any] = {"shape": name, "setting": asdict(prompt), "on_gpu": on_gpu}
            try:
                if decoder is None:
                    same = {key: setting[key] for key in ("dtype", "threads")}
                    result |= peaks(result | same | {"device": device, "steps": steps})
                else:
                    result |= measure(decoder, prompt, room, steps, repeat, attention_only)
            except torch.OutOfMemoryError:
                console.print(f"skipped {label}: out of memory")
                continue
            except (VlmpruneError, ValueError) as error:
                console.print(f"[bold red]{label}: {error}")
                raise typer.Exit(1) from error
            finally:
                if on_gpu:
                    torch.cuda.empty_cache()
            done.append(result)
        if done:
            show(console, name, done)
        results += done
    if json_path is not None:
        note = "measured on a GPU" if on_gpu else "seconds of a CPU: use the ratios only"
        figures = {"setting": setting, "seconds_are": note, "results": results}
        write(json_path, json.dumps(figures, indent=2) + "\n")


def _name(kind: torch.dtype) -> str:
    return str(kind).removeprefix("torch.")


if __name__ == "__main__":
    typer.run(main)
