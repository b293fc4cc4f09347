"""Image generators for FedKTL: a file with a trained one, and a small stand-in that is fitted to the anchor set."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy, interpolate

from heterosync import pulse
from heterosync.errors import UserError
from heterosync.models.encoder import cached_imagenet_file

#: Pixels per side of what the stand-in renders.
SIDE = 32
_BATCH, _LR = 64, 1e-3


def resized(images: Tensor, side: int) -> Tensor:
    """Images (n, c, h, w) -> (n, c, side, side), bilinear."""
    return interpolate(images, (side, side), mode="bilinear", antialias=True, align_corners=False)


# -- the stand-in ------------------------------------------------------------------------------------------------------


def build_stand_in(channels: int, latent: int) -> nn.Module:
    """MONAI's variational auto-encoder (Kingma and Welling, ICLR 2014) on `SIDE` pixels, its values not yet fitted.

    Its `decode_forward` renders latent vectors (n, latent), at home in N(0, I), as (n, channels, SIDE, SIDE) in [0, 1].
    """
    from monai.networks.nets import VarAutoEncoder

    network: nn.Module = VarAutoEncoder(2, (channels, SIDE, SIDE), channels, latent, (16, 32, 64), (2, 2, 2))
    return network.requires_grad_(False).eval()


def fit_stand_in(network: nn.Module, images: Tensor, steps: int, seed: int) -> None:
    """Fit it to images (n, c, h, w) in [0, 1]: `steps` of Adam on batches of 64, by the evidence lower bound.

    Global generators stay as they are. Sites with the same images, seed and kind of device get the same network, up to
    the rounding of their machines.
    """
    images = resized(images, SIDE).clamp(0, 1)
    rows = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[images.device] if images.device.type == "cuda" else []), torch.enable_grad():
        torch.manual_seed(seed)
        network.requires_grad_(True).train()
        optimizer = torch.optim.Adam(network.parameters(), lr=_LR)
        for _ in range(steps):
            pulse.beat()
            chosen = torch.randint(len(images), (min(_BATCH, len(images)),), generator=rows).to(images.device)
            shown = images[chosen]
            rendered, mu, logvar, _ = network(shown)
            divergence = 0.5 * (mu.square() + logvar.exp() - 1 - logvar).sum()
            loss = (binary_cross_entropy(rendered, shown, reduction="sum") + divergence) / len(shown)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
    network.requires_grad_(False).eval()
    network.zero_grad(set_to_none=True)


# -- a generator from a file -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Generator:
    """A generator that was trained elsewhere. latents: samples (m, d) of the vectors that it is at home with."""

    program: nn.Module
    latents: Tensor
    name: str

    def render(self, latents: Tensor, side: int, channels: int) -> Tensor:
        """Vectors (n, d) -> images (n, channels, side, side) in [0, 1]; grey ones are the mean over the colours."""
        with torch.no_grad():
            images = ((self.program(latents).float() + 1) / 2).clamp(0, 1)
        if images.dim() != 4 or images.shape[:2] != (len(latents), 3) or not torch.isfinite(images).all():
            raise UserError(
                f"generator file {self.name}: it gave {tuple(images.shape)} for {tuple(latents.shape)}, or values that "
                "are not finite: its program must map vectors (n, d) to images (n, 3, h, w) in [-1, 1]"
            )
        return resized(images if channels == 3 else images.mean(1, keepdim=True), side)


def generator_file(name: str) -> Path:
    """Where a generator's file is looked for: beside torchvision's weights in the folder of torch's cached files.

    Raises `UserError` when it is not there.
    """
    path = cached_imagenet_file().parent / name
    if not path.is_file():
        raise UserError(f"fedktl setting 'generator' is '{name}' but {path} does not exist: put the file there")
    return path


def generator_digest(name: str) -> Tensor:
    """SHA-256 of the file, as uint8 (32,)."""
    digest = hashlib.sha256()
    with generator_file(name).open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return torch.frombuffer(bytearray(digest.digest()), dtype=torch.uint8)


def load_generator(name: str) -> Generator:
    """The generator of a file: a `torch.export` program (.pt2) of a module that maps vectors (n, d), n free, to images
    (n, 3, h, w) in [-1, 1], and whose buffer `latents` (m, d) holds samples of the space of its vectors: for StyleGAN
    the outputs of its mapping network.

    torch.export files may run code when they are read: use only files that you made or whose maker you trust. Raises
    `UserError` for a file that is missing or none of these.
    """
    path = generator_file(name)
    status = path.stat()
    return _read(path, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=1)
def _read(path: Path, size: int, changed: int) -> Generator:
    """As `load_generator`; size and time of change only tell the cache that it is another file."""
    how = "write it with torch.export.save, from a module with a buffer 'latents' (samples, d)"
    try:
        program = torch.export.load(os.fspath(path))
        latents = program.state_dict["latents"].detach().float()
        module = program.module()
    except Exception as error:  # a damaged archive raises anything
        raise UserError(f"generator file {path.name} cannot be read ({type(error).__name__}): {how}") from error
    if latents.dim() != 2 or not latents.numel() or not torch.isfinite(latents).all():
        raise UserError(f"generator file {path.name}: its 'latents' are {tuple(latents.shape)}, or not finite: {how}")
    return Generator(module, latents, path.name)
