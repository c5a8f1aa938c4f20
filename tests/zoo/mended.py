"""Classes of Transformers with a fault in some release, without the fault.

So what we do with them is tested on those releases, too; `tests/hosts/test_release.py` holds that
the classes themselves fail there, and that attaching to them is refused.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from packaging.specifiers import SpecifierSet


def runs(model: Any, **inputs: Any) -> bool:
    """Whether a model answers a request, by itself and by `generate`; without one, two words."""
    try:
        with torch.no_grad():
            model(**(inputs or {"input_ids": torch.ones(1, 2, dtype=torch.long)}))
            if inputs:
                model.generate(**inputs, max_new_tokens=1)
    except (AttributeError, RuntimeError, ValueError):
        return False
    return True


def forwards(inputs: Mapping[str, Any]) -> bool:
    """Whether a plain forward of the host takes a request that its `generate` takes.

    Gemma 4's forward loses how many frames videos have in some releases, whose `generate` does not.
    """
    loses = SpecifierSet(">=5.19,<5.23").contains(transformers.__version__)
    return not loses or "num_frames_per_video" not in inputs


def with_image_outputs(cls: type) -> type:
    """A class of that name whose language model returns `image_outputs`, if only None."""
    plain = cls.forward

    def add(module: Any, args: Any, output: Any) -> None:
        if not isinstance(output, tuple):
            output.image_outputs = None

    @functools.wraps(plain)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        hook = self.language_model.register_forward_hook(add)
        try:
            return plain(self, *args, **kwargs)
        finally:
            hook.remove()

    return type(cls.__name__, (cls,), {"forward": forward, "__module__": cls.__module__})
