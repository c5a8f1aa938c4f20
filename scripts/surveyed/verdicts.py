"""One class: built, asked, and what each method comes to on it."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import transformers
from torch import Tensor

from surveyed import references
from surveyed.asked import Request, UnaskableError, generate, request, said
from surveyed.references import IncomparableError
from surveyed.special import special_of
from surveyed.tiny import built
from vlmprune import PLPHP, FastV, RandomTokens, Recall, VisPruner, VlmpruneError
from vlmprune.hosts import families

TOLERANCE, DIFFERENT = 1e-5, 1e-3
METHODS: dict[str, Callable[[], Any]] = {
    "VisPruner": lambda: VisPruner(keep=0.4),
    "PLPHP": lambda: PLPHP(alpha=0.8, beta=0.6, per_head="adaptive"),
    "Recall": lambda: Recall(read=0.2, floor=0, rest="none", watch="tokens"),
    "FastV": lambda: FastV(keep=0.4, layer=1),
    "RandomTokens": lambda: RandomTokens(keep=0.4),
}

Verdict = Literal["right", "refused", "late", "traceback", "wrong", "not told", "not compared"]


@dataclass
class Finding:
    """What a method came to on a class.

    Attributes:
        verdict: right; refused at attach; late, refused only when called; a traceback; wrong; not
            told, where a control that has to differ does not; not compared, where it attaches and
            runs but there is no reference.
        detail: the sentence, or the figures.
        distance: to the reference, a share of the largest logit.
        control: distance to a reference that keeps as many other tokens.
    """

    verdict: Verdict
    detail: str = ""
    distance: float | None = None
    control: float | None = None


@dataclass
class Line:
    """One class.

    Attributes:
        kind: its `model_type`.
        cls: its name.
        path: "record", "generic", "decoder", "refused", or "" where it was not tried.
        asked: of what the request was.
        why: it was not tried.
        facts: what the class has that a path might need.
        methods: by name.
        seconds: that it took.
    """

    kind: str
    cls: str
    path: str = ""
    asked: str = ""
    why: str = ""
    facts: dict[str, Any] = field(default_factory=dict)
    methods: dict[str, Finding] = field(default_factory=dict)
    seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return asdict(self)


def line_of(kind: str, cls: str) -> Line:
    """Build, ask and judge a class."""
    warnings.simplefilter("ignore")
    line = Line(kind, cls)
    line.why = special_of(kind).get("apart", "") or without_images(cls)
    if line.why:
        return line
    try:
        model, token = built(kind, cls)
    except Exception as error:
        line.why = f"not built: {said(error)}"
        return line
    line.facts = facts(model, token)
    if model.config.is_encoder_decoder:
        line.why = "encoder and decoder: its language model has an encoder of its own"
    asked: Request | None = None
    try:
        asked = request(model, kind, token)
        line.asked = asked.words
    except UnaskableError as error:
        line.why = line.why or f"not asked: {error}"
    for name, make in METHODS.items():
        line.methods[name] = judged(model, asked, make)
    line.path = path_of(model, line.methods)
    return line


def without_images(cls: str) -> str:
    """Why a class is none that answers about images."""
    takes = inspect.signature(getattr(transformers, cls).forward).parameters
    seen = any(word in name for name in takes for word in ("pixel", "image", "patches"))
    return "" if seen else "takes no images"


def path_of(model: Any, found: dict[str, Finding]) -> str:
    """On which way the library serves a class."""
    attached = [name for name, one in found.items() if one.verdict != "refused"]
    if not attached:
        return "refused"
    if families.record_of(model) is not None:
        return "record"
    # What needs no attention goes by placeholders, so that it says nothing of the self-check.
    return "generic" if "VisPruner" in attached else "decoder"


def judged(model: Any, asked: Request | None, make: Callable[[], Any]) -> Finding:
    """What a method comes to on a model."""
    pruner = make()
    try:
        handle = pruner.attach(model)
    except VlmpruneError as error:
        return Finding("refused", str(error))
    except Exception as error:
        return Finding("traceback", f"at attach: {said(error)}")
    try:
        if asked is None:
            return Finding("not compared", "it attaches, but no request could be made")
        try:
            pruned = generate(model, asked.inputs)
            report = handle.report
        except VlmpruneError as error:
            return Finding("late", str(error))
        except Exception as error:
            return Finding("traceback", said(error))
    finally:
        handle.detach()
    try:
        return compared(model, asked, pruner, pruned, report)
    except IncomparableError as error:
        return Finding("not compared", str(error))
    except Exception as error:
        return Finding("not compared", f"the reference fails: {said(error)}")


def compared(model: Any, asked: Request, pruner: Any, pruned: list[Tensor], report: Any) -> Finding:
    """Whether an answer is that of its reference, and not that of a control."""
    if not all(bool(one.isfinite().all()) for one in pruned):
        return Finding("wrong", "its logits are not finite")
    items = items_of(asked, report)
    reference, control = (
        _answer(model, asked, pruner, report, items, exchange) for exchange in (False, True)
    )
    near, far = references.distance(pruned, reference), references.distance(pruned, control)
    if near > TOLERANCE:
        return Finding("wrong", f"{near:.1e} from its reference", near, far)
    if far < DIFFERENT:
        return Finding("not told", f"a control is {far:.1e} away, too", near, far)
    return Finding("right", f"{near:.0e}, a control {far:.0e}", near, far)


Item = tuple[int, list[int]]


def items_of(asked: Request, report: Any) -> list[Item]:
    """Row and columns of each item of a report, which may tell images apart otherwise."""
    left = [(row, column) for row, columns in asked.images for column in columns]
    lengths = [len(layout.labels) for layout in report.layouts]
    if sum(lengths) != len(left):
        raise IncomparableError(f"its report has {sum(lengths)} visual tokens, of {len(left)}")
    out = []
    for length in lengths:
        own, left = left[:length], left[length:]
        out.append((own[0][0], [column for _, column in own]))
    return out


def _answer(
    model: Any, asked: Request, pruner: Any, report: Any, items: list[Item], exchange: bool
) -> list[Tensor]:
    """The reference for one method; with other tokens where it is a control."""
    before = ~asked.visual

    def told(keep: list[list[int]]) -> Tensor:
        """[B, L] from what each item keeps."""
        out = before.clone()
        for (row, columns), own in zip(items, keep, strict=True):
            chosen = others(own, len(columns)) if exchange else own
            out[row, [columns[i] for i in chosen]] = True
        return out

    if isinstance(pruner, PLPHP):
        heads: dict[int, Tensor] = {}
        for layer in report.layers:
            by_row: dict[int, list[int]] = {}
            for row, columns in items:
                by_row.setdefault(row, []).extend(columns)
            mask = before[:, None].repeat(1, len(layer.kept), 1)
            for head, of_rows in enumerate(layer.kept):
                for row, columns in by_row.items():
                    own = of_rows[row].tolist()
                    own = others(own, len(columns)) if exchange else own
                    mask[row, head, [columns[i] for i in own]] = True
            heads |= dict.fromkeys((layer.index, *references.borrowers(model, layer.index)), mask)
        return references.masked(model, asked, references.from_layers(heads, 1))
    if isinstance(pruner, Recall):
        steps = [
            _read(step, report.reading, before, items, exchange) for step in report.reading.steps
        ]
        return references.masked(
            model,
            asked,
            lambda step, layer: steps[step - 1].get(layer) if 0 < step <= len(steps) else None,
        )
    recurrent = references.is_recurrent(model)
    if isinstance(pruner, FastV):
        if recurrent:
            raise IncomparableError("a state that a token left cannot be made whole")
        if report.positions == "compact":
            raise IncomparableError("rows that are renumbered between layers")
        by_layer = {
            one.index: told([kept.tolist() for kept in one.kept])[:, None] for one in report.layers
        }
        return references.masked(model, asked, references.from_layers(by_layer, 0))
    keep = told([kept.tolist() for kept in report.kept])
    compact = report.positions == "compact"
    if recurrent:
        return references.shortened(model, asked, keep, compact)
    seen = references.from_layers(dict.fromkeys(range(999), keep[:, None]), 0)
    return references.masked(model, asked, seen, keep if compact else None)


def _read(
    step: Any, reading: Any, before: Tensor, items: list[Item], exchange: bool
) -> dict[int, Tensor]:
    """What a step saw of the prompt, by layer [B, H, L]."""
    columns: list[dict[int, int]] = [{} for _ in before]
    for image, (_, own) in zip(reading.images, items, strict=True):
        for place, number in zip(image.places.tolist(), image.numbers.tolist(), strict=True):
            columns[image.row][place] = own[number]
    found = {}
    for layer, index in step.index.items():
        rows, heads, _ = index.shape
        mask = before[:, None].repeat(1, heads, 1)
        for row in range(rows):
            total = len(columns[row])
            for head in range(heads):
                read = [i for i in index[row, head].tolist() if i >= 0]
                read = others(read, total) if exchange else read
                mask[row, head, [columns[row][i] for i in read]] = True
        found[layer] = mask
    return found


def others(kept: list[int], total: int) -> list[int]:
    """As many, but others as far as there are."""
    chosen = [i for i in range(total) if i not in set(kept)] + sorted(kept)
    return sorted(chosen[: len(kept)])


def facts(model: Any, token: str | None) -> dict[str, Any]:
    """What a class has that a path might need."""
    base, config = model.base_model, model.config
    text = config.get_text_config(decoder=True)
    kinds = sorted(set(getattr(text, "layer_types", None) or ["full_attention"]))
    out: dict[str, Any] = {
        "placeholder": token,
        "get_image_features": callable(getattr(base, "get_image_features", None)),
        "get_rope_index": callable(getattr(base, "get_rope_index", None)),
        "vision_config": getattr(config, "vision_config", None) is not None,
        "layer_types": kinds,
        "text": str(getattr(text, "model_type", "")),
    }
    marks = {
        "MLA": "kv_lora_rank",
        "deepstack": "deepstack_visual_indexes",
        "per-layer inputs": "hidden_size_per_layer_input",
        "shared KV": "num_kv_shared_layers",
        "soft cap": "attn_logit_softcapping",
    }
    parts = (config, text, getattr(config, "vision_config", None))
    out["marks"] = [m for m, n in marks.items() if any(getattr(part, n, None) for part in parts)]
    names = [name for name, _ in model.named_parameters()]
    if any(name.endswith(("sinks", "sink", "s_aux")) for name in names):
        out["marks"].append("sinks")
    try:
        out["decoder"] = type(references.decoder_of(model)[0]).__name__
        out["recurrent"] = references.is_recurrent(model)
    except Exception as error:
        out["decoder"] = said(error)
    return out
