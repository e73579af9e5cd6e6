"""Compile every Triton kernel of every room ahead of time, and check what the binaries use; no GPU.

Rooms offer what to compile in `pyseq.testing.<room>.binaries`. A row names the calls that a binary serves.
"""

import argparse
import csv
import importlib
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("TRITON_DISABLE_LINE_INFO", "1")  # halves the time

import triton
from tqdm import tqdm

import pyseq.ops  # noqa: F401  (defines the rooms)
from pyseq.ops._backend import rooms
from pyseq.testing.aot import TARGETS, Binary, Launch, binary_of, compile_launch, excess, record, serves, usage

DOCS = Path(__file__).parents[1] / "docs"


def distinct(binaries: Iterable[Binary], only: dict[str, str]) -> list[tuple[dict[str, str], Launch]]:
    """Launches that need a binary of their own, each with its kernel and the labels of all calls that make it."""
    found: dict[str, tuple[dict[str, dict[str, None]], Launch]] = {}
    for labels, module, call in binaries:
        for launch in record(module, call):
            row = {"kernel": launch.kernel.__name__} | {name: str(label) for name, label in labels.items()}
            if all(row.get(name) == value for name, value in only.items()):
                seen, _ = found.setdefault(binary_of(launch), ({name: {} for name in row}, launch))
                for name, label in row.items():
                    seen[name][label] = None
    return [({name: " ".join(each) for name, each in seen.items()}, launch) for seen, launch in found.values()]


def write(path: Path, rows: list[dict[str, Any]], targets: list[str]) -> None:
    """Rows of other targets stay as they are."""
    if path.exists():
        with path.open(newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["target"] not in targets] + rows
    rows.sort(key=lambda row: TARGETS.index(row["target"]))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("room", nargs="*", default=list(rooms()), help="rooms to compile; all by default")
    parser.add_argument("--quick", action="store_true", help="few dtypes and sizes")
    parser.add_argument("--docs", action="store_true", help="rewrite the targets' rows of docs/aot-<room>.csv, if all")
    parser.add_argument("--targets", nargs="*", default=TARGETS, choices=TARGETS)
    parser.add_argument("--only", nargs="*", default=[], metavar="NAME=VALUE", help="rows with such a kernel or label")
    parser.add_argument("--num-warps", type=int, help="instead of the launcher's own")
    args = parser.parse_args(argv)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    targets = [target for target in args.targets if serves(target)]
    for target in args.targets:
        if target not in targets:
            print(f"{target}: left out, triton {triton.__version__} cannot compile for it", file=sys.stderr)
    broken = []
    for room in args.room:
        binaries = importlib.import_module(f"pyseq.testing.{room}").binaries(args.quick)
        launches = distinct(binaries, dict(word.split("=", 1) for word in args.only))
        rows: list[dict[str, Any]] = []
        for target in targets:
            for labels, launch in tqdm(launches, f"{room} {target}", disable=None):
                if args.num_warps:
                    launch.options["num_warps"] = args.num_warps
                use = usage(compile_launch(launch, target))
                row = {**labels, "target": target, "triton": triton.__version__, **use._asdict()}
                rows.append(row)
                reasons = list(excess(target, use))
                words = (f"{name}={value}".replace(" ", "|") for name, value in row.items())
                tqdm.write(" ".join([room, *words, *reasons]))
                broken += [f"{room} {row}: {reason}" for reason in reasons]
        if args.docs and not (args.quick or args.only or args.num_warps):
            write(DOCS / f"aot-{room}.csv", rows, targets)
    if broken:
        sys.exit("over the limits:\n" + "\n".join(broken))


if __name__ == "__main__":
    main()
