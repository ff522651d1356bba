"""Evaluate policies on held-out episodes: every policy plays the same ones, by its mean action.

    python eval.py --policy jacobian --tape-half-size 0.076                   # a base policy needs no checkpoint
    python eval.py --model-path runs/NAME/last.pt --compare-base --plot --save-video
    python eval.py --model-path runs/NAME/last.pt --compare-base --sweep friction 0.4 1.6

Prints one table, in which each failure has a cause, and writes results.json. Also holds what the training scripts
evaluate with: `validate`, `report`.
"""

import importlib
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import tyro
from gymnasium.vector import AutoresetMode
from tqdm import tqdm

from base_policies import BaseArgs, BaseFlags, base_kwargs, make_base_policy
from checkpoints import load_checkpoint, save_checkpoint, write_json, write_whole
from env_paper_square import OBS, OBS_SCALE, SHEET_HALF_SIZE, EnvArgs, PaperSquareVectorEnv, to_si
from flags import check_folder, fail, find_device, parse

POLICY_HZ = 30  # steps per second, the environment's default
VALIDATION_SEED = 1_000_000  # episodes that training evaluates on as it goes
TEST_SEED = 2_000_000  # episodes that results are reported on
LARGEST_RESIDUAL = 6**0.5  # norm of a residual action with all six entries at their bounds

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
    "xy": ("largest offset of the sheet's start in x and y, m", (0.0, EnvArgs.randomize_xy)),
    "yaw": ("largest yaw of the sheet's start, rad", (0.0, EnvArgs.randomize_yaw)),
    "noise": ("noise on the sheet's measured position, standard deviation, m", None),
    "delay": ("delay of the actions, policy steps", None),
}


@dataclass
class Args(BaseFlags):
    model_path: tuple[str, ...] = ()
    """checkpoints to evaluate, one or several"""
    policy: Annotated[
        tuple[Literal["zero", "random", "jacobian", "hybrid", "il"], ...], tyro.conf.arg(aliases=["--base-policy"])
    ] = ()
    """policies by name"""
    compare_base: bool = False
    """also play the base policy of each checkpoint that has one"""
    compare_zero: bool = False
    """also play the zero policy"""
    compare_random: bool = False
    """also play uniformly random actions"""
    n_episodes: int = 100
    """episodes that every policy plays"""
    seed: int = TEST_SEED
    """seed of the first episode; episode k has seed + k"""
    tape_half_size: float | None = None
    """half the inside width of the tape square, m (default: as the checkpoint was trained, else 0.08)"""
    randomize_xy: float | None = None
    """largest offset of the sheet's start in x and y, m (default: as the checkpoint is judged, else 0.05)"""
    randomize_yaw: float | None = None
    """largest yaw of the sheet's start, rad (default: as the checkpoint is judged, else 0.3)"""
    sweep: tuple[Literal[tuple(SWEEPS)], float, float] | None = None
    """also play under disturbances from LOW to HIGH: friction and mass (times nominal), xy (m) and yaw (rad; range of
    the sheet's start), noise (standard deviation of the sheet's measured position, m), delay (policy steps)"""
    sweep_points: int = 7
    """values of the sweep; a delay takes the whole numbers among them"""
    stochastic: bool = False
    """sample the actions of checkpoints instead of taking the mean"""
    num_envs: int = 64
    """environments stepped together"""
    num_threads: int = 0
    """threads that step the physics; 0 takes all cores"""
    device: Literal["cpu", "cuda", "auto"] = "cpu"
    """where the networks are; auto takes cuda where there is one"""
    plot: bool = False
    """write results.png"""
    save_video: bool = False
    """film the first checkpoint's fastest success, its median one and its first failures, all policies side by side"""
    video_episodes: int = 4
    """episodes to film, at most"""
    video_format: Literal["mp4", "webp"] = "mp4"
    """format of the films; webp plays in a README"""
    video_height: int = 480
    """height of each picture, pixels"""
    video_stride: int = 2
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


class Disturbance:
    """What a sweep adds to the episodes of an environment: one of `SWEEPS` by `name`, of size `value`; "" is nothing.

    The noise comes from a generator of each episode's own, so all policies meet the same; actions arrive `value`
    steps late under a delay, the first ones of an episode being zero.
    """

    def __init__(self, name: str = "", value: float = 0.0):
        self.name, self.value = name, value
        self.env_kwargs = {f"randomize_{name}": value} if name in ("xy", "yaw") else {}

    def start(self, envs: PaperSquareVectorEnv) -> None:
        """Before the first reset: every episode draws its friction and mass relative to the model's."""
        model, sheet = envs.model, envs.model.body("sheet").id
        if self.name == "friction":
            geom = model.geom("sheet").id
            model.pair_friction[(model.pair_geom1 == geom) | (model.pair_geom2 == geom)] *= self.value
        elif self.name == "mass":
            model.body_mass[sheet] *= self.value
            model.body_inertia[sheet] *= self.value
        self.rngs = [None] * envs.num_envs
        self.age = np.zeros(envs.num_envs, dtype=np.int64)  # actions since the episode began
        self.actions = deque(maxlen=int(self.value) + 1) if self.name == "delay" else None

    def reset(self, mask: np.ndarray, seeds: Sequence[int]) -> None:
        self.age[mask] = 0
        for i in np.flatnonzero(mask):
            self.rngs[i] = np.random.default_rng([int(seeds[i]), 1])

    def observe(self, obs: np.ndarray) -> np.ndarray:
        """What the policy sees of observations (num_envs, obs_dim): the sheet where a noisy camera has it."""
        if self.name != "noise":
            return obs
        scales = np.array([self.value, self.value, self.value / 0.1])  # m, m, rad: as if seen on a lever of 0.1 m
        noise = scales * np.stack([rng.normal(size=3) for rng in self.rngs])
        sin, cos = to_si(obs)[:, OBS["sheet_yaw"]].T
        turn_sin, turn_cos = np.sin(noise[:, 2]), np.cos(noise[:, 2])
        change = np.zeros(obs.shape)  # SI units; rows of zeros stay as they are to the bit
        change[:, OBS["sheet_pos"]][:, :2] = change[:, OBS["fingertip_to_sheet"]] = noise[:, :2]
        change[:, OBS["sheet_to_square"]] = -noise[:, :2]
        turned = [sin * turn_cos + cos * turn_sin - sin, cos * turn_cos - sin * turn_sin - cos]
        change[:, OBS["sheet_yaw"]] = np.stack(turned, axis=1)
        return (obs + change * OBS_SCALE).astype(np.float32)

    def act(self, actions: np.ndarray) -> np.ndarray:
        """The actions (num_envs, 6) that reach the arms."""
        if self.name != "delay":
            return actions
        self.actions.append(np.array(actions))
        late = np.where((self.age >= self.value)[:, None], self.actions[0], 0.0)
        self.age += 1
        return late


def play_episodes(
    policy,
    seeds: Sequence[int],
    env_kwargs: dict,
    num_envs: int = 64,
    progress: str = "",
    disturbance: tuple[str, float] = ("", 0.0),
) -> dict:
    """Play one episode per seed to its end; returns arrays (len(seeds),) by name, in the order of the seeds.

    Apart are `forces`, the normal force on the harder pressed fingertip at every step in contact, N, pooled, and
    `residual_norm_by_step`, the mean over the episodes still played at each step. `disturbance` is a name of `SWEEPS`
    and a value; what is recorded is the true state, whatever the policy sees.
    """
    num_envs = min(num_envs, len(seeds))
    extra = Disturbance(*disturbance)
    envs = PaperSquareVectorEnv(num_envs, autoreset_mode=AutoresetMode.DISABLED, **{**env_kwargs, **extra.env_kwargs})
    extra.start(envs)
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
    start = to_si(obs)[:, OBS["sheet_pos"]]
    policy.reset(active)
    extra.reset(active, seeds)
    bar = tqdm(total=len(seeds), desc=progress, unit="ep", leave=False, disable=not progress)
    while active.any():
        obs, rewards, terminations, truncations, infos = envs.step(extra.act(policy(extra.observe(obs))))
        now = playing[active]
        episodes["return"][now] += rewards[active]
        episodes["length"][now] += 1
        residual_action = getattr(policy, "residual_action", None)  # (num_envs, 6)
        if residual_action is not None:
            norms = np.linalg.norm(residual_action[active], axis=1)
            episodes["residual_norm"][now] += norms
            np.add.at(norm_sums, episodes["length"][now].astype(int) - 1, norms)
        forces.append(envs.fingertip_force[active & (envs.fingertip_force.max(axis=1) > 0)].max(axis=1))
        state = to_si(obs)
        sheet, inside = state[:, OBS["sheet_pos"]], state[:, OBS["hold_counter"]][:, 0] > 0
        moved = np.linalg.norm((sheet - start)[:, :2], axis=1)
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
        episodes["reach_m"][over] = np.linalg.norm(sheet[ended, :2] - ARM_AXIS, axis=1)
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
            start[mask] = to_si(obs)[mask, OBS["sheet_pos"]]
            policy.reset(mask)
            extra.reset(mask, [seeds[k] for k in playing])
    bar.close()
    envs.close()
    episodes["residual_norm"] /= episodes["length"]
    counts = (episodes["length"][:, None] > np.arange(episodes["length"].max())).sum(axis=0)  # still played, by step
    by_step = norm_sums[: len(counts)] / counts if hasattr(policy, "residual_action") else np.zeros(0)
    episodes["failure"] = classify_failures(episodes, envs.tape_half_size)
    return {**episodes, "seed": np.asarray(seeds), "forces": np.concatenate(forces), "residual_norm_by_step": by_step}


def room(yaw_error: np.ndarray, tape_half_size: float) -> np.ndarray:
    """How far from the square's centre a sheet with this yaw error may lie and fit, m, (..., 2).

    The two bounds hold for the offsets along the square's sides, first along the side that the sheet's longer extent is
    parallel to: the sheet fits if neither is exceeded. A negative first one: it does not fit, however well centred.
    """
    cos, sin = np.cos(yaw_error), np.sin(yaw_error)  # yaw_error in [0, pi / 4]
    long, short = SHEET_HALF_SIZE
    return tape_half_size - np.stack([long * cos + short * sin, long * sin + short * cos], axis=-1)


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
        "fingertip_force_n": {"median": float(np.median(forces)), "max": float(forces.max())} if len(forces) else None,
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
    heading = ["policy", "success", "95 % interval", "return", "time to success", "final distance", "force med/max"]
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
                "-" if force is None else f"{force['median']:.1f}/{force['max']:.1f} N",
                ", ".join(f"{count} {failure}" for failure, count in row["failures"].items()) or "-",
            ]
        )
    return align(lines)


def load_policies(args: Args) -> tuple[dict, dict]:
    """The policies that the flags ask for, by name, and the environment arguments of each."""
    policies, env_kwargs, bases = {}, {}, {}
    device = find_device(args.device)
    asked = {name: getattr(args, name) for name in ("tape_half_size", "randomize_xy", "randomize_yaw")}
    overrides = {name: value for name, value in asked.items() if value is not None}
    for path in args.model_path:
        checkpoint = load_checkpoint(path)
        script = importlib.import_module(checkpoint["script"])
        name = f"{checkpoint['args']['exp_name']} seed {checkpoint['args']['seed']}"
        if name in policies:
            name = f"{Path(path).parent.name}/{Path(path).stem}"
        policy = script.make_policy(checkpoint, args.stochastic, device)
        task = {**checkpoint["env_kwargs"], **overrides}
        if args.compare_base and hasattr(policy, "base_policy"):  # pure RL has none
            base_name = f"base {checkpoint['args']['base_policy']}"
            base = {field.name: checkpoint["args"][field.name] for field in fields(BaseArgs)} | task
            if bases.setdefault(base_name, base) != base:
                base_name = f"{base_name} of {name}"
            policies[base_name], env_kwargs[base_name] = policy.base_policy, task
        policies[name], env_kwargs[name] = policy, task
    if args.compare_base and not any(name.startswith("base ") for name in policies):
        raise ValueError("--compare-base needs a checkpoint of a residual script: found none that has a base policy")
    names = [*args.policy, *["zero"] * args.compare_zero, *["random"] * args.compare_random]
    shared = next(iter(env_kwargs.values()), {"act_scale": EnvArgs.act_scale, **overrides})
    for name in names:
        kwargs = {"act_scale": shared["act_scale"], "device": device, **base_kwargs(args)}
        policies[name] = RandomPolicy() if name == "random" else make_base_policy(name, **kwargs)
        env_kwargs[name] = shared
    for key in set().union(*env_kwargs.values()) - {"act_scale"}:
        if len({kwargs.get(key) for kwargs in env_kwargs.values()}) > 1:
            raise ValueError(f"the checkpoints were trained for tasks of different {key}: evaluate them apart")
    if not policies:
        raise ValueError("nothing to evaluate: give --model-path CHECKPOINT or --policy jacobian")
    return policies, env_kwargs


def environment_of(checkpoint: dict) -> dict:
    """What a training evaluates in: the environment of its checkpoint, on the threads that it trains with."""
    return {**checkpoint["env_kwargs"], "num_threads": checkpoint["args"]["num_threads"]}


def validate(policy, checkpoint: dict, num_episodes: int, elapsed: float, evaluations: list, run_dir: Path) -> dict:
    """Evaluate in the course of a training: play validation episodes, and save the checkpoint.

    Returns what TensorBoard gets, and appends it to `evaluations` with the step and the seconds of training so far:
    `elapsed` less all that was spent here. Writes last.pt, and best.pt if no earlier row is as good (by success, then
    by mean length).
    """
    start = time.perf_counter()
    seeds = range(VALIDATION_SEED, VALIDATION_SEED + num_episodes)
    row = summarize(play_episodes(policy, seeds, environment_of(checkpoint)))
    row = {key: row[key] for key in row if key == "success_rate" or key.startswith("mean_")}
    save_checkpoint(checkpoint, run_dir / "last.pt")
    if all((row["success_rate"], -row["mean_length"]) > (e["success_rate"], -e["mean_length"]) for e in evaluations):
        save_checkpoint(checkpoint, run_dir / "best.pt")
    seconds = elapsed - sum(earlier["eval_seconds"] for earlier in evaluations)
    eval_seconds = time.perf_counter() - start
    evaluations.append(
        {"global_step": checkpoint["global_step"], "seconds": seconds, "eval_seconds": eval_seconds, **row}
    )
    return row


def report(policy, checkpoint: dict, num_episodes: int, evaluations: list, run_dir: Path, film: bool = False) -> dict:
    """End a training: play test episodes, the base too if there is one, print the table, write results.json."""
    policies = {checkpoint["args"]["exp_name"]: policy}
    if hasattr(policy, "base_policy"):
        base = f"base {checkpoint['args']['base_policy']}"
        policies = {base: policy.base_policy, f"residual, alpha {policy.alpha:g}": policy}
    seeds = range(TEST_SEED, TEST_SEED + num_episodes)
    results = {
        name: summarize(play_episodes(policy, seeds, environment_of(checkpoint), progress=name))
        for name, policy in policies.items()
    }
    minutes = evaluations[-1]["seconds"] / 60
    print(f"{checkpoint['global_step']} steps, {minutes:.1f} min of training; {num_episodes} held-out test episodes:")
    print(format_table(results))
    everything = {"policies": results, "evaluations": evaluations, "args": checkpoint["args"]}
    write_json(run_dir / "results.json", everything)
    if film:
        film_episode(policies, dict.fromkeys(policies, checkpoint["env_kwargs"]), TEST_SEED, run_dir / "episode.mp4")
    print(f"wrote {run_dir}; watch it: python eval.py --model-path {run_dir}/last.pt --save-video")
    return results


def sweep_values(name: str, low: float, high: float, points: int) -> np.ndarray:
    """The values that a sweep plays, (points,) or, of a delay, the whole numbers; raises ValueError for bad ranges."""
    least = "<" if name in ("friction", "mass") else "<="  # a factor of zero is no physics
    if not (0 <= low < high and (low > 0 or least == "<=")):
        raise ValueError(f"--sweep {name} LOW HIGH needs 0 {least} LOW < HIGH, found {low:g} and {high:g}")
    if name != "delay":
        return np.linspace(low, high, points)
    if np.floor(high) - np.ceil(low) < 1:
        raise ValueError(f"--sweep delay LOW HIGH needs at least two whole numbers in it, found {low:g} and {high:g}")
    return np.unique(np.round(np.linspace(np.ceil(low), np.floor(high), points)).astype(int))


def run_sweep(
    policies: dict, env_kwargs: dict, seeds: Sequence[int], num_envs: int, name: str, values: np.ndarray
) -> dict:
    """Play all policies under each value of a disturbance, on the same episodes; returns results.json's `sweep`."""
    rows = {policy: [] for policy in policies}
    for value in values.tolist():
        for key, policy in policies.items():
            progress = f"{key}, {name} {value:g}"
            row = summarize(play_episodes(policy, seeds, env_kwargs[key], num_envs, progress, (name, value)))
            rows[key].append({"success_rate": row["success_rate"], "ci95": row["ci95"]})
    return {"name": name, "values": values.tolist(), "policies": rows}


def format_sweep(sweep: dict) -> str:
    """Success in % as a table of plain text: a row per value, a column per policy."""
    lines = [[sweep["name"], *sweep["policies"]]]
    for k, value in enumerate(sweep["values"]):
        rates = [rows[k]["success_rate"] for rows in sweep["policies"].values()]
        lines.append([f"{value:.4g}", *(f"{100 * rate:.1f} %" for rate in rates)])
    return align(lines)


def pyplot():
    """Matplotlib's pyplot, drawing to files; imported here because most evaluations plot nothing."""
    import matplotlib

    matplotlib.use("Agg")
    return importlib.import_module("matplotlib.pyplot")


def save_figure(figure, path: Path, dpi: int) -> None:
    """Write a figure as PNG, and close it."""
    write_whole(path, lambda temporary: figure.savefig(temporary, dpi=dpi, format="png"))
    pyplot().close(figure)


def plot_sweep(sweep: dict, path: Path) -> None:
    """Success over the values of a sweep, with the 95 % intervals as bands."""
    plt = pyplot()
    label, trained = SWEEPS[sweep["name"]]
    figure, axis = plt.subplots(figsize=(6.4, 4), layout="constrained")
    if trained is not None:
        axis.axvspan(*trained, color="0.9", label="training range")
    for policy, rows in sweep["policies"].items():
        (line,) = axis.plot(sweep["values"], [100 * row["success_rate"] for row in rows], marker="o", label=policy)
        low, high = 100 * np.array([row["ci95"] for row in rows]).T
        axis.fill_between(sweep["values"], low, high, color=line.get_color(), alpha=0.2, linewidth=0)
    axis.set(xlabel=label, ylabel="success, % (band: 95 % interval)", ylim=(-3, 103))
    axis.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=3, fontsize="small")
    save_figure(figure, path, dpi=110)


def plot_results(results: dict[str, dict], path: Path, tape_half_size: float = EnvArgs.tape_half_size) -> None:
    """Success, time to success, where the sheet ends against what fits, and residual norm; tape in m."""
    plt = pyplot()
    figure, axes = plt.subplots(2, 2, figsize=(10, 7.5), layout="constrained")
    (bars, times), (finals, norms) = axes
    for k, (name, row) in enumerate(results.items()):
        rate, (low, high) = row["success_rate"], row["ci95"]
        errors = [[100 * max(rate - low, 0)], [100 * max(high - rate, 0)]]
        bars.barh(k, 100 * rate, color=f"C{k}", xerr=errors, capsize=4, label=name)
        bars.text(104, k, f"{100 * rate:.1f} %", va="center")
        episodes = row["episodes"]
        seconds = sorted(episode["length"] / POLICY_HZ for episode in episodes if episode["success"])
        end = max(episode["length"] for episode in episodes) / POLICY_HZ
        share = 100 * np.append(np.arange(len(seconds) + 1), len(seconds)) / len(episodes)
        times.step([0, *seconds, end], share, where="post", color=f"C{k}")
        distances = [max(1000 * episode["final_distance_m"], 0.5) for episode in episodes]  # a log scale has no zero
        yaws = [np.degrees(episode["final_yaw_error_rad"]) for episode in episodes]
        finals.scatter(distances, yaws, s=8, color=f"C{k}", alpha=0.5)
        by_step = row["residual_norm_by_step"]
        norms.plot(np.arange(1, len(by_step) + 1) / POLICY_HZ, by_step, color=f"C{k}")
    bars.set(xlabel="success, % (bar: 95 % interval)", xlim=(0, 122), xticks=range(0, 101, 20), yticks=[])
    bars.invert_yaxis()
    times.set(xlabel="time, s", ylabel="episodes solved by then, %", xlim=(0, None), ylim=(-3, 103))

    # Each side of the square bounds the offset along it; drawn for a sheet that is off along one of them only
    yaw = np.linspace(0, np.pi / 4, 2000)
    yaw = yaw[room(yaw, tape_half_size)[:, 0] >= 0.0005]
    long, short = 1000 * room(yaw, tape_half_size).T
    finals.plot(long, np.degrees(yaw), "k-", label="fits up to here, off along its length only")
    finals.plot(short, np.degrees(yaw), "k:", label="fits up to here, off across it only")
    finals.legend(loc="upper center", fontsize="small")
    finals.set(xlabel="final distance, mm (0.5: or less)", xscale="log", ylabel="final yaw error, deg", ylim=(-1, 46))
    norms.set(xlabel=f"time, s (mean of the episodes still played; at most {LARGEST_RESIDUAL:.2f})")
    norms.set(ylabel="norm of the residual action", xlim=(0, None), ylim=(0, None))
    for axis in axes.flat:
        axis.grid(alpha=0.3)
    figure.legend(*bars.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    save_figure(figure, path, dpi=100)


def choose_films(episodes: list[dict], count: int) -> dict[int, str]:
    """Which of a policy's episodes, as results.json has them, are worth a film: the kind of each by its seed.

    The fastest success, that of median length, then the first failures; `count` at most, no episode twice.
    """
    solved = sorted((episode for episode in episodes if episode["success"]), key=lambda episode: episode["length"])
    chosen = {}
    if solved:
        chosen[solved[0]["seed"]] = "best"
        chosen.setdefault(solved[(len(solved) - 1) // 2]["seed"], "median")
    chosen |= {episode["seed"]: "failure" for episode in episodes if not episode["success"]}
    return dict(list(chosen.items())[:count])


def check_rendering() -> None:
    """Raise RuntimeError, with one line for the user, if offscreen rendering does not work here."""
    envs = PaperSquareVectorEnv(1)
    envs.reset(seed=0)
    envs.render_frame()
    envs.close()


def run_episode(policy, envs: PaperSquareVectorEnv, seed: int) -> Iterator[tuple[int, str]]:
    """Play one episode in a single environment; yields the step, and the outcome, which is empty until the end."""
    obs, _ = envs.reset(seed=[seed])
    policy.reset(np.ones(1, dtype=bool))
    step, outcome = 0, ""
    yield step, outcome
    while not outcome:
        obs, _, terminations, truncations, _ = envs.step(policy(obs))
        step, outcome = step + 1, "success" if terminations[0] else "failure" if truncations[0] else ""
        yield step, outcome


def encode_mp4(frames: Sequence[np.ndarray], **options) -> bytes:
    """Frames (height, width, 3) uint8 as an MP4; options are imageio's. Raises OSError if it is not whole."""
    import imageio

    film = imageio.mimwrite("<bytes>", frames, "mp4", **options)
    kinds, end = set(), 0  # of its boxes, each of which begins with its size; a full disk is nothing to imageio
    while end < len(film) and (size := int.from_bytes(film[end : end + 4], "big")) >= 8:
        kinds.add(film[end + 4 : end + 8])
        end += size
    if end != len(film) or b"moov" not in kinds:
        raise OSError("ffmpeg did not write the whole film: is there room in the folder for temporary files?")
    return film


def film_episode(
    policies: dict, env_kwargs: dict, seed: int, path: Path, camera: str = "side", height: int = 480, stride: int = 2
) -> None:
    """Film one episode, the policies side by side, each with its name and outcome; path ends in .mp4 or .webp.

    A bar at the lower edge is the norm of the residual action, in a frame of its largest length.
    """
    from PIL import Image, ImageDraw

    view = {"render_mode": "rgb_array", "camera": camera, "height": height, "width": 4 * height // 3}
    films = []
    for name, policy in policies.items():
        envs = PaperSquareVectorEnv(1, autoreset_mode=AutoresetMode.DISABLED, **view, **env_kwargs[name])
        film = []
        for step, outcome in run_episode(policy, envs, seed):
            if step % stride == 0 or outcome:
                residual_action = getattr(policy, "residual_action", None)  # (1, 6), at step 0 of an earlier episode
                norm = None if residual_action is None else float(np.linalg.norm(residual_action)) * (step > 0)
                film.append((step, outcome, norm, envs.render_frame()))
        envs.close()
        size = height // 24  # of the letters, pixels
        for k, (step, outcome, norm, frame) in enumerate(film):
            picture = Image.fromarray(frame)
            draw = ImageDraw.Draw(picture)
            text = f"{name}  {step / POLICY_HZ:.1f} s" + (f": {outcome}" if outcome else "")
            draw.text((12, 8), text, fill=(20, 20, 20), font_size=size)
            if norm is not None:
                left, right, low = 12 + 5 * size, picture.width - 12, picture.height - 8
                draw.text((12, low), "residual", fill=(20, 20, 20), font_size=size, anchor="lb")
                draw.rectangle((left, low - size, right, low), outline=(20, 20, 20))
                filled = left + (right - left) * min(norm / LARGEST_RESIDUAL, 1.0)
                draw.rectangle((left, low - size, filled, low), fill=(31, 119, 180))
            film[k] = np.asarray(picture)
        films.append(film)
    longest = max(len(film) for film in films)
    films = [film + [film[-1]] * (longest + 15 - len(film)) for film in films]
    pictures = [np.concatenate(frames, axis=1) for frames in zip(*films, strict=True)]
    if path.suffix == ".webp":
        first, *others = [Image.fromarray(picture) for picture in pictures]
        options = {"append_images": others, "duration": 1000 * stride // POLICY_HZ, "loop": 0, "quality": 60}
        write_whole(path, lambda temporary: first.save(temporary, "WEBP", save_all=True, **options))
    else:
        film = encode_mp4(pictures, fps=POLICY_HZ // stride, macro_block_size=8)
        write_whole(path, lambda temporary: temporary.write_bytes(film))


def watch(policies: dict, env_kwargs: dict, seeds: Sequence[int]) -> None:
    """Play the episodes in MuJoCo's viewer, one policy after the other, until its window is closed."""
    for name, policy in policies.items():
        envs = PaperSquareVectorEnv(1, autoreset_mode=AutoresetMode.DISABLED, render_mode="human", **env_kwargs[name])
        for seed in seeds:
            for _, outcome in run_episode(policy, envs, seed):
                if outcome:
                    print(f"{name}, episode {seed}: {outcome}")
                if envs.viewer_closed:
                    envs.close()
                    return
        envs.close()


if __name__ == "__main__":
    args = parse(Args)
    output_dir = Path(args.output_dir)
    try:
        check_folder(args.output_dir)
        values = sweep_values(*args.sweep, args.sweep_points) if args.sweep else None
        policies, env_kwargs = load_policies(args)
        env_kwargs = {name: {**kwargs, "num_threads": args.num_threads} for name, kwargs in env_kwargs.items()}
        if args.save_video:
            check_rendering()
        if not args.render:
            output_dir.mkdir(parents=True, exist_ok=True)
    except (ValueError, RuntimeError, OSError) as error:
        fail(str(error))
    torch.set_num_threads(1)  # the cores are for the physics
    seeds = range(args.seed, args.seed + args.n_episodes)
    if args.render:
        try:
            watch(policies, env_kwargs, seeds)
        except RuntimeError as error:  # no display
            fail(str(error))
        sys.exit()

    results = {}
    for name, policy in policies.items():
        results[name] = summarize(play_episodes(policy, seeds, env_kwargs[name], args.num_envs, progress=name))
    print(format_table(results))
    everything = {"policies": results, "args": asdict(args)}
    if args.sweep:
        everything["sweep"] = run_sweep(policies, env_kwargs, seeds, args.num_envs, args.sweep[0], values)
        print(f"\nsuccess by {args.sweep[0]}:\n{format_sweep(everything['sweep'])}")
        plot_sweep(everything["sweep"], output_dir / f"sweep_{args.sweep[0]}.png")
        print(f"wrote {output_dir / f'sweep_{args.sweep[0]}.png'}")
    write_json(output_dir / "results.json", everything)
    print(f"wrote {output_dir / 'results.json'}")
    if args.plot:
        tape_half_size = next(iter(env_kwargs.values())).get("tape_half_size", EnvArgs.tape_half_size)
        plot_results(results, output_dir / "results.png", tape_half_size)
        print(f"wrote {output_dir / 'results.png'}")
    if args.save_video:
        first = next((name for name in policies if not name.startswith("base ")), next(iter(policies)))
        chosen = choose_films(results[first]["episodes"], args.video_episodes)
        for seed, kind in tqdm(chosen.items(), desc="filming", unit="ep", leave=False):
            path = output_dir / f"{kind}_{seed}.{args.video_format}"
            film_episode(policies, env_kwargs, seed, path, args.camera, args.video_height, args.video_stride)
            tqdm.write(f"wrote {path}")
