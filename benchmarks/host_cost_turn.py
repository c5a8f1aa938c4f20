"""One turn of `host_cost.py`, by whichever vlmprune is on the path: JSON of CPU seconds.

    python benchmarks/host_cost_turn.py 15 20

Only names that every release of the library has are imported, so that checkouts can be compared.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from typing import Any

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from vlmprune import PLPHP, FastV, VisPruner

METHODS = {"VisPruner": VisPruner(keep=8), "PLPHP": PLPHP(r=0.4), "FastV": FastV(keep=8)}
PLACEHOLDERS, IMAGE = 16, 5


def tiny() -> tuple[Any, dict[str, torch.Tensor]]:
    """A model of 32 narrow layers, and a request for it."""
    torch.manual_seed(0)
    sizes: Any = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    vision = CLIPVisionConfig(**sizes, num_hidden_layers=3, image_size=56, patch_size=14)
    text = LlamaConfig(**sizes, num_hidden_layers=32, vocab_size=64, num_key_value_heads=2)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE)
    model = LlavaForConditionalGeneration(config).eval()
    model.generation_config.eos_token_id = None
    ids = torch.tensor([[1, 7, *[IMAGE] * PLACEHOLDERS, 8, 9, 10]])
    pixels = torch.randn(1, 3, 56, 56)
    mask = torch.ones_like(ids)
    return model, {"input_ids": ids, "pixel_values": pixels, "attention_mask": mask}


def main(times: int, tokens: int) -> dict[str, dict[str, float]]:
    """Of each method, and of none, seconds of a first token and of so many."""
    torch.set_num_threads(1)
    model, inputs = tiny()

    def cost(count: int) -> float:
        found = []
        for _ in range(times):
            start = time.process_time()
            model.generate(**inputs, max_new_tokens=count, do_sample=False)
            found.append(time.process_time() - start)
        return statistics.median(found)

    def both() -> dict[str, float]:
        # A first call proves the contract with Transformers, which later ones do not.
        cost(2)
        return {"first token": cost(1), f"{tokens} tokens": cost(tokens)}

    out = {"unpruned": both()}
    for name, method in METHODS.items():
        with method(model):
            out[name] = both()
    return out


if __name__ == "__main__":
    print(json.dumps(main(*map(int, sys.argv[1:]))))
