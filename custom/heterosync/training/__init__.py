"""Local training of one site: settings, batches, the loop, scores."""

from heterosync.training.batches import Batch
from heterosync.training.classification import CLASSIFICATION
from heterosync.training.evaluation import Evaluation, score
from heterosync.training.examples import Examples
from heterosync.training.loop import LocalTrainer, RoundResult
from heterosync.training.metrics import binary_metrics
from heterosync.training.precision import choose_precision
from heterosync.training.segmentation import SEGMENTATION
from heterosync.training.selection import BestRound, Plateau
from heterosync.training.settings import LoopSettings, Settings, TrainingSettings, setting, settings_from
from heterosync.training.task import Task
from heterosync.training.volume_settings import VolumeSettings

__all__ = [
    "CLASSIFICATION",
    "SEGMENTATION",
    "Batch",
    "BestRound",
    "Evaluation",
    "Examples",
    "LocalTrainer",
    "LoopSettings",
    "Plateau",
    "RoundResult",
    "Settings",
    "Task",
    "TrainingSettings",
    "VolumeSettings",
    "binary_metrics",
    "choose_precision",
    "score",
    "setting",
    "settings_from",
]
