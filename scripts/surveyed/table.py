"""What a survey found, in words and as tables."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

Found = Mapping[str, Mapping[str, Any]]

FAULTS = ("wrong", "traceback", "late")
PATHS = {
    "record": "by its record",
    "generic": "by the self-check",
    "decoder": "by its placeholders alone",
    "refused": "refused",
    "": "not tried",
}
METHODS = ("VisPruner", "PLPHP", "Recall", "FastV", "RandomTokens")
LONGEST = 200  # of a sentence in the table


def verdicts(line: Mapping[str, Any]) -> dict[str, str]:
    """What each method came to."""
    return {name: one["verdict"] for name, one in line["methods"].items()}


def path(line: Mapping[str, Any]) -> str:
    """How a class is served; "faulty" where something that attaches fails or is wrong."""
    if any(one in FAULTS for one in verdicts(line).values()):
        return "faulty"
    if line["why"] and "right" not in verdicts(line).values():
        return "apart"
    return str(line["path"])


def reasons(line: Mapping[str, Any]) -> str:
    """Why it was not tried, refused or faulty; the same sentence once."""
    said: dict[str, list[str]] = {}
    for name, one in line["methods"].items():
        if one["verdict"] not in ("right",):
            said.setdefault(short(one["detail"], line["cls"]), []).append(name)
    parts = []
    if line["why"]:
        parts.append(line["why"])
    for sentence, names in said.items():
        everyone = len(names) == len(line["methods"])
        if line["why"] and everyone and path(line) == "apart":
            continue
        parts.append(sentence if everyone else f"{', '.join(names)}: {sentence}")
    return "; ".join(parts)


def short(sentence: str, cls: str) -> str:
    """A refusal without what all refusals have."""
    sentence = sentence.split("; `vlmprune models` lists")[0]
    sentence = sentence.removeprefix(f"vlmprune cannot follow {cls}: ")
    return sentence if len(sentence) <= LONGEST else sentence[: LONGEST - 1] + "…"


def in_words(line: Mapping[str, Any]) -> str:
    """One class in one line."""
    found = verdicts(line)
    told = " ".join(f"{name} {one}" for name, one in found.items())
    same = set(found.values())
    what = f"all {same.pop()}" if len(same) == 1 else told
    why = f": {reasons(line)}" if reasons(line) else ""
    return f"{line['kind']:24} {path(line):8} {what}{why} ({line['seconds']} s)"


def counts(found: Found) -> str:
    """How many classes are served in which way."""
    every = Counter(path(line) for line in found.values())
    tried = len(found) - every["apart"]
    inside_right = sum(
        all(verdicts(line).get(name) == "right" for name in ("PLPHP", "Recall"))
        for line in found.values()
        if path(line) != "apart"
    )
    said = Counter(one for line in found.values() for one in verdicts(line).values())
    unknown = said["not told"] + said["not compared"]
    share = f" ({100 * inside_right / tried:.0f} %)" if tried else ""
    return (
        f"{len(found)} classes; {every['apart']} of them were not tried (no images, an encoder of "
        f"their own, no placeholder, not built).\nOf the other {tried}: {every['record']} served "
        f"by a record, {every['generic']} by the self-check, {every['decoder']} by their "
        f"placeholders alone, {every['refused']} refused, {every['faulty']} faulty.\n"
        f"PLPHP and Recall are right on {inside_right}{share}.\nOf all attachments "
        f"{said['right']} are right, {said['refused']} refused, {said['wrong']} wrong, "
        f"{said['traceback']} end in a traceback, {said['late']} are refused only when called; "
        f"{unknown} could not be judged."
    )


def page(found: Found) -> str:
    """The counts, and the tables of all classes."""
    import transformers

    lines = sorted(found.values(), key=lambda one: str(one["kind"]))
    order = ["record", "generic", "decoder", "faulty", "refused"]
    tried = [line for line in lines if path(line) != "apart"]
    out = [f"transformers {transformers.__version__}.", "", counts(found), ""]
    out += [f"| type | class | served | {' | '.join(METHODS)} | why |", "|---" * 9 + "|"]
    for line in sorted(tried, key=lambda one: order.index(path(one))):
        first = [line["kind"], f"`{line['cls']}`", PATHS[line["path"]]]
        out.append(row([*first, *marks(line), reasons(line)]))
    out += ["", "Not tried:", "", "| type | class | why |", "|---|---|---|"]
    out += [
        row([line["kind"], f"`{line['cls']}`", reasons(line)])
        for line in lines
        if path(line) == "apart"
    ]
    return "\n".join(out) + "\n"


def decoders(found: Found) -> str:
    """The counts, and the language models, those on which all is right in one line."""
    import transformers

    lines = sorted(found.values(), key=lambda one: str(one["kind"]))
    tried = [line for line in lines if path(line) != "apart"]
    right = [line for line in tried if set(verdicts(line).values()) == {"right"}]
    names = ", ".join(inside(line) for line in right)
    out = [f"transformers {transformers.__version__}.", "", counts(found), ""]
    out += [f"All five are right on {names}.", ""]
    out += [f"| language model | {' | '.join(METHODS)} | why |", "|---" * 7 + "|"]
    for line in sorted(tried, key=lambda one: path(one) != "faulty"):
        if line not in right:
            out.append(row([inside(line), *marks(line), reasons(line)]))
    return "\n".join(out) + "\n"


def proved() -> str:
    """What the tests prove of each model with a record, from the table that makes them."""
    from vlmprune.hosts.families import PROVED
    from vlmprune.hosts.families.proved import STAGES

    head = ["model", "images", "videos", "both in one prompt", *(one for _, one in STAGES.values())]
    out = [row([*head, "refused, for"]), "|---" * (len(head) + 1) + "|"]
    for one in PROVED.values():
        both = "" if len(one.media) == 1 else "yes" if one.together else "no"
        cells = [
            one.name,
            *("yes" if kind in one.media else "" for kind in ("image", "video")),
            both,
        ]
        cells += ["refused" if stage in one.refused else "yes" for stage in STAGES]
        out.append(row([*cells, "; ".join(dict.fromkeys(one.refused.values()))]))
    return "\n".join(out) + "\n"


def inside(line: Mapping[str, Any]) -> str:
    """The language model of a class that has been given one."""
    return str(line["kind"]).partition(":")[2]


def marks(line: Mapping[str, Any]) -> list[str]:
    """A cell for each method."""
    return [mark(verdicts(line).get(name, "")) for name in METHODS]


def row(cells: Sequence[str]) -> str:
    """A line of a table."""
    return f"| {' | '.join(cell(one) for one in cells)} |"


def mark(verdict: str) -> str:
    """A verdict in a table; faults stand out."""
    if verdict == "refused":
        return "no"
    return f"**{verdict}**" if verdict in FAULTS else verdict


def cell(text: str) -> str:
    """Text that a cell of a table can hold."""
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")


def as_json(found: Found) -> str:
    """All of it, for programs."""
    import transformers

    lines = {"transformers": transformers.__version__, "lines": list(found.values())}
    return json.dumps(lines, indent=1) + "\n"
