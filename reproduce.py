"""Every number of the tables in README and docs comes from this script: train, evaluate, tabulate, compare.

    pip install submitit==1.5.4
    python reproduce.py                            # suite paper: three scripts, 10 seeds, 70 minutes on two cores
    python reproduce.py --suite ablations          # what the flags of the residual buy
    python reproduce.py --suite paper --executor slurm --slurm-partition gpu
    python reproduce.py --suite paper --dry-run    # the commands, and nothing else

Each run is judged by its last checkpoint, on held-out test episodes. Writes results/SUITE_runs.csv (a row per run),
SUITE_curves.csv (a row per evaluation during a training), SUITE_curves.png, SUITE_success.png, and table.md, of all
suites. Runs that are whole in there are not repeated: to measure all of it anew, choose another --output-dir.
"""

import csv
import io
import json
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import numpy as np
from scipy.stats import binomtest, bootstrap, mannwhitneyu

from figures import pyplot, save_figure
from runs import ROOT, Flags, UserError, Whole, available_cores, fingerprint, load_checkpoint, lock, parse, write_whole

PURE_RL = (
    "ppo.py --total-timesteps 1000000 --eval-freq 98304 --reach-weight -1 --distance-weight -5 --force-weight -0.01 "
    "--no-move-gripper --clip-coef 0.2"
)
SHORT_PPO = "ppo_residual.py --total-timesteps 100000"  # stopped while it still learns
FORMER_SAC = "--no-anneal-lr --orientation-weight -0.1 --reach-weight 0"
SHORT_SAC = f"sac_residual.py --total-timesteps 20000 --eval-freq 10000 {FORMER_SAC}"
QUICK = "--total-timesteps 1024 --num-envs 8 --eval-episodes 4"
RECORD = "record_demos.py --model-path assets/ppo_residual.safetensors --num-episodes 100 --output-dir"
ALPHA = "ppo_residual.py --alpha 0.3"
ACT = "--il-checkpoint assets/act.safetensors"
DIFFUSION = "--il-checkpoint assets/diffusion_policy.safetensors"
BLEND = f"{ACT} --hybrid-bases jacobian il --hybrid-weights 0.7 0.3"
ANYWHERE = "--randomize-xy 0.08 --randomize-yaw 1.5708"  # x 0.11 to 0.27 m, y -0.17 to -0.01 m, all yaws that differ
# Long runs from before these were the defaults, with the flags that they had then
SPELLED = "--orientation-weight -1 --clip-coef 0.05 --gae-lambda 0.98 --num-envs 64 --num-steps 64"
PRECISE = f"ppo_residual.py --tape-half-size 0.076 {SPELLED}"
STARTS = f"ppo_residual.py --alpha 1 {SPELLED} --total-timesteps 2000000 --eval-freq 196608 {ANYWHERE}"


@dataclass(frozen=True)
class Suite:
    methods: dict[str, str]
    """command of each method, by its name"""
    references: tuple[str, ...]
    """methods that the others are compared with"""
    seeds: int = 3
    """seeds of each method; a base policy alone is deterministic and has one"""
    episodes: int = 1000
    """held-out test episodes that each run is judged by"""
    demos: bool = False
    """whether commands name "demos": demonstrations of the residual in assets/, which are recorded first"""


SUITES = {
    "paper": Suite(
        {
            "base alone": "eval.py --policy jacobian",
            "pure RL (PPO)": PURE_RL,
            "residual, SAC": "sac_residual.py",
            "residual, PPO": "ppo_residual.py",
        },
        references=("base alone", "pure RL (PPO)"),
        seeds=10,
    ),
    "arm": Suite(
        {
            "every arm, base alone": "eval.py --policy jacobian",
            "every arm, residual": "ppo_residual.py",
            "nominal arm, base alone": "eval.py --policy jacobian --randomize-arm False",
            "nominal arm, residual": "ppo_residual.py --no-randomize-arm",
            "measured joints seen too": "ppo_residual.py --observe-measured",
            "force is free": "ppo_residual.py --force-weight 0",
        },
        references=("every arm, residual",),
    ),
    "bases": Suite(
        {
            "half speed": "eval.py --policy hybrid",
            "half speed + residual": "ppo_residual.py --base-policy hybrid",
            "Jacobian": "eval.py --policy jacobian",
            "Jacobian + residual": "ppo_residual.py",
        },
        references=("Jacobian", "Jacobian + residual"),
        seeds=5,
    ),
    "imitation": Suite(
        {
            "ACT, 25 demonstrations": "act.py --dataset demos --torch-threads 1 --num-demos 25",
            "ACT, 100 demonstrations": "act.py --dataset demos --torch-threads 1",
            "diffusion, 25 demonstrations": "diffusion_policy.py --dataset demos --torch-threads 1 --num-demos 25",
            "diffusion, 100 demonstrations": "diffusion_policy.py --dataset demos --torch-threads 1",
            "Jacobian": "eval.py --policy jacobian",
            "Jacobian + residual": ALPHA,
            "ACT": f"eval.py --policy il {ACT}",
            "ACT + residual": f"{ALPHA} --base-policy il {ACT}",
            "diffusion": f"eval.py --policy il {DIFFUSION}",
            "diffusion + residual": f"{ALPHA} --base-policy il {DIFFUSION}",
            "Jacobian and ACT": f"eval.py --policy hybrid {BLEND}",
            "Jacobian and ACT + residual": f"{ALPHA} --base-policy hybrid {BLEND}",
        },
        references=("Jacobian", "ACT", "diffusion", "Jacobian and ACT"),
        demos=True,
    ),
    "ablations": Suite(
        {
            "PPO residual, 100k steps": SHORT_PPO,
            "alpha 0.1": SHORT_PPO + " --alpha 0.1",
            "alpha 1.0": SHORT_PPO + " --alpha 1",
            "act_scale 0.01": SHORT_PPO + " --act-scale 0.01",
            "clipping range 0.2": SHORT_PPO + " --clip-coef 0.2",
            "lambda 0.95": SHORT_PPO + " --gae-lambda 0.95",
            "orientation weight -0.1": SHORT_PPO + " --orientation-weight -0.1",
            "constant step size": SHORT_PPO + " --no-anneal-lr",
            "curriculum": SHORT_PPO + " --curriculum",
            "trained without randomisation": SHORT_PPO + " --no-randomize",
            "base action not shown": SHORT_PPO + " --no-base-input",
            "critic starts at zero": SHORT_PPO + " --no-value-init",
        },
        references=("PPO residual, 100k steps",),
        episodes=500,
    ),
    "sac": Suite(
        {
            "SAC residual, 20k steps": SHORT_SAC,
            "no noise in the warm-up": SHORT_SAC + " --warmup-std 0",
            "no warm-up": SHORT_SAC + " --learning-starts 256",
            "mean not zero at the start": SHORT_SAC + " --no-zero-init",
            "no layer normalisation": SHORT_SAC + " --no-layer-norm",
            "base action not shown": SHORT_SAC + " --no-base-input",
            "1-step returns": SHORT_SAC + " --n-step 1",
            "half the updates": SHORT_SAC + " --utd 0.25",
            "fixed temperature": SHORT_SAC + " --no-autotune",
            "progressive exploration": SHORT_SAC + " --prog-explore 10000",
            "SAC residual": "sac_residual.py",
            "constant step size": "sac_residual.py --no-anneal-lr",
            "reach not rewarded": "sac_residual.py --reach-weight 0",
            "all three as before": f"sac_residual.py {FORMER_SAC}",
        },
        references=("SAC residual, 20k steps",),
    ),
    "starts": Suite(
        {
            "nominal start, base alone": "eval.py --policy jacobian",
            "nominal start, residual": "ppo_residual.py",
            "any start, base alone": f"eval.py --policy jacobian {ANYWHERE}",
            "any start, residual, 2M steps": STARTS,
        },
        references=("nominal start, residual",),
        seeds=5,
    ),
    "precision": Suite(
        {
            "clearance 6 mm, base alone": "eval.py --policy jacobian",
            "clearance 6 mm, residual": "ppo_residual.py",
            "clearance 4 mm, base alone": "eval.py --policy jacobian --tape-half-size 0.078",
            "clearance 4 mm, residual": "ppo_residual.py --tape-half-size 0.078",
            "clearance 2 mm, base alone": "eval.py --policy jacobian --tape-half-size 0.076",
            "clearance 2 mm, residual, 600k steps": f"{PRECISE} --total-timesteps 600000",
        },
        references=("clearance 6 mm, residual",),
        seeds=5,
    ),
    "quick": Suite(
        {
            "base alone": "eval.py --policy jacobian",
            "pure RL (PPO)": f"ppo.py {QUICK} --num-steps 16 --minibatch-size 64",
            "residual, SAC": f"sac_residual.py {QUICK} --learning-starts 512 --batch-size 32",
            "residual, PPO": f"ppo_residual.py {QUICK} --num-steps 16 --minibatch-size 64",
        },
        references=("base alone",),
        seeds=2,
        episodes=8,
    ),
}
PACKAGES = ("mujoco", "numpy", "torch")
RUN_COLUMNS = (
    "method", "command", "seed", "commit", "versions", "machine", "cores", "side_by_side", "steps", "training_s",
    "wall_clock_s", "episodes", "failed_episodes", "median_time_to_success_s", "checksum",
)  # fmt: skip
CURVE_COLUMNS = ("method", "seed", "step", "training_s", "success")


@dataclass
class Args(Flags):
    suite: Literal[tuple(SUITES)] = "paper"
    """what to run"""
    only: str = ""
    """run only the methods whose name contains this"""
    seeds: Whole[0, 1000] = 0
    """seeds per method, from 1; 0 takes the suite's own number"""
    episodes: Whole[0, 10**6] = 0
    """held-out test episodes of each run; 0 takes the suite's own number"""
    cores_per_run: Whole[1, 1024] = 1
    """cores of each run; as many runs go side by side as the machine has cores for"""
    executor: Literal["local", "slurm"] = "local"
    """where the runs go: this machine, or a SLURM cluster, through submitit"""
    slurm_partition: str = ""
    """partition of the cluster"""
    timeout_min: Whole[1, 10**6] = 240
    """longest that a run may take, minutes"""
    output_dir: str = "results"
    """folder of the results; the project's own are in results, and what is there is not run again"""
    dry_run: bool = False
    """print the commands and run nothing"""


# Runs


def demos_folder() -> Path:
    """Where the demonstrations of a suite lie: named after the policy and the command that they are recorded by."""
    policy = load_checkpoint("assets/ppo_residual.safetensors")
    return Path("runs", f"demos_{fingerprint([RECORD, policy])[:12]}")


def record_demos() -> None:
    """Record them, whole or not at all, unless they are there."""
    folder = demos_folder()
    if not folder.exists():
        part = folder.with_suffix(".part")
        shutil.rmtree(part, ignore_errors=True)  # of one that was stopped
        script, *flags = shlex.split(RECORD)
        subprocess.run([sys.executable, str(ROOT / script), *flags, str(part)], check=True)
        part.rename(folder)


def commands(method: str, command: str, seed: int, episodes: int, cores: int) -> list[list[str]]:
    """What one run executes: the training, if there is one, and the evaluation of its last checkpoint."""
    script, *flags = shlex.split(command)
    flags = [str(demos_folder()) if flag == "demos" else flag for flag in flags]
    name = re.sub(r"\W+", "_", method)  # runs side by side must not share a folder
    evaluate = ["eval.py", "--n-episodes", str(episodes), "--num-threads", str(cores)]
    if script == "eval.py":
        return [[*evaluate, *flags, "--output-dir", f"runs/{name}"]]
    train = [script, *flags, "--seed", str(seed), "--num-threads", str(cores)]
    train += ["--exp-name", name, "--test-episodes", "1"]
    return [train, [*evaluate, "--model-path", f"runs/{name}__{seed}__TIME/last.safetensors"]]


def run(lines: list[list[str]]) -> tuple[dict, list[dict]]:
    """Execute what `commands` returned; returns the columns of its row that are measured, and the rows of its curve.

    It may run on another machine, by what submitit pickled of it: it uses nothing of this project's other modules.
    """
    start = time.perf_counter()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()

    def execute(line):
        environment = {**os.environ, "TQDM_DISABLE": "1"}
        line = [sys.executable, str(ROOT / line[0]), *line[1:]]
        done = subprocess.run(line, capture_output=True, text=True, env=environment)
        if done.returncode:
            raise RuntimeError(f"{shlex.join(line)} ended with exit code {done.returncode}: {done.stderr[-500:]}")
        return done.stdout

    *train, evaluate = lines
    folder, evaluations = Path(tempfile.mkdtemp(dir="runs")), []  # another process may play the same base
    evaluate[-1] = str(folder)
    if train:
        run_dir = Path(re.search(r"^wrote (.+)$", execute(train[0]), re.MULTILINE)[1])
        evaluations = json.loads((run_dir / "results.json").read_text())["evaluations"]
        folder = run_dir / "test"
        evaluate[-1:] = [str(run_dir / "last.safetensors"), "--output-dir", str(folder)]
    execute(evaluate)
    (policy,) = json.loads((folder / "results.json").read_text())["policies"].values()
    row = {
        "versions": ", ".join(
            [f"python {platform.python_version()}", *(f"{name} {version(name)}" for name in PACKAGES)]
        ),
        "machine": f"{platform.system()} {platform.machine()}, {cores} cores",
        "steps": evaluations[-1]["global_step"] if evaluations else 0,
        "training_s": round(evaluations[-1]["seconds"], 1) if evaluations else 0,
        "wall_clock_s": round(time.perf_counter() - start, 1),
        "episodes": len(policy["episodes"]),
        "failed_episodes": " ".join(str(k) for k, e in enumerate(policy["episodes"]) if not e["success"]),
        "median_time_to_success_s": policy["median_time_to_success_s"],
    }
    curve = [
        {"step": e["global_step"], "training_s": round(e["seconds"], 1), "success": e["success_rate"]}
        for e in evaluations
    ]
    return row, curve


# Rows


def checksum(row: dict, curve: list[dict]) -> str:
    """CRC-32 of a run's row and of the rows of its curve, as they stand in the files."""
    cells = [row[name] for name in RUN_COLUMNS if name != "checksum"]
    cells += [point[name] for point in curve for name in CURVE_COLUMNS]
    return f"{zlib.crc32(json.dumps(cells).encode()):08x}"


def of_run(row: dict, curves: list[dict]) -> list[dict]:
    """The rows of a run's curve."""
    return [point for point in curves if (point["method"], point["seed"]) == (row["method"], row["seed"])]


def by_method(runs: list[dict]) -> dict[str, list[dict]]:
    """The rows of each method, in the order in which the methods come."""
    methods = dict.fromkeys(row["method"] for row in runs)
    return {method: [row for row in runs if row["method"] == method] for method in methods}


def read_rows(suite: str, folder: Path) -> tuple[list[dict], list[dict]]:
    """The rows of a suite's runs and of their curves, all cells as text; damaged ones are left out, and said so."""

    def read(kind, columns):
        path = folder / f"{suite}_{kind}.csv"
        if not path.is_file():
            return []
        with path.open(newline="", encoding="utf-8", errors="replace") as file:
            rows = list(csv.DictReader((line.replace("\0", "") for line in file), restval=""))
        return [row if set(row) == {*columns} else dict.fromkeys(columns, "") for row in rows]

    runs, curves = read("runs", RUN_COLUMNS), read("curves", CURVE_COLUMNS)
    whole = [row for row in runs if row["checksum"] == checksum(row, of_run(row, curves))]
    if len(whole) < len(runs):
        print(f"results of {suite}: {len(runs) - len(whole)} of {len(runs)} rows are damaged", file=sys.stderr)
    return whole, [point for row in whole for point in of_run(row, curves)]


def write_rows(suite: str, runs: list[dict], curves: list[dict], folder: Path) -> None:
    """Write both files, each whole or not at all; the runs last, so that none of them lacks its curve."""
    order = list(SUITES[suite].methods)
    for kind, columns, rows in (("curves", CURVE_COLUMNS, curves), ("runs", RUN_COLUMNS, runs)):
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(sorted(rows, key=lambda row: (order.index(row["method"]), int(row["seed"]))))
        write_whole(folder / f"{suite}_{kind}.csv", partial(Path.write_bytes, data=text.getvalue().encode()))


# Statistics


def solved(rows: list[dict]) -> np.ndarray:
    """Whether each run solved each test episode, (runs, episodes) of 0 and 1; UserError if they played others."""
    if len({row["episodes"] for row in rows}) > 1:
        raise UserError(f"{rows[0]['method']}: its runs were judged by different numbers of episodes")
    outcomes = np.ones((len(rows), int(rows[0]["episodes"])))
    for outcome, row in zip(outcomes, rows, strict=True):
        outcome[[int(k) for k in row["failed_episodes"].split()]] = 0.0
    return outcomes


def interquartile_mean(x, axis=-1):
    """Mean of the middle half; a run that the quarters cut counts by its part in it."""
    x = np.sort(np.moveaxis(np.asarray(x, dtype=float), axis, -1))
    n = x.shape[-1]
    parts = np.minimum(np.arange(1, n + 1), 0.75 * n) - np.maximum(np.arange(n), 0.25 * n)  # of each run
    return x @ parts.clip(0) / (n / 2)


def probability_of_improvement(x, y, axis=-1):
    """P(X > Y) + P(X = Y) / 2 for a run of each, from Mann and Whitney's U."""
    return mannwhitneyu(x, y, axis=axis, method="asymptotic").statistic / (np.shape(x)[axis] * np.shape(y)[axis])


def interval(statistic, *samples) -> tuple[float, float]:
    """95 % percentile bootstrap interval; each sample is a stratum, drawn from on its own."""
    samples = [np.repeat(sample, 2) if len(sample) == 1 else sample for sample in samples]  # deterministic: one run
    result = bootstrap(samples, statistic, n_resamples=10_000, method="percentile", batch=500, rng=0)
    return tuple(result.confidence_interval)


def percent(value: float, bounds=None, digits: int = 1) -> str:
    text = f"{100 * value:.{digits}f}"
    return text if bounds is None else f"{text} ({100 * bounds[0]:.{digits}f} to {100 * bounds[1]:.{digits}f})"


def first_at(curve: list[dict], success: float) -> dict | None:
    """The first evaluation of a curve at which the success rate is reached."""
    return next((point for point in curve if float(point["success"]) >= success), None)


def format_methods(runs: list[dict], curves: list[dict]) -> str:
    """A row per method: success over its seeds, its worst seed, and how soon it learned."""
    lines = [
        "| method | runs | success, mean | interquartile mean | worst run | reach 90 % | at step | time to success |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for method, rows in by_method(runs).items():
        outcomes = solved(rows)
        success = outcomes.mean(axis=1)
        worst = binomtest(int(outcomes.sum(axis=1).min()), outcomes.shape[1]).proportion_ci(method="wilson")
        cells = [method, str(len(rows)), percent(success.mean()), percent(interquartile_mean(success))]
        if len(rows) > 1:
            cells[2:] = [percent(s(success, axis=-1), interval(s, success)) for s in (np.mean, interquartile_mean)]
        cells.append(percent(success.min(), worst))
        reached = [first_at(of_run(row, curves), 0.9) for row in rows]
        steps = [int(point["step"]) for point in reached if point]
        trained = int(rows[0]["steps"]) > 0
        cells.append(f"{len(steps)} of {len(rows)}" if trained else "-")
        cells.append(f"{np.median(steps):,.0f}" if steps else "-")
        times = [float(row["median_time_to_success_s"]) for row in rows if row["median_time_to_success_s"]]
        cells.append(f"{np.median(times):.1f} s" if times else "-")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def format_comparisons(runs: list[dict], references: tuple[str, ...]) -> str:
    """A row per method and reference: the difference on the same episodes, and the probability of improvement."""
    lines = ["| method | against | difference, points | probability of improvement |", "|---|---|---|---|"]
    methods = by_method(runs)
    for k, reference in enumerate(references):
        for method in methods:
            if method in references[: k + 1] or reference not in methods:  # each pair once
                continue
            pair = methods[method], methods[reference]
            x, y = (solved(rows) for rows in pair)
            if x.shape[1] != y.shape[1]:
                lines.append(f"| {method} | {reference} | judged by other episodes | - |")
                continue
            paired = x.mean(axis=0) - y.mean(axis=0)  # (episodes,)
            difference = percent(paired.mean(), interval(np.mean, paired))
            x, y = x.mean(axis=1), y.mean(axis=1)
            seeds_differ = all(len(rows) > 1 or rows[0]["steps"] == "0" for rows in pair)  # else one seed says nothing
            bounds = interval(probability_of_improvement, x, y) if seeds_differ else None
            better = percent(probability_of_improvement(x, y), bounds, digits=0)
            lines.append(f"| {method} | {reference} | {difference} | {better} |")
    return "\n".join(lines) + "\n"


def format_suite(suite: str, runs: list[dict], curves: list[dict]) -> str:
    """The section of a suite in results/table.md."""
    commits = ", ".join(dict.fromkeys(row["commit"] for row in runs))
    episodes = " and ".join(dict.fromkeys(row["episodes"] for row in runs))
    head = f"## {suite}\n\n`python reproduce.py --suite {suite}`, {episodes} test episodes per run, at {commits}.\n"
    return "\n".join([head, format_methods(runs, curves), format_comparisons(runs, SUITES[suite].references)])


def format_everything(folder: Path) -> str:
    """The text of table.md, from the CSV files of all suites that have any."""
    suites = [suite for suite in SUITES if (folder / f"{suite}_runs.csv").is_file()]
    sections = [format_suite(suite, *read_rows(suite, folder)) for suite in suites]
    legend = "Success in %, with 95 % intervals in brackets; definitions in docs/results.md.\n"
    return "\n".join(["# Results\n", legend, *sections])


# Figures


def colours(methods) -> dict[str, tuple]:
    from matplotlib import colormaps

    palette = colormaps["tab10" if len(methods) <= 10 else "tab20"]
    return {method: palette(k) for k, method in enumerate(methods)}


def plot_curves(runs: list[dict], curves: list[dict], path: Path) -> None:
    """Success against steps: the mean over the seeds with its bootstrap band, and a thin line per seed."""
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(9, 4.6), layout="constrained")
    methods = by_method(runs)
    for method, colour in colours(methods).items():
        rows = methods[method]
        if "--dataset" in rows[0]["command"]:  # steps of imitation are gradient steps
            continue
        if not of_run(rows[0], curves):  # nothing was trained
            success = solved(rows).mean()
            axis.axhline(success, color=colour, linestyle=":", label=f"{method} (test episodes)")
            continue
        steps = [int(point["step"]) for point in of_run(rows[0], curves)]
        lines = np.array([[float(point["success"]) for point in of_run(row, curves)] for row in rows])
        axis.plot(steps, lines.T, color=colour, linewidth=0.6, alpha=0.35)
        axis.plot(steps, lines.mean(axis=0), color=colour, linewidth=2, marker="o", markersize=4, label=method)
        if len(rows) > 1:
            band = np.array([interval(np.mean, column) for column in lines.T])
            axis.fill_between(steps, band[:, 0], band[:, 1], color=colour, alpha=0.2, linewidth=0)
    axis.set_xscale("symlog", linthresh=10_000)  # with the start, where the residuals are at the base's success
    axis.set(xlabel="environment steps", ylabel="success on validation episodes", xlim=(0, None), ylim=(-0.02, 1.02))
    axis.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=3, fontsize="small")
    save_figure(figure, path, dpi=100)


def plot_success(runs: list[dict], path: Path) -> None:
    """Success on the test episodes, by method: a dot per run, the interquartile mean and its interval."""
    plt = pyplot()
    methods = by_method(runs)
    figure, axis = plt.subplots(figsize=(9, 1.2 + 0.36 * len(methods)), layout="constrained")
    for k, (method, colour) in enumerate(colours(methods).items()):
        success = solved(methods[method]).mean(axis=1)
        offsets = np.linspace(-0.25, 0.25, len(success)) if len(success) > 1 else [0.0]
        axis.scatter(success, k + np.array(offsets), s=14, color=colour, alpha=0.6)
        if len(success) > 1:
            axis.plot(interval(interquartile_mean, success), [k, k], color=colour, linewidth=5, alpha=0.4)
            axis.plot(interquartile_mean(success), k, "|", color=colour, markersize=16, markeredgewidth=3)
    axis.set(xlim=(-0.02, 1.02), yticks=range(len(methods)), yticklabels=methods)
    axis.set_xlabel("success on test episodes: runs, interquartile mean with 95 % interval")
    axis.invert_yaxis()
    axis.grid(alpha=0.3, axis="x")
    save_figure(figure, path, dpi=100)


def current_commit() -> str:
    """Short hash of the project's commit, with -dirty if a script or a model is not as committed."""

    def git(*arguments):
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", "*.py", "assets")
    return (git("rev-parse", "--short", "HEAD") or "unknown") + ("-dirty" if changed else "")


def as_they_end(executor, matrix: list[tuple], at_once: int, *arguments) -> Iterator[tuple]:
    """Submit `run` for every (method, command, seed); yields them with their jobs, which are cancelled if this ends."""
    waiting, running = list(matrix), {}
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                key = waiting.pop(0)
                running[key] = executor.submit(run, commands(*key, *arguments))
            for key in [key for key, job in running.items() if job.done()]:
                yield *key, running.pop(key)
            time.sleep(0.5)
    finally:
        for job in running.values():
            job.cancel()


def main(args: Args) -> int:
    """Run what is missing and write the results; returns how many runs failed."""
    suite, cores, folder = SUITES[args.suite], args.cores_per_run, Path(args.output_dir)
    episodes, seeds = args.episodes or suite.episodes, args.seeds or suite.seeds
    if not args.dry_run:
        folder.mkdir(parents=True, exist_ok=True)
        lock(folder)
    runs, curves = read_rows(args.suite, folder)
    runs = [row for row in runs if suite.methods.get(row["method"]) == row["command"]]  # not of an earlier suite
    if others := {row["episodes"] for row in runs} - {str(episodes)}:
        held = f"{folder} holds runs of this suite that were judged by {others.pop()} episodes, not {episodes}"
        raise UserError(f"{held}: choose another --output-dir")
    done = {(row["method"], row["seed"]) for row in runs}
    matrix = [
        (method, command, seed)
        for seed in range(1, seeds + 1)
        for method, command in suite.methods.items()
        if args.only in method and (method, str(seed)) not in done and (seed == 1 or "eval.py" not in command)
    ]

    def keep(row, curve):
        """Add a run and its curve, or replace what was there, and write everything."""
        key = {"method": row["method"], "seed": row["seed"]}
        row, *curve = (
            {name: "" if cell is None else str(cell) for name, cell in cells.items()}
            for cells in (row, *(point | key for point in curve))
        )
        runs[:] = [other for other in runs if (other["method"], other["seed"]) != (row["method"], row["seed"])]
        curves[:] = [point for other in runs for point in of_run(other, curves)] + curve
        runs.append(row | {"checksum": checksum(row, curve)})
        write_rows(args.suite, runs, curves, folder)

    if args.dry_run:
        if suite.demos and matrix:
            print(f"python {RECORD} {shlex.quote(str(demos_folder()))}")
        for job in matrix:
            print("\n".join(f"python {shlex.join(line)}" for line in commands(*job, episodes, cores)))
        return 0
    try:
        import submitit
    except ImportError as error:
        raise UserError("reproduce.py hands its runs to submitit: pip install submitit==1.5.4") from error
    try:
        executor = submitit.AutoExecutor("runs/submitit", cluster=args.executor)
    except RuntimeError as error:  # no SLURM here
        raise UserError(str(error)) from error
    executor.update_parameters(timeout_min=args.timeout_min, cpus_per_task=cores, name=f"paper_square_{args.suite}")
    if args.slurm_partition:
        executor.update_parameters(slurm_partition=args.slurm_partition)
    at_once = available_cores() // cores if args.executor == "local" else len(matrix)  # a cluster has its own queue
    for other in (name for name in SUITES if name != args.suite):  # the same run may stand in another suite
        rows, points = read_rows(other, folder)
        theirs = {(row["command"], row["seed"], row["episodes"]): row for row in rows}
        for method, command, seed in list(matrix):
            row = theirs.get((command, str(seed), str(episodes)))
            if row:
                keep(row | {"method": method}, of_run(row, points))
                matrix.remove((method, command, seed))
    if suite.demos and matrix:
        record_demos()
    facts = {"commit": current_commit(), "cores": cores, "side_by_side": min(at_once, len(matrix))}
    start, failures = time.perf_counter(), 0
    print(f"{len(matrix)} runs, {facts['side_by_side']} side by side; {len(done)} done before", flush=True)
    for method, command, seed, job in as_they_end(executor, matrix, at_once, episodes, cores):
        minutes = f"{(time.perf_counter() - start) / 60:5.1f} min: {method}, seed {seed}"
        if job.exception() is not None:
            failures += 1
            print(f"{minutes} FAILED: {job.exception()}", file=sys.stderr, flush=True)
            continue
        row, curve = job.result()
        keep(row | {"method": method, "command": command, "seed": seed, **facts}, curve)
        print(f"{minutes}: {percent(solved([row]).mean())} %", flush=True)
    runs, curves = read_rows(args.suite, folder)  # in their order
    if runs:
        write_whole(folder / "table.md", partial(Path.write_bytes, data=format_everything(folder).encode()))
        print(format_suite(args.suite, runs, curves))
        plot_curves(runs, curves, folder / f"{args.suite}_curves.png")
        plot_success(runs, folder / f"{args.suite}_success.png")
    return failures


if __name__ == "__main__":
    args = parse(Args)
    if args.executor == "local" and args.cores_per_run > available_cores():
        raise UserError(f"--cores-per-run must not exceed the {available_cores()} cores of this machine")
    if not any(args.only in method for method in SUITES[args.suite].methods):
        names = SUITES[args.suite].methods
        raise UserError(f"--only must be part of a method's name: {', '.join(names)}")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # either way, the runs under way end too
    try:
        sys.exit(1 if main(args) else 0)
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on from here")
    except (OSError, subprocess.CalledProcessError) as error:  # a full disk, a recording of demonstrations that failed
        intact = f"what {args.output_dir} held is intact, and the same command goes on from here"
        raise UserError(f"{error}; {intact}") from error
