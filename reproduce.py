"""Train, evaluate and tabulate: every number of the README's tables comes from this script.

    python reproduce.py                                       # the three scripts, 5 seeds each, one after the other
    python reproduce.py --suite ablations --seeds 3 --jobs 2  # what SAC's flags buy

Each run is evaluated on 1,000 held-out test episodes, by its last checkpoint. Rows that are in results/SUITE_runs.csv
already are not run again. Writes results/SUITE_runs.csv (a row per run), results/SUITE_curves.csv (a row per evaluation
in the course of a training), results/SUITE.md and results/SUITE.png.
"""

import csv
import json
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

from eval import fail

ROOT = Path(__file__).resolve().parent
PURE_RL = "ppo.py --num-envs 64 --minibatch-size 512 --total-timesteps 1000000"
SHORT_SAC = "sac_residual.py --total-timesteps 20000 --eval-freq 10000"
SUITES = {  # suite: method: command
    "scripts": {
        "PPO residual": "ppo_residual.py",
        "SAC residual": "sac_residual.py",
        "PPO, pure RL, reach term": f"{PURE_RL} --reach-weight -1",
        "PPO, pure RL, published reward": f"{PURE_RL} --init-std 1",
    },
    "ablations": {
        "SAC residual, 20k steps": SHORT_SAC,
        "- without noise in the warm-up": f"{SHORT_SAC} --warmup-std 0",
        "- without warm-up": f"{SHORT_SAC} --learning-starts 256",
        "- without zero-initialised mean": f"{SHORT_SAC} --no-zero-init",
        "- without layer normalisation": f"{SHORT_SAC} --no-layer-norm",
        "- without the base action as input": f"{SHORT_SAC} --no-base-input",
        "- with 1-step returns": f"{SHORT_SAC} --n-step 1",
        "- with half the updates": f"{SHORT_SAC} --utd 0.25",
        "- with a fixed temperature": f"{SHORT_SAC} --no-autotune",
        "- with progressive exploration": f"{SHORT_SAC} --prog-explore 10000",
    },
}
RUN_COLUMNS = (
    "method", "command", "seed", "commit", "machine", "steps", "seconds", "success", "base_success", "steps_to_90",
    "seconds_to_90", "median_time_to_success_s",
)  # fmt: skip
CURVE_COLUMNS = ("method", "seed", "step", "seconds", "success")


@dataclass
class Args:
    suite: str = "scripts"
    """what to run: scripts or ablations"""
    only: str = ""
    """run only the methods whose name contains this"""
    seeds: int = 5
    """seeds per method, from 1"""
    jobs: int = 1
    """runs at a time; with more than one no seconds are recorded"""
    episodes: int = 1000
    """held-out test episodes of each run"""
    dry_run: bool = False
    """print the commands and run nothing"""


def read_rows(path: Path) -> list[dict]:
    """The rows of a CSV file; none if there is no file."""
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write_rows(path: Path, columns: Iterable[str], rows: list[dict]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def first_at(curve: list[dict], success: float) -> dict | None:
    """The first evaluation of a curve at which the success rate is reached."""
    return next((point for point in curve if float(point["success"]) >= success), None)


def run(method: str, command: str, seed: int, episodes: int, commit: str, timed: bool) -> tuple[dict, list[dict]]:
    """Train and evaluate; returns the row of the run and those of its curve, with seconds if `timed`."""
    script, *flags = shlex.split(command)
    line = [sys.executable, str(ROOT / script), *flags, "--seed", str(seed), "--test-episodes", str(episodes)]
    line += ["--exp-name", re.sub(r"\W+", "_", method)]  # so that runs side by side do not share a folder
    done = subprocess.run(line, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{command} --seed {seed} ended with exit code {done.returncode}: {done.stderr[-500:]}")
    run_dir = Path(re.search(r"^wrote (\S+);", done.stdout, re.MULTILINE)[1])
    results = json.loads((run_dir / "results.json").read_text())
    *base, policy = results["policies"].values()
    points = results["evaluations"]
    curve = [
        {
            "method": method,
            "seed": seed,
            "step": point["global_step"],
            "seconds": round(point["seconds"], 1) if timed else "",
            "success": point["success_rate"],
        }
        for point in points
    ]
    first = first_at(curve, 0.9) or {"step": "", "seconds": ""}
    return {
        "method": method,
        "command": command,
        "seed": seed,
        "commit": commit,
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "steps": points[-1]["global_step"],
        "seconds": round(points[-1]["seconds"], 1) if timed else "",
        "success": policy["success_rate"],
        "base_success": base[0]["success_rate"] if base else "",
        "steps_to_90": first["step"],
        "seconds_to_90": first["seconds"],
        "median_time_to_success_s": policy["median_time_to_success_s"],
    }, curve


def format_markdown(runs: list[dict]) -> str:
    """A table with a row per method: every seed's success, and medians over the seeds that have the figure."""
    lines = [
        "| method | success of each seed, % | mean | seeds that reach 90 % | after steps | and s | training, s "
        "| time to success, s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for method in dict.fromkeys(row["method"] for row in runs):
        rows = [row for row in runs if row["method"] == method]
        success = [100 * float(row["success"]) for row in rows]

        def median(column, digits=0, rows=rows):
            values = [float(row[column]) for row in rows if row[column] not in ("", None)]
            return f"{np.median(values):,.{digits}f}" if values else "-"

        reached = sum(row["steps_to_90"] != "" for row in rows)
        cells = [method, ", ".join(f"{s:.1f}" for s in success), f"{np.mean(success):.1f}"]
        cells += [f"{reached} of {len(rows)}", median("steps_to_90"), median("seconds_to_90"), median("seconds")]
        cells += [median("median_time_to_success_s", digits=1)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def plot(runs: list[dict], curves: list[dict], path: Path) -> None:
    """Success against steps and against seconds, a line per seed, with the base as a horizontal line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained", sharey=True)
    base = np.mean([float(row["base_success"]) for row in runs if row["base_success"] not in ("", None)])
    for axis, column in zip(axes, ("step", "seconds"), strict=True):
        for k, method in enumerate(dict.fromkeys(row["method"] for row in runs)):
            for i, seed in enumerate(row["seed"] for row in runs if row["method"] == method):
                points = [p for p in curves if p["method"] == method and str(p["seed"]) == str(seed)]
                points = [p for p in points if p[column] != ""]  # runs side by side have no times
                x, y = ([float(p[name]) for p in points] for name in (column, "success"))
                style = {"color": f"C{k}", "linewidth": 1, "alpha": 0.8, "where": "post"}  # nothing known in between
                axis.step(x, y, **style, label=method if i == 0 else None)
        axis.axhline(base, color="black", linestyle=":", label="base alone, test episodes")
        axis.set(xlabel={"step": "environment steps", "seconds": "seconds of training"}[column], xscale="symlog")
        axis.grid(alpha=0.3)
    axes[0].set(ylabel="success on validation episodes", ylim=(-0.02, 1.02), xlim=(3000, None))
    axes[1].set_xlim(3, None)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize="small")
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main(args: Args) -> None:
    runs_path, curves_path = (Path("results") / f"{args.suite}_{kind}.csv" for kind in ("runs", "curves"))
    runs, curves = read_rows(runs_path), read_rows(curves_path)
    done = {(row["method"], row["command"], row["seed"]) for row in runs}
    matrix = [
        (method, command, seed)
        for seed in range(1, args.seeds + 1)
        for method, command in SUITES[args.suite].items()
        if args.only in method and (method, command, str(seed)) not in done
    ]
    if args.dry_run:
        print("\n".join(f"python {command} --seed {seed}" for _, command, seed in matrix))
        return
    runs_path.parent.mkdir(exist_ok=True)
    git = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.run(git, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    order = list(SUITES[args.suite])
    with ThreadPoolExecutor(args.jobs) as pool:
        for future in [pool.submit(run, *job, args.episodes, commit, args.jobs == 1) for job in matrix]:
            row, curve = future.result()
            runs, curves = [*runs, row], [*curves, *curve]
            for rows in (runs, curves):
                rows.sort(key=lambda r: (order.index(r["method"]), int(r["seed"])))
            write_rows(curves_path, CURVE_COLUMNS, curves)
            write_rows(runs_path, RUN_COLUMNS, runs)
            print(f"{row['method']}, seed {row['seed']}: {100 * row['success']:.1f} %", flush=True)
    table = format_markdown(runs)
    print(table)
    (runs_path.parent / f"{args.suite}.md").write_text(table)
    plot(runs, curves, runs_path.parent / f"{args.suite}.png")


if __name__ == "__main__":
    args = tyro.cli(Args)
    if args.suite not in SUITES or min(args.seeds, args.jobs, args.episodes) < 1:
        fail(f"--suite must be one of {', '.join(SUITES)}, and --seeds, --jobs and --episodes at least 1")
    main(args)
