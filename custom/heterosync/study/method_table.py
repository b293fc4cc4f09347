"""What every method does, sends, keeps and costs, read from the methods themselves; the text of docs/methods.md."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from types import MappingProxyType
from typing import Any

import torch

from heterosync.methods import GROUPS, bytes_per_image, bytes_per_round, group_of, make_method
from heterosync.methods.base import COMMON_LEAVES, STATUS, VOLUME_LEAVES
from heterosync.methods.traffic import amount, state_bytes

#: Sites of the alliance for which the server's memory is given.
SITES = tuple(f"site-{letter}" for letter in "abcde")


@cache
def method_facts(name: str) -> Mapping[str, Any]:
    """What is known of a method at its default settings, as plain values.

    bytes_per_round: what one site sends; bytes_received: what it gets before a round; bytes_kept: what it remembers
    from round to round beside what it gets; server_bytes: what the server remembers beside the global state, with five
    sites; bytes_per_image: where the network is cut, what a site sends for each image in each epoch.
    """
    method = make_method(name)
    model = method.build_model(weights="none")
    with torch.device("meta"):  # sizes without values: a server may remember much
        memory = method.server_memory(SITES)
    facts = {
        "name": method.name,
        "group": group_of(name),
        "title": method.title,
        "does": _first_line(type(method)),
        "status": method.status,
        "citation": method.citation,
        "leaves_a_site": list(method.leaves),
        "bytes_per_round": bytes_per_round(method, model),
        "bytes_received": state_bytes(model, method.shared_names(model)),
        "bytes_kept": state_bytes(model, method.own_names(model)),
        "server_bytes": sum(value.numel() * value.element_size() for value in memory.values()),
        "bytes_per_image": bytes_per_image(method, model),
        "network": " ".join(method.in_words().split()),
        "tensors_per_round": len(method.returned_names(model)),
        "parameters": sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        "weighting": method.weighting,
        "topology": method.topology,
        "personal": method.personal,
        "uses_anchor": method.uses_anchor,
    }
    return MappingProxyType(facts)  # it is kept


def _first_line(method: type) -> str:
    """The first line of the method's file, which says what it does."""
    text = (sys.modules[method.__module__].__doc__ or "").split("\n\n")[0]
    return " ".join(text.split()).removesuffix(".")


def sent(facts: Mapping[str, Any]) -> str:
    """What one site sends, in words."""
    if facts["bytes_per_image"]:
        return f"{facts['bytes_per_image'] / 2**20:.2f} MiB per image and epoch"
    return amount(facts["bytes_per_round"])


def own_leaves(facts: Mapping[str, Any]) -> list[str]:
    """The lines of what leaves a site that are not those of every method."""
    return [line for line in facts["leaves_a_site"] if line not in (*COMMON_LEAVES, *VOLUME_LEAVES)]


def privacy_class(facts: Mapping[str, Any]) -> str:
    """The highest class of what the method itself makes a site send; W0 where that is nothing."""
    return max(re.findall(r"\bW[0-4]\b", " ".join(own_leaves(facts))), default="W0")


def methods_page() -> str:
    """The text of docs/methods.md."""
    facts = [method_facts(method.name) for methods in GROUPS.values() for method in methods]
    parts = [_HEAD.format(count=len(facts))]
    for group in (group for group in GROUPS if GROUPS[group]):
        rows = [
            [f"`{f['name']}`", f["title"], f["does"], f["status"], f["citation"]] for f in facts if f["group"] == group
        ]
        parts.append(f"## {group[0].upper()}{group[1:]}\n\n" + _table(_WHAT, rows))
    parts.append("## Status\n\n" + "\n".join(f"- **{name}**: {words}." for name, words in STATUS.items()))
    costs = [
        [
            f"`{f['name']}`",
            f"{f['parameters']:,}",
            sent(f),
            amount(f["bytes_received"]),
            amount(f["bytes_kept"]),
            amount(f["server_bytes"]),
            privacy_class(f),
            f["weighting"] + (", by the sites in turn" if f["topology"] == "swarm" else ""),
            "each site's own" if f["personal"] else "one for all",
            "yes" if f["uses_anchor"] else "no",
        ]
        for f in facts
    ]
    parts.append(_COSTS + _table(_COST, costs))
    lines = [f"- `{f['name']}`: {'; '.join(own_leaves(f)) or 'nothing of its own'}" for f in facts]
    common = [f"- {line}" for line in COMMON_LEAVES]
    parts.append("## What leaves a site\n\nUnder every method for pictures:\n\n" + "\n".join(common))
    parts.append("Beside that, method by method:\n\n" + "\n".join(lines))
    return "\n\n".join(parts) + "\n"


_WHAT = ("method", "title", "what it does", "status", "source")
_COST = (
    "method",
    "trained parameters",
    "sent per site and round",
    "received",
    "kept at a site",
    "kept at the server",
    "class",
    "weights of sites",
    "model under test",
    "anchor task",
)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [" | ".join(header), " | ".join("---" for _ in header), *(" | ".join(row) for row in rows)]
    return "\n".join(f"| {line} |" for line in lines)


_HEAD = """# Methods

All {count} of them, as the code has them: this page is the output of `heterosync job table`, and a test fails when it
is another. Equations and the setting at which a method becomes another one stand in the docstring of its file in
`custom/heterosync/methods/`; `heterosync job describe METHOD` prints all settings with their choices."""

_COSTS = """## Costs

At the default settings (ResNet18 at 224 px; the volumes' network for the last group) and for one site; the server's
memory is what it keeps beside the global state for an alliance of five sites. Time and memory depend on the machine:
`heterosync study report` measures them for every run. The class is the highest of what a site sends: W0 scalars, W1
weights, W2 summary statistics of private data, W3 values of single images, W4 synthetic images or their generator.

"""
