"""One of two processes that hold tiny models together; writes what it answered as JSON.

Run as `python tests/ranks.py RANK FOLDER`, twice at once. The processes meet in a file of the
folder.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

RANKS = 2
# The plan of the last cuts the vision tower, too, that of Qwen3-VL no head.
FAMILIES = ("llava", "qwen2_5_vl", "qwen3_vl", "internvl", "llama4")
METHODS = ("VisPruner", "PLPHP", "FastV", "RandomTokens", "Recall", "PruMerge", "DART")
WAYS = {"tensor parallel": FAMILIES, "fsdp": FAMILIES[:2]}
# Of the first family all methods; of the others those that read each kind of heads: the tower's
# (one by one, and as one vector), and the decoder's (while the cache is cut, and between layers).
OF_OTHERS = ("VisPruner", "PruMerge", "PLPHP", "DART")
CASES = [
    (family, method, way)
    for way, families in WAYS.items()
    for family in families
    for method in (METHODS if family == FAMILIES[0] else OF_OTHERS)
]


def run(rank: int, folder: Path) -> dict[str, Any]:
    """All cases, by name."""
    import torch
    from torch import distributed
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel
    from transformers import DynamicCache
    from transformers.distributed import DistributedConfig

    import vlmprune
    from vlmprune import PLPHP, VisPruner
    from vlmprune.errors import VlmpruneError
    from vlmprune.hosts import attention, decoder, parallel, release
    from zoo import ZOO
    from zoo.base import unusual_scales

    methods = {
        "VisPruner": VisPruner(keep=0.5),
        # Thresholds between the layers, so that a part of the heads gives other rates.
        "PLPHP": PLPHP(per_head="adaptive", window=3, alpha=0.68, beta=0.6),
        "FastV": vlmprune.FastV(keep=0.4, layer=1),
        "RandomTokens": vlmprune.RandomTokens(keep=0.5),
        "Recall": vlmprune.Recall(read=0.3, floor=0, always=True),
        # All heads as one vector, whichever process has them.
        "PruMerge": vlmprune.PruMerge(keep=0.5),
        "DART": vlmprune.DART(keep=0.5, layer=1),
    }
    chain = VisPruner(keep=0.7) | methods["PLPHP"]

    def answered(model: Any, inputs: Any, method: Any, **more: Any) -> dict[str, Any]:
        """What a pruned `generate` says, and what it kept."""
        with method(model) as handle:
            out = model.generate(
                **inputs,
                max_new_tokens=3,
                do_sample=False,
                output_scores=True,
                return_dict_in_generate=True,
                **more,
            )
            report = json.loads(handle.report.json())
        layers = [
            {name: layer[name] for name in ("kept", "bytes_before", "kv_bytes") if name in layer}
            for layer in report["layers"]
        ]
        kept = [one.tolist() for one in handle.report.kept]
        return {"scores": torch.stack(out.scores).tolist(), "kept": kept, "layers": layers}

    def turns(model: Any, inputs: Any, method: Any) -> dict[str, Any]:
        """A second question on the cache of the first."""
        cache = {release.cache_name(type(model)): DynamicCache(config=model.config)}
        with method(model):
            first = model.generate(**inputs, **cache, max_new_tokens=2, do_sample=False)
            more = torch.cat((first, inputs["input_ids"][:, -4:]), dim=1)
            old = inputs["attention_mask"]
            mask = torch.cat((old, old.new_ones(len(more), more.shape[1] - old.shape[1])), dim=1)
            again = {**inputs, "input_ids": more, "attention_mask": mask}
            return answered(model, again, method, **cache)

    def sharded(model: Any) -> Any:
        """As FSDP is put on a model: layer by layer, then the rest."""
        lists = (one for one in model.modules() if isinstance(one, torch.nn.ModuleList))
        for layer in (layer for one in lists if len(one) == 3 for layer in one):
            fully_shard(layer)
        return fully_shard(model)

    @contextmanager
    def unshared() -> Iterator[None]:
        """Without asking who has the other heads."""
        asked = parallel.sharing
        parallel.sharing = lambda module, heads: parallel.WHOLE
        try:
            yield
        finally:
            parallel.sharing = asked

    found: dict[str, Any] = {}

    def note(name: str, case: Callable[[], Any]) -> None:
        # What needs nobody else is run once.
        if name.endswith("whole") and rank:
            return
        try:
            found[name] = case()
        # An error of one case is that case's, and comes in both processes.
        except Exception as error:
            found[name] = {"error": f"{type(error).__name__}: {error}"}

    def cases(family: str) -> None:
        entry = ZOO[family]
        whole = entry.build()
        inputs = entry.request(whole, [["image", "image"], ["image"]]).inputs
        place = folder / family
        if rank == 0:
            whole.save_pretrained(place)
        distributed.barrier()
        config = DistributedConfig(tp_size=RANKS, tp_plan="auto")
        split = type(whole).from_pretrained(place, distributed_config=config).eval()
        split.generation_config.eos_token_id = None
        unusual_scales(split)
        models = {"whole": whole, "tensor parallel": split, "fsdp": sharded(entry.build())}
        models = {way: one for way, one in models.items() if family in WAYS.get(way, FAMILIES)}

        def bare(model: Any) -> dict[str, Any]:
            with torch.no_grad():
                return {"logits": model(**inputs).logits[:, -1].tolist()}

        for way, model in models.items():
            note(f"{family} bare {way}", lambda m=model: bare(m))
            for name, method in methods.items():
                if (family, name, "tensor parallel") in CASES:
                    note(
                        f"{family} {name} {way}", lambda m=model, by=method: answered(m, inputs, by)
                    )
        if family != FAMILIES[0]:
            return
        for way, model in models.items():
            note(f"chain {way}", lambda m=model: answered(m, inputs, chain))
            note(f"later turn {way}", lambda m=model: turns(m, inputs, methods["PLPHP"]))
        for name, method in methods.items():
            with unshared():
                note(f"alone {name}", lambda by=method: answered(split, inputs, by))

        def later() -> dict[str, Any]:
            model = entry.build()
            with methods["VisPruner"](model):
                sharded(model)
                out = model(**inputs).logits[:, -1]
            return {"logits": out.tolist(), "left": "forward" in vars(model)}

        def first() -> dict[str, Any]:
            with methods["VisPruner"](whole):
                return {"logits": whole(**inputs).logits[:, -1].tolist()}

        def stored(model: Any) -> dict[str, Any]:
            handle = methods["VisPruner"].attach(model)
            vision = handle.encode(**inputs)
            out = model.generate(**inputs, vision=vision, max_new_tokens=3, do_sample=False)
            handle.detach()
            return {"ids": out.tolist()}

        def wrapped() -> dict[str, Any]:
            model = DistributedDataParallel(entry.build())
            with methods["VisPruner"](model):
                return {"logits": model(**inputs).logits[:, -1].tolist()}

        def plain_shards() -> dict[str, Any]:
            module = attention.attention_of(decoder.decoder_layers(whole)[0])
            module.q_proj._hf_quantized_needs_local_tp = True
            try:
                parallel.sharing(module, 2)
            except VlmpruneError as error:
                return {"refused": str(error)}
            finally:
                del module.q_proj._hf_quantized_needs_local_tp
            return {}

        note("sharded later", later)
        note("sharded later whole", first)
        note("stored fsdp", lambda: stored(models["fsdp"]))
        note("stored whole", lambda: stored(whole))
        note("ddp", wrapped)
        note("plain shards", plain_shards)

    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=RANKS
    )
    for family in FAMILIES:
        cases(family)
    distributed.destroy_process_group()
    return found


def main() -> None:
    """Run as one of the processes."""
    rank, folder = int(sys.argv[1]), Path(sys.argv[2])
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(RANKS))
    found = run(rank, folder)
    (folder / f"{rank}.json").write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
