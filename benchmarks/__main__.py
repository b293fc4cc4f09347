"""`python -m benchmarks [part …] [--quick] [--save FILE]`: measure, print a table of ratios, and the machine."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path

from benchmarks.table import Measurement, as_text, save

PARTS = ("step", "simulation", "aggregation", "loading")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description="Ratios measured side by side on this machine."
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that the code runs, measures nothing")
    parser.add_argument(
        "--save", type=Path, metavar="FILE", help="also write the table, or JSON when the name ends in .json"
    )
    arguments = parser.parse_args(argv)
    for part in arguments.parts:
        if part not in PARTS:
            parser.error(f"unknown part '{part}': choose from {', '.join(PARTS)}")
    found: list[Measurement] = []
    for part in arguments.parts or PARTS:
        print(f"measuring {part} …", flush=True)
        found += importlib.import_module(f"benchmarks.{part}").run(arguments.quick)
    print()
    print(as_text(found))
    if arguments.save:
        save(found, arguments.save)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
