"""FedPPKT: a generator makes pictures of each site's private teacher, and only these teach the shared model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits as bce

from heterosync import pulse
from heterosync.errors import UserError
from heterosync.methods.answer import Answer, mean
from heterosync.methods.base import COMMON_LEAVES, EqualWeights, Method
from heterosync.models import Classifier
from heterosync.models.inversion import DeepGenerator, MetaGenerator, StatisticsGap, bernoulli_kl
from heterosync.training import Batch, Examples, setting
from heterosync.training.augment import augment, draw_augmentation
from heterosync.training.seeds import stream

#: Number of fusions so far; comes down, never goes up.
ROUNDS = "rounds"
SERVER_ONLY = ("server_gen_steps", "w_oh_server")  # settings of its refinement


@dataclass(frozen=True)
class FedPPKTSettings(EqualWeights):
    what: ClassVar[str] = "fedppkt"

    teacher_epochs: int = setting(200, "[C] rate x 0.2 after 60, 75 and 90 % of them (120, 150, 180)", low=1)
    teacher_lr: float = setting(0.02, "[C] SGD", low=1e-12)
    teacher_momentum: float = setting(0.7, "[C]", low=0.0, high=0.999)
    teacher_weight_decay: float = setting(1e-4, "[C]", low=0.0)
    nz: int = setting(256, "[C] channels of the generator's latent map", low=1)
    ngf: int = setting(64, "[R] filters of the generator's last stage; the first has four times as many", low=1)
    synthesis_batch: int = setting(256, "[C] pictures made per local epoch, and per step at the server", low=2)
    pool: int = setting(1024, "[own] pictures kept, the oldest give way; [C] keeps all", low=2)
    g_steps: int = setting(2, "[C] inner steps of a synthesis at a site", low=1)
    lr_g: float = setting(
        5e-3, "[C] Adam of the generator's fast copy; its own rate is this times the steps", low=1e-12
    )
    lr_z: float = setting(0.015, "[C] Adam of the latents", low=1e-12)
    w_bn: float = setting(10.0, "[C] distance from the BatchNorm statistics", low=0.0)
    w_oh: float = setting(0.4, "[C] cross-entropy of the teacher", low=0.0)
    w_adv: float = setting(1.1, "[C] disagreement of teacher and student", low=0.0)
    kd_steps: int = setting(200, "[C] distillation steps per local epoch", low=1)
    kd_T: float = setting(20.0, "[C] temperature of the distillation", low=1e-6)
    warm_up: int = setting(1, "[C] rounds in which sites only make pictures", low=0)
    server_gen_epochs: int = setting(50, "[C] refinement of the mean generator; 0 leaves it as it is", low=0)
    server_gen_steps: int = setting(10, "[C]", low=1)
    w_oh_server: float = setting(1.1, "[C] mean cross-entropy of the sites' students", low=0.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pool < self.synthesis_batch:
            raise UserError(
                f"fedppkt setting 'pool' is {self.pool}: it must hold the {self.synthesis_batch} pictures of one "
                "synthesis_batch"
            )

    def idle(self) -> dict[str, str]:
        return {} if self.server_gen_epochs else dict.fromkeys(SERVER_ONLY, "server_gen_epochs above 0")


class Household(nn.Module):
    """What a site holds; as a network it is the student."""

    def __init__(self, student: nn.Module, teacher: nn.Module, gen: nn.Module, pool: tuple[int, ...]):
        super().__init__()
        self.student, self.gen = student, gen.requires_grad_(False)
        self.teacher = teacher.requires_grad_(False)
        self.register_buffer(ROUNDS, torch.zeros((), dtype=torch.int64))
        self.register_buffer("taught", torch.zeros((), dtype=torch.bool))
        self.register_buffer("pool", torch.zeros(pool, dtype=torch.uint8))
        self.register_buffer("pool_labels", torch.zeros(pool[0], dtype=torch.uint8))
        self.register_buffer("made", torch.zeros((), dtype=torch.int64))  # pictures ever put into the pool

    def forward(self, images: Tensor) -> Tensor:
        return self.student(images)

    def train(self, mode: bool = True) -> Household:
        super().train(mode)
        self.teacher.eval()
        return self


class FedPPKT(Method):
    """FedPPKT, a federated privacy-preserving knowledge-transfer framework (OpenReview record Frxjx4kFMT, abstract),
    after its official scripts.

        once, site k:  teacher t_k: SGD on the private images, the best of its epochs by the validation images
        site k:    G, z:  min w_bn B(t_k) + w_oh CE(t_k(x), y) - w_adv mean[KL(t_k(x) || s(x)) 1{same arg max}],
                          x = augment(G(z)), z ~ N(0, I), y ~ U{0, 1};   the x of lowest loss join the site's pool
                   s:     min T^2 KL(t_k(x)/T || s(x)/T)  over the pool
        server:    s <- (1/K) sum_k s_k,   G <- (1/K) sum_k G_k,  then
                   G, z:  min w_bn B(s) + w_oh_server (1/K) sum_k CE(s_k(x), y)

    B: distance of the batch's moments from BatchNorm's statistics (models/inversion.py). A classifier has one logit l
    for the two classes (0, l). After stage 0 the site's training images are not read again (but a trainer that starts
    anew checks that the site folder is whole); its validation images choose the best epoch, as for every method. In the
    first `warm_up` rounds the student stays as it is, and sites keep their own G. Student: the common recipe
    (harmonised; [C] SGD 0.2, momentum 0.9, 10 epochs a round), `kd_steps` steps an epoch. G's layers and the pool's
    limit are reconstructions; so is that Adam's moments of G start anew each round.

    Sent: student and generator, 47.0 MiB per round with ResNet18. The generator is fitted to invert a model of private
    images (W4): what it draws can look like them. The teacher and the pool stay at the site, in its resume state.

    Degenerates: with `server_gen_epochs` 0 the server's half into FedAvg's mean of students and generators, with equal
    weights; with `warm_up` of all rounds the student stays the initial model.
    """

    name = "fedppkt"
    title = "FedPPKT"
    status = "code-faithful"
    citation = "FedPPKT, OpenReview Frxjx4kFMT (abstract) and its official code of January 2024"
    leaves = (
        "W1: all tensors of the student, `student.*`, which was trained on synthetic images only",
        "W4: all tensors of the generator, `gen.*`, which is fitted to invert a classifier of private images",
        *COMMON_LEAVES,
    )
    only_updates = False
    Settings = FedPPKTSettings
    settings: FedPPKTSettings
    _meta: MetaGenerator
    _gap: StatisticsGap
    _kept: Mapping[str, Tensor]

    def network(self, weights: str) -> nn.Module:
        t = self.training
        student = Classifier(t.backbone, t.channels, weights)
        teacher = Classifier(t.backbone, t.channels, weights)
        return Household(
            student, teacher, self._generator(), (self.settings.pool, t.channels, t.image_size, t.image_size)
        )

    def _generator(self) -> DeepGenerator:
        return DeepGenerator(self.training.image_size, self.training.channels, self.settings.nz, self.settings.ngf)

    def shared_names(self, model: nn.Module) -> tuple[str, ...]:
        return (*self.returned_names(model), ROUNDS)

    def returned_names(self, model: nn.Module) -> tuple[str, ...]:
        return tuple(name for name in model.state_dict() if name.startswith(("student.", "gen.")))

    def own_names(self, model: nn.Module) -> tuple[str, ...]:
        """The generator too: at first a site goes on with its own."""
        return tuple(name for name in model.state_dict() if not name.startswith("student.") and name != ROUNDS)

    # -- at a site -----------------------------------------------------------------------------------------------------

    def receive(self, model: nn.Module, shared_state: Mapping[str, Tensor]) -> None:
        own = int(shared_state[ROUNDS]) <= self.settings.warm_up
        state = {name: value for name, value in shared_state.items() if not (own and name.startswith("gen."))}
        model.load_state_dict(state, strict=False)

    def round_start(self, model: nn.Module, received: Mapping[str, Tensor], examples: Examples) -> None:
        if not model.taught:
            self._teach(model.teacher, examples)
            model.taught.fill_(True)
        s = self.settings
        self._meta = self._meta_generator(model.gen, s.g_steps)
        self._gap = StatisticsGap(model.teacher)

    def _teach(self, teacher: nn.Module, examples: Examples) -> None:
        """Stage 0: the only time that the site's training images are read."""
        s = self.settings
        optimizer = torch.optim.SGD(
            teacher.requires_grad_().parameters(), s.teacher_lr, s.teacher_momentum, weight_decay=s.teacher_weight_decay
        )
        milestones = [round(s.teacher_epochs * part) for part in (0.6, 0.75, 0.9)]
        schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, gamma=0.2)
        best, best_value = {}, -float("inf")
        for epoch in range(s.teacher_epochs):
            teacher.train()
            for batch in examples.batches(0, epoch):
                pulse.beat()
                optimizer.zero_grad(set_to_none=True)
                bce(teacher(batch.images), batch.labels).backward()
                optimizer.step()
            schedule.step()
            self._tell("the teacher", epoch, s.teacher_epochs)
            teacher.eval()
            try:
                score, log_loss = examples.validate(teacher)
            except UserError as error:  # scores that are not finite
                raise UserError(f"the teacher diverges: lower fedppkt setting 'teacher_lr' ({s.teacher_lr})") from error
            value = score if score is not None else -log_loss
            if value >= best_value:
                best, best_value = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}, value
        teacher.load_state_dict(best)
        teacher.requires_grad_(False).zero_grad(set_to_none=True)

    def batches(self, model: nn.Module, examples: Examples, round_: int, epoch: int) -> Iterator[Batch]:
        rng = np.random.default_rng(int(torch.randint(2**62, ())))  # torch's generator was set for site and epoch
        warm = round_ < self.settings.warm_up
        epochs = range(self.training.local_epochs if warm else 1)
        for made in epochs:
            self._synthesise(model, rng)
            if warm:
                self._tell("pictures", made, len(epochs))
        if warm:
            return
        self._kept = {name: model.state_dict()[name].clone() for name in self.own_names(model) if "teacher" not in name}
        filled = min(int(model.made), len(model.pool))
        size = min(self.training.batch_size, filled)
        for _ in range(self.settings.kd_steps):
            rows = torch.from_numpy(rng.choice(filled, size, replace=False)).to(model.pool.device)
            images = (model.pool[rows].float() / 255).contiguous(memory_format=torch.channels_last)
            yield Batch(images, model.pool_labels[rows].float())

    def _tell(self, what: str, done: int, of: int) -> None:
        if (done + 1) * 10 // of > done * 10 // of:  # ten lines, also of hundreds of epochs
            self.tell(f"{what}: epoch {done + 1}/{of}")

    def _synthesise(self, model: nn.Module, rng: np.random.Generator) -> list[float]:
        """One epoch of the generator; its pictures enter the pool."""
        training = model.student.training
        model.student.eval()
        try:
            images, labels, losses = self._bent(self._meta, lambda x, y: self._generator_loss(model, x, y), rng)
        finally:
            model.student.train(training)
        self._gap.remember()
        rows = (int(model.made) + torch.arange(len(images), device=model.pool.device)) % len(model.pool)
        model.pool[rows] = (images * 255).round().clamp(0, 255).to(torch.uint8)
        model.pool_labels[rows] = labels.to(torch.uint8)
        model.made += len(images)
        return losses

    def _bent(
        self, meta: MetaGenerator, loss: Callable[[Tensor, Tensor], Tensor], rng: np.random.Generator
    ) -> tuple[Tensor, Tensor, list[float]]:
        """`MetaGenerator.epoch`, whose error gets its remedy."""
        try:
            return meta.epoch(loss, rng)
        except UserError as error:
            raise UserError(f"{error}: lower fedppkt setting 'lr_g' ({self.settings.lr_g})") from error

    def _generator_loss(self, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        s = self.settings
        teacher, gap = self._gap(images)
        loss = s.w_bn * gap + s.w_oh * bce(teacher, labels)
        if s.w_adv:
            student = model.student(images)
            agree = ((teacher > 0) == (student > 0)).float()
            loss = loss - s.w_adv * (bernoulli_kl(teacher, student) * agree).mean()
        return loss

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        with torch.no_grad():
            teacher = model.teacher(batch.images)
        temperature = self.settings.kd_T
        return temperature**2 * bernoulli_kl(teacher.float(), model.student(batch.images).float(), temperature).mean()

    def round_end(self, model: nn.Module, examples: Examples) -> None:
        """The student is that of the best epoch; generator and pool are those of the last."""
        model.load_state_dict(dict(self._kept), strict=False)

    # -- at the server -------------------------------------------------------------------------------------------------

    def fuse(
        self, sent: Mapping[str, Tensor], answers: Mapping[str, Answer], memory: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        names = next(iter(answers.values())).names
        state = {name: mean(answers, name) for name in names}
        round_ = int(sent[ROUNDS])
        if round_ >= self.settings.warm_up and self.settings.server_gen_epochs:
            state |= self._refined(state, answers, round_)
        return {**state, ROUNDS: sent[ROUNDS] + 1}

    def _refined(self, state: Mapping[str, Tensor], answers: Mapping[str, Answer], round_: int) -> dict[str, Tensor]:
        """The mean generator, bent to what all students know. Every step asks each of them: they stay in memory."""
        s = self.settings
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        gen = self._generator()
        gen.load_state_dict(part(state, "gen."))
        meta = self._meta_generator(gen.to(device), s.server_gen_steps)
        gap = StatisticsGap(self._student(state, device))
        students = [
            self._student({name: answer[name] for name in answer.names if name.startswith("student.")}, device)
            for answer in answers.values()
        ]

        def loss(images: Tensor, labels: Tensor) -> Tensor:
            _, distance = gap(images)
            entropy = torch.stack([bce(student(images), labels) for student in students]).mean()
            return s.w_bn * distance + s.w_oh_server * entropy

        for epoch in range(s.server_gen_epochs):
            self._bent(meta, loss, stream(self.training.seed, "server", round_, epoch, "synthesis"))
            gap.remember()
            self._tell(f"round {round_}, the server's refinement", epoch, s.server_gen_epochs)
        return {f"gen.{name}": value.cpu() for name, value in gen.state_dict().items()}

    def _student(self, state: Mapping[str, Tensor], device: torch.device) -> nn.Module:
        student = Classifier(self.training.backbone, self.training.channels)
        student.load_state_dict(part(state, "student."))
        return student.to(device).eval().requires_grad_(False)

    def _meta_generator(self, gen: DeepGenerator, steps: int) -> MetaGenerator:
        s = self.settings

        def look(images: Tensor, rng: np.random.Generator) -> Tensor:
            return augment(images, *draw_augmentation(len(images), rng)) if self.training.augment else images

        return MetaGenerator(gen, steps, s.synthesis_batch, s.lr_g, s.lr_z, look)


def part(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors below a prefix, under their names without it."""
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
