"""Local training of one site: settings, batches, the loop, scores."""

from heterosync.training.batches import Batch
from heterosync.training.evaluation import Evaluation, score
from heterosync.training.loop import LocalTrainer, RoundResult
from heterosync.training.metrics import binary_metrics
from heterosync.training.precision import choose_precision
from heterosync.training.selection import BestRound, Plateau
from heterosync.training.settings import Settings, TrainingSettings, setting, settings_from

__all__ = [
    "Batch",
    "BestRound",
    "Evaluation",
    "LocalTrainer",
    "Plateau",
    "RoundResult",
    "Settings",
    "TrainingSettings",
    "binary_metrics",
    "choose_precision",
    "score",
    "setting",
    "settings_from",
]
