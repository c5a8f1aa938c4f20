"""Makes torchvision importable beside a torch that its compiled part was not built for.

vLLM's CPU build wants torch's CPU build, while package indexes have torchvision for CUDA only. Its
library then cannot be loaded, which it tolerates, but at import it looks two operators up that the
library would have defined. `scripts/setup-vllm.sh` copies this file into the environment of
`make test-vllm` with a .pth file that imports it, so that every process defines them in time: only
when torchvision gets imported, and only when its library has not loaded. Nothing calls them here.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

# After torchvision.extension, which tries to load the library, and before the two are looked up.
MODULE = "torchvision._meta_registrations"
OPERATORS = ("nms", "qnms")
_kept: list[Any] = []  # a library's definitions go with it


class _Operators:
    @staticmethod
    def find_spec(name: str, path: Any = None, target: ModuleType | None = None) -> None:
        if name == MODULE and not sys.modules["torchvision.extension"]._has_ops():
            import torch

            library = torch.library.Library("torchvision", "FRAGMENT")
            for operator in OPERATORS:
                library.define(
                    f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
                )
            _kept.append(library)


sys.meta_path.insert(0, _Operators)  # type: ignore[arg-type]
