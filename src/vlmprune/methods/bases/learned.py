"""The base of methods that need training: a module with weights, saved and loaded as a folder.

A folder holds `config.json` (the method, its settings, the architecture that it was trained for)
and `model.safetensors` (the module's weights, and those of a LoRA of the language model if it was
trained along, by the names that PEFT gives them).
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from vlmprune import embedded
from vlmprune.errors import VlmpruneError, meant, reason
from vlmprune.files import is_file, parsed, path_of, replacing, write, writing
from vlmprune.hosts import families, sizes
from vlmprune.method import Attached
from vlmprune.methods.bases.lora import PREFIX, Lora
from vlmprune.pruner import Pruner
from vlmprune.select.settings import check_choice, plain
from vlmprune.version import __version__
from vlmprune.views.settings import Positions

if TYPE_CHECKING:
    from typing import Self


FORMAT = "vlmprune learned 1"
# What is always written anew of what weights came with.
_OURS = ("format", "version", "method")
CONFIG, WEIGHTS = "config.json", "model.safetensors"
# How the names of weights begin that come with the embedded model.
NAMED = "embedded-"


@dataclass
class Trained:
    """What an instance was trained to.

    Attributes:
        settings: of the module, as JSON has them.
        architecture: of the model that it fits.
        module: the trainable parameters; None until they are needed.
        lora: of the language model; None for none.
        notes: what else `config.json` says, such as how it was trained.
        folder: where it came from; None for one that was made here.
    """

    settings: dict[str, Any]
    architecture: str
    module: nn.Module | None = None
    lora: Lora | None = None
    notes: dict[str, Any] = field(default_factory=dict)
    folder: Path | None = None


@dataclass(frozen=True)
class Learned(Pruner):
    """A method that was trained for an architecture.

    A subclass names itself in `method` and implements `fitted` and `build`, and beside `select`
    (or what else a pruner does) `start`, if a fresh module takes anything over from the host.

    Attributes:
        weights: a folder as `save_pretrained` writes it, or the name of weights that come with
            the embedded model.
        positions: "compact" renumbers the tokens, "original" keeps gaps, "auto" takes what the
            model's config recommends, else the family's release.
        fingerprint: of the weights, read off them, so that answers of others are not taken for
            theirs; empty for weights that were never saved.

    Raises:
        VlmpruneError: there are no such weights, or they are not of this method.
    """

    weights: str
    positions: Positions = "auto"
    fingerprint: str = field(init=False, default="")

    method: ClassVar[str] = ""

    def __post_init__(self) -> None:
        check_choice("positions", self.positions, Positions)
        folder = find(self.weights, self.method)
        config = _config(folder)
        if config.get("method") != self.method:
            raise VlmpruneError(
                f"the weights in {str(folder)!r} are of the method {config.get('method')!r}, not "
                f"of {self.method!r}; write {config.get('method')}:weights={self.weights}, or "
                f"give weights of {self.method}."
            )
        notes = {k: v for k, v in config.items() if k not in ("settings", "architecture", "lora")}
        trained = Trained(config["settings"], config["architecture"], notes=notes, folder=folder)
        if config.get("lora") is not None:
            trained.lora = Lora.of_config(config["lora"])
        object.__setattr__(self, "_trained", trained)
        object.__setattr__(self, "fingerprint", _fingerprint(folder))

    # What a subclass says.

    @classmethod
    def fitted(cls, model: Any) -> dict[str, Any]:
        """The settings of a fresh module for a host, as JSON can hold them.

        A subclass takes its hyper-parameters by name, with their defaults.

        Raises:
            VlmpruneError: the method does not work on the host, or a value is out of range.
        """
        raise NotImplementedError

    @classmethod
    def build(cls, settings: Mapping[str, Any]) -> nn.Module:
        """An untrained module of these settings."""
        raise NotImplementedError

    @classmethod
    def start(cls, module: nn.Module, model: Any) -> None:
        """Let a fresh module take over what it begins with from the host, such as its projector."""

    @classmethod
    def architecture_of(cls, model: Any) -> str:
        """What weights are for: the language model and the vision tower, in words."""
        return f"{families.architecture(model)}; {sizes.words(model.config)}"

    # What there is then.

    @classmethod
    def fresh(cls, model: Any, positions: Positions = "auto", **hyper: Any) -> Self:
        """An untrained instance that fits a host, in eval mode.

        Args:
            model: the host.
            positions: as the attribute.
            hyper: as `fitted` takes them.

        Raises:
            VlmpruneError: the method does not work on the host, or a value is out of range.
        """
        model = families.unwrapped(model)
        known = list(inspect.signature(cls.fitted).parameters)[1:]
        for name in hyper.keys() - set(known):
            what = f"{name}={hyper[name]!r} is no setting of {cls.method}{meant(name, known)}"
            raise VlmpruneError(f"{what}; it has {', '.join(known)}.")
        settings = cls.fitted(model, **{name: plain(value) for name, value in hyper.items()})
        module = cls.build(settings)
        cls.start(module, model)
        made = object.__new__(cls)
        for one in fields(cls):
            object.__setattr__(made, one.name, one.default)
        object.__setattr__(made, "weights", "")
        object.__setattr__(made, "positions", positions)
        trained = Trained(settings, cls.architecture_of(model), module.eval())
        object.__setattr__(made, "_trained", trained)
        return made

    @classmethod
    def from_pretrained(cls, folder: str | Path, **settings: Any) -> Self:
        """The instance that a folder, or a name of shipped weights, holds; the same as the class.

        Raises:
            VlmpruneError: there are no such weights, or they are not of this method.
        """
        return cls(weights=str(folder), **settings)

    def save_pretrained(
        self,
        folder: str | Path,
        dtype: torch.dtype = torch.float32,
        notes: Mapping[str, Any] | None = None,
    ) -> None:
        """Write `config.json` and `model.safetensors`.

        Args:
            folder: is made if it is not there.
            dtype: of the weights in the file.
            notes: what else is worth knowing, such as how they were trained; as JSON can hold it.

        Raises:
            VlmpruneError: the disk refuses; each file is then whole, or as it was.
        """
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        folder = Path(folder)
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        lora = self.trained.lora
        tensors = dict(self.module.state_dict().items())
        tensors |= {} if lora is None else lora.tensors
        stored = {
            name: tensor.detach().to("cpu", dtype if tensor.is_floating_point() else None)
            for name, tensor in tensors.items()
        }
        # Copies, for the format knows no two names of one storage.
        copies = {name: t.contiguous().clone() for name, t in stored.items()}
        try:
            with replacing(folder / WEIGHTS) as made:
                save_file(copies, made, {"format": FORMAT})
        except SafetensorError as error:
            raise VlmpruneError(
                f"{str(folder / WEIGHTS)!r} cannot be written ({reason(error)}); give another "
                "folder."
            ) from error
        config = {
            "format": FORMAT,
            "version": __version__,
            "method": self.method,
            "settings": self.settings,
            "architecture": self.trained.architecture,
            "lora": None if lora is None else lora.config,
            **{k: v for k, v in self.trained.notes.items() if k not in _OURS},
            **(notes or {}),
        }
        text = json.dumps(config, indent=2, ensure_ascii=False)
        write(folder / CONFIG, text + "\n")

    @property
    def trained(self) -> Trained:
        """What it was trained to."""
        found: Trained = self._trained  # type: ignore[attr-defined]
        return found

    @property
    def settings(self) -> dict[str, Any]:
        """Of the module."""
        return self.trained.settings

    @property
    def module(self) -> nn.Module:
        """The trainable parameters, float32; loaded when first asked for."""
        trained = self.trained
        if trained.module is None:
            assert trained.folder is not None
            trained.module = _loaded(self, trained.folder, trained.lora)
        return trained.module

    @property
    def keep(self) -> int | None:
        """Visual tokens of a crop that are left where it was trained, for tables.

        As `config.json` says under "tokens"; None where it does not.
        """
        found = self.trained.notes.get("tokens")
        return found if isinstance(found, int) else None

    def on(self, device: torch.device) -> nn.Module:
        """The module, moved to a device if it lies on another."""
        first = next(self.module.parameters(), None)
        if first is not None and first.device != device:
            self.module.to(device)
        return self.module

    def take_lora(self, peft_model: Any, adapter: str = "default") -> None:
        """Keep the LoRA that PEFT trained, to be saved with the weights and to act from now on.

        Args:
            peft_model: as PEFT's `get_peft_model` returned it.
            adapter: its name.

        Raises:
            VlmpruneError: it is no plain LoRA of linear layers.
        """
        self.trained.lora = Lora.of_peft(peft_model, adapter)

    def joined(self, attachment: Attached) -> Callable[[], None] | None:
        """Check the architecture, move to the model's device and put the LoRA on.

        Raises:
            VlmpruneError: the weights are for another architecture.
        """
        here = self.architecture_of(attachment.model)
        if here != self.trained.architecture:
            name = self.weights or "made by fresh()"
            raise VlmpruneError(
                f"the weights of {self.method} ({name}) are for another model "
                f"({self.trained.architecture}) than this ({here}); run `vlmprune train "
                f"{self.method}` on this one."
            )
        self.on(attachment.model.device)
        return None if self.trained.lora is None else self.trained.lora.put_on(attachment)


def shipped(method: str = "") -> list[str]:
    """Names of the weights that come with the embedded model, of one method or of all.

    Without the embedded model there are none.
    """
    found = []
    for path in sorted(embedded.learned().glob(f"*/{CONFIG}")) if embedded.installed() else ():
        if not method or parsed(path.read_text(encoding="utf-8")).get("method") == method:
            found.append(path.parent.name)
    return found


def find(weights: Any, method: str) -> Path:
    """The folder of some weights.

    Args:
        weights: a folder, or a name of shipped weights.
        method: whose they are.

    Raises:
        VlmpruneError: there is none.
    """
    names = shipped(method)
    has = f"the embedded model has {', '.join(names)}" if names else "no named ones are installed"
    if not isinstance(weights, str) or not weights:
        raise VlmpruneError(
            f"weights={weights!r} of {method} names no weights; give a folder as `vlmprune train "
            f"{method}` writes it ({has})."
        )
    own = path_of(weights)
    if is_file(own / CONFIG):
        return own
    # Where the embedded model is not installed, asking for one of its folders says so.
    if embedded.installed() or weights.startswith(NAMED):
        brought = embedded.learned() / weights
        if is_file(brought / CONFIG):
            return brought
    raise VlmpruneError(
        f"weights={weights!r} of {method} is no folder with a {CONFIG}{meant(weights, names)}; "
        f"give one as `vlmprune train {method}` writes it, or a name ({has})."
    )


def _config(folder: Path) -> dict[str, Any]:
    """What a folder says of its weights.

    Raises:
        VlmpruneError: it cannot be read, or is of another kind.
    """
    path = folder / CONFIG
    try:
        config = parsed(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise VlmpruneError(f"{path} cannot be read as JSON ({error}); train it anew.") from error
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        kind = config.get("format") if isinstance(config, dict) else None
        raise VlmpruneError(
            f"{path} is not of the format {FORMAT!r} (it says {kind!r}); give a folder as "
            "`vlmprune train` writes it."
        )
    for name, kind in (("method", str), ("settings", dict), ("architecture", str)):
        if not isinstance(config.get(name), kind):
            raise VlmpruneError(f"{path} does not say {name}; write it anew by save_pretrained.")
    if not is_file(folder / WEIGHTS):
        raise VlmpruneError(
            f"{str(folder)!r} has no {WEIGHTS}, the only kind of weights that is read; write it "
            "anew by save_pretrained."
        )
    return config


def _fingerprint(folder: Path) -> str:
    """Eight digits that tell some weights from others."""
    content = hashlib.sha256((folder / CONFIG).read_bytes())
    content.update((folder / WEIGHTS).read_bytes())
    return content.hexdigest()[:8]


def _loaded(pruner: Learned, folder: Path, lora: Lora | None) -> nn.Module:
    """A folder's module, with its weights; those of a LoRA are put into it.

    Raises:
        VlmpruneError: the weights do not fit the settings.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = folder / WEIGHTS
    try:
        stored = load_file(path)
    except (OSError, SafetensorError) as error:
        raise VlmpruneError(f"{path} cannot be read ({error}); train it anew.") from error
    tensors = {k: t.float() if t.is_floating_point() else t for k, t in stored.items()}
    own: dict[str, Tensor] = {k: t for k, t in tensors.items() if not k.startswith(PREFIX)}
    try:
        module = pruner.build(pruner.settings)
        module.load_state_dict(own)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise VlmpruneError(
            f"{path} does not fit the settings in its {CONFIG} ({' '.join(str(error).split())}); "
            "train it anew."
        ) from error
    added = {k: t for k, t in tensors.items() if k.startswith(PREFIX)}
    if (lora is None) != (not added):
        raise VlmpruneError(f"{path} and its {CONFIG} disagree about a LoRA; train it anew.")
    if lora is not None:
        lora.tensors = added
    return module.eval()
