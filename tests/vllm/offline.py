"""Answers requests offline, in a process of its own: `python offline.py FOLDER REQUESTS OUT`.

REQUESTS is a file of `torch.save` with what vLLM's `generate` takes. OUT gets for each of them,
answered one after the other, the prompt's ids, the new tokens and the positions [axes, tokens] that
the language model was given; the same where blocks of the prompt are in the prefix cache; and the
new tokens of all of them at once.
"""

from __future__ import annotations

import sys
from typing import Any

import torch


def main(folder: str, asked: str, out: str, limit: int, block: int = 32) -> None:
    from vllm import LLM, SamplingParams

    requests: list[dict[str, Any]] = torch.load(asked, weights_only=False)
    media = [request.get("multi_modal_data", {}) for request in requests]
    kinds = {kind for one in media for kind in one}
    llm = LLM(
        folder,
        dtype="float32",
        enforce_eager=True,
        max_model_len=1024,
        max_num_seqs=8,
        # So few that prompts are cut in the middle of an image.
        max_num_batched_tokens=limit,
        block_size=block,
        limit_mm_per_prompt={k: max(len(one.get(k, ())) for one in media) for k in kinds},
    )
    engine: Any = llm.llm_engine
    model = engine.model_executor.driver_worker.worker.model_runner.model
    inner = model.language_model.model
    own, seen = inner.forward, []

    def forward(*args: Any, **kwargs: Any) -> Any:
        positions = kwargs["positions"] if "positions" in kwargs else args[1]
        seen.append(torch.atleast_2d(positions).clone())
        return own(*args, **kwargs)

    # vLLM's decorated modules run no hooks.
    inner.forward = forward
    greedy = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)

    def ask(request: dict[str, Any]) -> dict[str, Any]:
        seen.clear()
        (answer,) = llm.generate(request, greedy, use_tqdm=False)
        return {
            "ids": answer.prompt_token_ids,
            "new": list(answer.outputs[0].token_ids),
            "positions": torch.cat(seen, dim=1),
            "steps": len(seen),
            "cached": answer.num_cached_tokens,
        }

    alone = []
    for request in requests:
        llm.reset_prefix_cache()
        alone.append(ask(request))
    again = [ask(request) for request in requests for _ in range(2)][1::2]
    together = llm.generate(requests, greedy, use_tqdm=False)
    batch = [list(answer.outputs[0].token_ids) for answer in together]
    torch.save({"alone": alone, "again": again, "batch": batch}, out)


if __name__ == "__main__":
    main(*sys.argv[1:4], *map(int, sys.argv[4:]))
