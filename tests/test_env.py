"""The environment: its interfaces, its physics, its rewards, and whether its documentation tells the truth."""

import copy
import gc
import importlib.util
import inspect
import json
import os
import pickle
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

from base_policies import ArmKinematics, JacobianIKPolicy, joint_targets
from env_paper_square import (
    FINGERTIPS,
    JOINTS,
    OBS,
    OBS_DIM,
    OBS_SCALE,
    OBS_ZERO,
    SCENE_PATH,
    SQUARE_POS,
    TAPE_WIDTH,
    EnvArgs,
    PaperSquareEnv,
    PaperSquareVectorEnv,
    env_kwargs,
    eval_kwargs,
    to_si,
)

GOLDEN_PATH = Path(__file__).with_name("golden_rollout.json")
SCALES = {"xy": 0.05, "yaw": 0.3, "friction": 0.2, "mass": 0.1}
STILL = np.zeros(6)


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


def rollout(envs, actions, seed):
    """The observations, rewards, terminations and truncations of a rollout, first observation included."""
    observations, rewards, terminations, truncations = [envs.reset(seed=seed)[0]], [], [], []
    for action in actions:
        observation, reward, terminated, truncated, _ = envs.step(action)
        observations.append(observation)
        rewards.append(reward)
        terminations.append(terminated)
        truncations.append(truncated)
    return np.array(observations), np.array(rewards), np.array(terminations), np.array(truncations)


def assert_same_rollout(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        assert_array_equal(a, b)


def load_scene():
    return mujoco.MjModel.from_xml_path(str(SCENE_PATH))


def documented_table(section, columns):
    """The rows of a table in the class docstring, as lists of cells."""
    text = inspect.getdoc(PaperSquareVectorEnv).split(f"## {section}\n")[1].split("\n## ")[0]
    lines = [line for line in text.splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert rows[0] == columns
    return rows[2:]


# Interfaces


def test_gymnasium_env_checker():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", ".*Box observation space m..imum value is -?infinity")
        check_env(gym.make("PaperSquare-v0").unwrapped, skip_render_check=True)


def test_stable_baselines3_env_checker():
    checker = pytest.importorskip("stable_baselines3.common.env_checker")
    checker.check_env(gym.make("PaperSquare-v0").unwrapped, skip_render_check=True)


def test_registration_builds_the_single_and_the_vector_class():
    env = gym.make("PaperSquare-v0", act_scale=0.01)
    assert type(env.unwrapped) is PaperSquareEnv
    assert env.unwrapped.envs.act_scale == 0.01
    envs = gym.make_vec("PaperSquare-v0", num_envs=3, vectorization_mode="vector_entry_point", act_scale=0.01)
    assert type(envs.unwrapped) is PaperSquareVectorEnv
    assert envs.num_envs == 3 and envs.unwrapped.act_scale == 0.01
    assert envs.metadata["autoreset_mode"] == AutoresetMode.SAME_STEP


def steps_to_truncation(env, action):
    env.reset(seed=0)
    for step in range(1, 1000):
        _, _, _, truncated, _ = env.step(action)
        if np.any(truncated):
            return step
    raise AssertionError("never truncated")


@pytest.mark.parametrize("steps", [30, 450])
def test_gym_make_takes_the_length_of_episodes_and_the_threads(steps):
    assert gym.spec("PaperSquare-v0").max_episode_steps == 400
    env = gym.make("PaperSquare-v0", max_episode_steps=steps, num_threads=2)
    assert steps_to_truncation(env, STILL.astype(np.float32)) == steps
    for mode in ("sync", "vector_entry_point"):
        envs = gym.make_vec("PaperSquare-v0", num_envs=1, vectorization_mode=mode, max_episode_steps=steps)
        assert steps_to_truncation(envs, STILL[None].astype(np.float32)) == steps


def test_next_step_autoreset_is_the_reset_as_a_step():
    """As Gymnasium's own vector environment does it, and under its wrapper that needs this mode."""
    options = {"max_episode_steps": 7, "autoreset_mode": "NextStep"}
    ours = gym.make_vec("PaperSquare-v0", num_envs=2, vectorization_mode="vector_entry_point", **options)
    theirs = gym.make_vec("PaperSquare-v0", num_envs=2, vectorization_mode="sync", max_episode_steps=7)
    assert_array_equal(ours.reset(seed=3)[0], theirs.reset(seed=3)[0])
    for actions in random_actions(20, 2).astype(np.float32):
        for mine, other in zip(ours.step(actions)[:4], theirs.step(actions)[:4], strict=True):
            assert_array_equal(mine, other)
    gym.wrappers.vector.NormalizeObservation(ours).reset(seed=0)


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
    envs, actions = Delayed(3, act_scale=0.03), random_actions(40, 3)
    envs.reset(seed=1)
    for action in actions[:20]:
        envs.step(action)
    if copied == "state":
        other = Delayed(3, act_scale=0.03)
        other.load_state_dict(envs.state_dict())
    else:
        other = pickle.loads(pickle.dumps(envs)) if copied == "pickle" else copy.deepcopy(envs)
    for action in actions[20:]:
        for mine, theirs in zip(envs.step(action)[:4], other.step(action)[:4], strict=True):
            assert_array_equal(mine, theirs)


def test_a_new_flag_of_a_copied_environment_reaches_its_evaluation(tmp_path):
    """Reward weights apart, which are the default ones: returns of different trainings compare."""
    text = Path(SCENE_PATH.parents[1], "env_paper_square.py").read_text()
    flag = "    num_threads: Whole[0, 1024] = 0\n"
    assert text.count(flag) == 1
    path = tmp_path / "env_copy.py"
    path.write_text(text.replace(flag, f"    cube_weight: float = 1.0\n    cube_size: float = 0.02\n{flag}"))
    spec = importlib.util.spec_from_file_location("env_copy", path)
    module = sys.modules["env_copy"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    kwargs = module.eval_kwargs(module.EnvArgs(cube_size=0.03, cube_weight=2.0, randomize=False, randomize_xy=0.2))
    assert kwargs["cube_size"] == 0.03 and kwargs["randomize_xy"] == 0.2
    assert "cube_weight" not in kwargs and "randomize" not in kwargs


def test_environments_that_rendered_leave_no_renderer_behind():
    finalizers = []
    for seed in range(3):
        env = gym.make("PaperSquare-v0", render_mode="rgb_array", width=64, height=48)
        env.reset(seed=seed)
        env.render()
        finalizers.append(env.unwrapped.envs._close_renderer)
        env.close() if seed else None
        del env
    gc.collect()
    assert not any(finalizer.alive for finalizer in finalizers)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs the affinity of a process")
def test_all_cores_are_those_that_the_process_may_use():
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert PaperSquareVectorEnv(8).batch.nthread == 1
    finally:
        os.sched_setaffinity(0, allowed)


def test_spaces_contain_what_the_environment_returns():
    envs = PaperSquareVectorEnv(3)
    observations, _ = envs.reset(seed=0)
    assert envs.observation_space.shape == (3, OBS_DIM) and observations in envs.observation_space
    assert envs.action_space.shape == (3, 6) and envs.single_action_space.shape == (6,)
    assert (envs.action_space.low == -1).all() and (envs.action_space.high == 1).all()
    observations, rewards, terminations, truncations, _ = envs.step(envs.action_space.sample())
    assert observations in envs.observation_space
    assert rewards.shape == terminations.shape == truncations.shape == (3,)
    assert terminations.dtype == truncations.dtype == bool


def test_autoreset_mode_is_in_the_metadata():
    envs = PaperSquareVectorEnv(1, autoreset_mode=AutoresetMode.DISABLED)
    assert envs.metadata["autoreset_mode"] == AutoresetMode.DISABLED


# Success


@pytest.mark.parametrize(
    ("dx", "dy", "yaw", "success"),
    [
        (0.0, 0.0, 0.0, True),
        (0.004, 0.0, 0.0, True),
        (-0.004, 0.0, 0.0, True),
        (0.007, 0.0, 0.0, False),
        (-0.007, 0.0, 0.0, False),
        (0.0, 0.026, 0.0, True),
        (0.0, 0.029, 0.0, False),
        (0.0, 0.0, 0.1, True),
        (0.0, 0.0, 0.2, False),
        (0.0, 0.0, -0.2, False),
        (0.0, 0.0, np.pi / 2, True),
        (0.0, 0.0, np.pi, True),
        (0.0, 0.004, np.pi / 2, True),
        (0.0, 0.007, np.pi / 2, False),
    ],
)
def test_success_takes_five_steps_with_all_corners_inside(dx, dy, yaw, success):
    env = PaperSquareEnv(randomize=False)
    env.reset(seed=0)
    place_sheet(simulations(env.envs)[0], dx, dy, yaw)
    for step in range(1, 21):
        observation, _, terminated, truncated, info = env.step(STILL)
        assert terminated == info["is_success"] == (success and step == 5)
        assert not truncated
        assert to_si(observation)[OBS["hold_counter"]] == (step if success else 0)
        if terminated:
            break


def test_leaving_the_square_starts_the_count_again():
    env = PaperSquareEnv(randomize=False)
    env.reset(seed=0)
    counts = []
    for dx in (0.0, 0.0, 0.0, 0.02, 0.0, 0.0, 0.0, 0.0, 0.0):
        place_sheet(simulations(env.envs)[0], dx)
        observation, _, terminated, _, _ = env.step(STILL)
        counts.append(round(to_si(observation)[OBS["hold_counter"]].item()))
    assert counts == [1, 2, 3, 0, 1, 2, 3, 4, 5]
    assert terminated


def test_a_sheet_above_the_square_is_not_inside():
    env = PaperSquareEnv(randomize=False)
    env.reset(seed=0)
    place_sheet(simulations(env.envs)[0], height=0.03)
    observation = env.step(STILL)[0]
    assert to_si(observation)[OBS["sheet_pos"]][2] > 0.01
    assert to_si(observation)[OBS["hold_counter"]] == 0


def test_hold_steps_is_an_argument():
    env = PaperSquareEnv(randomize=False, hold_steps=2)
    env.reset(seed=0)
    place_sheet(simulations(env.envs)[0])
    assert [env.step(STILL)[2] for _ in range(2)] == [False, True]


def test_truncation_comes_exactly_at_max_episode_steps():
    env = PaperSquareEnv(max_episode_steps=7)
    for _ in range(2):
        env.reset(seed=0)
        ends = [env.step(STILL)[2:4] for _ in range(7)]
        assert ends == [(False, False)] * 6 + [(False, True)]


def test_success_on_the_last_step_is_not_a_truncation():
    env = PaperSquareEnv(max_episode_steps=5)
    env.reset(seed=0)
    place_sheet(simulations(env.envs)[0])
    assert [env.step(STILL)[2:4] for _ in range(5)][-1] == (True, False)


@pytest.mark.parametrize("autoreset_mode", [AutoresetMode.SAME_STEP, AutoresetMode.DISABLED])
@pytest.mark.parametrize("force", [1e12, 1e300, np.nan])
def test_diverging_physics_end_the_episode_and_disturb_nobody_else(force, autoreset_mode):
    sound, faulty = (PaperSquareVectorEnv(3, autoreset_mode=autoreset_mode) for _ in range(2))
    rng = np.random.default_rng(0)
    for envs in (sound, faulty):
        last_obs, _ = envs.reset(seed=4)
    faulty._hold_counter[1] = faulty.hold_steps - 1  # no success either
    faulty.batch.xfrc_applied[1, faulty.model.body("sheet").id, 2] = force
    for step in range(20):
        actions = rng.uniform(-1, 1, (3, 6))
        (expected, *_), (obs, rewards, terminations, truncations, infos) = sound.step(actions), faulty.step(actions)
        np.testing.assert_array_equal(obs[[0, 2]], expected[[0, 2]])
        assert all(np.isfinite(x).all() for x in (obs, rewards, faulty._qpos)) and not terminations.any()
        if step == 0:
            assert truncations.tolist() == [False, True, False]
            final = infos.get("final_info", infos)
            assert final["physics_reset"].tolist() == [False, True, False] and np.isfinite(final["dist_to_goal"]).all()
            final_obs = infos["final_obs"][1] if "final_obs" in infos else obs[1]
            where = np.r_[OBS["joint_pos"], OBS["sheet_pos"], OBS["fingertip_pos"]]
            np.testing.assert_array_equal(final_obs[where], last_obs[1, where])  # as before the step
            if autoreset_mode == AutoresetMode.DISABLED:
                faulty.reset(options={"reset_mask": np.array([False, True, False])})
        else:
            assert not truncations.any() and not infos["physics_reset"].any()


class Watch:
    """Extremes over every step of the physics of a batch, twelve to a policy step.

    `depth` and `last` (pairs, num_envs), m, how deep the geoms of each contact pair were in one another, at any step of
    the physics and at the last of a policy step: from where the geoms are, as MuJoCo's batch shows no contacts. `deep`
    (num_envs,), policy steps that end deeper than 5 mm. `kinetic`, J; `speed`, of a joint, rad/s, of the sheet, m/s and
    rad/s; `beyond`, rad, of a joint beyond its range.
    """

    def __init__(self, envs):
        self.envs, self.model, self.step = envs, envs.model, envs.batch.step
        envs.batch.expand("opt.enableflags")[:] |= mujoco.mjtEnableBit.mjENBL_ENERGY.value
        self.pos, self.mat, self.energy = (envs.batch.bind(name) for name in ("geom_xpos", "geom_xmat", "energy"))
        pairs = zip(self.model.pair_geom1.tolist(), self.model.pair_geom2.tolist(), strict=True)
        self.pairs = {self.model.pair(k).name: geoms for k, geoms in enumerate(pairs)}
        self.depth, self.last = np.zeros((2, len(self.pairs), envs.num_envs))
        self.deep = np.zeros(envs.num_envs, dtype=int)
        self.kinetic, self.beyond, self.speed = 0.0, 0.0, np.zeros(3)
        envs.batch.step = self.step_by_step

    def step_by_step(self, ids, nstep, stage):
        for _ in range(nstep):  # each to the stage that the next one goes on from: the numbers stay the same
            self.step(ids, 1, mujoco.mjtStage.mjSTAGE_VEL.value)
            depths = np.stack([self.depths(name, ids) for name in self.pairs])
            self.depth[:, ids] = np.maximum(self.depth[:, ids], depths)
            qpos, qvel = self.envs._qpos[ids, :6], np.abs(self.envs._qvel[ids])
            low, high = self.model.jnt_range[:6].T
            sheet = np.linalg.norm(qvel[:, 6:].reshape(-1, 2, 3), axis=2).max(axis=0)
            self.speed = np.maximum(self.speed, [qvel[:, :6].max(), *sheet])
            self.kinetic = max(self.kinetic, self.energy[ids, 1].max())
            self.beyond = max(self.beyond, (low - qpos).max(), (qpos - high).max())
        if stage == mujoco.mjtStage.mjSTAGE_VEL.value:
            self.last[:, ids] = np.maximum(self.last[:, ids], depths)
            self.deep[ids] += depths.max(axis=0) > 0.005

    def depths(self, name, ids):
        """How deep the geoms of a pair are in one another, (ids,), m; negative: how far apart."""
        first, second = self.pairs[name]
        kind, size, rotation = mujoco.mjtGeom, self.model.geom_size[second], self.mat[ids, second].reshape(-1, 3, 3)
        if self.model.geom_type[first] == kind.mjGEOM_PLANE:  # z = 0
            rise = np.abs(rotation[:, 2])  # of the geom's axes
            below = {
                kind.mjGEOM_SPHERE: size[0],
                kind.mjGEOM_CAPSULE: size[0] + size[1] * rise[:, 2],
                kind.mjGEOM_BOX: rise @ size,
            }
            return below[mujoco.mjtGeom(self.model.geom_type[second])] - self.pos[ids, second, 2]
        # A sphere and the sheet, a box: by where the sphere's centre is in the frame of the box
        centre = ((self.pos[ids, first] - self.pos[ids, second])[:, None] @ rotation)[:, 0]
        gap = np.abs(centre) - size
        away = np.linalg.norm(np.maximum(gap, 0.0), axis=1)
        return self.model.geom_size[first, 0] - np.where(away > 0, away, gap.max(axis=1))


EXTREMES = (
    "uniform",
    "random bounds",
    "held bounds",
    "bang-bang",
    "ends of the joints",
    "into the table",
    "onto the sheet",
)


def play_extremes(num_envs, num_steps, seed):
    """Environment i gets actions of the kind i % 7 of `EXTREMES`, from starts of three times the randomisation.

    Returns the `Watch` and the physics resets. Every observation, reward and state is held to be finite, and every
    hundredth step some of the depths to be MuJoCo's own.
    """
    scales = {name: getattr(EnvArgs, f"randomize_{name}") for name in ("xy", "yaw", "friction", "mass")}
    envs = PaperSquareVectorEnv(num_envs, **{f"randomize_{name}": 3 * scale for name, scale in scales.items()})
    obs, _ = envs.reset(seed=seed * num_envs, options={"episode_steps": np.arange(num_envs) % 400})
    watch, base, kinematics = Watch(envs), JacobianIKPolicy(), ArmKinematics()
    rng, kind, resets = np.random.default_rng(seed), np.arange(num_envs)[:, None] % 7, 0
    for step in range(num_steps):
        if step % 25 == 0:
            held, half_period = rng.choice([-1.0, 0.0, 1.0], (num_envs, 6)), rng.integers(1, 16, (num_envs, 1))
        if step % 200 == 0:
            corner = rng.choice([-1.0, 1.0], (num_envs, 6))
        uniform = rng.uniform(-1.0, 1.0, (num_envs, 6))
        down = held.copy()
        down[:, 1:4] = -np.sign(kinematics(joint_targets(to_si(obs), envs))[1][:, 2, 1:4])
        pressed = envs.fingertip_force.max(axis=1, keepdims=True) > 0.1  # N
        actions = np.choose(
            kind,
            [
                uniform,
                np.sign(uniform),  # a bound each step
                held,  # for almost a second
                held * (-1) ** (step // half_period),  # from bound to bound, all joints in phase
                corner,  # to the ends of the joints' ranges, where they stay until the next
                down,  # the fingers into the table
                np.where(pressed, down, base(obs)),  # and into the sheet
            ],
        )
        obs, rewards, terminations, truncations, infos = envs.step(1e6 * actions if step % 2 else actions)
        done = terminations | truncations
        assert np.isfinite(obs).all() and np.isfinite(rewards).all() and np.isfinite(envs.batch.state).all()
        if done.any():
            assert np.isfinite(np.stack(infos["final_obs"][done])).all()
            resets += infos["final_info"]["physics_reset"].sum()
            base.reset(done)
        if step % 100 == 0:
            check_depths(watch, rng.choice(np.flatnonzero(~done), 16, replace=False))
    envs.close()
    return watch, resets


def check_depths(watch, ids):
    for i in ids:
        data = watch.envs.batch.get_data(int(i))
        assert data.maxuse_arena < watch.model.narena / 8  # room for contacts
        contacts = data.contact
        for name, (first, second) in watch.pairs.items():
            distances = contacts.dist[(contacts.geom == [first, second]).all(axis=1)]
            assert_allclose(max(watch.depths(name, [i])[0], 0.0), -distances.min(initial=0.0), atol=1e-9, err_msg=name)


def test_thousands_of_environments_leave_memory_for_other_programs():
    """A process of more memory than the machine has, touched or not, cannot fork, as for ffmpeg at the end."""
    assert PaperSquareVectorEnv(1).model.narena * 4096 < 4e9


def test_extreme_actions_from_extreme_starts_break_no_physics():
    watch, resets = play_extremes(126, 150, seed=0)
    by_kind = watch.depth.max(axis=0).reshape(-1, len(EXTREMES)).max(axis=0)
    assert resets == 0 and watch.kinetic < 5.0
    assert by_kind[:3].max() < 0.005  # random actions; the others press with all that the servos have
    assert by_kind.max() < 0.02


@pytest.mark.campaign
def test_ten_million_extreme_steps_break_no_physics():
    """python -m pytest -m campaign tests/test_env.py -s"""
    num_envs, num_steps, resets, worst = 252, 4000, 0, {}
    deep = np.zeros(len(EXTREMES), dtype=int)
    for seed in range(1, 11):
        watch, found = play_extremes(num_envs, num_steps, seed)
        resets, deep = resets + found, deep + watch.deep.reshape(-1, len(EXTREMES)).sum(axis=0)
        extremes = dict(zip(("joint, rad/s", "sheet, m/s", "sheet, rad/s"), watch.speed, strict=True))
        extremes |= {"kinetic energy, J": watch.kinetic, "joint beyond its range, rad": watch.beyond}
        for which, depths in (("", watch.depth), (" at the end of a policy step", watch.last)):
            extremes |= {
                f"{name}{which}, mm": 1e3 * depth for name, depth in zip(watch.pairs, depths.max(1), strict=True)
            }
            by_kind = depths.max(0).reshape(-1, len(EXTREMES)).max(0)
            extremes |= {f"{name}{which}, mm": 1e3 * depth for name, depth in zip(EXTREMES, by_kind, strict=True)}
        worst = {name: max(value, worst.get(name, 0.0)) for name, value in extremes.items()}
        print(
            f"\n{seed * num_envs * num_steps:,} steps, {resets} physics resets; policy steps that end deeper than 5 mm:"
        )
        print(dict(zip(EXTREMES, deep.tolist(), strict=True)))
        print("\n".join(f"{value:10.2f} {name}" for name, value in worst.items()), flush=True)
    assert resets == 0 and worst["kinetic energy, J"] < 5.0


def test_tape_half_size_changes_with_the_next_episode():
    envs = PaperSquareVectorEnv(2, randomize=False, max_episode_steps=8, tape_half_size=0.12)
    observations, _ = envs.reset(seed=0)
    envs.tape_half_size = 0.08
    outcomes = []
    for step in range(16):
        if step in (0, 8):
            place_sheet(simulations(envs)[0], dx=0.03)  # fits the wide square only
            place_sheet(simulations(envs)[1], dx=0.09)  # fits neither
        if step == 5:
            place_sheet(simulations(envs)[0], dx=0.03)
        expected = (0.12 if step < 5 else 0.08, 0.12 if step < 8 else 0.08)
        assert_allclose(to_si(observations)[:, OBS["tape_half_size"]].ravel(), expected, atol=1e-6)
        observations, _, terminations, _, _ = envs.step(np.zeros((2, 6)))
        outcomes.append(terminations.tolist())
    assert outcomes.index([True, False]) == 4
    assert np.sum(outcomes) == 1


# Reward


def test_reward_terms_are_documented_functions_of_the_state_and_sum_to_the_reward():
    weights = dict(distance_weight=-3.0, orientation_weight=-0.7, time_weight=-0.02, reach_weight=-0.5)
    envs = PaperSquareVectorEnv(4, **weights)
    envs.reset(seed=0)
    for yaw, data in zip((0.1, -0.6, 1.4, 3.0), simulations(envs), strict=True):
        place_sheet(data, 0.05, 0.02, yaw)
    for actions in random_actions(10, 4):
        observations, rewards, _, _, infos = envs.step(actions)
        terms = {key: value for key, value in infos.items() if key.startswith("reward/")}
        assert list(terms) == [f"reward/{name}" for name in ("success", "distance", "orientation", "time", "reach")]
        assert_allclose(sum(terms.values()), rewards, rtol=0, atol=1e-15)

        state = to_si(observations)
        distance = np.linalg.norm(state[:, OBS["sheet_pos"]][:, :2] - SQUARE_POS, axis=1)
        yaw = np.arctan2(*state[:, OBS["sheet_yaw"]].T)
        turned = np.min(np.abs(yaw[:, None] - np.pi / 2 * np.arange(-3, 4)), axis=1)
        reach = np.linalg.norm(state[:, OBS["fingertip_pos"]] - state[:, OBS["sheet_pos"]], axis=1)
        assert_allclose(infos["dist_to_goal"], distance, atol=1e-6)
        assert_allclose(infos["orientation_error"], turned, atol=1e-6)
        assert_array_equal(terms["reward/success"], 0.0)
        assert_allclose(terms["reward/distance"], -3.0 * distance, atol=1e-5)
        assert_allclose(terms["reward/orientation"], -0.7 * turned, atol=1e-5)
        assert_array_equal(terms["reward/time"], -0.02)
        assert_allclose(terms["reward/reach"], -0.5 * reach, atol=1e-5)


def test_reward_terms_by_default_have_their_documented_signs():
    envs = PaperSquareVectorEnv(4)
    envs.reset(seed=0)
    infos = envs.step(random_actions(1, 4)[0])[4]
    assert (infos["reward/distance"] < 0).all() and (infos["reward/orientation"] < 0).all()
    assert (infos["reward/time"] == -0.01).all()
    assert (infos["reward/success"] == 0).all() and (infos["reward/reach"] == 0).all()


def test_success_is_paid_once_and_found_in_the_final_info():
    envs = PaperSquareVectorEnv(2)
    envs.reset(seed=0)
    place_sheet(simulations(envs)[1])
    paid, now = np.zeros(2), np.zeros(2)
    for step in range(1, 13):
        _, rewards, terminations, _, infos = envs.step(np.zeros((2, 6)))
        now = np.where(infos["_reward/success"], infos["reward/success"], 0.0)
        if terminations.any():
            assert step == 5
            assert_array_equal(terminations, [False, True])
            assert_array_equal(infos["_final_info"], terminations)
            assert_array_equal(infos["_reward/success"], ~terminations)
            assert infos["final_info"]["is_success"][1] and not infos["is_success"].any()
            now = now + infos["final_info"]["reward/success"]
            assert rewards[1] > 9.9
        else:
            assert "final_info" not in infos and (rewards < 0).all()
        paid += now
    assert_array_equal(paid, [0.0, 10.0])


def test_success_is_paid_once_without_autoreset():
    envs = PaperSquareVectorEnv(2, autoreset_mode=AutoresetMode.DISABLED)
    envs.reset(seed=0)
    place_sheet(simulations(envs)[1])
    paid = np.zeros(2)
    for step in range(1, 13):
        _, rewards, terminations, _, infos = envs.step(np.zeros((2, 6)))
        paid += infos["reward/success"]
        assert "final_info" not in infos and "final_obs" not in infos
        assert_array_equal(terminations, [False, step == 5])
        assert_array_equal(rewards > 0, terminations)
        assert_array_equal(infos["is_success"], terminations)
        if terminations.any():
            envs.reset(options={"reset_mask": terminations})
    assert_array_equal(paid, [0.0, 10.0])


# One implementation, one trajectory per seed


def assert_same_infos(ours, theirs):
    """Equal where the masks say that there is something; a key that is absent has a mask of zeros."""
    nothing = np.zeros(3, dtype=bool)
    for key in {key for key in (*ours, *theirs) if not key.startswith("_")}:
        mask = ours.get(f"_{key}", nothing)
        assert_array_equal(mask, theirs.get(f"_{key}", nothing), err_msg=key)
        if key == "final_info":
            assert_same_infos(ours[key], theirs[key])
        elif key == "final_obs":
            for i in range(3):
                assert_array_equal(ours[key][i], theirs[key][i])
        elif mask.any():
            assert ours[key].dtype == theirs[key].dtype
            assert_array_equal(ours[key][mask], theirs[key][mask], err_msg=key)


def test_single_and_vector_environment_are_the_same_across_autoreset():
    ours = PaperSquareVectorEnv(3, max_episode_steps=7)
    theirs = SyncVectorEnv([lambda: PaperSquareEnv(max_episode_steps=7)] * 3, autoreset_mode=AutoresetMode.SAME_STEP)
    our_observations, our_infos = ours.reset(seed=0)
    their_observations, their_infos = theirs.reset(seed=0)
    assert_array_equal(our_observations, their_observations)
    assert_same_infos(our_infos, their_infos)
    for data in (simulations(ours)[1], simulations(theirs.envs[1].envs)[0]):
        place_sheet(data)  # this one ends in success, out of step with the others
    terminated = truncated = 0
    for actions in random_actions(20, 3):
        our_step, their_step = ours.step(actions), theirs.step(actions)
        for a, b in zip(our_step[:4], their_step[:4], strict=True):
            assert a.dtype == b.dtype
            assert_array_equal(a, b)
        assert_same_infos(our_step[4], their_step[4])
        terminated, truncated = terminated + our_step[2].sum(), truncated + our_step[3].sum()
    assert terminated == 1 and truncated == 6


def test_final_observation_is_the_one_before_the_reset():
    actions = random_actions(7, 2)
    envs = PaperSquareVectorEnv(2, max_episode_steps=7)
    frozen = PaperSquareVectorEnv(2, max_episode_steps=7, autoreset_mode=AutoresetMode.DISABLED)
    last = rollout(frozen, actions, seed=0)[0][-1]
    envs.reset(seed=0)
    for action in actions:
        observations, _, _, _, infos = envs.step(action)
    assert_array_equal(np.stack(infos["final_obs"]), last)
    home = mujoco.MjModel.from_xml_path(str(SCENE_PATH)).key("home").qpos[:6]
    assert_allclose(to_si(observations)[:, OBS["joint_pos"]], [home] * 2, atol=1e-6)


def test_same_seed_same_trajectory_whatever_came_before():
    actions = random_actions(20, 3)
    envs = PaperSquareVectorEnv(3, max_episode_steps=8)
    first = rollout(envs, actions, seed=5)
    other = rollout(envs, actions, seed=6)
    again = rollout(envs, actions, seed=5)
    fresh = rollout(PaperSquareVectorEnv(3, max_episode_steps=8), actions, seed=5)
    assert_same_rollout(first, again)
    assert_same_rollout(first, fresh)
    assert not np.array_equal(first[0], other[0])
    assert first[3].sum() == 6  # two truncations each: episodes after the first are compared, too


@pytest.mark.parametrize("num_threads", [2, 3])
def test_trajectory_does_not_depend_on_the_number_of_threads(num_threads):
    actions = random_actions(20, 5)
    one = rollout(PaperSquareVectorEnv(5, max_episode_steps=8, num_threads=1), actions, seed=0)
    envs = PaperSquareVectorEnv(5, max_episode_steps=8, num_threads=num_threads)
    assert_same_rollout(one, rollout(envs, actions, seed=0))
    envs.close()


@pytest.mark.parametrize("i", [0, 3])
def test_trajectory_does_not_depend_on_the_number_of_environments(i):
    actions = random_actions(20, 5)
    five = rollout(PaperSquareVectorEnv(5, max_episode_steps=8), actions, seed=10)
    one = rollout(PaperSquareVectorEnv(1, max_episode_steps=8), actions[:, i : i + 1], seed=10 + i)
    assert_same_rollout([values[:, i : i + 1] for values in five], one)


def test_a_list_of_seeds_is_one_seed_per_environment():
    by_int, _ = PaperSquareVectorEnv(3).reset(seed=4)
    by_list, _ = PaperSquareVectorEnv(3).reset(seed=[6, 5, 4])
    assert_array_equal(by_list, by_int[::-1])


def test_reset_mask_resets_the_masked_and_leaves_the_others_alone():
    actions = random_actions(20, 3)
    envs = PaperSquareVectorEnv(3, autoreset_mode=AutoresetMode.DISABLED)
    undisturbed = rollout(envs, actions, seed=0)
    masked = rollout(envs, actions[:8], seed=0)
    mask = np.array([False, True, False])
    before = masked[0][-1]
    observations, infos = envs.reset(seed=[50, 51, 52], options={"reset_mask": mask})
    assert_array_equal(observations[~mask], before[~mask])
    for key in ("is_success", "dist_to_goal", "orientation_error"):
        assert_array_equal(infos[f"_{key}"], mask)
    fresh = rollout(PaperSquareVectorEnv(1), actions[8:, 1:2], seed=51)
    for step, action in enumerate(actions[8:], start=9):
        assert_array_equal(observations[1], fresh[0][step - 9, 0])
        observations, rewards, *_ = envs.step(action)
        assert_array_equal(observations[~mask], undisturbed[0][step][~mask])
        assert_array_equal(rewards[~mask], undisturbed[1][step - 1][~mask])
        assert_array_equal(rewards[1], fresh[1][step - 9, 0])


def test_episodes_can_start_with_steps_already_taken():
    envs = PaperSquareVectorEnv(3, max_episode_steps=8)
    fresh, _ = envs.reset(seed=0)
    started, _ = envs.reset(seed=0, options={"episode_steps": np.array([0, 5, 7])})
    assert_array_equal(fresh, started)
    lengths = np.zeros(3)
    for step in range(1, 9):
        truncations = envs.step(np.zeros((3, 6)))[3]
        lengths[truncations & (lengths == 0)] = step
    assert_array_equal(lengths, [8, 3, 1])
    for bad in (np.array([0, 0, 8]), np.array([0, -1, 0]), np.zeros(2, dtype=int)):
        with pytest.raises(ValueError, match="episode_steps"):
            envs.reset(seed=0, options={"episode_steps": bad})


def test_flags_have_the_defaults_of_the_constructor():
    parameters = inspect.signature(PaperSquareVectorEnv).parameters
    assert env_kwargs(EnvArgs()) == {name: parameters[name].default for name in env_kwargs(EnvArgs())}


def test_evaluation_is_never_easier_than_the_default_nor_than_the_training():
    args = EnvArgs(act_scale=0.03, tape_half_size=0.076, randomize=False, randomize_xy=0.0, randomize_yaw=1.5)
    expected = {name: env_kwargs(EnvArgs())[name] for name in eval_kwargs(args)}
    expected |= {"act_scale": 0.03, "tape_half_size": 0.076, "randomize_yaw": 1.5}
    assert eval_kwargs(args) == expected and "randomize" not in expected


# Randomisation


def drawn(envs, i):
    """What an episode drew: the sheet's pose and the model's parameters."""
    model, qpos = envs.batch.get_model(i), simulations(envs)[i].qpos
    return {
        "xy": qpos[6:8].copy(),
        "yaw": 2 * np.arctan2(qpos[12], qpos[9]),
        "friction": np.concatenate(
            [model.pair(name).friction for name in ("sheet_table", "fixed_fingertip_sheet", "moving_fingertip_sheet")]
        ),
        "mass": np.concatenate([model.body("sheet").mass, model.body("sheet").inertia]),
    }


def expected_draw(numbers):
    """The same from six numbers in [-1, 1] and the nominal scene."""
    model = load_scene()
    table, finger = 1 + SCALES["friction"] * numbers[3:5]
    sheet = model.body("sheet")
    return {
        "xy": np.array([0.19, -0.09]) + SCALES["xy"] * numbers[:2],
        "yaw": SCALES["yaw"] * numbers[2],
        "friction": np.concatenate(
            [
                model.pair("sheet_table").friction * table,
                model.pair("fixed_fingertip_sheet").friction * finger,
                model.pair("moving_fingertip_sheet").friction * finger,
            ]
        ),
        "mass": np.concatenate([sheet.mass, sheet.inertia]) * (1 + SCALES["mass"] * numbers[5]),
    }


def test_every_episode_has_the_pose_friction_and_mass_that_were_drawn():
    envs = PaperSquareVectorEnv(3)
    envs.reset(seed=20)
    rngs = [np.random.default_rng(20 + i) for i in range(3)]
    for _ in range(2):
        for i, rng in enumerate(rngs):
            actual, expected = drawn(envs, i), expected_draw(rng.uniform(-1.0, 1.0, 6))
            for name in expected:
                assert_allclose(actual[name], expected[name], rtol=1e-12, atol=1e-12, err_msg=name)
        envs.reset()  # the next episode draws the next six numbers


def test_randomisation_touches_no_other_parameter_of_the_model():
    envs = PaperSquareVectorEnv(1)
    envs.reset(seed=0)
    model, scene = envs.batch.get_model(0), load_scene()
    for pair in ("fixed_fingertip_table", "moving_fingertip_table", "gripper_table", "wrist_table", "elbow_table"):
        assert_array_equal(model.pair(pair).friction, scene.pair(pair).friction)
    for body in ("base", "shoulder", "upper_arm", "lower_arm", "wrist", "gripper", "moving_jaw"):
        assert_array_equal(model.body(body).mass, scene.body(body).mass)


def test_without_randomisation_everything_is_nominal():
    envs = PaperSquareVectorEnv(2, randomize=False)
    envs.reset(seed=0)
    for i in range(2):
        actual, expected = drawn(envs, i), expected_draw(np.zeros(6))
        for name in expected:
            assert_array_equal(actual[name], expected[name], err_msg=name)
        assert_array_equal(simulations(envs)[i].qpos, load_scene().key("home").qpos)


@pytest.mark.parametrize("ablated", SCALES)
def test_ablating_one_scale_leaves_the_other_draws_as_they_were(ablated):
    envs = PaperSquareVectorEnv(1, **{f"randomize_{ablated}": 0.0})
    full = PaperSquareVectorEnv(1)
    nominal = expected_draw(np.zeros(6))
    envs.reset(seed=3)
    full.reset(seed=3)
    for _ in range(2):
        actual, randomised = drawn(envs, 0), drawn(full, 0)
        for name in SCALES:
            assert_array_equal(actual[name], (nominal if name == ablated else randomised)[name], err_msg=name)
            assert not np.array_equal(randomised[name], nominal[name])
        envs.reset()
        full.reset()


# Action


def target_of(observations):
    state = to_si(observations)
    return state[..., OBS["joint_pos"]] + state[..., OBS["joint_target_error"]]


def test_target_is_incremented_by_the_clipped_action_and_held_in_the_control_range():
    envs = PaperSquareVectorEnv(2, act_scale=0.5, randomize=False)
    observations, _ = envs.reset(seed=0)
    low, high = load_scene().actuator_ctrlrange.T
    target = np.tile(load_scene().key("home").ctrl, (2, 1))
    assert_allclose(target_of(observations), target, atol=1e-6)
    actions = 3.0 * random_actions(12, 2)
    actions[:, 1] = np.sign(actions[0, 1]) * [5.0, 1.0, 1.0, 1.0, 1.0, 1.0]  # into the limits
    for action in actions:
        target = np.clip(target + 0.5 * np.clip(action, -1, 1), low, high)
        observations, *_ = envs.step(action)
        assert_allclose([data.ctrl for data in simulations(envs)], target, rtol=0, atol=1e-12)
        assert_allclose(target_of(observations), target, atol=1e-6)
    assert (np.isclose(target[1], low) | np.isclose(target[1], high)).all()


def test_target_does_not_follow_the_sagging_arm():
    envs = PaperSquareVectorEnv(1)
    envs.reset(seed=0)
    for _ in range(10):
        envs.step(np.zeros((1, 6)))
    assert_array_equal(simulations(envs)[0].ctrl, load_scene().key("home").ctrl)
    assert not np.array_equal(simulations(envs)[0].qpos[:6], simulations(envs)[0].ctrl)


@pytest.mark.parametrize(
    ("rates", "ticks", "substeps"),
    [((360, 180, 30), 6, 2), ((360, 360, 60), 6, 1), ((720, 180, 60), 3, 4)],
)
def test_control_ticks_interpolate_the_target_linearly(rates, ticks, substeps):
    """One policy step against the same written out by hand on a copy of the physics."""
    physics_hz, control_hz, policy_hz = rates
    envs = PaperSquareVectorEnv(1, physics_hz=physics_hz, control_hz=control_hz, policy_hz=policy_hz)
    assert (envs.control_ticks, envs.physics_steps) == (ticks, substeps)
    assert envs.metadata["render_fps"] == policy_hz
    envs.reset(seed=0)
    envs.step(random_actions(1, 1, seed=1)[0])
    model, data = envs.batch.get_model(0), envs.batch.get_data(0)
    previous, action = data.ctrl.copy(), random_actions(1, 1, seed=2)[0]
    envs.step(action)
    for tick in range(1, ticks + 1):
        data.ctrl[:] = previous + 0.02 * action[0] * tick / ticks
        mujoco.mj_step(model, data, substeps)
    assert_allclose(simulations(envs)[0].time, 2 / policy_hz, rtol=1e-9)
    assert_allclose(simulations(envs)[0].qpos, data.qpos, rtol=0, atol=1e-12)
    assert_allclose(simulations(envs)[0].qvel, data.qvel, rtol=0, atol=1e-10)


# Arguments that cannot be used


@pytest.mark.parametrize(
    "rates", [(360, 180, 50), (360, 100, 20), (100, 200, 50), (360, 180, 0), (360, 0, 30), (0, 180, 30)]
)
def test_rates_that_do_not_divide_are_an_error_that_names_them(rates):
    physics_hz, control_hz, policy_hz = rates
    with pytest.raises(ValueError, match=f"physics_hz={physics_hz}, control_hz={control_hz}, policy_hz={policy_hz}"):
        PaperSquareVectorEnv(1, physics_hz=physics_hz, control_hz=control_hz, policy_hz=policy_hz)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_envs": 0}, "num_envs .* found 0"),
        ({"render_mode": "ansi"}, "render_mode .* found 'ansi'"),
        ({"autoreset_mode": "never"}, "not a valid AutoresetMode"),
        ({"act_scale": np.nan}, "act-scale must be .* found nan"),
        ({"hold_steps": 0}, "hold_steps .* found 0"),
        ({"tape_half_size": -0.08}, "tape-half-size"),
        ({"randomize_friction": 1.5}, "randomize-friction"),
    ],
)
def test_arguments_that_cannot_be_used(arguments, message):
    with pytest.raises(ValueError, match=message):
        PaperSquareVectorEnv(**arguments)


@pytest.mark.parametrize(
    "actions", [np.zeros(6), np.zeros((2, 5)), np.zeros((3, 6)), np.full((2, 6), np.nan), np.full((2, 6), np.inf)]
)
def test_actions_that_cannot_be_used(actions):
    envs = PaperSquareVectorEnv(2)
    envs.reset(seed=0)
    with pytest.raises(ValueError, match=r"actions must be finite and of shape \(2, 6\)"):
        envs.step(actions)


def test_action_of_the_wrong_shape_in_the_single_environment():
    env = PaperSquareEnv()
    env.reset(seed=0)
    for action in (np.zeros(5), np.zeros((1, 6)), 0.0):
        with pytest.raises(ValueError, match="actions must be finite and of shape"):
            env.step(action)


def test_list_of_seeds_of_the_wrong_length():
    with pytest.raises(ValueError, match="expected 3, found 2"):
        PaperSquareVectorEnv(3).reset(seed=[0, 1])


@pytest.mark.parametrize(
    "mask", [np.array([True]), np.zeros(3, dtype=bool), np.array([1, 0, 1]), np.ones((3, 1), dtype=bool)]
)
def test_reset_mask_that_cannot_be_used(mask):
    envs = PaperSquareVectorEnv(3)
    envs.reset(seed=0)
    with pytest.raises(ValueError, match=r"reset_mask must be a boolean array of shape \(3,\)"):
        envs.reset(options={"reset_mask": mask})


# The documentation


def test_observation_table_is_the_observation():
    rows = documented_table("Observation space", ["rows", "name", "content", "unit", "zero at", "scale"])
    assert [row[1] for row in rows] == list(OBS)
    home = load_scene().key("home").qpos[:6]
    start = 0
    for indices, name, _, _, zero, scale in rows:
        first, _, last = indices.partition("-")
        assert OBS[name] == slice(int(first), int(last or first) + 1)
        assert OBS[name].start == start
        start = OBS[name].stop
        zero = home if zero == "home" else [float(number) for number in zero.split(",")]
        assert_allclose(OBS_ZERO[OBS[name]], np.broadcast_to(zero, OBS_ZERO[OBS[name]].shape), err_msg=name)
        scale = np.broadcast_to([float(number) for number in scale.split(",")], OBS_SCALE[OBS[name]].shape)
        assert_allclose(OBS_SCALE[OBS[name]], scale, err_msg=name)
    assert start == OBS_DIM == len(OBS_ZERO) == len(OBS_SCALE)
    assert f"`Box(-inf, inf, ({OBS_DIM},), float32)`" in inspect.getdoc(PaperSquareVectorEnv)


def test_reward_table_gives_the_default_weights():
    rows = documented_table("Rewards", ["term", "default weight", "formula"])
    parameters = inspect.signature(PaperSquareVectorEnv).parameters
    defaults = {name[: -len("_weight")]: p.default for name, p in parameters.items() if name.endswith("_weight")}
    assert {term: float(weight) for term, weight, _ in rows} == defaults
    envs = PaperSquareVectorEnv(1)
    envs.reset(seed=0)
    infos = envs.step(np.zeros((1, 6)))[4]
    assert [key for key in infos if key.startswith("reward/")] == [f"reward/{term}" for term, _, _ in rows]


def test_action_table_gives_the_joints_and_their_control_ranges():
    rows = documented_table("Action space", ["index", "joint", "range, rad"])
    model = load_scene()
    assert [(int(index), joint) for index, joint, _ in rows] == list(enumerate(JOINTS))
    for (_, joint, interval), ctrlrange in zip(rows, model.actuator_ctrlrange, strict=True):
        assert_allclose([float(end) for end in interval.split(" to ")], ctrlrange, atol=5.1e-4)
        assert_allclose(ctrlrange, model.joint(joint).range, rtol=1e-12)
        assert model.actuator(joint).trnid[0] == model.joint(joint).id == JOINTS.index(joint)


def test_every_argument_is_documented():
    text = inspect.getdoc(PaperSquareVectorEnv)
    scales = {"randomize_xy", "randomize_yaw", "randomize_friction", "randomize_mass"}
    names = set(inspect.signature(PaperSquareVectorEnv).parameters)
    assert {name for name in names if f"`{name}`" not in text} == set()
    assert scales == {name for name in names if name.startswith("randomize_")}


# Observation


def test_to_si_inverts_the_scaling():
    values = np.random.default_rng(0).normal(size=(4, OBS_DIM))
    assert_allclose(to_si((values - OBS_ZERO) * OBS_SCALE), values, atol=1e-12)
    assert_allclose(to_si(((values - OBS_ZERO) * OBS_SCALE)[0]), values[0], atol=1e-12)


def test_observation_is_the_state_of_the_physics():
    """Every entry against MuJoCo's, on the full scene; at the start and after moving."""
    envs = PaperSquareVectorEnv(3, tape_half_size=0.1)
    observations, _ = envs.reset(seed=0)
    scene = load_scene()
    for step, actions in enumerate(random_actions(6, 3)):
        for observation, data in zip(observations, simulations(envs), strict=True):
            posed = mujoco.MjData(scene)
            posed.qpos[:] = data.qpos
            mujoco.mj_kinematics(scene, posed)
            sheet, fingertip = posed.body("sheet"), posed.site(FINGERTIPS[0])
            long_axis = sheet.xmat.reshape(3, 3)[:2, 0]
            square = posed.site("square").xpos
            expected = {
                "joint_pos": data.qpos[:6],
                "joint_vel": data.qvel[:6],
                "joint_target_error": data.ctrl - data.qpos[:6],
                "sheet_pos": sheet.xpos,
                "sheet_yaw": long_axis[::-1] / np.linalg.norm(long_axis),
                "sheet_to_square": (square - sheet.xpos)[:2],
                "fingertip_pos": fingertip.xpos,
                "fingertip_to_sheet": (sheet.xpos - fingertip.xpos)[:2],
                "tape_half_size": 0.1,
                "hold_counter": 0,
            }
            assert list(expected) == list(OBS)
            state = to_si(observation)
            for name, value in expected.items():
                assert_allclose(state[OBS[name]], value, rtol=0, atol=2e-6, err_msg=name)
        if step == 2:
            for yaw, data in zip((2.5, -1.2, 0.7), simulations(envs), strict=True):
                place_sheet(data, 0.1, -0.05, yaw, height=0.05)  # falling, too
                data.qpos[10] = 0.2  # and tilted
                data.qpos[9:13] /= np.linalg.norm(data.qpos[9:13])
        observations, *_ = envs.step(actions)


# The scene


def test_scene_has_what_the_scripts_name():
    model = load_scene()
    assert {model.camera(i).name for i in range(model.ncam)} == {"top", "side", "wrist"}
    for site in ("fixed_fingertip", "moving_fingertip", "square"):
        model.site(site)  # KeyError if there is none
    assert_array_equal(model.body("square").pos[:2], SQUARE_POS)
    assert_array_equal(model.key("home").ctrl, model.key("home").qpos[:6])
    assert [model.joint(name).qposadr[0] for name in JOINTS] == list(range(6))
    assert model.joint("sheet").qposadr[0] == 6


def test_scene_has_primitive_geoms_only_and_only_the_named_pairs_touch():
    model = load_scene()
    kinds = {mujoco.mjtGeom(kind).name for kind in model.geom_type}
    assert model.nmesh == 0 and model.nhfield == 0
    assert kinds <= {f"mjGEOM_{kind}" for kind in ("PLANE", "SPHERE", "CAPSULE", "CYLINDER", "BOX")}
    assert (model.geom_contype == 0).all() and (model.geom_conaffinity == 0).all()
    assert model.npair == 8


def test_arm_has_the_kinematics_of_an_so101():
    model = load_scene()
    data = mujoco.MjData(model)
    data.qpos[:6] = 0.0
    mujoco.mj_kinematics(model, data)
    gripper = data.body("gripper")
    point = gripper.xpos + gripper.xmat.reshape(3, 3) @ [-0.0081, 0.0, -0.106]
    assert_allclose(point, [0.39923, 0.00022, 0.22628], atol=1e-4)


def test_home_holds_the_fingertip_two_centimetres_above_the_table():
    model = load_scene()
    data = mujoco.MjData(model)
    mujoco.mj_resetDataKeyframe(model, data, model.key("home").id)
    mujoco.mj_kinematics(model, data)
    x, y, z = data.site(FINGERTIPS[0]).xpos
    radius = model.geom(FINGERTIPS[0]).size[0]
    assert radius == 0.008
    assert abs(z - radius - 0.02) < 0.002
    assert np.hypot(x - 0.20, y) < 0.01
    assert_array_equal(data.geom(FINGERTIPS[0]).xpos, data.site(FINGERTIPS[0]).xpos)


def test_training_model_has_the_physics_of_the_full_scene():
    """What is left out for speed is only what a camera sees; with the finger pressing and dragging the sheet."""
    scene, envs = load_scene(), PaperSquareVectorEnv(1, randomize=False)
    assert envs.batch.get_model(0).ngeom < scene.ngeom
    assert envs.batch.get_model(0).opt.timestep == pytest.approx(scene.opt.timestep, rel=1e-12)
    states, masses, touched = [], [], []
    for model in (envs.batch.get_model(0), scene):
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
        sheet, finger = model.geom("sheet").id, model.geom(FINGERTIPS[0]).id
        touched.append(any(set(pair) == {sheet, finger} for pair in data.contact.geom.tolist()))
        states.append(data.qpos.copy())
        masses.append(mass)
    assert all(touched) and states[0][7] < -0.01  # pressed and dragged
    assert_allclose(states[0], states[1], rtol=0, atol=1e-9)
    assert_allclose(masses[0], masses[1], rtol=0, atol=1e-9)


def test_golden_rollout():
    """Any change of the physics, the reward or the observation shows here, wanted or not.

    After a wanted one: UPDATE_GOLDEN=1 pytest tests/test_env.py -k golden
    """
    envs = PaperSquareVectorEnv(2)
    envs.reset(seed=0)
    for data in simulations(envs):
        data.qpos[6:8] = 0.2, 0.0  # under the fingers
    actions = random_actions(20, 2)
    actions[:, :, 1] += 0.4  # down, so that they touch it
    rewards = []
    for action in actions:
        observations, reward, *_ = envs.step(action)
        rewards.append(reward)
    assert np.ptp(rewards, axis=0).min() > 1e-3  # both sheets were moved
    if os.environ.get("UPDATE_GOLDEN"):
        # row by row: a number per line would be long, all on one line unreadable in a diff
        rows = {
            name: ",\n".join(f"  {[round(float(value), 6) for value in row]}" for row in table)
            for name, table in (("observation", observations), ("rewards", rewards))
        }
        GOLDEN_PATH.write_text("{\n" + ",\n".join(f' "{name}": [\n{rows[name]}\n ]' for name in rows) + "\n}\n")
        pytest.skip("rewrote the golden rollout")
    golden = json.loads(GOLDEN_PATH.read_text())
    assert_allclose(observations, golden["observation"], rtol=1e-4, atol=1e-4)
    assert_allclose(rewards, golden["rewards"], rtol=0, atol=1e-5)


# Rendering


@pytest.fixture(scope="module")
def rendered_envs():
    envs = PaperSquareVectorEnv(2, render_mode="rgb_array", camera="top", width=320, height=240, randomize=False)
    envs.reset(seed=0)
    try:
        envs.render()
    except RuntimeError as error:  # neither EGL nor OSMesa
        pytest.skip(str(error))
    yield envs
    envs.close()


def test_render_gives_one_image_per_environment(rendered_envs):
    place_sheet(simulations(rendered_envs)[1])
    rendered_envs.step(np.zeros((2, 6)))
    frames = rendered_envs.render()
    assert len(frames) == 2
    for frame in frames:
        assert frame.shape == (240, 320, 3) and frame.dtype == np.uint8
        assert frame.std() > 10
    assert (frames[0] != frames[1]).mean() > 0.01  # the sheet lies elsewhere
    assert_array_equal(rendered_envs.render_frame(1), frames[1])


def test_cameras_see_different_things(rendered_envs):
    frames = {camera: rendered_envs.render_frame(0, camera).astype(int) for camera in ("top", "side", "wrist")}
    assert_array_equal(frames["top"], rendered_envs.render_frame(0))
    for a, b in (("top", "side"), ("side", "wrist"), ("wrist", "top")):
        assert np.abs(frames[a] - frames[b]).mean() > 5


@pytest.mark.parametrize("half_size", [0.08, 0.12])
def test_tape_is_drawn_where_it_counts(rendered_envs, half_size):
    rendered_envs.tape_half_size = half_size
    rendered_envs.reset(seed=0)
    red, green, blue = np.moveaxis(rendered_envs.render_frame(0).astype(float), 2, 0)
    rows, columns = np.nonzero((red > 60) & (red > 2.5 * green) & (red > 2.5 * blue))
    camera = load_scene().camera("top")
    metres = 2 * camera.pos[2] * np.tan(np.deg2rad(camera.fovy[0]) / 2) / 240  # per pixel, on the table
    width = 2 * (half_size + TAPE_WIDTH)
    assert abs((np.ptp(rows) + 1) * metres - width) < 2 * metres
    assert abs((np.ptp(columns) + 1) * metres - width) < 2 * metres
    x = camera.pos[0] - metres * ((rows.min() + rows.max()) / 2 - 119.5)  # up in the image is x
    y = camera.pos[1] - metres * ((columns.min() + columns.max()) / 2 - 159.5)  # left is y
    assert_allclose([x, y], SQUARE_POS, atol=1.5 * metres)


def test_single_environment_renders_an_image(rendered_envs):
    env = gym.make("PaperSquare-v0", render_mode="rgb_array", width=64, height=48)
    env.reset(seed=0)
    frame = env.render()
    assert frame.shape == (48, 64, 3) and frame.dtype == np.uint8 and frame.std() > 10
    env.close()


def test_paused_environments_do_nothing_and_do_not_disturb_the_others():
    envs, reference = (PaperSquareVectorEnv(2, autoreset_mode=AutoresetMode.DISABLED) for _ in range(2))
    envs.reset(seed=0)
    reference.reset(seed=0)
    envs.paused[1] = True
    before = simulations(envs)[1].time
    for action in np.random.default_rng(0).uniform(-1, 1, (5, 2, 6)):
        observations, *_ = envs.step(action)
        expected, *_ = reference.step(action)
    np.testing.assert_array_equal(observations[0], expected[0])
    assert simulations(envs)[1].time == before
