"""What a kit's `local/` says before the hospital edits it: rights, resources, privacy.

Each file comes twice: `NAME.default` is the alliance's original, and `NAME` is the site's to edit. FLARE falls back on
the originals of the first two (without authorization.json it would permit everything), not on that of privacy.json.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from heterosync.files import read_json, write_json
from heterosync.flare.jobs import allowlist
from heterosync.flare.kits import kit
from heterosync.flare.kits.readme import put_readme

SITE_FILTER = "heterosync.flare.site_filter.SiteOutboundFilter"
SITE_PEER_GATE = "heterosync.flare.site_filter.SitePeerGate"
KIT_GUARD = "heterosync.flare.kits.guard.KitGuard"
STORAGE = "heterosync.flare.kits.storage.WorkspaceStorage"
JOBS = "heterosync.flare.kits.storage.WorkspaceJobs"

SCOPE = "heterosync"
#: FLARE reads `local/*__p_resources.json` in the process of a site or server, not in those of its jobs.
GUARD_FILE = "kit_guard__p_resources.json"
#: Seconds without a word after which the server gives a site up; a cut of half a minute must not cost a site its job.
HEART_BEAT_TIMEOUT = 120

#: Conditions of FLARE's authorization policy.
ANYBODY, NOBODY, OWN_SITE, OWN_JOBS = "any", "none", "o:site", "n:submitter"


def authorization(kind: str) -> dict[str, Any]:
    """Who may do what at a server or client. Custom code is for nobody; jobs come from the project admin and the leads.

    The console's `cat`, `grep` and the like work at the server alone, for the project admin and its own org admin.
    """
    never = {"byoc": NOBODY, "server-predeployed-flwr": NOBODY}
    # get_job_log belongs to no category of FLARE's: named by nobody, it is forbidden, and nobody can follow a job
    jobs = ("submit_job", "clone_job", "manage_job", "download_job", "get_job_log")
    at_server = ANYBODY if kind == "server" else NOBODY  # for the project admin: other leads' jobs lie there
    own_server = OWN_SITE if kind == "server" else NOBODY
    own_jobs = {"submit_job": ANYBODY, **dict.fromkeys(jobs[1:], OWN_JOBS)}
    no_jobs = dict.fromkeys(jobs, NOBODY)
    return {
        "format_version": "1.0",
        "permissions": {
            "project_admin": {
                **dict.fromkeys((*jobs, "view", "operate"), ANYBODY),
                "shell_commands": at_server,
                **never,
            },
            "org_admin": {**no_jobs, "view": ANYBODY, "operate": OWN_SITE, "shell_commands": own_server, **never},
            "lead": {**own_jobs, "view": ANYBODY, "operate": OWN_SITE, "shell_commands": NOBODY, **never},
            "member": {"view": ANYBODY},
        },
    }


def privacy() -> dict[str, Any]:
    """The one privacy scope, the default of every job. `data_root` is the line that the hospital fills in."""
    limits: dict[str, Any] = {"methods": None, "max_megabytes": 1024, "withhold": [], "max_rounds": None}
    limits |= {"max_clip": None, "min_noise": 0}
    scope = {
        "name": SCOPE,
        "properties": {"data_root": ""},
        "task_data_filters": [{"path": SITE_PEER_GATE, "direction": "inout", "args": limits}],
        "task_result_filters": [{"path": SITE_FILTER, "args": limits}],
    }
    return {"scopes": [scope], "default_scope": SCOPE}


def resources(kind: str, standard: dict[str, Any]) -> dict[str, Any]:
    """FLARE's `standard` resources of a server or client with our classes allowed; a server stores inside its kit, and
    a site sends no log lines: those can quote file names."""
    changed = {**standard, "class_list_enforcement_mode": "enforce", "class_allow_list": allowlist.class_allow_list()}
    if kind != "server":
        return {**changed, "allow_log_streaming": False}
    changed["servers"] = [{**server, "heart_beat_timeout": HEART_BEAT_TIMEOUT} for server in standard["servers"]]
    storage = {"path": STORAGE, "args": {"root_dir": "snapshot-storage", "uri_root": "/"}}
    persistor = standard["snapshot_persistor"]
    changed["snapshot_persistor"] = {**persistor, "args": {**persistor["args"], "storage": storage}}
    manager = {"path": JOBS, "args": {"uri_root": "jobs-storage", "job_store_id": "job_store"}}
    changed["components"] = [
        {**part, **(manager if part["id"] == "job_manager" else {})} for part in standard["components"]
    ]
    return changed


def local_files(kind: str, standard: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The policy of a server or client as files of its `local/`; `standard` are FLARE's resources of it."""
    files = {"authorization.json": authorization(kind), "resources.json": resources(kind, standard)}
    return {**files, "privacy.json": privacy()} if kind == "client" else files


def put_policy(folder: Path | str, sealed_by: str) -> None:
    """Write the policy into `local/` of a kit that FLARE's builders have made. What the site has edited stays."""
    made = kit.Kit(folder)
    if made.kind == "admin":
        return
    standard = read_json(made.local / "resources.json.default")
    for name, content in local_files(made.kind, standard).items():
        write_json(made.local / f"{name}.default", content)
        if not (made.local / name).exists():
            write_json(made.local / name, content)
    guard = {"id": "kit_guard", "path": KIT_GUARD, "args": {"sealed_by": sealed_by}}
    write_json(made.local / GUARD_FILE, {"components": [guard]})


def put_check(folder: Path | str, sealed_by: str) -> None:
    """Let the scripts of a kit verify it before they do anything else."""
    made = kit.Kit(folder)
    for name in ("start.sh", "sub_start.sh", "fl_admin.sh"):
        script = made.startup / name
        if not script.exists():
            continue
        lines = script.read_text(encoding="utf-8").splitlines(keepends=True)
        check = f'python3 -m heterosync.flare.kits.kit "$DIR/.." --sealed-by {sealed_by} >&2 || exit 1\n'
        if not any("heterosync.flare.kits.kit" in line for line in lines):
            place = next(i for i, line in enumerate(lines) if line.startswith("DIR=")) + 1
            script.write_text("".join([*lines[:place], check, *lines[place:]]), encoding="utf-8")


def secure(folder: Path | str) -> None:
    """Give a kit that `nvflare package` made at a site our policy, and seal it with the site's own key.

    Raises `UserError` for a kit that the alliance sealed, before anything is changed.
    """
    kit.refuse_sealed(folder)
    put_policy(folder, kit.SITE)
    put_check(folder, kit.SITE)
    put_readme(folder)
    kit.seal(folder)
