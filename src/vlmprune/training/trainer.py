"""Training runs: Hugging Face's `Trainer` on a `Learner`, stopped and resumed at will."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.utils.data import Dataset, Sampler, SequentialSampler
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from vlmprune.errors import VlmpruneError
from vlmprune.files import FULL, refused
from vlmprune.io.models import Loaded
from vlmprune.io.outputs import Output, make_folder
from vlmprune.methods.bases.learned import CONFIG, FORMAT, WEIGHTS
from vlmprune.study.evals import run as evaluating
from vlmprune.study.tasks import Task
from vlmprune.training import curve
from vlmprune.training.data import Entry
from vlmprune.training.draws import Drawn, Draws
from vlmprune.training.learner import Learner
from vlmprune.training.rows import RowMaker
from vlmprune.training.states import States

CHECKPOINTS, RUN, STATE = "checkpoints", "run.json", "trainer_state.json"
Tell = Callable[[str, int, int], None]


@dataclass(frozen=True)
class TrainingSettings:
    """What decides over the course of a run, beside data, model and method.

    Attributes:
        steps: of the optimizer.
        batch: entries a step, on each process.
        turns: of each entry a step at most; 0 for all.
        rate: the peak learning rate of the method's module.
        lora_rate: that of the LoRA.
        warm_up: steps to the peak; a cosine falls to nothing after it.
        seed: of the draws.
        precision: "float32", or "bfloat16" for mixed precision.
        every: steps between evaluations.
        save_every: steps between checkpoints.
        weigh: what counts alike, see `Learner`.
    """

    steps: int = 1000
    batch: int = 8
    turns: int = 1
    rate: float = 1e-3
    lora_rate: float = 2e-4
    warm_up: int = 50
    seed: int = 0
    precision: str = "float32"
    every: int = 200
    save_every: int = 200
    weigh: str = "token"


@dataclass
class Collator:
    """Makes a step's batch of its samples.

    Attributes:
        rows: makes rows and pixels.
        states: the encoder's states on disk; None to make pixels.
    """

    rows: RowMaker
    states: States | None = None

    def __call__(self, samples: Sequence[Drawn]) -> dict[str, Tensor]:
        """All that a `Learner` takes."""
        entries = [one.entry for one in samples]
        batch = self.rows.batch(entries, [one.turns for one in samples])
        batch["rows"] = torch.tensor([len(one.turns) for one in samples])
        batch["pictures"] = torch.tensor([len(one.images) for one in entries])
        if self.states is None:
            return batch | self.rows.pixels(entries)
        batch["places"] = self.states.of(entries)
        return batch | {"pixel_values": self.states.blank(len(batch["places"]))}


class _Trainer(Trainer):
    """The Trainer, with samples in their order, two rates, and accuracy beside the loss."""

    def __init__(
        self, learner: Learner, settings: TrainingSettings, measure: Any, **given: Any
    ) -> None:
        self.settings, self.measure = settings, measure
        super().__init__(model=learner, **given)

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        return SequentialSampler(self.train_dataset)  # type: ignore[arg-type]

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """AdamW without decay, the LoRA at a rate of its own."""
        if self.optimizer is None:
            learner: Any = self.model
            groups = [
                {"params": list(learner.trained().values()), "lr": self.settings.rate},
                {"params": list(learner.lora().values()), "lr": self.settings.lora_rate},
            ]
            groups = [one for one in groups if one["params"]]
            self.optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
        return self.optimizer

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """The loss on what is held out, and the accuracy on the task."""
        some: Any = self.eval_dataset
        found = super().evaluate(*args, **kwargs) if len(some) else {}
        if self.measure is not None and self.is_world_process_zero():
            accuracy = self.measure(self.state.global_step)
            self.log({"eval_accuracy": accuracy})
            found["eval_accuracy"] = accuracy
        return found

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, self.model.state_dict())  # type: ignore[union-attr]


class _Progress(TrainerCallback):
    """Tells how far a run is, and draws its curve at each evaluation."""

    def __init__(self, tell: Tell, out: Path, title: str, force: bool) -> None:
        self.tell, self.out, self.title, self.last = tell, out, title, ""
        self.force = force

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Remember the losses."""
        if logs and "loss" in logs:
            self.last = f"loss {float(logs['loss']):.3f}"

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Move the bar."""
        words = f"step {state.global_step} of {state.max_steps}, {self.last}".rstrip(", ")
        self.tell(words, state.global_step, state.max_steps)

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Draw."""
        if state.is_world_process_zero:
            curve.write(self.out, self.title, state.log_history, self.force)


@dataclass
class Run:
    """A training run.

    Attributes:
        loaded: model and processor.
        learner: what is trained.
        rows: makes rows.
        entries: what is trained on.
        held_out: what the loss is only measured on; empty for nothing.
        task: asked at intervals; None for none.
        limit: of its samples.
        settings: of the run.
        out: its folder.
        title: of the curve.
        about: what else decides over its course, for a resumed run to be the same.
        force: overwrite files in the folder that are no run's.
    """

    loaded: Loaded
    learner: Learner
    rows: RowMaker
    entries: list[Entry]
    held_out: list[Entry]
    task: Task | None
    limit: int | None
    settings: TrainingSettings
    out: Path
    title: str
    about: dict[str, Any]
    force: bool = False

    def train(self, resume: bool = False, tell: Tell = lambda words, done, total: None) -> Any:
        """Train, from the start or from the last checkpoint that is whole.

        Args:
            resume: go on with what is in the folder, if anything is.
            tell: told what goes on, and how much of how much is done.

        Returns:
            The Trainer's state.

        Raises:
            VlmpruneError: the folder holds a run that may not be overwritten, another one, or
                another's files; or the disk is full.
        """
        last = self._begin(resume)
        s, device = self.settings, self.loaded.model.device
        states = self.learner.states
        arguments = TrainingArguments(
            output_dir=str(self.out / CHECKPOINTS),
            max_steps=s.steps,
            per_device_train_batch_size=s.batch,
            per_device_eval_batch_size=s.batch,
            learning_rate=s.rate,
            lr_scheduler_type="cosine",
            warmup_steps=s.warm_up,
            max_grad_norm=1.0,
            logging_steps=max(1, min(10, s.steps // 20)),
            eval_strategy="steps" if self.held_out or self.task is not None else "no",
            eval_steps=s.every,
            save_steps=s.save_every,
            save_total_limit=2,
            seed=s.seed,
            bf16=s.precision == "bfloat16",
            use_cpu=device.type == "cpu",
            dataloader_pin_memory=device.type == "cuda",
            remove_unused_columns=False,
            label_names=["labels"],
            prediction_loss_only=True,
            report_to="none",
            disable_tqdm=True,
            ddp_find_unused_parameters=False,
        )
        length = s.steps * s.batch * arguments.world_size
        trainer = _Trainer(
            self.learner,
            s,
            None if self.task is None else self._accuracy,
            args=arguments,
            data_collator=Collator(self.rows, states),
            train_dataset=Draws(self.entries, length, s.turns, s.seed),
            eval_dataset=Draws(self.held_out, len(self.held_out), s.turns, s.seed),
            callbacks=[_Progress(tell, self.out, self.title, self.force)],
        )
        trainer.remove_callback(PrinterCallback)
        with ExitStack() as stack:
            stack.enter_context(self.learner.attached())
            if states is not None:
                stack.callback(states.forget)
            stack.enter_context(_checkpoints(self.out / CHECKPOINTS))
            trainer.train(resume_from_checkpoint=None if last is None else str(last))
        if trainer.is_world_process_zero():
            curve.write(self.out, self.title, trainer.state.log_history, self.force)
        return trainer.state

    def _accuracy(self, step: int) -> float:
        """Share of right answers on the task's samples, by the host's own `generate`."""
        if self.learner.states is not None:
            self.learner.states.forget()
        self.learner.eval()
        assert self.task is not None
        found = evaluating.evaluate(
            self.loaded,
            self.learner.pruner,
            self.task,
            self.limit,
        )
        scores = [one.score for one in found.results if one.score is not None]
        self.learner.train()
        return sum(scores) / max(1, len(scores))

    def _begin(self, resume: bool) -> Path | None:
        """Check the folder, write what the run is, and find the checkpoint to go on with."""
        path, last = self.out / RUN, last_checkpoint(self.out)
        written = files(self.out, self.force)
        for one in written:
            one.check()
        about = json.loads(json.dumps(self.about | {"settings": asdict(self.settings)}))
        if path.exists() and resume:
            known = json.loads(path.read_text(encoding="utf-8"))
            for name, value in about.items():
                if known.get(name) != value:
                    different = _difference(name, known.get(name), value)
                    raise VlmpruneError(
                        f"{str(self.out)!r} holds another run ({different}); give the same "
                        "options, or another --out."
                    )
        elif last is not None:
            raise VlmpruneError(
                f"{str(self.out)!r} holds a run already; go on with it by --resume, or give "
                "another --out."
            )
        make_folder(self.out)
        written[0].write_json({"made_by": curve.MARK, **about})
        return last


def files(out: Path, force: bool = False) -> list[Output]:
    """What a run writes into its folder beside its checkpoints, `run.json` first.

    Args:
        out: the folder.
        force: overwrite files that are no run's.
    """
    marks = dict.fromkeys((RUN, curve.DATA, curve.PICTURE), curve.MARK)
    marks |= dict.fromkeys((CONFIG, WEIGHTS), FORMAT)
    return [Output(out / name, mark, force) for name, mark in marks.items()]


@contextmanager
def _checkpoints(folder: Path) -> Iterator[None]:
    """Tell of a disk that has no room for a checkpoint, whoever finds it."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise refused(folder, error) from error
    except (RuntimeError, SafetensorError) as error:
        # Torch's own writer, under the name of its class or of its file, and that of safetensors.
        torchs = any(name in str(error) for name in ("PytorchStreamWriter", "inline_container"))
        if not isinstance(error, SafetensorError) and not torchs:
            raise
        raise VlmpruneError(
            f"a checkpoint cannot be written into {str(folder)!r}, which has no room; make room "
            "there and go on by --resume, or give another --out."
        ) from error


def last_checkpoint(out: Path) -> Path | None:
    """The last checkpoint of a run that is whole; a kill while one is written leaves a torn one."""
    found = {}
    for path in (out / CHECKPOINTS).glob("checkpoint-*"):
        number = path.name.rpartition("-")[2]
        # The Trainer writes its state last.
        try:
            json.loads((path / STATE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if number.isdigit():
            found[int(number)] = path
    return found[max(found)] if found else None


def _difference(name: str, before: Any, now: Any) -> str:
    """Where two runs differ, in words."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in [*before, *now]:
            if before.get(key) != now.get(key):
                return f"{key} {before.get(key)!r}, not {now.get(key)!r}"
    return f"{name} {before!r}, not {now!r}"
