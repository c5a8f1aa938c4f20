"""lmms-eval's model class: `lmms-eval eval --model vlmprune --model_args method=vispruner,keep=64`.

Needs lmms-eval, which imports this by the name in `lmms_eval.manifest`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from tqdm import tqdm

from vlmprune.errors import VlmpruneError
from vlmprune.integrations import arguments
from vlmprune.integrations.answering import (
    Answerer,
    Conversation,
    Spent,
    conversation,
    cut,
    generation,
)


class Vlmprune(lmms):
    """A model on stock Transformers, pruned by any method of this package, or as it is.

    Attributes:
        arguments: as they were given, read.
        answerer: model and pruner.
    """

    is_simple = False

    def __init__(self, **given: Any) -> None:
        """Read the arguments, load the model, attach the pruner.

        Args:
            given: model_args by name: those of `arguments.NAMES`, and settings of the method.

        Raises:
            VlmpruneError: an argument is unknown or refused, or there is no such model.
        """
        super().__init__()
        given = dict(given)
        # One process a GPU, as accelerate and torchrun start them.
        rank = os.environ.get("LOCAL_RANK")
        own = given.get("device") in (None, "", "cuda") and rank is not None
        if own and int(os.environ.get("WORLD_SIZE", "1")) > 1 and torch.cuda.is_available():
            given["device"] = f"cuda:{rank}"
        self.arguments = arguments.read(given)
        self.answerer = Answerer(self.arguments)

    @classmethod
    def create_from_arg_string(
        cls, arg_string: str, additional_config: dict[str, Any] | None = None
    ) -> Vlmprune:
        """The model for the text after --model_args and the harness's own options.

        Raises:
            VlmpruneError: an argument is unknown, refused or given twice with different values.
        """
        given: dict[str, Any] = dict(arguments.split(arg_string))
        for name, value in (additional_config or {}).items():
            if value is None:
                continue
            # The harness gives its own default of 1 whether or not anybody asked for it.
            default = name == "batch_size" and str(value) == "1"
            if name in given and not default and given[name] != str(value):
                raise VlmpruneError(
                    f"{name} is given twice, as {given[name]} in --model_args and as {value} by "
                    f"--{name}; give it once."
                )
            given.setdefault(name, value)
        return cls(**given)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.answerer.device

    @property
    def batch_size(self) -> int:
        """Requests answered at once."""
        return self.arguments.batch_size

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Answers to requests, in their order.

        Requests with the same generation settings are batched, padded on the left; those with and
        those without pictures apart.

        Raises:
            VlmpruneError: a request holds something that cannot be answered here.
        """
        limit = self.arguments.max_new_tokens
        # lmms-eval adds up what each call logs.
        self.answerer.spent = Spent()
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(repr(self._settings(request)), []).append(number)
        answers = [""] * len(requests)
        with tqdm(total=len(requests), disable=self.rank != 0, desc="vlmprune") as bar:
            for numbers in groups.values():
                settings = self._settings(requests[numbers[0]]) or {}
                chosen = generation(settings, limit)
                for batch in self._batches(requests, numbers):
                    texts = self.answerer.answer([one for _, one in batch], chosen)
                    for (number, _), text in zip(batch, texts, strict=True):
                        answers[number] = cut(text, settings.get("until"))
                        context = requests[number].args[0]
                        self.cache_hook.add_partial(
                            "generate_until", (context, settings), answers[number]
                        )
                    bar.update(len(batch))
        self._log()
        return answers

    def _settings(self, request: Any) -> Any:
        """The generation settings of a request."""
        return request.args[2]

    def _conversation(self, request: Any) -> Conversation:
        """What a request asks."""
        _, to_messages, _, doc_id, task, split = request.args
        return conversation(to_messages(self.task_dict[task][split][doc_id]))

    def _batches(self, requests: Sequence[Any], numbers: list[int]) -> Any:
        """Requests with their numbers, a batch at a time; pictures are opened when needed."""
        waiting: dict[bool, list[Any]] = {True: [], False: []}
        for number in numbers:
            one = self._conversation(requests[number])
            some = waiting[bool(one.images)]
            some.append((number, one))
            if len(some) == self.batch_size:
                yield list(some)
                some.clear()
        yield from (some for some in waiting.values() if some)

    def _log(self) -> None:
        spent = self.answerer.spent
        more: dict[str, float] = {}
        if self.answerer.handle is not None:
            names = ("visual_tokens", "visual_tokens_before", "kv_bytes", "kv_bytes_before")
            found = {name: getattr(spent, name) for name in names}
            # What the model's config does not tell is left out, as its log holds numbers alone.
            more = {name: value for name, value in found.items() if not math.isnan(value)}
        log_metrics(
            total_elapsed_time=spent.seconds,
            total_gen_tokens=spent.tokens,
            avg_speed=spent.tokens / spent.seconds if spent.seconds else 0.0,
            additional_metrics=more,
        )

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """How likely the model finds continuations, in the order of the requests.

        As its own models do, of each the mean loss of a token, of which lmms-eval takes the lowest
        for the answer, and whether greedy decoding would write it.

        Raises:
            VlmpruneError: a request holds something that cannot be answered here.
        """
        found = []
        for request in tqdm(requests, disable=self.rank != 0, desc="vlmprune"):
            one = self.answerer.likelihood(*self._continued(request))
            found.append((-one.log_probability / one.tokens, one.greedy))
        return found

    def _continued(self, request: Any) -> tuple[Conversation, str]:
        """What a request asks, and the answer that it gives."""
        context, continuation, *rest = request.args
        pictures: list[Any] = []
        if rest:
            to_visual, doc_id, task, split = rest
            doc = self.task_dict[task][split][doc_id]
            pictures = _pictures(to_visual, doc)
            if callable(continuation):
                continuation = continuation(doc)
        return _turn(context, pictures), str(continuation)

    def generate_until_multi_round(self, requests: Sequence[Any]) -> NoReturn:
        """Refused.

        Raises:
            VlmpruneError: always.
        """
        raise VlmpruneError(
            "vlmprune answers no requests of several rounds; use tasks whose output_type is "
            "generate_until."
        )

    def clean(self) -> None:
        """Give up the pruner and the model's memory, as lmms-eval asks once all is answered."""
        self.answerer.close()
        del self.answerer.loaded
        super().clean()


class VlmpruneSimple(Vlmprune):
    """The same for `--force_simple`, under which lmms-eval gives a text and its pictures.

    Tasks whose output_type is loglikelihood or multiple_choice run so alone.
    """

    is_simple = True

    def _settings(self, request: Any) -> Any:
        return request.args[1]

    def _conversation(self, request: Any) -> Conversation:
        context, _, to_visual, doc_id, task, split = request.args
        return _turn(context, _pictures(to_visual, self.task_dict[task][split][doc_id]))


def _turn(text: str, pictures: Sequence[Any]) -> Conversation:
    """A conversation of one turn: the pictures, then the text."""
    parts: list[dict[str, Any]] = [{"type": "image", "url": one} for one in pictures]
    parts.append({"type": "text", "text": text})
    return conversation([{"role": "user", "content": parts}])


def _pictures(to_visual: Any, doc: Any) -> list[Any]:
    """Pictures of a document; none of a task without."""
    return list(to_visual(doc) or []) if callable(to_visual) else []
