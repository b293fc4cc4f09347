"""FLARE's simulator as a child process: its tree of processes, its output, and what in it a user has to read."""

from __future__ import annotations

import copy
import queue
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
from nvflare.fuel.utils.log_utils import default_log_dict

from heterosync.flare import messages

COMMAND = (sys.executable, "-u", "-m", "nvflare.cli", "simulator")
#: Signs in the output that the job can never start; FLARE itself would wait for ever.
_FATAL = re.compile("not in allow_list|ConfigError|ComponentNotAuthorized|Simulator setup error|No module named 'het")
_LINE = re.compile(r"(?P<logger>[\w.]+) - (?P<level>[A-Z]+) - (?P<text>.*)")
_FLUSH = 20.0  # seconds that the simulator gets to end after it was asked to


def log_config() -> dict[str, Any]:
    """FLARE's own logging, with a console that `Output` can read: full name of the logger, level, text."""
    config = copy.deepcopy(default_log_dict)
    config["formatters"]["consoleFormatter"] = {
        "()": "nvflare.fuel.utils.log_utils.BaseFormatter",
        "fmt": "%(fullName)s - %(levelname)s - %(message)s",
    }
    return config


class Output:
    """Reads the simulator's lines as they come: shows ours, remembers what explains a failure."""

    def __init__(self, show: Callable[[str], None]):
        self._show = show
        self.lines: list[str] = []
        self.ready: set[str] = set()
        self.fatal = ""
        self.finished = False
        self._of_sites: list[str] = []
        self._of_server: list[str] = []
        self._errors: list[str] = []

    def take(self, raw: str) -> None:
        line = raw.rstrip("\n")
        self.lines.append(line)
        if not self.fatal and not line.startswith(" ") and _FATAL.search(line):
            self.fatal = _in_short(line)
        match = _LINE.match(line)
        if match is None:
            # The last line of a traceback, e.g. "ValueError: ..."
            if re.match(r"[A-Za-z_.]*(Error|Exception)\b.*: ", line):
                self._errors.append(line)
            return
        logger, level, text = match.group("logger", "level", "text")
        of_server = logger.endswith(("HeteroSyncController", "SwarmController"))
        if of_server and level == "INFO":
            return  # what the inherited workflow of FLARE says of itself
        if not logger.startswith("heterosync"):
            if level in ("ERROR", "CRITICAL"):
                self._errors.append(text)
            return
        if text.startswith(messages.PROBLEM):
            text = text.removeprefix(messages.PROBLEM)
            group = self._of_server if of_server else self._of_sites
            if text in group:  # a site repeats its problems at the end, for those who run FLARE's plain command
                return
            group.append(text)
        elif text.endswith(messages.READY):
            self.ready.add(text)
            return
        elif logger == "heterosync" and text.startswith("run "):
            self.finished = True
        self._show(text)

    def cause(self) -> str:
        """What a user has to mend, as readable lines: the sites' own words, else the server's, else errors of FLARE."""
        if self._of_sites or self._of_server:
            return "\n".join(self._of_sites or self._of_server)
        return self.fatal or (self._errors[0] if self._errors else "")


def _in_short(line: str) -> str:
    """A line of FLARE about a job that it cannot load, without the configuration that it quotes."""
    reason = re.search(r"exception: '(.*?)\.?'$", line) or re.search(r"(Component .* is not in allow_list)", line)
    return f"FLARE cannot load the job: {reason.group(1)}" if reason else line


class Simulator:
    """One run of `nvflare simulator` with all the processes it starts; `stop` leaves none of them."""

    def __init__(self, arguments: Sequence[str], environment: Mapping[str, str], folder: Path):
        self._child = subprocess.Popen(
            [*COMMAND, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
            errors="replace",
            env=dict(environment),
            cwd=folder,
            start_new_session=True,
        )
        self._tree: dict[int, psutil.Process] = {}
        self._lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._pump, daemon=True).start()

    def _pump(self) -> None:
        assert self._child.stdout is not None
        with suppress(ValueError, OSError):
            for line in self._child.stdout:
                self._lines.put(line)
        self._lines.put(None)

    def next_line(self, timeout: float) -> str | None:
        """The next line of output, or None when none came in time."""
        try:
            return self._lines.get(timeout=timeout)
        except queue.Empty:
            return None

    @property
    def code(self) -> int | None:
        """Exit code; None while it runs."""
        return self._child.poll()

    def look(self) -> None:
        """Remember the processes of the tree: FLARE's workers have sessions of their own and can outlive the parent."""
        with suppress(psutil.Error):
            for process in psutil.Process(self._child.pid).children(recursive=True):
                self._tree.setdefault(process.pid, process)

    def stop(self) -> None:
        """End what is left of the tree, at once."""
        self.look()
        for process in [*self._tree.values()]:
            with suppress(psutil.Error):
                for grandchild in process.children(recursive=True):
                    self._tree.setdefault(grandchild.pid, grandchild)
        with suppress(ProcessLookupError):
            self._child.kill()
        for process in self._tree.values():
            with suppress(psutil.Error):  # psutil compares the start time: a recycled process id is safe
                process.kill()
        psutil.wait_procs(list(self._tree.values()), timeout=5)
        self._child.wait()


def watch(simulator: Simulator, output: Output, *, sites_at_once: int, patience: float, deadline: float | None) -> str:
    """Read output until the simulator ends. Returns "ended", "fatal", "hung" or "timeout".

    Until `sites_at_once` sites are ready, silence of `patience` seconds counts as hung (seen now and then at the start
    of FLARE's simulator). `deadline`: a value of `time.monotonic()`.
    """
    heard = looked = time.monotonic()
    finished: float | None = None
    while True:
        line = simulator.next_line(0.2)
        now = time.monotonic()
        if line is not None:
            heard = now
            output.take(line)
        if now - looked > 1.0:
            simulator.look()
            looked = now
        if simulator.code is not None and line is None:
            return "ended"
        if output.fatal:
            return "fatal"
        if output.finished:
            finished = finished or now
            if now - finished > _FLUSH:
                return "ended"
        if len(output.ready) < sites_at_once and not output.finished and now - heard > patience:
            return "hung"
        if deadline is not None and now > deadline:
            return "timeout"
