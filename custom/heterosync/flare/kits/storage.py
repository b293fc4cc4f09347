"""Where a server keeps its jobs: inside its own kit, not in the machine's shared temporary folder as FLARE does."""

from __future__ import annotations

import os

from nvflare.apis.impl.job_def_manager import SimpleJobDefManager
from nvflare.app_common.storages.filesystem_storage import FilesystemStorage


class WorkspaceStorage(FilesystemStorage):
    """FLARE's file storage with a folder that may be relative to the workspace, which FLARE has entered by then."""

    def __init__(self, root_dir: str, uri_root: str = "/"):
        super().__init__(os.path.abspath(root_dir), uri_root)


class WorkspaceJobs(SimpleJobDefManager):
    """FLARE's job store likewise."""

    def __init__(self, uri_root: str, job_store_id: str = "job_store"):
        super().__init__(os.path.abspath(uri_root), job_store_id)
