"""FLARE's project.yml of an alliance, made from a table of hospitals."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from nvflare.apis.utils.format_check import name_check

from heterosync.data.tables import read_csv
from heterosync.data.unique_yaml import PlainLoader
from heterosync.errors import ProblemList, UserError, nearest
from heterosync.federation.wire import is_site_name
from heterosync.files import write_text

PROJECT = "project.yml"
#: Columns of sites.csv and the kind of name that each holds; the last two may be absent or empty.
COLUMNS = {"site": "client", "org": "org", "admin": "admin", "lead": "admin", "member": "admin"}
NEEDED = ("site", "org", "admin")
ROLES = {"admin": "org_admin", "lead": "lead", "member": "member"}
COORDINATOR = "coordinator"
LOOPBACK = "localhost"
PORT = 8002
ROOT_DAYS = 3650
#: FLARE puts a name into the common name of a certificate, which has this much room.
LONGEST = 64

_FORMS = {
    "client": "letters, digits, - and _, beginning with a letter or digit",
    "org": "letters, digits and _",
    "admin": "an e-mail address",
    "server": "a host name",
}
_BUILDERS: list[dict[str, Any]] = [
    {"path": "nvflare.lighter.impl.workspace.WorkspaceBuilder", "args": {"template_file": ["master_template.yml"]}},
    {
        "path": "nvflare.lighter.impl.static_file.StaticFileBuilder",
        "args": {"config_folder": "config", "scheme": "grpc"},
    },
    {"path": "nvflare.lighter.impl.cert.CertBuilder", "args": {"root_valid_days": ROOT_DAYS}},
    {"path": "heterosync.flare.kits.provision.SitePolicyBuilder"},
    {"path": "heterosync.flare.kits.provision.KitSigner"},
]
_HEADER = """\
# Written by `heterosync alliance init`. Kits are made of it by
#   heterosync alliance provision {name} --out kits      or      nvflare provision -p {name} -w kits
# `heterosync alliance add` adds a hospital. After an edit of host_names, `heterosync alliance renew --of SERVER` puts
# them into its certificate: a certificate that was issued once is kept.
"""


@dataclass(frozen=True)
class Server:
    """Where the server is reached. `host` is its name in the certificate; `also` are further names and addresses."""

    host: str
    port: int = PORT
    also: tuple[str, ...] = ()

    def participant(self) -> dict[str, Any]:
        hosts = [self.host, *self.also]
        entry = {"name": self.host, "type": "server", "org": COORDINATOR, "fed_learn_port": self.port}
        return {**entry, "default_host": self.host, "host_names": hosts}


def loopback(port: int = PORT, also: Sequence[str] = ()) -> Server:
    """A server for a federation on one machine; FLARE binds a server of this name to the loopback address only."""
    return Server(LOOPBACK, port, ("127.0.0.1", *also))


def make_project(name: str, server: Server, admin: str, sites: Path, description: str = "") -> dict[str, Any]:
    """The content of project.yml. `admin` is the e-mail of the project admin, `sites` a table with `COLUMNS`.

    Raises `ProblemList` with every mistake of the arguments, and of the table with its line.
    """
    problems = []
    for value, kind, option in (
        (name, "org", "--name"),
        (server.host, "server", "--server"),
        (admin, "admin", "--admin"),
    ):
        problem = _wrong(value, kind)
        if problem:
            problems.append(f"{option} '{value}' {problem}")
    taken = {server.host.lower(): "the server", admin.lower(): "the project admin", "server": "the server"}
    project_admin = {"name": admin, "type": "admin", "org": COORDINATOR, "role": "project_admin"}
    try:
        participants = read_sites(sites, taken)
    except UserError as error:
        problems += str(error).splitlines()
    if problems:
        raise ProblemList(problems)
    return {
        "api_version": 3,
        "name": name,
        "description": description or f"HeteroSync alliance {name}",
        "participants": [server.participant(), project_admin, *participants],
        "builders": copy.deepcopy(_BUILDERS),
    }


def read_sites(path: Path, taken: dict[str, str]) -> list[dict[str, Any]]:
    """Participants of the hospitals in a table. `taken`: names in use (lower case) and by whom."""
    table = read_csv(path, comments=True)
    for column in table.header:
        if column not in COLUMNS:
            raise UserError(f"{path}: column '{column}' is not known: {nearest(column, COLUMNS)}")
    absent = [column for column in NEEDED if column not in table.header]
    if absent:
        raise UserError(f"{path}: the column '{absent[0]}' is missing: the header is {','.join(COLUMNS)}")
    if not table.rows:
        raise UserError(f"{path}: no hospital: write one row per site below the header")
    problems, taken = [], dict(taken)
    clients, people = [], []
    for (line, values), (_, record) in zip(table.rows, table.records(), strict=True):
        ragged = table.ragged(values)
        if ragged:
            problems.append(f"{path} row {line}: {ragged}")
            continue
        for column, kind in COLUMNS.items():
            value = record.get(column, "")
            if not value and column not in NEEDED:
                continue
            problem = _wrong(value, kind)
            if problem is None and kind != "org":  # several sites may belong to one organisation
                if value.lower() in taken:
                    problem = f"is already the name of {taken[value.lower()]}: write another one, or delete the row"
                taken[value.lower()] = f"row {line}"
            if problem:
                cell = f"{column} '{value}'" if value else f"column '{column}'"
                problems.append(f"{path} row {line}: {cell} {problem}")
        clients.append({"name": record["site"], "type": "client", "org": record["org"]})
        for column, role in ROLES.items():
            if record.get(column):
                people.append({"name": record[column], "type": "admin", "org": record["org"], "role": role})
    if problems:
        raise ProblemList(problems)
    return [*clients, *people]


def _wrong(value: str, kind: str) -> str | None:
    """What is wrong with a name, as the end of a sentence."""
    if not value:
        return f"is empty: write {_FORMS[kind]}"
    if name_check(value, kind)[0] or (kind == "client" and not is_site_name(value)):
        return f"cannot be used: write {_FORMS[kind]}"
    if len(value) > LONGEST:
        return f"is longer than {LONGEST} characters: shorten it"
    return None


def project_text(project: dict[str, Any], name: str = PROJECT) -> str:
    """project.yml with one participant and one builder per line."""
    head = {key: value for key, value in project.items() if key not in ("participants", "builders")}
    text = _HEADER.format(name=name) + yaml.safe_dump(head, sort_keys=False, allow_unicode=True)
    for key in ("participants", "builders"):
        lines = (yaml.safe_dump(entry, default_flow_style=True, sort_keys=False, width=1000) for entry in project[key])
        text += f"{key}:\n" + "".join(f"  - {line.strip()}\n" for line in lines)
    return text


def write_project(project: dict[str, Any], path: Path) -> Path:
    return write_text(path, project_text(project, path.name))


def read_project(path: Path) -> dict[str, Any]:
    """Content of a project file. Raises `UserError` when it is none."""
    try:
        project = yaml.load(path.read_text(encoding="utf-8"), Loader=PlainLoader)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: write it with `heterosync alliance init`") from None
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path} is not readable YAML: {' '.join(str(error).split())}") from error
    if not isinstance(project, dict) or not isinstance(project.get("participants"), list) or "name" not in project:
        raise UserError(f"{path} is no project file: it needs name and participants")
    return project


def with_server(project: dict[str, Any], server: Server) -> dict[str, Any]:
    """The same alliance with another server."""
    others = [entry for entry in project["participants"] if entry.get("type") != "server"]
    return {**project, "participants": [server.participant(), *others]}


def with_sites(project: dict[str, Any], sites: Path) -> tuple[dict[str, Any], list[str]]:
    """The alliance with the hospitals of a table added, and the names of the new participants."""
    kinds = {"admin": "an admin", "client": "a site", "server": "the server"}
    taken = {
        str(entry["name"]).lower(): f"{kinds.get(entry['type'], entry['type'])} of the alliance"
        for entry in project["participants"]
    }
    added = read_sites(sites, {**taken, "server": "the server"})
    return {**project, "participants": [*project["participants"], *added]}, [entry["name"] for entry in added]
