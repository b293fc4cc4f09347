"""The image tower of CLIP (Radford et al., ICML 2021), from a file that the user has, and a stand-in without one.

The tower is built of torch's own transformer layers and reads the three layouts in which CLIP is passed on: OpenAI's
(the TorchScript archive ViT-B-32.pt or a plain state, also open_clip's), and Hugging Face's CLIPModel (.bin or
.safetensors). Everything but the image tower is left out. Nothing is ever downloaded.
"""

from __future__ import annotations

import math
import re
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, gelu, normalize

from heterosync.errors import UserError
from heterosync.models.encoder import FullLinear, read_state

STAND_IN = "stand-in"
_MEAN, _STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # official code
_HEAD = 64  # width of an attention head in every tower of CLIP


@dataclass(frozen=True)
class Shape:
    """What tells one tower from another: sides in pixels, widths in features."""

    side: int
    patch: int
    width: int
    layers: int
    outputs: int


SHAPES: dict[str, Shape] = {
    "ViT-B/32": Shape(224, 32, 768, 12, 512),
    "ViT-L/14": Shape(224, 14, 1024, 24, 768),
}

#: (pattern, replacement) from the names of a layout to ours, which are torch's; every pattern that matches is applied
_OPENAI = (
    (r"^transformer\.resblocks\.", "blocks."),
    (r"\.attn\.", ".self_attn."),
    (r"\.ln_([12])\.", r".norm\1."),
    (r"\.mlp\.c_fc\.", ".linear1."),
    (r"\.mlp\.c_proj\.", ".linear2."),
)
_HUGGING_FACE = (
    (r"^vision_model\.embeddings\.patch_embedding\.", "conv1."),
    (r"^vision_model\.embeddings\.class_embedding$", "class_embedding"),
    (r"^vision_model\.embeddings\.position_embedding\.weight$", "positional_embedding"),
    (r"^vision_model\.pre_layrnorm\.", "ln_pre."),  # their spelling
    (r"^vision_model\.post_layernorm\.", "ln_post."),
    (r"^vision_model\.encoder\.layers\.", "blocks."),
    (r"\.layer_norm([12])\.", r".norm\1."),
    (r"\.mlp\.fc([12])\.", r".linear\1."),
    (r"^visual_projection\.weight$", "proj"),
)


def quick_gelu(x: Tensor) -> Tensor:
    """x sigmoid(1.702 x), the activation that OpenAI's towers were trained with."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": gelu}


class ImageTower(nn.Module):
    """Images (b, 3, side, side) in [0, 1], fitted by `to_size` with "crop" -> features (b, outputs) of length 1."""

    def __init__(self, shape: Shape, activation: str = "quick_gelu"):
        super().__init__()
        width = shape.width
        self.side = shape.side
        self.conv1 = nn.Conv2d(3, width, shape.patch, shape.patch, bias=False)
        self.class_embedding = nn.Parameter(torch.zeros(width))
        self.positional_embedding = nn.Parameter(torch.zeros((shape.side // shape.patch) ** 2 + 1, width))
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        block = dict(activation=ACTIVATIONS[activation], dropout=0.0, batch_first=True, norm_first=True)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, width // _HEAD, 4 * width, **block) for _ in range(shape.layers)
        )
        self.proj = nn.Parameter(torch.zeros(width, shape.outputs))
        self.register_buffer("mean", torch.tensor(_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(_STD).view(3, 1, 1), persistent=False)
        self.requires_grad_(False).eval()

    def forward(self, images: Tensor) -> Tensor:
        patches = self.conv1((images - self.mean) / self.std).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.class_embedding.expand(len(images), 1, -1), patches], 1)
        tokens = self.ln_pre(tokens + self.positional_embedding)
        for block in self.blocks:
            tokens = block(tokens)
        return normalize(self.ln_post(tokens[:, 0]) @ self.proj)


class StandIn(nn.Module):
    """NOT CLIP: a fixed random layer over a 16 x 16 thumbnail, with features of CLIP's form, for tests and demos.

    Images (b, c, s, s) in [0, 1] -> (b, 512) of length 1; the same on every machine.
    """

    OUTPUTS = 512

    def __init__(self, channels: int = 3):
        super().__init__()
        weight = torch.randn(channels * 256, self.OUTPUTS, generator=torch.Generator().manual_seed(0))
        self.register_buffer("weight", weight / math.sqrt(len(weight)))

    def forward(self, images: Tensor) -> Tensor:
        return normalize(torch.relu((adaptive_avg_pool2d(images, 16).flatten(1) - 0.5) @ self.weight))


class Head(nn.Module):
    """Features (b, d) -> logits (b,): one linear layer, or with `hidden` above 0 a ReLU between two."""

    def __init__(self, features: int, hidden: int = 0):
        super().__init__()
        last = FullLinear(hidden or features, 1)
        self.head = nn.Sequential(FullLinear(features, hidden), nn.ReLU(), last) if hidden else last

    def forward(self, features: Tensor) -> Tensor:
        return self.head(features).squeeze(1)


def load_tower(path: Path | str, kind: str, activation: str = "quick_gelu") -> ImageTower:
    """The image tower in a file of CLIP, in float32. Raises `UserError` for a file that holds no tower of that kind."""
    state, shape = tower_state(path), SHAPES[kind]
    tower = ImageTower(shape, activation)
    for name, wanted in tower.state_dict().items():
        if name not in state:
            raise UserError(f"{path}: CLIP's image tower {kind} has a tensor '{name}', this file has none: {_GIVE}")
        if state[name].shape != wanted.shape:
            found, needed = tuple(state[name].shape), tuple(wanted.shape)
            raise UserError(f"{path}: tensor '{name}' is {found}, CLIP's {kind} has {needed}: {_GIVE}")
    deeper = [name for name in state if name not in tower.state_dict()]
    if deeper:
        raise UserError(f"{path}: the tensor '{deeper[0]}' is not of CLIP's {kind} ({len(deeper)} are not): {_GIVE}")
    tower.load_state_dict(state)
    return tower


_GIVE = "give the file of that tower, of OpenAI, open_clip or Hugging Face"


def tower_state(path: Path | str) -> dict[str, Tensor]:
    """The tensors of the image tower in any of the layouts, in float32 and under our names. Raises `UserError`."""
    state = _read(Path(path))
    if any(name.startswith("vision_model.") for name in state):
        kept = {n: v for n, v in state.items() if n.startswith(("vision_model.", "visual_projection."))}
        ours = _renamed(kept, _HUGGING_FACE)
        ours.pop("vision_model.embeddings.position_ids", None)
        for name in [name for name in ours if ".self_attn.q_proj." in name]:
            parts = [ours.pop(name.replace("q_proj", f"{part}_proj")) for part in "qkv"]
            ours[name.replace("q_proj.", "in_proj_")] = torch.cat(parts)
        if "proj" in ours:
            ours["proj"] = ours["proj"].T.contiguous()
    else:
        ours = _renamed({n.removeprefix("visual."): v for n, v in state.items() if n.startswith("visual.")}, _OPENAI)
    if "class_embedding" not in ours:
        raise UserError(f"{path} holds no image tower of CLIP that is a vision transformer: {_GIVE}")
    return {name: value.float() for name, value in ours.items()}


def _renamed(state: dict[str, Tensor], patterns: tuple[tuple[str, str], ...]) -> dict[str, Tensor]:
    renamed = {}
    for name, value in state.items():
        for pattern, replacement in patterns:
            name = re.sub(pattern, replacement, name)
        renamed[name] = value
    return renamed


def _read(path: Path) -> dict[str, Tensor]:
    """The state in a file, without running code of it."""
    if path.suffix == ".safetensors" and path.is_file():
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} is no readable safetensors file: copy it again") from error
    if path.is_file() and zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            scripted = any(name.endswith("/constants.pkl") for name in archive.namelist())
        if scripted:  # OpenAI's own files
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch would rather have another format
                return torch.jit.load(str(path), map_location="cpu").state_dict()
    return read_state(path)
