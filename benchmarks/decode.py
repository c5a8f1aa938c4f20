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

Ratios are medians over turns of the ratio within one turn, with half the distance between the
quartiles. On a CPU only ratios are told, as absolute times say little there (the JSON file holds
them); with --threads 1 they are of processor time, which bears other work on the machine better.
Peaks are those of tensors: by the allocator on a GPU, by torch's profiler on a CPU.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from caches import CUTS, KINDS, SHAPES, Case, Decoder, Setting, case_bytes, peaks, random_pair
from page_parts import around, mib, table
from program import about, command, content, place, refuse, save
from turns import in_turns, ratio, seconds
from vlmprune import VlmpruneError
from vlmprune.hosts.attention import read
from vlmprune.runtime.attention import ragged
from vlmprune.study.bench import shapes
from vlmprune.study.bench.tables import on_gpu
from vlmprune.study.measure import stored_bytes

# Largest difference of logits, relative to the largest logit; what must differ, does by more.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.15, torch.float16: 0.03}
CHECKED_STEPS = 3
THIRDS = (1 / 3, 1 / 3)
# Columns of the tail when attention is timed alone.
TAIL = 16
DEFAULT_SHAPES = {True: ["llava-1.5-7b", "qwen2.5-vl-7b"], False: ["small", "small-gqa"]}
DEFAULT_BATCHES = {True: [1, 4, 16, 64], False: [1, 4]}
BACKENDS = ", ".join(ragged.BACKENDS)
MEMORY_KINDS = ("dense", "masked", "floor", *CUTS)


def check(case: Case) -> dict[str, float]:
    """Logits of each ragged cache and of a full one with the same masks.

    Raises:
        VlmpruneError: they are not the same, or not different from the unpruned ones.
    """
    decoder, setting = case.decoder, case.setting
    size = setting.batch, CHECKED_STEPS
    ids = torch.randint(decoder.config.vocab_size, size, device=decoder.device)

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

            taken = seconds(run, decoder.device)
        held[kind] = stored_bytes(cache)
        return taken / steps

    in_turns(KINDS, turn, 1)
    taken = in_turns(KINDS, turn, repeat)
    formula = {kind: case.formula(kind, steps + 1) for kind in KINDS}
    return {"seconds": taken, "held_bytes": held, "formula_bytes": formula}


def attention_times(case: Case, repeat: int) -> dict[str, Any]:
    """Attention of one step over all layers' caches, by every backend, without a model."""
    setting, decoder = case.setting, case.decoder
    config = decoder.config
    like = {"device": decoder.device, "dtype": decoder.dtype}
    size = setting.batch, config.num_attention_heads, 1, config.head_dim
    query, tail = torch.randn(size, **like), random_pair(decoder, setting.batch, TAIL)
    asking = read(torch.nn.Identity(), query, tail[0], config.head_dim**-0.5)

    def dense(held: list[tuple[Tensor, Tensor, int]]) -> None:
        for *pair, length in held:
            keys, values = (x[:, :, : length + TAIL] for x in pair)
            torch.nn.functional.scaled_dot_product_attention(query, keys, values, enable_gqa=True)

    def ours(cut: str, backend: str) -> None:
        for prefix in case.ragged[cut]:
            ragged.attend(asking, prefix, backend)

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
        return seconds(calls[name], decoder.device)

    in_turns(calls, turn, 2)
    return {"seconds": in_turns(calls, turn, repeat)}


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


def markdown(found: Mapping[str, Any]) -> str:
    """A table for each group of ratios, and of bytes; or of peaks."""
    setting, results = found["setting"], found["results"]
    told = about(setting, setting["dtype"], f"backend {setting['backend']}")
    parts = [f"Caches under one decode step (`{setting['command']}`); {told}."]
    if not results:
        return f"{parts[0]} Nothing fitted the memory."

    def add(what: str, heads: list[str], cells: Callable[[Any], list[str]]) -> None:
        rows = []
        for one in results:
            prompt = one["setting"]
            label = f"{one['shape']}, {prompt['batch']} x {prompt['visual']}"
            rows.append([label, *cells(one)])
        parts.append(f"{what}:\n\n" + table(["shape, batch x visual tokens", *heads], rows))

    for when in results[0].get("peak_bytes", ()):

        def peak(one: Any, when: str = when) -> list[str]:
            return [mib(size) for size in one["peak_bytes"][when].values()]

        add(f"Peak memory {when}, above the model's, MiB", list(MEMORY_KINDS), peak)

    if "ratios" in results[0]:
        add_times(found, add)
    if "held_bytes" in results[0]:

        def sizes(one: Any) -> list[str]:
            held, formula = one["held_bytes"], one["formula_bytes"]
            shares = [f"{held[cut] / held['dense']:.1%}" for cut in CUTS]
            exact = [f"{held[cut] / formula[cut]:.3f}" for cut in CUTS]
            return [mib(held["dense"]), *shares, *exact]

        add("Bytes held", ["dense, MiB", *CUTS, *(f"{cut} / formula" for cut in CUTS)], sizes)
    return "\n\n".join(parts)


def add_times(found: Mapping[str, Any], add: Callable[..., None]) -> None:
    """The tables of times: on a GPU in milliseconds, and by what they are relative to."""
    results = found["results"]
    if on_gpu(found):

        def milliseconds(one: Any) -> list[str]:
            return [f"{1e3 * statistics.median(times):.2f}" for times in one["seconds"].values()]

        add("Milliseconds", list(results[0]["seconds"]), milliseconds)
    known = dict.fromkeys(name for one in results for name in one["ratios"])
    for base in ("dense", "floor", "floor, in place"):
        names = [name for name in known if name.endswith(f" / {base}")]

        def cells(one: Any, names: list[str] = names) -> list[str]:
            # A backend may run for some cases alone.
            return [around(one["ratios"][name]) if name in one["ratios"] else "" for name in names]

        if names:
            add(f"Time, {base} = 1", [name.partition(" / ")[0] for name in names], cells)


@torch.inference_mode()
def main(
    shape: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(SHAPES)}.")] = None,
    batch: Annotated[list[int] | None, typer.Option(help="Samples; may repeat.")] = None,
    tokens: Annotated[list[int] | None, typer.Option(help="Visual tokens; may repeat.")] = None,
    text: Annotated[int, typer.Option(help="Other tokens of the prompt; all stay.")] = 64,
    steps: Annotated[int | None, typer.Option(help="Decoded tokens in a turn.", min=1)] = None,
    repeat: Annotated[int, typer.Option(help="Turns.", min=1)] = 5,
    r: Annotated[float, typer.Option(help="Retention rate of an ordinary layer.")] = 0.4,
    dr: Annotated[float, typer.Option(help="What the other layers keep more or less.")] = 0.3,
    shares: Annotated[tuple[float, float], typer.Option(help="At r + dr, at r.")] = THIRDS,
    by_sample: Annotated[bool, typer.Option(help="Samples differ in layers' rates.")] = False,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; cuda where it is.")] = None,
    dtype: Annotated[str | None, typer.Option(help="bfloat16 on CUDA, else float32.")] = None,
    threads: Annotated[int | None, typer.Option(help="Of the CPU; default: torch's own.")] = None,
    backend: Annotated[str | None, typer.Option(help=f"Force one of {BACKENDS}.")] = None,
    attention_only: Annotated[bool, typer.Option(help="Attention by each backend, alone.")] = False,
    memory: Annotated[bool, typer.Option(help="Peaks alone, of a long decode.")] = False,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write all figures.")] = None,
) -> None:
    """Compare the decode step's time, or its memory, over a cut cache and over others."""
    where, kind = place(device, dtype, threads)
    gpu = where.type != "cpu"
    chosen = shape or DEFAULT_SHAPES[gpu]
    steps = steps or (64 if memory else 4 if gpu else 3)
    refuse(
        {
            f"--shape must be one of {', '.join(SHAPES)}.": not {*chosen} <= {*SHAPES},
            f"--backend must be one of {BACKENDS}.": backend not in (None, *ragged.BACKENDS),
            "--memory and --attention-only are two things; choose one.": memory and attention_only,
            "r - dr and r + dr must lie within 0 and 1.": min(r - dr, 1 - r - dr) < -1e-9,
            "--shares must add up to 1 at most.": min(*shares, 1 - sum(shares)) < -1e-9,
        }
    )
    if backend is not None:
        ragged.choose_backend = lambda *_: backend  # type: ignore[assignment]
    prompts = [
        Setting(b, n, text, r, dr, shares, by_sample)
        for n in tokens or ((8192,) if memory else (576, 2880, 8192))
        for b in batch or ([4] if memory else DEFAULT_BATCHES[gpu])
    ]
    results: list[dict[str, Any]] = []
    for name in chosen:
        decoder = Decoder(SHAPES[name], where, kind)
        for prompt in prompts:
            label = f"{name}, batch {prompt.batch}, {prompt.visual} visual tokens"
            room = max(steps + 1, CHECKED_STEPS, TAIL)
            needed, free = case_bytes(SHAPES[name], prompt, room, kind), shapes.free_bytes(where)
            if free is not None and needed > free:
                print(f"skipped {label}: it takes about {needed / shapes.GIB:.1f} GiB")
                continue
            result: dict[str, Any] = {"shape": name, "setting": asdict(prompt)}
            try:
                if memory:
                    found = {one: peaks(decoder, prompt, one, steps) for one in MEMORY_KINDS}
                    result["peak_bytes"] = {
                        when: {one: told[when] for one, told in found.items()}
                        for when in ("decoding", "filling")
                    }
                else:
                    result |= measure(decoder, prompt, room, steps, repeat, attention_only)
            except torch.OutOfMemoryError:
                print(f"skipped {label}: out of memory")
                continue
            except (VlmpruneError, ValueError) as error:
                raise VlmpruneError(f"{label}: {error}") from error
            finally:
                if gpu:
                    torch.cuda.empty_cache()
            results.append(result)
        del decoder  # Not two models at once.
    setting = {
        "command": " ".join(["decode.py", *sys.argv[1:]]),
        "dtype": str(kind).removeprefix("torch."),
        "backend": backend or "auto",
    }
    figures = content(where, setting, results=results)
    print(markdown(figures))
    save(json_path, figures)


if __name__ == "__main__":
    command(main)()
