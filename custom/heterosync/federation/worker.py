"""A site's trainer in a process of its own, so that a crash in training costs a round and not the job.

`TrainerProcess` has the methods of `SiteTrainer` and starts a child (child.py) when it needs one. What libraries print
there goes to work/trainer.log. The child ends when its stdin closes or its parent is gone. All state of a site is on
disk, so a new child goes on where a dead one stopped.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from torch import Tensor

from heterosync.errors import HeteroSyncError, TrainerDied, TrainerHung, UserError
from heterosync.federation.contribution import Contribution
from heterosync.federation.split import Ask
from heterosync.federation.tensorfile import TensorFile
from heterosync.files import explained, make_folder

#: In the work folder: what the trainer and the libraries in it print.
TRAINER_LOG = "trainer.log"
_POLL = 0.1  # seconds between looks at `abort`
_GRACE = 5.0  # seconds that an idle child gets to end by itself
_DUMP = 0.5  # seconds that a hung child gets to write down where it hangs

#: Seconds without a sign of life after which a trainer counts as hung.
STALL = 3600.0


class TrainerProcess:
    """The trainer of one site behind a pipe; the same calls and errors as `SiteTrainer`, plus `TrainerDied`.

    timeout: seconds that one call may take (None: no limit). stall: seconds without a sign of life (see pulse.py: one
    per batch and per image read, so slow is not hung) after which the trainer is killed (None: no limit). abort: polled
    while waiting; when it says True the trainer is killed. Every call starts a trainer when none lives, so the call
    after a death just works. `close` may be called from another thread and ends a waiting call with `TrainerDied`.
    """

    def __init__(
        self,
        site: str,
        folder: Path | str,
        method_name: str,
        method_settings: Mapping[str, Any] | None,
        training: Mapping[str, Any] | None,
        work: Path | str,
        log: Callable[[str], None] | None = None,
        timeout: float | None = None,
        abort: Callable[[], bool] | None = None,
        stall: float | None = STALL,
        results: Path | str | None = None,
    ):
        self.site, self.work, self.timeout, self.abort = site, Path(work).absolute(), timeout, abort
        self.stall = stall
        self._options = {
            "site": site,
            "folder": str(Path(folder).absolute()),
            "method_name": method_name,
            "method_settings": dict(method_settings or {}),
            "training": dict(training or {}),
            "work": str(self.work),
            "results": str(Path(results).absolute()) if results is not None else None,
        }
        self._log = log or (lambda line: None)
        self.exchange: Ask | None = None  # as in `SiteTrainer`; called in this process
        self._child: subprocess.Popen[str] | None = None
        self._answers: queue.Queue[str | None] = queue.Queue()
        self._calling = threading.Lock()
        self._handling = threading.Lock()  # of the child itself: start and kill

    def check_in(self) -> dict[str, Any]:
        """See `SiteTrainer.check_in`."""
        return self._call("check_in", {})["value"]

    def train(self, round_: int, shared: Mapping[str, Tensor] | None, items: int = 0) -> Contribution:
        """See `SiteTrainer.train`."""
        answer = self._call("train", {"round_": round_, "items": items}, shared)
        return Contribution(tensors=self._file("answer", answer["layout"]).read(), **answer["value"])

    def validate(
        self, shared: Mapping[str, Tensor] | None, split: str, model_name: str, rounds: int = 0
    ) -> dict[str, float]:
        """See `SiteTrainer.validate`."""
        return self._call("validate", {"split": split, "model_name": model_name, "rounds": rounds}, shared)["value"]

    @property
    def pid(self) -> int | None:
        """Process id of the living trainer."""
        child = self._child
        return child.pid if child is not None and child.poll() is None else None

    def close(self) -> None:
        """End the trainer: at once when it works, else after it had a moment to end by itself. No process is left."""
        self._stop(_GRACE if not self._calling.locked() else 0.0)
        for name in ("request", "answer", "step"):
            self._file(name).path.unlink(missing_ok=True)

    def __enter__(self) -> TrainerProcess:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    # -- inner ---------------------------------------------------------------------------------------------------------

    def _call(
        self, name: str, arguments: dict[str, Any], tensors: Mapping[str, Tensor] | None = None
    ) -> dict[str, Any]:
        with self._calling:
            child = self._start()
            request = {"call": name, "arguments": arguments, "layout": None}
            if tensors:
                request["layout"] = self._file("request").write(tensors).layout
            try:
                assert child.stdin is not None
                child.stdin.write(json.dumps(request) + "\n")
                child.stdin.flush()
            except (OSError, ValueError):
                pass  # it is dead already; the end of its answers says how
            try:
                return self._wait(child, name)
            except UserError:
                raise  # an answer like any other
            except BaseException:
                # Ctrl-C, or a trainer whose memory may hold something half done: the next one starts from disk.
                self._stop(0.0)
                raise

    def _wait(self, child: subprocess.Popen[str], name: str) -> dict[str, Any]:
        deadline = time.monotonic() + self.timeout if self.timeout is not None else None
        log = self.work / TRAINER_LOG
        answers = self._answers
        heard = time.monotonic()
        while True:
            if self.abort is not None and self.abort():
                raise TrainerDied(f"site {self.site}: trainer stopped during {name}: the job was aborted")
            if deadline is not None and time.monotonic() > deadline:
                raise TrainerDied(f"site {self.site}: trainer killed: {name} took longer than {self.timeout:g} s")
            try:
                line = answers.get(timeout=_POLL)
            except queue.Empty:
                if self.stall is not None and time.monotonic() - heard > self.stall:
                    child.send_signal(signal.SIGUSR1)
                    time.sleep(_DUMP)
                    silent = f"trainer killed: no sign of life for {self.stall:g} s during {name}"
                    raise TrainerHung(f"site {self.site}: {silent}; the end of {log} says where it hung") from None
                continue
            heard = time.monotonic()
            if line is None:
                self._stop(_GRACE)
                hint = f"the end of {log} may say why"
                raise TrainerDied(f"site {self.site}: trainer ended {_how(child.wait())} during {name}; {hint}")
            try:
                answer = json.loads(line)
            except ValueError:
                continue  # something printed while Python itself was starting
            if "alive" in answer:
                continue
            if "step" in answer:
                self._pass_on(child, answer)
                heard = time.monotonic()
            elif "progress" in answer:
                self._log(answer["progress"])
            elif "user_error" in answer:
                raise UserError(answer["user_error"])
            elif "defect" in answer:
                raise HeteroSyncError(f"site {self.site}: trainer failed in {name}:\n{answer['defect']}")
            else:
                return answer

    def _pass_on(self, child: subprocess.Popen[str], question: dict[str, Any]) -> None:
        """Give the child what the server answers to a step; an error here ends the child, whose round is lost."""
        if self.exchange is None:
            raise HeteroSyncError(f"site {self.site}: no server to ask in step {question['step']}")
        try:
            parcel = self.exchange(question["step"], self._file("step", question["layout"]).read())
        except UserError:  # the child would take the next request for the answer that it waits for
            self._stop(0.0)
            raise
        with suppress(OSError):  # it is dead: the end of its answers says how
            assert child.stdin is not None
            child.stdin.write(json.dumps({"layout": self._file("step").write(parcel).layout}) + "\n")
            child.stdin.flush()

    def _start(self) -> subprocess.Popen[str]:
        with self._handling:
            if self._child is not None and self._child.poll() is None:
                return self._child
            make_folder(self.work)
            root = str(Path(__file__).resolve().parents[2])  # the package may lie uninstalled in a job's custom/
            paths = [root, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
            with explained(self.work / TRAINER_LOG), (self.work / TRAINER_LOG).open("ab") as log:
                child = subprocess.Popen(
                    [sys.executable, "-m", "heterosync.federation.child"],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                    encoding="utf-8",
                    env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
                )
            self._answers = queue.Queue()
            threading.Thread(target=_pump, args=(child.stdout, self._answers), daemon=True).start()
            with suppress(OSError):
                assert child.stdin is not None
                child.stdin.write(json.dumps(self._options) + "\n")
                child.stdin.flush()
            self._child = child
            return child

    def _stop(self, grace: float) -> None:
        with self._handling:
            child, self._child = self._child, None
        if child is None:
            return
        with suppress(OSError):
            assert child.stdin is not None
            child.stdin.close()
        try:
            child.wait(grace)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()

    def _file(self, name: str, layout: Mapping[str, Any] | None = None) -> TensorFile:
        return TensorFile(self.work / f"{name}.tensors", layout)


def _pump(stream: IO[str], answers: queue.Queue[str | None]) -> None:
    """Hand on the child's lines as they come; None says that there will be no more."""
    with suppress(OSError, ValueError):
        for line in stream:
            answers.put(line)
    answers.put(None)
    stream.close()


def _how(code: int) -> str:
    if code >= 0:
        return f"with exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    return f"by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
