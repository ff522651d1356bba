"""Record demonstrations, of a policy or of a person at the keyboard, as a LeRobotDataset v3.0.

    python record_demos.py --num-episodes 100                                  # of the residual policy in assets/
    python record_demos.py --policy jacobian --only-successes --noise-std 0.2  # of a base policy; noise as in DART
    python record_demos.py --teleop keyboard --output-dir mine --videos        # of a person, in MuJoCo's viewer
    python record_demos.py --num-episodes 100 --append                         # more of them

act.py, diffusion_policy.py and LeRobot train on the folder. Interrupted, it keeps all whole episodes.
"""

import shlex
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from gymnasium.vector import AutoresetMode, VectorEnv
from tqdm import tqdm

from base_policies import (
    BASES,
    BaseFlags,
    damped_step,
    joint_targets,
    joints_to_lerobot,
    make_base,
    to_lerobot,
)
from env_paper_square import JOINTS, POLICY_HZ, EnvArgs, PaperSquareVectorEnv, eval_kwargs, kinematics, state_of
from eval import VALIDATION_SEED, load_policy
from figures import check_rendering
from lerobot_dataset import CAMERAS, FLUSH_EPISODES, Dataset, encode, make_features
from runs import Real, UserError, Whole, describe_env, find_device, parse

GIVE_UP = 200  # failures in a row

# Keys of the teleoperation by their GLFW codes: name, what it does, axis of the motion, sign. MuJoCo's passive viewer
# binds none of them: it has the letters, 0 to 5, brackets and function keys, and Page Up only for a selected body.
KEYS = {
    265: ("Up", "away from the base", 0, 1),
    264: ("Down", "towards the base", 0, -1),
    263: ("Left", "to the left, as seen from the base", 1, 1),
    262: ("Right", "to the right", 1, -1),
    266: ("Page Up", "up", 2, 1),
    267: ("Page Down", "down", 2, -1),
    ord("6"): ("6", "wrist pitch, fingers down", 3, 1),
    ord("7"): ("7", "wrist pitch, fingers up", 3, -1),
    ord("8"): ("8", "wrist roll, to the left", 4, 1),
    ord("9"): ("9", "wrist roll, to the right", 4, -1),
    ord("="): ("=", "open the gripper", 5, 1),
    ord("-"): ("-", "close the gripper", 5, -1),
}
VERDICTS = {257: ("Enter", "save"), 259: ("Backspace", "discard")}
PRESS = np.array([0.008, 0.008, 0.002, 0.1, 0.1, 0.1])  # motion of one press: m, m, m, rad, rad, rad
PACE = np.array([0.002, 0.002, 0.001, 0.01, 0.01, 0.02])  # of one step at most; faster, the joints could not follow
TELEOP_STEPS = 1800  # a minute: a person is slower than the 400 steps of an episode
TELEOP_DAMPING = 0.003  # m


@dataclass
class Args(BaseFlags):
    output_dir: str = "demos"
    """folder of the dataset; must be new or empty, unless --append"""
    model_path: str = "assets/ppo_residual.safetensors"
    """checkpoint of the policy to record, which plays its mean action"""
    script: str = ""
    """play the checkpoint by this file, the source that a run keeps, instead of by the script beside record_demos.py"""
    policy: Literal[("", *BASES)] = ""
    """base policy to record instead"""
    teleop: Literal["", "keyboard"] = ""
    """record a person instead, who drives the arm in MuJoCo's viewer; the keys are printed"""
    num_episodes: Whole[1, 10**6] = 100
    """episodes to write"""
    only_successes: bool = False
    """drop the episodes that fail, and play on until num_episodes succeeded"""
    seed: Whole[0, VALIDATION_SEED] | None = None
    """seed of the first episode; episode k, dropped ones counted, has seed + k (default: 0, or with --append the one
    after the largest that was recorded)"""
    noise_std: Real[0, 10] = 0.0
    """standard deviation of the noise on the executed action, in units of the action; what is recorded is the action
    that the policy wanted there, as in DART (arXiv 1703.09327)"""
    noise_correlation: Real[0, 0.999999] = 0.8
    """correlation of the noise between one step and the next"""
    num_envs: Whole[1, 32_768] = 16
    """environments stepped together"""
    num_threads: Whole[0, 1024] = 0
    """threads that step the physics; 0 takes all cores"""
    device: Literal["cpu", "cuda", "auto"] = "cpu"
    """where the networks are; auto takes cuda where there is one"""
    append: bool = False
    """add to the dataset in output_dir"""
    videos: bool = False
    """also record the cameras top, side and wrist as MP4; much slower"""
    video_height: Whole[48, 960] = 96
    """height and width of the videos, pixels; of a policy that sees pixels, they are its own"""

    def __post_init__(self):
        super().__post_init__()
        if self.seed is not None and self.seed > VALIDATION_SEED - self.num_episodes:
            raise ValueError(f"--seed plus --num-episodes must lie below {VALIDATION_SEED}, the held-out episodes")
        if self.video_height % 16:
            raise ValueError(f"--video-height must be a multiple of 16, found {self.video_height}")
        if self.teleop and self.noise_std:
            raise ValueError("--noise-std is for policies: a person makes noise enough")


def draw_noise(seed: int, steps: int, std: float, correlation: float) -> np.ndarray:
    """The noise of an episode, (steps, 6), in units of the action: autoregressive, stationary from the first step."""
    noise = std * np.random.default_rng([seed, 2]).normal(size=(steps, len(JOINTS)))  # [seed, 1] is eval.py's
    for step in range(1, steps):
        noise[step] = correlation * noise[step - 1] + np.sqrt(1.0 - correlation**2) * noise[step]
    return noise


def record_episodes(
    policy,
    envs: VectorEnv,
    first_seed: int,
    num_episodes: int,
    only_successes: bool = False,
    noise_std: float = 0.0,
    noise_correlation: float = 0.0,
    cameras: Sequence[str] = (),
    stop: Callable[[], object] = lambda: False,
) -> Iterator[dict | None]:
    """Play episodes of rising seeds; yields each in the order of the seeds, or None for one that is dropped.

    Ends after `num_episodes` that are kept, or when `stop()`. An episode holds the dataset's features by name, (length,
    size) or (length,), cameras as `encode` returns them, and its "seed". A policy with a `verdict` ends its episode by
    "save" or "discard". Raises UserError if success stays out or the held-out episodes are reached.
    """
    num_envs = envs.num_envs
    seeds = first_seed + np.arange(num_envs)
    next_seed, released, finished = first_seed + num_envs, first_seed, {}  # finished: by seed, until it is its turn
    kept, failures = 0, 0  # failures: in a row
    active, fresh = np.ones(num_envs, dtype=bool), np.ones(num_envs, dtype=bool)
    frames, films = [[] for _ in seeds], [{} for _ in seeds]  # of the episodes that are being played
    noise = np.zeros((num_envs, envs.max_episode_steps, len(JOINTS)))
    while active.any() and not stop():
        if fresh.any():
            if seeds[fresh].max() >= VALIDATION_SEED:
                raise UserError(f"the seeds reach {VALIDATION_SEED}, where held-out episodes begin")
            obs, _ = envs.reset(seed=seeds.tolist(), options={"reset_mask": fresh})
            policy.reset(fresh)
            for i in np.flatnonzero(fresh):
                frames[i], films[i] = [], {camera: [] for camera in cameras}
                noise[i] = draw_noise(seeds[i], envs.max_episode_steps, noise_std, noise_correlation)
        for i in np.flatnonzero(active):
            for camera, film in films[i].items():
                film.append(obs[camera][i].copy())

        action = envs.acting(policy(obs))
        state = state_of(obs)
        wanted = joint_targets(envs.to_si(state), envs) + envs.act_scale * action
        wanted = np.clip(wanted, envs.ctrl_low, envs.ctrl_high)
        commanded, environment_state = to_lerobot(state, envs)
        measured = joints_to_lerobot(envs.joint_measured).astype(np.float32)
        executed = action + noise[np.arange(num_envs), [len(steps) for steps in frames]]
        obs, rewards, terminations, truncations, _ = envs.step(executed)
        verdict = getattr(policy, "verdict", "")
        done = terminations | truncations | bool(verdict)
        frame = {
            "observation.state": measured,
            "observation.environment_state": environment_state,
            "action": joints_to_lerobot(wanted).astype(np.float32),
            "commanded": commanded,
            "next.reward": rewards.astype(np.float32),
            "next.done": done,
            "next.success": terminations,
        }
        for i in np.flatnonzero(active):
            frames[i].append({key: values[i] for key, values in frame.items()})

        ended = np.flatnonzero(done & active)
        for i in ended:
            keep = (terminations[i] or not only_successes) and verdict != "discard"
            if keep:
                episode = {key: np.stack([step[key] for step in frames[i]]) for key in frame}
                episode |= {f"observation.images.{camera}": encode(film) for camera, film in films[i].items()}
            finished[int(seeds[i])] = {**episode, "seed": int(seeds[i])} if keep else None
            frames[i], kept = [], kept + keep
        active[ended] = False
        # One more only if it is wanted: what was played are then the same episodes whatever num_envs
        restarted = ended[: num_episodes - kept - active.sum()]
        active[restarted] = True
        seeds[restarted] = next_seed + np.arange(len(restarted))
        next_seed += len(restarted)
        fresh = np.isin(np.arange(num_envs), restarted)
        envs.paused[:] = ~active
        while released in finished:
            episode = finished.pop(released)
            released += 1
            failures = 0 if episode else failures + 1
            yield episode
            if failures == GIVE_UP:
                raise UserError(f"{GIVE_UP} episodes in a row failed, too many for --only-successes")
    for seed in sorted(finished):  # stopped: these waited for an earlier episode, which will not end
        yield finished[seed]


class KeyboardPolicy:
    """A person at the keyboard of MuJoCo's viewer, as a policy of one environment; an episode waits for its first key.

    The viewer reports that a key is pressed, and neither that it is held nor let go: a press asks for a motion of a
    fixed length, which is then made at `PACE`. Args: `envs`, in mode "human"; `stop`, as of `record_episodes`.
    """

    def __init__(self, envs: VectorEnv, stop: Callable[[], object]):
        self.envs, self.stop = envs, stop
        self.keys = deque()  # pressed, not yet seen to; the viewer's thread appends
        envs.key_callback = self.keys.append
        self.reset(np.ones(1, dtype=bool))

    def reset(self, mask: np.ndarray) -> None:
        self.keys.clear()
        self.left, self.begun, self.verdict = np.zeros(6), False, ""

    def __call__(self, obs: np.ndarray) -> np.ndarray:
        while True:
            while self.keys:
                key = self.keys.popleft()
                if key in VERDICTS:
                    self.verdict = VERDICTS[key][1] if self.begun or VERDICTS[key][1] == "discard" else ""
                else:
                    self.left = self.left + key_to_motion(key)
            self.begun = self.begun or self.left.any()
            if self.begun or self.verdict or self.stop():
                break
            self.envs.render()
        motion = np.clip(self.left, -PACE, PACE)
        self.left = self.left - motion
        targets = joint_targets(self.envs.to_si(state_of(obs)), self.envs)
        return motion_to_action(targets, motion[None], self.envs.act_scale)


def key_to_motion(key: int) -> np.ndarray:
    """The motion (6,) that a press of a key, by its GLFW code, asks for: x, y, z, pitch, roll, gripper; m and rad."""
    motion = np.zeros(len(PRESS))
    if key in KEYS:
        _, _, axis, sign = KEYS[key]
        motion[axis] = sign * PRESS[axis]
    return motion


def motion_to_action(targets: np.ndarray, motion: np.ndarray, act_scale: float) -> np.ndarray:
    """Actions (num_envs, 6) that move the fingertip's target by `motion` (num_envs, 6): x, y, z, pitch, roll, gripper.

    `targets` (num_envs, 6) are the joint targets, rad. Damped least squares; pitch and roll are the fingers' own, and
    stay as they are when the fingertip moves. A step longer than `act_scale`, rad, is scaled as a whole.
    """
    _, jacobian = kinematics(targets)
    step = damped_step(jacobian, motion[:, :5], TELEOP_DAMPING)  # (num_envs, 5), rad
    action = np.concatenate([step, motion[:, 5:]], axis=1) / act_scale
    return action / np.maximum(np.abs(action).max(axis=1, keepdims=True), 1.0)


if __name__ == "__main__":
    args = parse(Args)
    device, stopped = find_device(args.device), []  # stopped: signals that came
    if args.videos:
        check_rendering()
    task, env = PaperSquareVectorEnv, describe_env(PaperSquareVectorEnv, eval_kwargs(EnvArgs()))
    if args.teleop:
        task = partial(task, render_mode="human", max_episode_steps=TELEOP_STEPS)
    elif args.policy:
        policy, task = make_base(args.policy, args, device=device), partial(task, observe_measured=True)
    else:
        policy, task, checkpoint = load_policy(args.model_path, args.script, device=device)
        env = checkpoint["env"]
    cameras = task.keywords.get("pixels", ()) if isinstance(task, partial) else ()
    cameras, video_height = (cameras, task.keywords["pixel_size"]) if cameras else (CAMERAS, args.video_height)
    if args.videos:
        task = partial(task, pixels=cameras, pixel_size=video_height)
    torch.set_num_threads(1)  # the cores are for the physics
    num_envs = 1 if args.teleop else min(args.num_envs, args.num_episodes)
    envs = task(num_envs, num_threads=args.num_threads, autoreset_mode=AutoresetMode.DISABLED)
    if args.teleop:
        envs.reset(seed=0)
        envs.render()  # UserError without a display
    features = make_features(envs, cameras if args.videos else (), video_height)
    dataset = Dataset(Path(args.output_dir), features, env, args.append, 1 if args.teleop else FLUSH_EPISODES)
    first_seed = dataset.next_seed if args.seed is None else args.seed

    def stop() -> bool:
        return bool(stopped) or envs.viewer_closed

    if args.teleop:
        policy = KeyboardPolicy(envs, stop)
        print("\n".join(f"{name:10} {what}" for name, what, *_ in (*KEYS.values(), *VERDICTS.values())))
        print("An episode begins with the first key and is saved at its end. ] is the view from above.")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: stopped.append(number))

    start, lengths, successes, dropped, trouble = time.perf_counter(), [], 0, 0, ""
    bar = tqdm(total=args.num_episodes, desc="recording", unit="ep")
    noise, cameras = (args.noise_std, args.noise_correlation), cameras if args.videos else ()
    task = (first_seed, args.num_episodes, args.only_successes)
    try:
        try:
            for episode in record_episodes(policy, envs, *task, *noise, cameras, stop):
                if episode is None:
                    dropped += 1
                    bar.set_postfix(dropped=dropped)
                    continue
                dataset.add(episode)
                lengths.append(len(episode["action"]))
                successes += bool(episode["next.success"][-1])
                bar.update()
        finally:
            dataset.flush()
    except OSError:
        bar.close()  # the error is the last line
        print(f"{args.output_dir} holds the episodes that were written before", file=sys.stderr)
        raise
    except UserError as error:
        trouble = str(error)
    bar.close()
    envs.close()
    if lengths:
        print(
            f"{len(lengths)} episodes, {sum(lengths)} frames; {100 * successes / len(lengths):.0f} % successes, "
            f"{dropped} dropped; mean length {np.mean(lengths) / POLICY_HZ:.1f} s, "
            f"recorded in {time.perf_counter() - start:.0f} s"
        )
        total = f"{dataset.info['total_episodes']} episodes in {args.output_dir}"
        print(f"{total}; train on them: {shlex.join(['python', 'act.py', '--dataset', args.output_dir])}")
    else:
        print("no episode was finished, and nothing written")
    if trouble:
        raise UserError(trouble)
    sys.exit(128 + stopped[0] if stopped else 0)
