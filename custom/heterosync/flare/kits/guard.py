"""The seal of a kit, verified once more by the FLARE process itself: start.sh, which verifies too, could be edited."""

from __future__ import annotations

import sys
from pathlib import Path

from nvflare.apis.fl_component import FLComponent
from nvflare.apis.fl_constant import WorkspaceConstants
from nvflare.private.fed.client.client_req_processors import ClientRequestProcessors
from nvflare.private.fed.client.shell_cmd import ShellCommandProcessor

from heterosync.errors import UserError
from heterosync.flare import messages
from heterosync.flare.kits import kit


class KitGuard(FLComponent):
    """Ends the process of a site or server whose start-up files are not those of its kit, or whose certificate is not
    valid today. Kits name it in `local/`.

    It acts while it is built: FLARE has entered the workspace by then and has not opened a connection yet. The file
    `shutdown.fl` keeps the loop of sub_start.sh from starting the process again.

    It also takes FLARE's shell commands (`cat`, `grep`, …) away from a site: a site believes its server about who may
    give them, so a server in the wrong hands could read every file that the site's account can.

    sealed_by: the seal to expect, "alliance" or "site". workspace: the kit; FLARE's own is the current folder.
    """

    def __init__(self, sealed_by: str = kit.ALLIANCE, workspace: str = "."):
        super().__init__()
        try:
            kit.verify(workspace, sealed_by)
            kit.check_dates(workspace)
        except UserError as error:
            for line in str(error).splitlines():
                print(f"{messages.PROBLEM}{line}", file=sys.stderr, flush=True)
            (Path(workspace) / WorkspaceConstants.SHUTDOWN_FILE).touch()
            sys.exit(1)
        commands = (
            ClientRequestProcessors.request_processors
        )  # FLARE's own list, from which a site takes what it answers
        commands[:] = [command for command in commands if not isinstance(command, ShellCommandProcessor)]
