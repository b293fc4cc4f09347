"""Networks that segment volumes: MONAI's 3D AH-Net, and a tiny U-Net for the smoke profile.

Liu et al., "3D Anisotropic Hybrid Network", MICCAI 2018, arXiv 1711.08580: in-plane (3, 3, 1) kernels along the first
two axes, and through-plane ones along the last. Volumes therefore are (b, 1, x, y, z) with the slices along z.
"""

from __future__ import annotations

from torch import nn

NETWORKS = ("ahnet", "unet_tiny")


def build_segmenter(network: str, psp_blocks: int = 4) -> nn.Module:
    """Volumes (b, 1, x, y, z) -> logits (b, 1, x, y, z); first values from the global generator.

    "ahnet" has 38 133 768 parameters with 4 pyramid levels and 38 127 780 without (145.8 and 145.7 MiB of state). Its
    published 2-D pretraining is not used: all sites start from the server's draw.
    """
    from monai.networks.nets import AHNet, UNet

    if network == "ahnet":
        return AHNet(spatial_dims=3, in_channels=1, out_channels=1, psp_block_num=psp_blocks, upsample_mode="transpose")
    return UNet(3, 1, 1, channels=(8, 16, 32), strides=(2, 2), num_res_units=1, norm="batch")


def patch_problem(network: str, psp_blocks: int, patch: tuple[int, int, int]) -> str | None:
    """Why the network cannot be shown patches of this size; None if it can (MONAI, AHNet)."""
    x, y, z = patch
    if network != "ahnet":
        return None if not any(side % 4 for side in patch) else "x, y and z must be multiples of 4"
    step = max(32, 2 ** (psp_blocks + 3))
    if x % step or y % step or z % 32:
        return f"x and y must be multiples of {step} with psp_blocks {psp_blocks}, z of 32"
    return None if max(patch) >= 64 else "one side must be at least 64"
