"""Variants of HSL's two-task network in which the anchor task reaches what the primary task uses (docs/anchor.md)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from heterosync.models.encoder import FullLinear, build_encoder
from heterosync.models.mmoe import Experts, MMoE, Tower


class NormedMMoE(MMoE):
    """HSL's network, tensor by tensor, with a joint embedding of unit scale and the temperature on the gates.

    layernorm   e = ([f_1, f_2] - mean) / std over the 2d entries of an item, without weights of its own
    scaled      e = 2d softmax([f_1, f_2]): the published embedding, times its length
    gate_t = softmax(W_t e / T)
    """

    def __init__(self, *args: Any, embedding: str = "layernorm", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.embedding = embedding

    def embed(self, f1: Tensor, f2: Tensor) -> Tensor:
        """e (b, 2d), of mean 0 and variance 1 (layernorm) or of mean 1 (scaled) in every row."""
        joint = torch.cat([f1, f2], 1)
        if self.embedding == "layernorm":
            return nn.functional.layer_norm(joint, joint.shape[1:])
        return joint.shape[1] * torch.softmax(joint, 1)

    def gate(self, task: int, e: Tensor) -> Tensor:
        return torch.softmax(self.gates[task](e) / self.temperature, 1)


class TaskBatchNorm(nn.BatchNorm2d):
    """BatchNorm with one weight and bias, and statistics of their own for task 0 (the usual names) and 1 (`anchor`)."""

    def __init__(self, of: nn.BatchNorm2d) -> None:
        super().__init__(of.num_features, of.eps, of.momentum)
        self.load_state_dict(of.state_dict())
        self.anchor = nn.BatchNorm2d(of.num_features, of.eps, of.momentum, affine=False)
        self.anchor.load_state_dict({name: value for name, value in of.named_buffers()})
        self.task = 0

    def forward(self, x: Tensor) -> Tensor:
        if self.task == 0:
            return super().forward(x)
        return self.anchor(x) * self.weight[:, None, None] + self.bias[:, None, None]


class SharedEncoder(nn.Module, ABC):
    """One encoder for both tasks; `decide` makes logits of its features.

    `statistics`: BatchNorm's are "shared" (both tasks' images form one batch) or of each "task".
    `forward(primary, anchor)`: two image batches (b, c, h, w) -> two logit vectors (b,); without anchor images the
    first alone.
    """

    def __init__(self, encoder: nn.Module, statistics: str) -> None:
        super().__init__()
        self.encoder = encoder
        self.apart = statistics == "task"
        if self.apart:
            for path, layer in list(self.encoder.named_modules()):
                if isinstance(layer, nn.BatchNorm2d):
                    parent, _, name = path.rpartition(".")
                    setattr(self.encoder.get_submodule(parent), name, TaskBatchNorm(layer))

    def encode(self, task: int, images: Tensor) -> Tensor:
        """f_t of task 0 or 1: images (b, c, h, w) -> features (b, d) >= 0."""
        for layer in self.encoder.modules():
            if isinstance(layer, TaskBatchNorm):
                layer.task = task
        return torch.relu(self.encoder(images))

    def encode_both(self, primary: Tensor, anchor: Tensor) -> tuple[Tensor, Tensor]:
        """f_1 and f_2 of the batches of a training step."""
        if self.apart:
            return self.encode(0, primary), self.encode(1, anchor)
        f1, f2 = self.encode(0, torch.cat([primary, anchor])).split([len(primary), len(anchor)])
        return f1, f2

    def encode_anchor(self, primary: Tensor, anchor: Tensor) -> Tensor:
        """f_2 of the batches of a training step; the primary images count where they are in the same statistics."""
        return self.encode(1, anchor) if self.apart else self.encode_both(primary, anchor)[1]

    def heads(self) -> list[nn.Module]:
        """What stands above the encoder."""
        return [module for name, module in self.named_children() if name != "encoder"]

    @abstractmethod
    def decide(self, task: int, f: Tensor) -> Tensor:
        """Features (b, d) -> logits (b,) of a task, in full precision."""

    def forward(self, primary: Tensor, anchor: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        if anchor is None:
            return self.decide(0, self.encode(0, primary))
        f1, f2 = self.encode_both(primary, anchor)
        return self.decide(0, f1), self.decide(1, f2)


class SharedLinear(SharedEncoder):
    """Hard parameter sharing (Caruana, Machine Learning 28, 1997): one linear layer a task on the encoder's features.

    Encoder and first layer are the plain classifier, with the same first weights.
    """

    def __init__(
        self, backbone: str = "resnet18", channels: int = 3, weights: str = "none", statistics: str = "task"
    ) -> None:
        encoder = build_encoder(backbone, channels, weights, outputs=1)
        first, encoder.fc = encoder.fc, nn.Identity()
        super().__init__(encoder, statistics)
        self.tasks = nn.ModuleList([first, FullLinear(first.in_features, 1)])

    def decide(self, task: int, f: Tensor) -> Tensor:
        return self.tasks[task](f).squeeze(1)


class SharedMMoE(SharedEncoder):
    """A multi-gate mixture of experts on the features of one encoder (Ma et al., KDD 2018).

        f_t = relu(encoder(x_t))      m_t = sum_j gate_t,j(f_t) expert_j(f_t)      logit_t = tower_t(m_t + skip_t(f_t))

    Each task's experts see the features of its own image: there is no partner image.
    """

    def __init__(
        self,
        backbone: str = "resnet18",
        channels: int = 3,
        weights: str = "none",
        statistics: str = "task",
        n_experts: int = 12,
        expert_hidden: int = 62,
        expert_out: int = 32,
        tower_hidden: int = 16,
        drop_expert: float = 0.3,
        drop_tower: float = 0.4,
    ) -> None:
        encoder = build_encoder(backbone, channels, weights)
        features = encoder.fc.out_features
        super().__init__(encoder, statistics)
        self.skips = nn.ModuleList(nn.Linear(features, expert_out) for _ in range(2))
        self.experts = Experts(n_experts, features, expert_hidden, expert_out, drop_expert)
        self.gates = nn.ModuleList(nn.Linear(features, n_experts) for _ in range(2))
        self.towers = nn.ModuleList(Tower(expert_out, tower_hidden, drop_tower) for _ in range(2))

    def mix(self, task: int, f: Tensor) -> tuple[Tensor, Tensor]:
        """What enters a tower (b, expert_out), from the mixture and from the skip."""
        gate = torch.softmax(self.gates[task](f), 1)
        return torch.einsum("bj,bjo->bo", gate, self.experts(f)), self.skips[task](f)

    def decide(self, task: int, f: Tensor) -> Tensor:
        with torch.autocast(f.device.type, enabled=False):  # this part is cheap
            mixture, skip = self.mix(task, f.to(self.skips[task].weight.dtype))
            return self.towers[task](mixture + skip)
