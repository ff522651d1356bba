"""What a step costs: physics, environment, base policies; all measured in one run, so that ratios mean something.

    python benchmark.py                      # a minute; with nothing else running

A step is one policy step of one environment. Every figure is the median over the repeats, with the lowest and the
highest; a repeat measures all rows before the next begins, so a slow spell of the machine does not fall on one row.
"""

import os
import time
from dataclasses import dataclass

import mujoco
import numpy as np
import torch
import tyro

from base_policies import make_base_policy
from env_paper_square import PaperSquareVectorEnv
from eval import align, fail


@dataclass
class Args:
    repeats: int = 5
    """how often everything is measured"""
    seconds: float = 2.0
    """how long each row takes per repeat, s"""
    num_envs: int = 128
    """environments stepped together"""
    num_threads: int = 0
    """threads that step the physics; 0 takes all cores"""
    torch_threads: int = 1
    """torch's threads, as in the training scripts"""
    bases: tuple[str, ...] = ("jacobian", "assets/act.pt", "assets/diffusion_policy.pt")
    """base policies to measure: names, or checkpoints of imitation-learned ones"""


def play(policy, num_envs: int, num_threads: int, seconds: float) -> tuple[float, float]:
    """Let a base play, its episodes at different stages, for so long; returns us per step of it and the environment."""
    envs = PaperSquareVectorEnv(num_envs, num_threads=num_threads)
    stages = np.arange(num_envs) * envs.max_episode_steps // num_envs
    obs, _ = envs.reset(seed=0, options={"episode_steps": stages})
    policy.reset(np.ones(num_envs, dtype=bool))
    steps, of_policy, of_envs = 0, 0.0, 0.0
    while of_policy + of_envs < seconds:
        start = time.perf_counter()
        action = policy(obs)
        middle = time.perf_counter()
        obs, _, terminations, truncations, _ = envs.step(action)
        end = time.perf_counter()
        policy.reset(terminations | truncations)
        steps, of_policy, of_envs = steps + num_envs, of_policy + middle - start, of_envs + end - middle
    envs.close()
    return 1e6 * of_policy / steps, 1e6 * of_envs / steps


def physics(num_envs: int, seconds: float) -> float:
    """Microseconds per step of one thread that does nothing but call mj_step, over the states of a base's episodes."""
    envs = PaperSquareVectorEnv(num_envs)
    stages = np.arange(num_envs) * envs.max_episode_steps // num_envs
    obs, _ = envs.reset(seed=0, options={"episode_steps": stages})
    policy = make_base_policy("jacobian")
    for _ in range(60):  # most arms press on their sheet by then
        obs, *_ = envs.step(policy(obs))
    simulations = [(envs.batch.get_model(i), envs.batch.get_data(i)) for i in range(num_envs)]
    steps, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        for model, data in simulations:
            mujoco.mj_step(model, data, envs.control_ticks * envs.physics_steps)
        steps += num_envs
    return 1e6 * (time.perf_counter() - start) / steps


if __name__ == "__main__":
    args = tyro.cli(Args)
    if min(args.repeats, args.num_envs, args.torch_threads) < 1 or not args.seconds > 0:
        fail("--repeats, --num-envs and --torch-threads must be at least 1, --seconds positive")
    torch.set_num_threads(args.torch_threads)
    try:
        policies = {
            name: make_base_policy("il", il_checkpoint=name) if os.path.exists(name) else make_base_policy(name)
            for name in args.bases
        }
    except ValueError as error:
        fail(str(error))
    cores = os.cpu_count()
    samples = []  # of each repeat, us per step by row
    for _ in range(args.repeats):
        sample = {f"physics alone, {cores} cores at once": physics(args.num_envs, args.seconds) / cores}
        for name, policy in policies.items():
            of_policy, of_envs = play(policy, args.num_envs, args.num_threads, args.seconds)
            sample |= {f"{name}: base policy": of_policy, f"{name}: environment": of_envs}
        samples.append(sample)
    bound, *_ = samples[0]
    lines = [["us per step", "median", "lowest", "highest", "times the physics"]]
    for row in samples[0]:
        values = [sample[row] for sample in samples]
        ratio = np.median([sample[row] / sample[bound] for sample in samples])
        lines.append([row, *(f"{f(values):.1f}" for f in (np.median, min, max)), f"{ratio:.2f}"])
    print(f"{args.num_envs} environments, {cores} cores, torch on {args.torch_threads}")
    print(align(lines))
