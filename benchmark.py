"""What a step costs, from the physics alone to whole trainings, all measured in one run, so that ratios mean something.

    pip install stable-baselines3==2.9.2     # for its two rows; without it they are left out
    python benchmark.py                      # 17 minutes on two cores, with nothing else running; 1.5 GB

A step is one policy step of one environment. A figure is the median over the repeats, with the lowest and the highest;
a repeat measures all rows before the next begins, so that a slow spell of the machine does not fall on one row.

The bound of a row is a thread that only calls mj_step, times the threads that the row can use. A finger that presses on
the sheet costs several times an arm in the air, so the bound is taken in the row's own states and under its controls:
some of its steps are simulated a second time, on copies, and only mj_step is timed.
"""

import importlib.util
import os
import runpy
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path

import mujoco
import numpy as np
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tqdm import tqdm

from base_policies import BaseFlags, make_base
from env_paper_square import OBS_DIM, PaperSquareVectorEnv
from eval import RandomPolicy, align
from ppo_residual import Agent, make_policy
from runs import ROOT, Flags, Real, UserError, Whole, available_cores, load_checkpoint, parse

CORES = available_cores()
NUM_ENVS, ROLLOUT = 64, 4096  # of ppo.py and ppo_residual.py: environments, and steps per rollout over all of them
TRAININGS = {  # script: steps to train for; those of them at the start that do not count
    "ppo.py": (100_000, ROLLOUT),
    "ppo_residual.py": (300_000, ROLLOUT),
    "sac_residual.py": (16_000, 6144),  # the first 5,000 go without updates
}
# Starts a command and then prints its peak memory; without this, it would be charged for what this process holds
LAUNCHER = """import os, subprocess, sys
_, status, usage = os.wait4(subprocess.Popen(sys.argv[1:]).pid, 0)
print(usage.ru_maxrss)
sys.exit(status != 0)"""


@dataclass
class Args(Flags):
    repeats: Whole[1, 1000] = 3
    """how often everything is measured"""
    seconds: Real[1e-6, 3600] = 2.0
    """how long each row without a training is measured per repeat, s"""
    num_envs: tuple[Whole[1, 32_768], ...] = (1, 16, 64, 256, 1024)
    """numbers of environments to step and, those above 1, to train with; powers of two up to 4096"""
    warmup_steps: Whole[0, 10**6] = 400
    """steps of each environment before any is measured; after 400 the episodes are at all stages"""
    bases: tuple[str, ...] = ("jacobian", "assets/act.safetensors", "assets/diffusion_policy.safetensors")
    """base policies to measure: names, or checkpoints of imitation-learned ones"""
    pixels: bool = True
    """measure cameras, too, which need EGL or OSMesa"""
    training_steps: Whole[0, 10**10] = 300_000
    """most steps that a script trains for; 0 leaves the trainings out"""
    sb3_steps: Whole[0, 10**10] = 20_480
    """steps that Stable-Baselines3 trains for; 0 leaves it out"""


def replay(envs: PaperSquareVectorEnv, actions: np.ndarray) -> tuple[float, np.ndarray]:
    """What `envs.step(actions)` is about to simulate, on copies, by one thread that only calls mj_step.

    Returns the seconds in mj_step per environment, and the positions (num_envs, nq) that it ends in, before any reset.
    """
    target = envs.joint_target + envs.act_scale * np.clip(actions, -1, 1)
    _, command = envs._send(np.clip(target, envs.ctrl_low, envs.ctrl_high))
    ticks = np.arange(1, envs.control_ticks + 1)[:, None, None] / envs.control_ticks
    controls = envs._command + ticks * (command - envs._command)  # (control_ticks, num_envs, 6), rad
    model, data = envs.batch.get_model(0), mujoco.MjData(envs.model)
    ctrl, qpos, seconds = data.ctrl, np.empty((envs.num_envs, envs.model.nq)), 0.0
    for i, state in enumerate(envs.batch.state):
        envs.batch.get_model(i, model)
        mujoco.mj_setState(model, data, state, mujoco.mjtState.mjSTATE_INTEGRATION)
        mujoco.mj_forward(model, data)  # what the batch derived from the state already
        mujoco.mj_setState(model, data, state, mujoco.mjtState.mjSTATE_INTEGRATION)  # the solver's warm start again
        for control in controls[:, i]:
            ctrl[:] = control
            start = time.perf_counter()
            mujoco.mj_step(model, data, envs.physics_steps)
            seconds += time.perf_counter() - start
        qpos[i] = data.qpos
    return seconds / envs.num_envs, qpos


def replay_some(skipped: int) -> list[float]:
    """From now on, replay every 40th step of a training; returns the list that gathers its seconds in mj_step."""
    step, taken, of_physics = PaperSquareVectorEnv.step, 0, []

    def step_and_replay(envs, actions):
        nonlocal taken
        if envs.num_envs > 1:  # not one of the evaluations, which are of one episode
            taken += envs.num_envs
            if taken > skipped and taken // envs.num_envs % 40 == 0:
                of_physics.append(replay(envs, actions)[0])
        return step(envs, actions)

    PaperSquareVectorEnv.step = step_and_replay
    return of_physics


def play(policy, num_envs: int, num_threads: int, args: Args, **kwargs):
    """Let a policy play; each `next` goes on for args.seconds, and returns seconds per step of one environment.

    They are the policy's, those of `envs.step` and, measured on every 10th step, those in mj_step alone.
    """
    envs = PaperSquareVectorEnv(num_envs, num_threads=num_threads, **kwargs)
    stages = np.arange(num_envs) * envs.max_episode_steps // num_envs
    obs, _ = envs.reset(seed=0, options={"episode_steps": stages})
    policy.reset(np.ones(num_envs, dtype=bool))
    for _ in range(args.warmup_steps):
        obs, _, terminations, truncations, _ = envs.step(policy(obs))
        policy.reset(terminations | truncations)
    while True:
        steps, of_policy, of_envs, of_physics = 0, 0.0, 0.0, []
        while of_policy + of_envs < args.seconds:
            start = time.perf_counter()
            actions = policy(obs)
            of_policy += time.perf_counter() - start
            if steps % 10 == 0:
                of_physics.append(replay(envs, actions)[0])
            start = time.perf_counter()
            obs, _, terminations, truncations, _ = envs.step(actions)
            of_envs += time.perf_counter() - start
            policy.reset(terminations | truncations)
            steps += 1
        yield of_policy / steps / num_envs, of_envs / steps / num_envs, np.mean(of_physics)


def forward_speed(seconds: float) -> float:
    """Steps/s of the agent alone, as a rollout calls it: noise, log-probability of the action, value."""
    agent, x, steps, start = Agent(OBS_DIM + 6, 6, 64, 0.4), torch.randn(NUM_ENVS, OBS_DIM + 6), 0, time.perf_counter()
    with torch.inference_mode():
        while time.perf_counter() - start < seconds:
            agent.get_action_and_value(x, noise=torch.randn(NUM_ENVS, 6))
            steps += NUM_ENVS
    return steps / (time.perf_counter() - start)


def run_child(folder: str, *command: str) -> tuple[list[str], float]:
    """Run `python command` in `folder`; returns the lines that it printed and its peak memory, MB."""
    launch = [sys.executable, "-c", LAUNCHER, sys.executable, *command]
    process = subprocess.run(launch, cwd=folder, capture_output=True, text=True)
    if process.returncode:
        raise RuntimeError(f"python {' '.join(command)} failed:\n{process.stderr[-2000:]}")
    *lines, peak = process.stdout.splitlines()
    return lines, int(peak) / (1e6 if sys.platform == "darwin" else 1e6 / 1024)  # macOS counts in bytes, Linux in KiB


def train(script: str, flags: list[str], skipped: int) -> tuple[float, float, float, float]:
    """Train by a script; returns steps/s of the whole, of the collection and of the update, and the peak memory, MB."""
    with tempfile.TemporaryDirectory() as folder:
        _, peak = run_child(folder, str(ROOT / script), *flags)
        events = EventAccumulator(str(next(Path(folder, "runs").iterdir()))).Reload()
    points = {part: events.Scalars(f"time/{part}") for part in ("collect", "update")}
    steps = points["collect"][-1].step - max(point.step for point in points["collect"] if point.step <= skipped)
    collect, update = (sum(point.value for point in part if point.step > skipped) for part in points.values())
    return steps / (collect + update), steps / collect, steps / update, peak


def train_and_replay(script: str, skipped: int, *flags: str) -> None:
    """Train by a script, and print the seconds in mj_step per step of an environment."""
    of_physics = replay_some(skipped)
    sys.argv = [script, *flags]
    runpy.run_path(str(ROOT / script), run_name="__main__")
    print(np.mean(of_physics))


def learn_with_sb3(threaded: bool, steps: int, replayed: bool = False) -> None:
    """Train by PPO of Stable-Baselines3, and print steps/s from the second rollout on, or what `train_and_replay` does.

    Its users know it with an environment per process; `threaded` gives it the environments and rollouts of ppo.py.
    """
    from stable_baselines3 import PPO
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.vec_env import SubprocVecEnv, VecEnv

    class ThreadVecEnv(VecEnv):
        def __init__(self):
            self.envs = PaperSquareVectorEnv(NUM_ENVS)
            super().__init__(NUM_ENVS, self.envs.single_observation_space, self.envs.single_action_space)

        def reset(self):
            stages = np.arange(NUM_ENVS) * self.envs.max_episode_steps // NUM_ENVS
            return self.envs.reset(seed=0, options={"episode_steps": stages})[0]

        def step_async(self, actions):
            self.actions = actions

        def step_wait(self):
            obs, rewards, terminations, truncations, infos = self.envs.step(self.actions)
            rows = [{} for _ in range(NUM_ENVS)]
            for i in np.flatnonzero(terminations | truncations):
                rows[i] = {"terminal_observation": infos["final_obs"][i], "TimeLimit.truncated": truncations[i]}
            return obs, rewards, terminations | truncations, rows

        def get_attr(self, attr_name, indices=None):
            return [getattr(self.envs, attr_name)] * NUM_ENVS

        close = set_attr = env_method = env_is_wrapped = None  # which no training calls

    of_physics = replay_some(ROLLOUT) if replayed else []
    if threaded:
        torch.set_num_threads(1)  # faster than torch's default, which fights the physics for the cores
        envs, n_steps, batch_size = ThreadVecEnv(), ROLLOUT // NUM_ENVS, 1024
    else:
        envs = make_vec_env("env_paper_square:PaperSquare-v0", n_envs=4, vec_env_cls=SubprocVecEnv)
        n_steps, batch_size = 256, 64
    model = PPO("MlpPolicy", envs, device="cpu", n_steps=n_steps, batch_size=batch_size, n_epochs=10)
    model.learn(n_steps * envs.num_envs)
    start, taken = time.perf_counter(), model.num_timesteps
    model.learn(steps, reset_num_timesteps=False)
    print(np.mean(of_physics) if replayed else (model.num_timesteps - taken) / (time.perf_counter() - start))


def run_function(call: str) -> float:
    """The number that a function of this script prints last, in a process of its own."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import benchmark; benchmark.{call}"
    with tempfile.TemporaryDirectory() as folder:
        lines, _ = run_child(folder, "-c", code)
    return float(lines[-1])


def startup_seconds(script: str) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, ROOT / script, "--help"], check=True, capture_output=True)
    return time.perf_counter() - start


def spread(values: list[float], digits: str) -> str:
    """Median, lowest and highest."""
    return f"{np.median(values):{digits}} ({min(values):{digits}} to {max(values):{digits}})"


if __name__ == "__main__":
    args = parse(Args)
    if not args.num_envs or any(ROLLOUT % n for n in args.num_envs):
        raise UserError(f"--num-envs must be powers of two from 1 to {ROLLOUT}")
    if 0 < args.training_steps < 2 * ROLLOUT:
        raise UserError(f"--training-steps must be 0 or at least {2 * ROLLOUT}, two rollouts")
    bases = [
        make_base("il", BaseFlags(il_checkpoint=name)) if os.path.exists(name) else make_base(name, BaseFlags())
        for name in args.bases
    ]
    torch.set_num_threads(1)  # as in the training scripts
    torch.manual_seed(0)

    # What there is to measure
    workloads = {
        "random": RandomPolicy,
        "jacobian": partial(make_base, "jacobian", BaseFlags()),
        "residual": partial(make_policy, load_checkpoint(ROOT / "assets" / "ppo_residual.safetensors"), sample=True),
    }
    threads = sorted({2**i for i in range(CORES.bit_length()) if 2**i < CORES} | {CORES})
    games = {
        (name, n, t): play(make(), n, t, args)
        for name, make in workloads.items()
        for n, t in [*product(args.num_envs, [CORES]), *product([64], threads)]
    }
    for size in (32, 64) if args.pixels else ():
        name, make, cameras = f"jacobian, two cameras of {size} pixels", workloads["jacobian"], ("top", "side")
        games[name, 16, CORES] = play(make(), 16, CORES, args, pixels=cameras, pixel_size=size)
    base_games = {name: play(base, NUM_ENVS, CORES, args) for name, base in zip(args.bases, bases, strict=True)}
    trainings = {script: (script, steps, skipped, "") for script, (steps, skipped) in TRAININGS.items()}
    for n in [n for n in args.num_envs if n > 1]:  # rollouts of the same size
        flags = f"--num-envs {n} --num-steps {ROLLOUT // n}"
        trainings[f"ppo_residual.py, num_envs {n}"] = ("ppo_residual.py", 80_000, ROLLOUT, flags)
    for row, (script, steps, skipped, flags) in trainings.items():  # the arguments of `train`
        flags += f" --total-timesteps {min(steps, args.training_steps)}"
        flags += " --eval-freq 1000000000 --eval-episodes 1 --test-episodes 1"
        trainings[row] = (script, flags.split(), skipped)
    if not args.training_steps:
        trainings = {}
    sb3 = {"Stable-Baselines3, 4 processes": False, f"Stable-Baselines3, {NUM_ENVS} environments in threads": True}
    without_sb3 = importlib.util.find_spec("stable_baselines3") is None
    if without_sb3 or not args.sb3_steps:
        sb3 = {}

    # The bounds of trainings: a seed's states are the same in every run, so the replays need slow down only this one
    bounds = {}
    for row in TRAININGS if trainings else ():
        script, flags, skipped = trainings[row]
        bounds[row] = CORES / run_function(f"train_and_replay({script!r}, {skipped}, *{flags})")
    for row, threaded in sb3.items():
        if threaded:
            bounds[row] = CORES / run_function(f"learn_with_sb3(True, {args.sb3_steps}, replayed=True)")

    samples = defaultdict(list)  # row: of each repeat (steps/s, bound, another figure, its unit)
    for _ in tqdm(range(args.repeats)):
        for (name, n, t), game in games.items():
            _, of_envs, of_physics = next(game)
            row = f"{name}, num_envs {n}, num_threads {t}"
            samples[row].append((1 / of_envs, min(n, t) / of_physics, None, ""))
        for name, game in base_games.items():
            of_policy, of_envs, _ = next(game)
            samples[f"base {name}"].append((1 / of_policy, None, of_policy / of_envs, "of its environment's time"))
        samples[f"agent, {NUM_ENVS} observations"].append((forward_speed(args.seconds), None, None, ""))
        for row, training in trainings.items():
            whole, collect, update, peak = train(*training)
            samples[row].append((whole, bounds.get(row), peak, "MB"))
            samples[f"{row}, collection"].append((collect, bounds.get(row), None, ""))
            samples[f"{row}, update"].append((update, None, None, ""))
        for row, threaded in sb3.items():
            speed = run_function(f"learn_with_sb3({threaded}, {args.sb3_steps})")
            samples[row].append((speed, bounds.get(row), None, ""))
        for script in ("ppo_residual.py", "eval.py"):
            samples[f"{script} --help"].append((None, None, startup_seconds(script), "s"))

    lines = [["median (lowest to highest)", "steps/s", "bound", "share of the bound", "also"]]
    for row, sample in samples.items():
        speeds, limits, others, units = zip(*sample, strict=True)
        cells = [spread(speeds, ",.0f") if speeds[0] else "-", "-", "-", "-"]
        if limits[0]:
            shares = [speed / limit for speed, limit in zip(speeds, limits, strict=True)]
            cells[1:3] = f"{np.median(limits):,.0f}", spread(shares, ".2f")
        if others[0]:
            cells[3] = f"{spread(others, '.3g')} {units[0]}"
        lines.append([row, *cells])
    print(f"{CORES} cores, {args.repeats} repeats\n{align(lines)}")
    for script, row in product(("ppo.py", "ppo_residual.py") if trainings else (), sb3):
        ratios = [ours[0] / theirs[0] for ours, theirs in zip(samples[script], samples[row], strict=True)]
        print(f"{script} is {spread(ratios, '.1f')} times as fast as {row}")
    if args.sb3_steps and without_sb3:
        print("the rows of Stable-Baselines3 are left out; to have them: pip install stable-baselines3==2.9.2")
