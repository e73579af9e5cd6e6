"""`python bench [room ...]`: verify, time, and report. `python bench --help` says the rest."""

import argparse
import os
import runpy
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import _report
import _rows
import torch
from _rows import Row
from _runner import QUICK, Plan, Room, run_case, shown
from tqdm import tqdm

HERE = Path(__file__).resolve().parent


def load(folder: Path, name: str) -> Room:
    """The ROOM that a file declares."""
    return runpy.run_path(str(folder / f"{name}.py"))["ROOM"]  # type: ignore[no-any-return]


def against(room: Room, peer: str) -> Room:
    """Ours and one peer, which becomes the baseline."""
    theirs = {p.name.lower(): p for p in room.providers if p.backend is None}
    found = theirs.get(peer.lower())
    if found is None:
        raise ValueError(f"--against {peer}: no such peer; there are {', '.join(p.name for p in theirs.values())}")
    kept = [p for p in room.providers if p.backend or p is found]
    return replace(room, providers=kept, modes=[m for m in room.modes if m.name in found.setups], baseline=found.name)


def measure(name: str, room: Room, device: str, quick: bool, path: Path | None) -> list[Row]:
    """Run a room's cases under one progress bar; each table is printed, and its rows are written, as it is ready."""
    plan = QUICK if quick else Plan()
    cases = [(w, m) for w in room.workloads if w.quick or not quick for m in room.modes]
    live = sys.stderr.isatty()
    if (load := os.getloadavg()[0]) > 0.5:
        print(f"the machine is busy (load {load:.1f}): times will be noisy, with several threads also far too long")
    ticks = len(cases) * (len(room.providers) + plan.rounds)
    rows: list[Row] = []
    refused: set[str] = set()
    with tqdm(total=ticks, ascii=not live, mininterval=0.2 if live else 10, dynamic_ncols=live, unit="step") as bar:
        for workload, mode in cases:

            def tick(what: str, case: str = f"{name} {mode.name} {workload.name}") -> None:
                bar.set_description_str(f"{case}: {what}", refresh=live)
                bar.update()

            found = run_case(name, room, workload, mode, device, plan, tick)
            for row in found:
                if row.missing and row.status not in refused:
                    refused.add(row.status)
                    tqdm.write(f"{row.provider} {row.status}", file=sys.stdout)
            tqdm.write(f"\n{_rows.case_table(found)}", file=sys.stdout)
            rows += [row for row in found if not row.missing]
            if path is not None:
                _rows.upsert(path, rows)
    return rows


def listing(name: str, room: Room) -> str:
    workloads = [f"  {w.name:<12} {shown(w.sizes)}{'  (quick)' if w.quick else ''}" for w in room.workloads]
    modes, providers = ", ".join(mode.name for mode in room.modes), ", ".join(p.name for p in room.providers)
    return "\n".join([f"{name}: {modes}", *workloads, f"  by {providers}; over {room.baseline}"])


def options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python bench", description="Verify, then time rivals and ours.")
    parser.add_argument("room", nargs="*", help="rooms to run; all by default")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="fewer rounds and workloads; writes only to --csv")
    parser.add_argument("--threads", type=int, help="for torch and for ours; torch's own number by default")
    parser.add_argument("--against", metavar="PEER", help="only ours and this peer, which becomes the baseline")
    parser.add_argument("--csv", type=Path, help="where rows are updated; bench/results/<room>.csv by default")
    parser.add_argument("--plot", action="store_true", help="redraw docs/bench.png from the committed CSVs")
    parser.add_argument("--report", action="store_true", help="measure nothing; redo README, docs, plot from the CSVs")
    parser.add_argument("--list", action="store_true", help="measure nothing; list rooms, workloads and providers")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None, folder: Path = HERE, root: Path = HERE.parent) -> int:
    args = options(argv)
    known = sorted(path.stem for path in folder.glob("[!_]*.py"))
    if unknown := [name for name in args.room if name not in known]:
        print(f"no room {', '.join(unknown)}; there are: {', '.join(known) or 'none'}", file=sys.stderr)
        return 2
    if args.device == "cuda" and not torch.cuda.is_available():
        print("--device cuda: torch sees no CUDA device", file=sys.stderr)
        return 2
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    red: list[Row] = []
    try:
        for name in () if args.report else args.room or known:
            room = load(folder, name)
            if args.list:
                print(listing(name, room))
                continue
            room = against(room, args.against) if args.against else room
            path = args.csv or (None if args.quick else folder / "results" / f"{name}.csv")
            rows = measure(name, room, args.device, args.quick, path)
            red += [row for row in rows if row.red]
            if path is not None:
                print(f"rows written to {path}")
        if args.plot or args.report:
            files = {name: folder / "results" / f"{name}.csv" for name in known}
            measured = {name: (load(folder, name), _rows.read(path)) for name, path in files.items() if path.exists()}
            _report.draw(root, measured)
            if args.report:
                _report.write(root, measured)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    for row in red:
        print(f"RED {row.room} {row.mode} {row.workload} {row.provider}: {row.status}", file=sys.stderr)
    return 1 if red else 0


if __name__ == "__main__":
    sys.exit(main())
