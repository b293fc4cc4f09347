"""A small vision transformer whose query, key and value projections are single, bias-free matrices (FedTP)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torchvision.ops import MLP

from heterosync.models.encoder import FullLinear


class Attention(nn.Module):
    """Self-attention of tokens (b, t, dim) with `heads` heads of `dim_head` entries; `qkv.weight` stacks Q, K and V."""

    def __init__(self, dim: int, heads: int, dim_head: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * heads * dim_head, bias=False)
        self.out = nn.Sequential(nn.Linear(heads * dim_head, dim), nn.Dropout(dropout))

    def forward(self, tokens: Tensor) -> Tensor:
        b, t, _ = tokens.shape
        q, k, v = self.qkv(tokens).view(b, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        return self.out(scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, -1))


class Block(nn.Module):
    """x + attention(norm(x)), then x + MLP(norm(x)), with GELU."""

    def __init__(self, dim: int, heads: int, dim_head: int, mlp: int, dropout: float) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(2))
        self.attention = Attention(dim, heads, dim_head, dropout)
        self.mlp = MLP(dim, [mlp, dim], activation_layer=nn.GELU, inplace=None, dropout=dropout)

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens + self.attention(self.norms[0](tokens))
        return tokens + self.mlp(self.norms[1](tokens))


class ViT(nn.Module):
    """Dosovitskiy et al., ICLR 2021: images (b, c, side, side) -> logits (b,) of the positive class.

    Patches of `patch` pixels, which must divide `side`, become tokens by one linear map; a class token is put before
    them, and its last state is what the classifier sees. First values from the global generator.
    """

    def __init__(
        self,
        side: int,
        channels: int = 3,
        patch: int = 16,
        dim: int = 128,
        depth: int = 6,
        heads: int = 8,
        dim_head: int = 64,
        mlp: int = 256,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.patches = nn.Conv2d(channels, dim, patch, patch)
        self.token = nn.Parameter(torch.randn(1, 1, dim))
        self.positions = nn.Parameter(torch.randn(1, (side // patch) ** 2 + 1, dim))
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.Sequential(*(Block(dim, heads, dim_head, mlp, dropout) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim)
        self.fc = FullLinear(dim, 1)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.patches(images).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.token.expand(images.shape[0], -1, -1), tokens], 1) + self.positions
        return self.fc(self.norm(self.blocks(self.dropout(tokens))[:, 0])).squeeze(1)


def qkv_names(depth: int) -> tuple[str, ...]:
    """The state's names of a `ViT`'s query, key and value matrices, from the first layer on."""
    return tuple(f"blocks.{layer}.attention.qkv.weight" for layer in range(depth))


class HyperNetwork(nn.Module):
    """A site's embedding (embed,) -> its QKV matrices, `depth` of shape (3 * heads * dim_head, dim).

    Li H. et al. 2023 (FedTP): one linear layer, `layers` times ReLU and a linear layer, all of width `hidden`, and one
    linear head per matrix, which at the defaults holds nearly all of the 178 million weights.
    """

    def __init__(
        self, depth: int, rows: int, columns: int, embed: int = 128, hidden: int = 150, layers: int = 3
    ) -> None:
        super().__init__()
        more = [part for _ in range(layers) for part in (nn.ReLU(), nn.Linear(hidden, hidden))]
        self.body = nn.Sequential(nn.Linear(embed, hidden), *more)
        self.heads = nn.ModuleList(nn.Linear(hidden, rows * columns) for _ in range(depth))
        self.shape = rows, columns

    def forward(self, embedding: Tensor) -> list[Tensor]:
        hidden = self.body(embedding)
        return [head(hidden).view(self.shape) for head in self.heads]
