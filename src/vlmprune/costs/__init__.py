"""FLOPs, bytes and plans: what a number of visual tokens costs, with no weights.

Here belongs what a config and token counts are enough for, sizes of real models (`architectures`),
and how such figures are written (`units`). May import `hosts.config`, `hosts.layer_sizes` and
`hosts.sizes`, which read configs, `hosts.pretrained` and `hosts.made_up` in functions, to read one
from a folder and to ask a host where the tokens of a picture lie, `select.budget`,
`select.settings` and `errors`; no tensor library.
"""

from vlmprune.costs.flops import (
    PER_MULTIPLY_ADD,
    Layers,
    Spent,
    attention_flops,
    beside_flops,
    caching_layers,
    encoder_flops,
    kv_bytes,
    kv_layers,
    layered,
    layered_flops,
    patch_count,
    prefill_flops,
    spent,
    spent_of,
)
from vlmprune.hosts.layer_sizes import UNKNOWN

__all__ = [
    "PER_MULTIPLY_ADD",
    "UNKNOWN",
    "Layers",
    "Spent",
    "attention_flops",
    "beside_flops",
    "caching_layers",
    "encoder_flops",
    "kv_bytes",
    "kv_layers",
    "layered",
    "layered_flops",
    "patch_count",
    "prefill_flops",
    "spent",
    "spent_of",
]
