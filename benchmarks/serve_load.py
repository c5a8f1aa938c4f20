"""Requests for an OpenAI-compatible server: when they are sent, what is noted, what it adds up to.

Open load: requests arrive at random (Poisson) whether or not the ones before are answered, and an
answer's clock starts when its request was due, so that a client that is late hides nothing. Closed
load: so many clients, each of which asks anew once it has its answer.
"""

from __future__ import annotations

import asyncio
import base64
import importlib
import io
import itertools
import json
import math
import os
import random
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

# Seconds between two looks at the server's metrics.
LOOK = 0.25
# A server that is silent for so long is taken for dead.
SILENCE = 900.0
USAGE, RUNNING, WAITING = (
    "vllm:kv_cache_usage_perc",
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
)
COUNTERS = {
    "preemptions": "vllm:num_preemptions_total",
    "prefix_cache_hits": "vllm:prefix_cache_hits_total",
    "processor_cache_queries": "vllm:mm_cache_queries_total",
    "processor_cache_hits": "vllm:mm_cache_hits_total",
}
INFO = "vllm:cache_config_info"
_SAMPLE = re.compile(r"^([a-zA-Z_:][\w:]*)(?:\{(.*)\})? (\S+)$")
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')
# Words of the prompts of random models, which `serve_server.checkpoint` names so.
_WORDS = 4000


@dataclass
class Answer:
    """What came of one request; times in seconds on one clock.

    Attributes:
        due: when it was to be sent.
        sent: when it was.
        times: when each piece of text came.
        prompt: tokens of the prompt, as the server counts them.
        tokens: tokens of the answer, likewise.
        error: why there is none.
    """

    due: float
    sent: float = math.nan
    times: list[float] = field(default_factory=list)
    prompt: int = 0
    tokens: int = 0
    error: str = ""


def arrivals(rate: float, count: int, seed: int) -> list[float]:
    """When requests arrive: seconds from the start, a Poisson process of so many a second."""
    chance = random.Random(seed)
    times, now = [], 0.0
    for _ in range(count):
        times.append(now)
        now += chance.expovariate(rate)
    return times


def picture(seed: int, size: tuple[int, int] = (640, 480)) -> str:
    """A JPEG of blurred noise as a data URL; no two seeds give the same."""
    from PIL import Image

    small = (size[0] // 20, size[1] // 20)
    noise = random.Random(seed).randbytes(3 * small[0] * small[1])
    image = Image.frombytes("RGB", small, noise).resize(size, Image.Resampling.BICUBIC)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=90)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def question(seed: int, words: int) -> str:
    """So many words, drawn by the seed."""
    chance = random.Random(seed)
    return " ".join(f"w{chance.randrange(_WORDS)}" for _ in range(words))


def bodies(
    model: str, pictures: Sequence[int], seed: int, words: int, tokens: int, keep: int | str | None
) -> list[bytes]:
    """Requests as they go over the wire, answers of exactly so many tokens.

    Args:
        model: the name that the server goes by.
        pictures: a picture's seed for each request.
        seed: of the questions.
        words: of each question.
        tokens: of each answer.
        keep: the budget of `mm_processor_kwargs`; None leaves the server's own.
    """
    made = {one: picture(one) for one in set(pictures)}
    extra = {} if keep is None else {"mm_processor_kwargs": {"vlmprune_keep": keep}}
    out = []
    for number, one in enumerate(pictures):
        content = [
            {"type": "image_url", "image_url": {"url": made[one]}},
            {"type": "text", "text": question(seed + number, words)},
        ]
        body = {
            "model": model,
            "messages": [{"role": "user", "content": content}],
            "stream": True,
            "stream_options": {"include_usage": True},
            "temperature": 0,
            "max_tokens": tokens,
            "min_tokens": tokens,
            "ignore_eos": True,
            **extra,
        }
        out.append(json.dumps(body).encode())
    return out


def http() -> Any:
    """The HTTP client that Transformers and vLLM bring: httpx, or its successor."""
    try:
        return importlib.import_module("httpx")
    except ImportError:
        return importlib.import_module("httpx2")


async def ask(client: Any, body: bytes, due: float | None = None) -> Answer:
    """Send one request and note when its pieces come; an error is noted, not raised.

    Args:
        client: an `AsyncClient` of `http()`.
        body: the request.
        due: when to send it, by `time.perf_counter`; by default now.
    """
    answer = Answer(due if due is not None else time.perf_counter())
    if due is not None:
        await asyncio.sleep(due - time.perf_counter())
    answer.sent = time.perf_counter()
    headers = {"Content-Type": "application/json"}
    path = "/v1/chat/completions"
    try:
        async with client.stream("POST", path, content=body, headers=headers) as reply:
            if reply.status_code != 200:
                told = (await reply.aread()).decode(errors="replace")
                answer.error = f"{reply.status_code}: {told[:400]}"
                return answer
            async for line in reply.aiter_lines():
                note(answer, line, time.perf_counter())
    except http().HTTPError as error:
        answer.error = f"{type(error).__name__}: {error}"
    if not answer.error and not (answer.tokens and answer.times):
        answer.error = "the answer ended before its last token"
    return answer


def note(answer: Answer, line: str, now: float) -> None:
    """Read one line of a streamed answer."""
    if not line.startswith("data: {"):
        return
    told = json.loads(line.removeprefix("data: "))
    if "error" in told:
        answer.error = str(told["error"])[:400]
        return
    for choice in told.get("choices", ()):
        delta = choice.get("delta", {})
        # The first piece may name the role alone, without a token.
        if not delta.get("role") or delta.get("content"):
            answer.times.append(now)
    usage = told.get("usage")
    if usage:
        answer.prompt, answer.tokens = usage["prompt_tokens"], usage["completion_tokens"]


async def open_load(client: Any, requests: Sequence[bytes], at: Sequence[float]) -> list[Answer]:
    """Send each request at its time, and wait for all answers."""
    start = time.perf_counter() + 0.05
    tasks = [ask(client, body, start + t) for body, t in zip(requests, at, strict=True)]
    return await asyncio.gather(*tasks)


async def closed_load(client: Any, requests: Sequence[bytes], clients: int) -> list[Answer]:
    """Have so many clients send them one after another."""
    left, out = iter(requests), []

    async def one() -> None:
        for body in left:
            out.append(await ask(client, body))

    await asyncio.gather(*(one() for _ in range(clients)))
    return out


def read(text: str) -> tuple[dict[str, float], dict[str, str]]:
    """Metrics by name, summed over their labels, and the labels of the cache's configuration.

    Shares, unlike counts, are averaged: over engines, where there are several.
    """
    sums: dict[str, list[float]] = {}
    info: dict[str, str] = {}
    for line in text.splitlines():
        found = _SAMPLE.match(line)
        if found is None:
            continue
        sums.setdefault(found[1], []).append(float(found[3]))
        if found[1] == INFO:
            info = dict(_LABEL.findall(found[2] or ""))
    whole = {name: math.fsum(values) for name, values in sums.items()}
    if USAGE in sums:
        whole[USAGE] /= len(sums[USAGE])
    return whole, info


class Watch:
    """Looks at the server's metrics while a load runs.

    After the `async with` block, `gauges()` says what was in use and `counts()` what was added up.
    """

    def __init__(self, client: Any) -> None:
        self.client = client
        self.looks: list[tuple[float, dict[str, float]]] = []

    async def look(self) -> None:
        """Note the metrics of this moment."""
        reply = await self.client.get("/metrics")
        self.looks.append((time.perf_counter(), read(reply.text)[0]))

    async def __aenter__(self) -> Watch:
        await self.look()
        self.task = asyncio.create_task(self._run())
        return self

    async def __aexit__(self, *_: object) -> None:
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)
        await self.look()

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(LOOK)
            await self.look()

    def gauges(self) -> dict[str, dict[str, float]]:
        """Mean over time and peak: of the KV cache's share in use, and of requests."""
        names = {"kv_share": USAGE, "running": RUNNING, "waiting": WAITING}
        return {name: over_time(self.looks, metric) for name, metric in names.items()}

    def counts(self) -> dict[str, float]:
        """How much the counters grew."""
        first, last = self.looks[0][1], self.looks[-1][1]
        return {name: last.get(m, 0.0) - first.get(m, 0.0) for name, m in COUNTERS.items()}


def over_time(looks: Sequence[tuple[float, Mapping[str, float]]], name: str) -> dict[str, float]:
    """Mean and peak of a gauge; each look holds until the next."""
    values = [one.get(name, 0.0) for _, one in looks]
    spans = [after[0] - before[0] for before, after in itertools.pairwise(looks)]
    whole = math.fsum(spans)
    weighted = math.fsum(v * s for v, s in zip(values, spans, strict=False))
    return {"mean": weighted / whole if whole else values[0], "peak": max(values)}


def busy_seconds() -> float | None:
    """Processor time that the whole machine has spent so far; None where it does not tell."""
    try:
        fields = Path("/proc/stat").read_text().splitlines()[0].split()[1:]
    except OSError:
        return None
    user, nice, system = (int(field) for field in fields[:3])
    return (user + nice + system) / os.sysconf("SC_CLK_TCK")


def quantiles(values: Sequence[float], *shares: int) -> dict[str, float]:
    """The values below which such per cents lie, by "p50" and the like; no numbers of none."""
    some = values or [math.nan]
    return {f"p{share}": float(np.percentile(some, share)) for share in shares}


def figures(answers: Sequence[Answer]) -> dict[str, Any]:
    """What a load's answers add up to; times in seconds, failed requests in `errors` alone."""
    good = [one for one in answers if not one.error]
    told: dict[str, Any] = {
        "requests": len(answers),
        "errors": len(answers) - len(good),
        "error": next((one.error for one in answers if one.error), ""),
    }
    if not good:
        return told
    seconds = max(one.times[-1] for one in good) - min(one.due for one in good)
    first = [one.times[0] - one.due for one in good]
    gaps = [b - a for one in good for a, b in zip(one.times, one.times[1:], strict=False)]
    tokens = sum(one.tokens for one in good)
    return told | {
        "seconds": seconds,
        "requests_per_second": len(good) / seconds,
        "output_tokens_per_second": tokens / seconds,
        "prompt_tokens": sum(one.prompt for one in good) / len(good),
        "output_tokens": tokens / len(good),
        "first_token": quantiles(first, 50, 95),
        "between_tokens": quantiles(gaps, 50, 95),
        "whole_answer": quantiles([one.times[-1] - one.due for one in good], 50),
        "sent_late": max(one.sent - one.due for one in good),
    }
