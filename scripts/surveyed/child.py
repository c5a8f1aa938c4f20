"""What runs in the process that a class has of its own."""

from __future__ import annotations

import contextlib
import io
import resource
from typing import Any

# Imported once, in the server that processes are forked from.
PRELOADED = (
    "torch",
    "transformers.modeling_utils",
    "transformers.generation.utils",
    "transformers.models.llama.modeling_llama",
    "transformers.models.clip.modeling_clip",
    "surveyed.verdicts",
)


def answer(there: Any, kind: str, cls: str, gibibytes: float) -> None:
    """Survey a class, and send what was found.

    Args:
        there: the end of a pipe.
        kind: `model_type`.
        cls: name of the class.
        gibibytes: of memory that it may take.
    """
    limit = int(gibibytes * 2**30)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    import torch
    import transformers

    from surveyed.verdicts import line_of

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    noise = io.StringIO()
    with contextlib.redirect_stdout(noise), contextlib.redirect_stderr(noise):
        there.send(line_of(kind, cls).as_dict())
