"""The entry point of lmms-eval's model registry; loaded by lmms-eval, never by this package."""

from __future__ import annotations

from typing import Any

MODEL = "vlmprune"
CLASS = "vlmprune.integrations.lmms_eval_model.Vlmprune"
SIMPLE = "vlmprune.integrations.lmms_eval_model.VlmpruneSimple"


def manifest() -> Any:
    """The `ModelManifest` that makes `lmms-eval eval --model vlmprune` known.

    The class that it names is imported only once that model is asked for.
    """
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id=MODEL, simple_class_path=SIMPLE, chat_class_path=CLASS)
