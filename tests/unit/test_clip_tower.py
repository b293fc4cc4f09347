"""CLIP's image tower: the layouts of its files, its preprocessing, and the values of open_clip's own."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize

from heterosync.data.readers import to_size
from heterosync.errors import UserError
from heterosync.models.clip import SHAPES, Head, ImageTower, Shape, StandIn, load_tower

TINY = Shape(side=32, patch=16, width=128, layers=2, outputs=4)


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHAPES, "tiny", TINY)


def openai() -> dict[str, Tensor]:
    """A tower of two layers in OpenAI's names, its values by a formula that depends on the order of the names."""
    width, block = TINY.width, "transformer.resblocks.{}."
    shapes = {
        **{"class_embedding": (width,), "conv1.weight": (width, 3, 16, 16), "positional_embedding": (5, width)},
        **{"proj": (width, 4)},
        **{f"{norm}.{part}": (width,) for norm in ("ln_pre", "ln_post") for part in ("weight", "bias")},
    }
    for layer in (block.format(0), block.format(1)):
        shapes |= {f"{layer}{norm}.{part}": (width,) for norm in ("ln_1", "ln_2") for part in ("weight", "bias")}
        shapes |= {f"{layer}attn.in_proj_weight": (3 * width, width), f"{layer}attn.in_proj_bias": (3 * width,)}
        shapes |= {f"{layer}attn.out_proj.weight": (width, width), f"{layer}attn.out_proj.bias": (width,)}
        shapes |= {f"{layer}mlp.c_fc.weight": (4 * width, width), f"{layer}mlp.c_fc.bias": (4 * width,)}
        shapes |= {f"{layer}mlp.c_proj.weight": (width, 4 * width), f"{layer}mlp.c_proj.bias": (width,)}
    state = {}
    for i, (name, shape) in enumerate(sorted(shapes.items())):
        wave = torch.sin(torch.arange(math.prod(shape), dtype=torch.float64) * 0.7 + i)
        gain = 1.0 if name.endswith("weight") and len(shape) == 1 else 0.0
        state[name] = (wave * (0.1 if len(shape) > 1 else 0.5) + gain).float().view(shape)
    return state


def images() -> Tensor:
    return torch.sin(torch.arange(2 * 3 * 32 * 32, dtype=torch.float64) * 0.01).abs().float().view(2, 3, 32, 32)


def as_archive(state: dict[str, Tensor], path: Path) -> None:
    """The TorchScript archive in half precision that OpenAI publishes; it holds the text tower too."""
    root = nn.Module()
    for name, value in {**state, "text_projection": torch.zeros(3)}.items():
        *folders, last = (f"visual.{name}" if name in state else name).split(".")
        place = root
        for folder in folders:
            if not hasattr(place, folder):
                place.add_module(folder, nn.Module())
            place = getattr(place, folder)
        place.register_parameter(last, nn.Parameter(value.half(), requires_grad=False))
    torch.jit.save(torch.jit.script(root), str(path))


def hugging_face(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The names of transformers' CLIPModel (checked once against transformers 5.23: equal features to 2e-7)."""
    renamed = {"vision_model.embeddings.position_ids": torch.arange(5)[None], "text_model.x": torch.zeros(2)}
    words = {
        **{
            "class_embedding": "embeddings.class_embedding",
            "positional_embedding": "embeddings.position_embedding.weight",
        },
        **{
            "conv1.weight": "embeddings.patch_embedding.weight",
            "ln_pre.": "pre_layrnorm.",
            "ln_post.": "post_layernorm.",
        },
        **{"transformer.resblocks.": "encoder.layers.", ".attn.": ".self_attn.", ".ln_": ".layer_norm"},
        **{".c_fc.": ".fc1.", ".c_proj.": ".fc2."},
    }
    for name, value in state.items():
        if name == "proj":
            renamed["visual_projection.weight"] = value.T.contiguous()
            continue
        theirs = name
        for ours, word in words.items():
            theirs = theirs.replace(ours, word)
        theirs = f"vision_model.{theirs}"
        if "in_proj_" in theirs:
            for part, third in zip("qkv", value.chunk(3), strict=True):
                renamed[theirs.replace("in_proj_", f"{part}_proj.")] = third.contiguous()
        else:
            renamed[theirs] = value
    return renamed


def features(path: Path, activation: str = "quick_gelu") -> Tensor:
    with torch.no_grad():
        return load_tower(path, "tiny", activation)(images())


def test_the_features_are_those_of_open_clip(tmp_path):
    """Computed once with open_clip 3.3.0's VisionTransformer, from the same weights and images."""
    torch.save({"state_dict": {f"visual.{name}": value for name, value in openai().items()}}, tmp_path / "a.pt")
    expected = [[-0.190586, -0.559075, -0.664623, -0.457589], [-0.173620, -0.549847, -0.667472, -0.471175]]
    assert torch.allclose(features(tmp_path / "a.pt"), torch.tensor(expected), atol=2e-6)
    assert not torch.allclose(features(tmp_path / "a.pt", "gelu"), torch.tensor(expected), atol=1e-4)


def test_every_layout_gives_the_same_tower(tmp_path):
    from safetensors.torch import save_file

    state = {name: value.half().float() for name, value in openai().items()}  # the archive is in half precision
    torch.save({f"visual.{name}": value for name, value in state.items()}, tmp_path / "plain.pt")
    as_archive(state, tmp_path / "archive.pt")
    torch.save(hugging_face(state), tmp_path / "hf.bin")
    save_file(hugging_face(state), tmp_path / "hf.safetensors")
    first = features(tmp_path / "plain.pt")
    for name in ("archive.pt", "hf.bin", "hf.safetensors"):
        assert torch.equal(features(tmp_path / name), first), name


def test_the_tower_of_vit_b_32_has_its_size():
    with torch.device("meta"):
        sizes = {
            kind: sum(p.numel() for p in ImageTower(SHAPES[kind]).parameters()) for kind in ("ViT-B/32", "ViT-L/14")
        }
    assert sizes == {"ViT-B/32": 87_849_216, "ViT-L/14": 303_966_208}


def damaged(change) -> dict[str, Tensor]:
    state = {f"visual.{name}": value for name, value in openai().items()}
    change(state)
    return state


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        (lambda s: s.pop("visual.ln_pre.bias"), "has a tensor 'ln_pre.bias', this file has none"),
        (
            lambda s: s.update({"visual.proj": torch.zeros(128, 5)}),
            r"tensor 'proj' is \(128, 5\), CLIP's tiny has \(128, 4\)",
        ),
        (
            lambda s: s.update({"visual.transformer.resblocks.2.ln_1.bias": torch.zeros(128)}),
            "'blocks.2.norm1.bias' is not",
        ),
        (
            lambda s: [s.pop(name) for name in list(s)] and s.update({"visual.layer1.0": torch.zeros(1)}),
            "no image tower",
        ),
    ],
)
def test_another_file_is_refused(tmp_path, change, cause):
    torch.save(damaged(change), tmp_path / "a.pt")
    with pytest.raises(UserError, match=cause) as refused:
        load_tower(tmp_path / "a.pt", "tiny")
    assert re.search("give the file of that tower", str(refused.value)) and "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["cut.safetensors", "cut.pt"])
def test_a_damaged_file_is_named(tmp_path, name):
    (tmp_path / name).write_bytes(b"\x10\0\0\0\0\0\0\0{not json")
    with pytest.raises(UserError, match=f"{name} is no readable"):
        load_tower(tmp_path / name, "tiny")
    with pytest.raises(UserError, match="does not exist"):
        load_tower(tmp_path / f"no-{name}", "tiny")


@pytest.mark.parametrize("shape", [(60, 81), (81, 60), (48, 48), (49, 48), (20, 67)])
def test_a_picture_is_fitted_as_torchvision_does_for_clip(shape):
    picture = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    theirs = Compose([Resize(48, interpolation=InterpolationMode.BICUBIC), CenterCrop(48)])(Image.fromarray(picture))
    assert np.array_equal(to_size(picture, 48, 3, "crop"), np.asarray(theirs).transpose(2, 0, 1))
    assert np.array_equal(to_size(picture, 48), to_size(picture, 48, 3, "crop")) == (shape[0] == shape[1])


def test_the_stand_in_is_the_same_every_time_and_gives_unit_vectors():
    torch.manual_seed(1)
    first = StandIn()(images())
    torch.manual_seed(2)
    assert torch.equal(first, StandIn()(images())) and first.shape == (2, 512)
    assert torch.allclose(first.norm(dim=1), torch.ones(2)) and not torch.equal(first[0], first[1])


def test_heads_by_size():
    assert sum(p.numel() for p in Head(512).parameters()) == 513
    assert {name: tuple(value.shape) for name, value in Head(512, 256).state_dict().items()} == {
        "head.0.weight": (256, 512),
        "head.0.bias": (256,),
        "head.2.weight": (1, 256),
        "head.2.bias": (1,),
    }
