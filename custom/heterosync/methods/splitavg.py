"""SplitAVG: the sites hold the first layers, the server the rest, which it trains on all sites' batches at once."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits as bce

from heterosync.errors import HeteroSyncError
from heterosync.methods.base import COMMON_LEAVES, Form, Method, Parcel
from heterosync.training import Batch, Settings, setting
from heterosync.training.precision import autocast

#: Layers at the sites, by the cut.
HEADS = {"conv1": ("conv1",), "maxpool": ("conv1", "bn1", "relu", "maxpool")}
#: Gradients in float16 are scaled so that their largest value lies just below 2 to this power (65504 is the end).
_TOP = 15


@dataclass(frozen=True)
class SplitAVGSettings(Settings):
    what: ClassVar[str] = "splitavg"

    cut: str = setting(
        "maxpool", "[R] bandwidth; last layer at the sites; conv1: as the official code", choices=tuple(HEADS)
    )
    grad_mode: str = setting(
        "own_slice",
        "[M]; site_mean: every site gets the mean of all sites' gradients, as the official code",
        choices=("own_slice", "site_mean"),
    )
    v2: bool = setting(False, "[M] v1: labels go to the server; v2 (true): they stay, the loss is computed at the site")
    wire_dtype: str = setting("float16", "[R] bandwidth; of activations and gradients", choices=("float16", "float32"))


class SplitAVG(Method):
    """Zhang, Qu, Singh, Kalpathy-Cramer, Rubin, "SplitAVG: a heterogeneity-aware federated deep learning method for
    medical imaging", IEEE JBHI 2022.

        each step, site k:  a_k = f_k(x_k), B images          server:  A = cat_k a_k,  l = mean over K B of BCE(g(A), y)
        server:             g <- step by dl/dg                 to site k:  G_k = dl/da_k, its own slice
        site k:             f_k <- step by G_k back through f_k

    f_k are the layers up to `cut`; they start equal, are never averaged and drift apart. g is all the rest, one for
    all. Its BatchNorm sees the union of the sites' batches; at `cut` maxpool the first BatchNorm stays a site's own. In
    v2 the server sends the logits, a site returns the gradient of its loss by them, the server averages over sites.

    An epoch is one pass of the largest site: all sites make as many steps of as many images, smaller ones draw images
    again [R] (the official loop makes 71 steps and fails where a site has fewer). So B is one for all, and small sites
    count more per image. Both optimisers follow the recipe of all methods and start anew each round, or keep their
    moments (`keep_moments`) [R]. g goes to the sites before each round: they validate and test f_k and g together. That
    chooses a site's best model; within a round there is no best snapshot, only the last state.

    Faults of the official code are not repeated: the site's update ignores the server's gradient, v2 cannot train. Its
    third, one averaged gradient for all sites, is `grad_mode` site_mean. It uses ResNet34, SGD and an L1 loss.

    Sent: W3, activations (and in v1 labels) of every training image in every epoch. Images can be reconstructed from
    such early layers. In v2 no label tensor leaves, but the sign of the gradient by a logit tells that image's label.
    Up, and as gradients down, 0.38 MiB per image and epoch (ResNet18, 224 px, `cut` maxpool, float16; 3.06 MiB at conv1
    in float32): a step of 64 images 24.5 MiB, a round of 5 epochs of 1000 images 1.9 GiB. g, 42.6 MiB, goes down once a
    round and never comes back. Each site is tested with its own model; there is no model for unseen sites.

    Degenerates: with one site and float32 into local learning (one local epoch; with more, that takes the best snapshot
    of a round), which is plain central training of that site; where all sites hold equal f_k, no BatchNorm in them and
    K B images in all, the server's step is the centralised one on the union, and the sum of the sites' gradients that
    of the centralised f.
    """

    name = "splitavg"
    title = "SplitAVG"
    status = "corrected"
    citation = "Zhang M. et al., IEEE JBHI 2022, arXiv 2107.02375"
    leaves = (
        "W3, in every step: `features`, the activations of every image of the batch at the cut. Images can be "
        "reconstructed from such early layers",
        "W3, in every step: with v2=false `labels`, the label of every image of the batch; with v2=true "
        "`logit_gradient`, one number per image instead, whose sign tells the label",
        *COMMON_LEAVES,
    )
    weighting = "equal"
    personal = True
    needs_all = True
    only_updates = False
    split = True
    Settings = SplitAVGSettings
    settings: SplitAVGSettings

    # -- the two halves ------------------------------------------------------------------------------------------------

    def shared_names(self, model: nn.Module) -> tuple[str, ...]:
        heads = tuple(f"net.{name}." for name in HEADS[self.settings.cut])
        return tuple(name for name in model.state_dict() if not name.startswith(heads))

    def head(self, model: nn.Module, images: Tensor) -> Tensor:
        """Images (b, c, h, w) -> activations at the cut."""
        for name in HEADS[self.settings.cut]:
            images = getattr(model.net, name)(images)
        return images

    def tail(self, model: nn.Module, features: Tensor) -> Tensor:
        """Activations at the cut -> logits (b,)."""
        for name, layer in model.net.named_children():
            if name not in HEADS[self.settings.cut]:
                features = layer(features.flatten(1) if name == "fc" else features)
        return features.squeeze(1)

    # -- at a site -----------------------------------------------------------------------------------------------------

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The site's mean loss of the batch, whose gradient by the activations comes from the server.

        While no server is there (as when the pace of a precision is measured) the loss of the whole network.
        """
        if self.exchange is None:
            return super().loss(model, batch)
        return _AtServer.apply(self.head(model, batch.images), batch.labels, self)

    def ask(self, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The site's part of a step after its head: (mean loss, gradient of the server's loss by `features`)."""
        assert self.exchange is not None
        sent = {"features": features.detach().to("cpu", getattr(torch, self.settings.wire_dtype)).contiguous()}
        if self.settings.v2:
            logits = self.exchange(sent)["logits"].to(features.device).requires_grad_()
            with torch.enable_grad():
                loss = bce(logits, labels)
            answer = self.exchange({"logit_gradient": torch.autograd.grad(loss, logits)[0].cpu()})
        else:
            answer = self.exchange({**sent, "labels": labels.cpu()})
            loss = answer["loss"].to(features.device)
        if answer["gradient"].shape != features.shape:
            raise HeteroSyncError(f"the server answers with a gradient of shape {tuple(answer['gradient'].shape)}")
        gradient = answer["gradient"].to(features.device, torch.float32) / answer["scale"].to(features.device)
        return loss.detach(), gradient.to(features.dtype).contiguous(memory_format=torch.channels_last)

    def parcels(self, model: nn.Module) -> tuple[Form, ...]:
        side = (self.training.image_size + 1) // 2  # conv1 and maxpool halve the sides, rounding up
        side = side if self.settings.cut == "conv1" else (side + 1) // 2
        features: Form = {"features": ((model.net.conv1.out_channels, side, side), self.settings.wire_dtype)}
        if self.settings.v2:
            return features, {"logit_gradient": ((), "float32")}
        return ({**features, "labels": ((), "float32")},)

    # -- at the server -------------------------------------------------------------------------------------------------

    def serve(
        self, model: nn.Module, update: Callable[[Tensor, Tensor], bool], precision: str
    ) -> Generator[list[Parcel], list[Parcel], None]:
        device = next(model.parameters()).device
        sent = yield []
        while True:
            sizes = [len(parcel["features"]) for parcel in sent]
            features = torch.cat([parcel["features"] for parcel in sent]).to(device, torch.float32)
            features = features.contiguous(memory_format=torch.channels_last).requires_grad_()
            with autocast(device, precision):
                logits = self.tail(model, features)
            losses: list[Parcel] = [{} for _ in sizes]
            if self.settings.v2:
                sent = yield [{"logits": part.cpu()} for part in logits.detach().split(sizes)]
                by_logits = torch.cat([parcel["logit_gradient"] for parcel in sent]).to(device) / len(sizes)
            else:
                labels = torch.cat([parcel["labels"] for parcel in sent]).to(device)
                parts = zip(logits.split(sizes), labels.split(sizes), strict=True)
                losses = [{"loss": bce(own, of_site).detach().cpu()} for own, of_site in parts]
                (by_logits,) = torch.autograd.grad(bce(logits, labels), logits)
            good = update(logits, by_logits)
            slices = (features.grad if good else torch.full_like(features, torch.nan)).split(sizes)
            if self.settings.grad_mode == "site_mean":
                slices = (torch.stack(slices).mean(0),) * len(sizes)
            sent = yield [{**self._packed(part), **loss} for part, loss in zip(slices, losses, strict=True)]

    def _packed(self, gradient: Tensor) -> Parcel:
        """A gradient as it travels: in float16 times a power of two, or most of it would be lost below 6e-8."""
        gradient = gradient.float().cpu().contiguous()
        scale = torch.ones(())
        if self.settings.wire_dtype == "float16" and bool(torch.isfinite(gradient).all()):
            scale = torch.ldexp(scale, (_TOP - torch.frexp(gradient.abs().max()).exponent).clamp(max=100))
        return {"gradient": (gradient * scale).to(getattr(torch, self.settings.wire_dtype)), "scale": scale}

    def server_memory(self, sites: tuple[str, ...]) -> dict[str, Tensor]:
        """The moments of the server's optimiser, where they outlive a round."""
        if not self.training.keep_moments or self.training.optimizer == "sgd":
            return {}
        model = self.build_model(weights="none")
        names = set(self.shared_names(model))
        tensors = {name: value for name, value in model.named_parameters() if name in names}
        memory = {
            f"{kind}.{name}": torch.zeros_like(t) for kind in ("exp_avg", "exp_avg_sq") for name, t in tensors.items()
        }
        return {**memory, **{f"step.{name}": torch.zeros(()) for name in tensors}}


class _AtServer(torch.autograd.Function):
    """A loss whose value and gradient come from elsewhere."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, labels: Tensor, method: SplitAVG) -> Tensor:
        loss, gradient = method.ask(features, labels)
        ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    def backward(ctx: Any, by_loss: Tensor) -> tuple[Tensor, None, None]:
        return ctx.saved_tensors[0] * by_loss.to(ctx.saved_tensors[0].dtype), None, None
