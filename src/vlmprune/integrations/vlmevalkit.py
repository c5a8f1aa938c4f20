"""VLMEvalKit with a pruner: `python -m vlmprune.integrations.vlmevalkit --method SPEC -- …`.

Run it in VLMEvalKit's folder. What follows `--` goes to VLMEvalKit's own `run.py`, with each model
of `--model` replaced by itself with the pruner attached, under a name of its own, so that results
with and without pruning are never mixed up.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import sys
from collections.abc import Callable, MutableMapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from vlmprune import spec
from vlmprune.errors import VlmpruneError

_MODULE = "vlmevalkit_run"
# Those would take another way past the models that are replaced.
_REFUSED = {
    "--config": "name the model by --model",
    "--use-vllm": "leave it out, for the pruner acts on Transformers' models",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run VLMEvalKit with pruned models.

    Args:
        argv: the arguments; by default the command line's.

    Returns:
        0, or 2 where something could not be done; the sentence is printed.
    """
    try:
        _launch(sys.argv[1:] if argv is None else list(argv))
    except VlmpruneError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    return 0


def _launch(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m vlmprune.integrations.vlmevalkit",
        description="Run VLMEvalKit's run.py with a pruner attached to its models.",
        usage="%(prog)s --method SPEC [--run PATH] -- --model NAME … --data NAME …",
    )
    parser.add_argument("--method", required=True, help="as in `vlmprune eval --method`")
    parser.add_argument("--run", default="run.py", help="VLMEvalKit's run.py")
    at = argv.index("--") if "--" in argv else len(argv)
    options, theirs = parser.parse_args(argv[:at]), argv[at + 1 :]
    # Read before anything of VLMEvalKit's, which takes long to import.
    spec.parse(options.method)
    names = models(theirs)
    path = Path(options.run)
    if not path.is_file():
        raise VlmpruneError(
            f"--run {options.run!r} is no file; give the path of VLMEvalKit's run.py, or start in "
            "its folder."
        )
    run = _imported(path)
    supported = getattr(run, "supported_VLM", None)
    start = getattr(run, "main", None)
    if supported is None or start is None:
        raise VlmpruneError(
            f"{options.run} has no supported_VLM or no main, so it is not the run.py that this "
            "knows; use one of VLMEvalKit's 0.2 releases."
        )
    refusals: list[str] = []
    renamed = {name: register(supported, name, options.method, refusals) for name in names}
    sys.argv = [str(path), *replaced(theirs, renamed)]
    getattr(run, "load_env", lambda: None)()
    start()
    # VLMEvalKit logs what goes wrong with a model, and goes on to the next.
    if refusals:
        raise VlmpruneError(refusals[0])


def models(arguments: Sequence[str]) -> list[str]:
    """The names after `--model`.

    Raises:
        VlmpruneError: there are none, or an argument is given that would pass them by.
    """
    for argument in arguments:
        name = argument.partition("=")[0]
        if name in _REFUSED:
            raise VlmpruneError(f"{name} is not supported with a pruner; {_REFUSED[name]}.")
    found = [arguments[at] for at in _places(arguments)]
    if not found:
        raise VlmpruneError(
            "no `--model NAME` follows `--`; name the models as VLMEvalKit's run.py does."
        )
    return found


def replaced(arguments: Sequence[str], names: MutableMapping[str, str]) -> list[str]:
    """The arguments with other names after `--model`."""
    places = set(_places(arguments))
    return [names[text] if at in places else text for at, text in enumerate(arguments)]


def register(
    supported: MutableMapping[str, Any], name: str, method: str, refusals: list[str]
) -> str:
    """Add a pruned model to VLMEvalKit's.

    Args:
        supported: VLMEvalKit's models: what makes each, by name.
        name: of the model.
        method: a spec.
        refusals: gets the sentence if the pruner cannot be attached.

    Returns:
        The new name: the old one, then the method as a file name may hold it.

    Raises:
        VlmpruneError: there is no such model.
    """
    if name not in supported:
        raise VlmpruneError(
            f"VLMEvalKit has no model {name!r}; `vlmutil mlist all` lists those that it has."
        )
    new = f"{name}_{re.sub('[^A-Za-z0-9_.]+', '-', method).strip('-')}"
    make = supported[name]
    # VLMEvalKit sets some of a partial's keywords after the fact.
    args, keywords = (make.args, make.keywords) if isinstance(make, partial) else ((), {})
    inner = make.func if isinstance(make, partial) else make
    supported[new] = partial(_Pruned(inner, name, method, refusals), *args, **keywords)
    return new


class _Pruned:
    """Makes one of VLMEvalKit's models and attaches a pruner to what it runs."""

    def __init__(
        self, make: Callable[..., Any], name: str, method: str, refusals: list[str]
    ) -> None:
        self.make, self.name, self.method, self.refusals = make, name, method, refusals

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        wrapper = self.make(*args, **kwargs)
        try:
            attach(wrapper, self.method)
        except VlmpruneError as error:
            self.refusals.append(f"{self.name}: {error}")
            raise
        return wrapper


def attach(wrapper: Any, method: str) -> None:
    """Attach a pruner to the Transformers model that one of VLMEvalKit's holds as `model`.

    Raises:
        VlmpruneError: it holds none, or one that is not supported.
    """
    model = getattr(wrapper, "model", None)
    if not isinstance(model, nn.Module):
        raise VlmpruneError(
            f"VLMEvalKit's {type(wrapper).__name__} holds no model of Transformers as `.model`, so "
            "there is nothing to prune; use a model that runs on Transformers here."
        )
    wrapper.vlmprune = spec.parse(method).attach(model, logits="full")


def _places(arguments: Sequence[str]) -> list[int]:
    """Where the names after `--model` stand."""
    found, inside = [], False
    for at, text in enumerate(arguments):
        if text.startswith("-"):
            inside = text == "--model"
        elif inside:
            found.append(at)
    return found


def _imported(path: Path) -> Any:
    """VLMEvalKit's run.py, up to where it would start: it picks its GPU first, then imports."""
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    found = importlib.util.spec_from_file_location(_MODULE, path)
    assert found is not None and found.loader is not None
    run = importlib.util.module_from_spec(found)
    sys.modules[_MODULE] = run
    found.loader.exec_module(run)
    return run


if __name__ == "__main__":
    sys.exit(main())
