"""Transformer towers' features, computed without what no feature shows.

A tower pools one token: an image's class token, a caption's end mark. Of its last block only that
token's query, output, residual and MLP reach the feature, and no token needs a key or a value
(``answer``): 1/12 of a 12-layer tower's work. Of a caption under a causal mask only the tokens up
to the end mark do, and captions with the same beginning share what it becomes, layer after layer.
Leaving the rest out changes values by rounding alone, and gradients too: what is left out has none.

These are functions beside a model, of its own parameters; `seen_towers` finds them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

Map = Callable[[Tensor], Tensor]
Affine = tuple[Tensor, Tensor | None]  # weight [k, D] and bias [k]


def attention(q: Tensor, k: Tensor, v: Tensor, **mask) -> Tensor:  # [n, heads, Lq | L | L, d]
    """PyTorch's attention; on a CPU bf16 is widened to fp32 for it.

    Its gradients in bf16 take several times as long there as in fp32, with matrix units (AMX) as
    without. With them features alone would be faster in bf16; but those with and without gradients
    are the same to the bit.
    """
    if q.dtype != torch.bfloat16 or q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, k, v, **mask)
    with torch.autocast("cpu", enabled=False):
        wide = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), **mask)
    return wide.to(q.dtype)


def patches(conv: nn.Conv2d, images: Tensor) -> Tensor:  # [n, 3, H, W] -> [n, patches, D]
    """What a convolution makes of each patch; on a CPU by a product, where patches do not overlap.

    oneDNN's gradient of such a weight takes many times as long as a product's in bf16 with AMX, and
    somewhat longer in fp32.
    """
    down, across = conv.kernel_size
    apart = conv.stride == conv.kernel_size and conv.padding == (0, 0) and conv.groups == 1
    fit = images.shape[2] % down == images.shape[3] % across == 0
    if images.device.type != "cpu" or not apart or not fit or conv.dilation != (1, 1):
        return conv(images).flatten(2).transpose(1, 2)
    x = images.unflatten(2, (-1, down)).unflatten(4, (-1, across)).permute(0, 2, 4, 1, 3, 5)
    return F.linear(x.flatten(3).flatten(1, 2), conv.weight.flatten(1), conv.bias)


def answer(
    query: Tensor,  # [n, C]
    rows: Tensor,  # [n, L, D]
    key: Affine,
    value: Affine,
    heads: int,
    seen: Tensor | None = None,  # [n, 1, L] bool: the places that are asked; None: all
) -> Tensor:  # [n, C]
    """Attention of one query per row of places: softmax(q · K x) V x, place by place.

    With a single query q of a head, q · (K x) = (q K) · x and Σ a (V x) = V (Σ a x): keys and
    values of the places are not computed. Scores are in at least fp32, as within PyTorch's own.
    """
    q = query.unflatten(-1, (heads, -1))  # [n, heads, d]
    q = q / q.shape[-1] ** 0.5
    key_weight, value_weight = (part[0].unflatten(0, (heads, -1)) for part in (key, value))
    asked = (q.transpose(0, 1) @ key_weight).transpose(0, 1)  # [n, heads, D]
    with torch.autocast(rows.device.type, enabled=False):
        wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
        score = asked.to(wide.dtype) @ wide.transpose(1, 2)  # [n, heads, L]
        if key[1] is not None:
            bias = key[1].unflatten(0, (heads, -1)).to(wide.dtype)
            score = score + (q.to(wide.dtype) * bias).sum(-1, keepdim=True)
        if seen is not None:
            score = score.masked_fill(~seen, -torch.inf)
        mean = (score.softmax(-1) @ wide).to(rows.dtype)  # [n, heads, D]
    out = (mean.transpose(0, 1) @ value_weight.transpose(1, 2)).transpose(0, 1).flatten(1)
    return out if value[1] is None else out + value[1].to(out.dtype)


class Block(NamedTuple):
    """A pre-norm residual block: x + scale1(attention(norm1(x))), then x + scale2(mlp(norm2(x))).

    Attributes:
        project: x -> query, key and value.
        maps: the weights and biases of these three.
        out: of the attention.
    """

    norm1: Map
    project: Callable[[Tensor], tuple[Tensor, ...]]
    maps: Callable[[], tuple[Affine, ...]]
    heads: int
    out: Map
    norm2: Map
    mlp: Map
    scale1: Map = nn.Identity()
    scale2: Map = nn.Identity()

    def attend(self, q: Tensor, k: Tensor, v: Tensor, **mask) -> Tensor:  # [n, L, D] each
        split = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (q, k, v))
        return attention(*split, **mask).transpose(1, 2).flatten(2)

    def answer(
        self,
        own: Tensor,  # [n, D] of the pooled tokens, normed
        rows: Tensor,  # [n, L, D] of all, normed
        seen: Tensor | None = None,  # [n, 1, L] bool
    ) -> Tensor:
        """[n, D]: what the pooled tokens attend to."""
        query, key, value = self.maps()
        return answer(F.linear(own, *query), rows, key, value, self.heads, seen)

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        x = x + self.scale1(self.out(attended))
        return x + self.scale2(self.mlp(self.norm2(x)))


@dataclass(frozen=True)
class ImageTower:
    """Pools a class token, put before the patches.

    Attributes:
        embed: [n, 3, H, W] -> [n, 1 + patches, D].
        finish: [n, D] class tokens -> features.
    """

    embed: Map
    blocks: tuple[Block, ...]
    finish: Map

    def __call__(self, images: Tensor) -> Tensor:
        """[n, D] of [n, 3, H, W]; not normalised."""
        x = self.embed(images)
        for block in self.blocks[:-1]:
            x = block.finish(x, block.attend(*block.project(block.norm1(x))))
        last, normed = self.blocks[-1], self.blocks[-1].norm1(x)
        return self.finish(last.finish(x[:, 0], last.answer(normed[:, 0], normed)))


class Layout(Protocol):
    """How the tokens of n captions lie in what a text tower carries from block to block."""

    tokens: Tensor  # those carried

    def positions(self, table: Tensor) -> Tensor:
        """Rows of [context, D] for the tokens carried."""

    def spread(self, x: Tensor) -> Tensor:
        """[n, L, D] of what is carried."""

    def gather(self, x: Tensor) -> Tensor:
        """What is carried, of [n, L, D]."""

    def ends(self, x: Tensor) -> Tensor:
        """[n, D] of what is carried: the pooled tokens."""

    def seen(self) -> Tensor:
        """[n, 1, L] bool: the positions up to the pooled token."""


class Whole:
    """[n, L, D]: every token of every caption, padding included."""

    def __init__(self, tokens: Tensor, ends: Tensor) -> None:  # [n, L], [n]
        self.tokens, self._ends = tokens, ends

    def positions(self, table: Tensor) -> Tensor:
        return table[: self.tokens.shape[1]]

    def spread(self, x: Tensor) -> Tensor:
        return x

    gather = spread

    def ends(self, x: Tensor) -> Tensor:
        return x[torch.arange(len(x), device=x.device), self._ends]

    def seen(self) -> Tensor:
        order = torch.arange(self.tokens.shape[1], device=self._ends.device)
        return (order <= self._ends[:, None])[:, None]


class Shared:
    """[T, D]: the tokens up to each end mark, those of a common beginning once.

    Made on the host, where finding equal beginnings costs a search per position.
    """

    def __init__(self, tokens: Tensor, ends: Tensor) -> None:  # [n, L], [n], both on the CPU
        words, stops = tokens.numpy(), ends.numpy()
        length, base = int(stops.max()) + 1, int(words.max()) + 1
        node = np.zeros(len(words), np.int64)  # of each caption: its last token so far
        place = np.empty((len(words), length), np.int64)
        first, count = [], 0
        for t in range(length):
            alive = np.flatnonzero(stops >= t)
            key = node[alive] * base + words[alive, t]
            _, index, inverse = np.unique(key, return_index=True, return_inverse=True)
            node[alive] = count + inverse
            place[:, t] = node  # after its end mark a caption repeats it, where no token looks
            first.append(alive[index] * length + t)
            count += len(index)
        self._ends, self._stops = torch.from_numpy(node), ends
        self._place = torch.from_numpy(place)
        self._first = torch.from_numpy(np.concatenate(first))
        self.tokens = tokens[:, :length].flatten()[self._first]

    def positions(self, table: Tensor) -> Tensor:
        return F.embedding(self._first % self._place.shape[1], table)

    def spread(self, x: Tensor) -> Tensor:
        return F.embedding(self._place, x)

    def gather(self, x: Tensor) -> Tensor:
        return F.embedding(self._first, x.flatten(0, 1))

    def ends(self, x: Tensor) -> Tensor:
        return F.embedding(self._ends, x)

    def seen(self) -> Tensor:
        columns = torch.arange(self._place.shape[1], device=self._stops.device)
        return (columns <= self._stops[:, None])[:, None]


@dataclass(frozen=True)
class TextTower:
    """Pools an end mark under a causal mask.

    Attributes:
        end: [n, L] tokens -> [n] positions of the end marks.
        embed: (tokens, their positions' rows) -> rows of D.
        table: [context, D] of the positions.
        finish: [n, D] end marks -> features.
    """

    end: Map
    embed: Callable[[Tensor, Tensor], Tensor]
    table: Tensor
    blocks: tuple[Block, ...]
    finish: Map

    def __call__(self, tokens: Tensor) -> Tensor:
        """[n, D] of [n, L] tokens; not normalised."""
        return self.features(Whole(tokens, self.end(tokens)))

    def shared(self, tokens: Tensor) -> Tensor:
        """The same of tokens on the CPU, without what they share and what follows their ends."""
        return self.features(Shared(tokens, self.end(tokens)))

    def features(self, layout: Layout) -> Tensor:
        """[n, D] of the captions in a layout."""
        x = self.embed(layout.tokens, layout.positions(self.table))
        for block in self.blocks[:-1]:
            qkv = (layout.spread(part) for part in block.project(block.norm1(x)))
            x = block.finish(x, layout.gather(block.attend(*qkv, is_causal=True)))
        last, normed = self.blocks[-1], self.blocks[-1].norm1(x)
        pooled = last.answer(layout.ends(normed), layout.spread(normed), layout.seen())
        return self.finish(last.finish(layout.ends(x), pooled))
