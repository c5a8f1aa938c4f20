"""Golden files: the releases' own code run on seeded inputs; `tests/golden/README.md` tells how.

    python scripts/golden prumerge visionzip … --clones FOLDER [--source URL]

Clones each release from GitHub at the commit that `clones.py` names, imports its files as they
are, runs them in float32 on CPU, and writes `tests/golden/METHOD.safetensors` with the commit and
the environment in its metadata.
"""

from __future__ import annotations

import argparse
import platform
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))

import decoders  # noqa: E402
import numpy  # noqa: E402
import torch  # noqa: E402
import towers  # noqa: E402
import transformers  # noqa: E402
from clones import RELEASES, fetch  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

RUNS = {**towers.RUNS, **decoders.RUNS}


def main() -> None:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("methods", nargs="+", choices=sorted(RUNS))
    parser.add_argument("--clones", type=Path, required=True, help="folder for the clones")
    parser.add_argument("--source", default="https://github.com/{repo}", help="where from")
    parser.add_argument("--out", type=Path, default=ROOT / "tests" / "golden")
    given = parser.parse_args()
    given.clones.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    for method in given.methods:
        torch.manual_seed(0)
        with torch.no_grad():
            found, inputs = RUNS[method](fetch(method, given.clones, given.source))
        repo, commit = RELEASES[method]
        about = {
            "repository": f"https://github.com/{repo}",
            "commit": commit,
            "inputs": inputs,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "numpy": numpy.__version__,
        }
        if "timm" in sys.modules:
            about["timm"] = sys.modules["timm"].__version__
        file = given.out / f"{method}.safetensors"
        save_file({name: one.contiguous() for name, one in found.items()}, file, about)
        shapes = ", ".join(f"{name} {list(one.shape)}" for name, one in found.items())
        print(f"{file.name}: {file.stat().st_size} bytes; {shapes}")


if __name__ == "__main__":
    main()
