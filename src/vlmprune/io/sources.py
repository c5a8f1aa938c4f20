"""Where a model comes from: the embedded one, a folder, or the Hub; found before it is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmprune import embedded
from vlmprune.costs.architectures import SHAPES
from vlmprune.errors import VlmpruneError, reason
from vlmprune.files import is_file, parsed, path_of, status
from vlmprune.hosts import config as fields
from vlmprune.hosts.families import FAMILIES, TOWERS, generic, towers


@dataclass(frozen=True)
class Source:
    """Where a model comes from.

    Attributes:
        name: what `from_pretrained` takes.
        folder: the local folder; None for a model of the Hub.
        model_type: of its config.
        label: as people call it.
        cached: whether the local cache alone is to be asked, for the Hub does not answer.
    """

    name: str
    folder: Path | None
    model_type: str
    label: str
    cached: bool = False

    @property
    def local(self) -> bool:
        """Whether no network may be asked."""
        return self.cached or self.folder is not None


def find_model(model: str | None) -> Source:
    """The model asked for; by default the embedded one.

    Raises:
        VlmpruneError: there is no such model, or it is not of a supported family.
    """
    if model is None:
        folder = embedded.path()
        return Source(str(folder), folder, _supported(_local_config(folder)), "embedded model")
    folder = path_of(model)
    if status(folder) is not None:
        return Source(str(folder), folder, _supported(_local_config(folder)), model)
    if model in SHAPES:
        raise VlmpruneError(
            f"model {model!r} is an architecture for `vlmprune plan` and `bench --shape`, without "
            "weights; give a model folder or an id of the Hub."
        )
    if model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise VlmpruneError(
            f"model path {model!r} does not exist; give a model folder, an id of the Hub such as "
            "owner/name, or no --model for the embedded model."
        )
    config, cached = _hub_config(model)
    return Source(model, None, _supported(config), model, cached)


def _local_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not is_file(path):
        raise VlmpruneError(
            f"model path {str(folder)!r} has no config.json; give a folder as save_pretrained "
            "writes it."
        )
    try:
        content = parsed(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise VlmpruneError(f"{path} cannot be read as JSON ({reason(error)}).") from error
    return content if isinstance(content, dict) else {}


def _hub_config(name: str) -> tuple[dict[str, Any], bool]:
    """A model's config, and whether it is of the local cache, for the Hub does not answer."""
    from vlmprune.hosts import pretrained

    cached = not pretrained.reachable()
    try:
        return pretrained.config_of(name, local=cached).to_dict(), cached
    # Network, cache and config fail in many ways, none of which the user could treat apart.
    except Exception as error:
        if cached:
            raise VlmpruneError(
                f"model {name!r} is no local path and not in the local cache, and the Hub does not "
                "answer; give a folder, or try again with a network."
            ) from error
        raise VlmpruneError(
            f"model {name!r} is no local path, and could not be had from the local cache or the "
            f"Hub ({reason(error)}); give a folder, or the name of a model there."
        ) from error


def _supported(config: dict[str, Any]) -> str:
    try:
        kind, tower, classes = fields.described(config)
        hash((kind, tower))
    # Lists where words are to be, words where objects are.
    except (AttributeError, TypeError) as error:
        raise VlmpruneError(
            f"the model's config cannot be read ({reason(error)}); give one as save_pretrained "
            "writes it."
        ) from error
    if kind not in FAMILIES and any(name.endswith(generic.SUFFIX) for name in classes):
        # Whether its layout can be followed is seen when the pruner attaches.
        return str(kind)
    if kind not in FAMILIES:
        known = ", ".join(family.cls for family in FAMILIES.values())
        raise VlmpruneError(
            f"vlmprune does not support models of type {kind!r} yet; supported: {known}."
        )
    family = FAMILIES.get(f"{kind}:{tower}") or FAMILIES[str(kind)]
    if tower is not None and tower not in TOWERS and any(map(towers.is_open, family.media)):
        raise VlmpruneError(
            f"vlmprune does not support the vision tower {tower!r} yet; supported towers: "
            f"{', '.join(TOWERS)}."
        )
    return str(kind)
