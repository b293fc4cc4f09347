"""The `startup/readme.txt` of a kit: FLARE's own advises to edit files that the seal covers."""

from __future__ import annotations

from pathlib import Path

from heterosync.files import write_text
from heterosync.flare.kits import kit

README = "readme.txt"
_TEXT = """\
Startup kit of {name}, {what}, made with heterosync and NVIDIA FLARE.

1. Verify it before anything else:    heterosync kit verify KIT
   and compare the fingerprint with the one that the alliance lead tells you by telephone.
2. Is this machine ready?             heterosync doctor --kit KIT
3. {start}
   The hand-book, in the documentation of heterosync: {book}

Edit nothing in startup/, this file included: it is sealed, and a kit that was changed does not start.
{yours}
The .key file is secret: whoever has it can act as {name}.
"""
_LEAD, _HOSPITAL = "docs/alliance-lead.md", "docs/hospital.md"
_LOCAL = "What you may edit is local/; NAME.default there is the original of NAME."
_SERVICE = "As a service: see the hand-book. For a trial:    bash KIT/startup/{script}"
_WORDS = {
    "client": {
        "what": "a site",
        "start": _SERVICE.format(script="sub_start.sh --once"),
        "book": _HOSPITAL,
        "yours": f"{_LOCAL} Your site folder is data_root in local/privacy.json.",
    },
    "server": {"what": "the server", "start": _SERVICE.format(script="start.sh"), "book": _LEAD, "yours": _LOCAL},
    "admin": {
        "what": "a user",
        "start": "The admin console:                bash KIT/startup/fl_admin.sh",
        "book": _LEAD,
        "yours": "Ask the alliance lead for a new kit when anything in it must change.",
    },
}


def put_readme(folder: Path | str) -> None:
    """Replace FLARE's readme of a kit, before it is sealed, by what its owner needs to know."""
    made = kit.Kit(folder)
    name = kit.common_name(made.certificate())
    write_text(made.startup / README, _TEXT.format(name=name, **_WORDS[made.kind]))
