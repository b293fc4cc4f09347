"""What leaves a site, in plain words with its privacy class: the lines that methods have in common."""

from __future__ import annotations

_VERSIONS = "precision, versions of heterosync, python, torch, torchvision, monai and nvflare"

#: What leaves a site under every method, by the names of the allow-list (federation/wire.py) and with privacy class.
COMMON_LEAVES: tuple[str, ...] = (
    "W0, per round: val_auc_received, val_auc_best, best_epoch, train_loss, steps, seconds; for the two-task network "
    "also primary_gradient, anchor_gradient, anchor_gradient_ratio, partner_effect, mixture_share",
    "W0, per evaluated split: auc, ci_low, ci_high, accuracy, recall, precision",
    "W0, numbers of images: n_train and n_validation per round, n per evaluated split, counts of every split at the "
    "check-in",
    "W2, number of images of the positive label per evaluated split: n_positive",
    "at the check-in: site name, method, labels (the names of the two classes), anchor_digest (SHA-256 of the shared "
    "anchor set), model_hash (names and shapes), initial_weights (imagenet, none, stand-in or a file's hash), "
    + _VERSIONS,
)

#: The same for methods that segment volumes.
VOLUME_LEAVES: tuple[str, ...] = (
    "W0, per round: val_dice_received, val_dice_best, best_epoch, train_loss, steps, seconds",
    "W0, per evaluated split: dice, dice_sd, ci_low, ci_high, hd95, volume_error",
    "W0, numbers of volumes: n_train and n_validation per round, n and n_missed (nothing found) per evaluated split, "
    "counts of every split at the check-in",
    "at the check-in: site name, method, labels (background and organ), model_hash (names and shapes), initial_weights "
    "(none or a file's hash), " + _VERSIONS,
)

#: In words, the scalars that only some methods report (`Method.scalars`); the `leaves` of these hold the line.
SCALAR_LEAVES: dict[str, str] = {
    "label_entropy": "W2, per round: label_entropy, the entropy of the labels of the training images, in nats; of two "
    "classes it tells their counts",
    "label_balance": "W2, per round: label_balance, the entropy of the labels of the images last trained on, divided "
    "by its largest value; of two classes it tells the ratio of their counts",
    "n_epochs": "W0, per round: n_epochs, the local epochs that were trained",
    "train_accuracy": "W0, per round: train_accuracy, on the training images",
    "val_accuracy": "W0, per round: val_accuracy, on the validation images",
}
