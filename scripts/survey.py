"""Survey every class of the installed Transformers that answers about images, tiny and random.

    python scripts/survey.py                        # all, one line each
    python scripts/survey.py --only qwen3_5 fuyu    # some, by model_type
    python scripts/survey.py --decoders             # LLaVA with each language model as its decoder
    python scripts/survey.py --json FILE            # what was found, for programs
    python scripts/survey.py --json FILE --resume   # those alone that FILE does not have yet
    python scripts/survey.py --json FILE --write    # the table of docs/models.md, too
    python scripts/survey.py --proved               # that of what the tests prove alone

VisPruner, PLPHP, Recall, FastV and RandomTokens are attached to each class in turn. What attaches
must then be right: the answer of the class as it is, with what was pruned hidden in its masks (for
recurrent decoders: a prompt without it), and not that of a control that keeps others. These
references stand in `scripts/surveyed` and share no code with the package or its tests. Each class
has a process of its own, with limits of time and memory.

It fails if anything that attaches is wrong, fails with a traceback, or is refused only later.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from surveyed import table
from surveyed.child import PRELOADED, answer
from surveyed.special import NO_DECODERS
from surveyed.table import FAULTS, in_words

# What language models are tried in, one after the other.
HOST, HOST_CLASS = "llava", "LlavaForConditionalGeneration"
PAGE = Path(__file__).parents[1] / "docs" / "models.md"


def classes() -> dict[str, str]:
    """All classes of the release, by `model_type`."""
    from transformers.models.auto import modeling_auto

    first = modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    every = modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES
    found = {**first, **{kind: cls for kind, cls in every.items() if kind not in first}}
    return {kind: cls if isinstance(cls, str) else cls[0] for kind, cls in sorted(found.items())}


def decoders() -> dict[str, str]:
    """LLaVA with each language model of the release in the place of its own."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return {
        f"{HOST}:{kind}": HOST_CLASS
        for kind in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
        if kind not in NO_DECODERS
    }


def surveyed(kind: str, cls: str, seconds: float, gibibytes: float) -> dict[str, Any]:
    """What a process of its own finds out about a class."""
    context = multiprocessing.get_context("forkserver")
    here, there = context.Pipe(duplex=False)
    start = time.monotonic()
    child = context.Process(target=answer, args=(there, kind, cls, gibibytes), daemon=True)
    child.start()
    there.close()
    why = f"took over {seconds:g} s"
    found = None
    try:
        if here.poll(seconds):
            found = here.recv()
    except EOFError:
        why = "its process ended without an answer"
    finally:
        child.kill()
        child.join()
        here.close()
    if found is None:
        found = {"kind": kind, "cls": cls, "path": "", "asked": "", "why": why}
        found |= {"facts": {}, "methods": {}}
    return found | {"seconds": round(time.monotonic() - start, 1)}


def write(page: Path, name: str, made: str) -> None:
    """Put a table between its marks on a page."""
    first, last = f"<!-- {name} -->\n", f"<!-- end {name} -->"
    before, _, rest = page.read_text(encoding="utf-8").partition(first)
    _, _, after = rest.partition(last)
    page.write_text(before + first + "\n" + made + "\n" + last + after, encoding="utf-8")


def main() -> bool:
    """Survey what was asked for; whether there was no fault."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", metavar="TYPE", help="these alone, by model_type")
    parser.add_argument("--decoders", action="store_true", help="LLaVA with each language model")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was found there")
    parser.add_argument("--resume", action="store_true", help="go on with FILE")
    parser.add_argument("--write", action="store_true", help="write the table of docs/models.md")
    parser.add_argument("--proved", action="store_true", help="write what the tests prove alone")
    parser.add_argument("--seconds", type=float, default=120, help="limit a class (120)")
    parser.add_argument("--memory", type=float, default=6, metavar="GIB", help="the same (6)")
    given = parser.parse_args()
    if given.proved:
        write(PAGE, "proved", table.proved())
        return True
    every = classes() | decoders()
    usual = decoders() if given.decoders else classes()
    odd = sorted(set(given.only or ()) - set(every))
    if odd:
        sys.exit(f"{odd[0]!r} is no model_type of such a class; {', '.join(every)} are.")
    if given.resume and given.json is None:
        sys.exit("--resume goes on with a file; give it with --json.")
    found: dict[str, Any] = {}
    if given.resume and given.json.exists():
        found = {line["kind"]: line for line in json.loads(given.json.read_text())["lines"]}
    wanted = [kind for kind in given.only or usual if kind not in found]
    multiprocessing.get_context("forkserver").set_forkserver_preload(list(PRELOADED))
    for number, kind in enumerate(wanted, 1):
        found[kind] = surveyed(kind, every[kind], given.seconds, given.memory)
        print(f"{number:3}/{len(wanted)} {in_words(found[kind])}", flush=True)
        if given.json is not None:
            given.json.write_text(table.as_json(found), encoding="utf-8")
    print("\n" + table.counts(found))
    if given.write:
        missing = sorted(set(usual) - set(found))
        if missing:
            sys.exit(f"The table is of all of them; {', '.join(missing)} are missing.")
        name, made = ("decoders", table.decoders) if given.decoders else ("survey", table.page)
        write(PAGE, name, made({kind: found[kind] for kind in usual}))
    return not any(
        one["verdict"] in FAULTS for line in found.values() for one in line["methods"].values()
    )


if __name__ == "__main__":
    sys.exit(not main())
