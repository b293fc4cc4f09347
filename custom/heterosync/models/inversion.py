"""Pictures out of a frozen classifier: a generator, and how it is bent to the classifier without any data.

The statistics are DeepInversion's (Yin et al., CVPR 2020), the meta-learned generator with its fast copy that of Fang
et al., AAAI 2022, whose data-free distillation FedPPKT federates.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from heterosync import pulse
from heterosync.errors import UserError

#: How often the generator doubles a side: 7 to 224.
STAGES = 5
_WIDTHS = (4, 2, 2, 1, 1)  # in units of the last stage's
_BETAS = (0.5, 0.999)
_MOMENTUM = 0.9  # of the smoothed moments


class DeepGenerator(nn.Module):
    """Latent maps (b, depth, s/32, s/32) -> pictures (b, channels, s, s) in (0, 1).

    BatchNorm takes the moments of each batch: the generator makes pictures by the batch only, and keeps no statistics.
    Raises `UserError` for a size that five stages cannot reach.
    """

    def __init__(self, size: int, channels: int = 3, depth: int = 256, width: int = 64):
        super().__init__()
        side, rest = divmod(size, 2**STAGES)
        if rest:
            raise UserError(f"setting 'image_size' is {size}: a generator of five stages makes multiples of 32")
        self.latent = (depth, side, side)
        layers: list[nn.Module] = [nn.BatchNorm2d(depth, track_running_stats=False)]
        before = depth
        for filters in (width * times for times in _WIDTHS):
            layers += [
                nn.Upsample(scale_factor=2),
                nn.Conv2d(before, filters, 3, padding=1, bias=False),
                nn.BatchNorm2d(filters, track_running_stats=False),
                nn.LeakyReLU(0.2),
            ]
            before = filters
        self.layers = nn.Sequential(*layers, nn.Conv2d(before, channels, 3, padding=1), nn.Sigmoid())

    def forward(self, latent: Tensor) -> Tensor:
        return self.layers(latent)


class StatisticsGap:
    """How far the moments of what enters a network's BatchNorm layers lie from those that the layers remember.

        sum over layers of |running variance - variance|_2 + |running mean - mean|_2

    The moments are smoothed: 0.9 of those remembered and 0.1 of the batch's; `remember` makes those of the last batch
    the new memory, and until its first call a batch counts by itself. The network is in evaluation mode.
    """

    def __init__(self, network: nn.Module):
        self._network = network
        self._layers = [layer for layer in network.modules() if isinstance(layer, nn.BatchNorm2d)]
        self._last: dict[nn.Module, Tensor] = {}
        self._memory: dict[nn.Module, Tensor] = {}

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The network's output for `images`, and the gap."""
        terms: list[Tensor] = []

        def look(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            variance, mean = torch.var_mean(inputs[0], dim=(0, 2, 3), correction=0)
            moments = torch.stack([variance, mean])
            if layer in self._memory:
                moments = _MOMENTUM * self._memory[layer] + (1 - _MOMENTUM) * moments
            self._last[layer] = moments.detach()
            kept = torch.stack([layer.running_var, layer.running_mean])
            terms.append((kept - moments).norm(dim=1).sum())

        hooks = [layer.register_forward_pre_hook(look) for layer in self._layers]
        try:
            output = self._network(images)
        finally:
            for hook in hooks:
                hook.remove()
        return output, torch.stack(terms).sum() if terms else output.sum() * 0

    def remember(self) -> None:
        """Once per synthesis."""
        self._memory = dict(self._last)


def bernoulli_kl(teacher: Tensor, student: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(teacher || student) of two classes from one logit each (b,), softened by the temperature, per item (b,)."""
    t, s = teacher / temperature, student / temperature
    p = torch.sigmoid(t)
    return p * (logsigmoid(t) - logsigmoid(s)) + (1 - p) * (logsigmoid(-t) - logsigmoid(-s))


class MetaGenerator:
    """First-order MAML of a generator: every epoch a fast copy of it is bent to a loss, together with its latents; the
    gradients of the copy add up to one Adam step of the generator itself, at `steps` times the copy's rate.

    augment: what the loss sees of a picture. The generator's `requires_grad` is as it was afterwards.
    """

    def __init__(
        self,
        generator: DeepGenerator,
        steps: int,
        batch: int,
        lr_generator: float,
        lr_latent: float,
        augment: Callable[[Tensor, np.random.Generator], Tensor],
    ):
        self._generator, self._steps, self._batch, self._augment = generator, steps, batch, augment
        self._rates = (lr_generator, lr_latent)
        self._meta = torch.optim.Adam(generator.parameters(), lr=steps * lr_generator, betas=_BETAS)

    def epoch(
        self, loss: Callable[[Tensor, Tensor], Tensor], rng: np.random.Generator
    ) -> tuple[Tensor, Tensor, list[float]]:
        """The pictures of lowest loss (b, c, s, s), the labels (b,) that they were made for, and the losses by step.

        Raises `UserError` where a loss or the generator's gradient is not finite; the generator is then as before.
        """
        device = next(self._generator.parameters()).device
        drawn = rng.standard_normal((self._batch, *self._generator.latent), dtype=np.float32)
        latent = torch.from_numpy(drawn).to(device).requires_grad_()
        labels = torch.from_numpy(rng.integers(0, 2, self._batch).astype(np.float32)).to(device)
        fast = copy.deepcopy(self._generator).train().requires_grad_()
        wanted = [*fast.parameters(), latent]
        groups = [{"params": wanted[:-1], "lr": self._rates[0]}, {"params": [latent], "lr": self._rates[1]}]
        optimizer = torch.optim.Adam(groups, betas=_BETAS)
        total: list[Tensor] = [torch.zeros_like(parameter) for parameter in wanted[:-1]]
        best, losses = torch.empty(0), list[float]()
        with torch.enable_grad():
            for _ in range(self._steps):
                pulse.beat()
                images = self._augment(fast(latent), rng)
                value = loss(images, labels)
                gradients = torch.autograd.grad(value, wanted)
                reached = value.item()
                if not math.isfinite(reached):
                    raise UserError("the generator's loss is not finite")
                if not losses or reached < min(losses):
                    best = images.detach()
                losses.append(reached)
                for parameter, gradient in zip(wanted, gradients, strict=True):
                    parameter.grad = gradient
                torch._foreach_add_(total, list(gradients[:-1]))
                optimizer.step()
        if not torch.isfinite(nn.utils.get_total_norm(total)):
            raise UserError("the generator's gradient is not finite")
        for parameter, gradient in zip(self._generator.parameters(), total, strict=True):
            parameter.grad = gradient
        self._meta.step()
        self._meta.zero_grad(set_to_none=True)
        return best, labels, losses
