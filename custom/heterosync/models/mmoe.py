"""The two-task network of HSL: two encoders that meet in a multi-gate mixture of experts (paper, Fig. 1A).

    f_t = relu(encoder_t(x_t))              e = softmax([f_1, f_2] / T)        temperature over the joint features
    m_t = sum_j gate_t,j(e) expert_j(e)     logit_t = tower_t(m_t + skip_t(f_t))

23,723,650 parameters with ResNet18 and the defaults. The published network ends in a sigmoid; this one returns logits,
which the loss treats stably. Task 1 (index 0) is the primary task, task 2 (index 1) the anchor task.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from heterosync.models.encoder import build_encoder


class Experts(nn.Module):
    """`count` small networks Linear-ReLU-Dropout-Linear computed together: (b, inputs) -> (b, count, outputs).

    Their weights are stacked along the first axis: two matrix products instead of 2 x `count`.
    """

    def __init__(self, count: int, inputs: int, hidden: int, outputs: int, dropout: float) -> None:
        super().__init__()
        self.weight1 = nn.Parameter(torch.empty(count, hidden, inputs))
        self.bias1 = nn.Parameter(torch.empty(count, hidden))
        self.weight2 = nn.Parameter(torch.empty(count, outputs, hidden))
        self.bias2 = nn.Parameter(torch.empty(count, outputs))
        self.dropout = nn.Dropout(dropout)
        for weight, bias in ((self.weight1, self.bias1), (self.weight2, self.bias2)):
            for j in range(count):
                nn.init.xavier_uniform_(weight[j])
            bound = 1 / math.sqrt(weight.shape[2])  # as nn.Linear draws its biases
            nn.init.uniform_(bias, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        hidden = nn.functional.linear(x, self.weight1.flatten(0, 1), self.bias1.flatten())
        hidden = self.dropout(torch.relu(hidden)).unflatten(1, self.bias1.shape)
        return torch.einsum("bjh,joh->bjo", hidden, self.weight2) + self.bias2


class Tower(nn.Module):
    """Linear-ReLU-Dropout-Linear: (b, inputs) -> logits (b,)."""

    def __init__(self, inputs: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(inputs, hidden)
        self.fc2 = nn.Linear(hidden, 1)
        self.dropout = nn.Dropout(dropout)
        nn.init.xavier_uniform_(self.fc1.weight)
        nn.init.xavier_uniform_(self.fc2.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.dropout(torch.relu(self.fc1(x)))).squeeze(1)


class Mixed(NamedTuple):
    """What enters the towers: m_1, m_2 from the mixture and s_1, s_2 from the skips, each (b, expert_out)."""

    mixtures: tuple[Tensor, Tensor]
    skips: tuple[Tensor, Tensor]


class MMoE(nn.Module):
    """`forward(primary, anchor)`: two image batches (b, c, h, w) -> two logit vectors (b,)."""

    def __init__(
        self,
        backbone: str = "resnet18",
        channels: int = 3,
        weights: str = "none",
        temperature: float = 3.0,
        n_experts: int = 12,
        expert_hidden: int = 62,
        expert_out: int = 32,
        tower_hidden: int = 16,
        drop_expert: float = 0.3,
        drop_tower: float = 0.4,
    ) -> None:
        super().__init__()
        self.temperature = temperature
        self.encoders = nn.ModuleList(build_encoder(backbone, channels, weights) for _ in range(2))
        features = self.encoders[0].fc.out_features
        self.skips = nn.ModuleList(nn.Linear(features, expert_out) for _ in range(2))
        self.experts = Experts(n_experts, 2 * features, expert_hidden, expert_out, drop_expert)
        self.gates = nn.ModuleList(nn.Linear(2 * features, n_experts) for _ in range(2))
        self.towers = nn.ModuleList(Tower(expert_out, tower_hidden, drop_tower) for _ in range(2))

    def encode(self, task: int, images: Tensor) -> Tensor:
        """f_t of task 0 or 1: images (b, c, h, w) -> features (b, d) >= 0."""
        return torch.relu(self.encoders[task](images))

    def embed(self, f1: Tensor, f2: Tensor) -> Tensor:
        """e, the joint embedding (b, 2d); every row sums to 1."""
        return torch.softmax(torch.cat([f1, f2], 1) / self.temperature, 1)

    def gate(self, task: int, e: Tensor) -> Tensor:
        """Weights of the experts for task 0 or 1 (b, n_experts); every row sums to 1."""
        return torch.softmax(self.gates[task](e), 1)

    def mix(self, f1: Tensor, f2: Tensor) -> Mixed:
        """Both towers' inputs, mixture and skip apart."""
        e = self.embed(f1, f2)
        experts = self.experts(e)
        m1, m2 = (torch.einsum("bj,bjo->bo", self.gate(task, e), experts) for task in (0, 1))
        return Mixed((m1, m2), (self.skips[0](f1), self.skips[1](f2)))

    def decide(self, f1: Tensor, f2: Tensor) -> tuple[Tensor, Tensor]:
        """Features -> both logits."""
        mixtures, skips = self.mix(f1, f2)
        return self.towers[0](mixtures[0] + skips[0]), self.towers[1](mixtures[1] + skips[1])

    def forward(self, primary: Tensor, anchor: Tensor) -> tuple[Tensor, Tensor]:
        f1, f2 = self.encode(0, primary), self.encode(1, anchor)
        # e differs from 1/1024 only slightly: the cheap part behind the encoders keeps full precision
        with torch.autocast(f1.device.type, enabled=False):
            dtype = self.skips[0].weight.dtype
            return self.decide(f1.to(dtype), f2.to(dtype))
