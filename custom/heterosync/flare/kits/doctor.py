"""Is a startup kit ready on this machine? Seal, certificates, clock, versions, policy, and the way to the server."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import re
import shutil
import socket
import ssl
import subprocess
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from cryptography import x509

from heterosync.data.site import CONFIG
from heterosync.errors import UserError
from heterosync.files import read_json
from heterosync.flare.executor import DATA_ROOT
from heterosync.flare.kits.kit import LOCAL, MANIFEST, ROOT, Kit, common_name, date_problem, issued, verify
from heterosync.flare.site_filter import SiteOutboundFilter, SitePeerGate, SitePolicy

OK, NOTE, PROBLEM = "ok", "note", "problem"
#: Certificates are renewed well before they end.
SOON = datetime.timedelta(days=30)
PRIVACY = "privacy.json"
#: What must stand in every privacy scope.
FILTERS: dict[str, type[SitePolicy]] = {
    "task_result_filters": SiteOutboundFilter,
    "task_data_filters": SitePeerGate,
}
_FRESH = "Ask the alliance lead for a fresh kit"


class Finding(NamedTuple):
    """The fields of a check of the doctor, in its order."""

    name: str
    state: str
    found: str
    remedy: str = ""


def examine_kit(folder: Path | str, now: datetime.datetime | None = None) -> list[Finding]:
    """All findings about a kit, in a fixed order; a check that cannot be made is a finding too. `now`: for tests.

    Raises `UserError` when `folder` is no kit at all.
    """
    kit, now = Kit(folder), now or datetime.datetime.now(datetime.timezone.utc)
    checks: list[Callable[[], list[Finding]]] = [
        lambda: check_seal(kit),
        lambda: check_certificates(kit, now),
        lambda: check_name(kit),
        lambda: check_clock(kit, now),
        lambda: check_versions(kit),
        lambda: check_policy(kit),
        lambda: check_connection(kit),
    ]
    findings = []
    for check in checks:
        try:
            findings += check()
        except UserError as error:
            findings += [Finding("kit", PROBLEM, line, _FRESH) for line in str(error).splitlines()]
    return list(dict.fromkeys(findings))  # an unreadable file is found by more than one check


def check_seal(kit: Kit) -> list[Finding]:
    facts = verify(kit.folder)
    found = (
        f"{facts['kind']} {facts['name']}, sealed by the {facts['sealed_by']}, root certificate {facts['fingerprint']}"
    )
    return [Finding("kit", OK, found)]


def check_certificates(kit: Kit, now: datetime.datetime) -> list[Finding]:
    """Dates in UTC of the kit's own certificate and of the authority's, and whether the one issued the other."""
    own, root = kit.certificate(), kit.root()
    findings = [_dates("certificate", own, now), _dates("authority", root, now)]
    if not issued(own, root):
        found = f"{kit.certificate_path.name} was not issued by the authority of {ROOT}"
        findings.append(Finding("authority", PROBLEM, found, _FRESH))
    return findings


def _dates(name: str, certificate: x509.Certificate, now: datetime.datetime) -> Finding:
    problem, end = date_problem(certificate, now), certificate.not_valid_after_utc
    if problem:
        return Finding(name, PROBLEM, problem[0], problem[1].capitalize())
    if end - now < SOON:
        return Finding(name, NOTE, f"ends on {end:%Y-%m-%d}", "Ask the alliance lead for a renewed kit soon")
    return Finding(name, OK, f"valid until {end:%Y-%m-%d}")


def check_name(kit: Kit) -> list[Finding]:
    """The server refuses a site that claims another name than its certificate."""
    name = common_name(kit.certificate())
    script = kit.startup / "sub_start.sh"
    claimed = re.search(r"\buid=(\S+)", script.read_text(encoding="utf-8")) if script.exists() else None
    if kit.kind == "client" and claimed and claimed.group(1) != name:
        return [Finding("name", PROBLEM, f"certificate of '{name}', start script of '{claimed.group(1)}'", _FRESH)]
    return [Finding("name", OK, f"{name} ({kit.kind})")]


def check_clock(kit: Kit, now: datetime.datetime) -> list[Finding]:
    """FLARE's server tells nobody its time, so the clock is held against the kit's date and the system's own word."""
    manifest = kit.startup / MANIFEST
    sealed = str(read_json(manifest).get("sealed_on", "")) if manifest.exists() else ""
    if f"{now:%Y-%m-%d}" < sealed:
        return [Finding("clock", PROBLEM, f"{now:%Y-%m-%d %H:%M} UTC lies before the kit was made", "Set the clock")]
    found = f"{now:%Y-%m-%d %H:%M:%S} UTC"
    if _synchronised():
        return [Finding("clock", OK, f"{found}, kept by a time server")]
    return [
        Finding("clock", NOTE, f"{found}; the skew to the server cannot be measured", "Compare it with a known clock")
    ]


def _synchronised() -> bool:
    tool = shutil.which("timedatectl")
    if tool is None:
        return False
    command = [tool, "show", "--property=NTPSynchronized", "--value"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=5).stdout.strip() == "yes"
    except (OSError, subprocess.TimeoutExpired):
        return False


def check_versions(kit: Kit) -> list[Finding]:
    """The alliance made the kit with versions that its sites should run too."""
    manifest = kit.startup / MANIFEST
    wanted = read_json(manifest).get("made_with", {}) if manifest.exists() else {}
    findings = []
    for package, version in wanted.items():
        here = importlib.metadata.version(package) if package != "heterosync" else _own_version()
        if here == version:
            findings.append(Finding("versions", OK, f"{package} {here}, as the alliance"))
        else:
            remedy = "Install the wheel that the alliance lead sent"
            findings.append(Finding("versions", PROBLEM, f"{package} {here}, the alliance runs {version}", remedy))
    return findings


def _own_version() -> str:
    from heterosync import __version__

    return __version__


def check_policy(kit: Kit) -> list[Finding]:
    """What stands in `local/` is the site's own decision; where it differs from the alliance's proposal, it is told."""
    if kit.kind == "admin":
        return []
    findings = []
    for original in sorted(kit.local.glob("*.json.default")):
        name = original.name.removesuffix(".default")
        findings += _explained(name, partial(_difference, kit, name))
    if kit.kind == "client":
        findings += _explained(PRIVACY, partial(_check_privacy, kit))
    return list(dict.fromkeys(findings)) or [
        Finding("policy", OK, "as the alliance proposes: no custom code, outbound filter in force")
    ]


def _explained(name: str, check: Callable[[], list[Finding]]) -> list[Finding]:
    """The findings of a check that reads the site's file `name`; that it cannot be read is one too."""
    try:
        return check()
    except UserError as error:
        found = str(error)
    except (AttributeError, TypeError, ValueError):  # JSON, but not the lists and entries that belong there
        found = f"{LOCAL}/{name} is not built as {name}.default is"
    return [Finding("policy", PROBLEM, found, f"Mend it, or restore it from {name}.default")]


def _read_local(kit: Kit, name: str) -> Any:
    """A file of the site's own. To delete it, as `read_json` advises, could leave the site without a policy."""
    try:
        return json.loads((kit.local / name).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{LOCAL}/{name} is missing") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{LOCAL}/{name} is not readable JSON ({error})") from error


def _difference(kit: Kit, name: str) -> list[Finding]:
    original = f"{name}.default"
    if name != PRIVACY and not (kit.local / name).exists():
        return []  # FLARE takes the original
    here, content = _read_local(kit, name), _read_local(kit, original)
    if name == PRIVACY:
        for scope in (*here.get("scopes", []), *content.get("scopes", [])):
            scope.get("properties", {}).pop(DATA_ROOT, None)
    if here == content:
        return []
    return [Finding("policy", NOTE, f"{LOCAL}/{name} differs from {original}: your decision")]


def _check_privacy(kit: Kit) -> list[Finding]:
    """Whether each privacy scope, the default one above all, has our two outbound filters, and they accept its args."""
    policy = _read_local(kit, PRIVACY)
    scopes = policy.get("scopes", [])
    wrong: dict[str, list[str]] = {}  # what the filters say -> where; both often have the same args
    complete = policy.get("default_scope") in {scope.get("name") for scope in scopes}
    for scope in scopes:
        for kind, filter_ in FILTERS.items():
            path = f"{filter_.__module__}.{filter_.__qualname__}"
            entries = [e for e in scope.get(kind, []) if e.get("path") == path and e.get("disabled") is not True]
            complete = complete and bool(entries)
            for entry in entries:
                try:
                    filter_(**entry.get("args", {}))
                except UserError as error:
                    wrong.setdefault(str(error), []).append(kind)
    findings = [
        Finding("policy", PROBLEM, found, f"Correct it under {' and '.join(dict.fromkeys(kinds))}")
        for found, kinds in wrong.items()
    ]
    if not complete:
        remedy = "Restore the file from privacy.json.default"
        findings.append(Finding("policy", PROBLEM, f"{LOCAL}/{PRIVACY} lets jobs send what they like", remedy))
    return findings


def site_folder(kit: Kit, environ: Mapping[str, str] = os.environ) -> tuple[Path | None, list[Finding]]:
    """(the site folder that `local/privacy.json` names, what is wrong with it); (None, []) leaves it to
    HETEROSYNC_DATA, as in a training."""
    try:
        policy = _read_local(kit, PRIVACY)
        scopes = {scope.get("name"): scope for scope in policy.get("scopes", [])}
        named = str(scopes.get(policy.get("default_scope"), {}).get("properties", {}).get(DATA_ROOT) or "")
    except (UserError, AttributeError, TypeError):
        return None, [Finding("data", NOTE, f"not checked: {LOCAL}/{PRIVACY} cannot be read", "See policy")]
    if not named and environ.get("HETEROSYNC_DATA"):
        return None, []
    if not named:
        remedy = f"Write the path of your site folder after {DATA_ROOT} in {LOCAL}/{PRIVACY}"
        return None, [Finding("data", PROBLEM, "no site folder named", remedy)]
    folder, setting = Path(named).expanduser(), f"{DATA_ROOT} in {LOCAL}/{PRIVACY} is {named}"
    if not folder.is_absolute():
        return None, [Finding("data", PROBLEM, f"{setting}, a relative path", "Give an absolute path")]
    if not folder.is_dir():
        return None, [Finding("data", PROBLEM, f"{setting}, which is no folder here", "Correct it or make the folder")]
    if not (folder / CONFIG).exists():
        return None, [Finding("data", PROBLEM, f"{setting}, which has no {CONFIG}", "Name the site folder itself")]
    return folder, []


def server_address(kit: Kit) -> tuple[str, int]:
    """(host, port) of the alliance's server as the kit names it."""
    config = kit.config()
    if kit.kind == "admin":
        admin = config["admin"]
        return str(admin["host"]), int(admin["port"])
    host, _, port = str(config["servers"][0]["service"]["target"]).rpartition(":")
    return host, int(port)


def check_connection(kit: Kit, timeout: float = 5.0) -> list[Finding]:
    """TCP, then TLS with both certificates, as FLARE will open it. A server does not call itself."""
    if kit.kind == "server":
        return []
    host, port = server_address(kit)
    where = f"{host}:{port}"
    try:
        plain = socket.create_connection((host, port), timeout)
    except OSError as error:
        cause = "its name is not known here" if isinstance(error, socket.gaierror) else str(error)
        remedy = (
            "Is the server up? Ask for an outbound rule in the firewall, or for the server's entry in the hosts file"
        )
        return [Finding("server", PROBLEM, f"{where} is not reachable ({cause})", remedy)]
    with plain:
        try:
            context = ssl.create_default_context(cafile=str(kit.startup / ROOT))
            context.load_cert_chain(kit.certificate_path, kit.key_path)
            context.set_alpn_protocols(["h2"])
            with context.wrap_socket(plain, server_hostname=host) as secured:
                secured.settimeout(timeout)
                # With TLS 1.3 a refused client certificate shows in the first bytes only; a gRPC server speaks first.
                if not secured.recv(1):
                    return [Finding("server", PROBLEM, f"{where} refuses this kit's certificate", _FRESH)]
        except (ssl.SSLError, OSError) as error:
            return [Finding("server", PROBLEM, f"{where}: {_tls_cause(error)}", _FRESH)]
    return [Finding("server", OK, f"{where} knows this kit, and the kit knows it (mutual TLS)")]


def _tls_cause(error: OSError) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not accepted here ({error.verify_message})"
    if isinstance(error, ssl.SSLError) and "ALERT" in str(error.reason):
        return f"the server refuses this kit's certificate ({error.reason})"
    return f"no TLS connection ({error})"
