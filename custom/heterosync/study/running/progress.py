"""What a study shows of itself while it runs: a live table, plain lines, or one JSON object per line."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TextIO

from heterosync.study.running.estimate import in_words

WIDTH = 20


class Display(Protocol):
    """Gets every event of a study, and the state of the runs in progress again and again."""

    def event(self, kind: str, text: str, **facts: Any) -> None: ...

    def state(self, overall: str, running: Sequence[Mapping[str, Any]]) -> None: ...

    def close(self) -> None: ...


class Lines:
    """One line per event; a round of a run is one."""

    def __init__(self, out: TextIO | None = None):
        self.out = out or sys.stdout
        self._shown: dict[str, int] = {}

    def event(self, kind: str, text: str, **facts: Any) -> None:
        print(text, file=self.out, flush=True)

    def state(self, overall: str, running: Sequence[Mapping[str, Any]]) -> None:
        for run in running:
            if run["rounds_done"] > self._shown.get(run["run"], 0):
                self._shown[run["run"]] = run["rounds_done"]
                print(
                    f"  {run['run']}: round {run['rounds_done']} of {run['rounds']}; {overall}",
                    file=self.out,
                    flush=True,
                )

    def close(self) -> None:
        pass


class Table(Lines):
    """For a terminal: the runs in progress as bars below the lines of what has ended, drawn again in place."""

    def __init__(self, out: TextIO | None = None):
        super().__init__(out)
        self._drawn = 0
        self._last = 0.0

    def event(self, kind: str, text: str, **facts: Any) -> None:
        self._wipe()
        super().event(kind, text, **facts)

    def state(self, overall: str, running: Sequence[Mapping[str, Any]]) -> None:
        if time.monotonic() - self._last < 1.0:
            return
        self._last = time.monotonic()
        self._wipe()
        width = max((len(run["run"]) for run in running), default=0)
        lines = [overall]
        for run in running:
            share = run["rounds_done"] / run["rounds"] if run["rounds"] else 0.0
            bar = "#" * round(share * WIDTH)
            memory = f"{run['peak_memory_bytes'] / 2**30:.1f} GiB"
            rounds = f"{run['rounds_done']}/{run['rounds'] or '?'} rounds"
            lines.append(f"  {run['run']:{width}} [{bar:{WIDTH}}] {rounds}, {in_words(run['seconds'])}, {memory}")
        self.out.write("\n".join(lines) + "\n")
        self.out.flush()
        self._drawn = len(lines)

    def close(self) -> None:
        self._wipe()

    def _wipe(self) -> None:
        if self._drawn:
            self.out.write(f"\x1b[{self._drawn}F\x1b[J")  # up to the first line, erase to the end
            self._drawn = 0


class JsonLines(Lines):
    """For a program: {"event": …} per line."""

    def event(self, kind: str, text: str, **facts: Any) -> None:
        print(json.dumps({"event": kind, **facts}, ensure_ascii=False), file=self.out, flush=True)

    def state(self, overall: str, running: Sequence[Mapping[str, Any]]) -> None:
        for run in running:
            if run["rounds_done"] > self._shown.get(run["run"], 0):
                self._shown[run["run"]] = run["rounds_done"]
                self.event("round", "", **run)


def display(as_json: bool, out: TextIO | None = None) -> Display:
    out = out or sys.stdout
    if as_json:
        return JsonLines(out)
    return Table(out) if out.isatty() else Lines(out)
