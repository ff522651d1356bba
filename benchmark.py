"""What a base policy costs beside the environment, all measured in one run, so that ratios mean something.

    python benchmark.py                      # half a minute; with nothing else running

A step is one policy step of one environment, in the episodes that the base plays; the environment's is mostly physics.
Every figure is the median over the repeats, with the lowest and the highest; a repeat measures all rows before the next
begins, so that a slow spell of the machine does not fall on one row.
"""

import os
import time
from dataclasses import dataclass

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
    """how long each base plays per repeat, s"""
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
    samples = {name: [] for name in policies}  # (us of the base, us of the environment), of each repeat
    for _ in range(args.repeats):
        for name, policy in policies.items():
            samples[name].append(play(policy, args.num_envs, args.num_threads, args.seconds))
    lines = [["us per step", "base policy", "environment", "ratio"]]
    for name, sample in samples.items():
        columns = [*zip(*sample, strict=True), [of_policy / of_envs for of_policy, of_envs in sample]]
        cells = [f"{np.median(column):.3g} ({min(column):.3g} to {max(column):.3g})" for column in columns]
        lines.append([name, *cells])
    print(f"{args.num_envs} environments, {os.cpu_count()} cores, {args.torch_threads} of them for torch")
    print(align(lines))
