"""The families' own processors, built from their classes: no file of theirs is needed.

The tokenizer knows a few words and the marks that stand for images, under the ids that the zoo's
configs have. An image processor comes from torchvision, most users' default, or from PIL; video
processors there are of torchvision alone. `made_processors` says of what each is made.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Literal

from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from made_processors import MADE, SHARED, Made
from zoo.base import BOS, EOS, PAD, WORDS

Backend = Literal["pil", "torchvision"]

UNKNOWN = 59
QUESTION = [f"w{i}" for i in range(40)]


def _class(path: str) -> Any:
    module, name = path.rsplit(".", 1)
    return getattr(import_module(f"transformers.models.{module}"), name)


def tokenizer_of(made: Made) -> Any:
    """Words by spaces, and the marks, wherever they stand."""
    vocabulary = {"<pad>": PAD, "<s>": BOS, "</s>": EOS, "<unk>": UNKNOWN}
    vocabulary |= dict(made.marks) | {word: WORDS + i for i, word in enumerate(QUESTION)}
    plain = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    plain.add_special_tokens([AddedToken(mark, special=True) for mark in made.marks])
    names = {"unk_token": "<unk>", "pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=plain,
        padding_side="left",
        extra_special_tokens=dict(made.named),
        **names,
    )


def processor_of(family: str, backend: Backend) -> Any:
    """A family's processor.

    Raises:
        ImportError: torchvision is needed and is not there.
    """
    made = MADE[family]
    module, name = made.images.split(".")
    pil = backend == "pil"
    images = _class(
        f"{module}.image_processing_{'pil_' * pil}{module}.{name}ImageProcessor{'Pil' * pil}"
    )(**made.settings)
    if "image_seq_length" in made.settings:
        images.image_seq_length = made.settings["image_seq_length"]
    parts = {"image_processor": images, "tokenizer": tokenizer_of(made)}
    if made.videos:
        module, name = made.videos.split(".")
        cls = _class(f"{module}.video_processing_{module}.{name}VideoProcessor")
        parts["video_processor"] = cls(**made.video_settings)
    if made.sounds:
        parts["feature_extractor"] = _class(made.sounds)()
    return _class(made.processor)(**parts, **made.more)


def backends(family: str) -> list[Backend]:
    """The image processors that a family's tests are run with.

    Of models that share a processor's class one has PIL's: its pixels differ from torchvision's in
    rounding, and nothing on the way asks which model they are for.
    """
    return ["pil", "torchvision"] if MADE[family].pil and family not in SHARED else ["torchvision"]


def served(family: str, backend: str) -> bool:
    """Whether this environment has what the processor is made of; `make test-processors` has.

    Raises:
        RuntimeError: it is that environment, and has not.
    """
    needed = list(MADE[family].packages)
    if backend == "torchvision" or MADE[family].torchvision:
        needed.append("torchvision")
    missing = [name for name in needed if find_spec(name) is None]
    if missing and os.environ.get("VLMPRUNE_TEST_TORCHVISION"):
        raise RuntimeError(f"VLMPRUNE_TEST_TORCHVISION is set, and {missing[0]} is not there.")
    return not missing


def inputs_of(processor: Any, made: Mapping[str, Any]) -> dict[str, Tensor]:
    """What goes into the model of what a processor made: no labels, and nothing told beside."""
    left = ("labels", *getattr(processor, "unused_input_names", ()))
    kept = {k: v for k, v in made.items() if k not in left and isinstance(v, Tensor)}
    # Llama 4's makes pixels of half precision.
    return {k: v.float() if v.is_floating_point() else v for k, v in kept.items()}


def question(family: str, row: Sequence[str], number: int) -> str:
    """A prompt with a mark for each image and video of a row, longer from row to row."""
    made = MADE[family]
    marks = {"image": made.mark, "video": made.video_mark}
    shown = [f"{marks[kind]} {QUESTION[i]}" for i, kind in enumerate(row)]
    if made.first:
        shown = [made.mark * len(row)]
    return " ".join([*([] if made.first else QUESTION[20:22]), *shown, *QUESTION[10 : 13 + number]])
