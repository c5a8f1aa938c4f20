"""`transformers serve` with a pruner: every model that it loads is pruned, for all its requests.

VLMPRUNE="vispruner:keep=64" python examples/serve_pruned.py llava-hf/llava-1.5-7b-hf --port 8000

Takes what `transformers serve` takes (`pip install "transformers[serving]"`).
"""

from __future__ import annotations

import os
import sys
from typing import Any

import typer
from transformers.cli.serve import Serve
from transformers.cli.serving import model_manager

from vlmprune import VlmpruneError, spec


class Pruning(model_manager.ModelManager):
    """Loads models as ever, and attaches the pruner that VLMPRUNE names to each."""

    def _load_model(self, *args: Any, **options: Any) -> Any:
        model = super()._load_model(*args, **options)
        spec.parse(os.environ["VLMPRUNE"]).attach(model)
        print(f"vlmprune: {args[0]} is pruned by {os.environ['VLMPRUNE']}", file=sys.stderr)
        return model


if __name__ == "__main__":
    model_manager.ModelManager = Pruning
    try:
        spec.parse(os.environ.setdefault("VLMPRUNE", "vispruner:keep=64"))
        typer.run(Serve)
    except VlmpruneError as error:
        sys.exit(f"vlmprune: {error}")
    # A model that is nowhere, or a package that serving lacks: Transformers says which.
    except (ImportError, OSError) as error:
        sys.exit(f"transformers serve: {error}")
