"""Evaluate policies on held-out episodes: every policy plays the same ones, by its mean action.

    python eval.py --policy jacobian                                          # a base policy needs no checkpoint
    python eval.py --model-path runs/NAME/last.pt --compare-base --save-video

Prints one table and writes results.json. Also holds what the training scripts evaluate with: `validate`, `report`.
"""

import importlib
import json
import pickle
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, NoReturn

import numpy as np
import torch
import tyro
from gymnasium.vector import AutoresetMode
from scipy.stats import binomtest
from tqdm import tqdm

from base_policies import make_base_policy
from env_paper_square import OBS, PaperSquareVectorEnv

POLICY_HZ = 30  # steps per second, the environment's default
SCRIPTS = ("ppo_residual", "ppo", "sac_residual")  # that a checkpoint may come from
VALIDATION_SEED = 1_000_000  # episodes that training evaluates on as it goes
TEST_SEED = 2_000_000  # episodes that results are reported on


@dataclass
class Args:
    model_path: tuple[str, ...] = ()
    """checkpoints to evaluate, one or several"""
    policy: tuple[str, ...] = ()
    """policies without a checkpoint: zero, random, jacobian, hybrid"""
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
    stochastic: bool = False
    """sample the actions of checkpoints instead of taking the mean"""
    num_envs: int = 64
    """environments stepped together"""
    num_threads: int = 0
    """threads that step the physics; 0 takes all cores"""
    plot: bool = False
    """write results.png"""
    save_video: bool = False
    """film the first episodes, all policies side by side"""
    video_episodes: int = 3
    """episodes to film"""
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
    """folder for results.json, results.png and the videos"""


class RandomPolicy:
    """Uniformly random actions, from a generator of its own."""

    def __init__(self, seed: int = 0):
        self.rng = np.random.default_rng(seed)

    def __call__(self, obs: np.ndarray) -> np.ndarray:
        return self.rng.uniform(-1.0, 1.0, (len(obs), 6))

    def reset(self, mask: np.ndarray) -> None:
        pass


def fail(message: str) -> NoReturn:
    """End the program for a user's mistake: one line on stderr, exit code 2."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def play_episodes(policy, seeds: Sequence[int], env_kwargs: dict, num_envs: int = 64, progress: str = "") -> dict:
    """Play one episode per seed to its end; returns arrays (len(seeds),) by name, in the order of the seeds.

    `forces` is apart: the normal force on the harder pressed fingertip at every step in contact, N, pooled.
    """
    num_envs = min(num_envs, len(seeds))
    envs = PaperSquareVectorEnv(num_envs, autoreset_mode=AutoresetMode.DISABLED, **env_kwargs)
    names = ("success", "return", "length", "final_distance_m", "final_yaw_error_rad", "residual_norm")
    episodes = {name: np.zeros(len(seeds)) for name in names}
    forces = []
    playing = np.arange(num_envs)  # the episode that each environment plays
    active = np.ones(num_envs, dtype=bool)
    waiting = num_envs  # the next episode to start
    obs, _ = envs.reset(seed=[int(seed) for seed in seeds[:num_envs]])
    policy.reset(active)
    bar = tqdm(total=len(seeds), desc=progress, unit="ep", leave=False, disable=not progress)
    while active.any():
        obs, rewards, terminations, truncations, infos = envs.step(policy(obs))
        episodes["return"][playing[active]] += rewards[active]
        episodes["length"][playing[active]] += 1
        residual_action = getattr(policy, "residual_action", None)  # (num_envs, 6)
        if residual_action is not None:
            episodes["residual_norm"][playing[active]] += np.linalg.norm(residual_action[active], axis=1)
        forces.append(envs.fingertip_force[active & (envs.fingertip_force.max(axis=1) > 0)].max(axis=1))

        ended = np.flatnonzero((terminations | truncations) & active)
        if len(ended) == 0:
            continue
        bar.update(len(ended))
        episodes["success"][playing[ended]] = terminations[ended]
        episodes["final_distance_m"][playing[ended]] = infos["dist_to_goal"][ended]
        episodes["final_yaw_error_rad"][playing[ended]] = infos["orientation_error"][ended]
        restarted = ended[: len(seeds) - waiting]
        active[ended[len(restarted) :]] = False  # nothing left to play
        envs.paused[:] = ~active
        if len(restarted):
            playing[restarted] = waiting + np.arange(len(restarted))
            waiting += len(restarted)
            mask = np.isin(np.arange(num_envs), restarted)
            obs, _ = envs.reset(seed=[int(seeds[k]) for k in playing], options={"reset_mask": mask})
            policy.reset(mask)
    bar.close()
    envs.close()
    episodes["residual_norm"] /= episodes["length"]
    return {**episodes, "seed": np.asarray(seeds), "forces": np.concatenate(forces)}


def summarize(episodes: dict) -> dict:
    """The row of results.json for what `play_episodes` returned; the interval is Wilson's, 95 %."""
    success = episodes["success"].astype(bool)
    interval = binomtest(int(success.sum()), len(success)).proportion_ci(method="wilson")
    times = episodes["length"][success] / POLICY_HZ
    forces = episodes["forces"]
    columns = ("seed", "success", "return", "length", "final_distance_m", "final_yaw_error_rad")
    rows = zip(*(episodes[name].tolist() for name in columns), strict=True)
    return {
        "success_rate": float(success.mean()),
        "ci95": [float(interval.low), float(interval.high)],
        "mean_return": float(episodes["return"].mean()),
        "mean_length": float(episodes["length"].mean()),
        "median_time_to_success_s": float(np.median(times)) if len(times) else None,
        "mean_final_distance_m": float(episodes["final_distance_m"].mean()),
        "mean_residual_norm": float(episodes["residual_norm"].mean()),
        "fingertip_force_n": {"median": float(np.median(forces)), "max": float(forces.max())} if len(forces) else None,
        "episodes": [
            dict(zip(columns, (int(row[0]), bool(row[1]), row[2], int(row[3]), *row[4:]), strict=True)) for row in rows
        ],
    }


def format_table(results: dict[str, dict]) -> str:
    """Policies by name, as `summarize` returns them, as a table of plain text."""
    lines = [["policy", "success", "95 % interval", "return", "time to success", "final distance", "force med/max"]]
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
            ]
        )
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    rows = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join([rows[0], "-" * len(rows[0]), *rows[1:]])


def save_checkpoint(checkpoint: dict, path: Path) -> None:
    """Write a checkpoint whole or not at all."""
    temporary = path.with_suffix(".tmp")
    torch.save(checkpoint, temporary)
    temporary.replace(path)


def load_checkpoint(path: str | Path) -> dict:
    """Read a checkpoint of one of the training scripts, without executing anything in it.

    Raises ValueError, with one line for the user, if the file is missing or is not such a checkpoint.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no checkpoint at {path}: give the .pt file that a training script wrote under runs/")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} is not a checkpoint of this project (cannot be read: {reason[:100]})") from error
    expected = {"script", "args", "model", "env_kwargs", "global_step", "obs_names"}
    if not isinstance(checkpoint, dict) or not expected <= checkpoint.keys():
        raise ValueError(f"{path} is not a checkpoint of this project: it lacks {', '.join(sorted(expected))}")
    if checkpoint["script"] not in SCRIPTS:
        raise ValueError(f"{path} comes from an unknown script: expected one of {', '.join(SCRIPTS)}")
    if checkpoint["obs_names"] != list(OBS):
        raise ValueError(
            f"{path} was trained on other observations: {', '.join(checkpoint['obs_names'])}; train it anew"
        )
    return checkpoint


def load_policies(args: Args) -> tuple[dict, dict]:
    """The policies that the flags ask for, by name, and the environment arguments of each."""
    policies, env_kwargs = {}, {}
    for path in args.model_path:
        checkpoint = load_checkpoint(path)
        script = importlib.import_module(checkpoint["script"])
        name = f"{checkpoint['args']['exp_name']} seed {checkpoint['args']['seed']}"
        if name in policies:
            name = f"{Path(path).parent.name}/{Path(path).stem}"
        policy = script.make_policy(checkpoint, sample=args.stochastic)
        if args.compare_base and hasattr(policy, "base_policy"):  # pure RL has none
            base_name = f"base {checkpoint['args']['base_policy']}"
            if env_kwargs.get(base_name, checkpoint["env_kwargs"]) != checkpoint["env_kwargs"]:
                base_name = f"{base_name} of {name}"
            policies[base_name], env_kwargs[base_name] = policy.base_policy, checkpoint["env_kwargs"]
        policies[name], env_kwargs[name] = policy, checkpoint["env_kwargs"]
    if args.compare_base and not any(name.startswith("base ") for name in policies):
        raise ValueError("--compare-base needs a checkpoint of a residual script: found none that has a base policy")
    names = [*args.policy, *["zero"] * args.compare_zero, *["random"] * args.compare_random]
    shared = next(iter(env_kwargs.values()), {"act_scale": 0.02})
    for name in names:
        policies[name] = RandomPolicy() if name == "random" else make_base_policy(name, act_scale=shared["act_scale"])
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


def report(
    policies: dict, checkpoint: dict, num_episodes: int, evaluations: list, run_dir: Path, film: bool = False
) -> dict:
    """End a training: play all policies on the same test episodes, print the table, write results.json."""
    seeds = range(TEST_SEED, TEST_SEED + num_episodes)
    results = {
        name: summarize(play_episodes(policy, seeds, environment_of(checkpoint), progress=name))
        for name, policy in policies.items()
    }
    minutes = evaluations[-1]["seconds"] / 60
    print(f"{checkpoint['global_step']} steps, {minutes:.1f} min of training; {num_episodes} held-out test episodes:")
    print(format_table(results))
    everything = {"policies": results, "evaluations": evaluations, "args": checkpoint["args"]}
    (run_dir / "results.json").write_text(json.dumps(everything, indent=1) + "\n")
    if film:
        film_episode(policies, dict.fromkeys(policies, checkpoint["env_kwargs"]), TEST_SEED, run_dir / "episode.mp4")
    print(f"wrote {run_dir}; watch it: python eval.py --model-path {run_dir}/last.pt --save-video")
    return results


def plot_results(results: dict[str, dict], path: Path, clearance: float = 0.006) -> None:
    """Success with its interval, time to success, and where the sheet ends, as one figure; clearance in m."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (bars, times, finals) = plt.subplots(1, 3, figsize=(14, 3.5 + 0.15 * len(results)), layout="constrained")
    for k, row in enumerate(results.values()):
        rate, (low, high) = row["success_rate"], row["ci95"]
        bars.barh(k, rate, color=f"C{k}", xerr=[[max(rate - low, 0)], [max(high - rate, 0)]], capsize=4)
        episodes = row["episodes"]
        seconds = sorted(episode["length"] / POLICY_HZ for episode in episodes if episode["success"])
        times.step([0, *seconds], np.arange(len(seconds) + 1) / len(episodes), where="post", color=f"C{k}")
        distances = [1000 * episode["final_distance_m"] for episode in episodes]
        yaws = [np.degrees(episode["final_yaw_error_rad"]) for episode in episodes]
        finals.scatter(distances, yaws, s=8, color=f"C{k}", alpha=0.6)
    bars.set(xlabel="success rate, with 95 % interval", xlim=(0, 1.05), yticks=range(len(results)))
    bars.set_yticklabels(list(results))
    bars.invert_yaxis()
    times.set(xlabel="time, s", ylabel="share of episodes solved", ylim=(0, 1.05))
    finals.axvline(1000 * clearance, color="grey", linestyle=":")
    finals.set(xlabel="final distance, mm (dotted: clearance)", ylabel="final yaw error, deg", xscale="log")
    figure.savefig(path, dpi=110)
    plt.close(figure)


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


def film_episode(
    policies: dict, env_kwargs: dict, seed: int, path: Path, camera: str = "side", height: int = 480, stride: int = 2
) -> None:
    """Film one episode, the policies side by side, each with its name and outcome; path ends in .mp4 or .webp."""
    import imageio
    from PIL import Image, ImageDraw

    view = {"render_mode": "rgb_array", "camera": camera, "height": height, "width": 4 * height // 3}
    films = []
    for name, policy in policies.items():
        envs = PaperSquareVectorEnv(1, autoreset_mode=AutoresetMode.DISABLED, **view, **env_kwargs[name])
        film = []
        for step, outcome in run_episode(policy, envs, seed):
            if step % stride == 0 or outcome:
                film.append((step, outcome, envs.render_frame()))
        envs.close()
        for k, (step, outcome, frame) in enumerate(film):
            picture = Image.fromarray(frame)
            text = f"{name}  {step / POLICY_HZ:.1f} s" + (f": {outcome}" if outcome else "")
            ImageDraw.Draw(picture).text((12, 8), text, fill=(20, 20, 20), font_size=height // 24)
            film[k] = np.asarray(picture)
        films.append(film)
    longest = max(len(film) for film in films)
    films = [film + [film[-1]] * (longest + 15 - len(film)) for film in films]
    pictures = [np.concatenate(frames, axis=1) for frames in zip(*films, strict=True)]
    if path.suffix == ".webp":
        first, *others = [Image.fromarray(picture) for picture in pictures]
        first.save(path, save_all=True, append_images=others, duration=1000 * stride // POLICY_HZ, loop=0, quality=60)
    else:
        imageio.mimwrite(path, pictures, fps=POLICY_HZ // stride, macro_block_size=8)


def watch(policies: dict, env_kwargs: dict, seeds: Sequence[int]) -> None:
    """Play the episodes in MuJoCo's viewer, one policy after the other."""
    for name, policy in policies.items():
        envs = PaperSquareVectorEnv(1, autoreset_mode=AutoresetMode.DISABLED, render_mode="human", **env_kwargs[name])
        for seed in seeds:
            *_, (_, outcome) = run_episode(policy, envs, seed)
            print(f"{name}, episode {seed}: {outcome}")
        envs.close()


if __name__ == "__main__":
    args = tyro.cli(Args)
    if args.n_episodes < 1 or args.num_envs < 1 or args.video_episodes < 1 or args.seed < 0:
        fail("--n-episodes, --num-envs and --video-episodes must be at least 1, and --seed not negative")
    if not (48 <= args.video_height <= 960 and 1 <= args.video_stride <= POLICY_HZ):
        fail(f"--video-height must lie in [48, 960] and --video-stride in [1, {POLICY_HZ}]")
    output_dir = Path(args.output_dir)
    try:
        policies, env_kwargs = load_policies(args)
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
        environment = {**env_kwargs[name], "num_threads": args.num_threads}
        results[name] = summarize(play_episodes(policy, seeds, environment, args.num_envs, progress=name))
    print(format_table(results))
    (output_dir / "results.json").write_text(json.dumps({"policies": results, "args": asdict(args)}, indent=1) + "\n")
    print(f"wrote {output_dir / 'results.json'}")
    if args.plot:
        plot_results(results, output_dir / "results.png")
        print(f"wrote {output_dir / 'results.png'}")
    if args.save_video:
        for seed in tqdm(seeds[: args.video_episodes], desc="filming", unit="ep", leave=False):
            path = output_dir / f"episode_{seed}.{args.video_format}"
            film_episode(policies, env_kwargs, seed, path, args.camera, args.video_height, args.video_stride)
            tqdm.write(f"wrote {path}")
