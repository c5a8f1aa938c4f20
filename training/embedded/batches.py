"""Batches: pictures' features, questions packed into rows, and the dense labels of every patch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from decoder import PREFIX
from export import ASSISTANT, EOS, USER
from features import Features
from questions import BALANCE, KINDS, Question, ask, encode
from scenes import CELL, GRID, NAMES, PATCH, PATCHES, Placed
from torch import Tensor

IGNORE = -100
ROW = 64
"""Tokens of one packed row of questions."""


@dataclass
class Batch:
    """One step's tensors.

    Attributes:
        features: `[B, 256, 384]` float32.
        tokens, positions: `[B * rows, ROW]`.
        mask: `[B * rows, 1, ROW, 257 + ROW]` float, 0 or minus infinity.
        targets: `[B * rows, ROW]`, the next token inside answers, else -100.
        block: `[B * rows, ROW]`, number of the question in `questions`, -1 for padding.
        point: `[B * rows, ROW, 257]` bool, where answer tokens should look: the patches of the
            question's cells, or `USER:` if there are none.
        spread: `[B * rows, ROW, 257]` bool, `USER:` and one patch of every cell to be counted.
        dense: label arrays `[B, 256]` by name, -100 where there is none.
        questions: the questions, in order of `block`.
    """

    features: Tensor
    tokens: Tensor
    positions: Tensor
    mask: Tensor
    targets: Tensor
    block: Tensor
    point: Tensor
    spread: Tensor
    dense: dict[str, Tensor]
    questions: list[Question]

    def to(self, device: torch.device) -> Batch:
        """The same batch on another device."""
        moved = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor)}
        dense = {k: v.to(device) for k, v in self.dense.items()}
        return Batch(**moved, dense=dense, questions=self.questions)


def dense_labels(placed: Sequence[Placed], cover: np.ndarray, half: np.ndarray) -> dict:
    """Labels `[256]` of a scene's patches, for the projector and the middle layer.

    `cover` names what covers the patch and `digit` the digit on it; `row`, `column` say its cell,
    `phase` its place inside the cell. `own` is what the cell holds (where enough of it has been
    read), `left` and `above` what the neighbours hold, `tens` and `units` a sign's number; these
    last four only where something covers the patch.
    """
    step, inside = np.divmod(np.arange(PATCHES), CELL // PATCH)
    row, column = np.repeat(step[:, None], PATCHES, 1), np.repeat(step[None, :], PATCHES, 0)
    grid = np.zeros((GRID + 1, GRID + 1), dtype=np.int64)
    numbers = np.zeros((GRID, GRID), dtype=np.int64)
    for thing in placed:
        grid[thing.row, thing.column] = 1 + NAMES.index(thing.name)
        numbers[thing.row, thing.column] = thing.number or 0
    covered = cover > 0
    bottom = np.arange(PATCHES)[:, None] % (CELL // PATCH) == CELL // PATCH - 1
    number = numbers[row, column]
    sign = covered & (number > 0)
    digit = np.where(half == 1, number // 10, number % 10)

    def where(chosen: np.ndarray, values: np.ndarray) -> np.ndarray:
        return np.where(chosen, values, IGNORE).reshape(-1)

    return {
        "cover": cover.astype(np.int64).reshape(-1),
        "digit": where(half > 0, digit),
        "row": row.reshape(-1),
        "column": column.reshape(-1),
        "own": where(bottom | covered, grid[row, column]),
        "left": where(covered, grid[row, column - 1]),
        "above": where(covered, grid[row - 1, column]),
        "phase": (inside[:, None] * (CELL // PATCH) + inside[None, :]).reshape(-1),
        "tens": where(sign, number // 10),
        "units": where(sign, number % 10),
    }


def pack(blocks: Sequence[tuple[list[int], int]], rows: int, first: int) -> tuple | None:
    """Lay question blocks into rows of one picture, first fit; `None` once one fits nowhere.

    Args:
        blocks: per question its tokens (question, `ASSISTANT:`, answer, end) and answer start.
        rows: how many rows.
        first: number of the first question.
    """
    tokens = np.zeros((rows, ROW), dtype=np.int64)
    positions = np.full((rows, ROW), PREFIX, dtype=np.int64)
    targets = np.full((rows, ROW), IGNORE, dtype=np.int64)
    block = np.full((rows, ROW), -1, dtype=np.int64)
    used = [0] * rows
    for number, (ids, answer) in enumerate(blocks):
        length = len(ids) - 1
        row = next((r for r in range(rows) if used[r] + length <= ROW), None)
        if row is None:
            return None
        at = used[row]
        tokens[row, at : at + length] = ids[:-1]
        positions[row, at : at + length] = PREFIX + np.arange(length)
        targets[row, at + answer - 1 : at + length] = ids[answer:]
        block[row, at : at + length] = first + number
        used[row] += length
    return tokens, positions, targets, block


def looks(question: Question, cover: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where each answer token of a question should look, and what a counting head should see.

    Returns:
        `[n, 257]` bool for each predicted token (one row serves all, but for descriptions, whose
        every second token is a cell), and `[257]` bool, all false for what is not counted.
    """
    size = CELL // PATCH
    maps = np.zeros((len(question.cells), PREFIX), dtype=bool)
    spread = np.zeros(PREFIX, dtype=bool)
    for number, (row, column) in enumerate(question.cells):
        inside = np.zeros((PATCHES, PATCHES), dtype=bool)
        inside[row * size : (row + 1) * size, column * size : (column + 1) * size] = True
        covered = inside & (cover > 0)
        if not covered.any():
            inside[: (row + 1) * size - 1] = False
            covered = inside
        maps[number, 1:] = covered.reshape(-1)
        spread[1 + ((row + 1) * size - 1) * PATCHES + (column + 1) * size - 1] = True
    counted = question.kind in ("count", "presence")
    spread[0] = True
    if question.kind != "describe":
        maps = maps.any(0, keepdims=True)
        maps[0, 0] = not question.cells
    return maps, spread & counted


class Batcher:
    """Makes batches out of cached scenes.

    Args:
        data: the scenes.
        words: token number by word.
        rows: rows of packed questions per picture.
    """

    def __init__(self, data: Features, words: dict[str, int], rows: int) -> None:
        self.data, self.words, self.rows = data, words, rows
        self.labels = [
            dense_labels(*scene) for scene in zip(data.placed, data.cover, data.half, strict=True)
        ]
        self.user = torch.tensor(words[USER])
        causal = torch.ones(ROW, ROW, dtype=torch.bool).tril()
        self.causal = causal[None]

    def block(self, question: Question) -> tuple[list[int], int]:
        """Tokens of a question with its answer, and where the answer starts."""
        words = self.words
        ids = [*encode(question.text, words), words[ASSISTANT]]
        return [*ids, *encode(question.answer, words), words[EOS]], len(ids)

    def draw(
        self, index: int, rng: np.random.Generator, mixture: dict[str, float], describe: float
    ) -> list[Question]:
        """Questions that fill the rows of one picture, kinds by `mixture`."""
        placed = self.data.placed[index]
        kinds, shares = [*mixture], np.array([*mixture.values()])
        shares = shares / shares.sum()
        found: list[Question] = []
        blocks: list[tuple[list[int], int]] = []
        if rng.random() < describe:
            found.append(ask("describe", placed, rng))
            blocks.append(self.block(found[0]))
        misses = 0
        while misses < 3:
            question = ask(str(rng.choice(kinds, p=shares)), placed, rng)
            if question is None or question in found:
                misses += 1
                continue
            block = self.block(question)
            if pack([*blocks, block], self.rows, 0) is None:
                break
            found.append(question)
            blocks.append(block)
        return found

    def batch(self, indices: Sequence[int], questions: Sequence[Sequence[Question]]) -> Batch:
        """The tensors for these scenes with these questions (each list must fit its rows)."""
        parts, first, flat = [], 0, []
        for asked in questions:
            packed = pack([self.block(q) for q in asked], self.rows, first)
            if packed is None:
                raise ValueError("more questions than the rows hold")
            parts.append(packed)
            first += len(asked)
            flat += asked
        tokens, positions, targets, block = (
            torch.from_numpy(np.concatenate(p)) for p in zip(*parts, strict=True)
        )
        same = (block[:, :, None] == block[:, None, :]) & self.causal
        allowed = torch.cat([torch.ones(*block.shape, PREFIX, dtype=torch.bool), same], dim=-1)
        mask = torch.zeros(allowed.shape).masked_fill_(~allowed, float("-inf"))[:, None]
        point = np.zeros((*block.shape, PREFIX), dtype=bool)
        spread = np.zeros_like(point)
        homes = [i for i, asked in zip(indices, questions, strict=True) for _ in asked]
        for number, question in enumerate(flat):
            maps, counted = looks(question, self.data.cover[homes[number]])
            where = ((block == number) & (targets != IGNORE)).nonzero().numpy()
            if question.kind == "describe":
                where = where[: 2 * len(maps) : 2]
            point[where[:, 0], where[:, 1]] = maps
            spread[where[:1, 0], where[:1, 1]] = counted
        features = self.data.take(indices)
        names = self.labels[0]
        dense = {k: torch.from_numpy(np.stack([self.labels[i][k] for i in indices])) for k in names}
        aims = torch.from_numpy(point), torch.from_numpy(spread)
        return Batch(features, tokens, positions, mask, targets, block, *aims, dense, flat)


def fixed_questions(data: Features, seed: int, per_kind: int = 1) -> list[list[Question]]:
    """The same balanced questions each time: `per_kind` of each kind a scene, where it allows."""
    rng = np.random.default_rng([seed, 99])
    asked = []
    for number, placed in enumerate(data.placed):
        found: list[Question] = []
        for turn in range(per_kind):
            for kind in KINDS:
                want = (number * per_kind + turn) % BALANCE[kind] if kind in BALANCE else None
                if kind in ("at", "left", "above") and want is not None:
                    want = min(want, 1)
                question = ask(kind, placed, rng, want)
                if question is not None and question not in found:
                    found.append(question)
        asked.append(found)
    return asked
