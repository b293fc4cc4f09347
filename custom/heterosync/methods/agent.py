"""A deterministic actor-critic whose whole state is a dictionary of tensors: what a server remembers of an agent."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss


class Agent:
    """Lillicrap et al., "Continuous control with deep reinforcement learning", ICLR 2016, for actions in (0, 1).

        q(s, a) -> r + gamma q'(s', pi'(s'))        pi(s) -> argmax of q        pi', q': slow copies of pi and q

    pi and q have two hidden layers of 128 and 64 ReLUs. An experience is (s, a, r, s'): what was seen (inputs,), done
    (actions,), gained (1,) and seen next (inputs,); the last `capacity` of them are kept. Draws come from the global
    generator. memory: of an agent of the same sizes, to go on from.
    """

    def __init__(
        self,
        inputs: int,
        actions: int,
        memory: Mapping[str, Tensor] | None = None,
        gamma: float = 0.99,
        capacity: int = 2000,
        batch: int = 16,
        lr: float = 1e-3,
        slow_rate: float = 0.005,
    ):
        self._gamma, self._batch, self._slow_rate = gamma, batch, slow_rate
        self._sizes = (inputs, actions, 1, inputs)
        networks = nn.ModuleDict({"actor": _mlp(inputs, actions), "critic": _mlp(inputs + actions, 1)})
        self._networks, self._slow = networks, copy.deepcopy(networks).requires_grad_(False)
        self._adam = torch.optim.Adam(networks.parameters(), lr=lr)
        self._past, self._count = torch.zeros(capacity, sum(self._sizes)), torch.tensor(0)
        if memory is not None:
            self._networks.load_state_dict({name: memory[f"agent.{name}"] for name in networks.state_dict()})
            self._slow.load_state_dict({name: memory[f"slow.{name}"] for name in networks.state_dict()})
            moments = {i: {k: memory[f"adam.{i}.{k}"].clone() for k in slot} for i, slot in self._moments().items()}
            self._adam.load_state_dict({**self._adam.state_dict(), "state": moments})
            self._past, self._count = memory["past"].clone(), memory["experiences"].clone()

    def memory(self) -> dict[str, Tensor]:
        """All that it is, by names that never change."""
        moments = {f"adam.{i}.{key}": value for i, slot in self._moments().items() for key, value in slot.items()}
        states = {"agent": self._networks.state_dict(), "slow": self._slow.state_dict()}
        tensors = {f"{part}.{name}": value for part, state in states.items() for name, value in state.items()}
        return {**tensors, **moments, "past": self._past, "experiences": self._count}

    def act(self, seen: Tensor) -> Tensor:
        """What it thinks best, (actions,)."""
        with torch.no_grad():
            return self._networks["actor"](seen).sigmoid()

    def remember(self, seen: Tensor, done: Tensor, reward: float, seen_next: Tensor) -> None:
        """Keep an experience, in place of the oldest where there is no room."""
        row = torch.cat([seen, done, torch.tensor([reward]), seen_next])
        self._past[int(self._count) % len(self._past)] = row
        self._count = self._count + 1

    def learn(self) -> None:
        """One step on a batch of experiences, as soon as there are enough for one."""
        known = min(int(self._count), len(self._past))
        if known < self._batch:
            return
        rows = torch.randint(known, (self._batch,))
        seen, done, reward, seen_next = self._past[rows].split(self._sizes, dim=1)
        goal = reward + self._gamma * _value(self._slow, seen_next)
        off = mse_loss(self._networks["critic"](torch.cat([seen, done], 1)), goal)
        actor, critic = (list(self._networks[part].parameters()) for part in ("actor", "critic"))
        gradients = torch.autograd.grad(-_value(self._networks, seen).mean(), actor) + torch.autograd.grad(off, critic)
        for parameter, gradient in zip(actor + critic, gradients, strict=True):
            parameter.grad = gradient
        self._adam.step()
        with torch.no_grad():
            for slow, parameter in zip(self._slow.parameters(), actor + critic, strict=True):
                slow.lerp_(parameter, self._slow_rate)

    def _moments(self) -> dict[int, dict[str, Tensor]]:
        """Adam's, which it makes itself only with its first step."""
        known: dict[int, dict[str, Tensor]] = self._adam.state_dict()["state"]
        zeros = [torch.zeros_like(parameter) for parameter in self._networks.parameters()]
        new = {
            i: {"step": torch.tensor(0.0), "exp_avg": zero, "exp_avg_sq": zero.clone()} for i, zero in enumerate(zeros)
        }
        return known or new


def _mlp(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, outputs))


def _value(networks: nn.ModuleDict, seen: Tensor) -> Tensor:
    """The critic's opinion of what the actor would do."""
    return networks["critic"](torch.cat([seen, networks["actor"](seen).sigmoid()], 1))
