"""AdaFedProx: FedProx whose coefficient an agent at the server chooses from what the sites report."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from heterosync.errors import UserError
from heterosync.methods.agent import Agent
from heterosync.methods.answer import Answer, mean
from heterosync.methods.base import COMMON_LEAVES, SCALAR_LEAVES, EqualWeights, Method
from heterosync.methods.labels import label_entropy
from heterosync.methods.proximal import proximal_term
from heterosync.training import Batch, Examples, setting
from heterosync.training.seeds import seed_of

#: Numbers by which the agent knows a site (`observations`).
QUANTITIES = 5


@dataclass(frozen=True)
class AdaFedProxSettings(EqualWeights):
    what: ClassVar[str] = "adafedprox"

    agent: str = setting("learning", "[M]; frozen: always `mu` [own]", choices=("learning", "frozen"))
    mu: float = setting(0.01, "[own] as FedProx", low=0.0)
    mu_scope: str = setting("global", "[C]; per_client: one for each site [M]", choices=("global", "per_client"))
    gamma: float = setting(0.99, "[C] discount", low=0.0, high=1.0)
    buffer: int = setting(2000, "[C] rounds that the agent remembers", low=1)
    agent_batch: int = setting(16, "[C]", low=1)
    eps_decay: float = setting(0.005, "[C] a random mu with probability exp(-eps_decay t)", low=0.0)
    agent_lr: float = setting(1e-3, "[C] Adam", low=1e-12)
    target_rate: float = setting(0.005, "[R] of the slow copies that make the targets", low=1e-12, high=1.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.buffer < self.agent_batch:
            raise UserError(
                f"adafedprox setting 'buffer' is {self.buffer}: it must hold one agent_batch ({self.agent_batch}), or "
                "the agent never learns"
            )

    def idle(self) -> dict[str, str]:
        if self.agent == "learning":
            return {"mu": "agent=frozen"}
        rest = ("mu_scope", "gamma", "buffer", "agent_batch", "eps_decay", "agent_lr", "target_rate")
        return dict.fromkeys(rest, "agent=learning")


class AdaFedProx(Method):
    """Sahoo et al., "AdaFedProx: a heterogeneity-aware federated deep reinforcement learning for medical image
    classification", IEEE Trans. Consumer Electronics 2024. A reconstruction: the published script does not do what its
    abstract says (its agent never learns, its mu is never used, its reward is the accuracy on test images).

        site k:  min  BCE(w) + (mu / 2) ||w - w_g||^2,   mu as received
        server:  w <- (1/K) sum_k w_k      s <- per site: label entropy, n_k / n, epochs trained, accuracy and loss
                 mu <- a(s), in (0, 1), or uniform with probability exp(-eps_decay t)
        agent:   deterministic actor-critic [R]; one step on a batch of its experiences (s, mu, r, s') in every round

    The reward r of a round's mu is the accuracy of the model that came out of it, on the sites' validation images (mean
    by their number). The sites report it in the next round, so the agent learns one round late. mu of round 0 is drawn
    and, nothing being known before it, is no experience. A site that is absent is known by its last report. The losses
    are scaled to [0, 1] over the sites of a round [R]. All sites do all their local work, but for early stopping.

    In the usual 20 rounds the agent hardly learns: it explores with a probability above 0.9 throughout, and has its
    first batch after 18 of them. Fusion after every epoch (rounds=100, local_epochs=1) gives it more. It stays at the
    server, in its model file. Sent: as FedAvg, 42.7 MiB per round with ResNet18, and the scalars; mu only comes down.

    Degenerates: with agent=frozen and mu = c into FedProx of that mu, with mu = 0 into FedAvg, both with `weighting`
    equal.
    """

    name = "adafedprox"
    title = "AdaFedProx"
    status = "reconstruction"
    citation = "Sahoo et al., IEEE Trans. Consumer Electronics 2024"
    scalars = ("label_entropy", "n_epochs", "train_accuracy", "val_accuracy")
    leaves = (
        "W1: all tensors of the classifier (weights, BatchNorm statistics and counters)",
        *(SCALAR_LEAVES[name] for name in scalars),
        *COMMON_LEAVES,
    )
    only_updates = False
    one_model = True  # only `mu` differs
    Settings = AdaFedProxSettings
    settings: AdaFedProxSettings
    _received: list[Tensor]
    _mu = 0.0

    @property
    def per_site(self) -> bool:
        return self.settings.agent == "learning" and self.settings.mu_scope == "per_client"

    # -- at a site -----------------------------------------------------------------------------------------------------

    def network(self, weights: str) -> nn.Module:
        model = super().network(weights)
        model.register_buffer("mu", self._first_mu())
        return model

    def returned_names(self, model: nn.Module) -> tuple[str, ...]:
        return tuple(name for name in model.state_dict() if name != "mu")

    def round_start(self, model: nn.Module, received: Mapping[str, Tensor], examples: Examples) -> None:
        self._mu, self._received = float(model.mu), [value.detach().clone() for value in model.parameters()]
        # without images to validate on it does not count: the server weighs it by their number
        self._report = {"val_accuracy": examples.evaluate(model, "validation").metrics["accuracy"] or 0.0}

    def batches(self, model: nn.Module, examples: Examples, round_: int, epoch: int) -> Iterator[Batch]:
        self._report["n_epochs"] = epoch + 1
        return super().batches(model, examples, round_, epoch)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        loss = super().loss(model, batch)
        if not self._mu:
            return loss
        return loss + proximal_term(list(model.parameters()), self._received, self._mu)

    def round_end(self, model: nn.Module, examples: Examples) -> None:
        scores = {name: float(value or 0) for name, value in examples.evaluate(model, "train").metrics.items()}
        self._report["train_accuracy"] = scores["accuracy"]
        self._report["label_entropy"] = label_entropy([scores["n_positive"], scores["n"] - scores["n_positive"]])

    def diagnostics(self, model: nn.Module, examples: Examples) -> dict[str, float]:
        return dict(self._report)

    # -- at the server -------------------------------------------------------------------------------------------------

    def server_memory(self, sites: tuple[str, ...]) -> dict[str, Tensor]:
        if self.settings.agent == "frozen":
            return {}
        actions = len(sites) if self.settings.mu_scope == "per_client" else 1
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_of(self.training.seed, "agent"))
            agent = self._agent(QUANTITIES * len(sites), actions)
        return {
            "round": torch.tensor(0),
            "mu": self._first_mu().repeat(actions),
            **{f"site.{site}": torch.zeros(QUANTITIES) for site in sites},
            "seen": torch.zeros(QUANTITIES * len(sites)),  # by the agent, a round ago
            "done": torch.zeros(actions),
            **agent.memory(),
        }

    def for_site(self, state: Mapping[str, Tensor], memory: Mapping[str, Tensor], site: str) -> dict[str, Tensor]:
        if not self.per_site or f"site.{site}" not in memory:  # a site that only receives
            return dict(state)
        return {**state, "mu": memory["mu"][_sites(memory).index(site)].clone()}

    def fuse(
        self, sent: Mapping[str, Tensor], answers: Mapping[str, Answer], memory: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        if self.settings.agent == "learning":
            self._learn(answers, memory)
        state = {name: sent[name] if name == "mu" else mean(answers, name) for name in sent}
        return {**state, "mu": memory["mu"].mean()} if memory else state

    def _learn(self, answers: Mapping[str, Answer], memory: dict[str, Tensor]) -> None:
        """One step of the agent, and the coefficient of the next round."""
        sites, round_ = _sites(memory), int(memory["round"])
        torch.manual_seed(seed_of(self.training.seed, "agent", round_))
        seen = torch.cat([memory[f"site.{site}"] for site in sites])
        memory.update({f"site.{site}": row for site, row in observations(answers, self.training.local_epochs).items()})
        agent, reward = self._agent(len(seen), len(memory["mu"]), memory), validation_accuracy(answers)
        if round_ >= 2 and reward is not None:  # which the mu of the round before has earned
            agent.remember(memory["seen"], memory["done"], reward, seen)
        agent.learn()
        mu = agent.act(torch.cat([memory[f"site.{site}"] for site in sites]))
        if torch.rand(()) < math.exp(-self.settings.eps_decay * (round_ + 1)):
            mu = torch.rand(len(mu))
        memory.update(agent.memory(), seen=seen, done=memory["mu"].float(), mu=mu.double(), round=memory["round"] + 1)

    def _agent(self, inputs: int, actions: int, memory: Mapping[str, Tensor] | None = None) -> Agent:
        s = self.settings
        return Agent(inputs, actions, memory, s.gamma, s.buffer, s.agent_batch, s.agent_lr, s.target_rate)

    def _first_mu(self) -> Tensor:
        """In float64: FedProx of the same number must come out the same."""
        if self.settings.agent == "frozen":
            return torch.tensor(self.settings.mu, dtype=torch.float64)
        generator = torch.Generator().manual_seed(seed_of(self.training.seed, "mu"))
        return torch.rand((), generator=generator, dtype=torch.float64, device="cpu")


def observations(answers: Mapping[str, Answer], epochs: int) -> dict[str, Tensor]:
    """What the agent sees of each site (5,): label entropy, n_k / n, epochs trained of `epochs`, accuracy on the
    training images, training loss between the lowest (0) and the highest (1) of the sites."""
    images = sum(answer.samples for answer in answers.values())
    losses = {site: answer.scalars.get("train_loss", 0.0) for site, answer in answers.items()}
    low, spread = min(losses.values()), max(losses.values()) - min(losses.values())
    rows = {}
    for site, answer in answers.items():
        told = answer.scalars
        loss = (losses[site] - low) / spread if spread else 0.0
        row = (told["label_entropy"], answer.samples / images, told["n_epochs"] / epochs, told["train_accuracy"], loss)
        rows[site] = torch.tensor(row)
    return rows


def validation_accuracy(answers: Mapping[str, Answer]) -> float | None:
    """Accuracy of the model that was sent out, over the validation images of all sites; None where there are none."""
    told = [(answer.scalars.get("n_validation", 0), answer.scalars["val_accuracy"]) for answer in answers.values()]
    images = sum(count for count, _ in told)
    return sum(count * accuracy for count, accuracy in told) / images if images else None


def _sites(memory: Mapping[str, Tensor]) -> list[str]:
    return sorted(name.removeprefix("site.") for name in memory if name.startswith("site."))
