"""How like the question visual tokens are: by words of the language model, or by a CLIP model."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import torch
from torch import Tensor
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    PreTrainedTokenizerFast,
)

from tiny import IMAGE, PAD, VOCABULARY, model, request
from vlmprune import VlmpruneError
from vlmprune.methods.bases.budgeted import Budgeted
from vlmprune.runtime.encoder import relevance
from vlmprune.runtime.encoder.bare_question import OPTION_LETTER, WORD_OR_PHRASE, bare
from vlmprune.views import EncoderView, Reads, Selection
from zoo import ZOO

LONGEST = 9


@dataclass(frozen=True)
class Spy(Budgeted):
    """Keeps the first cells, and what it was shown."""

    keep: int | float = 4
    source: str = "auto"
    projected: bool = False
    asked: Literal["", "bare", "prompt"] = ""
    views: list[EncoderView] = field(default_factory=list, repr=False)
    text_agnostic: ClassVar[bool] = False

    def reads(self, depth: int, feature: int) -> Reads:
        return Reads(relevance=self.source, projected=self.projected, asked=self.asked)

    def select(self, view: EncoderView) -> Selection:
        self.views.append(view)
        kept = self.each(view, lambda cells, n: torch.arange(n).expand(len(cells), -1))
        return Selection(kept, {})


@torch.no_grad()
def look(built: Any, inputs: dict[str, Any], **settings: Any) -> tuple[EncoderView, str]:
    with Spy(**settings)(built) as handle:
        built(**inputs)
    assert handle.report is not None
    return handle.pruner.views[-1], handle.report.score  # type: ignore[attr-defined]


def cosine(a: Tensor, b: Tensor) -> float:
    return float((a.double() @ b.double()) / a.double().norm() / b.double().norm())


def behind(inputs: dict[str, Tensor], row: int, images: int) -> list[int]:
    """Ids of the text behind a row's `images`-th image, by hand; runs of placeholders are images.

    Several of one run cannot be told apart here; `request` puts words between them.
    """
    ids, mask = inputs["input_ids"][row].tolist(), inputs["attention_mask"][row].tolist()
    ends = [
        c for c, i in enumerate(ids) if i == IMAGE and (c + 1 == len(ids) or ids[c + 1] != IMAGE)
    ]
    text = [c for c, i in enumerate(ids) if i != IMAGE and mask[c]]
    after = [ids[c] for c in text if c > ends[images]]
    return after or [ids[c] for c in text]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_mean_cosine_to_words_behind_the_image(family: str, side: str) -> None:
    built = model(family)
    req = request(built, [2, 0, 1], text=[3, 6, 9], side=side)
    view, score = look(built, req.inputs, projected=True)
    assert score.endswith("; relevance by the language model's text embeddings") and view.by_words
    assert view.relevance is not None and view.projected is not None
    words = built.get_input_embeddings().weight.detach()
    texts = [behind(req.inputs, 0, 0), behind(req.inputs, 0, 1), behind(req.inputs, 2, 0)]
    assert len({len(text) for text in texts}) == 3 and not any(PAD in text for text in texts)
    apart = []
    for crop, image in enumerate(view.images):
        for cell in (0, 7, 15):
            if not view.candidates[crop, cell]:
                assert view.relevance[crop, cell] == 0
                continue
            feature = view.projected[crop, cell]
            cosines = [cosine(feature, words[i]) for i in texts[image]]
            got = float(view.relevance[crop, cell])
            assert abs(got - sum(cosines) / len(cosines)) < 1e-6
            other = [cosine(feature, words[i]) for i in texts[image - 1]]
            apart.append(abs(got - sum(other) / len(other)))
    assert max(apart) > 1e-2, "control: the words behind another image"


def test_all_text_where_none_is_behind() -> None:
    built = model()
    req = request(built, [1], text=0)
    inputs = req.inputs | {k: req.inputs[k][:, :-3] for k in ("input_ids", "attention_mask")}
    assert inputs["input_ids"][0, -1] == IMAGE
    view, _ = look(built, inputs, projected=True)
    words = built.get_input_embeddings().weight.detach()
    ids = [i for i in inputs["input_ids"][0].tolist() if i != IMAGE]
    assert view.projected is not None and view.relevance is not None
    want = sum(cosine(view.projected[0, 3], words[i]) for i in ids) / len(ids)
    assert abs(float(view.relevance[0, 3]) - want) < 1e-6

    bare = inputs | {k: inputs[k][:, len(ids) :] for k in ("input_ids", "attention_mask")}
    encoded: list[int] = []
    built.model.vision_tower.register_forward_pre_hook(lambda *_: encoded.append(1))
    with pytest.raises(VlmpruneError, match="row 0 holds an image and no text"):
        look(built, bare)
    assert not encoded


@pytest.mark.parametrize("name", ["qwen2_5_vl", "internvl", "llama4"])
def test_other_families(name: str) -> None:
    """Of what the language model gets for a token; of Llama 4 that comes from its forward."""
    entry = ZOO[name]
    built = entry.build()
    req = entry.request(built, [["image"]])
    given: list[Tensor] = []
    hook = built.get_decoder().register_forward_pre_hook(
        lambda _, args, kwargs: given.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    with torch.no_grad():
        built(**req.inputs)
    hook.remove()
    view, _ = look(built, req.inputs)
    assert view.projected is None, "it was not asked for"
    ids = req.inputs["input_ids"][0]
    visual = (ids == 5).nonzero()[:, 0]
    tokens = given[0][0, visual]
    # A tile is an image where the prompt says so; then the text between tiles counts for some.
    last = int(visual[-1])
    words = built.get_input_embeddings().weight.detach()
    text = [int(i) for i in ids[last + 1 :]]
    want = sum(cosine(tokens[-1], words[i]) for i in text) / len(text)
    assert view.relevance is not None
    found = view.relevance[view.candidates][-1]
    assert abs(float(found) - want) < 1e-5


def tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Words w6, w7, … by number, between a start and an end."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = {f"w{i}": i for i in range(6, VOCABULARY)} | {"?": 5, "<s>": 3, "</s>": 4, "<p>": 0}
    made = Tokenizer(models.WordLevel(words, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 3), ("</s>", 4)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<p>", bos_token="<s>", eos_token="</s>", unk_token="?"
    )
    fast.save_pretrained(folder)
    return fast


def clip(folder: Path, width: int = 32) -> Any:
    """A tiny random CLIP model, saved with its tokenizer."""
    torch.manual_seed(3)
    shape = {"num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    text = CLIPTextConfig(
        vocab_size=VOCABULARY, hidden_size=24, max_position_embeddings=LONGEST,
        bos_token_id=3, eos_token_id=4, pad_token_id=0, **shape,
    )  # fmt: skip
    vision = CLIPVisionConfig(hidden_size=width, image_size=56, patch_size=14, **shape)
    config = CLIPConfig(
        text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=20
    )
    built: Any = CLIPModel(config).eval()
    with torch.no_grad():
        for weight in built.parameters():
            if weight.ndim > 1:
                weight.normal_(std=0.8 / weight.shape[-1] ** 0.5)
            else:
                weight.add_(torch.randn_like(weight) * 0.3)
    built.save_pretrained(folder)
    tokenizer(folder)
    return built


def host(folder: Path, family: str = "llava") -> Any:
    built = model(family)
    tokenizer(folder)
    built.name_or_path = str(folder)
    return built


@torch.no_grad()
def by_hand(dual: Any, features: Tensor, ids: list[int]) -> Tensor:
    """[cells] mean cosine of CLIP's embeddings of features and of pieces of a text."""
    whole = [3, *ids, 4]
    pieces = [whole[i : i + LONGEST] for i in range(0, len(whole), LONGEST)]
    parts = []
    for piece in pieces:
        fill = [0] * (LONGEST - len(piece))
        out = dual.text_model(
            input_ids=torch.tensor([piece + fill]),
            attention_mask=torch.tensor([[1] * len(piece) + [0] * len(fill)]),
        )
        parts.append(dual.text_projection(out.pooler_output)[0])
    images = dual.visual_projection(dual.vision_model.post_layernorm(features))
    return torch.tensor(
        [sum(cosine(image, part) for part in parts) / len(parts) for image in images]
    )


@pytest.mark.parametrize("words", [2, LONGEST - 5, 4 * LONGEST])
@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_a_clip_model_that_the_user_gives(family: str, words: int, tmp_path: Path) -> None:
    built, dual = host(tmp_path / "host", family), clip(tmp_path / "clip")
    req = request(built, [1, 1], text=[words, words + 1])
    source = str(tmp_path / "clip")
    view, score = look(built, req.inputs, source=source)
    assert score.endswith(f"; relevance by the text tower of {source}") and not view.by_words
    assert view.relevance is not None
    for crop, image in enumerate(view.images):
        text = behind(req.inputs, image, 0)
        want = by_hand(dual, view.features[crop], text)
        torch.testing.assert_close(view.relevance[crop], want, rtol=0, atol=1e-5)
        other = by_hand(dual, view.features[crop], text[1:])
        assert (view.relevance[crop] - other).abs().max() > 1e-4


QUESTION = "What is in the middle,\na user or a model?"
TEMPLATES = {
    "vicuna": "A chat. USER: {before}\n{question} ASSISTANT:",
    "chatml": "system\nYou are kind.\nuser\n{before}\n{question}\nassistant\n",
    "llama 3": "You are kind.user\n\n{before}{question}assistant\n\n",
    "mistral": "[INST] {before}{question} [/INST]",
    "gemma": "user\n{before}{question}\nmodel\n",
    "idefics": "User: {before}{question}\nAssistant:",
    "plain": "{before}{question}",
}


@pytest.mark.parametrize("instruction", ["", WORD_OR_PHRASE, OPTION_LETTER])
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_bare_question(name: str, instruction: str) -> None:
    whole = TEMPLATES[name].format(before="", question=QUESTION + instruction)
    assert bare(whole) == QUESTION
    # Behind the image, where no turn begins any more.
    behind = TEMPLATES[name].partition("{before}")[2].format(question=QUESTION + instruction)
    assert bare(behind) == QUESTION
    # Of several turns the last; of nothing nothing.
    if name != "plain":
        asked = TEMPLATES[name].format(before="", question="First?") + " an answer.\n" + whole
        assert bare(asked) == QUESTION
    assert bare(TEMPLATES[name].partition("{question}")[2]) == ""


def test_the_text_tower_gets_the_bare_question(tmp_path: Path) -> None:
    """By a tokenizer that says w6 as ASSISTANT: and w7 as USER:."""
    built, dual = host(tmp_path / "host"), clip(tmp_path / "clip")
    for file in (tmp_path / "host").glob("*.json"):
        text = file.read_text(encoding="utf-8")
        text = text.replace('"w6"', '"ASSISTANT:"').replace('"w7"', '"USER:"')
        file.write_text(text, encoding="utf-8")
    source = str(tmp_path / "clip")
    for ids, want in (
        ([IMAGE] * 16 + [8, 9, 10, 6], [8, 9, 10]),
        ([11, 7] + [IMAGE] * 16 + [8, 9, 6, 12, 7, 13, 14, 6], [13, 14]),
        ([11, 7, 8, 9] + [IMAGE] * 16 + [6], [8, 9]),
    ):
        inputs = {
            "input_ids": torch.tensor([ids]),
            "attention_mask": torch.ones(1, len(ids), dtype=torch.long),
            "pixel_values": request(built, [1]).inputs["pixel_values"],
        }
        view, _ = look(built, inputs, source=source, asked="bare")
        assert view.relevance is not None
        hand = by_hand(dual, view.features[0], want)
        torch.testing.assert_close(view.relevance[0], hand, rtol=0, atol=1e-5)
        whole, _ = look(built, inputs, source=source, asked="prompt")
        assert whole.relevance is not None
        assert (whole.relevance - view.relevance).abs().max() > 1e-4


def test_it_is_loaded_once_an_attachment_and_goes_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = host(tmp_path / "host")
    clip(tmp_path / "clip")
    req = request(built, [1])
    loads = []
    plain = relevance._pretrained
    monkeypatch.setattr(
        relevance,
        "_pretrained",
        lambda kind, *a, **k: (loads.append(kind), plain(kind, *a, **k))[1],
    )
    names = {name for name, _ in built.named_modules()}
    pruner = Spy(source=str(tmp_path / "clip"))
    for _ in range(2):
        with torch.no_grad(), pruner(built) as handle:
            built(**req.inputs)
            built(**req.inputs)
        assert sorted(loads) == ["AutoConfig", "AutoTokenizer", "AutoTokenizer", "CLIPModel"]
        loads.clear()
        before = len(relevance._loaded)
        del handle
        assert len(relevance._loaded) == before - 1
    assert names == {name for name, _ in built.named_modules()}, "nothing stays on the model"


def test_the_models_own_text_tower(tmp_path: Path) -> None:
    built, dual = host(tmp_path / "host"), clip(tmp_path / "clip")
    req = request(built, [1])
    dual.config.name_or_path = str(tmp_path / "clip")
    built.model.both = dual
    view, score = look(built, req.inputs)
    assert score.endswith("; relevance by the model's own text tower")
    assert view.relevance is not None
    want = by_hand(dual, view.features[0], behind(req.inputs, 0, 0))
    torch.testing.assert_close(view.relevance[0], want, rtol=0, atol=1e-5)
    # One of another width cannot be it.
    built.model.both = clip(tmp_path / "other", width=16)
    built.model.both.config.name_or_path = str(tmp_path / "other")
    assert look(built, req.inputs)[1].endswith("the language model's text embeddings")


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    built = host(tmp_path / "host")
    req = request(built, [1])
    clip(tmp_path / "clip", width=16)
    source = str(tmp_path / "clip")
    with pytest.raises(VlmpruneError, match=r"features of width 16, but .* makes 32"):
        look(built, req.inputs, source=source)
    with pytest.raises(VlmpruneError, match="cannot be loaded as AutoConfig"):
        look(built, req.inputs, source=str(tmp_path / "nowhere"))
    built.config.save_pretrained(tmp_path / "llava")
    with pytest.raises(VlmpruneError, match="a model of type 'llava'"):
        look(built, req.inputs, source=str(tmp_path / "llava"))
    clip(tmp_path / "clip")
    built.name_or_path = ""
    with pytest.raises(VlmpruneError, match="does not say where it was loaded from"):
        look(built, req.inputs, source=source)
    # Weights that are pickles.
    weights = tmp_path / "clip" / "model.safetensors"
    torch.save({}, tmp_path / "clip" / "pytorch_model.bin")
    weights.unlink()
    with pytest.raises(VlmpruneError, match="cannot be loaded as CLIPModel"):
        look(built, req.inputs, source=source)


def test_visions_of_methods_that_look_at_the_question_are_refused() -> None:
    built = model()
    with Spy()(built) as handle, pytest.raises(VlmpruneError, match="looks at the question"):
        handle.encode(**request(built, [1]).inputs)
