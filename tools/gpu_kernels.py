"""Times each kernel of a SAM step on this machine's GPU, and torch's device-to-device copy in the same run.

    python tools/gpu_kernels.py --out DIR        writes DIR/kernels.json; with matplotlib also DIR/kernels.png

--backend triton writes kernels-triton.json, and --label NAME kernels-NAME.json. --quick times two shapes and two kinds.
The caches are cold when a pass of the step begins, as they are after a backward pass, and an empty launch is subtracted
from every time. docs/gpu.md has the predictions.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from gpu_tables import BOTH, CUDA, KINDS, SHAPES, UPDATES, Clock, Kind, head, passes, require_gpu, tables_of

from fused_sam.backends import choose
from fused_sam.backends.contract import Status


def measure(backend_name: str, name: str, kind: Kind, clock: Clock, copy_rate: float) -> list[dict[str, Any]]:
    """Time every pass over tensors of one shape and kind, and return a row for each."""
    backend, status = choose(backend_name, CUDA), Status(CUDA)
    runs = passes(backend, tables_of(SHAPES[name], kind), kind, status)

    def both(first: str, second: str) -> Callable[[], None]:
        def run() -> None:
            runs[first]()
            runs[second]()

        return run

    every = {title: (run, [title]) for title, run in runs.items()}
    every["first_step"] = both("norm", "perturb"), ["norm", "perturb"]
    every["second_step"] = both("norm", "sgd"), ["norm", "sgd"]
    elements = sum(SHAPES[name])
    rows = []
    for title, (run, parts) in every.items():
        run()
        seconds = clock.seconds(run)
        moved = elements * sum(map(kind.traffic, parts))
        rows.append({
            "shape": name, "elements": elements, "kind": kind.name, "pass": title,
            "bytes": moved, "seconds": seconds, "rate": moved / seconds, "of_copy": moved / seconds / copy_rate,
        })  # fmt: skip
        print(f"{name:14} {kind.name:24} {title:12} {seconds * 1e6:9.1f} us {moved / seconds / 1e9:8.0f} GB/s "
              f"{moved / seconds / copy_rate:6.1%} of copy", flush=True)  # fmt: skip
    if float(status.skip) != 0:
        raise RuntimeError(
            f"{name}, {kind.name}: a norm was not finite, and updates were copies: the times mean nothing"
        )
    for update in UPDATES:
        three = [r for r in rows if r["pass"] in ("first_step", update)]
        moved, seconds = (sum(r[key] for r in three) for key in ("bytes", "seconds"))
        rows.append({**three[0], "pass": f"{update} step in 3 launches", "bytes": moved, "seconds": seconds,
                     "rate": moved / seconds, "of_copy": moved / seconds / copy_rate})  # fmt: skip
        print(
            f"{name:14} {kind.name:24} {update} step in 3 launches: {moved / elements:.0f} B per element, "
            f"{moved / seconds / copy_rate:.1%} of copy"
        )
    return rows


def plot(rows: list[dict[str, Any]], title: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 4.5), layout="constrained")
    for kind in dict.fromkeys(r["kind"] for r in rows):
        for primitive in ("norm", "perturb", *UPDATES):
            mine = [r for r in rows if r["pass"] == primitive and r["kind"] == kind]
            fractions = [100 * r["of_copy"] for r in mine]
            axes.plot([r["elements"] for r in mine], fractions, "o-", label=f"{primitive}, {kind}")
    axes.set(xscale="log", xlabel="elements", ylabel="% of the copy rate", title=title)
    axes.axhline(100, color="grey", linewidth=0.8)
    axes.legend(fontsize="x-small", ncols=2)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--backend", choices=("cuda", "triton"), default="cuda")
    parser.add_argument("--label", default="")
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    require_gpu(parser)
    folder: Path = arguments.out
    label = arguments.label or (arguments.backend if arguments.backend != "cuda" else "")
    stem = f"kernels-{label}" if label else "kernels"
    shapes, kinds = (BOTH, KINDS[:2]) if arguments.quick else (tuple(SHAPES), KINDS)
    clock = Clock()
    copy_rate = clock.copy_rate()
    report = {**head(), "backend": arguments.backend, "copy_rate": copy_rate, "launch_seconds": clock.launch}
    print(
        f"{report['device']}, torch {report['torch']}, commit {report['commit']}; device-to-device copy of 512 MB: "
        f"{copy_rate / 1e9:.0f} GB/s; an empty launch takes {clock.launch * 1e6:.1f} us, which is subtracted"
    )
    folder.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for shape in sorted(shapes, key=lambda name: name not in BOTH):  # those that decide something come first
        for kind in kinds:
            if shape in kind.shapes:
                rows += measure(arguments.backend, shape, kind, clock, copy_rate)
                report["rows"] = rows
                (folder / f"{stem}.json").write_text(json.dumps(report, indent=1) + "\n")
                torch.cuda.empty_cache()
    try:
        plot(rows, f"{report['device']}: bytes moved, of copy_'s rate", folder / f"{stem}.png")
    except ImportError as error:
        print(f"no plot: {error}")


if __name__ == "__main__":
    main()
