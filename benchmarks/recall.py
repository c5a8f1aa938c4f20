"""Attention of a decode step that reads the few visual tokens it needs, against all and a floor.

    python benchmarks/recall.py --threads 1
    python benchmarks/recall.py --threads 1 --dtype bfloat16
    python benchmarks/recall.py --case 1x2880x8x2 --width 64 --layer 512x1376 --threads 1

All ways take turns within one process, on the same random keys and values:

- dense: torch's attention over the whole cache as it lies; nothing is copied or repeated.
- repeated: torch's attention as hosts call it, which repeats keys and values for the query heads
  of a group inside; the same as dense where a group is one.
- floor: the same as dense over a cache that holds only as many tokens as are read: which these
  are costs it nothing.
- int4 and other kinds of sketch: the tokens are scored, chosen, fetched and attended to.

Text is in all of them. A layer is its norms, projections and gated MLP around the attention, with
random weights; rotary embedding and the writing of new keys are left out of all ways. Before
anything is timed, each case checks that what is read gives the output of a masked dense cache,
and that all that is in it gives another.

Ratios are medians over turns of the ratio within one turn, with half the distance between the
quartiles; with --threads 1 they are of processor time, which bears other work on the machine
better. Before each timed call the processor's caches are filled with something else. Bytes are
counted from the tensors that are held, and from the numbers of tokens that a step reads.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from torch.nn import functional

from page_parts import around, mib, table
from program import about, command, content, place, refuse, save
from turns import in_turns, ratio, seconds
from vlmprune import VlmpruneError
from vlmprune.hosts.attention import AttentionCall, read
from vlmprune.runtime.attention import recall
from vlmprune.runtime.attention.recalled import Recalled
from vlmprune.select import recall as rule
from vlmprune.select.sketch import BITS

KINDS = (*BITS, "exact")
CASES = ["4x2880x32x32", "1x8192x32x32", "4x8192x32x8"]
# Of the largest output; what must differ does by more.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.03, torch.float16: 5e-3}
# More than a processor's caches hold.
WIPED = 2**26


@dataclass(frozen=True)
class Shape:
    """Sizes of one case: samples, visual tokens of each, query heads and KV heads."""

    batch: int
    tokens: int
    heads: int
    kv_heads: int

    @classmethod
    def of(cls, words: str) -> Shape:
        """Of BATCHxTOKENSxHEADSxKV_HEADS.

        Raises:
            VlmpruneError: it is not that.
        """
        numbers = [int(word) if word.isdecimal() else 0 for word in words.split("x")]
        if len(numbers) != 4 or min(numbers) < 1 or numbers[2] % numbers[3]:
            raise VlmpruneError(
                f"--case must be BATCHxTOKENSxHEADSxKV_HEADS, such as {CASES[0]}, with HEADS a "
                f"multiple of KV_HEADS, not {words!r}."
            )
        return cls(*numbers)


class Case:
    """One step's query, and the cache in all the forms that are compared."""

    def __init__(self, shape: Shape, width: int, text: int, share: float, like: Any) -> None:
        torch.manual_seed(0)
        self.shape, self.width, self.text = shape, width, text
        batch, tokens, heads = shape.batch, shape.tokens, shape.kv_heads
        self.query = torch.randn(batch, shape.heads, 1, width, **like)
        size = batch, heads, tokens + text, width
        self.full = [torch.randn(size, **like) for _ in range(2)]
        self.images = torch.zeros(batch, tokens, dtype=torch.long, device=like["device"])
        self.tokens = torch.full((batch, 1), tokens, device=like["device"])
        self.keep = rule.counts(share, self.tokens, 0)
        few = int(self.keep[0, 0]) + text
        self.floor = [states[:, :, -few:].clone() for states in self.full]
        self.after = [states[:, :, tokens:].clone() for states in self.full]

    def recalled(
        self, kind: Any, where: Any = "device", rest: Any = "mean", aside: bool = False
    ) -> Recalled:
        """The visual tokens with a sketch of this kind."""
        keys, values = (states[:, :, : self.shape.tokens] for states in self.full)
        columns = torch.arange(self.shape.tokens, device=keys.device).expand_as(self.images)
        held = self.images, columns, self.tokens, self.keep, kind, where
        return Recalled.of(keys, values, *held, rest, aside)

    def call(self, query: Tensor) -> AttentionCall:
        """What asks, on text alone."""
        asking = read(torch.nn.Identity(), query, self.after[0], self.width**-0.5)
        return replace(asking, value=self.after[1])

    def repeated(self, query: Tensor) -> Tensor:
        """Torch's attention to everything, which is told of groups."""
        return functional.scaled_dot_product_attention(query, *self.full, enable_gqa=True)

    def dense(self, cache: list[Tensor], query: Tensor, seen: Tensor | None = None) -> Tensor:
        """Torch's attention; the queries of a KV head's group are rows of one."""
        rows = query.view(self.shape.batch, self.shape.kv_heads, -1, self.width)
        out = functional.scaled_dot_product_attention(rows, *cache, seen)
        return out.view_as(query)


def check(case: Case, recalled: Recalled) -> float:
    """How far what is read is from the dense cache masked to it, of the largest output.

    Raises:
        VlmpruneError: too far, or no farther than the whole cache.
    """
    out, what = recall.attend(case.call(case.query), recalled)
    taken = what.mask(recalled, case.shape.kv_heads)[:, :, None]
    group = case.shape.heads // case.shape.kv_heads
    seen = functional.pad(taken, (0, case.text), value=True).expand(-1, -1, group, -1)
    masked = case.dense(case.full, case.query, seen)
    largest, limit = masked.abs().max(), TOLERANCE[masked.dtype]
    same = float((out - masked).abs().max() / largest)
    other = float((case.dense(case.full, case.query) - masked).abs().max() / largest)
    if not same <= limit or not (other > 2 * limit or recalled.all_read):
        raise VlmpruneError(
            f"what is read differs by {same:.1e} from the dense cache masked to it, which differs "
            f"by {other:.1e} from the whole; {limit:g} at most and {2 * limit:g} or more are due."
        )
    return same


class Layer:
    """The rest of a decoder layer, with random weights."""

    def __init__(self, case: Case, hidden: int, inner: int, like: Any) -> None:
        shape, width = case.shape, case.width
        sizes = [(shape.heads + 2 * shape.kv_heads) * width, hidden], [hidden, shape.heads * width]
        sizes += [2 * inner, hidden], [hidden, inner]
        self.into, self.out, self.up, self.down = (
            torch.randn(*size, **like).mul_(size[1] ** -0.5) for size in sizes
        )
        self.heads, self.width, self.hidden = shape.heads, width, hidden
        self.given = torch.randn(shape.batch, hidden, **like)

    def step(self, attend: Callable[[Tensor], Tensor]) -> Tensor:
        """One token of each sample."""
        states = self.given
        made = functional.linear(functional.rms_norm(states, [self.hidden]), self.into)
        query = made[:, : self.heads * self.width].reshape(-1, self.heads, 1, self.width)
        states = states + functional.linear(attend(query).flatten(1), self.out)
        gate, up = functional.linear(functional.rms_norm(states, [self.hidden]), self.up).chunk(
            2, dim=1
        )
        return states + functional.linear(functional.silu(gate) * up, self.down)


def measure(case: Case, kinds: list[str], layer: Layer | None, repeat: int) -> dict[str, Any]:
    """All figures of one case."""
    device = case.query.device
    ways: dict[str, Callable[[Tensor], Tensor]] = {
        "dense": partial(case.dense, case.full),
        "repeated": case.repeated,
        "floor": partial(case.dense, case.floor),
    }
    whole = sum(states.nbytes for states in case.full)
    rest = sum(states.nbytes for states in case.after)
    result: dict[str, Any] = {"differs": {}, "read": {}, "on_device": {}, "aside": {}}
    for kind in kinds:
        recalled = case.recalled(kind)
        result["differs"][kind] = check(case, case.recalled(kind, rest="none"))
        result["read"][kind] = (recalled.bytes_read + rest) / (recalled.bytes_dense + rest)
        far = case.recalled(kind, "host")
        result["on_device"][kind] = (far.device_bytes + far.small_bytes + rest) / whole
        result["aside"][kind] = case.recalled(kind, aside=True).aside
        del far

        def ours(query: Tensor, recalled: Recalled = recalled) -> Tensor:
            return recall.attend(case.call(query), recalled)[0]

        ways[kind] = ours
    calls: dict[str, Callable[[], Any]] = {
        f"attention {name}": partial(way, case.query) for name, way in ways.items()
    }
    if layer is not None:
        calls |= {f"layer {name}": partial(layer.step, way) for name, way in ways.items()}
    wiped = torch.zeros(WIPED, dtype=torch.uint8, device=device)

    def turn(name: str) -> float:
        wiped.add_(1)
        return seconds(calls[name], device)

    in_turns(calls, turn, 1)
    result["seconds"] = in_turns(calls, turn, repeat)
    result["ratios"] = {
        name: ratio(times, result["seconds"][f"{name.split()[0]} dense"])
        for name, times in result["seconds"].items()
        if not name.endswith(" dense")
    }
    return result | {"dense_bytes": whole}


def markdown(found: Mapping[str, Any]) -> str:
    """Tables of times, of the attention and of a layer, and of bytes."""
    setting, results = found["setting"], found["results"]
    told = about(setting, setting["dtype"])
    parts = [
        f"Reading {100 * setting['read']:g} % of the visual tokens and {setting['text']} others "
        f"(`{setting['command']}`); {told}."
    ]

    def add(what: str, heads: list[str], cells: Callable[[Any], list[str]]) -> None:
        rows = [[one["case"], *cells(one)] for one in results]
        parts.append(f"{what}:\n\n{table(['case', *heads], rows)}")

    kinds = setting["kinds"]
    for part in ("attention", "layer"):
        names = [f"{part} {name}" for name in ("repeated", "floor", *kinds)]
        if names[0] in results[0]["ratios"]:
            add(
                f"Time of the {part}, dense = 1",
                ["repeated", "floor", *kinds],
                lambda one, names=names: [around(one["ratios"][name]) for name in names],
            )
    for name, what in (
        ("read", "Bytes that a step reads, dense = 1"),
        ("on_device", 'Bytes on the device with store="host", dense = 1'),
    ):
        add(
            what,
            ["dense, MiB", *kinds],
            lambda one, name=name: [
                mib(one["dense_bytes"]),
                *(f"{one[name][kind]:.3f}" for kind in kinds),
            ],
        )
    add(
        "Where it steps aside, if it may, and reads all",
        kinds,
        lambda one: ["all" if one["aside"][kind] else "few" for kind in kinds],
    )
    return "\n\n".join(parts)


def asked(words: list[str]) -> list[str]:
    """Words of a command without the file that it writes, which is nobody's affair."""
    if "--json" not in words:
        return words
    at = words.index("--json")
    return words[:at] + words[at + 2 :]


@torch.inference_mode()
def main(
    case: Annotated[
        list[str] | None, typer.Option(help="BATCHxTOKENSxHEADSxKV_HEADS; may repeat.")
    ] = None,
    width: Annotated[int, typer.Option(help="Of a head.", min=1)] = 128,
    text: Annotated[int, typer.Option(help="Other tokens; all are read.", min=1)] = 100,
    share: Annotated[float, typer.Option("--read", help="Share of visual tokens read.")] = 0.0625,
    sketch: Annotated[
        list[str] | None, typer.Option(help=f"Of {', '.join(KINDS)}; may repeat.")
    ] = None,
    layer: Annotated[
        str | None, typer.Option(help="HIDDENxINNER sizes, to time a whole layer, too.")
    ] = None,
    repeat: Annotated[int, typer.Option(help="Turns.", min=1)] = 11,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; cuda where it is.")] = None,
    dtype: Annotated[str | None, typer.Option(help="bfloat16 on CUDA, else float32.")] = None,
    threads: Annotated[int | None, typer.Option(help="Of the CPU; default: torch's own.")] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write all figures.")] = None,
) -> None:
    """Compare a step's time and bytes with those of a whole cache, and of one as short."""
    where, number = place(device, dtype, threads)
    kinds, words = sketch or ["int4"], layer.split("x") if layer else []
    refuse(
        {
            f"--sketch must be one of {', '.join(KINDS)}.": not {*kinds} <= {*KINDS},
            "--read must lie within 0 and 1.": not 0 <= share <= 1,
            f"--layer must be HIDDENxINNER, such as 4096x11008, not {layer!r}.": bool(layer)
            and (len(words) != 2 or not all(word.isdecimal() and int(word) for word in words)),
        }
    )
    shapes = {words: Shape.of(words) for words in case or CASES}
    like: dict[str, Any] = {"device": where, "dtype": number}
    results = []
    for name, shape in shapes.items():
        made = Case(shape, width, text, share, like)
        rest = Layer(made, *map(int, words), like) if words else None
        try:
            results.append({"case": name, **measure(made, kinds, rest, repeat)})
        except VlmpruneError as error:
            raise VlmpruneError(f"{name}: {error}") from error
        del made, rest
    setting = {
        "command": " ".join(["recall.py", *asked(sys.argv[1:])]),
        "dtype": str(number).removeprefix("torch."),
        "read": share,
        "text": text,
        "width": width,
        "kinds": kinds,
        "layer": layer,
    }
    figures = content(where, setting, results=results)
    print(markdown(figures))
    save(json_path, figures)


if __name__ == "__main__":
    command(main)()
