"""Vision features of many scenes, computed once and kept on disk.

What is kept is what stock LLaVA feeds its projector: the tower's hidden state before the last
layer, without the CLS token, `[256, 384]` a scene, float16.
"""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from assets import CLUTTER_PHOTOS, HELD_OUT_PHOTOS, TRAIN_PHOTOS, Assets
from scenes import PATCHES, Placed, scene

TOKENS = PATCHES * PATCHES
WIDTH = 384
SEEDS = {"train": 1, "large": 1, "reading": 4, "clutter": 5, "validation": 2, "test": 3}
"""Seed of each set of scenes."""
STYLE = {"train": "small signs", "reading": "many signs", "clutter": "clutter"}
"""Style of the sets that are not plain scenes."""
TRAINING = {"train": 0.35, "large": 0.15, "reading": 0.1, "clutter": 0.4}
"""The training sets and their shares of each batch; only they use the training photographs."""


@dataclass
class Features:
    """A set of scenes as training sees it: no pictures, only features and labels.

    Attributes:
        features: arrays `[n, 256, 384]` float16 that add up to N scenes, memory-mapped.
        cover: `[N, 16, 16]` int8, label of the name that covers each patch (0 none).
        half: `[N, 16, 16]` int8, 1 on the tens of a sign, 2 on the units, else 0.
        placed: what each scene holds.
    """

    features: list[np.ndarray]
    cover: np.ndarray
    half: np.ndarray
    placed: list[list[Placed]]

    def __len__(self) -> int:
        return len(self.placed)

    def take(self, indices: Sequence[int]) -> torch.Tensor:
        """Features of these scenes, `[B, 256, 384]` float32."""
        ends = np.cumsum([len(part) for part in self.features])
        taken = []
        for index in indices:
            part = int(np.searchsorted(ends, index, side="right"))
            taken.append(self.features[part][index - int(ends[part])])
        return torch.from_numpy(np.stack(taken).astype(np.float32))


def photos(split: str) -> list[str]:
    """Names of the photographs that a set of scenes may use."""
    if split == "clutter":
        return list(CLUTTER_PHOTOS)
    return list(TRAIN_PHOTOS if split in TRAINING else HELD_OUT_PHOTOS)


@torch.no_grad()
def hidden(tower: torch.nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    """Output of the last layer but one, without CLS: `[B, 3, 224, 224] -> [B, 256, 384]`."""
    state = tower.embeddings(pixels)
    for layer in tower.encoder.layer[:-1]:
        state = layer(state)
        state = state[0] if isinstance(state, tuple) else state
    return state[:, 1:]


def _chunk(job: tuple[str, int, int, Path, Path, Path]) -> Path:
    """Compute scenes `start..stop` of a set, unless their files are there already."""
    split, start, stop, out, assets_folder, vision = job
    done = out / f"{split}-{start:06d}.json"
    if done.exists():
        return done
    from export import MEAN, STD
    from transformers import AutoModel
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    torch.set_num_threads(1)
    images = CLIPImageProcessorPil(
        do_resize=False, do_center_crop=False, image_mean=MEAN, image_std=STD
    )
    tower = AutoModel.from_pretrained(vision, dtype=torch.float32).eval()
    assets = Assets(assets_folder)
    style = STYLE.get(split, "plain")
    made = [scene(i, SEEDS[split], photos(split), assets, style) for i in range(start, stop)]
    parts = []
    for i in range(0, len(made), 8):
        pixels = images([s.image for s in made[i : i + 8]], return_tensors="pt")["pixel_values"]
        parts.append(hidden(tower, pixels).half().numpy())
    stem = out / f"{split}-{start:06d}"
    np.save(f"{stem}.features.npy", np.concatenate(parts))
    np.save(f"{stem}.cover.npy", np.stack([s.cover for s in made]))
    np.save(f"{stem}.half.npy", np.stack([s.half for s in made]))
    done.write_text(json.dumps([[asdict(p) for p in s.placed] for s in made]))
    return done


def compute(
    split: str,
    amount: int,
    out: Path,
    assets: Path,
    vision: Path,
    processes: int = 2,
    chunk: int = 100,
) -> None:
    """Cache the first `amount` scenes of a set in chunks; what is there is kept."""
    out.mkdir(parents=True, exist_ok=True)
    Assets(assets)
    jobs = [
        (split, i, min(i + chunk, amount), out, assets, vision) for i in range(0, amount, chunk)
    ]
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        for number, _ in enumerate(pool.imap(_chunk, jobs), 1):
            print(f"{split}: {number}/{len(jobs)} chunks", flush=True)


def read(split: str, out: Path) -> Features:
    """All cached chunks of a set, in order. The numbers of small signs are forgotten."""
    stems = [p.with_suffix("") for p in sorted(out.glob(f"{split}-*.json"))]
    if not stems:
        raise FileNotFoundError(f"no cached {split} scenes in {out}: run the cache command first")
    placed = [
        [Placed(**thing) for thing in one]
        for stem in stems
        for one in json.loads(stem.with_suffix(".json").read_text())
    ]
    features = [np.load(f"{stem}.features.npy", mmap_mode="r") for stem in stems]
    cover = np.concatenate([np.load(f"{stem}.cover.npy") for stem in stems])
    half = np.concatenate([np.load(f"{stem}.half.npy") for stem in stems])
    if STYLE.get(split) == "small signs":
        half[:] = 0
        placed = [[replace(thing, number=None) for thing in one] for one in placed]
    return Features(features, cover, half, placed)


def join(sets: list[Features]) -> Features:
    """Several sets as one, in order."""
    cover, half = (np.concatenate([getattr(s, k) for s in sets]) for k in ("cover", "half"))
    features = [part for s in sets for part in s.features]
    return Features(features, cover, half, [one for s in sets for one in s.placed])
