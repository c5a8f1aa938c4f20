"""Changes of the host, one fact a row: what we know of Transformers, made untrue.

`tools` changes modules, classes, attention calls and configs; `hosts` has the tiny models and says
what comes of a call; the other modules hold the rows by what they change. Nothing here changes our
own code.
"""

from __future__ import annotations

from sabotage import attention, caches, configs, layers, models, outputs, towers
from sabotage.hosts import Row

# What no method reads today, or reads without harm; the control does not count these.
UNREAD = frozenset(
    {
        "attention runs without hooks, decoder",
        "attention_mask is called mask, decoder",
        "attention_mask is called mask, tower",
        "blocks run without hooks",
        "features are the projector's second argument",
        "generate goes on with a copy of the cache",
        "generate hands no mask on",
        "hidden_states are called layers",
        "hidden_states come by name",
        "images come packed",
        "images go through the tower one by one",
        "is_causal is said in the call, not by the module",
        "last_hidden_state is called states",
        "layers return tuples",
        "layers' use_cache is called caching",
        "mm_encoder_outputs is called encoded",
        "num_key_value_heads is missing",
        "position_ids is called places",
        "position_ids is called places, forward",
        "queries come scaled, and scaling says 1, decoder",
        "queries come scaled, and scaling says 1, tower",
        "the cache is of a subclass",
        "the encoder returns no states",
        "the forward does more to features than the method",
        "the language model stands under another attribute",
        "the mask comes by name, decoder",
        "the mask comes by name, tower",
        "the projector gets tokens in another order",
        "the tower's layers run without hooks",
        "the tower's layers stand under another attribute",
        "use_cache is called caching, forward",
    }
)
ROWS: tuple[Row, ...] = (
    *attention.ROWS,
    *layers.ROWS,
    *models.ROWS,
    *towers.ROWS,
    *configs.ROWS,
    *outputs.ROWS,
    *caches.ROWS,
)

__all__ = ["ROWS", "UNREAD", "Row"]
