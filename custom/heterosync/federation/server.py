"""The server's half of a round: the fusion, then the method's own rule over it, and what that rule remembers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from heterosync.errors import UserError
from heterosync.federation.contribution import Contribution
from heterosync.federation.fusion import SCORED, Fusion
from heterosync.federation.split import Tail
from heterosync.methods.base import Method

#: Before the names of the server's tensors among the assets of a model file.
PREFIX = "server."


class Server:
    """Global states from contributions, for every engine alike.

    state: the global state; it fixes names, shapes and types of what sites may send. memory: what an earlier server of
    this training remembered (`memory_of`), None at the first round. spill: as in `Fusion`.

    Raises `UserError` for a memory that is not this method's.
    """

    def __init__(
        self,
        method: Method,
        state: Mapping[str, Any],
        memory: Mapping[str, Tensor] | None = None,
        spill: Path | None = None,
    ):
        self._method, self._sent = method, state
        self.memory = method.server_memory()
        if memory is not None:
            wanted, found = ({name: value.shape for name, value in held.items()} for held in (self.memory, memory))
            if wanted != found:
                why = "what its server remembers of the rounds before is missing or does not fit"
                raise UserError(f"method {method.name} cannot go on from the stored model: {why}: begin a new training")
            self.memory = dict(memory)
        self.tail = Tail(method, state, self.memory) if method.split else None
        score = getattr(method.task, SCORED.get(method.weighting, "best"))
        self.fusion = Fusion({} if method.split else state, method.weighting, method.name, spill, score)

    def start(self, round_: int, sent: Mapping[str, Any]) -> None:
        """Begin a round, for which the sites get the state `sent`."""
        self._sent = sent
        self.fusion.start(round_)
        if self.tail is not None:
            self.tail.start(round_, sent)

    def accept(self, contribution: Contribution) -> None:
        """As `Fusion.accept`."""
        self.fusion.accept(contribution)

    def result(self) -> dict[str, Any]:
        """The next global state; call it once per round."""
        fused = self.fusion.result()
        if self.tail is not None:  # trained step by step; what came in last are only scalars
            return self.tail.state()
        return self._method.combine(self._sent, fused, self.memory, len(self.fusion.contributors))


def assets_of(memory: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a server remembers, as it stands among the assets of a model file."""
    return {PREFIX + name: value for name, value in memory.items()}


def memory_of(assets: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a server remembered, out of the assets of a model file."""
    return {name.removeprefix(PREFIX): value for name, value in assets.items() if name.startswith(PREFIX)}
