"""What some rows of a prompt attend to in a layer that is about to be cut."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from vlmprune.hosts import masks
from vlmprune.hosts.attention import AttentionCall
from vlmprune.runtime.decoder.prompt_end import repeated
from vlmprune.runtime.decoder.seen_layers import Seen, attention
from vlmprune.views import LayerView, Probes

# Numbers of keys that are scored at once.
SCORED = 2**24


def probed(
    view: LayerView, seen: Seen, call: AttentionCall, probes: Tensor, mask: Tensor, places: Tensor
) -> LayerView:
    """The view of a layer with what the probe rows see.

    Args:
        view: without it.
        seen: the layer.
        call: its attention call.
        probes: [b, P] columns of the rows, as `drawn` has them.
        mask: [b, S] bool; the prompt's real columns.
        places: [b, V] columns of the visual tokens.
    """
    shown, times, query, lines = seen.shown, seen.times, call.query, call.mask
    start, tail = shown.layer.start, shown.keys.shape[2]
    batch, heads, rows, width = query.shape
    columns = repeated(probes, times).to(query.device)
    sums = torch.zeros(batch, tail, device=query.device)
    counts = torch.zeros(batch, tail, dtype=torch.long, device=query.device)
    # A few rows at a time, so that memory stays linear in the prompt's length.
    for part in columns.split(max(1, SCORED // (batch * heads * tail)), dim=1):
        at = (part - (mask.shape[1] - rows)).clamp(min=0)
        if isinstance(lines, Tensor) and lines.ndim == 4:
            own = masks.lines(masks.last(lines, tail), at, tail, None)
            sees = masks.visible(own).any(dim=1)
        else:
            # The real columns from `start` on, up to each of `part`.
            real = repeated(mask, times)[:, start:].to(query.device)
            sees = masks.lines(real, part - start, real.shape[1], 0)[:, 0]
        sees = sees & (part >= 0)[..., None]
        chosen = query.gather(2, at[:, None, :, None].expand(-1, heads, -1, width))
        sums += attention(chosen, shown, sees, call).mean(dim=1).sum(dim=1)
        counts += sees.sum(dim=1)
    own_places = (repeated(places, times).to(query.device) - start).clamp(min=0)
    return replace(view, sums=shown.layer.sharing.mean(sums), seen=counts, places=own_places)


def drawn(mask: Tensor, probes: Probes) -> Tensor:
    """[B, P] columns of each sample's probe rows, -1 where it has fewer.

    Drawn on the CPU, sample by sample, so that neither the device nor the other samples matter.

    Args:
        mask: [B, S] bool; False is padding.
        probes: how many.
    """
    rows = []
    for real in mask.cpu():
        columns = real.nonzero()[:, 0]
        split = max(0, len(columns) - probes.recent)
        generator = torch.Generator().manual_seed(probes.seed)
        chance = torch.randperm(split, generator=generator)[: probes.random].sort().values
        rows.append(torch.cat((columns[chance], columns[split:])))
    longest = max((len(row) for row in rows), default=0)
    padded = [nn.functional.pad(row, (longest - len(row), 0), value=-1) for row in rows]
    return torch.stack(padded).to(mask.device)
