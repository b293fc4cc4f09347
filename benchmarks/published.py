"""A plain re-implementation of the published training step, as the other side of the comparison.

Written from the description of the network and the loader (paper, and the official release read for its behaviour):
files decoded anew for every item of every epoch, resized bicubically, rotated and flipped one by one, stacked in
float32 in the ordinary memory layout; sigmoid outputs with a binary cross-entropy of probabilities; AdamW. Nothing of
`heterosync` is used.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import models, transforms


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        backbone = models.resnet18(weights=None)
        backbone.fc = nn.Linear(512, 512)
        self.backbone = backbone

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.backbone(x))


class PublishedMMoE(nn.Module):
    """Two encoders, a softmax over both features at T = 3, 12 experts, two gates, two skips, two towers: 23 723 650
    parameters."""

    def __init__(self, temperature: float = 3.0):
        super().__init__()
        self.temperature = temperature
        self.encoders = nn.ModuleList([Encoder(), Encoder()])
        self.skips = nn.ModuleList([nn.Linear(512, 32), nn.Linear(512, 32)])
        self.experts = nn.ModuleList(
            [nn.Sequential(nn.Linear(1024, 62), nn.ReLU(), nn.Dropout(0.3), nn.Linear(62, 32)) for _ in range(12)]
        )
        self.gates = nn.ModuleList([nn.Linear(1024, 12), nn.Linear(1024, 12)])
        self.towers = nn.ModuleList(
            [
                nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Dropout(0.4), nn.Linear(16, 1), nn.Sigmoid())
                for _ in range(2)
            ]
        )

    def forward(self, primary: Tensor, anchor: Tensor) -> tuple[Tensor, Tensor]:
        features = [encoder(x) for encoder, x in zip(self.encoders, (primary, anchor), strict=True)]
        joint = torch.softmax(torch.cat(features, dim=1) / self.temperature, dim=1)
        outputs = torch.stack([expert(joint) for expert in self.experts], dim=1)
        answers = []
        for gate, tower, skip, feature in zip(self.gates, self.towers, self.skips, features, strict=True):
            weights = torch.softmax(gate(joint), dim=1).unsqueeze(-1)
            answers.append(tower((weights * outputs).sum(dim=1) + skip(feature)).squeeze(1))
        return answers[0], answers[1]


class PairedFiles(Dataset):
    """Item i: primary file i and anchor file i, or random ones beyond the end; decoded and transformed here, one by
    one."""

    def __init__(self, primary: list[tuple[Path, int]], anchor: list[tuple[Path, int]], size: int):
        self.primary, self.anchor = primary, anchor
        self.rng = np.random.default_rng(0)
        self.transform = transforms.Compose(
            [
                transforms.Resize((size, size), interpolation=transforms.InterpolationMode.BICUBIC),
                transforms.RandomRotation(15),
                transforms.RandomHorizontalFlip(),
                transforms.ColorJitter(0, 0, 0, 0),
                transforms.ToTensor(),
            ]
        )

    def __len__(self) -> int:
        return max(len(self.primary), len(self.anchor))

    def _read(self, files: list[tuple[Path, int]], index: int) -> tuple[Tensor, float]:
        path, label = files[index if index < len(files) else int(self.rng.integers(len(files)))]
        with Image.open(path) as image:
            return self.transform(image.convert("RGB")), float(label)

    def __getitem__(self, index: int) -> tuple[Tensor, float, Tensor, float]:
        return (*self._read(self.primary, index), *self._read(self.anchor, index))


def epoch(
    model: PublishedMMoE, optimizer: torch.optim.Optimizer, files: PairedFiles, batch_size: int, device: str
) -> int:
    """One training epoch; returns the number of items."""
    model.train()
    criterion = nn.BCELoss()
    for primary, label, anchor, anchor_label in DataLoader(files, batch_size=batch_size, shuffle=True):
        optimizer.zero_grad()
        p, a = model(primary.to(device), anchor.to(device))
        loss = 0.5 * criterion(p, label.float().to(device)) + 0.5 * criterion(a, anchor_label.float().to(device))
        loss.backward()
        optimizer.step()
    return len(files)
