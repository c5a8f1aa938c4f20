"""Requests to a server through its OpenAI-compatible API, with the standard library alone."""

from __future__ import annotations

import base64
import io
import json
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from PIL import Image
from serving import NAME, Server

KEEP = "vlmprune_keep"


@dataclass(frozen=True)
class Asked:
    """A request: a question, pictures before it, a budget, and more fields of its body."""

    text: str
    images: tuple[Image.Image, ...] = ()
    keep: Any = None
    tokens: int = 24
    more: dict[str, Any] = field(default_factory=dict)

    def body(self) -> dict[str, Any]:
        content: list[dict[str, Any]] = [
            {"type": "image_url", "image_url": {"url": data_url(image)}} for image in self.images
        ]
        content.append({"type": "text", "text": self.text})
        body = {
            "model": NAME,
            "messages": [{"role": "user", "content": content}],
            "temperature": 0,
            "max_tokens": self.tokens,
            "return_token_ids": True,
            "logprobs": True,
            "top_logprobs": 5,
            "return_tokens_as_token_ids": True,
        }
        if self.keep is not None:
            body["mm_processor_kwargs"] = {KEEP: self.keep}
        return {**body, **self.more}


@dataclass(frozen=True)
class Answer:
    """What came back.

    Attributes:
        status: of HTTP.
        error: the server's sentence where the request was refused.
        text: the answer.
        ids: of its tokens.
        prompt: token ids of the prompt, as they went into the language model.
        prompt_tokens: of the usage.
        cached: how many of them were found in the prefix cache.
        tops: for each token of the answer the log-probabilities of the likeliest, by token id.
    """

    status: int
    error: str = ""
    text: str = ""
    ids: tuple[int, ...] = ()
    prompt: tuple[int, ...] = ()
    prompt_tokens: int = 0
    cached: int = 0
    tops: tuple[dict[int, float], ...] = ()


def data_url(image: Image.Image) -> str:
    """PNG, which loses nothing: the server decodes the very pixels of the test."""
    file = io.BytesIO()
    image.convert("RGB").save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def post(server: Server, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    request = urllib.request.Request(
        server.url + path, json.dumps(body).encode(), {"content-type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=180) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def ask(server: Server, asked: Asked) -> Answer:
    status, got = post(server, "/v1/chat/completions", asked.body())
    if status != 200:
        return Answer(status, error=str(got.get("error", got).get("message", got)))
    choice, usage = got["choices"][0], got["usage"]
    details = usage.get("prompt_tokens_details") or {}
    tops = tuple(
        {
            int(one["token"].removeprefix("token_id:")): one["logprob"]
            for one in token["top_logprobs"]
        }
        for token in choice["logprobs"]["content"]
    )
    return Answer(
        status,
        text=choice["message"]["content"] or "",
        ids=tuple(choice["token_ids"]),
        prompt=tuple(got["prompt_token_ids"]),
        prompt_tokens=usage["prompt_tokens"],
        cached=details.get("cached_tokens") or 0,
        tops=tops,
    )


def ask_all(server: Server, asked: Sequence[Asked], concurrency: int) -> list[Answer]:
    """All answers in the order of the requests, so many of them under way at a time."""
    with ThreadPoolExecutor(concurrency) as pool:
        return list(pool.map(lambda one: ask(server, one), asked))
