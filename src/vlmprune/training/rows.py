"""Rows of a training batch: prompts as the model's processor makes them, then their answers.

A row is one turn: the entry's pictures, its question, its answer. Earlier turns are left out, so
that a row asks what an evaluation asks. Only the answer carries loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from vlmprune.errors import VlmpruneError
from vlmprune.io.models import processed, prompt_of
from vlmprune.io.pictures import open_images, size_of
from vlmprune.io.processors import has_template, image_mark
from vlmprune.training.data import Entry, Turn

IGNORE = -100


@dataclass
class RowMaker:
    """Makes rows for one model.

    Attributes:
        processor: the model's own.
        longest: columns of a row at most.
    """

    processor: Any
    longest: int | None = None
    _runs: dict[tuple[tuple[int, int], ...], list[int] | None] = field(default_factory=dict)
    _known: dict[tuple[int, int], tuple[Tensor, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        token = image_mark(self.processor)
        self.mark: int = self.processor.tokenizer.convert_tokens_to_ids(token)

    def prompt(self, entry: Entry, turn: Turn) -> str:
        """The prompt's text: the pictures, then the question, in the model's own form."""
        return prompt_of(self.processor, len(entry.images), turn.question)

    def answer(self, entry: Entry, turn: Turn) -> str:
        """The answer's text with what ends it."""
        processor, end = self.processor, self.processor.tokenizer.eos_token or ""
        if not has_template(processor):
            return f" {turn.answer}{end}"
        content = [{"type": "image"} for _ in entry.images]
        content.append({"type": "text", "text": turn.question})
        said = [{"role": "user", "content": content}]
        said.append({"role": "assistant", "content": [{"type": "text", "text": turn.answer}]})
        whole: str = processor.apply_chat_template(said)
        prompt = self.prompt(entry, turn)
        # Templates that write something else before an answer in a conversation than they do to
        # ask for one.
        return whole[len(prompt) :].rstrip("\n") if whole.startswith(prompt) else turn.answer + end

    def row(self, entry: Entry, number: int) -> tuple[Tensor, int]:
        """[L] ids of a turn, placeholders spread out, and where its answer begins.

        Raises:
            VlmpruneError: the row is longer than the model can take.
        """
        key = (entry.number, number)
        if key not in self._known:
            turn = entry.turns[number]
            prompt = self._spread(entry, self.prompt(entry, turn))
            answer = self._ids(self.answer(entry, turn))
            ids = torch.cat((prompt, answer))
            if self.longest is not None and len(ids) > self.longest:
                raise VlmpruneError(
                    f"turn {number + 1} of entry {entry.id!r} has {len(ids)} tokens, more than the "
                    f"{self.longest} that the model takes; shorten or leave it out."
                )
            self._known[key] = ids, len(prompt)
        return self._known[key]

    def pixels(self, entries: Sequence[Entry]) -> dict[str, Any]:
        """What the processor makes of the entries' pictures, beside ids."""
        images = [self.opened(entry) for entry in entries]
        texts = [self.prompt(entry, entry.turns[0]) for entry in entries]
        made = self._processed(texts, images)
        return {k: v for k, v in made.items() if k not in ("input_ids", "attention_mask")}

    def opened(self, entry: Entry) -> list[Image.Image]:
        """An entry's pictures, in RGB."""
        return open_images([str(file) for file in entry.images])

    def batch(self, entries: Sequence[Entry], turns: Sequence[Sequence[int]]) -> dict[str, Tensor]:
        """Ids, mask and labels of the entries' turns, padded on the right.

        Args:
            entries: one a picture or set of pictures.
            turns: for each entry the numbers of its turns.

        Returns:
            `input_ids`, `attention_mask` and `labels`, each [B, L], rows entry by entry.
        """
        made = [
            self.row(entry, number)
            for entry, some in zip(entries, turns, strict=True)
            for number in some
        ]
        pad = self.processor.tokenizer.pad_token_id
        pad = self.processor.tokenizer.eos_token_id if pad is None else pad
        ids = pad_sequence([one for one, _ in made], batch_first=True, padding_value=pad)
        lengths = torch.tensor([len(one) for one, _ in made])
        starts = torch.tensor([start for _, start in made])
        columns = torch.arange(ids.shape[1])
        mask = columns < lengths[:, None]
        answers = mask & (columns >= starts[:, None])
        labels = ids.masked_fill(~answers, IGNORE)
        return {"input_ids": ids, "attention_mask": mask.long(), "labels": labels}

    def _ids(self, text: str) -> Tensor:
        ids = self.processor.tokenizer(text, add_special_tokens=False)["input_ids"]
        return torch.tensor(ids, dtype=torch.long)

    def _processed(self, texts: list[str], images: list[list[Image.Image]]) -> Any:
        flat = [picture for some in images for picture in some]
        return processed(
            self.processor, texts, flat, **({"padding": True} if len(texts) > 1 else {})
        )

    def _spread(self, entry: Entry, prompt: str) -> Tensor:
        """[L] ids of a prompt as the processor makes them.

        How far it spreads the placeholders depends on the pictures' sizes alone. So it is asked
        once for each, and where one placeholder became a run of the same, later prompts are
        spread without it.
        """
        plain = torch.tensor(self.processor.tokenizer(prompt)["input_ids"], dtype=torch.long)
        key = tuple(map(size_of, entry.images))
        if key not in self._runs:
            made = self._processed([prompt], [self.opened(entry)])["input_ids"][0]
            self._runs[key] = _runs(plain, made, self.mark)
            return made
        runs = self._runs[key]
        if runs is None:
            return self._processed([prompt], [self.opened(entry)])["input_ids"][0]
        return _repeated(plain, self.mark, runs)


def _repeated(ids: Tensor, mark: int, runs: Sequence[int]) -> Tensor:
    """Ids with each mark repeated as often as its run is long."""
    times = torch.ones_like(ids)
    times[ids == mark] = torch.tensor(runs, dtype=ids.dtype)
    return ids.repeat_interleave(times)


def _runs(plain: Tensor, made: Tensor, mark: int) -> list[int] | None:
    """How long each mark's run is in what a processor made; None where that is not all it did."""
    marks = int((plain == mark).sum())
    total = int((made == mark).sum())
    if not marks or total % marks:
        return None
    # Pictures of one size have runs of one length; others are asked about each time.
    runs = [total // marks] * marks
    return runs if torch.equal(_repeated(plain, mark, runs), made) else None
