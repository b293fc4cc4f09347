"""The settings of local training on volumes. [S]: Sarma et al., JAMIA 2021; other marks as in settings.py."""

from __future__ import annotations

from dataclasses import dataclass

from heterosync.errors import UserError
from heterosync.models.ahnet import NETWORKS, patch_problem
from heterosync.training.settings import LoopSettings, setting

#: Settings in which the models of an ensemble must not differ: the network, and how it sees a volume.
ALIKE = ("network", "spacing", "interpolation", "patch", "overlap")


@dataclass(frozen=True)
class VolumeSettings(LoopSettings):
    """The recipe of Sarma et al. 2021, Model architecture and Training strategy; what it leaves open is marked [R]."""

    network: str = setting("ahnet", "[S] 3D AH-Net; unet_tiny for the smoke profile [own]", choices=NETWORKS)
    weights: str = setting(
        "none", "[own] or an earlier model's file: its name in torch's cache, in simulations its path"
    )
    psp_blocks: int = setting(4, "[R] MONAI's default: levels of AH-Net's pyramid pooling", low=0, high=4)
    spacing: float = setting(1.0, "[S] mm, isotropic", low=0.25, high=10.0)
    interpolation: str = setting("linear", "[R] of images on resampling", choices=("linear", "spline"))
    patch: tuple[int, int, int] = setting((128, 128, 64), "[R] voxels along x, y, z", low=16, high=512)
    overlap: float = setting(0.5, "[R] of neighbouring windows when a whole volume is segmented", low=0.0, high=0.9)
    crops: int = setting(4, "[R] random patches per case and epoch", low=1)
    foreground: float = setting(
        0.5, "[S] crops by background/foreground ratio; [R] share centred on the organ", low=0.0, high=1.0
    )
    fold: int = setting(1, "[S] which set of a site's training cases validates; its folds are numbered from 1", low=1)
    rounds: int = setting(300, "[S] 300 epochs, fusion after each", low=1)
    local_epochs: int = setting(1, "[S]", low=1)
    batch_size: int = setting(4, "[R] patches", low=1)
    optimizer: str = setting("adam", "[S]", choices=("adam", "adamw", "sgd"))
    lr: float = setting(1e-4, "[R]", low=1e-12)
    weight_decay: float = setting(0.0, "[S] plain Adam", low=0.0)
    schedule: str = setting(
        "plateau", "[S] decay by the validation metric; [R] which rule", choices=("plateau", "constant")
    )
    lr_factor: float = setting(0.5, "[R] lr is multiplied by it", low=0.01, high=0.99)
    lr_patience: int = setting(10, "[R] epochs without a gain of validation Dice before it is", low=0)
    lr_floor: float = setting(1e-6, "[R]", low=0.0)
    augment: bool = setting(True, "[S] Deep Stacked Transformation")
    plateau_gain: float = setting(0.005, "[R] as for AUC", low=0.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        problem = patch_problem(self.network, self.psp_blocks, self.patch)
        if problem:
            raise UserError(f"training setting 'patch' is {list(self.patch)}: {problem}")

    def idle(self) -> dict[str, str]:
        still = {} if self.network == "ahnet" else {"psp_blocks": "network=ahnet"}
        if self.schedule != "plateau":
            still.update(dict.fromkeys(("lr_factor", "lr_patience", "lr_floor"), "schedule=plateau"))
        return still
