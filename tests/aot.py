"""Compile every chain kernel ahead of time, check what it uses, and write docs/aot-chain.csv. `--quick`: two sizes."""

import argparse
import csv
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from pyseq.kernels.chain import triton as kernels
from pyseq.kernels.common import NLL, PARTITION, SCORE
from pyseq.testing.aot import TARGETS, Launch, compile_launch, excess, record, usage

COLUMNS = ("kernel", "kind", "dtype", "K", "target", "num_warps", "registers", "spill", "scalar_spill", "shared")
KINDS = {"partition": PARTITION, "nll": NLL, "score": SCORE}


def launches(dtype: torch.dtype, num_tags: int, kind: int, batch: int = 1, time: int = 2) -> list[Launch]:
    """All launches of a loss and of Viterbi, with every optional argument but lengths."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    emissions = torch.zeros(batch, time, num_tags, dtype=dtype)
    transitions, start = torch.zeros(num_tags, num_tags, dtype=wide), torch.zeros(num_tags, dtype=wide)
    mask, tags = torch.ones(batch, time, dtype=torch.bool), torch.zeros(batch, time, dtype=torch.int64)
    value, weights = torch.zeros(batch, dtype=wide), torch.zeros(batch, dtype=wide)
    grads = [torch.zeros_like(x, dtype=wide) for x in (emissions, transitions, start, start)]
    chain = (emissions, transitions, start, start, None if kind == PARTITION else tags, mask, None)

    def call() -> None:
        kernels.crf(*chain, weights, kind, "none", False, value, grads)
        kernels.viterbi(*chain, False, value, tags)

    return record(kernels, call)


def rows(
    dtypes: list[str], sizes: list[int], targets: list[str], kinds: list[str], only: str, num_warps: int | None
) -> Iterator[tuple[tuple[str | int, ...], list[str]]]:
    """Rows of the table, each with the limits it breaks."""
    seen = set()
    for num_tags in sizes:
        for name in dtypes:
            for kind in kinds:
                for launch in launches(getattr(torch, name), num_tags, KINDS[kind]):
                    kernel = launch.kernel.__name__
                    if num_warps is not None:
                        launch.options["num_warps"] = num_warps
                    shown = "any" if "KIND" not in launch.args else kind
                    # edges and counts see the dtype of the parameters alone
                    own = name if "p_emissions" in launch.args or name == "float64" else "float32"
                    for target in targets:
                        key = (kernel, shown, own, num_tags, target)
                        if key in seen or only not in kernel:
                            continue
                        seen.add(key)
                        use = usage(compile_launch(launch, target))
                        yield (*key, *use), list(excess(target, use))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--csv", type=Path, default=Path(__file__).parents[1] / "docs" / "aot-chain.csv")
    parser.add_argument("--sizes", type=int, nargs="*")
    parser.add_argument("--dtypes", nargs="*")
    parser.add_argument("--targets", nargs="*")
    parser.add_argument("--kinds", nargs="*")
    parser.add_argument("--kernel", default="", help="only kernels whose name contains this")
    parser.add_argument("--num-warps", type=int, help="instead of the launcher's own")
    args = parser.parse_args()
    os.environ.setdefault("TRITON_DISABLE_LINE_INFO", "1")  # halves the time
    table, broken = [], []
    for row, reasons in rows(
        args.dtypes or (["float32", "bfloat16"] if args.quick else ["float32", "float64", "bfloat16", "float16"]),
        args.sizes or ([9, 128] if args.quick else [2, 9, 32, 128, 512, 1024]),
        args.targets or (["sm_90", "gfx942"] if args.quick else list(TARGETS)),
        args.kinds or (["nll"] if args.quick else list(KINDS)),
        args.kernel,
        args.num_warps,
    ):
        table.append(row)
        print(*row, *reasons, flush=True)
        broken += [f"{row}: {reason}" for reason in reasons]
    if not args.quick:
        with args.csv.open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(COLUMNS)
            writer.writerows(table)
    if broken:
        sys.exit("over the limits:\n" + "\n".join(broken))


if __name__ == "__main__":
    main()
