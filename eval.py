"""Evaluate policies on held-out episodes: every policy plays the same ones, by its mean action.

    python eval.py --policy jacobian --tape-half-size 0.076                   # a base policy needs no checkpoint
    python eval.py --model-path runs/NAME/last.safetensors --compare-base --plot --save-video
    python eval.py --model-path runs/NAME/last.safetensors --compare-base --sweep friction 0.4 1.6 --sweep delay 0 5

Prints one table, in which each failure has a cause, and writes results.json. Also holds what the training scripts
evaluate with: `validate`, `report`.
"""

import shlex
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import tyro
from gymnasium.vector import AutoresetMode
from tqdm import tqdm

from base_policies import BASES, BaseFlags, BasePolicy, make_base
from env_paper_square import (
    DRAWS,
    PIXEL_ARGUMENTS,
    POLICY_HZ,
    SERVO_FRICTION,
    STIFFNESS,
    EnvArgs,
    PaperSquareVectorEnv,
    nominal_arm,
    room,
    with_defaults,
)
from figures import check_rendering, choose_films, film_episode, plot_results, plot_sweeps, watch
from pixels import LOOKS
from runs import (
    ROOT,
    Real,
    UserError,
    Whole,
    env_of,
    find_device,
    fingerprint,
    load_checkpoint,
    load_module,
    parse,
    save_checkpoint,
    write_json,
)

VALIDATION_SEED = 1_000_000  # episodes that training evaluates on as it goes
TEST_SEED = 2_000_000  # episodes that results are reported on

# From the axis of shoulder_pan to the fixed fingertip at its height on the sheet, 9 mm: the largest of 4 million
# postures drawn uniformly from the joint ranges (mj_kinematics), refined around the best. There is no least reach: some
# posture clear of the table brings the fingertip within 3 mm of the axis.
ARM_AXIS = np.array([0.0388, 0.0])  # m
ARM_REACH = 0.426  # m
STILL = 0.001  # m, a sheet that moved no farther was never touched
APPROACH_STEPS, APPROACH = 30, 0.005  # a sheet that came so much closer, m, in the last second was on its way

SWEEPS = {  # name: what is varied, and the range that policies are trained in by default
    "friction": ("friction, times nominal", (1 - EnvArgs.randomize_friction, 1 + EnvArgs.randomize_friction)),
    "mass": ("mass, times nominal", (1 - EnvArgs.randomize_mass, 1 + EnvArgs.randomize_mass)),
    "stiffness": ("stiffness of the servos, N.m/rad", STIFFNESS),
    "servo_friction": ("dry friction of the servos, N.m", SERVO_FRICTION),
    "height": ("height of the table under the arm, m", (-EnvArgs.randomize_height, EnvArgs.randomize_height)),
    "backlash": ("play of the gears either way, rad", (0, EnvArgs.randomize_backlash)),
    "delay": ("delay of the actions, policy steps", (0, EnvArgs.randomize_delay)),
    "lag": ("delay of the sheet's pose, policy steps", (0, EnvArgs.randomize_lag)),
    "xy": ("largest offset of the sheet's start in x and y, m", (0, EnvArgs.randomize_xy)),
    "yaw": ("largest yaw of the sheet's start, rad", (0, EnvArgs.randomize_yaw)),
    "offset": ("largest error of a joint's zero, rad", (0, EnvArgs.randomize_offset)),
    "bias": ("largest error of where the sheet is seen, m", (0, EnvArgs.randomize_bias)),
    "noise": ("standard deviation of where the sheet is seen, m", (0, EnvArgs.randomize_noise)),
}
SCALES = ("xy", "yaw", "offset", "bias", "noise")  # how widely it is drawn is varied; of the others, what it is


@dataclass
class Args(BaseFlags):
    model_path: tuple[str, ...] = ()
    """checkpoints to evaluate, one or several"""
    script: str = ""
    """play the checkpoints by this file, the source that a run keeps, instead of by the script beside eval.py"""
    policy: Annotated[tuple[Literal[("random", *BASES)], ...], tyro.conf.arg(aliases=["--base-policy"])] = ()
    """policies by name"""
    compare_base: bool = False
    """also play the base policy of each checkpoint that has one"""
    compare_zero: bool = False
    """also play the zero policy"""
    compare_random: bool = False
    """also play uniformly random actions"""
    n_episodes: Whole[1, 10**6] = 100
    """episodes that every policy plays"""
    seed: Whole[0, 2**32 - 1] = TEST_SEED
    """seed of the first episode; episode k has seed + k"""
    tape_half_size: Real[0.001, 1] | None = None
    """half the inside width of the tape square, m (default: as the checkpoint was trained, else 0.08)"""
    randomize_xy: Real[0, 1] | None = None
    """largest offset of the sheet's start in x and y, m (default: as the checkpoint is judged, else 0.05)"""
    randomize_yaw: Real[0, 6.2832] | None = None
    """largest yaw of the sheet's start, rad (default: as the checkpoint is judged, else 0.3)"""
    randomize_arm: bool | None = None
    """whether the arm and how it is seen are randomised (default: as the checkpoint was trained, else True)"""
    fixed: tyro.conf.UseAppendAction[tuple[tuple[Literal[(*DRAWS, *LOOKS)], tuple[float, ...]], ...]] = ()
    """one of the things that every episode draws, at a value in all of them, or at a value for each of its numbers (SI
    units, steps; colours from 0 to 1): --fixed delay 2, or of a policy that sees pixels --fixed table 0.1 0.2 0.8"""
    sweep: tyro.conf.UseAppendAction[tuple[tuple[Literal[tuple(SWEEPS)], Real[-400, 400], Real[-400, 400]], ...]] = ()
    """also play with one thing from LOW to HIGH, in all episodes: friction, mass (times nominal), stiffness (N.m/rad),
    servo_friction (N.m), height of the table (m), backlash (rad), delay, lag (policy steps); or drawn so widely: xy (m)
    and yaw (rad) of the sheet's start, offset of the joints (rad), bias and noise of the sheet's pose (m); can be
    repeated, for one after the other"""
    sweep_points: Whole[2, 1000] = 7
    """values of each sweep; delay and lag take the whole numbers among them"""
    stochastic: bool = False
    """sample the actions of checkpoints instead of taking the mean"""
    num_envs: Whole[1, 32_768] = 64
    """environments stepped together"""
    num_threads: Whole[0, 1024] = 0
    """threads that step the physics; 0 takes all cores"""
    device: Literal["cpu", "cuda", "auto"] = "cpu"
    """where the networks are; auto takes cuda where there is one"""
    plot: bool = False
    """write results.png"""
    save_video: bool = False
    """film the first checkpoint's fastest success, its median one and its first failures, all policies side by side"""
    video_episodes: Whole[1, 1000] = 4
    """episodes to film, at most"""
    video_format: Literal["mp4", "webp"] = "mp4"
    """format of the films; webp plays in a README"""
    video_height: Whole[48, 960] = 480
    """height of each picture, pixels"""
    video_stride: Whole[1, 30] = 2
    """steps between frames, at 30 steps per second"""
    camera: Literal["top", "side", "wrist"] = "side"
    """camera to film with"""
    render: bool = False
    """play in MuJoCo's viewer, in real time, instead of evaluating"""
    output_dir: str = "eval_results"
    """folder for results.json, the plots and the videos"""


class RandomPolicy:
    """Uniformly random actions, from a generator of its own."""

    def __init__(self, seed: int = 0):
        self.rng = np.random.default_rng(seed)

    def __call__(self, obs: np.ndarray) -> np.ndarray:
        return self.rng.uniform(-1.0, 1.0, (len(obs), 6))

    def reset(self, mask: np.ndarray) -> None:
        pass


def disturbed(task: partial, name: str, value: float) -> partial:
    """The task with one of `SWEEPS` at a value; on a nominal arm, all others stay nominal."""
    if name not in SCALES:
        return partial(task, fixed={**task.keywords.get("fixed", {}), name: value})
    nominal = nominal_arm() if not task.keywords.get("randomize_arm", True) else {}
    return partial(task, **nominal | {f"randomize_{name}": value})


def play_episodes(
    policy,
    seeds: Sequence[int],
    task=PaperSquareVectorEnv,
    num_envs: int = 64,
    progress: str = "",
) -> dict:
    """Play one episode per seed to its end; returns arrays (len(seeds),) by name, in the order of the seeds.

    `task(num_envs)` makes the environments. Apart are `forces`, the normal force on the harder pressed fingertip at
    every step in contact, N, pooled, and `residual_norm_by_step`, the mean over the episodes still played at each step.
    What is recorded is the true state, whatever the policy sees.
    """
    num_envs = min(num_envs, len(seeds))
    envs = task(num_envs, autoreset_mode=AutoresetMode.DISABLED)
    names = ("success", "return", "length", "final_distance_m", "final_yaw_error_rad", "residual_norm")
    facts = ("moved_m", "reach_m", "approach_m", "was_inside", "inside")  # what tells the failures apart
    episodes = {name: np.zeros(len(seeds)) for name in (*names, *facts)}
    forces = []
    norm_sums = np.zeros(envs.max_episode_steps)
    distances = deque(maxlen=APPROACH_STEPS + 1)  # (num_envs,) each, of the last steps
    playing = np.arange(num_envs)  # the episode that each environment plays
    active = np.ones(num_envs, dtype=bool)
    waiting = num_envs  # the next episode to start
    obs, _ = envs.reset(seed=[int(seed) for seed in seeds[:num_envs]])
    start = envs.sheet_pose[:, :2]
    policy.reset(active)
    bar = tqdm(total=len(seeds), desc=progress, unit="ep", leave=False, disable=not progress)
    while active.any():
        obs, rewards, terminations, truncations, infos = envs.step(policy(obs))
        now = playing[active]
        episodes["return"][now] += rewards[active]
        episodes["length"][now] += 1
        residual_action = getattr(policy, "residual_action", None)  # (num_envs, 6)
        if residual_action is not None:
            norms = np.linalg.norm(residual_action[active], axis=1)
            episodes["residual_norm"][now] += norms
            np.add.at(norm_sums, episodes["length"][now].astype(int) - 1, norms)
        forces.append(envs.fingertip_force[active & (envs.fingertip_force.max(axis=1) > 0)].max(axis=1))
        sheet, inside = envs.sheet_pose[:, :2], envs.hold_counter > 0
        moved = np.linalg.norm(sheet - start, axis=1)
        episodes["moved_m"][now] = np.maximum(episodes["moved_m"][now], moved[active])
        episodes["was_inside"][now] = np.maximum(episodes["was_inside"][now], inside[active])
        distances.append(infos["dist_to_goal"])

        ended = np.flatnonzero((terminations | truncations) & active)
        if len(ended) == 0:
            continue
        bar.update(len(ended))
        over = playing[ended]
        episodes["success"][over] = terminations[ended]
        episodes["final_distance_m"][over] = infos["dist_to_goal"][ended]
        episodes["final_yaw_error_rad"][over] = infos["orientation_error"][ended]
        episodes["inside"][over] = inside[ended]
        episodes["reach_m"][over] = np.linalg.norm(sheet[ended] - ARM_AXIS, axis=1)
        back = np.minimum(episodes["length"][over].astype(int), len(distances))  # no farther than the episode goes
        episodes["approach_m"][over] = np.stack(distances)[-back, ended] - infos["dist_to_goal"][ended]
        restarted = ended[: len(seeds) - waiting]
        active[ended[len(restarted) :]] = False  # nothing left to play
        envs.paused[:] = ~active
        if len(restarted):
            playing[restarted] = waiting + np.arange(len(restarted))
            waiting += len(restarted)
            mask = np.isin(np.arange(num_envs), restarted)
            obs, _ = envs.reset(seed=[int(seeds[k]) for k in playing], options={"reset_mask": mask})
            start[mask] = envs.sheet_pose[mask, :2]
            policy.reset(mask)
    bar.close()
    envs.close()
    episodes["residual_norm"] /= episodes["length"]
    counts = (episodes["length"][:, None] > np.arange(episodes["length"].max())).sum(axis=0)  # still played, by step
    by_step = norm_sums[: len(counts)] / counts if hasattr(policy, "residual_action") else np.zeros(0)
    episodes["failure"] = classify_failures(episodes, envs.tape_half_size)
    return {**episodes, "seed": np.asarray(seeds), "forces": np.concatenate(forces), "residual_norm_by_step": by_step}


def classify_failures(episodes: dict, tape_half_size: float) -> np.ndarray:
    """Why each episode failed, (episodes,) of str, empty for a success; the first cause that holds, in this order."""
    causes = {
        "": episodes["success"] > 0,
        "never touched": episodes["moved_m"] <= STILL,
        "out of reach": episodes["reach_m"] > ARM_REACH,
        "left the square": (episodes["was_inside"] > 0) & (episodes["inside"] == 0),
        "time ran out": (episodes["approach_m"] > APPROACH) | (episodes["inside"] > 0),
        "turned": room(episodes["final_yaw_error_rad"], tape_half_size)[:, 0] < 0,
    }
    return np.select(list(causes.values()), list(causes), "off-centre")


def summarize(episodes: dict) -> dict:
    """The row of results.json for what `play_episodes` returned; the interval is Wilson's, 95 %."""
    from scipy.stats import binomtest  # slow to import: not before it is needed

    success = episodes["success"].astype(bool)
    interval = binomtest(int(success.sum()), len(success)).proportion_ci(method="wilson")
    times = episodes["length"][success] / POLICY_HZ
    forces = episodes["forces"]
    columns = ("seed", "success", "return", "length", "final_distance_m", "final_yaw_error_rad", "failure")
    rows = zip(*(episodes[name].tolist() for name in columns), strict=True)
    names, counts = np.unique(episodes["failure"][~success], return_counts=True)
    return {
        "success_rate": float(success.mean()),
        "ci95": [float(interval.low), float(interval.high)],
        "mean_return": float(episodes["return"].mean()),
        "mean_length": float(episodes["length"].mean()),
        "median_time_to_success_s": float(np.median(times)) if len(times) else None,
        "mean_final_distance_m": float(episodes["final_distance_m"].mean()),
        "mean_residual_norm": float(episodes["residual_norm"].mean()),
        "fingertip_force_n": dict(
            zip(("median", "p99", "max"), np.percentile(forces, [50, 99, 100]).tolist(), strict=True)
        )
        if len(forces)
        else None,
        "failures": {str(names[k]): int(counts[k]) for k in np.argsort(-counts, kind="stable")},
        "residual_norm_by_step": [round(norm, 4) for norm in episodes["residual_norm_by_step"].tolist()],
        "episodes": [
            dict(zip(columns, (int(row[0]), bool(row[1]), row[2], int(row[3]), *row[4:]), strict=True)) for row in rows
        ],
    }


def align(lines: list[list[str]]) -> str:
    """A heading and rows of cells as a table of plain text."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rows = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join([rows[0], "-" * len(rows[0]), *rows[1:]])


def format_table(results: dict[str, dict]) -> str:
    """Policies by name, as `summarize` returns them, as a table of plain text."""
    heading = ["policy", "success", "95 % interval", "return", "time to success", "final distance", "force med/p99"]
    lines = [[*heading, "failures"]]
    for name, row in results.items():
        low, high = row["ci95"]
        seconds, force = row["median_time_to_success_s"], row["fingertip_force_n"]
        lines.append(
            [
                name,
                f"{100 * row['success_rate']:.1f} %",
                f"{100 * low:.1f} to {100 * high:.1f} %",
                f"{row['mean_return']:.1f}",
                "-" if seconds is None else f"{seconds:.1f} s",
                f"{1000 * row['mean_final_distance_m']:.0f} mm",
                "-" if force is None else f"{force['median']:.1f}/{force['p99']:.1f} N",
                ", ".join(f"{count} {failure}" for failure, count in row["failures"].items()) or "-",
            ]
        )
    return align(lines)


def load_policy(path: str, script: str = "", sample: bool = False, device: torch.device | str = "cpu"):
    """A checkpoint's policy, by its script beside this file or by the file `script`; what makes its task; and itself.

    Raises UserError if there is no such checkpoint, script or environment, or if they do not fit each other.
    """
    checkpoint = load_checkpoint(path)
    make_policy = load_module(checkpoint["script"], "make_policy", script).make_policy
    try:
        return make_policy(checkpoint, sample, device), task_of(checkpoint), checkpoint
    except KeyError as error:
        raise UserError(f"{path} is not a policy's checkpoint: it lacks {error}") from error


def task_of(checkpoint: dict) -> partial:
    """`task_of(checkpoint)(num_envs)` makes the environments that its policy is judged in."""
    return partial(env_of(checkpoint), **checkpoint["env"]["kwargs"])


def load_policies(args: Args) -> tuple[dict, dict]:
    """The policies that the flags ask for, by name, and what makes the environments of each."""
    policies, tasks, bases = {}, {}, {}  # bases: what each is, by its name
    device = find_device(args.device)
    asked = {name: getattr(args, name) for name in ("tape_half_size", "randomize_xy", "randomize_yaw", "randomize_arm")}
    overrides = {name: value for name, value in asked.items() if value is not None}
    if args.fixed:
        overrides["fixed"] = {name: np.array(values) if len(values) > 1 else values[0] for name, values in args.fixed}
    for path in args.model_path:
        policy, task, checkpoint = load_policy(path, args.script, args.stochastic, device)
        task, flags = partial(task, **overrides), checkpoint["args"]
        name = f"{flags['exp_name']} seed {flags['seed']}"
        name = path if name in policies else name
        if args.compare_base and hasattr(policy, "base_policy"):  # pure RL has none
            base = fingerprint([policy.base_policy, with_defaults(task.keywords)])
            base_name = f"base {flags['base_policy']}"
            base_name = base_name if bases.setdefault(base_name, base) == base else f"{base_name} of {name}"
            bases[base_name] = base
            policies[base_name], tasks[base_name] = policy.base_policy, task
        policies[name], tasks[name] = policy, task
    if args.compare_base and not bases:
        raise UserError("--compare-base needs a checkpoint of a residual script: found none that has a base policy")
    shared = next(iter(tasks.values()), partial(PaperSquareVectorEnv, **overrides))
    act_scale = shared.keywords.get("act_scale", EnvArgs.act_scale)
    for name in [*args.policy, *["zero"] * args.compare_zero, *["random"] * args.compare_random]:
        base = None if name == "random" else make_base(name, args, shared.func, act_scale, device=device)
        policies[name] = base or RandomPolicy()
        tasks[name] = partial(shared, move_gripper=True, observe_measured=True, pixels=())
    if len({task.func for task in tasks.values()}) > 1:
        raise UserError("the checkpoints were trained in different environments: evaluate them apart")
    own = {"act_scale", "move_gripper", "observe_measured", *PIXEL_ARGUMENTS}  # how each acts and sees
    for key in set().union(*(task.keywords for task in tasks.values())) - own:
        if len({fingerprint(task.keywords.get(key)) for task in tasks.values()}) > 1:
            raise UserError(f"the checkpoints were trained for tasks of different {key}: evaluate them apart")
    if not policies:
        raise UserError("nothing to evaluate: give --model-path CHECKPOINT or --policy jacobian")
    return policies, {name: partial(task, num_threads=args.num_threads) for name, task in tasks.items()}


def validate(run, policy, checkpoint: dict) -> None:
    """Judge a policy in the course of a training: play validation episodes, log the outcome, save the checkpoint.

    Writes last.safetensors, and best.safetensors if no earlier one is as good (by success, then by mean length).
    """
    start, seconds = time.perf_counter(), run.seconds()
    seeds = range(VALIDATION_SEED, VALIDATION_SEED + run.flags.eval_episodes)
    row = summarize(play_episodes(policy, seeds, partial(task_of(checkpoint), num_threads=run.flags.num_threads)))
    row = {key: row[key] for key in row if key == "success_rate" or key.startswith("mean_")}
    save_checkpoint(checkpoint, run.dir / "last.safetensors")
    rank = [(row["success_rate"], -row["mean_length"]) for row in (*run.evaluations, row)]
    if rank[-1] > max(rank[:-1], default=()):
        save_checkpoint(checkpoint, run.dir / "best.safetensors")
    eval_seconds = time.perf_counter() - start
    head = {"global_step": checkpoint["global_step"], "seconds": seconds, "eval_seconds": eval_seconds}
    run.evaluations.append({**head, **row})
    scalars = {f"eval/{key}": value for key, value in row.items()} | {"time/eval": eval_seconds}
    run.log(checkpoint["global_step"], scalars)


def report(run, policy, checkpoint: dict) -> None:
    """End a training: play test episodes, the base too if there is one, print the table, write results.json."""
    policies = {run.flags.exp_name: policy}
    if hasattr(policy, "base_policy"):
        base = f"base {run.flags.base_policy}"
        policies = {base: policy.base_policy, f"residual, alpha {policy.alpha:g}": policy}
    seeds = range(TEST_SEED, TEST_SEED + run.flags.test_episodes)
    task = partial(task_of(checkpoint), num_threads=run.flags.num_threads)
    results = {name: summarize(play_episodes(policy, seeds, task, progress=name)) for name, policy in policies.items()}
    everything = {"policies": results, "evaluations": run.evaluations, "args": checkpoint["args"]}
    write_json(run.dir / "results.json", everything)
    row = results[list(policies)[-1]]
    run.log(
        checkpoint["global_step"], {f"test/{key}": row[key] for key in ("success_rate", "mean_return", "mean_length")}
    )
    run.writer.close()
    minutes, count = run.evaluations[-1]["seconds"] / 60, len(seeds)
    print(f"{checkpoint['global_step']} steps, {minutes:.1f} min of training; {count} held-out test episodes:")
    print(format_table(results))
    command = ["python", "eval.py", "--model-path", str(run.dir / "last.safetensors"), "--save-video"]
    if run.source.resolve().parent != ROOT:
        command += ["--script", str(run.dir / run.source.name)]
    print(f"wrote {run.dir}\nwatch it: {shlex.join(command)}")
    if run.flags.capture_video:
        check_rendering()
        film_episode(policies, dict.fromkeys(policies, task), TEST_SEED, run.dir / "episode.mp4")


def sweep_values(name: str, low: float, high: float, points: int) -> np.ndarray:
    """The values that a sweep plays, (points,) or, of steps, the whole numbers; raises UserError for bad ranges."""
    least, most = (0, np.inf) if name in SCALES else DRAWS[name][1:]
    if not least <= low < high <= most:
        raise UserError(f"--sweep {name} LOW HIGH needs {least} <= LOW < HIGH <= {most}, found {low:g} and {high:g}")
    if name in SCALES:
        try:
            EnvArgs(**{f"randomize_{name}": high})
        except ValueError as error:
            raise UserError(f"--sweep {name}: {error}") from error
    if name not in ("delay", "lag"):
        return np.linspace(low, high, points)
    if np.floor(high) - np.ceil(low) < 1:
        raise UserError(f"--sweep {name} LOW HIGH needs at least two whole numbers in it, found {low:g} and {high:g}")
    return np.unique(np.round(np.linspace(np.ceil(low), np.floor(high), points)).astype(int))


def run_sweep(policies: dict, tasks: dict, seeds: Sequence[int], num_envs: int, name: str, values: np.ndarray) -> dict:
    """Play all policies at each value of a sweep, on the same episodes; returns an entry of results.json's `sweeps`."""
    rows = {policy: [] for policy in policies}
    for value in values.tolist():
        for key, policy in policies.items():
            progress = f"{key}, {name} {value:g}"
            task = disturbed(tasks[key], name, value)
            row = summarize(play_episodes(policy, seeds, task, num_envs, progress))
            rows[key].append({"success_rate": row["success_rate"], "ci95": row["ci95"]})
    return {"name": name, "values": values.tolist(), "policies": rows}


def format_sweep(sweep: dict) -> str:
    """Success in % as a table of plain text: a row per value, a column per policy."""
    lines = [[sweep["name"], *sweep["policies"]]]
    for k, value in enumerate(sweep["values"]):
        rates = [rows[k]["success_rate"] for rows in sweep["policies"].values()]
        lines.append([f"{value:.4g}", *(f"{100 * rate:.1f} %" for rate in rates)])
    return align(lines)


if __name__ == "__main__":
    args = parse(Args)
    output_dir = Path(args.output_dir)
    values = [sweep_values(*sweep, args.sweep_points) for sweep in args.sweep]
    policies, tasks = load_policies(args)
    if args.save_video:
        check_rendering()
    torch.set_num_threads(1)  # the cores are for the physics
    seeds = range(args.seed, args.seed + args.n_episodes)
    if args.render:
        watch(policies, tasks, seeds)
        raise SystemExit
    output_dir.mkdir(parents=True, exist_ok=True)

    results = {}
    for name, policy in policies.items():
        results[name] = summarize(play_episodes(policy, seeds, tasks[name], args.num_envs, progress=name))
    everything = {"policies": results, "args": asdict(args)}
    write_json(output_dir / "results.json", everything)
    print(format_table(results))
    for (name, *_), points in zip(args.sweep, values, strict=True):
        sweep = run_sweep(policies, tasks, seeds, args.num_envs, name, points)
        everything.setdefault("sweeps", []).append(sweep)
        write_json(output_dir / "results.json", everything)
        print(f"\nsuccess by {name}:\n{format_sweep(sweep)}")
    if args.sweep:
        plot_sweeps(everything["sweeps"], SWEEPS, output_dir / "sweeps.png")
        print(f"wrote {output_dir / 'sweeps.png'}")
    print(f"wrote {output_dir / 'results.json'}")
    if args.plot:
        tape_half_size = next(iter(tasks.values())).keywords.get("tape_half_size", EnvArgs.tape_half_size)
        plot_results(results, output_dir / "results.png", tape_half_size)
        print(f"wrote {output_dir / 'results.png'}")
    if args.save_video:
        others = (name for name, policy in policies.items() if not isinstance(policy, BasePolicy))
        first = next(others, next(iter(policies)))
        chosen = choose_films(results[first]["episodes"], args.video_episodes)
        for seed, kind in tqdm(chosen.items(), desc="filming", unit="ep", leave=False):
            path = output_dir / f"{kind}_{seed}.{args.video_format}"
            film_episode(policies, tasks, seed, path, args.camera, args.video_height, args.video_stride)
            tqdm.write(f"wrote {path}")
