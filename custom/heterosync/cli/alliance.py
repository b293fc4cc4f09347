"""`heterosync alliance` and `heterosync kit`: project file, startup kits, their seals."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from heterosync.cli.base import add_command, add_group, add_json, names, positive, show
from heterosync.cli.chain import register_run
from heterosync.errors import ProblemList, UserError

_SEND = """\
Send each kit to its owner (keys are inside: never by plain mail) and tell the fingerprint by telephone.
{state} holds the key of the authority: it stays here, readable by you alone, with a copy in a safe."""


def register(commands: Any) -> None:
    group = add_group(
        commands,
        "alliance",
        "describe an alliance of hospitals and make its startup kits",
        "heterosync alliance init sites.csv --name thyroid --server fl.example.org --admin lead@example.org",
    )
    parser = add_command(
        group,
        "init",
        "write FLARE's project file for a table of hospitals (columns site,org,admin[,lead][,member])",
        _init,
        "heterosync alliance init sites.csv --name thyroid --server fl.example.org --admin admin@example.org",
    )
    parser.add_argument("sites", type=Path, metavar="SITES.CSV", help="one row per hospital; people by e-mail address")
    parser.add_argument("--name", required=True, help="name of the alliance: letters, digits and _")
    parser.add_argument("--description", default="", help="one line for people")
    parser.add_argument("--admin", required=True, metavar="EMAIL", help="the project admin")
    parser.add_argument("--out", type=Path, default=Path("."), metavar="DIR", help="folder of project.yml (default: .)")
    _add_server(parser, "host name under which every hospital reaches the server")

    parser = add_command(
        group,
        "provision",
        "make the sealed startup kits of a project file; again on the same --out, with the same authority",
        _provision,
        "heterosync alliance provision project.yml --out kits",
    )
    _add_project(parser)
    _add_server(parser, "another host name than that of the project file, where it is put in")

    parser = add_command(
        group,
        "add",
        "add hospitals to a project file and make kits for them alone; all other kits stay as they are",
        _add,
        "heterosync alliance add project.yml new-sites.csv --out kits",
    )
    _add_project(parser)
    parser.add_argument("sites", type=Path, metavar="SITES.CSV", help="the new hospitals only")

    parser = add_command(
        group,
        "renew",
        "make new keys, certificates and kits for participants whose certificates run out",
        _renew,
        "heterosync alliance renew project.yml --of sysu01,admin@sysu01.example.org --out kits",
    )
    _add_project(parser)
    parser.add_argument("--of", required=True, type=names, metavar="A,B,…", help="participants of the project")

    register_run(group)

    group = add_group(commands, "kit", "verify a startup kit, or secure one of your own", "heterosync kit verify KIT")
    parser = add_command(
        group,
        "verify",
        "say whether the start-up files of a kit are all as they were sealed, and its fingerprint",
        _verify,
        "heterosync kit verify sysu01",
    )
    parser.add_argument("kit", type=Path, metavar="KIT", help="the folder with startup/ and local/")
    add_json(parser)

    parser = add_command(
        group,
        "secure",
        "put our policy into a kit that `nvflare package` made, and seal it with the site's own key",
        _secure,
        "heterosync kit secure sysu01",
    )
    parser.add_argument("kit", type=Path, metavar="KIT", help="the folder with startup/ and local/")
    add_json(parser)


def _add_project(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("project", type=Path, metavar="PROJECT.YML")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="kits become DIR/NAME/prod_NN/…")
    add_json(parser)


def _add_server(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument("--server", metavar="HOST", help=what)
    parser.add_argument(
        "--also", type=names, default=(), metavar="A,B,…", help="further names or addresses of the server"
    )
    parser.add_argument("--port", type=positive, help="the one port of the server (default: 8002)")
    parser.add_argument("--loopback", action="store_true", help="server and sites on this machine, for a trial")


def _server(arguments: argparse.Namespace) -> Any:
    """The server that the command line names, or None."""
    from heterosync.flare.kits.project import PORT, Server, loopback

    port = arguments.port or PORT
    if arguments.loopback and arguments.server:
        raise UserError("--loopback and --server contradict each other: give one")
    if arguments.loopback:
        return loopback(port, arguments.also)
    if arguments.server:
        return Server(arguments.server, port, arguments.also)
    if arguments.also or arguments.port:
        raise UserError("--port and --also belong to a server: give --server or --loopback too")
    return None


def _init(arguments: argparse.Namespace) -> None:
    from heterosync.flare.kits.project import PROJECT, make_project, write_project

    server = _server(arguments)
    if server is None:
        raise UserError("which server? give --server HOST, or --loopback for a trial on this machine")
    if arguments.out.suffix in (".yml", ".yaml"):
        raise UserError(f"--out {arguments.out}: name the folder that {PROJECT} goes into")
    project = make_project(arguments.name, server, arguments.admin, arguments.sites, arguments.description)
    path = arguments.out / PROJECT
    if path.exists():
        raise UserError(f"{path} exists already: choose another --out, or use `heterosync alliance add`")
    print(f"{write_project(project, path)}: {_roll(project)}")


def _provision(arguments: argparse.Namespace) -> None:
    from heterosync.flare.kits.project import read_project, with_server, write_project
    from heterosync.flare.kits.provision import provision

    project, server = read_project(arguments.project), _server(arguments)
    if server is not None:
        project = with_server(project, server)
    kits = provision(project, arguments.out)
    if server is not None:
        write_project(project, arguments.project)  # later kits, of `add` and `renew`, must name the same server
    _report(project, arguments, kits)


def _add(arguments: argparse.Namespace) -> None:
    from heterosync.flare.kits.project import read_project, with_sites, write_project
    from heterosync.flare.kits.provision import provision, state_file

    project = read_project(arguments.project)
    state = state_file(arguments.out, project["name"])
    if not state.exists():
        raise UserError(f"{state} does not exist: --out must be the folder of the first provisioning")
    project, new = with_sites(project, arguments.sites)
    kits = provision(project, arguments.out, new)
    write_project(project, arguments.project)
    _report(project, arguments, kits)


def _renew(arguments: argparse.Namespace) -> None:
    from heterosync.flare.kits.project import read_project
    from heterosync.flare.kits.provision import renew

    project = read_project(arguments.project)
    _report(project, arguments, renew(project, arguments.out, arguments.of))


def _report(project: dict[str, Any], arguments: argparse.Namespace, result: tuple[list[Path], str]) -> None:
    from heterosync.flare.kits.provision import state_file

    kits, fingerprint = result
    if arguments.json:
        show({"name": project["name"], "kits": [str(place) for place in kits], "fingerprint": fingerprint})
        return
    for place in kits:
        print(place)
    print(f"fingerprint of the root certificate: {fingerprint}")
    print(_SEND.format(state=state_file(arguments.out, project["name"])))


def _roll(project: dict[str, Any]) -> str:
    kinds = [entry["type"] for entry in project["participants"]]
    return f"{kinds.count('client')} sites, {kinds.count('admin')} users"


def _verify(arguments: argparse.Namespace) -> None:
    from heterosync.flare.kits.kit import REMEDY, Kit, verify

    kit = Kit(arguments.kit)
    try:
        facts = verify(kit.folder)
    except UserError as error:
        raise ProblemList([*str(error).splitlines(), f"this kit is not as it was sealed; {REMEDY}"]) from error
    _say_verified(facts, arguments.json)


def _secure(arguments: argparse.Namespace) -> None:
    from heterosync.flare.kits import kit
    from heterosync.flare.kits.policy import secure

    secure(arguments.kit)
    _say_verified(kit.verify(arguments.kit, kit.SITE), arguments.json)


def _say_verified(facts: dict[str, Any], as_json: bool) -> None:
    if as_json:
        show(facts)
        return
    print(f"OK: {len(facts['files'])} start-up files of {facts['kind']} {facts['name']} are as they were sealed")
    print(f"sealed by the {facts['sealed_by']} on {facts['sealed_on']}")
    print(f"root certificate {facts['fingerprint']}: compare it with what the alliance lead tells you by telephone")
