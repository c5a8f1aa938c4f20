"""States of a frozen vision encoder on disk, so that a training step need not run it.

Kept are the outputs of the layers that the method reads, and of the layer whose output is the
model's feature, float16, one array a layer with a row for each picture. In a step the encoder's
layers are called with what was kept, so that whoever watches them sees it, and the host's own
projector follows. Attention is not kept: methods that read it are refused.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from vlmprune.errors import VlmpruneError
from vlmprune.files import writing
from vlmprune.hosts.families.llava import LlavaImages
from vlmprune.hosts.requests import base_of
from vlmprune.io.outputs import Output, make_folder
from vlmprune.pruner import Pruner
from vlmprune.runtime.attention.taps import passing
from vlmprune.runtime.family import family_of
from vlmprune.training import curve
from vlmprune.training.data import Entry, Turn
from vlmprune.training.rows import RowMaker

INDEX, LAYER = "states.json", "layer-{}.npy"
BATCH = 16
"""Pictures that the encoder sees at once."""
SAVED = 20
"""Batches after which what there is counts as kept."""


def layers_for(pruner: Pruner, depth: int, feature: int) -> tuple[int, ...]:
    """The encoder layers whose output a method needs, the feature's own among them.

    Raises:
        VlmpruneError: it reads more than states.
    """
    reads = pruner.reads(depth, feature) if pruner.shortens else None
    more = reads is not None and (reads.layers or any(n is not None for n in reads.single))
    if more or (reads is not None and reads.semantic is not None) or pruner.acts:
        raise VlmpruneError(
            f"{type(pruner).__name__} needs the vision encoder itself in every step; leave "
            "--cache out."
        )
    wanted = {feature} if reads is None else {feature, *reads.states}
    return tuple(sorted(wanted))


def check_cache(folder: Path, force: bool = False) -> Output:
    """The file that says what a folder holds states of; refuses a folder with other files' names.

    Args:
        folder: need not be there.
        force: write over files that hold no states.

    Raises:
        VlmpruneError: it cannot be written, or has files that hold no states.
    """
    index = Output(folder / INDEX, curve.MARK, force)
    index.check()
    arrays = sorted(folder.glob(LAYER.format("*")))
    if arrays and not index.path.exists() and not force:
        raise VlmpruneError(
            f"{str(arrays[0])!r} is there already, and no {INDEX} beside it says what of; give "
            "another folder, move it away, or overwrite it by --force."
        )
    return index


class States:
    """A folder with the states of some pictures.

    Args:
        folder: made if absent.
        model: the host, before anything is attached to it.
        pruner: the method.
        rows: makes pixels of pictures.
        entries: all that training and its evaluation may ask for.
        mixed: run the encoder in mixed precision, with bfloat16.
        force: write over files in the folder that hold no states.

    Raises:
        VlmpruneError: the method or the model does not allow it, or the folder cannot be written.
    """

    def __init__(
        self,
        folder: Path,
        model: Any,
        pruner: Pruner,
        rows: RowMaker,
        entries: Sequence[Entry],
        mixed: bool = False,
        force: bool = False,
    ) -> None:
        self.model, self.rows, self.mixed = model, rows, mixed
        medium = family_of(model).media[0]
        if not isinstance(medium, LlavaImages):
            raise VlmpruneError(
                f"the encoder of {type(model).__name__} does not see each picture as one crop of "
                "one size, so that its states cannot be kept; leave --cache out."
            )
        self.medium = medium
        encoder = medium.encoder(model, {})
        self.layers = layers_for(pruner, len(encoder.layers), encoder.feature)
        self.files = sorted({file for entry in entries for file in entry.images})
        self.places = {file: place for place, file in enumerate(self.files)}
        self.folder, self.force = folder, force
        self.arrays: dict[int, np.ndarray] = {}
        self.side = (0, 0)
        self.begun = False
        self.now: Tensor | None = None

    @property
    def _about(self) -> dict[str, Any]:
        """What the files are of."""
        tower = self.medium.tower(self.model)
        digest = hashlib.sha256()
        for name, weight in sorted(tower.state_dict().items()):
            digest.update(name.encode())
            digest.update(weight.detach().float().flatten()[:64].cpu().numpy().tobytes())
        names = "\n".join(f"{file} {file.stat().st_size}" for file in self.files)
        return {
            "layers": list(self.layers),
            "size": str(self.rows.processor.image_processor.size),
            "mixed": self.mixed,
            "encoder": digest.hexdigest()[:16],
            "pictures": hashlib.sha256(names.encode()).hexdigest()[:16],
        }

    def fill(self, tell: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Run the encoder on all pictures whose states are not there; what is there is kept."""
        about, total = json.loads(json.dumps(self._about)), len(self.files)
        index, done = check_cache(self.folder, self.force), 0
        about = {"made_by": index.mark, **about}
        make_folder(self.folder)
        if index.path.exists() and index.ours():
            known = self._known(index.path)
            done, self.side = known.pop("done", 0), tuple(known.pop("side", (0, 0)))
            if known != about:
                raise VlmpruneError(
                    f"cache {str(self.folder)!r} is of other pictures, layers or weights; "
                    "give another folder, or delete it."
                )
        with writing(self.folder):
            if not done:
                # First, so that arrays that a kill leaves behind are known as ours.
                index.write_json(about)
            self.begun = done > 0
            for start in range(done, total, BATCH):
                tell(start, total)
                stop = min(start + BATCH, total)
                for layer, states in self._run(self.files[start:stop]).items():
                    self._array(layer, states.shape[1:])[start:stop] = states.half().cpu().numpy()
                if stop < total and (stop // BATCH) % SAVED:
                    continue
                for array in self.arrays.values():
                    array.flush()  # type: ignore[attr-defined]
                index.write_json(about | {"done": stop, "side": list(self.side)})
        tell(total, total)
        self.arrays = {layer: np.load(self._file(layer), mmap_mode="r") for layer in self.layers}

    def _file(self, layer: int) -> Path:
        return self.folder / LAYER.format(layer)

    def _known(self, path: Path) -> dict[str, Any]:
        """What the folder holds, as its index says."""
        try:
            return dict(json.loads(path.read_text(encoding="utf-8")))
        except ValueError as error:
            raise VlmpruneError(
                f"{str(path)!r} cannot be read as JSON; give another folder, or delete it."
            ) from error

    def _array(self, layer: int, shape: Sequence[int]) -> np.ndarray:
        if layer not in self.arrays:
            file, mode = self._file(layer), "r+" if self.begun else "w+"
            self.arrays[layer] = np.lib.format.open_memmap(
                file,
                mode=mode,
                dtype=np.float16,
                shape=(len(self.files), *shape) if mode == "w+" else None,
            )
            if mode == "w+":
                _reserve(file)
        return self.arrays[layer]

    @torch.no_grad()
    def _run(self, files: Sequence[Path]) -> dict[int, Tensor]:
        """The wanted layers' outputs, [pictures, L, C] each."""
        turn = Turn("?", "")
        given = self.rows.pixels([Entry(-1, "", (file,), (turn,)) for file in files])
        pixels = given["pixel_values"].to(self.model.device, self.model.dtype)
        self.side = (pixels.shape[-2], pixels.shape[-1])
        layers = self.medium.encoder(self.model, {self.medium.inputs[0]: pixels}).layers
        with ExitStack() as stack:
            kind = self.model.device.type
            stack.enter_context(torch.autocast(kind, torch.bfloat16, enabled=self.mixed))
            seen = {n: stack.enter_context(passing(layers[n])) for n in self.layers}
            self.model.get_image_features(pixel_values=pixels, return_dict=True)
        return {n: torch.cat(list(calls)) for n, calls in seen.items()}

    def of(self, entries: Sequence[Entry]) -> Tensor:
        """[pictures] places of the entries' pictures."""
        return torch.tensor([self.places[file] for one in entries for file in one.images])

    def blank(self, pictures: int) -> Tensor:
        """Something in the shape of the pictures' pixels, of which nothing is looked at."""
        height, width = self.side
        return torch.zeros(1).expand(pictures, 3, height, width)

    def forget(self) -> None:
        """Let the host encode what it is given."""
        self.now = None

    @contextmanager
    def serving(self) -> Iterator[None]:
        """Let the host's own method take what was kept, wherever `now` says of which pictures.

        To be entered before a pruner is attached.
        """
        place = base_of(self.model)
        own = place.get_image_features
        before = vars(place).get("get_image_features")

        # `wraps` keeps the signature, which Transformers inspects, and so do we.
        @functools.wraps(own)
        def features(pixel_values: Tensor, *args: Any, **kwargs: Any) -> Any:
            if self.now is None:
                return own(pixel_values, *args, **kwargs)
            return self._served(pixel_values)

        vars(place)["get_image_features"] = features
        try:
            yield
        finally:
            if before is None:
                del vars(place)["get_image_features"]
            else:
                vars(place)["get_image_features"] = before

    @torch.no_grad()
    def _served(self, pixels: Tensor) -> Any:
        """What the host's own method would return, with its encoder's layers called on the way."""
        assert self.now is not None
        unique, back = self.now.unique(return_inverse=True)
        encoder = self.medium.encoder(self.model, {self.medium.inputs[0]: pixels})
        features = torch.empty(0)
        for number in self.layers:
            kept = torch.from_numpy(self.arrays[number][unique.cpu().numpy()])
            state = kept.to(pixels.device, self.model.dtype)[back.to(pixels.device)]
            with _given(encoder.layers[number]):
                encoder.layers[number](state)
            if number == encoder.feature:
                features = state
        if self.model.config.vision_feature_select_strategy == "default":
            features = features[:, 1:]
        tokens = self.medium.projector(self.model)(features)
        made: Any = BaseModelOutputWithPooling()
        made["pooler_output"] = list(tokens)
        return made


def _reserve(path: Path) -> None:
    """Take a file's room on the disk: a disk that fills up kills who writes into a mapped file."""
    if hasattr(os, "posix_fallocate"):
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)


@contextmanager
def _given(layer: nn.Module) -> Iterator[None]:
    """Let a layer give what it is given; who watches it sees that."""
    before = {name: one for name, one in vars(layer).items() if name == "forward"}
    vars(layer)["forward"] = lambda state, *args, **kwargs: state
    try:
        yield
    finally:
        del vars(layer)["forward"]
        vars(layer).update(before)
