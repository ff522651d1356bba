"""The environment: its interfaces, its physics, its rewards, and whether its documentation tells the truth."""

import copy
import gc
import importlib.util
import inspect
import json
import os
import pickle
import shutil
import subprocess
import sys
import warnings
from collections import deque
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import mujoco
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from numpy.testing import assert_allclose, assert_array_equal

from base_policies import JacobianIKPolicy, joint_targets
from env_paper_square import (
    DRAWS,
    FINGERTIPS,
    FORCE_LIMIT,
    JOINTS,
    OBS,
    OBS_DIM,
    OBS_SCALE,
    OBS_ZERO,
    SCENE_PATH,
    SERVO_FRICTION,
    SQUARE_POS,
    STIFFNESS,
    TAPE_WIDTH,
    EnvArgs,
    PaperSquareEnv,
    PaperSquareVectorEnv,
    env_kwargs,
    eval_kwargs,
    kinematics,
    make_observation,
    nominal_arm,
    to_si,
)
from runs import UserError

GOLDEN_PATH = Path(__file__).with_name("golden_rollout.json")
SCALES = {name: getattr(EnvArgs, f"randomize_{name}") for name in DRAWS}
MODES = [AutoresetMode.SAME_STEP, AutoresetMode.NEXT_STEP, AutoresetMode.DISABLED]
SCENE = mujoco.MjModel.from_xml_path(str(SCENE_PATH))
HOME = SCENE.key("home").qpos
EXACT = {"randomize": False}


def simulations(envs):
    """Live views of the state of each simulation."""
    names = ("qpos", "qvel", "ctrl", "time")
    return [SimpleNamespace(**{name: envs.batch.bind(name)[i] for name in names}) for i in range(envs.num_envs)]


def place_sheet(data, dx=0.0, dy=0.0, yaw=0.0, height=0.0005):
    """Put the sheet at an offset from the square's centre, at rest."""
    data.qpos[6:9] = SQUARE_POS[0] + dx, SQUARE_POS[1] + dy, height
    data.qpos[9:13] = np.cos(yaw / 2), 0.0, 0.0, np.sin(yaw / 2)
    data.qvel[6:] = 0.0


def random_actions(num_steps, num_envs, seed=0):
    return np.random.default_rng(seed).uniform(-1.0, 1.0, (num_steps, num_envs, 6))


def rollout(envs, actions, seed=None):
    """The observations, rewards, terminations and truncations of a rollout, each (steps, num_envs, ...)."""
    if seed is not None:
        envs.reset(seed=seed)
    return [np.array(values) for values in zip(*(envs.step(action)[:4] for action in actions), strict=True)]


def assert_same_rollout(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype
        assert_array_equal(a, b)


def documented_table(section, columns):
    """The rows of a table in the class docstring, as lists of cells."""
    text = inspect.getdoc(PaperSquareVectorEnv).split(f"## {section}\n")[1].split("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    assert rows[0] == columns
    return rows[2:]


# Interfaces


def test_environment_checkers_and_spaces():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", ".*Box observation space m..imum value is -?infinity")
        check_env(gym.make("PaperSquare-v0").unwrapped, skip_render_check=True)
    envs = PaperSquareVectorEnv(3)
    observations, _ = envs.reset(seed=0)
    assert envs.observation_space.shape == (3, OBS_DIM) and observations in envs.observation_space
    assert envs.action_space.shape == (3, 6) and envs.single_action_space.shape == (6,)
    assert (envs.action_space.low == -1).all() and (envs.action_space.high == 1).all()
    observations, rewards, terminations, truncations, _ = envs.step(envs.action_space.sample())
    assert observations in envs.observation_space
    assert rewards.shape == terminations.shape == truncations.shape == (3,)
    assert terminations.dtype == truncations.dtype == bool


def test_stable_baselines3_env_checker():
    checker = pytest.importorskip("stable_baselines3.common.env_checker")
    checker.check_env(gym.make("PaperSquare-v0").unwrapped, skip_render_check=True)


def steps_to_truncation(env, action):
    env.reset(seed=0)
    return 1 + next(step for step in range(1000) if np.any(env.step(action)[3]))


def test_gym_make_takes_the_length_of_episodes_the_threads_and_the_arguments():
    assert gym.spec("PaperSquare-v0").max_episode_steps == 400
    still = np.zeros(6, dtype=np.float32)
    for steps in (30, 450):
        env = gym.make("PaperSquare-v0", max_episode_steps=steps, num_threads=2, act_scale=0.01)
        assert type(env.unwrapped) is PaperSquareEnv and env.unwrapped.envs.act_scale == 0.01
        assert steps_to_truncation(env, still) == steps
        for mode in ("sync", "vector_entry_point"):
            envs = gym.make_vec("PaperSquare-v0", num_envs=1, vectorization_mode=mode, max_episode_steps=steps)
            assert steps_to_truncation(envs, still[None]) == steps
    assert type(envs.unwrapped) is PaperSquareVectorEnv
    envs = gym.make_vec(
        "PaperSquare-v0", num_envs=2, vectorization_mode="vector_entry_point", autoreset_mode="NextStep"
    )
    gym.wrappers.vector.NormalizeObservation(envs).reset(seed=0)  # it needs this mode


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs the affinity of a process")
def test_all_cores_are_those_that_the_process_may_use():
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert PaperSquareVectorEnv(8).batch.nthread == 1
    finally:
        os.sched_setaffinity(0, allowed)


# Copies


class Delayed(PaperSquareVectorEnv):
    """A copy of the environment that remembers more: nothing says so."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.queue, self.noise, self.drift = deque(maxlen=3), np.random.default_rng(5), np.zeros(self.num_envs)

    def step(self, actions):
        self.queue.append(actions)
        self.drift += self.noise.normal()
        return super().step(np.clip(self.queue[0] + 0.1 * self.drift[:, None], -1, 1))


@pytest.mark.parametrize("copied", ["state", "pickle", "deepcopy"])
def test_a_copy_goes_on_to_the_last_bit_with_all_that_it_remembers(copied):
    envs, actions = Delayed(3, act_scale=0.03, max_episode_steps=15), random_actions(40, 3)
    rollout(envs, actions[:20], seed=1)
    if copied == "state":
        other = Delayed(3, act_scale=0.03, max_episode_steps=15)
        other.load_state_dict(envs.state_dict())
    else:
        other = pickle.loads(pickle.dumps(envs)) if copied == "pickle" else copy.deepcopy(envs)
    ours = rollout(envs, actions[20:])
    assert_same_rollout(ours, rollout(other, actions[20:]))
    assert ours[3].any()  # across a reset, too


def test_a_new_flag_of_a_copied_environment_reaches_its_evaluation(tmp_path, monkeypatch):
    """Reward weights apart, which are the default ones: returns of different trainings compare."""
    flags = {"cube_weight": 1.0, "cube_size": 0.02, "randomize_cube": 0.5}
    text, last = (
        SCENE_PATH.parents[1].joinpath("env_paper_square.py").read_text(),
        "    num_threads: Whole[0, 1024] = 0\n",
    )
    assert text.count(last) == 1
    added = "".join(f"    {name}: float = {value}\n" for name, value in flags.items())
    tmp_path.joinpath("assets").symlink_to(SCENE_PATH.parent)
    path = tmp_path / "env_copy.py"
    path.write_text(text.replace(last, added + last))
    spec = importlib.util.spec_from_file_location("env_copy", path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "env_copy", module)
    monkeypatch.setattr(gym, "register", lambda *args, **kwargs: None)
    spec.loader.exec_module(module)
    args = module.EnvArgs(cube_size=0.03, cube_weight=2.0, randomize_cube=0.1, randomize=False, randomize_xy=0.2)
    assert module.env_kwargs(args).items() >= {"cube_size": 0.03, "cube_weight": 2.0, "randomize": False}.items()
    kwargs = module.eval_kwargs(args)
    assert kwargs.items() >= {"cube_size": 0.03, "randomize_cube": 0.5, "randomize_xy": 0.2}.items()
    assert "cube_weight" not in kwargs and "randomize" not in kwargs


def test_evaluation_is_never_easier_than_the_default_flags_or_the_training():
    args = EnvArgs(act_scale=0.03, tape_half_size=0.076, randomize=False, randomize_xy=0.0, randomize_yaw=1.5)
    expected = {name: env_kwargs(EnvArgs())[name] for name in eval_kwargs(args)}
    assert eval_kwargs(args) == expected | {"act_scale": 0.03, "tape_half_size": 0.076, "randomize_yaw": 1.5}
    assert "randomize" not in expected
    assert eval_kwargs(EnvArgs(randomize_arm=False))["randomize_arm"] is False  # the arm is part of the task


# Success


def test_success_takes_five_steps_with_all_corners_inside():
    """Sheets at offsets and yaws, at once; the short side has more room than the long one."""
    quarter = np.pi / 2
    fits = [(0, 0, 0), (0.004, 0, 0), (-0.004, 0, 0), (0, 0.026, 0), (0, 0, 0.1), (0, 0, quarter), (0, 0, np.pi)]
    fits += [(0, 0.004, quarter)]
    not_fits = [(0.007, 0, 0), (-0.007, 0, 0), (0, 0.029, 0), (0, 0, 0.2), (0, 0, -0.2), (0, 0.007, quarter)]
    poses = [*((*pose, 0.0005) for pose in (*fits, *not_fits)), (0, 0, 0, 0.03)]  # and one above the table
    envs = PaperSquareVectorEnv(len(poses), randomize=False, autoreset_mode=AutoresetMode.DISABLED)
    envs.reset(seed=0)
    for data, pose in zip(simulations(envs), poses, strict=True):
        place_sheet(data, *pose)
    success = np.arange(len(poses)) < len(fits)
    for step in range(1, 6):
        observations, _, terminations, truncations, infos = envs.step(np.zeros((len(poses), 6)))
        counts = to_si(observations)[:, OBS["hold_counter"]][:, 0]
        assert_allclose(counts[:-1], np.where(success, step, 0)[:-1], atol=1e-6)
        assert_array_equal(counts[:-1].round(), envs.hold_counter[:-1])
        assert step > 1 or envs.hold_counter[-1] == 0  # then it has fallen
        assert_array_equal(terminations, success & (step == 5))
        assert_array_equal(infos["is_success"], terminations)
        assert not truncations.any()


def test_leaving_the_square_starts_the_count_again_and_hold_steps_is_an_argument():
    envs = PaperSquareVectorEnv(1, randomize=False, hold_steps=4, autoreset_mode=AutoresetMode.DISABLED)
    envs.reset(seed=0)
    counts = []
    for dx in (0.0, 0.0, 0.0, 0.02, 0.0, 0.0, 0.0, 0.0):
        place_sheet(simulations(envs)[0], dx)
        observations, _, terminations, _, _ = envs.step(np.zeros((1, 6)))
        counts.append(round(to_si(observations)[0, OBS["hold_counter"]].item()))
        assert terminations[0] == (counts[-1] == 4)
    assert counts == [1, 2, 3, 0, 1, 2, 3, 4]


def test_truncation_comes_exactly_at_max_episode_steps_unless_success_does():
    env = PaperSquareEnv(max_episode_steps=5)
    for success in (False, True, False):
        env.reset(seed=0)
        if success:
            place_sheet(simulations(env.envs)[0])
        ends = [env.step(np.zeros(6))[2:4] for _ in range(5)]
        assert ends == [(False, False)] * 4 + [(success, not success)]


def test_tape_half_size_changes_with_the_next_episode():
    envs = PaperSquareVectorEnv(2, randomize=False, max_episode_steps=8, tape_half_size=0.12)
    observations, _ = envs.reset(seed=0)
    envs.tape_half_size = 0.08
    outcomes = []
    for step in range(16):
        if step in (0, 5, 8):
            place_sheet(simulations(envs)[0], dx=0.03)  # fits the wide square only
        if step in (0, 8):
            place_sheet(simulations(envs)[1], dx=0.09)  # fits neither
        expected = (0.12 if step < 5 else 0.08, 0.12 if step < 8 else 0.08)
        assert_allclose(to_si(observations)[:, OBS["tape_half_size"]].ravel(), expected, atol=1e-6)
        observations, _, terminations, _, _ = envs.step(np.zeros((2, 6)))
        outcomes.append(terminations.tolist())
    assert outcomes.index([True, False]) == 4 and np.sum(outcomes) == 1


# Physics that break


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("force", [1e12, 1e300, np.nan])
def test_diverging_physics_end_the_episode_and_disturb_nobody_else(force, mode):
    sound, faulty = (PaperSquareVectorEnv(3, autoreset_mode=mode) for _ in range(2))
    for envs in (sound, faulty):
        envs.reset(seed=4)
    before = faulty._qpos[1].copy()
    faulty.hold_counter[1] = faulty.hold_steps - 1  # no success either
    faulty.batch.xfrc_applied[1, faulty.model.body("sheet").id, 2] = force
    for step, actions in enumerate(random_actions(20, 3)):
        (expected, *_), (obs, rewards, terminations, truncations, infos) = sound.step(actions), faulty.step(actions)
        assert_array_equal(obs[[0, 2]], expected[[0, 2]])
        assert all(np.isfinite(x).all() for x in (obs, rewards, faulty._qpos)) and not terminations.any()
        if step == 0:
            assert truncations.tolist() == [False, True, False]
            final = infos.get("final_info", infos)
            assert final["physics_reset"].tolist() == [False, True, False] and np.isfinite(final["dist_to_goal"]).all()
            final_obs = infos["final_obs"][1] if "final_obs" in infos else obs[1]
            assert np.isfinite(final_obs).all()
            if mode == AutoresetMode.DISABLED:
                assert_array_equal(faulty._qpos[1], before)  # as before the step
            if mode == AutoresetMode.DISABLED:
                faulty.reset(options={"reset_mask": np.array([False, True, False])})
        else:
            assert not truncations.any() and not infos["physics_reset"].any()


EXTREMES = ("uniform", "bound each step", "held bounds", "bang-bang", "ends of joints", "into table", "onto sheet")


def play_extremes(num_envs, num_steps, seed, every):
    """Environment i gets actions of the kind i % 7 of `EXTREMES`, from starts of three times the randomisation.

    Every observation, reward and state is held to be finite. Returns what of 16 environments every so many steps was
    the worst: how deep geoms were in one another, by kind, m; the speed of a joint, rad/s, and how far one was beyond
    its range, rad; and the physics resets.
    """
    scales = {f"randomize_{name}": 3 * SCALES[name] for name in ("xy", "yaw", "friction", "mass", "offset")}
    envs = PaperSquareVectorEnv(num_envs, **scales)
    obs, _ = envs.reset(seed=seed * num_envs, options={"episode_steps": np.arange(num_envs) % 400})
    base, rng, kind = JacobianIKPolicy(), np.random.default_rng(seed), np.arange(num_envs) % 7
    depth, speed, beyond, resets = np.zeros(7), 0.0, 0.0, 0
    low, high = SCENE.jnt_range[:6].T
    for step in range(num_steps):
        if step % 25 == 0:
            held, half_period = rng.choice([-1.0, 0.0, 1.0], (num_envs, 6)), rng.integers(1, 16, (num_envs, 1))
        if step % 200 == 0:
            corner = rng.choice([-1.0, 1.0], (num_envs, 6))
        uniform, down = rng.uniform(-1.0, 1.0, (num_envs, 6)), held.copy()
        down[:, 1:4] = -np.sign(kinematics(joint_targets(to_si(obs), envs))[1][:, 2, 1:4])  # the fingers
        pressed = envs.fingertip_force.max(axis=1, keepdims=True) > 0.1  # N
        flipped = held * (-1) ** (step // half_period)  # all joints in phase
        kinds = [uniform, np.sign(uniform), held, flipped, corner, down, np.where(pressed, down, base(obs))]
        actions = np.choose(kind[:, None], kinds)
        obs, rewards, terminations, truncations, infos = envs.step(1e6 * actions if step % 2 else actions)
        done = terminations | truncations
        assert np.isfinite(obs).all() and np.isfinite(rewards).all() and np.isfinite(envs.batch.state).all()
        if done.any():
            assert np.isfinite(np.stack(infos["final_obs"][done])).all()
            resets += infos["final_info"]["physics_reset"].sum()
        speed = max(speed, np.abs(envs._qvel[:, :6]).max())
        beyond = max(beyond, (low - envs._qpos[:, :6]).max(), (envs._qpos[:, :6] - high).max())
        for i in rng.choice(num_envs, 16, replace=False) if step % every == 0 else ():
            data = envs.batch.get_data(int(i))
            assert data.maxuse_arena < envs.model.narena / 8  # room for contacts
            depth[kind[i]] = max(depth[kind[i]], -data.contact.dist.min(initial=0.0))
    return depth, speed, beyond, resets


def check_extremes(depth, speed, beyond, resets):
    assert resets == 0 and speed < 20.0 and beyond < 0.1
    assert depth.max() < 0.005


def test_extreme_actions_from_extreme_starts_break_no_physics():
    check_extremes(*play_extremes(126, 150, seed=0, every=2))


@pytest.mark.campaign
def test_ten_million_extreme_steps_break_no_physics():
    """python -m pytest -m campaign tests/test_env.py -s"""
    for seed in range(1, 11):
        depth, *others = play_extremes(252, 4000, seed, every=5)
        print(dict(zip(EXTREMES, (1e3 * depth).round(2).tolist(), strict=True)), "mm deep;", others, flush=True)
        check_extremes(0.0 * depth, *others)  # in so many steps, deeper now and then


def test_thousands_of_environments_leave_memory_for_other_programs():
    """A process of more memory than the machine has, touched or not, cannot fork, as for ffmpeg at the end."""
    assert PaperSquareVectorEnv(1).model.narena * 4096 < 4e9


# Reward


def test_reward_terms_are_documented_functions_of_the_state_and_sum_to_the_reward():
    weights = {"distance_weight": -3.0, "orientation_weight": -0.7, "time_weight": -0.02, "reach_weight": -0.5}
    weights |= {"force_weight": -0.3}
    envs = PaperSquareVectorEnv(4, **weights)
    envs.reset(seed=0)
    for yaw, data in zip((0.1, -0.6, 1.4, 3.0), simulations(envs), strict=True):
        place_sheet(data, 0.05, 0.02, yaw)
    for actions in random_actions(10, 4) + [0.0, 1.0, 0.0, 0.0, 0.0, 0.0]:  # down
        _, rewards, _, _, infos = envs.step(actions)
        terms = {key.removeprefix("reward/"): value for key, value in infos.items() if key.startswith("reward/")}
        assert_allclose(sum(terms.values()), rewards, rtol=0, atol=1e-15)

        pose = envs.sheet_pose
        distance = np.linalg.norm(pose[:, :2] - SQUARE_POS, axis=1)
        turned = np.min(np.abs(pose[:, 2:] - np.pi / 2 * np.arange(-3, 4)), axis=1)
        reach = np.linalg.norm(envs._fingertip - envs._qpos[:, 6:9], axis=1)
        heights = envs.batch.bind("site_xpos")[:, [SCENE.site(name).id for name in FINGERTIPS], 2]
        reach += 0.05 * (2 - np.count_nonzero(envs.fingertip_force, axis=1)) + 10 * np.ptp(heights, axis=1)
        force = np.maximum(envs.fingertip_force.max(axis=1) - FORCE_LIMIT, 0.0)
        assert_allclose(infos["dist_to_goal"], distance, atol=1e-6)
        assert_allclose(infos["orientation_error"], turned, atol=1e-6)
        expected = {"success": 0.0, "distance": distance, "orientation": turned, "time": 1.0, "reach": reach}
        expected["force"] = force
        for name, value in expected.items():
            assert_allclose(terms[name], weights.get(f"{name}_weight", 10.0) * value, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_success_is_paid_once(mode):
    envs = PaperSquareVectorEnv(2, autoreset_mode=mode)
    envs.reset(seed=0)
    place_sheet(simulations(envs)[1])
    paid = np.zeros(2)
    for step in range(1, 13):
        _, rewards, terminations, _, infos = envs.step(np.zeros((2, 6)))
        paid += np.where(infos["_reward/success"], infos["reward/success"], 0.0)
        assert_array_equal(terminations, [False, step == 5])
        assert_array_equal(rewards > 0, terminations)
        assert ("final_info" in infos) == (mode == AutoresetMode.SAME_STEP and step == 5)
        if "final_info" in infos:  # there, and not where the next episode has begun
            assert infos["final_info"]["is_success"][1] and not infos["is_success"].any()
            assert_array_equal(infos["_reward/success"], ~terminations)
            paid += infos["final_info"]["reward/success"]
        else:
            assert_array_equal(infos["is_success"], terminations)
        if mode == AutoresetMode.DISABLED and terminations.any():
            envs.reset(options={"reset_mask": terminations})
    assert_array_equal(paid, [0.0, 10.0])


# One implementation, one trajectory per seed


def assert_same_infos(ours, theirs, all_of_ours):
    """Equal where the masks say that there is something; a key that is absent has a mask of zeros."""
    nothing = np.zeros(3, dtype=bool)
    for key in {key for key in (*ours, *theirs) if not key.startswith("_")}:
        mask = theirs.get(f"_{key}", nothing)
        assert_array_equal(ours.get(f"_{key}", nothing)[mask | all_of_ours], mask[mask | all_of_ours], err_msg=key)
        if key == "final_info":
            assert_same_infos(ours[key], theirs[key], all_of_ours)
        elif mask.any():
            for one, other in zip(ours[key][mask], theirs[key][mask], strict=True):
                assert_array_equal(one, other, err_msg=key)


@pytest.mark.parametrize("mode", [AutoresetMode.SAME_STEP, AutoresetMode.NEXT_STEP])
def test_single_and_vector_environment_are_the_same_across_autoreset(mode):
    ours = PaperSquareVectorEnv(3, max_episode_steps=7, autoreset_mode=mode)
    theirs = SyncVectorEnv([lambda: PaperSquareEnv(max_episode_steps=7)] * 3, autoreset_mode=mode)
    same_step = mode == AutoresetMode.SAME_STEP
    (our_observations, our_infos), (their_observations, their_infos) = ours.reset(seed=0), theirs.reset(seed=0)
    assert_array_equal(our_observations, their_observations)
    assert_same_infos(our_infos, their_infos, same_step)
    for data in (simulations(ours)[1], simulations(theirs.envs[1].envs)[0]):
        place_sheet(data)  # this one ends in success, out of step with the others
    terminated = truncated = 0
    for actions in random_actions(20, 3):
        our_step, their_step = ours.step(actions), theirs.step(actions)
        assert_same_rollout(our_step[:4], their_step[:4])
        assert_same_infos(our_step[4], their_step[4], same_step)
        terminated, truncated = terminated + our_step[2].sum(), truncated + our_step[3].sum()
    assert terminated == 1 and truncated == (6 if same_step else 5)


def test_the_seed_alone_decides_the_trajectory():
    """Not what came before, the number of threads, or how many environments there are; across episodes."""
    actions, kwargs = random_actions(20, 5), {"max_episode_steps": 8}
    envs = PaperSquareVectorEnv(5, num_threads=1, **kwargs)
    first, other = rollout(envs, actions, seed=5), rollout(envs, actions, seed=60)
    after_an_end = PaperSquareVectorEnv(5, autoreset_mode=AutoresetMode.NEXT_STEP, **kwargs)
    assert rollout(after_an_end, actions[:8], seed=60)[3][-1].all()
    assert_same_rollout([x[:7] for x in first], [x[:7] for x in rollout(after_an_end, actions, seed=5)])
    assert not np.array_equal(first[0], other[0]) and first[3].sum() == 10
    assert_same_rollout(first, rollout(envs, actions, seed=5))
    for num_threads in (2, 3):
        assert_same_rollout(first, rollout(PaperSquareVectorEnv(5, num_threads=num_threads, **kwargs), actions, seed=5))
    for i in (0, 3):
        one = rollout(PaperSquareVectorEnv(1, **kwargs), actions[:, i : i + 1], seed=[5 + i])
        assert_same_rollout([values[:, i : i + 1] for values in first], one)


def test_reset_mask_resets_the_masked_and_leaves_the_others_alone():
    actions, mask = random_actions(20, 3), np.array([False, True, False])
    envs = PaperSquareVectorEnv(3, autoreset_mode=AutoresetMode.DISABLED)
    undisturbed = rollout(envs, actions, seed=0)
    before = rollout(envs, actions[:8], seed=0)[0][-1]
    observations, infos = envs.reset(seed=[50, 51, 52], options={"reset_mask": mask})
    assert_array_equal(observations[~mask], before[~mask])
    for key in ("is_success", "dist_to_goal", "orientation_error"):
        assert_array_equal(infos[f"_{key}"], mask)
    going_on, fresh = rollout(envs, actions[8:]), rollout(PaperSquareVectorEnv(1), actions[8:, 1:2], seed=51)
    assert_same_rollout([values[:, ~mask] for values in going_on], [values[8:, ~mask] for values in undisturbed])
    assert_same_rollout([values[:, mask] for values in going_on], fresh)


def test_paused_environments_do_nothing_and_do_not_disturb_the_others():
    envs, reference = (PaperSquareVectorEnv(2, autoreset_mode=AutoresetMode.DISABLED) for _ in range(2))
    envs.reset(seed=0)
    envs.paused[1] = True
    before = simulations(envs)[1].time
    paused, expected = rollout(envs, random_actions(5, 2)), rollout(reference, random_actions(5, 2), seed=0)
    assert_same_rollout([values[:, :1] for values in paused], [values[:, :1] for values in expected])
    assert simulations(envs)[1].time == before


def test_episodes_can_start_with_steps_already_taken():
    envs = PaperSquareVectorEnv(3, max_episode_steps=8, randomize_noise=0)
    fresh, _ = envs.reset(seed=0)
    started, _ = envs.reset(seed=0, options={"episode_steps": np.array([0, 5, 7])})
    assert_array_equal(fresh, started)
    truncations = rollout(envs, np.zeros((8, 3, 6)))[3]
    assert_array_equal(np.argmax(truncations, axis=0) + 1, [8, 3, 1])


# Randomisation


def acting(envs, i):
    """What acts in an episode: the sheet's pose and the model's parameters, by the name of what was drawn."""
    model, qpos = envs.batch.get_model(i), simulations(envs)[i].qpos
    return {
        "xy": qpos[6:8] - HOME[6:8],
        "yaw": 2 * np.arctan2(qpos[12], qpos[9]),
        "friction": model.pair_friction / SCENE.pair_friction,
        "mass": np.r_[model.body_mass / np.maximum(SCENE.body_mass, 1e-9), model.body("sheet").inertia][1:],
        "stiffness": np.r_[model.actuator_gainprm[:, 0], -model.actuator_biasprm[:, 1]],
        "damping": model.actuator_biasprm[:, 2] / SCENE.actuator_biasprm[:, 2] * SCENE.actuator_gainprm[:, 0],
        "servo_friction": model.dof_frictionloss,
        "offset": np.r_[qpos[:6] - HOME[:6], envs._command[i] - HOME[:6]],
        "height": SCENE.body("base").pos[2] - model.body("base").pos[2],
        **{name: envs.drawn[name][i] for name in ("delay", "backlash", "bias", "lag")},  # which have tests of their own
    }


def expected_draw(unit, scales):
    """The same by the numbers in [-1, 1] that an episode draws."""
    parts = np.split(unit, np.cumsum([size for size, *_ in DRAWS.values()])[:-1])
    unit = dict(zip(DRAWS, parts, strict=True))
    table, finger = 1 + scales["friction"] * unit["friction"]
    friction_of_pairs = np.ones_like(SCENE.pair_friction)
    friction_of_pairs[SCENE.pair("sheet_table").id] = table
    friction_of_pairs[[SCENE.pair(f"{tip}_sheet").id for tip in FINGERTIPS]] = finger
    masses = (SCENE.body_mass > 0).astype(float)
    masses[SCENE.body("sheet").id] = mass = 1 + scales["mass"] * unit["mass"][0]
    kp, friction = SCENE.actuator_gainprm[:, 0], SCENE.dof_frictionloss.copy()
    if scales["stiffness"]:
        kp = np.exp(np.log(STIFFNESS[0]) + (unit["stiffness"] + 1) / 2 * np.diff(np.log(STIFFNESS)))
    if scales["servo_friction"]:
        friction[:6] = np.exp(
            np.log(SERVO_FRICTION[0]) + (unit["servo_friction"] + 1) / 2 * np.diff(np.log(SERVO_FRICTION))
        )
    offset = np.r_[scales["offset"] * unit["offset"], 0.0]
    whole = {name: np.floor((unit[name] + 1) / 2 * (scales[name] + 1)) for name in ("delay", "lag")}
    return {
        "xy": scales["xy"] * unit["xy"],
        "yaw": scales["yaw"] * unit["yaw"],
        "friction": friction_of_pairs,
        "mass": np.r_[masses, SCENE.body("sheet").inertia * mass][1:],
        "stiffness": np.r_[kp, kp],
        "damping": kp,
        "servo_friction": friction,
        "offset": np.r_[offset, offset],
        "height": scales["height"] * unit["height"],
        "backlash": scales["backlash"] * (unit["backlash"] + 1) / 2,
        "bias": scales["bias"] * unit["bias"] * [1, 1, 10],
        **whole,
    }


def test_every_episode_has_what_was_drawn_and_each_scale_ablates_one_thing():
    none, arm = dict.fromkeys(SCALES, 0), [name for name in DRAWS if name not in ("xy", "yaw", "friction", "mass")]
    variants = {"full": ({}, SCALES), "none": (EXACT, none)}
    variants["nominal arm"] = {"randomize_arm": False}, SCALES | dict.fromkeys(arm, 0)
    variants |= {name: ({f"randomize_{name}": 0}, SCALES | {name: 0}) for name in SCALES}
    rng, size = np.random.default_rng(21), sum(size for size, *_ in DRAWS.values())
    made = {name: PaperSquareVectorEnv(2, **arguments) for name, (arguments, _) in variants.items()}
    for episode in range(2):
        unit = rng.uniform(-1.0, 1.0, size)
        noise = rng.standard_normal((400, 3), dtype=np.float32)  # the next episode goes on behind it
        for variant, (_, scales) in variants.items():
            envs = made[variant]
            envs.reset(seed=None if episode else [20, 21])
            expected = expected_draw(unit, scales)
            for name, value in acting(envs, 1).items():
                assert_allclose(value, expected[name], rtol=1e-9, atol=1e-12, err_msg=f"{variant} {name}")
            assert_array_equal(envs._noise[1], noise)
    assert_array_equal(simulations(made["none"])[1].qpos, HOME)


def test_no_randomisation_is_the_nominal_arm_to_the_bit():
    actions = random_actions(30, 2)
    off = rollout(PaperSquareVectorEnv(2, **EXACT), actions, seed=3)
    assert_same_rollout(off, rollout(PaperSquareVectorEnv(2, **EXACT), actions, seed=4))
    sheet = {f"randomize_{name}": 0 for name in ("xy", "yaw", "friction", "mass")}
    assert_same_rollout(off, rollout(PaperSquareVectorEnv(2, randomize_arm=False, **sheet), actions, seed=3))
    assert_same_rollout(off, rollout(PaperSquareVectorEnv(2, **nominal_arm(), **sheet), actions, seed=3))
    by_hand, data = [], mujoco.MjData(SCENE)
    mujoco.mj_resetDataKeyframe(SCENE, data, 0)
    for action in actions[:, 0]:
        previous = data.ctrl.copy()
        for tick in range(1, 7):
            data.ctrl[:] = previous + 0.02 * action * tick / 6
            mujoco.mj_step(SCENE, data, 2)
        by_hand.append([*data.qpos[6:8], *data.ctrl])
    state = to_si(off[0][:, 0])
    seen = np.concatenate([state[:, OBS["sheet_pos"]], state[:, OBS["joint_target"]]], axis=1)
    assert_allclose(seen, by_hand, atol=1e-6)


def test_a_gripper_that_may_not_move_is_as_if_nobody_asked():
    actions = random_actions(30, 2)
    without = actions * [1, 1, 1, 1, 1, 0]
    held = rollout(PaperSquareVectorEnv(2, move_gripper=False), actions, seed=3)
    assert_same_rollout(held, rollout(PaperSquareVectorEnv(2), without, seed=3))
    assert (held[0][..., OBS["joint_target"]][..., 5] == 0).all()


@pytest.mark.parametrize("delay", [0, 2, 5])
def test_actions_reach_the_servos_so_many_steps_late(delay):
    envs = PaperSquareVectorEnv(2, **EXACT, fixed={"delay": delay})
    envs.reset(seed=0)
    targets = [HOME[:6]] * (delay + 1)
    for actions in random_actions(12, 2):
        observations, *_ = envs.step(actions)
        targets.append(targets[-1] + 0.02 * actions[1])
        assert_allclose(simulations(envs)[1].ctrl, targets[-1 - delay], atol=1e-12)
        assert_allclose(to_si(observations)[1, OBS["joint_target"]], targets[-1], atol=1e-6)


@pytest.mark.parametrize("lag", [0, 2, 5])
def test_the_sheet_is_seen_late_biased_and_noisy_and_the_truth_is_what_counts(lag):
    bias, quiet = [0.001, -0.002, 0.03], {"randomize_xy": 0, "randomize_yaw": 0, "randomize_noise": 0}
    envs = PaperSquareVectorEnv(2, fixed={"lag": lag, "bias": bias}, **quiet)
    noisy = PaperSquareVectorEnv(2, fixed={"lag": lag, "bias": bias}, **quiet | {"randomize_noise": 0.002})
    seen, _ = envs.reset(seed=0)
    noisy_seen, _ = noisy.reset(seed=0)
    poses = [[0.19, -0.09, 0.0]] * (lag + 1)
    errors = []
    for step in range(120):
        state = to_si(seen)
        assert_allclose(state[:, OBS["sheet_pos"]], np.add(poses[-1 - lag], bias)[None, :2].repeat(2, 0), atol=1e-6)
        yaw = np.arctan2(*state[:, OBS["sheet_yaw"]].T)
        assert_allclose(yaw, poses[-1 - lag][2] + bias[2], atol=1e-6)
        errors.append((to_si(noisy_seen) - state)[:, np.r_[OBS["sheet_pos"], OBS["sheet_yaw"]]][:, :3])
        poses.append([0.19 + 0.001 * (step % 7), 0.0, 0.01 * (step % 5)])
        for data in (*simulations(envs), *simulations(noisy)):
            place_sheet(data, poses[-1][0] - SQUARE_POS[0], poses[-1][1] - SQUARE_POS[1], poses[-1][2])
        (seen, *_, infos), (noisy_seen, *_) = envs.step(np.zeros((2, 6))), noisy.step(np.zeros((2, 6)))
        assert_allclose(infos["dist_to_goal"], np.hypot(poses[-1][0] - 0.19, 0.09), atol=1e-4)
    assert_allclose(np.std(errors, axis=(0, 1)), [0.002, 0.002, 0.02], rtol=0.2)


def test_play_keeps_the_links_where_they_are_until_the_servo_has_turned_through_it():
    play, moves = 0.008, np.r_[[1.0] * 3, [-1.0] * 4, [1.0] * 2]
    envs = PaperSquareVectorEnv(1, act_scale=0.005, **EXACT, fixed={"backlash": play})
    envs.reset(seed=0)
    target = command = HOME[0]
    for move in moves:
        envs.step(np.array([[move, 0, 0, 0, 0, 0]]))
        target += 0.005 * move
        command = min(max(command, target - play), target + play)
        assert_allclose(simulations(envs)[0].ctrl[0], command, atol=1e-12)
    assert abs(command - target) <= play and command != target


def test_servos_get_whole_ticks_off_by_the_joints_zeros_and_report_them_back():
    tick, offset = 0.001534, np.array([0.01, -0.02, 0.015, 0.0, 0.005])
    quiet = {"fixed": {"offset": offset, "backlash": 0, "delay": 0}}
    envs = PaperSquareVectorEnv(1, observe_measured=True, **quiet)
    envs.reset(seed=0)
    for actions in random_actions(20, 1):
        observations, *_ = envs.step(actions)
        data, target = simulations(envs)[0], to_si(observations)[0, OBS["joint_target"]]
        sent = data.ctrl - np.r_[offset, 0.0]
        assert_allclose(sent / tick, np.round(sent / tick), atol=1e-6)
        assert ((target - sent > -1e-6) & (target - sent < tick + 1e-6)).all()  # truncated, as the driver does
        measured, truth = to_si(observations)[0, OBS["joint_measured"]], data.qpos[:6] - np.r_[offset, 0.0]
        assert_allclose(measured, envs.joint_measured[0], atol=1e-6)
        assert ((truth - measured > -1e-6) & (truth - measured < tick + 1e-6)).all()


def test_a_higher_table_is_pressed_sooner():
    heights = (-0.003, 0.0, 0.003)
    pressed = []
    for height in heights:
        envs = PaperSquareVectorEnv(1, **EXACT, fixed={"height": height})
        envs.reset(seed=0)
        forces = []
        for _ in range(40):
            down = np.array([[0, 0.3, 0, -0.3, 0, 0]])
            envs.step(down)
            forces.append(envs.fingertip_force.max())
            assert_allclose(envs._fingertip[0, 2], kinematics(envs._qpos[:, :6])[0][0, 2] - height, atol=1e-9)
        pressed.append(np.argmax(np.array(forces) > 0.5))
    assert pressed[0] > pressed[1] > pressed[2] > 0


# The servos


def servo_data(qpos=HOME):
    data = mujoco.MjData(SCENE)
    data.qpos[:], data.ctrl[:] = qpos, qpos[:6]
    data.qpos[6:9] = 0.4, 0.4, 0.0005  # out of the way
    return data


def test_the_arm_sags_by_torque_over_stiffness_less_what_friction_holds():
    model = copy.copy(SCENE)
    for friction in (0.0, SCENE.dof_frictionloss[:6].copy()):
        model.dof_frictionloss[:6] = friction
        data = servo_data()
        mujoco.mj_step(model, data, 3000)
        servo = model.actuator_gainprm[:, 0] * (data.ctrl - data.qpos[:6])  # N.m
        assert np.abs(data.qvel[:6]).max() < 1e-3
        assert (np.abs(servo - data.qfrc_bias[:6]) <= np.asarray(friction) + 2e-3).all()
        sag = data.ctrl - data.qpos[:6]
        if np.ndim(friction) == 0:
            assert 0.3 < np.rad2deg(-sag[1]) < 0.5 and 0.8 < np.rad2deg(-sag[2]) < 1.2  # lift and elbow at home
        else:
            assert np.rad2deg(np.abs(sag)).max() < 0.3  # most of the weight rests on the friction, which creeps


@pytest.mark.parametrize("joint", JOINTS)
def test_friction_makes_a_dead_band_and_the_motor_a_limit_of_speed_and_steps_overshoot_as_identified(joint):
    k = JOINTS.index(joint)
    model = copy.copy(SCENE)
    model.opt.gravity[:] = 0.0
    model.opt.timestep = 1e-3
    kp, kd = model.actuator_gainprm[k, 0], -model.actuator_biasprm[k, 2]
    friction, viscous = model.dof_frictionloss[k], model.dof_damping[k]
    low, high = model.actuator_ctrlrange[k]
    away = HOME.copy()
    away[:6] = 0.0, -0.5, 0.2, 0.3, 0.0, 0.3  # clear of the table

    data = servo_data(away)  # slowly up and down again
    behind = []
    for speed in (0.02, -0.02):  # rad/s
        for _ in range(3000):
            data.ctrl[k] += speed * model.opt.timestep
            mujoco.mj_step(model, data)
        behind.append(data.ctrl[k] - data.qpos[k])
    assert_allclose(behind[0] - behind[1], 2 * (friction + (viscous + kd) * 0.02) / kp, rtol=0.05)

    data = servo_data(away)  # as fast as it can
    data.qpos[k], data.ctrl[k] = low, high
    speeds = []
    for _ in range(3000):
        mujoco.mj_step(model, data)
        speeds.append(data.qvel[k])
    limit = (2.94 - friction) / viscous
    assert max(speeds) < 1.02 * limit and (limit > 4 or max(speeds) > 0.9 * limit)
    assert 2.0 < limit < 6.0  # 4.7 rad/s by the data sheet

    data = servo_data(away)  # a step of 0.1 rad
    data.ctrl[k] += 0.1
    mujoco.mj_forward(model, data)
    column = np.zeros(model.nv)
    mujoco.mj_mulM(model, data, column, np.eye(model.nv)[k])
    ratio = min((kd + viscous) / (2 * np.sqrt(kp * column[k])), 0.999)
    path = []
    for _ in range(2000):
        mujoco.mj_step(model, data)
        path.append(data.qpos[k] - away[k])
    overshoot = max(path) / 0.1 - 1
    assert overshoot < np.exp(-np.pi * ratio / np.sqrt(1 - ratio**2)) + 0.02  # of a servo without friction
    assert abs(path[-1] - 0.1) < friction / kp + 1e-4


# Action


def target_of(observations):
    return joint_targets(to_si(observations), PaperSquareVectorEnv)


def test_target_is_incremented_by_the_clipped_action_and_held_in_the_control_range():
    envs = PaperSquareVectorEnv(2, act_scale=0.5, randomize=False)
    observations, _ = envs.reset(seed=0)
    low, high = SCENE.actuator_ctrlrange.T
    target = np.tile(HOME[:6], (2, 1))
    assert_allclose(target_of(observations), target, atol=1e-6)
    actions = 3.0 * random_actions(12, 2)
    actions[:, 1] = np.sign(actions[0, 1]) * [5.0, 1.0, 1.0, 1.0, 1.0, 1.0]  # into the limits
    for action in actions:
        target = np.clip(target + 0.5 * np.clip(action, -1, 1), low, high)
        observations, *_ = envs.step(action)
        assert_allclose([data.ctrl for data in simulations(envs)], target, rtol=0, atol=1e-12)
        assert_allclose(target_of(observations), target, atol=1e-6)
    assert (np.isclose(target[1], low) | np.isclose(target[1], high)).all()

    envs.reset(seed=0)
    rollout(envs, np.zeros((10, 2, 6)))
    assert_array_equal(simulations(envs)[0].ctrl, HOME[:6])  # it does not follow the sagging arm
    assert not np.array_equal(simulations(envs)[0].qpos[:6], HOME[:6])


@pytest.mark.parametrize(
    ("rates", "ticks", "substeps"),
    [((360, 180, 30), 6, 2), ((360, 360, 60), 6, 1), ((720, 180, 60), 3, 4)],
)
def test_control_ticks_interpolate_the_target_linearly(rates, ticks, substeps):
    """One policy step against the same written out by hand on a copy of the physics."""
    rates_by_name = dict(zip(("physics_hz", "control_hz", "policy_hz"), rates, strict=True))
    envs = PaperSquareVectorEnv(1, **rates_by_name, **EXACT)
    assert envs.metadata["render_fps"] == rates[2]
    envs.reset(seed=0)
    envs.step(random_actions(1, 1, seed=1)[0])
    model, data = envs.batch.get_model(0), envs.batch.get_data(0)
    previous, action = data.ctrl.copy(), random_actions(1, 1, seed=2)[0]
    envs.step(action)
    for tick in range(1, ticks + 1):
        data.ctrl[:] = previous + 0.02 * action[0] * tick / ticks
        mujoco.mj_step(model, data, substeps)
    assert_allclose(simulations(envs)[0].time, 2 / rates[2], rtol=1e-9)
    assert_allclose(simulations(envs)[0].qpos, data.qpos, rtol=0, atol=1e-12)
    assert_allclose(simulations(envs)[0].qvel, data.qvel, rtol=0, atol=1e-10)


# Arguments that cannot be used


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        *(
            (dict(zip(("physics_hz", "control_hz", "policy_hz"), rates, strict=True)), f"policy_hz={rates[2]}")
            for rates in ((360, 180, 50), (360, 100, 20), (100, 200, 50), (360, 180, 0), (360, 0, 30), (0, 180, 30))
        ),
        ({"num_envs": 0}, "num_envs .* found 0"),
        ({"render_mode": "ansi"}, "render_mode .* found 'ansi'"),
        ({"autoreset_mode": "never"}, "not a valid AutoresetMode"),
        ({"act_scale": np.nan}, "act-scale must be .* found nan"),
        ({"hold_steps": 0}, "hold_steps .* found 0"),
        ({"tape_half_size": -0.08}, "tape-half-size"),
        ({"randomize_friction": 1.5}, "randomize-friction"),
        ({"randomize_stiffness": -0.1}, "randomize-stiffness"),
        ({"randomize_delay": 31}, "randomize-delay"),
        ({"randomize_height": 0.03}, "randomize-height"),
        ({"fixed": {"stiffness": -5}}, "'stiffness' from 0.1"),
        ({"fixed": {"colour": 1}}, "'colour'"),
    ],
)
def test_arguments_that_cannot_be_used(arguments, message):
    with pytest.raises(ValueError, match=message):
        PaperSquareVectorEnv(**arguments)


def test_seeds_masks_and_actions_that_cannot_be_used():
    envs, env = PaperSquareVectorEnv(3), PaperSquareEnv()
    with pytest.raises(gym.error.ResetNeeded):
        envs.step(np.zeros((3, 6)))
    envs.reset(seed=0)
    env.reset(seed=0)
    with pytest.raises(ValueError, match="expected 3, found 2"):
        envs.reset(seed=[0, 1])
    for mask in (np.array([True]), np.zeros(3, dtype=bool), np.array([1, 0, 1]), np.ones((3, 1), dtype=bool)):
        with pytest.raises(ValueError, match=r"reset_mask must be a boolean array of shape \(3,\)"):
            envs.reset(options={"reset_mask": mask})
    for steps in (np.array([0, 0, 400]), np.array([0, -1, 0]), np.zeros(2, dtype=int), np.full(3, 0.5)):
        with pytest.raises(ValueError, match="episode_steps"):
            envs.reset(options={"episode_steps": steps})
    for actions in (np.zeros(6), np.zeros((3, 5)), np.zeros((2, 6)), np.full((3, 6), np.nan), np.full((3, 6), np.inf)):
        with pytest.raises(ValueError, match=r"actions must be finite and of shape \(3, 6\)"):
            envs.step(actions)
    for action in (np.zeros(5), np.zeros((1, 6)), 0.0):
        with pytest.raises(ValueError, match="actions must be finite and of shape"):
            env.step(action)


# The documentation


def test_observation_table_is_the_observation():
    rows = documented_table("Observation space", ["rows", "name", "content", "unit", "zero at", "scale"])
    assert [row[1] for row in rows] == list(OBS)
    start = 0
    for indices, name, _, _, zero, scale in rows:
        first, _, last = indices.partition("-")
        assert OBS[name] == slice(int(first), int(last or first) + 1) and OBS[name].start == start
        start = OBS[name].stop
        zero = HOME[:6] if zero == "home" else [float(number) for number in zero.split(",")]
        assert_allclose(OBS_ZERO[OBS[name]], np.broadcast_to(zero, OBS_ZERO[OBS[name]].shape), err_msg=name)
        scale = np.broadcast_to([float(number) for number in scale.split(",")], OBS_SCALE[OBS[name]].shape)
        assert_allclose(OBS_SCALE[OBS[name]], scale, err_msg=name)
    assert start == OBS_DIM == len(OBS_ZERO) == len(OBS_SCALE)
    assert f"`Box(-inf, inf, ({OBS_DIM},), float32)`" in inspect.getdoc(PaperSquareVectorEnv)


def test_reward_table_gives_the_default_weights_and_every_argument_is_documented():
    rows = documented_table("Rewards", ["term", "default weight", "formula"])
    flags = env_kwargs(EnvArgs())
    defaults = {name[: -len("_weight")]: value for name, value in flags.items() if name.endswith("_weight")}
    assert {term: float(weight) for term, weight, _ in rows} == defaults
    envs = PaperSquareVectorEnv(1)
    envs.reset(seed=0)
    infos = envs.step(np.zeros((1, 6)))[4]
    assert [key for key in infos if key.startswith("reward/")] == [f"reward/{term}" for term, _, _ in rows]
    text = inspect.getdoc(PaperSquareVectorEnv)
    parameters = inspect.signature(PaperSquareVectorEnv).parameters
    assert [name for name in parameters if name != "flags" and f"`{name}`" not in text] == []
    drawn = documented_table("Starting state", ["name", "what", "default"])
    assert ", ".join(row[0] for row in drawn).split(", ") == list(DRAWS)


def test_action_table_gives_the_joints_and_their_control_ranges():
    rows = documented_table("Action space", ["index", "joint", "range, rad"])
    assert [(int(index), joint) for index, joint, _ in rows] == list(enumerate(JOINTS))
    for (_, joint, interval), ctrlrange in zip(rows, SCENE.actuator_ctrlrange, strict=True):
        assert_allclose([float(end) for end in interval.split(" to ")], ctrlrange, atol=5.1e-4)
        assert_allclose(ctrlrange, SCENE.joint(joint).range, rtol=1e-12)
        assert SCENE.actuator(joint).trnid[0] == SCENE.joint(joint).id == JOINTS.index(joint)


# Observation


def test_observation_is_what_a_runner_knows():
    """Every row against MuJoCo's, of the joint targets and of the sheet as it is seen; at the start and later."""
    envs = PaperSquareVectorEnv(3, tape_half_size=0.1, observe_measured=True)
    observations, _ = envs.reset(seed=0)
    last = np.zeros((3, 6))
    for step, actions in enumerate(2 * random_actions(6, 3)):
        for i, observation in enumerate(observations):
            posed = mujoco.MjData(SCENE)
            posed.qpos[:6] = envs.joint_target[i]
            mujoco.mj_kinematics(SCENE, posed)
            fingertip, (x, y, yaw) = posed.site(FINGERTIPS[0]).xpos, envs.seen_pose[i]
            expected = {
                "joint_target": envs.joint_target[i],
                "last_action": last[i],
                "sheet_pos": (x, y),
                "sheet_yaw": np.array([np.sin(yaw), np.cos(yaw)]) * np.sign(np.cos(yaw)),
                "yaw_error": (np.arctan2(np.sin(4 * yaw), np.cos(4 * yaw)) / 4, np.cos(4 * yaw)),
                "sheet_to_square": SQUARE_POS - (x, y),
                "fingertip_pos": fingertip,
                "fingertip_to_sheet": (x, y) - fingertip[:2],
                "tape_half_size": 0.1,
                "hold_counter": 0,
                "joint_measured": envs.joint_measured[i],
            }
            state = to_si(observation)
            for name, rows in OBS.items():
                assert_allclose(state[rows], expected[name], rtol=0, atol=2e-6, err_msg=name)
        if step == 2:
            for yaw, data in zip((2.5, -1.2, 0.7), simulations(envs), strict=True):
                place_sheet(data, 0.1, -0.05, yaw, height=0.05)  # falling, too
                data.qpos[10] = 0.2  # and tilted
                data.qpos[9:13] /= np.linalg.norm(data.qpos[9:13])
        last = np.clip(actions, -1, 1)
        observations, *_ = envs.step(actions)


def test_observation_of_one_function_of_plain_arrays_tells_nothing_else():
    """Two arms that differ in all that is drawn, but are sent and seen alike, observe alike."""
    known = [np.tile(HOME[:6], (2, 1)), np.zeros((2, 6)), np.tile([0.2, -0.05, 0.4], (2, 1)), np.full(2, 0.08), [3, 3]]
    rows = make_observation(*map(np.asarray, known))
    assert rows.shape == (2, OBS_DIM) and rows.dtype == np.float32
    assert_array_equal(rows[:, OBS["joint_measured"]], 0.0)
    envs = PaperSquareVectorEnv(2, randomize_noise=0, fixed={"lag": 0, "bias": 0})
    envs.reset(seed=0)
    for data in simulations(envs):
        place_sheet(data, 0.2 - SQUARE_POS[0], -0.05 - SQUARE_POS[1], 0.4)
    envs._poses[:] = envs.sheet_pose[:, None]
    assert not np.array_equal(*envs.drawn["stiffness"])
    assert_array_equal(*envs._observe())
    assert_allclose(envs._observe()[:, :-7], rows[:, :-7], atol=1e-5)


def test_yaw_rows_stay_in_the_range_of_the_networks_and_fold_by_the_symmetries_of_sheet_and_square():
    yaw = np.linspace(-np.pi, np.pi, 721)
    pose = np.stack([np.full(721, 0.19), np.zeros(721), yaw], axis=1)
    rows = make_observation(np.tile(HOME[:6], (721, 1)), np.zeros((721, 6)), pose, np.full(721, 0.08), np.zeros(721))
    turned = rows[:, np.r_[OBS["sheet_yaw"], OBS["yaw_error"]]]
    assert np.abs(turned).max() <= 5.0 and (np.ptp(turned, axis=0) > 2.0).all()
    assert_allclose(rows[180:, OBS["yaw_error"]][:, 1], rows[:-180, OBS["yaw_error"]][:, 1], atol=1e-5)  # a quarter on
    inner = np.arange(1, 180)  # from the ends, where rounding decides
    assert_allclose(turned[inner], turned[inner + 360], atol=1e-4)  # half a turn on


# The scene


def posed_scene(qpos=HOME):
    data = mujoco.MjData(SCENE)
    data.qpos[:] = qpos
    mujoco.mj_kinematics(SCENE, data)
    return data


def test_scene_has_what_the_scripts_name_and_only_the_named_pairs_touch():
    assert {SCENE.camera(i).name for i in range(SCENE.ncam)} == {"top", "side", "desk", "wrist"}
    assert_array_equal(SCENE.body("square").pos[:2], SQUARE_POS)
    assert_array_equal(SCENE.key("home").ctrl, HOME[:6])
    assert [SCENE.joint(name).qposadr[0] for name in (*JOINTS, "sheet")] == list(range(7))
    assert SCENE.nmesh == SCENE.nhfield == 0  # primitive geoms only
    assert (SCENE.geom_contype == 0).all() and (SCENE.geom_conaffinity == 0).all() and SCENE.npair == 8


def test_arm_has_the_kinematics_of_an_so101_and_starts_with_the_fingertip_above_the_table():
    gripper = posed_scene(np.r_[np.zeros(6), HOME[6:]]).body("gripper")
    point = gripper.xpos + gripper.xmat.reshape(3, 3) @ [-0.0081, 0.0, -0.106]
    assert_allclose(point, [0.39923, 0.00022, 0.22628], atol=1e-4)
    data, radius = posed_scene(), SCENE.geom(FINGERTIPS[0]).size[0]
    x, y, z = data.site(FINGERTIPS[0]).xpos
    assert_allclose(kinematics(HOME[None, :6])[0][0], [x, y, z], atol=1e-12)
    assert radius == 0.008 and abs(z - radius - 0.02) < 0.002 and np.hypot(x - 0.20, y) < 0.01
    assert_array_equal(data.geom(FINGERTIPS[0]).xpos, data.site(FINGERTIPS[0]).xpos)


def test_training_model_has_the_physics_of_the_full_scene():
    """What is left out for speed is only what a camera sees; with the finger pressing and dragging the sheet."""
    trained = PaperSquareVectorEnv(1, randomize=False).batch.get_model(0)
    assert trained.ngeom < SCENE.ngeom
    assert trained.opt.timestep == pytest.approx(SCENE.opt.timestep, rel=1e-12)
    states, masses = [], []
    for model in (trained, SCENE):
        data = mujoco.MjData(model)
        mujoco.mj_resetDataKeyframe(model, data, 0)
        data.qpos[6:8] = 0.2, 0.0
        for step in range(50):
            down = min(0.01 * step, 0.14)
            data.ctrl[[1, 3]] = -0.14 + down, 1.19 - down
            data.ctrl[0] = max(0.0, 0.004 * (step - 20))
            mujoco.mj_step(model, data, 12)
        mass = np.zeros((model.nv, model.nv))
        for row, unit in zip(mass, np.eye(model.nv), strict=True):
            mujoco.mj_mulM(model, data, row, unit)
        assert {model.geom("sheet").id, model.geom(FINGERTIPS[0]).id} in [
            set(pair) for pair in data.contact.geom.tolist()
        ]
        states.append(data.qpos.copy())
        masses.append(mass)
    assert states[0][7] < -0.01  # pressed and dragged
    assert_allclose(states[0], states[1], rtol=0, atol=1e-9)
    assert_allclose(masses[0], masses[1], rtol=0, atol=1e-9)


def test_golden_rollout():
    """Any change of the physics, the reward or the observation shows here, wanted or not.

    After a wanted one: UPDATE_GOLDEN=1 pytest tests/test_env.py -k golden
    """
    envs = PaperSquareVectorEnv(2, observe_measured=True)
    envs.reset(seed=0)
    for data in simulations(envs):
        data.qpos[6:8] = 0.2, 0.0  # under the fingers
    actions = random_actions(20, 2)
    actions[:, :, 1] += 1.0  # down, so that they touch it
    observations, rewards, *_ = rollout(envs, actions)
    assert np.ptp(rewards, axis=0).min() > 1e-3  # both sheets were moved
    found = {"observation": observations[-1], "rewards": rewards}
    if os.environ.get("UPDATE_GOLDEN"):
        # row by row: a number per line would be long, all on one line unreadable in a diff
        rows = {
            name: ",\n".join(f"  {[round(float(value), 6) for value in row]}" for row in table)
            for name, table in found.items()
        }
        GOLDEN_PATH.write_text("{\n" + ",\n".join(f' "{name}": [\n{rows[name]}\n ]' for name in rows) + "\n}\n")
        pytest.skip("rewrote the golden rollout")
    golden = json.loads(GOLDEN_PATH.read_text())
    assert_allclose(found["observation"], golden["observation"], rtol=1e-4, atol=1e-4)
    assert_allclose(found["rewards"], golden["rewards"], rtol=0, atol=1e-5)


# Rendering


@pytest.fixture(scope="module")
def rendered_envs():
    envs = PaperSquareVectorEnv(2, render_mode="rgb_array", camera="top", width=320, height=240, randomize=False)
    envs.reset(seed=0)
    try:
        envs.render()
    except UserError as error:  # neither EGL nor OSMesa
        pytest.skip(str(error))
    yield envs
    envs.close()


def test_images_are_of_each_environment_and_camera(rendered_envs):
    place_sheet(simulations(rendered_envs)[1])
    rendered_envs.step(np.zeros((2, 6)))
    one, other = rendered_envs.render()
    assert one.shape == other.shape == (240, 320, 3) and one.dtype == np.uint8
    assert one.std() > 10 and (one != other).mean() > 0.01  # the sheet lies elsewhere
    assert_array_equal(rendered_envs.render_frame(1), other)
    frames = [rendered_envs.render_frame(0, camera).astype(int) for camera in ("top", "side", "wrist")]
    assert_array_equal(frames[0], one)
    for a, b in ((0, 1), (1, 2), (2, 0)):
        assert np.abs(frames[a] - frames[b]).mean() > 5


@pytest.mark.parametrize("half_size", [0.08, 0.12])
def test_tape_is_drawn_where_it_counts(rendered_envs, half_size):
    rendered_envs.tape_half_size = half_size
    rendered_envs.reset(seed=0)
    red, green, blue = np.moveaxis(rendered_envs.render_frame(0).astype(float), 2, 0)
    rows, columns = np.nonzero((red > 60) & (red > 2.5 * green) & (red > 2.5 * blue))
    camera = SCENE.camera("top")
    metres = 2 * camera.pos[2] * np.tan(np.deg2rad(camera.fovy[0]) / 2) / 240  # per pixel, on the table
    width = 2 * (half_size + TAPE_WIDTH)
    assert_allclose((np.ptp([rows, columns], axis=1) + 1) * metres, width, atol=2 * metres)
    x = camera.pos[0] - metres * ((rows.min() + rows.max()) / 2 - 119.5)  # up in the image is x
    y = camera.pos[1] - metres * ((columns.min() + columns.max()) / 2 - 159.5)  # left is y
    assert_allclose([x, y], SQUARE_POS, atol=1.5 * metres)


def test_single_environments_render_an_image_and_leave_no_renderer_behind(rendered_envs):
    finalizers = []
    for seed in range(3):
        env = gym.make("PaperSquare-v0", render_mode="rgb_array", width=64, height=48)
        env.reset(seed=seed)
        frame = env.render()
        assert frame.shape == (48, 64, 3) and frame.dtype == np.uint8 and frame.std() > 10
        finalizers.append(env.unwrapped.envs._close_renderer)
        env.close() if seed else None
        del env
    gc.collect()
    assert not any(finalizer.alive for finalizer in finalizers)


@pytest.mark.skipif(shutil.which("xvfb-run") is None, reason="needs Xvfb, a display without a screen")
def test_a_viewer_that_nobody_closes_ends_with_its_program():
    """MuJoCo's own exit would free what the viewer's thread still draws with: every other program crashed or hung."""
    program = """if True:
        import gymnasium as gym
        import env_paper_square
        env = gym.make("PaperSquare-v0", render_mode="human")
        env.reset(seed=0)
        for _ in range(5):
            env.step(env.action_space.sample())
    """
    for _ in range(3):
        command = ["xvfb-run", "-a", sys.executable, "-c", program]
        done = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stderr) == (0, "")
