"""vLLM with and without pruning under load: latency, throughput and KV cache, in one run.

    python benchmarks/serve.py                                # random weights, 0.67 B parameters
    python benchmarks/serve.py --shape llava-1.5-7b --clients 64 --requests 256
    python benchmarks/serve.py --model llava-hf/llava-1.5-7b-hf --method divprune:keep=64
    python benchmarks/serve.py --url http://127.0.0.1:8000    # of a server that runs already

It starts `vllm serve` with the variable VLMPRUNE set, and one without as the plugin's control, and
asks the first for other budgets by each request's `mm_processor_kwargs`: the same process answers
pruned and unpruned. In each round all cases take turns, the order reversed every other round:

- closed: so many clients that ask without a pause, each about a new picture: requests a second.
- cached: the same about one picture, so that preparing and encoding it falls away.
- open: Poisson arrivals at shares of the unpruned server's closed rate, the same for all cases.

No picture comes twice (but in "cached"), no question begins as another, and prefix caching is off,
so that nothing is answered from a cache by accident; the counters of hits are written down. All
answers have the same length. `--json` is written after each round, and no round is begun that would
not end within `--limit`. On a CPU use the ratios only.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

import serve_load
import serve_page
import serve_server
from program import CPU, GPU, command, refuse, save
from serve_page import ALL, PLAIN
from vlmprune import VlmpruneError, costs
from vlmprune.study import measure

# What of the environment the figures depend on.
_VARIABLES = ("OMP_NUM_THREADS", "VLLM_CPU_OMP_THREADS_BIND")


@dataclass
class Case:
    """One way of serving.

    Attributes:
        name: "all", "plain" or the budget.
        keep: what a request asks for; None leaves it out.
        client: of its server.
        model: the server's name for the model.
        server: where it is our own.
    """

    name: str
    keep: int | str | None
    client: Any
    model: str
    server: serve_server.Server | None = None

    def processor_seconds(self) -> dict[str, float]:
        """What the server's processes have taken so far; empty where it is not ours."""
        if self.server is None:
            return {}
        return serve_server.processor_seconds(self.server.process.pid)


@dataclass
class Work:
    """What is asked."""

    words: int
    tokens: int
    requests: int
    clients: int
    arriving: int
    loads: Sequence[float]
    open_cases: Sequence[str]
    blocks: int = 0
    seed: int = 0

    def bodies(self, case: Case, count: int, same: bool = False) -> list[bytes]:
        """So many requests, of pictures and questions that were not there before."""
        self.seed += count + 1
        pictures = [self.seed] * count if same else [self.seed + n for n in range(count)]
        return serve_load.bodies(
            case.model, pictures, self.seed, self.words, self.tokens, case.keep
        )


async def loaded(work: Work, case: Case, answers: Any) -> dict[str, Any]:
    """The figures of one load, with what the server had in use meanwhile."""
    async with serve_load.Watch(case.client) as watch:
        before, own, busy = case.processor_seconds(), time.process_time(), serve_load.busy_seconds()
        got = await answers
        after = case.processor_seconds()
        own = time.process_time() - own
        whole = (serve_load.busy_seconds() or 0.0) - (busy or 0.0)
    told = serve_load.figures(got)
    gauges = watch.gauges()
    share = gauges.pop("kv_share")
    blocks = {name: value * work.blocks for name, value in share.items()}
    return told | {
        "in_use": {"blocks": blocks, **gauges},
        "counts": watch.counts(),
        "processor_seconds": {name: after[name] - before.get(name, 0.0) for name in after},
        # With the server's and this client's: what is beyond, others took.
        "machine": {"busy_seconds": whole, "client_seconds": own},
    }


async def closed(work: Work, case: Case) -> dict[str, Any]:
    """A load of clients that never pause."""
    bodies = work.bodies(case, work.requests)
    return await loaded(work, case, serve_load.closed_load(case.client, bodies, work.clients))


async def cached(work: Work, case: Case) -> dict[str, Any]:
    """The same about one picture, which is known before the clock starts."""
    first, *bodies = work.bodies(case, work.requests + 1, same=True)
    await serve_load.ask(case.client, first)
    return await loaded(work, case, serve_load.closed_load(case.client, bodies, work.clients))


async def opened(work: Work, case: Case, rate: float, seed: int) -> dict[str, Any]:
    """Arrivals at random; the seed is the round's, so that all cases have the same."""
    bodies = work.bodies(case, work.arriving)
    at = serve_load.arrivals(rate, work.arriving, seed)
    told = await loaded(work, case, serve_load.open_load(case.client, bodies, at))
    return told | {"rate": rate}


def turns(cases: dict[str, Case], number: int) -> Iterator[tuple[str, Case]]:
    """Cases in this round's order."""
    yield from list(cases.items())[:: -1 if number % 2 else 1]


async def one_round(
    work: Work, cases: dict[str, Case], number: int, rate: float | None, say: Any
) -> dict[str, Any]:
    """All loads of all cases.

    Args:
        rate: what the unpruned server answers a second; None takes this round's own.
    """
    found: dict[str, Any] = {"closed": {}, "cached": {}}
    for name, case in turns(cases, number):
        found["closed"][name] = told = await closed(work, case)
        say(f"round {number + 1}, closed, {name}", told)
    rate = rate or found["closed"][ALL].get("requests_per_second")
    for name, case in turns(cases, number):
        if name != PLAIN:
            found["cached"][name] = told = await cached(work, case)
            say(f"round {number + 1}, cached, {name}", told)
    for load in work.loads:
        at = found.setdefault(f"open {load:g}", {})
        for name, case in turns(cases, number):
            if rate and name in work.open_cases:
                at[name] = told = await opened(work, case, load * rate, number)
                say(f"round {number + 1}, open {load:g}, {name}", told)
    # Tables follow the order of cases, not that of this round.
    return {
        load: {name: done[name] for name in cases if name in done} for load, done in found.items()
    }


async def warm(work: Work, cases: dict[str, Case]) -> dict[str, int]:
    """Ask every case until its server has been through a full batch; prompt lengths.

    Raises:
        VlmpruneError: a request fails.
    """
    lengths = {}
    for name, case in cases.items():
        bodies = work.bodies(case, min(work.clients, work.requests))
        answers = await serve_load.closed_load(case.client, bodies, work.clients)
        told = serve_load.figures(answers)
        if told["errors"]:
            raise VlmpruneError(f"a request of case {name!r} failed: {told['error']}")
        lengths[name] = round(told["prompt_tokens"])
    return lengths


async def cache_facts(client: Any) -> tuple[int, int]:
    """KV blocks of a server, and tokens of each."""
    _, info = serve_load.read((await client.get("/metrics")).text)
    try:
        return int(info["num_gpu_blocks"]), int(info["block_size"])
    except (KeyError, ValueError):
        raise VlmpruneError(f"the server's /metrics does not tell {serve_load.INFO}.") from None


def described(
    cases: dict[str, Case], lengths: dict[str, int], config: Any, tokens: int
) -> dict[str, Any]:
    """What each case is: budget, prompt, visual tokens and FLOPs of a request.

    Visual tokens are counted by what the server's prompts have less than the unpruned one's.
    """
    visual = None if config is None else costs.patch_count(config)
    out: dict[str, Any] = {}
    for name, case in cases.items():
        less = lengths[ALL] - lengths[name]
        out[name] = {"keep": case.keep, "prompt_tokens": lengths[name]}
        if visual is None:
            out[name]["visual_tokens"] = case.keep if isinstance(case.keep, int) else lengths[ALL]
            continue
        out[name]["visual_tokens"] = visual - less
        out[name]["flops"] = costs.encoder_flops(config) + costs.prefill_flops(
            config, lengths[name] + tokens
        )
    return out


async def measured(
    work: Work,
    place: serve_server.Place,
    budgets: Sequence[int],
    rounds: int,
    limit: float,
    save: Any,
    say: Any,
) -> None:
    """Measure round by round, and save after each."""
    httpx = serve_load.http()
    begin = time.monotonic()
    # The load is what bounds connections.
    unbounded = httpx.Limits(max_connections=None)
    async with AsyncExitStack() as stack:
        clients = {}
        for name, url in place.urls.items():
            made = httpx.AsyncClient(base_url=url, timeout=serve_load.SILENCE, limits=unbounded)
            clients[name] = await stack.enter_async_context(made)
        names = {name: serve_server.model_name(url) for name, url in place.urls.items()}
        ours = clients[ALL], names[ALL], place.servers.get(ALL)
        cases = {ALL: Case(ALL, ALL, *ours)}
        cases |= {str(n): Case(str(n), n, *ours) for n in budgets}
        if PLAIN in clients:
            other = place.servers.get(PLAIN)
            cases[PLAIN] = Case(PLAIN, None, clients[PLAIN], names[PLAIN], other)
        work.blocks, block = await cache_facts(clients[ALL])
        lengths = await warm(work, cases)
        facts = {"blocks": work.blocks, "block_tokens": block}
        about = described(cases, lengths, place.config, work.tokens)
        done: list[dict[str, Any]] = []
        rate, longest = None, 0.0
        for number in range(rounds):
            start = time.monotonic()
            if done and start - begin + longest > limit:
                say(f"stopped after {number} of {rounds} rounds, as --limit is {limit:g} seconds")
                return
            done.append(await one_round(work, cases, number, rate, say))
            longest = max(longest, time.monotonic() - start)
            rate = rate or done[0]["closed"][ALL].get("requests_per_second")
            save(facts, about, done)


def without_paths(words: Sequence[str]) -> list[str]:
    """A command's options but for those that say where its files go."""
    paths = ("--json", "--folder")
    before = ["", *words]
    pairs = zip(before, words, strict=False)
    return [word for last, word in pairs if not {last, word}.intersection(paths)]


def main(
    shape: Annotated[str, typer.Option(help=f"Of {', '.join(serve_server.SHAPES)}.")] = "",
    model: Annotated[str | None, typer.Option(help="Folder or id, instead of --shape.")] = None,
    url: Annotated[str | None, typer.Option(help="A running server, instead of our own.")] = None,
    method: Annotated[str, typer.Option(help="VLMPRUNE of our server.")] = "vispruner:keep=64",
    keep: Annotated[list[int] | None, typer.Option(help="Budgets; may repeat.")] = None,
    open_keep: Annotated[list[int] | None, typer.Option(help="Those of the open loads.")] = None,
    load: Annotated[list[float] | None, typer.Option(help="Shares of the closed rate.")] = None,
    clients: Annotated[int, typer.Option(help="Of the closed load.", min=1)] = 8,
    requests: Annotated[int, typer.Option(help="Of a closed load.", min=1)] = 16,
    arriving: Annotated[int, typer.Option(help="Requests of an open load.", min=1)] = 16,
    words: Annotated[int, typer.Option(help="Of a question.", min=1)] = 32,
    tokens: Annotated[int, typer.Option(help="Of an answer.", min=2)] = 32,
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    limit: Annotated[float, typer.Option(help="Seconds after which no round begins.")] = 900,
    plain: Annotated[bool, typer.Option(help="Also vLLM without the plugin.")] = True,
    blocks: Annotated[int | None, typer.Option(help="KV blocks; default: vLLM's.")] = None,
    server: Annotated[str, typer.Option(help="More arguments for vllm serve.")] = "",
    folder: Annotated[Path | None, typer.Option(help="Keep checkpoints of shapes here.")] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write all figures.")] = None,
) -> None:
    """Measure vLLM under load, pruned and not."""
    console = Console()
    budgets = sorted(keep or [288, 128, 64, 32], reverse=True)
    if shape == "tiny" and not keep:
        budgets = [8, 4]
    chosen = [str(n) for n in open_keep or budgets[-2:][:1]]
    problems = {
        "--shape and --model are two things; choose one.": bool(shape and model),
        "--shape is for a server of our own; with --url give --model.": bool(shape and url),
        f"--shape must be one of {', '.join(serve_server.SHAPES)}.": shape
        not in ("", *serve_server.SHAPES),
        f"--open-keep must be among the budgets {budgets}.": not {*chosen} <= {*map(str, budgets)},
    }
    refuse(problems)
    if not shape and model is None and url is None:
        shape = "llava-0.7b"
    work = Work(words, tokens, requests, clients, arriving, load or [0.5, 0.9], [ALL, *chosen])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    options = {"shape": shape, "model": model, "url": url, "method": method, "server": server}
    options |= {"clients": clients, "plain": plain, "blocks": blocks, "folder": folder}

    def say(text: str, told: dict[str, Any] | None = None) -> None:
        rate = (told or {}).get("requests_per_second")
        found = "" if rate is None else f": {rate:.3f} requests/s"
        wrong = f", {told['errors']} errors ({told['error']})" if told and told["errors"] else ""
        console.print(f"{text}{found}{wrong}", markup=False, highlight=False)

    begin, kept = time.monotonic(), list[dict[str, Any]]()
    here = measure.facts(device)
    with ExitStack() as stack:
        place = serve_server.started(stack, options, say)
        setting = {
            "command": " ".join(["serve.py", *without_paths(sys.argv[1:])]),
            **place.facts,
            "method": method,
            "device": here["device_name"],
            "environment": {n: os.environ[n] for n in _VARIABLES if n in os.environ},
            "versions": serve_server.versions(here["versions"]),
            **{"words": words, "output_tokens": tokens, "clients": clients},
            **{"requests": requests, "arriving": arriving},
        }

        def write(facts: dict[str, Any], cases: dict[str, Any], done: list[Any]) -> None:
            note = GPU if device.type == "cuda" else CPU
            told = {"setting": setting | facts, "seconds_are": note, "cases": cases, "rounds": done}
            save(json_path, told)
            kept.append(told)

        left = limit - (time.monotonic() - begin)
        asyncio.run(measured(work, place, budgets, rounds, left, write, say))
    console.print(serve_page.section(kept[-1]), markup=False)


if __name__ == "__main__":
    command(main)()
