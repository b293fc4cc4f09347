"""Networks that segment volumes: MONAI's 3D AH-Net, and a tiny U-Net for the smoke profile.

Liu et al., "3D Anisotropic Hybrid Network", MICCAI 2018, arXiv 1711.08580: in-plane (3, 3, 1) kernels along the first
two axes, and through-plane ones along the last. Volumes therefore are (b, 1, x, y, z) with the slices along z.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import nn

from heterosync.errors import UserError
from heterosync.models.encoder import named_file, read_state

NETWORKS = ("ahnet", "unet_tiny")


def need_monai() -> None:
    """Raises `UserError` where MONAI, which reads volumes and builds their networks, is not installed."""
    if importlib.util.find_spec("monai") is None:
        raise UserError("the package monai is not installed, and volumes need it: run pip install heterosync anew")


def architecture(network: str, psp_blocks: int = 4) -> tuple[str, dict[str, Any]]:
    """The class in `monai.networks.nets` and its arguments."""
    ends: dict[str, Any] = {"spatial_dims": 3, "in_channels": 1, "out_channels": 1}
    if network == "ahnet":
        return "AHNet", {**ends, "psp_block_num": psp_blocks, "upsample_mode": "transpose"}
    # InstanceNorm: BatchNorm's statistics of different scanners, fused into one, fit none of them.
    return "UNet", {**ends, "channels": [8, 16, 32], "strides": [2, 2], "num_res_units": 1, "norm": "instance"}


def build_segmenter(network: str, psp_blocks: int = 4, weights: str = "none") -> nn.Module:
    """Volumes (b, 1, x, y, z) -> logits (b, 1, x, y, z); first values from the global generator.

    "ahnet" has 38 133 768 parameters with 4 pyramid levels and 38 127 780 without (145.8 and 145.7 MiB of state). Its
    published 2-D pretraining is not used: all sites start from the server's draw, with last layers that can learn
    (`_start_flat`). `weights`: "none", or a file with a
    state of this network, such as an earlier training's best_model.pt, by its name in the folder of torch's cached
    files or by its path. Raises `UserError` for a file that is missing or of another network.
    """
    need_monai()
    from monai.networks import nets

    name, arguments = architecture(network, psp_blocks)
    net: nn.Module = getattr(nets, name)(**arguments)
    if network == "ahnet":
        _start_flat(net.final)
    if weights != "none":
        _load(net, weights)
    return net


def _start_flat(final: Any) -> None:
    """Let AH-Net's last layers, a convolution to one channel and its doubling, begin as small logits that are alike in
    all eight voxels of a doubled one.

    As MONAI draws them, the logits have a standard deviation of 4 to 5, where soft Dice is flat, and each of the eight
    has a factor with a sign of its own, which cannot change before it has wandered through 0: after 60 steps with a
    learning rate of 0.001 on one patch the Dice is still that of a mask which covers everything, and 0.9 after 20 with
    this start. Nothing else of the network, and nothing of what it can become, is touched.
    """
    with torch.no_grad():
        final.conv.weight.mul_((final.conv.out_channels / final.conv.in_channels) ** 0.5)
        final.up.weight.fill_(1.0)


def _load(net: nn.Module, weights: str) -> None:
    state, own = read_state(named_file(weights)), net.state_dict()
    odd = next((name for name in {**own, **state} if name not in own or name not in state), None)
    odd = odd or next((name for name, value in own.items() if value.shape != state[name].shape), None)
    if odd is not None:
        line = f"setting 'weights' is '{weights}', a file of another network (tensor '{odd}')"
        raise UserError(f"{line}: take one that was trained with the same settings 'network' and 'psp_blocks'")
    net.load_state_dict(state)


def patch_problem(network: str, psp_blocks: int, patch: tuple[int, int, int]) -> str | None:
    """Why the network cannot be shown patches of this size; None if it can (MONAI, AHNet)."""
    x, y, z = patch
    if network != "ahnet":
        return None if not any(side % 4 for side in patch) else "x, y and z must be multiples of 4"
    step = max(32, 2 ** (psp_blocks + 3))
    if x % step or y % step or z % 32:
        return f"x and y must be multiples of {step} with psp_blocks {psp_blocks}, z of 32"
    return None if max(patch) >= 64 else "one side must be at least 64"
