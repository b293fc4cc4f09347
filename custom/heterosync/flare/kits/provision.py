"""Our builders for FLARE's provisioning, and provisioning itself: project.yml in, sealed kits out."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import os
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

from nvflare.lighter.constants import CtxKey
from nvflare.lighter.ctx import ProvisionContext
from nvflare.lighter.entity import Project
from nvflare.lighter.prov_utils import prepare_builders
from nvflare.lighter.provision import prepare_project
from nvflare.lighter.provisioner import Provisioner
from nvflare.lighter.spec import Builder
from nvflare.lighter.utils import load_crt_bytes
from nvflare.tool.cert.fingerprint import cert_fingerprint_sha256

from heterosync.errors import UserError
from heterosync.files import read_json, write_json
from heterosync.flare.kits import kit
from heterosync.flare.kits.policy import put_check, put_policy
from heterosync.flare.kits.readme import put_readme

CERT_STATE = "cert.json"


class SitePolicyBuilder(Builder):
    """Puts the alliance's policy into `local/` of each kit, and into `startup/` the check of the kit and a readme."""

    def build(self, project: Project, ctx: ProvisionContext) -> None:
        for participant in project.get_all_participants():
            put_policy(ctx.get_ws_dir(participant), kit.ALLIANCE)
            put_check(ctx.get_ws_dir(participant), kit.ALLIANCE)
            put_readme(ctx.get_ws_dir(participant))


class KitSigner(Builder):
    """Seals the start-up files of each kit with the root key: the last builder, after all that write into `startup/`.

    It also closes the folder that holds the root key to all but its owner.
    """

    def build(self, project: Project, ctx: ProvisionContext) -> None:
        os.chmod(ctx.get_state_dir(), 0o700)
        for participant in project.get_all_participants():
            kit.seal(ctx.get_ws_dir(participant), ctx[CtxKey.ROOT_PRI_KEY])


class _Quiet:
    """FLARE's word on a provisioning: errors are kept, the rest is dropped."""

    def __init__(self) -> None:
        self.errors: list[str] = []

    def error(self, message: str) -> None:
        self.errors.append(message)

    def warning(self, message: str) -> None: ...

    info = debug = warning


def provision(project: dict[str, Any], out: Path, only: Collection[str] = ()) -> tuple[list[Path], str]:
    """Make the kits of a project below `out`/NAME/prod_NN; (kits, fingerprint of the root certificate).

    Run again on the same folder, it keeps the authority and every certificate that it has issued. `only`: participants
    whose kits are kept; the others have theirs already. Raises `UserError`.
    """
    log = _Quiet()
    try:
        made = prepare_project(copy.deepcopy(project))
        with contextlib.redirect_stderr(io.StringIO()):  # FLARE prints the traceback of what it reports anyway
            context = Provisioner(str(out.resolve()), prepare_builders(project)).provision(made, logger=log)
    except (ValueError, RuntimeError, TypeError, ImportError) as error:
        raise UserError(f"the project cannot be provisioned: {' '.join(str(error).split())}") from error
    if context.get(CtxKey.BUILD_ERROR):
        raise UserError(f"the project cannot be provisioned: {'; '.join(log.errors)}")
    folder = Path(context.get_result_location())
    kits = [folder / participant.name for participant in made.get_all_participants()]
    for place in [place for place in kits if only and place.name not in only]:
        shutil.rmtree(place)
    root = read_json(state_file(out, project["name"]))["root_cert"]
    return [place for place in kits if place.exists()], cert_fingerprint_sha256(load_crt_bytes(root.encode()))


def state_file(out: Path, name: str) -> Path:
    """The file that holds the authority: its private key and all that it has issued."""
    return out / name / "state" / CERT_STATE


def renew(project: dict[str, Any], out: Path, names: Collection[str]) -> tuple[list[Path], str]:
    """New keys and certificates for participants of an alliance; their new kits replace the old ones there.

    The old certificates stay valid until they expire: FLARE 2.9 knows no list of revoked ones. Raises `UserError`.
    """
    path = state_file(out, project["name"])
    if not path.exists():
        raise UserError(f"{path} does not exist: --out must be the folder of the first provisioning")
    before = path.read_text(encoding="utf-8")
    state = json.loads(before)
    participants = {entry["name"] for entry in project["participants"]}
    for name in names:
        if name not in participants or state.pop(name, None) is None:
            raise UserError(f"'{name}' is no participant of the project with a certificate in {path}")
    try:
        write_json(path, state)
        return provision(project, out, names)
    except BaseException:
        path.write_text(before, encoding="utf-8")
        raise
