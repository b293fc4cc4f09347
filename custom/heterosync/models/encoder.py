"""Image encoders: torchvision's ResNet18, and a ResNet of width 8 for the smoke profile (paper, Model development)."""

from __future__ import annotations

import hashlib
import logging
import os
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, ResNet, ResNet18_Weights

from heterosync.errors import UserError, nearest

log = logging.getLogger(__name__)

BACKBONES = ("resnet18", "resnet_tiny")


class FullLinear(nn.Linear):
    """A linear layer that computes in the type of its weights also under autocast: bfloat16 scores would be tied."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.to(self.weight.dtype))


class TinyResNet(ResNet):
    """A ResNet with BatchNorm, one block per stage and widths 8, 16, 32, 64: eight times thinner than ResNet18."""

    def __init__(self) -> None:
        super().__init__(BasicBlock, [1, 1, 1, 1])
        self.conv1 = nn.Conv2d(3, 8, kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.fc = nn.Linear(64, 1000)

    def _make_layer(self, block, planes: int, blocks: int, stride: int = 1, dilate: bool = False) -> nn.Sequential:
        if planes == 64:  # the first stage: torchvision has just set the stem's width to 64
            self.inplanes = 8
        return super()._make_layer(block, planes // 8, blocks, stride, dilate)


def build_encoder(backbone: str = "resnet18", channels: int = 3, weights: str = "none", outputs: int = 0) -> ResNet:
    """A ResNet whose last layer `fc` has `outputs` logits, never in reduced precision; 0: as many values as features
    (512 for ResNet18).

    `weights`: "none", "imagenet" (torchvision's cached file), "auto" (that file if it is there, else none), or a file
    with a torchvision ResNet18 state, by its name in the folder of torchvision's cached files or by its path. Nothing
    is ever downloaded. Raises `UserError` for a bad name or file.
    """
    if backbone == "resnet18":
        net = ResNet(BasicBlock, [2, 2, 2, 2])
    elif backbone == "resnet_tiny":
        net = TinyResNet()
    else:
        raise UserError(f"setting 'backbone' is '{backbone}': {nearest(backbone, BACKBONES)}")
    features = net.fc.in_features
    state = _pretrained(backbone, weights)
    net.fc = FullLinear(features, outputs) if outputs else nn.Linear(features, features)
    if state is not None:
        _load_body(net, state, weights)
    if channels != 3:
        _adapt_channels(net, channels)
    return net


def features(net: ResNet, images: Tensor) -> Tensor:
    """What enters the last layer of an encoder: images (b, c, h, w) -> (b, 512) for ResNet18."""
    layers = [layer for name, layer in net.named_children() if name != "fc"]
    for layer in layers:
        images = layer(images)
    return images.flatten(1)


def cached_file(name: str) -> Path:
    """Where a weights file of this name lies on this machine, in torch's cache (it need not exist)."""
    return Path(torch.hub.get_dir()) / "checkpoints" / name


def cached_imagenet_file() -> Path:
    """Where torchvision keeps its ImageNet weights of ResNet18 on this machine (the file need not exist)."""
    return cached_file(Path(ResNet18_Weights.IMAGENET1K_V1.url).name)


def resolved_weights(weights: str, backbone: str = "resnet18") -> str:
    """What the setting `weights` means on this machine: "none", "imagenet" or "file sha256:<64 digits>".

    Raises `UserError` for weights that are not there.
    """
    path = _weights_file(backbone, weights)
    if path is None:
        return "none"
    return "imagenet" if weights in ("auto", "imagenet") else file_mark(path)


def file_mark(path: Path) -> str:
    """What is said of a file of weights at the check-in: "file sha256:<64 digits>"."""
    status = path.stat()
    return f"file sha256:{_file_hash(path.resolve(), status.st_size, status.st_mtime_ns)}"


def named_file(weights: str) -> Path:
    """The file of weights with this path, or with this name in the folder of torch's cached files.

    Raises `UserError` when it is not there.
    """
    path = Path(weights) if os.path.dirname(weights) else cached_file(weights)
    if not path.is_file():
        hint = "put the file there, or use 'none'"
        raise UserError(f"setting 'weights' is '{weights}' but {path} does not exist: {hint}")
    return path


@lru_cache(maxsize=4)
def _file_hash(path: Path, size: int, changed: int) -> str:
    """SHA-256 of a file; size and time of change only tell the cache that it is another one."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _pretrained(backbone: str, weights: str) -> dict[str, Tensor] | None:
    path = _weights_file(backbone, weights)
    if path is None and weights == "auto" and backbone == "resnet18":
        cached = cached_imagenet_file()
        log.warning("no ImageNet weights at %s: training starts from random weights (setting 'weights')", cached)
    return None if path is None else read_state(path)


def _weights_file(backbone: str, weights: str) -> Path | None:
    """The file that the setting `weights` stands for; None: the weights are random."""
    cached = cached_imagenet_file()
    if weights == "none" or (weights == "auto" and not (backbone == "resnet18" and cached.is_file())):
        return None
    if backbone != "resnet18":
        raise UserError(f"setting 'weights' is '{weights}' but backbone '{backbone}' has no weights: set it to none")
    if weights not in ("auto", "imagenet"):
        return named_file(weights)
    if not cached.is_file():
        hint = "put torchvision's ResNet18 file there, or use 'none'"
        raise UserError(f"setting 'weights' is '{weights}' but {cached} does not exist: {hint}")
    return cached


def read_state(path: Path | str) -> dict[str, Tensor]:
    """Read a file that holds one state (name -> tensor), alone or as a training keeps it, without running code of it.

    Raises `UserError`.
    """
    if not Path(path).is_file():
        raise UserError(f"{path} does not exist: give the path of a PyTorch state file")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(
            f"{path} is no readable PyTorch state file: it is damaged or holds more than tensors"
        ) from error
    for key in ("state_dict", "state"):  # of other people's files and of our own model files
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{path} holds no state (name -> tensor): save model.state_dict() into it")
    return state


def _load_body(net: ResNet, state: dict[str, Tensor], source: str) -> None:
    body = {name: value for name, value in state.items() if not name.startswith("fc.")}
    wanted = {name: value.shape for name, value in net.state_dict().items() if not name.startswith("fc.")}
    for name, shape in wanted.items():
        if name not in body:
            raise UserError(f"weights '{source}' lack the tensor '{name}': give a state of torchvision's ResNet18")
        if body[name].shape != shape:
            found = tuple(body[name].shape)
            raise UserError(f"weights '{source}': tensor '{name}' is {found} instead of {tuple(shape)}")
    net.load_state_dict({name: body[name] for name in wanted}, strict=False)


def _adapt_channels(net: ResNet, channels: int) -> None:
    """Grey images: the first filters are summed over RGB, so a grey picture gives what its RGB copy gave."""
    if channels != 1:
        raise UserError(f"setting 'channels' is {channels}: 1 (grey) or 3 (RGB) are possible")
    old = net.conv1
    net.conv1 = nn.Conv2d(1, old.out_channels, kernel_size=7, stride=2, padding=3, bias=False)
    with torch.no_grad():
        net.conv1.weight.copy_(old.weight.sum(1, keepdim=True))
