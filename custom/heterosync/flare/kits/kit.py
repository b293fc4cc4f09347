"""A startup kit and its seal: which files belong into `startup/`, signed, and whether they are all as they were.

FLARE 2.9 checks a handful of JSON and certificate files of a signed kit, never a shell script, and stops checking when
`signature.json` is gone. So a sealed kit carries `kit.json`, the list of all its start-up files with their SHA-256, and
next to it the signatures as FLARE's own `sign_folders` writes them. Two keys can seal a kit:

* "alliance": the root key of the alliance, which made the kit. The hospital compares the fingerprint of `rootCA.pem`.
* "site": the site's own key, for a kit whose private key never left the site (FLARE's distributed provisioning).

`local/` is the hospital's to edit and is not sealed. `python -m heterosync.flare.kits.kit KIT` verifies; start.sh calls
it.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import importlib.metadata
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.x509.oid import NameOID
from nvflare.lighter import utils
from nvflare.tool.cert.fingerprint import cert_fingerprint_sha256

import heterosync
from heterosync.errors import ProblemList, UserError
from heterosync.files import read_json, write_json, write_text

STARTUP, LOCAL = "startup", "local"
ROOT, MANIFEST = "rootCA.pem", "kit.json"
ALLIANCE, SITE = "alliance", "site"
#: The file with the signatures. FLARE itself verifies the first name, always against the root key.
SIGNATURES = {ALLIANCE: "signature.json", SITE: "site_signature.json"}
KINDS = {"fed_server.json": "server", "fed_client.json": "client", "fed_admin.json": "admin"}
FORMAT = 1
REMEDY = "mend that, or ask the alliance lead for a fresh kit"


class Kit:
    """A kit folder, the one with `startup/` and `local/` in it (its `startup/` will do). Raises `UserError`."""

    def __init__(self, folder: Path | str):
        folder = Path(folder)
        self.folder = (folder.parent if folder.name == STARTUP else folder).resolve()
        self.startup, self.local = self.folder / STARTUP, self.folder / LOCAL
        if not self.startup.is_dir():
            raise UserError(f"{folder} is no startup kit: name the folder with startup/ and local/ in it")

    @property
    def kind(self) -> str:
        """server, client or admin."""
        for name, kind in KINDS.items():
            if (self.startup / name).exists():
                return kind
        raise UserError(f"{self.folder} is no startup kit of a server, site or user: startup/ holds no fed_*.json")

    @property
    def certificate_path(self) -> Path:
        return self.startup / f"{'server' if self.kind == 'server' else 'client'}.crt"

    @property
    def key_path(self) -> Path:
        return self.certificate_path.with_suffix(".key")

    def root(self) -> x509.Certificate:
        return read_certificate(self.startup / ROOT)

    def certificate(self) -> x509.Certificate:
        return read_certificate(self.certificate_path)

    def config(self) -> dict[str, Any]:
        """Content of fed_server.json, fed_client.json or fed_admin.json."""
        return read_json(self.startup / f"fed_{self.kind}.json")


def read_certificate(path: Path) -> x509.Certificate:
    try:
        return utils.load_crt(path)
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is no readable certificate") from error


def common_name(certificate: x509.Certificate) -> str:
    """The participant that a certificate names."""
    return str(certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value)


def seal(folder: Path | str, key: Any = None) -> Kit:
    """List and sign the start-up files of a kit. `key`: the root key of the alliance; None takes the site's own key."""
    kit = Kit(folder)
    by = ALLIANCE if key is not None else SITE
    if by == SITE:
        refuse_sealed(folder)
    if any(path.is_dir() for path in kit.startup.iterdir()):
        raise UserError(f"{kit.startup} holds a folder: a kit that is sealed has only files there")
    for name in (MANIFEST, SIGNATURES[by]):
        (kit.startup / name).unlink(missing_ok=True)
    files = {path.name: _sha256(path) for path in sorted(kit.startup.iterdir())}
    manifest = {
        "format": FORMAT,
        "name": common_name(kit.certificate()),
        "kind": kit.kind,
        "sealed_by": by,
        "made_with": {"heterosync": heterosync.__version__, "nvflare": importlib.metadata.version("nvflare")},
        "sealed_on": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "files": files,
    }
    write_json(kit.startup / MANIFEST, manifest)
    utils.sign_folders(
        str(kit.startup), key or utils.load_private_key_file(kit.key_path), signature_file=SIGNATURES[by]
    )
    signatures = kit.startup / SIGNATURES[by]
    write_text(signatures, _exact(read_json(signatures)))
    return kit


def refuse_sealed(folder: Path | str) -> None:
    """Raises `UserError` for a kit with the alliance's seal: what changes in it must come from the alliance."""
    kit = Kit(folder)
    if (kit.startup / SIGNATURES[ALLIANCE]).exists():
        raise UserError(f"{kit.folder} is sealed by the alliance: ask the alliance lead for a new kit instead")


def verify(folder: Path | str, sealed_by: str | None = None) -> dict[str, Any]:
    """The manifest of a kit whose start-up files are all as they were sealed, with its root `fingerprint` added.

    `sealed_by`: accept only this seal. Raises `ProblemList` that names every edited, added and missing file.
    """
    kit = Kit(folder)
    problems: list[str] = []
    by = _seal_of(kit, sealed_by, problems)
    root = kit.root()
    signatures = {} if problems else _signatures(kit.startup / SIGNATURES[by], problems)
    signer_name = ROOT if by == ALLIANCE else kit.certificate_path.name
    signer = read_certificate(kit.startup / signer_name)
    if by == SITE and not issued(signer, root):
        problems.append(f"{signer_name} was not issued by the authority of {ROOT}")
    listed = _manifest(kit.startup / MANIFEST, problems)
    if listed and not problems and not _signed(kit.startup / MANIFEST, signatures, signer):
        problems.append(
            f"the seal does not fit: {MANIFEST}, {SIGNATURES[by]} or {signer_name} is not the one that it had"
        )
    if listed:  # where the list itself is in doubt, it still tells where to look
        problems += _compare(kit.startup, listed["files"], {MANIFEST, SIGNATURES[by]})
    if not problems:
        wrong = signatures.keys() ^ {*listed["files"], MANIFEST}
        wrong |= {name for name in listed["files"] if not _signed(kit.startup / name, signatures, signer)}
        problems += [f"edited: {SIGNATURES[by]} (its entry {name})" for name in sorted(wrong)]
    if problems:
        raise ProblemList([f"{kit.startup}: {problem}" for problem in problems])
    return {**listed, "fingerprint": cert_fingerprint_sha256(root)}


def date_problem(certificate: x509.Certificate, now: datetime.datetime) -> tuple[str, str] | None:
    """(what is wrong with the dates of a certificate, what to do about it), all in UTC; None when `now` is within."""
    start, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if now > end:
        return f"expired on {end:%Y-%m-%d}", "ask the alliance lead for a renewed kit"
    if now < start:
        return f"valid from {start:%Y-%m-%d %H:%M} UTC, and the clock here says {now:%Y-%m-%d %H:%M}", "set the clock"
    return None


def check_dates(folder: Path | str) -> None:
    """Raises `UserError` when the kit's certificate is not valid today: FLARE would try for ever without a word."""
    certificate = Kit(folder).certificate()
    problem = date_problem(certificate, datetime.datetime.now(datetime.timezone.utc))
    if problem:
        raise UserError(f"the certificate of '{common_name(certificate)}': {problem[0]}: {problem[1]}")


def _seal_of(kit: Kit, wanted: str | None, problems: list[str]) -> str:
    found = [by for by, name in SIGNATURES.items() if (kit.startup / name).exists()]
    if wanted is None:
        wanted = found[0] if found else ALLIANCE
    others = [SIGNATURES[by] for by in found if by != wanted]
    if wanted not in found:
        instead = f", and {others[0]} is no substitute" if others else ""
        problems.append(f"missing: {SIGNATURES[wanted]}, the seal of the kit{instead}")
    return wanted


def _manifest(path: Path, problems: list[str]) -> dict[str, Any]:
    """The list of files; empty, with the reason in `problems`, when there is none."""
    if not path.exists():
        problems.append(f"missing: {path.name}")
        return {}
    try:
        listed = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(listed, dict) and isinstance(listed.get("files"), dict):
            return listed
    except (OSError, ValueError):
        pass
    problems.append(f"edited: {path.name}")
    return {}


def _signatures(path: Path, problems: list[str]) -> dict[str, str]:
    """The signatures as they were written; any other form of the same content counts as edited."""
    try:
        text = path.read_text(encoding="utf-8")
        signatures = json.loads(text)
        if isinstance(signatures, dict) and text == _exact(signatures):
            return signatures
    except (OSError, ValueError):
        pass
    problems.append(f"edited: {path.name}")
    return {}


def _exact(signatures: dict[str, str]) -> str:
    return json.dumps(signatures, indent=1, sort_keys=True) + "\n"


def _signed(path: Path, signatures: dict[str, str], signer: x509.Certificate) -> bool:
    try:
        utils.verify_content(path.read_bytes(), signatures.get(path.name, ""), signer.public_key())
        return True
    except Exception:  # a wrong signature, or no signature at all: each library version has its own exception
        return False


def issued(certificate: x509.Certificate, root: x509.Certificate) -> bool:
    """Whether the authority `root` signed a certificate; its dates are another matter."""
    try:
        utils.verify_cert(certificate, root.public_key())
        return True
    except Exception:
        return False


def _compare(startup: Path, listed: dict[str, str], unlisted: set[str]) -> list[str]:
    found = {path.relative_to(startup).as_posix(): path for path in startup.rglob("*")}
    problems = [f"missing: {name}" for name in sorted(listed.keys() - found.keys())]
    for name, path in sorted(found.items()):
        if name in unlisted and not path.is_symlink():
            continue
        if name not in listed:
            problems.append(f"added: {name}")
        elif path.is_symlink() or not path.is_file() or _sha256(path) != listed[name]:
            problems.append(f"edited: {name}")
    return problems


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def main(argv: Sequence[str] | None = None) -> int:
    """What start.sh calls; 0 or 1. On success it says nothing but the fingerprint."""
    parser = argparse.ArgumentParser(prog="python -m heterosync.flare.kits.kit", description="Verify a startup kit.")
    parser.add_argument("kit")
    parser.add_argument("--sealed-by", choices=sorted(SIGNATURES))
    arguments = parser.parse_args(argv)
    try:
        facts = verify(arguments.kit, arguments.sealed_by)
        check_dates(arguments.kit)
    except UserError as error:
        for line in str(error).splitlines():
            print(f"heterosync: {line}", file=sys.stderr)
        print(f"heterosync: this kit does not start; {REMEDY}", file=sys.stderr)
        return 1
    print(f"heterosync: kit of {facts['name']} is intact; root certificate {facts['fingerprint']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
