"""The child of `TrainerProcess`: `python -m heterosync.federation.child` serves a `SiteTrainer` over a pipe.

Requests come as JSON lines on stdin, answers and progress go as JSON lines to what was stdout, tensors through files of
the work folder. Only the standard library is imported before stdout is out of reach of everything that prints.
"""

from __future__ import annotations

import faulthandler
import json
import os
import queue
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from heterosync import pulse
from heterosync.errors import UserError

_BEAT = 1.0  # least seconds between two signs of life


def main() -> None:
    """Serve requests until stdin closes or the parent is gone."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever prints from here on lands in the log and not in the protocol
    sys.stdout = sys.stderr
    requests: queue.Queue[str] = queue.Queue()
    source = os.fdopen(os.dup(0), encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    parent = os.getppid()

    def read() -> None:
        for line in source:
            requests.put(line)
        os._exit(0)  # also in the middle of a training: nobody is left to hear of it

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(0)

    for target in (read, watch):
        threading.Thread(target=target, daemon=True).start()
    # Ctrl-C goes to the whole terminal; the parent decides what it means for the trainer.
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    faulthandler.register(signal.SIGUSR1)  # the parent asks a hung trainer where it hangs; the log gets the answer
    saying = threading.Lock()  # images are read, and beats come, on several threads

    def say(message: Mapping[str, Any]) -> None:
        with saying:
            answers.write(json.dumps(message) + "\n")
            answers.flush()

    options = json.loads(requests.get())
    now = time.strftime("%Y-%m-%d %H:%M:%S")
    print(f"--- trainer {os.getpid()} of site {options['site']} started {now}", flush=True)
    serve = _Server(options, say, requests.get)
    while True:
        request = json.loads(requests.get())
        try:
            say(serve(request))
        except UserError as error:
            say({"user_error": str(error)})
        except Exception:
            text = traceback.format_exc()
            print(text, flush=True)
            say({"defect": "\n".join(text.strip().splitlines()[-12:])})


class _Server:
    """Answers requests with a `SiteTrainer`, made at the first one so that its errors find their way to the parent."""

    def __init__(self, options: dict[str, Any], say: Callable[[Mapping[str, Any]], None], hear: Callable[[], str]):
        self._options, self._say, self._hear = options, say, hear
        self._work = Path(options["work"])
        self._trainer: Any = None
        self._beaten = 0.0
        pulse.listen(self._beat)

    def __call__(self, request: Mapping[str, Any]) -> dict[str, Any]:
        from heterosync.federation.tensorfile import TensorFile

        if self._trainer is None:
            from heterosync.federation.site import SiteTrainer

            self._trainer = SiteTrainer(**self._options, log=self._progress)
            self._trainer.exchange = self._exchange
        arguments, call = dict(request["arguments"]), request["call"]
        layout = request["layout"]
        shared = TensorFile(self._work / "request.tensors", layout).read() if layout else None
        if call == "check_in":
            return {"value": self._trainer.check_in()}
        if call == "train":
            done = self._trainer.train(shared=shared, **arguments)
            file = TensorFile(self._work / "answer.tensors").write(done.tensors)
            fields = {name: getattr(done, name) for name in ("site", "method", "round", "metrics", "samples")}
            return {"value": fields, "layout": file.layout}
        if call == "validate":
            return {"value": self._trainer.validate(shared=shared, **arguments)}
        raise ValueError(f"unknown call '{call}'")

    def _exchange(self, step: int, parcel: Mapping[str, Any]) -> dict[str, Any]:
        """A step of a network that is cut: the parent asks the server."""
        from heterosync.federation.tensorfile import TensorFile

        file = self._work / "step.tensors"
        self._say({"step": step, "layout": TensorFile(file).write(parcel).layout})
        return TensorFile(file, json.loads(self._hear())["layout"]).read()

    def _beat(self) -> None:
        now = time.monotonic()
        if now - self._beaten >= _BEAT:
            self._beaten = now
            self._say({"alive": True})

    def _progress(self, line: str) -> None:
        print(line, flush=True)
        self._say({"progress": line})


if __name__ == "__main__":
    main()
