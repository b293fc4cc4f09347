"""One job in FLARE's POC mode: server and sites as processes of their own on this machine, with mutual TLS.

`nvflare poc` does the work. Ours is what it leaves open: the site policy of our kits (rights, allow-list, outbound
filter, each site's data setting; no seal, since POC edits the start-up files), a free port, a home of its own (POC
rewrites the user's nvflare settings), progress, what the sites leave, and that no process stays behind.
"""

from __future__ import annotations

import os
import shlex
import shutil
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from heterosync.errors import UserError
from heterosync.federation.modelfile import BEST_MODEL, LAST_MODEL, OWN_BEST
from heterosync.federation.trainings import training_folder
from heterosync.federation.wire import is_site_name
from heterosync.federation.worker import TRAINER_LOG
from heterosync.files import copy_file, make_folder, read_json, write_json, write_text
from heterosync.flare.dp_filter import RELEASES_FILE
from heterosync.flare.executor import DATA_ROOT, WORK
from heterosync.flare.filters import AUDIT_FILE, SITE_AUDIT_FILE
from heterosync.flare.kits import policy
from heterosync.flare.kits.project import PROJECT
from heterosync.flare.running.collect import collect_results, status_of
from heterosync.flare.running.processes import MARK, end_marked, ends_on_signal, package_environment
from heterosync.flare.running.session import AdminSession, JobEnd, admin_session

NAME, ADMIN = "heterosync_poc", "admin@poc.local"
#: The server's name: a loopback name makes FLARE listen on loopback only.
SERVER = "localhost"
#: The plain commands of a POC, in its folder.
COMMANDS = "commands.sh"
LOGS = ("log.txt", "error_log.txt", "poc_console.log")
KEPT_OF_TRAINING = (TRAINER_LOG, RELEASES_FILE, OWN_BEST)
_JOBS = "*-*-*-*-*/"  # folders of a participant that are named by the id of a job
_READY = 120  # seconds that server and sites get to find each other


@dataclass(frozen=True)
class PocResult:
    """results: the server's record. sites: site -> folder with what stays at that hospital (see `collect_sites`).
    seconds: from the start of the command to "sites are connected", and of the job."""

    results: Path
    sites: dict[str, Path]
    ready_seconds: float
    job_seconds: float


def run_poc(
    job: Path | str,
    sites: Mapping[str, Path],
    out: Path | str,
    timeout: float | None = None,
    say: Callable[[str], None] = print,
    keep: bool = False,
) -> PocResult:
    """Run the job folder `job` in POC mode with `sites` (name -> site folder) and put its results into `out`.

    `out` holds no earlier POC. timeout: seconds for the job. keep: leave the POC workspace for a look. Raises
    `UserError` with one readable cause unless the job completed. In every case, also on Ctrl-C and SIGTERM, no process
    is left.
    """
    job, out = Path(job).absolute(), Path(out).absolute()
    _check(job, sites, out)
    poc = _Poc(out, sites, say)
    start = time.monotonic()
    with ends_on_signal():
        try:
            poc.prepare()
            poc.start()
            ready = time.monotonic() - start
            say(f"{len(sites)} sites and the server are connected after {ready:.0f} s")
            with admin_session(poc.kit(ADMIN)) as session:
                end = _run_job(session, poc, job, timeout)
            seconds = time.monotonic() - start - ready
        finally:
            poc.stop()
            folders = poc.collect_sites()
            if not keep:
                poc.clean()
    # FLARE calls a job abnormal that lost a site on the way, also when the others finished all its rounds.
    if not end.completed and status_of(out / "results") != "completed":
        raise UserError(f"{end.cause}\nlogs and what arrived: {out}")
    return PocResult(out / "results", folders, ready, seconds)


def _run_job(session: AdminSession, poc: _Poc, job: Path, timeout: float | None) -> JobEnd:
    """Submit, follow, download. Shown beside it: the plain commands that do the same."""
    kit = str(poc.kit(ADMIN))
    poc.tell("nvflare", "job", "submit", "-j", str(job), "--startup-kit", kit)
    job_id = session.submit(job)
    poc.tell("nvflare", "job", "wait", job_id, "--startup-kit", kit)
    end = session.follow(job_id, poc.say, timeout)
    download = poc.out / "download"
    poc.tell("nvflare", "job", "download", job_id, "-o", str(download), "--startup-kit", kit)
    collect_results(session.download(job_id, download), poc.out / "results")
    return end


def _check(job: Path, sites: Mapping[str, Path], out: Path) -> None:
    if not (job / "meta.json").is_file():
        raise UserError(f"{job} is not a job folder (no meta.json): write one with `heterosync job export`")
    if any(job.glob("*/custom")):
        raise UserError(f"{job} brings code, which no site of a POC lets in: export it without --byoc")
    if not sites:
        raise UserError("no sites: a POC needs at least one")
    for site, folder in sites.items():
        if not is_site_name(site) or site in (SERVER, ADMIN):
            raise UserError(f"'{site}' cannot be the name of a site: use letters, digits, '-', '_' and '.'")
        if not (Path(folder) / "site.yaml").is_file():
            raise UserError(f"site {site}: {folder} is not a site folder (no site.yaml)")
    if any(letter.isspace() for letter in str(out)):
        raise UserError(f"{out}: FLARE's POC cannot work in a path with spaces: choose another --out")
    if (out / COMMANDS).exists():
        raise UserError(f"{out} holds an earlier POC: choose another folder or remove it")


class _Poc:
    """The workspace of one POC, and the commands that drive it."""

    def __init__(self, out: Path, sites: Mapping[str, Path], say: Callable[[str], None]):
        self.out, self._sites, self.say = out, {name: Path(path).absolute() for name, path in sites.items()}, say
        self._workspace, self._home = out / "poc", make_folder(out / "home")
        self._mark = uuid.uuid4().hex
        self._lines = ["#!/bin/sh", "# The plain commands of this POC, in order."]
        settings = {"HOME": str(self._home), "NVFLARE_POC_WORKSPACE": str(self._workspace)}
        # The sites' downloaded weights stay where the user has them.
        settings["TORCH_HOME"] = os.environ.get("TORCH_HOME") or str(_cache() / "torch")
        self._environment = {**package_environment(), **settings, MARK: self._mark}
        share = max(1, (os.cpu_count() or 1) // len(sites))
        self._environment.setdefault("OMP_NUM_THREADS", str(share))
        for name in (*settings, "PYTHONPATH", "OMP_NUM_THREADS"):
            self._write_down(f"export {name}={shlex.quote(self._environment[name])}")

    def kit(self, name: str) -> Path:
        """Folder of one participant; it exists after `prepare`."""
        return self._workspace / NAME / "prod_00" / name

    def prepare(self) -> None:
        """Provision, then lay our local settings over FLARE's defaults."""
        project = self.out / PROJECT
        write_text(project, yaml.safe_dump(_project(list(self._sites), free_port()), sort_keys=False))
        self._run("nvflare", "poc", "prepare", "-i", str(project), "--force")
        local = self.out / "local"
        for name in (SERVER, *self._sites):
            standard = read_json(self.kit(name) / "local" / "resources.json.default")
            files = policy.local_files("server" if name == SERVER else "client", standard)
            if name != SERVER:  # the line that a hospital fills in; FLARE sends it nowhere
                files["privacy.json"]["scopes"][0]["properties"][DATA_ROOT] = str(self._sites[name])
            for file, content in files.items():
                write_json(local / name / "local" / file, content)
        self._run("cp", "-R", f"{local}/.", str(self.kit(SERVER).parent))

    def start(self) -> None:
        self._run("nvflare", "poc", "start", "--timeout", str(_READY))

    def stop(self) -> None:
        """Ask FLARE to stop when nothing hurries us; then no process is left, whatever happened."""
        try:
            if sys.exc_info()[0] is None:
                self._run("nvflare", "poc", "stop")
            else:
                self.tell("nvflare", "poc", "stop")
        except UserError as error:
            self.say(f"the POC did not stop by itself and is ended now ({error})")
        finally:
            end_marked(self._mark)

    def collect_sites(self) -> dict[str, Path]:
        """Keep what is of use in the workspace; site -> its folder.

        Each site's holds its own logs; `job/`: log and audit lines of the job, in a swarm the models; `training/`: the
        trainer's log, what `privacy.jsonl` says of noised updates, the site's own best model; `results/`: predictions.
        All of it would stay at a hospital; here the hospitals are the user's.
        """
        _keep(self.kit(SERVER), self.out / "server", LOGS)
        for run in self.kit(SERVER).glob(_JOBS):
            _keep(run, self.out / "server" / "job", LOGS)
        folders = {name: self.out / "sites" / name for name in self._sites}
        for name, target in folders.items():
            _keep(self.kit(name), target, LOGS)
            for run in self.kit(name).glob(_JOBS):
                _keep(run, target / "job", (*LOGS, AUDIT_FILE, SITE_AUDIT_FILE, BEST_MODEL, LAST_MODEL))
                _keep(
                    training_folder(self.kit(name), name, run.name, self._environment),
                    target / "training",
                    KEPT_OF_TRAINING,
                )
                with suppress(OSError):
                    shutil.copytree(run / WORK / "results", target / "results", dirs_exist_ok=True)
        return folders

    def clean(self) -> None:
        if self._workspace.exists():
            with suppress(UserError):
                self._run("nvflare", "poc", "clean", "--force")
        for folder in (self._workspace, self._home):
            shutil.rmtree(folder, ignore_errors=True)

    def tell(self, *command: str) -> None:
        """Show a plain command and write it down."""
        line = shlex.join(command)
        self.say(f"$ {line}")
        self._write_down(line)

    def _write_down(self, line: str) -> None:
        self._lines.append(line)
        write_text(self.out / COMMANDS, "\n".join(self._lines) + "\n")

    def _run(self, *command: str) -> None:
        """Tell and run one command. Raises `UserError` with the last line it printed when it fails."""
        self.tell(*command)
        actual = [sys.executable, "-m", "nvflare.cli", *command[1:]] if command[0] == "nvflare" else list(command)
        console = self.out / "console.log"
        with console.open("a", encoding="utf-8") as file:
            done = subprocess.run(
                actual,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=self._environment,
                start_new_session=True,
                cwd=self.out,
            )
        if done.returncode:
            last = [line for line in console.read_text(encoding="utf-8").splitlines() if line.strip()][-1:]
            raise UserError(f"`{shlex.join(command[:3])}` failed ({' '.join(last)}): see {console}")


def _project(sites: Sequence[str], port: int) -> dict[str, Any]:
    """The project file: one server on loopback, the sites, one admin; FLARE's own builders."""
    server = {"name": SERVER, "type": "server", "org": "poc", "fed_learn_port": port}
    clients = [{"name": site, "type": "client", "org": "poc"} for site in sites]
    admin = {"name": ADMIN, "type": "admin", "org": "poc", "role": "project_admin"}
    builder = "nvflare.lighter.impl"
    return {
        "api_version": 3,
        "name": NAME,
        "description": "heterosync on one machine",
        "participants": [server, *clients, admin],
        "builders": [
            {"path": f"{builder}.workspace.WorkspaceBuilder", "args": {"template_file": ["master_template.yml"]}},
            {"path": f"{builder}.static_file.StaticFileBuilder", "args": {"config_folder": "config", "scheme": "grpc"}},
            {"path": f"{builder}.cert.CertBuilder"},
            {"path": f"{builder}.signature.SignatureBuilder"},
        ],
    }


def _keep(source: Path, target: Path, names: Sequence[str]) -> None:
    for name in names:
        if (source / name).is_file():
            copy_file(source / name, target / name)


def free_port() -> int:
    """A port on the loopback address that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
