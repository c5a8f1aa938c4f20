"""What a refusal says of a changed host: for a row words of what one method or another is told.

Rows that are not here say what another row says, or what a test beside the subject asks for.
"""

from __future__ import annotations

from collections.abc import Mapping

_REGISTRY = "attend through the attention registry"
SAID: Mapping[str, tuple[str, ...]] = {
    # Attention
    "attention is a class of another file, decoder": (
        "LlamaDecoderLayer has no attention that can be tapped in transformers",
        "LlamaDecoderLayer has no attention that can be tapped; prune before",
    ),
    "attention is called by halves of heads, decoder": ("it attends more than once a layer",),
    "attention passes the registry by, decoder": (f"it does not {_REGISTRY}; the model is",),
    "attention passes the registry by, tower": (f"0 of its 51 tokens {_REGISTRY}",),
    "rows come before heads, tower": ("are not [batch, heads, tokens, width]",),
    "s_aux is called sinks": (
        "with attention sinks, which take a share of attention that PLPHP(",
        "with attention sinks, which take a share of attention that FastV(",
    ),
    # Decoder layers
    "each layer gets rotary angles of its own": (
        "does not make its rotary angles by a module of its decoder",
    ),
    "layers are listed in another order than they run": ("decoder layer 1 runs after layer 2",),
    "layers return dictionaries": ("dict cannot be pruned", "a layer returns it, and no states"),
    "layers run without hooks": ("decoder layers 0, 1, 2 ran around the hooks that leave tokens",),
    "layers stand under another attribute": (
        "has no list of decoder layers where get_decoder().layers should be",
    ),
    "layers' position_embeddings are called rotary": (
        "takes no position_embeddings, so it cannot be given those of the tokens that go on",
    ),
    "one layer more is listed than runs": (
        "has 4 decoder layers and a config that tells of 3, so it attends several times",
    ),
    # Models
    "pruned features are not taken": ("it refuses the shorter request (Image features and image",),
    "pruned features are not taken, nor counted": (
        "the pruned features of images do not stand in their places",
    ),
    # Towers
    "attention runs without hooks, tower": (
        "a layer of its vision encoder ran without the attention that was to be seen",
    ),
    "the projector that is found is not the one that runs": (
        "its projector ran without the features of its vision encoder being seen",
    ),
    "the tower's layers are listed in another order than they run": (
        "a visual token of its images is not made of the patches behind encoder layer 1 that are",
    ),
    "the tower's layers run without hooks": (
        "the tokens of CLIPEncoderLayer leave it around its hooks",
    ),
    "tokens are flipped inside layers": (
        "the tokens of CLIPEncoderLayer attend in another order than they leave it",
    ),
    # Configs
    "deepstack_visual_indexes is missing": (
        "adds features to visual tokens between its layers (",
        ", and nothing says where; prune its cache instead",
    ),
    "fullatt_block_indexes says other blocks": (
        "the block that is scored does not attend to whole images, one by one",
    ),
    "image_token_id is missing": (
        "vlmprune cannot follow LlavaForConditionalGeneration, not even inside its language model",
    ),
    "the config says another feature layer than is taken": (
        "the visual tokens of its images are not made of the patches behind encoder layer 2",
    ),
    # Outputs and caches
    "generate goes on with a cache made anew": (
        "a step reads another cache than the prompt filled",
        "decoding left the cache that the prompt filled at ",
    ),
    "the output's cache is called kv": ("it holds no KV cache where one was filled",),
}
