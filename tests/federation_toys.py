"""A real alliance on loopback for tests: provisioned kits, mutual TLS, one process tree per participant."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path

import psutil
from cryptography import x509
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key

from heterosync.federation.modelfile import load_model
from heterosync.federation.runner import run_inprocess
from heterosync.flare.jobs.builder import build_job
from heterosync.flare.jobs.options import JobOptions
from heterosync.flare.kits.kit import Kit, seal
from heterosync.flare.kits.project import Server, loopback, make_project
from heterosync.flare.kits.provision import provision
from heterosync.flare.running.poc import free_port
from heterosync.flare.running.processes import MARK, end_marked, marked, package_environment
from heterosync.flare.running.session import AdminSession, JobEnd, admin_session
from toys import SMOKE

NAME, SERVER, ADMIN = "toys", "localhost", "chief@toys.org"
#: What the process that runs one job at a site, and one of our trainers, have in their command lines.
JOB_PROCESS, TRAINER = "client.worker_process", "heterosync.federation.child"
REGISTERED = "Successfully registered client"


@dataclass(frozen=True)
class Finished:
    """A job that ended, the lines it showed, and the server's part of its download."""

    end: JobEnd
    lines: list[str]
    folder: Path

    def record(self, name: str = "run.json") -> dict:
        return json.loads((self.folder / name).read_text())


class Alliance:
    """Server and sites of a fresh alliance below `root`; site -> data folder in `data`. Nothing is started yet.

    The hospital of site S is organisation `S` with the letters only; its users are admin@, lead@ and member@S.org.
    """

    def __init__(self, root: Path, data: dict[str, Path], server: Server | None = None):
        self.root, self.data, self.server = root, data, server or loopback(free_port())
        root.mkdir(parents=True)
        rows = [f"{s},{s.replace('-', '')},admin@{s}.org,lead@{s}.org,member@{s}.org" for s in data]
        (root / "sites.csv").write_text("\n".join(["site,org,admin,lead,member", *rows]) + "\n")
        self.project = make_project(NAME, self.server, ADMIN, root / "sites.csv")
        kits, self.fingerprint = provision(self.project, root / "kits")
        self.kits = {kit.name: kit for kit in kits}
        for site, folder in data.items():
            path = self.kits[site] / "local" / "privacy.json"
            content = json.loads(path.read_text())
            content["scopes"][0]["properties"]["data_root"] = str(folder)
            path.write_text(json.dumps(content))

    def state(self) -> dict:
        """The alliance's authority, private key included."""
        return json.loads((self.root / "kits" / NAME / "state" / "cert.json").read_text())


class Federation:
    """The running processes of an alliance. Use `federation`, which ends them all."""

    def __init__(self, alliance: Alliance):
        self.alliance, self._mark = alliance, uuid.uuid4().hex
        self._stack = ExitStack()
        self._sessions: dict[str, AdminSession] = {}
        self.started: dict[str, subprocess.Popen] = {}

    def start(self, *names: str, kit: Path | None = None, within: Sequence[str] = (), **environment: str) -> None:
        """Start participants as their administrators do, in the foreground of a process group of their own.

        within: the beginning of a command that runs them somewhere else.
        """
        for name in names:
            folder = kit or self.alliance.kits[name]
            home = self.alliance.root / "home" / name
            home.mkdir(parents=True, exist_ok=True)
            path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
            own = {"HOME": str(home), "PATH": path, "OMP_NUM_THREADS": "1", MARK: f"{self._mark}"}
            known = package_environment({k: v for k, v in os.environ.items() if k != "HETEROSYNC_DATA"})
            with (folder / "console.txt").open("a") as console:
                self.started[name] = subprocess.Popen(
                    [*within, "bash", str(folder / "startup" / "sub_start.sh"), "--once"],
                    stdin=subprocess.DEVNULL,
                    stdout=console,
                    stderr=subprocess.STDOUT,
                    env={**known, **own, **environment},
                    start_new_session=True,
                )

    def restart(self, name: str, **environment: str) -> None:
        """kill -9 of all processes of a site, then start it again and wait until it is registered."""
        self.kill(name)
        before = self.console(name).count(REGISTERED)
        self.start(name, **environment)
        until(lambda: self.console(name).count(REGISTERED) > before, 60, f"{name} is registered again")

    def restart_server(self) -> None:
        """kill -9 of the server, then start it again; sessions are opened anew."""
        self._stack.close()
        self._sessions.clear()
        self.kill(SERVER)
        self.start(SERVER)

    def console(self, name: str, kit: Path | None = None) -> str:
        return ((kit or self.alliance.kits[name]) / "console.txt").read_text()

    def session(self, user: str = ADMIN) -> AdminSession:
        if user not in self._sessions:
            kit = self.alliance.kits[user]
            self._sessions[user] = self._stack.enter_context(admin_session(kit, timeout=60))
        return self._sessions[user]

    def wait_for(self, sites: list[str], patience: float = 60) -> None:
        """Wait until exactly these sites are connected."""
        until(lambda: self.session().sites() == sorted(sites), patience, f"connected sites are {sites}")

    def run(self, job: Path, user: str = ADMIN, look: Callable[[str], None] | None = None, timeout=240) -> Finished:
        """Submit, follow, download. `look` is called with the id of the job at every look."""
        session = self.session(user)
        job_id = session.submit(job)
        return self.finish(job_id, look, timeout)

    def finish(self, job_id: str, look: Callable[[str], None] | None = None, timeout: float = 240) -> Finished:
        lines: list[str] = []
        session = self.session()
        end = session.follow(job_id, lines.append, timeout, while_waiting=(lambda: look(job_id)) if look else None)
        return Finished(end, lines, session.download(job_id, self.alliance.root / "downloads"))

    def logged(self, name: str, text: str) -> bool:
        """Whether a participant's own log holds `text`."""
        return text in (self.alliance.kits[name] / "log.txt").read_text()

    def run_folder(self, name: str, job_id: str) -> Path:
        """A participant's folder of a job."""
        return self.alliance.kits[name] / job_id

    def processes(self, name: str, what: str = "") -> list[psutil.Process]:
        """Living processes of a participant whose command line holds `what` (all: "")."""
        found = []
        home = str(self.alliance.root / "home" / name)
        for process in marked(self._mark):
            with suppress(psutil.Error):
                if process.environ().get("HOME") == home and what in " ".join(process.cmdline()):
                    found.append(process)
        return found

    def kill(self, name: str, what: str = "") -> int:
        """kill -9 of a participant's processes with `what` in the command line; returns how many there were."""
        victims = self.processes(name, what)
        for process in victims:
            with suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(victims, timeout=10)
        return len(victims)

    def close(self) -> None:
        try:
            self._stack.close()
        finally:
            end_marked(self._mark)
            for child in self.started.values():
                child.wait()


def with_certificate(alliance: Alliance, site: str, folder: Path, start: timedelta, end: timedelta) -> Path:
    """A copy of a site's kit whose certificate is valid from now + `start` to now + `end`, sealed by the alliance."""
    copy = Path(shutil.copytree(alliance.kits[site], folder))
    key = load_pem_private_key(alliance.state()["root_pri_key"].encode(), None)
    old, now = Kit(copy).certificate(), datetime.now(timezone.utc)
    builder = x509.CertificateBuilder(old.issuer, old.subject, old.public_key(), x509.random_serial_number())
    builder = builder.not_valid_before(now + start).not_valid_after(now + end)
    for extension in old.extensions:
        builder = builder.add_extension(extension.value, extension.critical)
    (copy / "startup" / "client.crt").write_bytes(builder.sign(key, SHA256()).public_bytes(Encoding.PEM))
    seal(copy, key)
    return copy


def model_digest(path: Path) -> str:
    """SHA-256 over names and bytes of all tensors of a model file."""
    digest = hashlib.sha256()
    for name, value in sorted(load_model(path).state.items()):
        digest.update(name.encode() + value.numpy().tobytes())
    return digest.hexdigest()


@contextmanager
def federation(
    root: Path, data: dict[str, Path], start: list[str] | None = None, server: Server | None = None
) -> Iterator[Federation]:
    """A fresh alliance whose server and sites (default: all) run and are connected; nothing is left at the end."""
    running = Federation(Alliance(root, data, server))
    sites = sorted(data) if start is None else start
    try:
        running.start(running.alliance.server.host, *sites)
        running.wait_for(sites)
        yield running
    finally:
        running.close()


def job_of(root: Path, name: str, training: dict = SMOKE, **options) -> Path:
    """A job folder of `hsl` below `root`; `options` of `JobOptions`."""
    return build_job("hsl", root / "jobs" / name, JobOptions(training=training, **{"in_process": True, **options}))


def oracle(root: Path, sites: dict[str, Path], training: dict = SMOKE) -> str:
    """Digest of the last model of the same training in one process."""
    out = root / "oracle" / f"{len(sites)}-{training['local_epochs']}"
    if not out.exists():
        run_inprocess("hsl", sites, out, training=training)
    return model_digest(out / "last_model.pt")


def contributors(done: Finished) -> list[list[str]]:
    """Sites that contributed, round by round."""
    return [record["contributors"] for record in done.record()["rounds"]]


def until(true: Callable[[], bool], patience: float, what: str) -> None:
    """Wait for a condition. Fails the test when it does not come true in time."""
    end = time.monotonic() + patience
    while not true():
        assert time.monotonic() < end, f"not within {patience:g} s: {what}"
        time.sleep(0.2)
