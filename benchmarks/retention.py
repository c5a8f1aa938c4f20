"""Accuracy against what PLPHP keeps, on the embedded model's held-out scenes.

    python benchmarks/retention.py --assets ASSETS --json retention.json

The test scenes and questions are those of `training/embedded/evaluate.py`; ASSETS is any folder,
into which npm fetches the symbols. Inputs come from the stock processor, answers from the stock
`generate`, greedy, in batches padded on the left. alpha and beta are calibrated on validation
scenes. Every retention rate is answered by

- PLPHP with calibrated thresholds, asking the last token, and asking the last eight;
- controls that keep as many bytes: the same rates, but random tokens; one rate for all layers,
  namely the mean that PLPHP came to;

and some of them by default thresholds, by one budget a layer shared among its heads
(`per_head="adaptive"`), and, as another control, by one choice for all heads of a layer.

Pictures are encoded once and kept, for PLPHP sees them after the encoder; rows with VisPruner
encode afresh. Intervals are bootstrapped over scenes, with the same draws in every row.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import numpy as np
import torch
import transformers
import typer
from rich.progress import Progress
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput

from vlmprune import PLPHP, Pruner, VisPruner, calibrate, embedded
from vlmprune.files import write
from vlmprune.report import Report
from vlmprune.select import retention
from vlmprune.views import LayerView, Retention

sys.path.insert(0, str(Path(__file__).parents[1] / "training" / "embedded"))

from assets import Assets
from batches import fixed_questions
from evaluate import LONGEST, cells_right, literal
from features import SEEDS, photos
from questions import KINDS, Question, prompt, right
from scenes import scene

RATES = (0.7, 0.5, 0.4, 0.3, 0.2, 0.1, 0.05)
CHOSEN = (0.4, 0.2, 0.1)
"""Rates at which there are more variants."""
WIDE = 8
"""Window of one variant: the prompt's last tokens, the question's words among them."""
FULL, PLAIN, WIDER = "full model", "PLPHP", f"PLPHP, window={WIDE}"
CELLS = "describe, per cell"
DRAWS = 2000


def spread(r: float) -> float:
    """dr for a rate: three quarters of the way to 0 or 1, as the default 0.3 is at r=0.4."""
    return round(min(0.3, 0.75 * r, 0.75 * (1 - r)), 4)


@dataclass(frozen=True)
class RandomTokens(PLPHP):
    """Control: PLPHP's rates, but each head keeps random tokens of each image."""

    generator: torch.Generator = field(
        default_factory=lambda: torch.Generator().manual_seed(0), repr=False, compare=False
    )

    def retain(self, layer: int, view: LayerView) -> Retention | None:
        """As many tokens as PLPHP keeps, drawn afresh for each sample, layer and head."""
        found = super().retain(layer, view)
        if found is None:
            return None
        drawn = torch.rand(found.kept.shape, generator=self.generator)
        return replace(found, kept=retention.per_image(drawn, view.images, _kept(found, view)))


@dataclass(frozen=True)
class OneChoice(PLPHP):
    """Control: PLPHP's rates, but all heads of a layer keep the same tokens."""

    def retain(self, layer: int, view: LayerView) -> Retention | None:
        """The tokens that the layer's heads attend to most on average."""
        found = super().retain(layer, view)
        if found is None:
            return None
        scores = view.attention.mean(dim=1, keepdim=True).expand(found.kept.shape)
        return replace(found, kept=retention.per_image(scores, view.images, _kept(found, view)))


def _kept(found: Retention, view: LayerView) -> Tensor:
    """[B, I] tokens that the first head keeps of each image; the others keep as many."""
    counts = torch.zeros_like(view.counts)
    return counts.scatter_add(1, view.images.clamp(min=0), found.kept[:, 0].long())


@dataclass
class Asked:
    """Questions about scenes, batch by batch.

    Attributes:
        questions: all of them, with the number of their scene, in the batches' order.
        batches: the processor's inputs.
    """

    questions: list[tuple[int, Question]]
    batches: list[Any]


@dataclass
class Answers:
    """What one way of answering gave.

    Attributes:
        texts: the answers, in the questions' order.
        first: their first tokens.
        kv_share: bytes of the visual tokens' keys and values, relative to the full model's.
        rates: [questions, layers] retention rates asked for; None where nothing was cut.
        seconds: for all of them, which says nothing about speed.
    """

    texts: list[str]
    first: list[int]
    kv_share: float
    rates: np.ndarray | None
    seconds: float


def ask(processor: Any, assets: Assets, split: str, amount: int, batch: int) -> Asked:
    """The fixed questions about the first scenes of a set, long answers apart from short ones."""
    made = [scene(i, SEEDS[split], photos(split), assets) for i in range(amount)]
    listed = fixed_questions(SimpleNamespace(placed=[one.placed for one in made]), SEEDS[split])
    pairs = [(i, question) for i, some in enumerate(listed) for question in some]
    questions, batches = [], []
    for long in (False, True):
        these = [pair for pair in pairs if (pair[1].kind == "describe") == long]
        for start in range(0, len(these), batch):
            some = these[start : start + batch]
            texts = [prompt(question.text) for _, question in some]
            images = [made[i].image for i, _ in some]
            batches.append(processor(text=texts, images=images, return_tensors="pt", padding=True))
            questions += some
    return Asked(questions, batches)


@contextmanager
def encoded_once(model: Any, seen: dict[bytes, Tensor]) -> Iterator[None]:
    """Keep what the vision tower makes of each picture; the projector and all else still run.

    Args:
        model: the embedded model.
        seen: what it made of pictures so far; filled.
    """
    tower = model.model.vision_tower
    original = tower.forward
    chosen = model.config.vision_feature_layer

    def forward(pixel_values: Tensor, **kwargs: Any) -> BaseModelOutput:
        rows = []
        for one in pixel_values:
            key = hashlib.blake2b(one.numpy().tobytes()).digest()
            if key not in seen:
                out = original(one[None], **kwargs)
                seen[key] = out.hidden_states[chosen]
            rows.append(seen[key])
        states = torch.cat(rows)
        # Only the state that the model uses is looked at.
        return BaseModelOutput(last_hidden_state=states, hidden_states=(states,) * -chosen)

    tower.forward = forward
    try:
        yield
    finally:
        del tower.forward


def answer(
    model: Any, processor: Any, pruner: Pruner | None, asked: Asked, say: Callable[[], None]
) -> Answers:
    """Answers to all questions with a pruner attached, or with none."""
    texts: list[str] = []
    first: list[int] = []
    reports: list[Report] = []
    begin = time.perf_counter()
    handle = None if pruner is None else pruner.attach(model)
    try:
        for inputs in asked.batches:
            out = model.generate(**inputs, max_new_tokens=LONGEST, do_sample=False)
            new = out[:, inputs["input_ids"].shape[1] :]
            first += new[:, 0].tolist()
            decoded = processor.batch_decode(new, skip_special_tokens=True)
            texts += [text.strip() for text in decoded]
            if handle is not None:
                reports.append(handle.report)
            say()
    finally:
        if handle is not None:
            handle.detach()
    share, rates = 1.0, None
    if reports:
        # Before any pruning all visual tokens of all questions would be there.
        share = sum(r.kv_bytes_after for r in reports) / sum(r.kv_bytes_before for r in reports)
        if reports[0].layers:
            rates = np.concatenate(
                [np.array([layer.retention for layer in r.layers]).T for r in reports]
            )
    return Answers(texts, first, share, rates, time.perf_counter() - begin)


class Scores:
    """Accuracy by kind with bootstrap intervals over scenes.

    Args:
        asked: the questions.
        scenes: how many scenes there are.
    """

    def __init__(self, asked: Asked, scenes: int) -> None:
        self.asked, self.scenes = asked, scenes
        drawn = np.random.default_rng(0).integers(scenes, size=(DRAWS, scenes))
        self.times = np.stack([np.bincount(row, minlength=scenes) for row in drawn])

    def of(self, texts: Sequence[str]) -> dict[str, np.ndarray]:
        """For each kind, [2, scenes]: what is right in each scene, and how much was asked."""
        kinds = (*KINDS, CELLS, "more than one word", "one word", "all")
        found = {kind: np.zeros((2, self.scenes)) for kind in kinds}
        for (number, question), text in zip(self.asked.questions, texts, strict=True):
            hit = float(right(question, text))
            several = len(words(question)) > 1
            for kind in (question.kind, "more than one word" if several else "one word", "all"):
                found[kind][:, number] += hit, 1
            if question.kind == "describe":
                found[CELLS][:, number] += cells_right(question, text), 1
        return found

    def summary(self, found: dict[str, np.ndarray]) -> dict[str, list[float]]:
        """For each kind (accuracy, lower, upper end of its 95 % interval)."""
        return {
            kind: self._interval(one[0].sum() / one[1].sum(), self._draws(one))
            for kind, one in found.items()
        }

    def difference(
        self, found: dict[str, np.ndarray], other: dict[str, np.ndarray]
    ) -> dict[str, list[float]]:
        """The same for how much more accurate one way is than another on the same scenes."""
        return {
            kind: self._interval(
                one[0].sum() / one[1].sum() - other[kind][0].sum() / other[kind][1].sum(),
                self._draws(one) - self._draws(other[kind]),
            )
            for kind, one in found.items()
        }

    def _draws(self, one: np.ndarray) -> np.ndarray:
        hits, asked = self.times @ one[0], self.times @ one[1]
        return hits / np.maximum(asked, 1)

    @staticmethod
    def _interval(value: float, draws: np.ndarray) -> list[float]:
        low, high = np.quantile(draws, [0.025, 0.975])
        return [round(float(x), 4) for x in (value, low, high)]


def words(question: Question) -> list[str]:
    """The words of the true answer."""
    return re.findall(r"\w+", question.answer)


def about_kinds(asked: Asked, tokenizer: Any) -> dict[str, dict[str, float]]:
    """How long the true answers of each kind are."""
    table = {}
    for kind in (*KINDS, "all"):
        these = [q for _, q in asked.questions if kind in (q.kind, "all")]
        lengths = [len(tokenizer(q.answer)["input_ids"]) for q in these]
        # The tokenizer puts a start token in front of a text, where an answer has an end token.
        lengths = [
            n + (tokenizer(q.answer)["input_ids"][0] != tokenizer.bos_token_id)
            for n, q in zip(lengths, these, strict=True)
        ]
        table[kind] = {
            "questions": len(these),
            "share of more than one word": round(
                float(np.mean([len(words(q)) > 1 for q in these])), 4
            ),
            "mean tokens, end token included": round(float(np.mean(lengths)), 2),
        }
    return table


def ways(thresholds: dict[int, tuple[float, float]]) -> Iterator[tuple[str, float, Any]]:
    """Name, r and pruner of every row but the full model.

    A callable instead of a pruner makes one from the visual KV that PLPHP kept at the same r.

    Args:
        thresholds: (alpha, beta) by window.
    """
    alpha, beta = thresholds[1]
    for r in RATES:
        common = {"r": r, "dr": spread(r)}
        calibrated = {**common, "alpha": alpha, "beta": beta}
        yield PLAIN, r, PLPHP(**calibrated)
        yield "control: random tokens", r, RandomTokens(**calibrated)
        yield "control: one rate for all layers", r, lambda share: PLPHP(r=share, dr=0.0)
        upper, lower = thresholds[WIDE]
        yield WIDER, r, PLPHP(**common, alpha=upper, beta=lower, window=WIDE)
        if r in CHOSEN:
            yield "PLPHP, default thresholds", r, PLPHP(**common)
            yield "PLPHP, adaptive heads", r, PLPHP(**calibrated, per_head="adaptive")
            yield "control: one choice for all heads", r, OneChoice(**calibrated)
    before = VisPruner(keep=128)
    yield repr_short(before), 1.0, before
    default = PLPHP(alpha=alpha, beta=beta)
    yield f"{repr_short(before)} and then PLPHP", default.r, before | default


def repr_short(pruner: VisPruner) -> str:
    """The one setting that matters here."""
    return f"VisPruner(keep={pruner.keep})"


def measure(
    model: Any, processor: Any, assets: Assets, scenes: int, fitting: int, batch: int, check: int
) -> tuple[dict[str, Any], calibrate.Gammas]:
    """All figures, and γ on the validation scenes."""
    with Progress() as bar:
        line = bar.add_task("making scenes", total=None)
        asked = ask(processor, assets, "test", scenes, batch)
        fit = ask(processor, assets, "validation", fitting, batch)
        pictures: dict[bytes, Tensor] = {}
        with encoded_once(model, pictures):
            bar.update(line, description="calibrating")
            gammas = calibrate.measure(model, fit.batches)
            wide = calibrate.measure(model, fit.batches, window=WIDE)
        found_at = {1: calibrate.thresholds(gammas), WIDE: calibrate.thresholds(wide)}
        planned = list(ways(found_at))
        bar.update(line, total=len(asked.batches) * (len(planned) + 1))

        scores = Scores(asked, scenes)
        found: dict[tuple[str, float], dict[str, np.ndarray]] = {}
        rows: list[dict[str, Any]] = []
        full: Answers | None = None
        shares: dict[float, float] = {}
        for name, r, pruner in [(FULL, 1.0, None), *planned]:
            bar.update(line, description=f"{name}, r={r:g}")
            if callable(pruner) and not isinstance(pruner, Pruner):
                pruner = pruner(shares[r])

            def run(pruner: Pruner | None = pruner) -> Answers:
                return answer(model, processor, pruner, asked, lambda: bar.advance(line))

            if pruner is not None and pruner.shortens:
                got = run()
            else:
                with encoded_once(model, pictures):
                    got = run()
            full = full or got
            if name == PLAIN:
                shares[r] = got.kv_share
            found[name, r] = scores.of(got.texts)
            same = [a == b for a, b in zip(got.texts, full.texts, strict=True)]
            begins = [a == b for a, b in zip(got.first, full.first, strict=True)]
            rows.append(
                {
                    "name": name,
                    "pruner": repr(pruner),
                    "r": r,
                    "kv_share": round(got.kv_share, 4),
                    "rate_by_layer": None
                    if got.rates is None
                    else got.rates.mean(axis=0).round(4).tolist(),
                    "first_token_same": float(np.mean(begins)),
                    "answer_same": round(float(np.mean(same)), 4),
                    "accuracy": scores.summary(found[name, r]),
                    "minus_full": scores.difference(found[name, r], found[FULL, 1.0]),
                    "seconds": round(got.seconds, 1),
                }
            )
    for row in rows:
        if row["name"].startswith("control"):
            other = found[row["name"], row["r"]]
            row["minus_this"] = {
                name: scores.difference(found[name, row["r"]], other) for name in (PLAIN, WIDER)
            }
    # Without the kept encodings and without batches nothing may change.
    made = [scene(i, SEEDS["test"], photos("test"), assets) for i in range(check)]
    assert full is not None
    equal = [
        literal(model, processor, made[number].image, question) == text
        for (number, question), text in zip(asked.questions, full.texts, strict=True)
        if number < check
    ]
    result = {
        "scenes": scenes,
        "questions": len(asked.questions),
        "calibration_scenes": fitting,
        "calibration_questions": len(gammas),
        "alpha": found_at[1][0],
        "beta": found_at[1][1],
        "wide_window": {"window": WIDE, "alpha": found_at[WIDE][0], "beta": found_at[WIDE][1]},
        "kinds": about_kinds(asked, processor.tokenizer),
        "also_by_plain_generate": len(equal),
        "of_these_equal": sum(equal),
        "rows": rows,
    }
    return result, gammas


def show(result: dict[str, Any]) -> str:
    """The results as tables in Markdown."""

    def per_cent(three: Sequence[float], signed: bool = False) -> str:
        value, low, high = (f"{100 * x:{'+' if signed else ''}.1f}" for x in three)
        return f"{value} ({low} to {high})"

    kinds = ("describe", "where", "read", "at", "left", "above", "presence", "count")
    lines = [
        "| kind | questions | answers of more than one word | mean tokens |",
        "|---|---|---|---|",
    ]
    for kind, one in result["kinds"].items():
        share, tokens = one["share of more than one word"], one["mean tokens, end token included"]
        lines.append(f"| {kind} | {one['questions']} | {share:.0%} | {tokens:.1f} |")
    lines += ["", "| way | r | visual KV | cells of `describe` | more than one word | one word |"]
    lines += ["|---|---|---|---|---|---|"]
    for row in result["rows"]:
        got = row["accuracy"]
        lines.append(
            f"| {row['name']} | {row['r']:g} | {row['kv_share']:.1%} | {per_cent(got[CELLS])} "
            f"| {per_cent(got['more than one word'])} | {per_cent(got['one word'])} |"
        )
    lines += ["", f"| way | r | {' | '.join(kinds)} | first token | same answer |"]
    lines += ["|---" * (4 + len(kinds)) + "|"]
    for row in result["rows"]:
        cells = " | ".join(f"{100 * row['accuracy'][kind][0]:.1f}" for kind in kinds)
        lines.append(
            f"| {row['name']} | {row['r']:g} | {cells} | {row['first_token_same']:.1%} "
            f"| {row['answer_same']:.1%} |"
        )
    lines += ["", "| way | minus control | r | cells of `describe` | more than one word |"]
    lines += ["|---|---|---|---|---|"]
    for row in result["rows"]:
        for name, gain in row.get("minus_this", {}).items():
            lines.append(
                f"| {name} | {row['name'].removeprefix('control: ')} | {row['r']:g} "
                f"| {per_cent(gain[CELLS], True)} | {per_cent(gain['more than one word'], True)} |"
            )
    return "\n".join(lines)


@torch.inference_mode()
def main(
    assets: Annotated[Path, typer.Option(help="Folder of the symbols, fetched if absent.")],
    scenes: Annotated[int, typer.Option(help="Test scenes, up to eight questions each.")] = 80,
    fitting: Annotated[int, typer.Option(help="Validation scenes for the calibration.")] = 100,
    batch: Annotated[int, typer.Option(help="Questions answered at once.")] = 16,
    check: Annotated[int, typer.Option(help="Scenes answered by plain generate, too.")] = 3,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write all figures.")] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw vision attention by layer as PNG.")
    ] = None,
) -> None:
    """Accuracy of the embedded model by method and retention rate."""
    for path in (json_path, plot):
        if path is not None:
            calibrate.check_target(path)
    begin = time.perf_counter()
    model, processor = embedded.load()
    result, gammas = measure(model, processor, Assets(assets), scenes, fitting, batch, check)
    result |= {
        "seconds": round(time.perf_counter() - begin),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    alpha, beta = result["alpha"], result["beta"]
    result["calibration"] = calibrate.document(gammas, alpha, beta, "embedded model", 0.25, 0.75)
    if json_path is not None:
        write(json_path, json.dumps(result, indent=1) + "\n")
    if plot is not None:
        pruner = PLPHP(alpha=alpha, beta=beta)
        title = f"Embedded model, {len(gammas)} questions: how much of the attention is the image's"
        calibrate.plot(gammas, pruner, plot, title)
    typer.echo(show(result))
    typer.echo(f"\nalpha={alpha}, beta={beta}; {result['seconds']} s")


if __name__ == "__main__":
    typer.run(main)
