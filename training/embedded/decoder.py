"""Projector and decoder as training runs them: stock Llama arithmetic, several questions at once.

Parameter names and arithmetic are those of Transformers' LLaVA, so that export is a renaming.
What is added: one pass over the picture serves many questions, each of which sees the picture and
itself alone, and small heads for the dense training losses, which are not exported.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from scenes import GRID, NAMES, PATCHES
from torch import Tensor, nn

PREFIX = 257
"""`USER:` and the 256 visual tokens."""


@dataclass(frozen=True)
class Sizes:
    """Sizes of the decoder, under Transformers' names."""

    vocab_size: int
    hidden_size: int = 192
    intermediate_size: int = 512
    num_hidden_layers: int = 5
    num_attention_heads: int = 6
    num_key_value_heads: int = 3
    head_dim: int = 32


def rotary(positions: Tensor, dim: int, theta: float = 10000.0) -> tuple[Tensor, Tensor]:
    """Cosines and sines `[..., dim]` of Llama's rotary embedding."""
    frequency = 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    angle = positions[..., None].float() * frequency.to(positions.device)
    angle = torch.cat([angle, angle], dim=-1)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Apply the rotary embedding to `[..., heads, tokens, dim]`."""
    cos, sin = table
    half = x.shape[-1] // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], dim=-1) * sin


class Attention(nn.Module):
    """Llama's attention over a shared causal prefix and rows of questions that follow it."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.sizes = sizes
        wide = sizes.num_attention_heads * sizes.head_dim
        narrow = sizes.num_key_value_heads * sizes.head_dim
        self.q_proj = nn.Linear(sizes.hidden_size, wide, bias=False)
        self.k_proj = nn.Linear(sizes.hidden_size, narrow, bias=False)
        self.v_proj = nn.Linear(sizes.hidden_size, narrow, bias=False)
        self.o_proj = nn.Linear(wide, sizes.hidden_size, bias=False)

    def heads(self, x: Tensor, linear: nn.Linear, table: tuple[Tensor, Tensor] | None) -> Tensor:
        """`[B, T, hidden] -> [B, heads, T, dim]`, key-value heads repeated for their group."""
        y = linear(x).unflatten(-1, (-1, self.sizes.head_dim)).transpose(1, 2)
        if table is not None:
            y = rotate(y, table)
        return y.repeat_interleave(self.sizes.num_attention_heads // y.shape[1], dim=1)

    def forward(
        self,
        image: Tensor,
        text: Tensor,
        image_table: tuple[Tensor, Tensor],
        text_table: tuple[Tensor, Tensor],
        mask: Tensor,
        last: bool,
        point: bool,
    ) -> tuple[Tensor | None, Tensor, Tensor | None]:
        """Image `[B, 257, H]`, text `[B * rows, R, H]`, mask `[B * rows, 1, R, 257 + R]`."""
        k, v = self.heads(image, self.k_proj, image_table), self.heads(image, self.v_proj, None)
        seen = None
        if not last:
            q = self.heads(image, self.q_proj, image_table)
            seen = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            seen = self.o_proj(seen.transpose(1, 2).flatten(2))
        rows = text.shape[0] // image.shape[0]
        q = self.heads(text, self.q_proj, text_table)
        k = torch.cat(
            [k.repeat_interleave(rows, 0), self.heads(text, self.k_proj, text_table)], dim=2
        )
        v = torch.cat([v.repeat_interleave(rows, 0), self.heads(text, self.v_proj, None)], dim=2)
        read = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        pointed = None
        if point:
            scores = q @ k.transpose(2, 3) / self.sizes.head_dim**0.5 + mask
            pointed = scores.log_softmax(-1)[..., :PREFIX]
        return seen, self.o_proj(read.transpose(1, 2).flatten(2)), pointed


class MLP(nn.Module):
    """Llama's gated feed-forward layer."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(sizes.hidden_size, sizes.intermediate_size, bias=False)
        self.up_proj = nn.Linear(sizes.hidden_size, sizes.intermediate_size, bias=False)
        self.down_proj = nn.Linear(sizes.intermediate_size, sizes.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., H] -> [..., H]`."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """One decoder layer; the last one leaves the picture's rows as they are (nobody reads them)."""

    def __init__(self, sizes: Sizes, last: bool) -> None:
        super().__init__()
        self.last = last
        self.self_attn = Attention(sizes)
        self.mlp = MLP(sizes)
        self.input_layernorm = nn.RMSNorm(sizes.hidden_size, eps=1e-6)
        self.post_attention_layernorm = nn.RMSNorm(sizes.hidden_size, eps=1e-6)

    def forward(
        self, image: Tensor, text: Tensor, *context, point: bool = False
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Both streams, `[B, 257, H]` and `[B * rows, R, H]`; `context` as in `Attention`.

        With `point` also the log of the attention to the prefix, `[B * rows, heads, R, 257]`.
        """
        norm = self.input_layernorm
        seen, read, pointed = self.self_attn(norm(image), norm(text), *context, self.last, point)
        text = text + read
        text = text + self.mlp(self.post_attention_layernorm(text))
        if seen is not None:
            image = image + seen
            image = image + self.mlp(self.post_attention_layernorm(image))
        return image, text, pointed


class Projector(nn.Module):
    """LLaVA's Linear-GELU-Linear, on features standardised by fixed statistics.

    The standardisation is folded into the first layer at export.
    """

    def __init__(self, width: int, sizes: Sizes) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(width, sizes.hidden_size)
        self.linear_2 = nn.Linear(sizes.hidden_size, sizes.hidden_size)
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("std", torch.ones(width))

    def forward(self, features: Tensor) -> Tensor:
        """`[B, 256, 384] -> [B, 256, H]`."""
        return self.linear_2(F.gelu(self.linear_1((features - self.mean) / self.std)))


HEADS = {
    "row": GRID,
    "column": GRID,
    "own": len(NAMES) + 1,
    "left": len(NAMES) + 1,
    "above": len(NAMES) + 1,
    "phase": (PATCHES // GRID) ** 2,
    "tens": 10,
    "units": 10,
}
"""Dense labels at the picture's tokens after the middle layer, and their numbers of classes."""


class Decoder(nn.Module):
    """Projector, word embeddings (tied with the output), Llama layers, and the training heads."""

    def __init__(self, sizes: Sizes, vision_width: int = 384, middle: int = 3) -> None:
        super().__init__()
        self.sizes, self.middle = sizes, middle
        self.multi_modal_projector = Projector(vision_width, sizes)
        self.embed_tokens = nn.Embedding(sizes.vocab_size, sizes.hidden_size)
        self.layers = nn.ModuleList(
            Layer(sizes, i == sizes.num_hidden_layers - 1) for i in range(sizes.num_hidden_layers)
        )
        self.norm = nn.RMSNorm(sizes.hidden_size, eps=1e-6)
        self.heads = nn.ModuleDict({k: nn.Linear(sizes.hidden_size, n) for k, n in HEADS.items()})
        self.digit = nn.Linear(sizes.hidden_size, 10)
        self.scale = nn.Parameter(torch.tensor(1.0))
        nn.init.normal_(self.embed_tokens.weight, std=0.05)
        for module in self.layers.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.04)

    def forward(
        self,
        features: Tensor,
        user: Tensor,
        tokens: Tensor,
        positions: Tensor,
        mask: Tensor,
        point: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Run pictures and questions.

        Args:
            features: `[B, 256, 384]`.
            user: token number of `USER:`, a scalar.
            tokens: `[B * rows, R]`, questions packed into rows.
            positions: `[B * rows, R]`; each question restarts at 257.
            mask: `[B * rows, 1, R, 257 + R]`, 0 or minus infinity.
            point: also give the attention that follows the middle layer.

        Returns:
            Projected visual tokens `[B, 256, H]`, their state after the middle layer, the
            normalised last state of the questions `[B * rows, R, H]`, and with `point` the log of
            the questions' attention to the prefix in the next layer, `[B * rows, heads, R, 257]`.
        """
        visual = self.multi_modal_projector(features)
        start = self.embed_tokens(user).expand(len(features), 1, -1)
        image, text = torch.cat([start, visual], dim=1), self.embed_tokens(tokens)
        dim = self.sizes.head_dim
        image_table = rotary(torch.arange(PREFIX, device=features.device), dim)
        cos, sin = rotary(positions, dim)
        text_table = (cos[:, None], sin[:, None])
        between, pointed = image, None
        for number, layer in enumerate(self.layers):
            if number == self.middle:
                between = image
            here = point and number == self.middle
            image, text, found = layer(image, text, image_table, text_table, mask, point=here)
            pointed = found if here else pointed
        return visual, between[:, 1:], self.norm(text), pointed

    def exported(self) -> dict[str, Tensor]:
        """Weights under LLaVA's names on disk, the standardisation folded into the projector."""
        first = self.multi_modal_projector.linear_1
        mean, std = self.multi_modal_projector.mean, self.multi_modal_projector.std
        folded = first.weight / std
        named = {
            "multi_modal_projector.linear_1.weight": folded,
            "multi_modal_projector.linear_1.bias": first.bias - folded @ mean,
        }
        for key, value in self.state_dict().items():
            if key.startswith("multi_modal_projector.linear_2"):
                named[key] = value
            elif key.startswith(("embed_tokens", "layers", "norm")):
                named[f"language_model.model.{key}"] = value
        return {k: v.detach().float().cpu() for k, v in named.items()}
