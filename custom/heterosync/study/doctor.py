"""Is this machine ready? Each check says what it found and, where something is wrong, what to do."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from heterosync.errors import UserError
from heterosync.files import read_json

OK, NOTE, PROBLEM = "ok", "note", "problem"
GIB = 1024**3
ANCHOR = "anchor"

#: Below these a 224-pixel training of the full model is not comfortable (one trainer process with a batch of 64).
MEMORY_GIB, DISK_GIB = 8, 10


@dataclass(frozen=True)
class Check:
    """One finding; `remedy` is empty unless `state` is "problem" (or a note with an advice)."""

    name: str
    state: str
    found: str
    remedy: str = ""

    def line(self) -> str:
        mark = {OK: "ok     ", NOTE: "note   ", PROBLEM: "PROBLEM"}[self.state]
        return f"{mark} {self.name}: {self.found}" + (f". {self.remedy}" if self.remedy else "")

    def as_dict(self) -> dict[str, str]:
        return asdict(self)


def check_python() -> Check:
    return Check("python", OK, ".".join(map(str, sys.version_info[:3])))  # an older one cannot install heterosync


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def check_packages(
    names: Sequence[str] = ("nvflare", "scikit-learn", "numpy", "tensorboard", "pydicom", "nibabel"),
) -> Check:
    versions = {name: _version(name) for name in names}
    absent = [name for name, version in versions.items() if version is None]
    if absent:
        return Check("packages", PROBLEM, f"not installed: {', '.join(absent)}", f"Run: pip install {' '.join(absent)}")
    found = ", ".join(f"{name} {version}" for name, version in versions.items())
    if not (versions.get("nvflare") or "2.9").startswith("2.9"):
        return Check(
            "packages", PROBLEM, found, "heterosync is made for NVIDIA FLARE 2.9: pip install 'nvflare>=2.9,<2.10'"
        )
    return Check("packages", OK, found)


def check_torch_pair() -> Check:
    """torch and torchvision are released in pairs; a torchvision built for another torch fails on its first
    operator."""
    torch_version, vision_version = _version("torch"), _version("torchvision")
    if torch_version is None or vision_version is None:
        return Check(
            "torch",
            PROBLEM,
            f"torch {torch_version}, torchvision {vision_version}",
            "Run: pip install torch torchvision",
        )
    found = f"torch {torch_version} with torchvision {vision_version}"
    try:
        import torch
        import torchvision

        boxes = torch.tensor([[0.0, 0.0, 1.0, 1.0]])
        torchvision.ops.nms(boxes, torch.ones(1), 0.5)
    except Exception as error:  # whatever the mismatch raises, it is the finding
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        return Check(
            "torch", PROBLEM, f"{found} do not work together ({reason})", "Install the pair named in constraints.txt"
        )
    return Check("torch", OK, found)


def check_memory() -> Check:
    try:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / GIB
    except (ValueError, OSError, AttributeError):
        return Check("memory", NOTE, "size not known on this system")
    found = f"{total:.0f} GiB, {os.cpu_count()} processors"
    if total < MEMORY_GIB:
        return Check(
            "memory", NOTE, found, f"{MEMORY_GIB} GiB are advised at 224 pixels: set a smaller batch_size in site.yaml"
        )
    return Check("memory", OK, found)


def check_disk(folder: Path) -> Check:
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free / GIB
    found = f"{free:.0f} GiB free at {folder}"
    if not os.access(folder, os.W_OK):
        return Check(
            "disk", PROBLEM, f"no permission to write in {folder}", "Choose another folder or change its owner"
        )
    if free < 1:
        return Check("disk", PROBLEM, found, "Free some space")
    return Check("disk", OK if free >= DISK_GIB else NOTE, found)


def check_gpu() -> Check:
    try:
        import torch
    except ImportError:
        return Check("gpu", NOTE, "cannot be asked for without torch")
    if not torch.cuda.is_available():
        return Check("gpu", NOTE, "none in use: training runs on the processor")
    cards = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return Check("gpu", OK, ", ".join(f"{card.name} ({card.total_memory / GIB:.0f} GiB)" for card in cards))


def check_data(folder: Path) -> list[Check]:
    """A site folder, or a folder of site folders; every problem (many of one kind: their summary) is one check."""
    from heterosync.data.check import summarised
    from heterosync.data.task_kinds import check_folder
    from heterosync.training.checks import device_problem

    if not folder.is_dir():
        return [Check("data", PROBLEM, f"{folder} is not a folder", "Set HETEROSYNC_DATA or give --data")]
    sites = [folder] if (folder / "site.yaml").exists() else sorted(path.parent for path in folder.glob("*/site.yaml"))
    if not sites:
        return [Check("data", PROBLEM, f"no site.yaml in {folder} or one level below", "See `heterosync data --help`")]
    checks = []
    for site in sites:
        found = check_folder(site)
        device = device_problem(found.device) if found.device else None
        problems = summarised([*found.problems, *([f"site.yaml: {device}"] if device else [])])
        checks += [Check(f"data {site.name}", PROBLEM, problem) for problem in problems]
        if not problems:
            checks.append(Check(f"data {site.name}", OK, str(site)))
    return checks


def check_anchor(folder: Path) -> list[Check]:
    """The digest that every site of the alliance must have, for the site folders that carry an anchor pack."""
    from heterosync.data.anchor import anchor_digest

    packs = [path for path in (folder / ANCHOR, *sorted(folder.glob(f"*/{ANCHOR}"))) if path.is_dir()]
    checks = []
    for pack in packs:
        try:
            checks.append(Check(f"anchor {pack.parent.name}", OK, f"digest {anchor_digest(pack)}"))
        except UserError as error:
            remedy = "Ask the alliance lead for the anchor pack"
            checks += [Check(f"anchor {pack.parent.name}", PROBLEM, line, remedy) for line in str(error).splitlines()]
    return checks


def check_allow_list(workspace: Path, classes: Sequence[str]) -> Check:
    """FLARE builds, for a job without own code, only classes that the site's resources.json lists."""
    path = workspace / "local" / "resources.json"
    if not path.exists():
        return Check(
            "allow-list", NOTE, f"{path} does not exist", "`heterosync simulate` writes it for its own workspace"
        )
    try:
        listed = read_json(path).get("class_allow_list", [])
    except UserError as error:
        return Check("allow-list", PROBLEM, str(error))
    absent = [
        name
        for name in classes
        if not any(name == entry or (entry.endswith(".") and name.startswith(entry)) for entry in listed)
    ]
    if absent:
        return Check("allow-list", PROBLEM, f"{path} lacks {', '.join(absent)}", "Add them to class_allow_list")
    return Check("allow-list", OK, f"the {len(classes)} classes that jobs name, in {path}")


def check_port(port: int) -> Check:
    """Only a server needs it; sites open connections outwards."""
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            return Check(
                "port",
                NOTE,
                f"{port} is in use ({error.strerror})",
                "A server needs a free port; the simulator finds its own",
            )
    return Check("port", OK, f"{port} is free")


def check_server(address: str, timeout: float = 5.0) -> Check:
    """Can this site reach the alliance's server? `address` is host:port; raises `UserError` when it is not."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise UserError(f"--server {address}: write it as host:port, for example fl.example.org:8002")
    try:
        socket.create_connection((host, int(port)), timeout).close()
    except OSError as error:
        return Check(
            "server", PROBLEM, f"{address} is not reachable ({error})", "Ask for an outbound rule in the firewall"
        )
    return Check("server", OK, f"{address} answers")


def examine(
    data: Path | None,
    workspace: Path,
    classes: Sequence[str],
    port: int | None = 8002,
    server: str | None = None,
    environ: Mapping[str, str] = os.environ,
) -> list[Check]:
    """All checks in a fixed order. `data`: None takes HETEROSYNC_DATA where it is set; `port`: None is no server."""
    simple: list[Callable[[], Check]] = [check_python, check_packages, check_torch_pair, check_memory]
    checks = [check() for check in simple]
    checks += [check_disk(workspace), check_gpu(), check_allow_list(workspace, classes)]
    if port is not None:
        checks.append(check_port(port))
    if data is None and environ.get("HETEROSYNC_DATA"):
        data = Path(environ["HETEROSYNC_DATA"])
    if data is None:
        checks.append(Check("data", NOTE, "no folder named", "Set HETEROSYNC_DATA or give --data"))
    else:
        checks += check_data(data) + check_anchor(data)
    if server:
        checks.append(check_server(server))
    return checks
