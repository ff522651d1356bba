"""Paper-in-Square: an SO-101 arm slides a sheet of A6 card into a square of red tape (MuJoCo, Gymnasium).

    python env_paper_square.py                      # self-test: random actions, prints what happened and steps/s
    gym.make("PaperSquare-v0")                      # after `import env_paper_square`
    gym.make_vec("PaperSquare-v0", num_envs=64, vectorization_mode="vector_entry_point")

`PaperSquareVectorEnv` holds the physics, the reward and the observation; `PaperSquareEnv` is one of its environments.
The environment knows nothing of base policies or residuals. `EnvArgs` are the flags that the training scripts inherit.
"""

import importlib
import os
import platform
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import gymnasium as gym
import mujoco
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from runs import Flags, Real, Whole, available_cores, data_of, restored

try:
    from mujoco.batch import Batch
except ImportError as error:
    raise ImportError(f"mujoco {mujoco.__version__} has no mujoco.batch, which came with 3.17: update it") from error

SCENE_PATH = Path(__file__).resolve().parent / "assets" / "paper_square.xml"
JOINTS = ("shoulder_pan", "shoulder_lift", "elbow_flex", "wrist_flex", "wrist_roll", "gripper")
FINGERTIPS = ("fixed_fingertip", "moving_fingertip")  # sites; the first is the one that is steered
SHEET_HALF_SIZE = np.array([0.074, 0.0525])  # A6, m
SQUARE_POS = np.array([0.19, 0.09])  # centre of the tape square, m
TAPE_WIDTH = 0.0125  # m
FLAT_HEIGHT = 0.01  # a corner higher than this is not on the table, m
POLICY_HZ = 30  # steps per second

# name -> (SI value at which the entry is zero, scale): centred on the start and of order one
OBS_ROWS = {
    "joint_pos": ([0.0, -0.14, 0.52, 1.19, 0.0, 0.3], [3.0] * 6),
    "joint_vel": ([0.0] * 6, [5.0] * 6),
    "joint_target_error": ([0.0] * 6, [200.0] * 6),
    "sheet_pos": ([0.19, 0.0, 0.0], [10.0] * 3),
    "sheet_yaw": ([0.0, 1.0], [10.0] * 2),
    "sheet_to_square": ([0.0] * 2, [30.0] * 2),
    "fingertip_pos": ([0.19, 0.0, 0.01], [10.0, 10.0, 100.0]),
    "fingertip_to_sheet": ([0.0] * 2, [30.0] * 2),
    "tape_half_size": ([0.08], [50.0]),
    "hold_counter": ([0.0], [0.5]),
}
OBS_ZERO = np.concatenate([zero for zero, _ in OBS_ROWS.values()])
OBS_SCALE = np.concatenate([scale for _, scale in OBS_ROWS.values()])
OBS_DIM = len(OBS_SCALE)
_ends = np.cumsum([len(zero) for zero, _ in OBS_ROWS.values()]).tolist()
OBS = {name: slice(end - len(zero), end) for (name, (zero, _)), end in zip(OBS_ROWS.items(), _ends, strict=True)}


def to_si(obs: np.ndarray) -> np.ndarray:
    """Observations (..., obs_dim) back to SI units, float64; `to_si(obs)[..., OBS["sheet_pos"]]` is in metres."""
    return obs / OBS_SCALE + OBS_ZERO


@dataclass
class EnvArgs(Flags):
    act_scale: Real[1e-6, 3.2] = 0.02
    """largest change of a joint target per policy step, rad"""
    tape_half_size: Real[0.001, 1] = 0.08
    """half the inside width of the tape square, m"""
    randomize: bool = True
    """randomise the sheet's pose, friction and mass at every reset (evaluations always do)"""
    randomize_xy: Real[0, 1] = 0.05
    """largest offset of the sheet's start in x and y, m"""
    randomize_yaw: Real[0, 6.2832] = 0.3
    """largest yaw of the sheet's start, rad"""
    randomize_friction: Real[0, 0.99] = 0.2
    """largest relative change of the friction coefficients"""
    randomize_mass: Real[0, 0.99] = 0.1
    """largest relative change of the sheet's mass"""
    success_weight: Real[-1e4, 1e4] = 10.0
    """reward, once, for a success"""
    distance_weight: Real[-1e4, 1e4] = -2.0
    """reward per m between the sheet's centre and the square's, each step"""
    orientation_weight: Real[-1e4, 1e4] = -0.1
    """reward per rad between the sheet's yaw and a multiple of 90 degrees, each step"""
    time_weight: Real[-1e4, 1e4] = -0.01
    """reward each step"""
    reach_weight: Real[-1e4, 1e4] = 0.0
    """reward per m between the fingertip and the sheet's centre, each step; negative draws the finger to the sheet"""
    num_threads: Whole[0, 1024] = 0
    """threads that step the physics; 0 takes all cores"""


def env_kwargs(args: EnvArgs) -> dict:
    """The constructor arguments of the environment that are flags of the training scripts."""
    return {field.name: getattr(args, field.name) for field in fields(EnvArgs)}


def eval_kwargs(args: EnvArgs) -> dict:
    """The constructor arguments of the environment that a policy trained with `args` is judged in.

    Its own task, randomised by default as widely as any other's, or more widely if it was trained so; returns of
    different trainings compare, because the reward's weights are the default ones.
    """
    kwargs = {name: value for name, value in env_kwargs(args).items() if not name.endswith("_weight")}
    for name in ("randomize", "num_threads"):
        del kwargs[name]
    scales = [field for field in fields(EnvArgs) if field.name in kwargs and field.name.startswith("randomize_")]
    return kwargs | {field.name: max(field.default, kwargs[field.name]) for field in scales}


def room(yaw_error: np.ndarray, tape_half_size: float) -> np.ndarray:
    """How far from the square's centre a sheet with this yaw error may lie and fit, m, (..., 2).

    The two bounds hold for the offsets along the square's sides, first along the side that the sheet's longer extent is
    parallel to: the sheet fits if neither is exceeded. A negative first one: it does not fit, however well centred.
    """
    cos, sin = np.cos(yaw_error), np.sin(yaw_error)  # yaw_error in [0, pi / 4]
    long, short = SHEET_HALF_SIZE
    return tape_half_size - np.stack([long * cos + short * sin, long * sin + short * cos], axis=-1)


class PaperSquareVectorEnv(VectorEnv):
    """Slide the sheet into the tape square, `num_envs` arms at once.

    ## Task
    A sheet of A6 card (148 x 105 mm, 5 g, 1 mm thick) lies on a table in front of an SO-101 arm; a square of red tape,
    160 x 160 mm inside, is centred at (0.19, 0.09) m. A fingertip pressed on the sheet drags it by friction. All four
    corners must lie inside the tape for 5 consecutive steps. Lengths in m, angles in rad, world frame: the arm's base
    at the origin, x forward, y left, z up, table at z = 0.

    ## Action space
    `Box(-1, 1, (6,), float32)`; larger values are clipped. `joint_target += act_scale * action`, clipped to the
    control range; the servos follow the target, interpolated linearly over the control ticks of one policy step.

    | index | joint         | range, rad     |
    |-------|---------------|----------------|
    | 0     | shoulder_pan  | -1.920 to 1.920 |
    | 1     | shoulder_lift | -1.745 to 1.745 |
    | 2     | elbow_flex    | -1.690 to 1.690 |
    | 3     | wrist_flex    | -1.658 to 1.658 |
    | 4     | wrist_roll    | -2.744 to 2.744 |
    | 5     | gripper       | -0.175 to 1.745 |

    ## Observation space
    `Box(-inf, inf, (32,), float32)`, at the slices `OBS[name]`: the value in the unit below, minus where it is zero,
    times a scale, so that every entry is of order one. `to_si(obs)` gives the values back.

    | rows  | name               | content                                  | unit  | zero at       | scale       |
    |-------|--------------------|------------------------------------------|-------|---------------|-------------|
    | 0-5   | joint_pos          | joint angles                             | rad   | home          | 3           |
    | 6-11  | joint_vel          | joint velocities                         | rad/s | 0             | 5           |
    | 12-17 | joint_target_error | joint target minus joint angle           | rad   | 0             | 200         |
    | 18-20 | sheet_pos          | centre of the sheet                      | m     | 0.19, 0, 0    | 10          |
    | 21-22 | sheet_yaw          | sine and cosine of the sheet's yaw       | -     | 0, 1          | 10          |
    | 23-24 | sheet_to_square    | sheet's centre to square's centre, xy    | m     | 0             | 30          |
    | 25-27 | fingertip_pos      | centre of the fixed fingertip            | m     | 0.19, 0, 0.01 | 10, 10, 100 |
    | 28-29 | fingertip_to_sheet | fixed fingertip to sheet's centre, xy    | m     | 0             | 30          |
    | 30    | tape_half_size     | half the inside width of the tape square | m     | 0.08          | 50          |
    | 31    | hold_counter       | steps in a row inside the tape           | steps | 0             | 0.5         |

    ## Rewards
    The sum of the terms; `info["reward/<term>"]` holds each, weighted and signed.

    | term        | default weight | formula                                                 |
    |-------------|----------------|---------------------------------------------------------|
    | success     | 10             | 1 on the step that ends the episode in success, else 0  |
    | distance    | -2             | distance from the sheet's centre to the square's, m     |
    | orientation | -0.1           | angle from the sheet's yaw to a multiple of 90 deg, rad |
    | time        | -0.01          | 1                                                       |
    | reach       | 0              | distance from the fixed fingertip to the sheet, m       |

    ## Starting state
    The arm at the keyframe `home`; the sheet at (0.19, -0.09) +- `randomize_xy`, yaw +- `randomize_yaw`; friction of
    the pair sheet-table and of the pairs fingertip-sheet times 1 +- `randomize_friction` (two draws), mass of the
    sheet times 1 +- `randomize_mass`, all uniform. Every episode draws the same numbers whatever the scales, so
    ablations of the randomisation are paired. `randomize=False` turns all of them off.

    ## Episode end
    Terminated on success, truncated after `max_episode_steps` (400 steps are 13.3 s). Truncated as well if the physics
    diverge (MuJoCo warns, or a number is not finite): the environment stays as it was before the step, and
    `info["physics_reset"]` says so.

    ## Arguments
    `num_envs`; `act_scale` (rad per step); `max_episode_steps`; `hold_steps`; `tape_half_size` (m; assign the attribute
    of that name to change it, from each environment's next episode on); the weights `success_weight`,
    `distance_weight`, `orientation_weight`, `time_weight`, `reach_weight`; `randomize` and its four scales;
    `physics_hz`, `control_hz`, `policy_hz` (each must divide the one before it); `num_threads` (0: all cores);
    `autoreset_mode` (`SAME_STEP`, `NEXT_STEP`, or `DISABLED` with `reset(options={"reset_mask": mask})`); `render_mode`
    (None, "rgb_array", "human": the first environment in MuJoCo's viewer), `camera` (top, side, wrist), `width`,
    `height`.

    Raises ValueError for arguments, seeds or actions that it cannot use.
    """

    # What observations hold, for whoever reads them: bases, evaluations, recordings
    OBS_ROWS, OBS, OBS_DIM, OBS_SCALE, to_si = OBS_ROWS, OBS, OBS_DIM, OBS_SCALE, staticmethod(to_si)

    # What no step changes, or what follows from the rest
    _FIXED = {"model", "batch", "spec", "autoreset_mode", "metadata", "key_callback", "_fingertip", "fingertip_force"}
    _FIXED |= {"single_action_space", "single_observation_space", "action_space", "observation_space"}
    _FIXED |= {"_renderer", "_viewer", "_close_renderer", "_close_viewer", "_scene", "_scene_data", "_next_frame"}
    _FIXED |= {"_arguments"}

    def __init__(
        self,
        num_envs: int = 1,
        *,
        act_scale: float = 0.02,
        max_episode_steps: int = 400,
        hold_steps: int = 5,
        tape_half_size: float = 0.08,
        success_weight: float = 10.0,
        distance_weight: float = -2.0,
        orientation_weight: float = -0.1,
        time_weight: float = -0.01,
        reach_weight: float = 0.0,
        randomize: bool = True,
        randomize_xy: float = 0.05,
        randomize_yaw: float = 0.3,
        randomize_friction: float = 0.2,
        randomize_mass: float = 0.1,
        physics_hz: int = 360,
        control_hz: int = 180,
        policy_hz: int = POLICY_HZ,
        num_threads: int = 0,
        autoreset_mode: AutoresetMode | str = AutoresetMode.SAME_STEP,
        render_mode: str | None = None,
        camera: str = "side",
        width: int = 640,
        height: int = 480,
    ):
        arguments = {name: value for name, value in locals().items() if name != "self"}
        EnvArgs(**{field.name: arguments[field.name] for field in fields(EnvArgs)})  # checks their limits
        for name in ("num_envs", "max_episode_steps", "hold_steps", "width", "height"):
            if not arguments[name] >= 1:
                raise ValueError(f"{name} must be at least 1, found {arguments[name]}")
        if min(physics_hz, control_hz, policy_hz) < 1 or physics_hz % control_hz or control_hz % policy_hz:
            raise ValueError(
                "each rate must divide the one before it, as in physics 360, control 180, policy 30 Hz; "
                f"found physics_hz={physics_hz}, control_hz={control_hz}, policy_hz={policy_hz}"
            )
        if render_mode not in (None, "rgb_array", "human"):
            raise ValueError(f"render_mode must be None, 'rgb_array' or 'human', found {render_mode!r}")
        self._arguments = arguments  # for copies
        self.num_envs = num_envs
        self.act_scale = act_scale
        self.max_episode_steps = max_episode_steps
        self.hold_steps = hold_steps
        self.tape_half_size = tape_half_size
        self.success_weight = success_weight
        self.distance_weight = distance_weight
        self.orientation_weight = orientation_weight
        self.time_weight = time_weight
        self.reach_weight = reach_weight
        self.randomize_scales = np.array(
            [randomize_xy, randomize_xy, randomize_yaw, randomize_friction, randomize_friction, randomize_mass]
        ) * float(randomize)
        self.control_ticks = control_hz // policy_hz
        self.physics_steps = physics_hz // control_hz
        self.autoreset_mode = AutoresetMode(autoreset_mode)
        self.render_mode, self.camera, self.width, self.height = render_mode, camera, width, height
        self.metadata = {
            "render_modes": ["rgb_array", "human"],
            "render_fps": policy_hz,
            "autoreset_mode": self.autoreset_mode,
        }
        self.single_action_space = gym.spaces.Box(-1.0, 1.0, (6,), np.float32)
        self.single_observation_space = gym.spaces.Box(-np.inf, np.inf, (OBS_DIM,), np.float32)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.observation_space = batch_space(self.single_observation_space, num_envs)

        # The physics: all simulations on a pool of threads, without what only a camera would see
        spec = mujoco.MjSpec.from_file(str(SCENE_PATH))
        spec.option.timestep = 1.0 / physics_hz
        spec.compiler.discardvisual = True
        for element in (*spec.cameras, *spec.lights):
            spec.delete(element)
        spec.memory = 2**19  # bytes for contacts, which take 27 kB; of the default, 15 MB, 2000 leave none to fork
        self.model = spec.compile()
        self.batch = Batch(self.model, num_envs, num_threads or available_cores(), persistent=True)
        self._block = 32 * self.batch.nthread  # environments stepped together, so few that the caches hold their data
        self.pair_friction = self.batch.expand("pair_friction")  # (num_envs, pairs, 5), drawn at every reset
        self._body_mass, self._body_inertia = self.batch.expand("body_mass"), self.batch.expand("body_inertia")
        self._sheet = self.model.body("sheet").id
        self.sheet_mass = self._body_mass[:, self._sheet]  # (num_envs,), kg, drawn at every reset
        self._sheet_pair = self.model.pair("sheet_table").id
        self._finger_pairs = [self.model.pair(f"{finger}_sheet").id for finger in FINGERTIPS]
        self.ctrl_low, self.ctrl_high = self.model.actuator_ctrlrange.T.copy()  # (6,), rad
        self._home_qpos, self._home_ctrl = self.model.key("home").qpos, self.model.key("home").ctrl

        # Live arrays over the simulations' states, current after every call
        self._qpos, self._qvel, self._ctrl = (self.batch.bind(name) for name in ("qpos", "qvel", "ctrl"))
        self._fingertip = self.batch.bind("site_xpos")[:, self.model.site(FINGERTIPS[0]).id]  # (num_envs, 3), m
        self.fingertip_force = self.batch.bind("sensordata")  # (num_envs, 2), N, along the normals, of FINGERTIPS

        self._rngs: list[np.random.Generator | None] = [None] * num_envs
        self.paused = np.zeros(num_envs, dtype=bool)  # set an entry, and that environment costs and does nothing
        self._joint_target = np.zeros((num_envs, 6))
        self._tape_half_size = np.zeros(num_envs)
        self._hold_counter = np.zeros(num_envs, dtype=np.int64)
        self._episode_steps = np.zeros(num_envs, dtype=np.int64)
        self._ended = np.zeros(num_envs, dtype=bool)  # of NEXT_STEP: what the coming step starts anew
        self._renderer = self._viewer = self._scene = self._scene_data = None
        self.key_callback = None  # called with the GLFW code of each key that is pressed in the viewer

    def __reduce__(self):
        attributes = {name: value for name, value in vars(self).items() if name not in self._FIXED}
        return remake, (type(self), self._arguments, attributes, np.array(self.batch.state))

    def reset(self, *, seed: int | Sequence | None = None, options: dict | None = None):
        """Start episodes; environment i is seeded with `seed + i`, or with `seed[i]`, which may be a SeedSequence.

        `options={"reset_mask": mask}` with a boolean array (num_envs,) resets only those environments;
        `options={"episode_steps": steps}` with integers (num_envs,) counts so many of their steps as taken already.
        Returns observations (num_envs, obs_dim) float32 and infos.
        """
        mask = (options or {}).get("reset_mask")
        mask = np.ones(self.num_envs, dtype=bool) if mask is None else np.asarray(mask)
        if mask.shape != (self.num_envs,) or mask.dtype != bool or not mask.any():
            raise ValueError(f"reset_mask must be a boolean array of shape ({self.num_envs},) with at least one True")
        if seed is None or isinstance(seed, (int, np.integer)):
            seed = [None if seed is None else int(seed) + i for i in range(self.num_envs)]
        if len(seed) != self.num_envs:
            raise ValueError(f"a list of seeds needs one per environment: expected {self.num_envs}, found {len(seed)}")
        taken = (options or {}).get("episode_steps")
        episode_steps = np.zeros(self.num_envs, dtype=np.int64) if taken is None else np.asarray(taken)
        whole = episode_steps.dtype.kind == "i" and episode_steps.shape == (self.num_envs,)
        if not (whole and (episode_steps >= 0).all() and (episode_steps < self.max_episode_steps).all()):
            raise ValueError(f"episode_steps must be {self.num_envs} integers from 0 to {self.max_episode_steps - 1}")
        for i in np.flatnonzero(mask):
            if seed[i] is not None or self._rngs[i] is None:
                self._rngs[i] = np.random.default_rng(seed[i])
        self._start_episodes(np.flatnonzero(mask))
        self._episode_steps[mask] = episode_steps[mask]
        self._ended[mask] = False
        long_axis, _ = self._sheet_axes()
        infos = self._state_info(long_axis)
        return self._observe(long_axis), {**infos, **{f"_{key}": mask.copy() for key in infos}}

    def step(self, actions: np.ndarray):
        """Advance every environment by one policy step.

        Takes actions (num_envs, 6) in [-1, 1]; returns observations, rewards, terminations, truncations, infos as
        Gymnasium defines them. With SAME_STEP an environment that ends is reset in the same step; its last observation
        and info are then in `infos["final_obs"]` and `infos["final_info"]`.
        """
        actions = np.asarray(actions, dtype=np.float64)
        if actions.shape != (self.num_envs, 6) or not np.isfinite(actions).all():
            raise ValueError(f"actions must be finite and of shape ({self.num_envs}, 6), found shape {actions.shape}")
        if None in self._rngs:
            raise gym.error.ResetNeeded("reset every environment before the first step")
        fresh = self._ended
        if fresh.any():  # of NEXT_STEP: their step is the reset
            self._start_episodes(np.flatnonzero(fresh))
            actions = np.where(fresh[:, None], 0.0, actions)
        previous = self._joint_target
        self._joint_target = np.clip(
            previous + self.act_scale * np.clip(actions, -1.0, 1.0), self.ctrl_low, self.ctrl_high
        )
        change = self._joint_target - previous
        before, ids = self.batch.state.copy(), np.flatnonzero(~self.paused & ~fresh)
        for start in range(0, len(ids), self._block):
            some = ids[start : start + self._block]
            for tick in range(1, self.control_ticks + 1):
                self._ctrl[some] = previous[some] + tick / self.control_ticks * change[some]
                stage = mujoco.mjtStage.mjSTAGE_VEL if tick == self.control_ticks else mujoco.mjtStage.mjSTAGE_NONE
                self.batch.step(some, self.physics_steps, stage.value)  # the last one brings the positions up to date
        self._episode_steps += ~fresh
        diverged = self.batch.warning[:, :, 1].any(axis=1) | ~np.isfinite(self.batch.state).all(axis=1)
        if diverged.any():
            self.batch.state[diverged] = before[diverged]
            self.batch.forward(np.flatnonzero(diverged), mujoco.mjtStage.mjSTAGE_VEL.value)

        axes = self._sheet_axes()
        inside = self._is_inside(*axes)
        self._hold_counter = np.where(inside & ~diverged & ~fresh, self._hold_counter + 1, 0)
        terminations = self._hold_counter >= self.hold_steps
        truncations = ~terminations & (diverged | (self._episode_steps >= self.max_episode_steps))
        infos = {**self._state_info(axes[0]), "physics_reset": diverged}
        terms = {name: np.where(fresh, 0.0, term) for name, term in self._reward_terms(infos).items()}
        rewards = np.sum(list(terms.values()), axis=0)
        infos |= {f"reward/{name}": value for name, value in terms.items()}
        observations = self._observe(axes[0])
        if self.render_mode == "human":
            self.render()

        done = terminations | truncations
        self._ended = done & (self.autoreset_mode == AutoresetMode.NEXT_STEP)
        if self.autoreset_mode == AutoresetMode.SAME_STEP and done.any():
            final_obs = np.full(self.num_envs, None, dtype=object)
            final_info = {key: np.where(done, value, np.zeros_like(value)) for key, value in infos.items()}
            for i in np.flatnonzero(done):
                final_obs[i] = observations[i]
            self._start_episodes(np.flatnonzero(done))
            long_axis, _ = self._sheet_axes()
            observations, fresh = self._observe(long_axis), self._state_info(long_axis)
            infos = {key: np.where(done, fresh.get(key, np.zeros_like(v)), v) for key, v in infos.items()}
            masks = {f"_{key}": np.ones_like(done) if key in fresh else ~done for key in infos}
            final_info |= {f"_{key}": done.copy() for key in final_info}
            infos |= {"final_obs": final_obs, "final_info": final_info, "_final_obs": done, "_final_info": done.copy()}
        else:
            masks = {f"_{key}": np.ones_like(done) for key in infos}
        return observations, rewards, terminations, truncations, {**infos, **masks}

    def state_dict(self) -> dict:
        """All that the coming steps depend on: every attribute that is not `_FIXED`, and the physics."""
        attributes = {name: value for name, value in vars(self).items() if name not in self._FIXED}
        return data_of({"attributes": attributes, "physics": np.asarray(self.batch.state)})

    def load_state_dict(self, state: dict) -> None:
        """Go on from what `state_dict` returned of as many environments with the same arguments, to the same bits.

        Raises KeyError, TypeError or ValueError for anything else.
        """
        self._rngs = [generator and np.random.default_rng() for generator in state["attributes"]["_rngs"]]
        for name, value in state["attributes"].items():
            setattr(self, name, restored(getattr(self, name), value, name))  # arrays in place: many look into the batch
        self._set_physics(state["physics"])

    def _set_physics(self, physics: np.ndarray) -> None:
        self.batch.set_const()  # what MuJoCo derives from the masses
        self.batch.state[:] = physics
        self.batch.forward(None, mujoco.mjtStage.mjSTAGE_VEL.value)

    def render(self) -> tuple[np.ndarray, ...] | None:
        """One image (height, width, 3) uint8 per environment; in mode "human", show the first one instead."""
        if self.render_mode == "human":
            return self._show()
        return tuple(self.render_frame(i) for i in range(self.num_envs))

    def render_frame(self, index: int = 0, camera: str | None = None) -> np.ndarray:
        """Environment `index` seen by `camera` (default: the constructor's), (height, width, 3) uint8."""
        if self._renderer is None:
            self._load_scene()
            self._renderer = make_renderer(self._scene, self.height, self.width)
            self._close_renderer = weakref.finalize(self, self._renderer.close)  # at exit, while its context is there
        self._pose_scene(index)
        self._renderer.update_scene(self._scene_data, camera or self.camera)
        return self._renderer.render()

    def _show(self) -> None:
        if self._viewer is None:
            if platform.system() == "Linux" and not has_display():
                raise RuntimeError("MuJoCo's viewer needs a display, and neither DISPLAY nor WAYLAND_DISPLAY is set")
            viewer = importlib.import_module("mujoco.viewer")
            self._load_scene()
            threads = set(threading.enumerate())
            hidden = {"show_left_ui": False, "show_right_ui": False}
            self._viewer = viewer.launch_passive(
                self._scene, self._scene_data, key_callback=self.key_callback, **hidden
            )
            threads = set(threading.enumerate()) - threads
            self._close_viewer = weakref.finalize(self, close_viewer, self._viewer, threads)
            self._next_frame = time.perf_counter()
        self._pose_scene(0)
        self._viewer.sync()
        self._next_frame = max(self._next_frame + 1.0 / self.metadata["render_fps"], time.perf_counter() - 1.0)
        time.sleep(max(0.0, self._next_frame - time.perf_counter()))  # real time

    @property
    def viewer_closed(self) -> bool:
        """Whether the viewer's window was there and is closed."""
        return self._viewer is not None and not self._viewer.is_running()

    def _load_scene(self) -> None:
        if self._scene is None:
            self._scene = mujoco.MjModel.from_xml_path(str(SCENE_PATH))
            self._scene_data = mujoco.MjData(self._scene)

    def _pose_scene(self, index: int) -> None:
        """Give the scene (the model with everything a camera sees) the state of one environment."""
        inner, outer = self._tape_half_size[index], self._tape_half_size[index] + TAPE_WIDTH
        middle = (inner + outer) / 2
        for name, x, y in (("front", 1, 0), ("back", -1, 0), ("left", 0, 1), ("right", 0, -1)):
            geom = self._scene.geom(f"tape_{name}")
            geom.pos[:2] = x * middle, y * middle
            geom.size[:2] = (TAPE_WIDTH / 2, outer) if x else (inner, TAPE_WIDTH / 2)
        self._scene_data.qpos[:] = self._qpos[index]
        mujoco.mj_forward(self._scene, self._scene_data)

    def close_extras(self, **kwargs) -> None:
        if self._renderer is not None:
            self._close_renderer()
        if self._viewer is not None:
            self._close_viewer()
        self._renderer = self._viewer = None

    def _start_episodes(self, ids: np.ndarray) -> None:
        """Draw new episodes for the environments `ids`."""
        draws = np.stack([self._rngs[i].uniform(-1.0, 1.0, 6) for i in ids]) * self.randomize_scales  # (ids, 6)
        xy, yaw, friction_table, friction_finger, mass = draws[:, :2], *draws[:, 2:].T
        nominal = self.model.pair_friction
        self.pair_friction[ids, self._sheet_pair] = nominal[self._sheet_pair] * (1.0 + friction_table)[:, None]
        for pair in self._finger_pairs:
            self.pair_friction[ids, pair] = nominal[pair] * (1.0 + friction_finger)[:, None]
        self._body_mass[ids, self._sheet] = self.model.body_mass[self._sheet] * (1.0 + mass)
        self._body_inertia[ids, self._sheet] = self.model.body_inertia[self._sheet] * (1.0 + mass)[:, None]
        self.batch.set_const(ids)  # what MuJoCo derives from the masses
        self.batch.reset(ids, stage=mujoco.mjtStage.mjSTAGE_NONE.value)
        self._qpos[ids] = self._home_qpos
        self._qpos[ids, 6:8] += xy
        self._qpos[ids, 9], self._qpos[ids, 12] = np.cos(yaw / 2.0), np.sin(yaw / 2.0)
        self._ctrl[ids] = self._joint_target[ids] = self._home_ctrl
        self.batch.forward(ids, mujoco.mjtStage.mjSTAGE_VEL.value)
        self._tape_half_size[ids] = self.tape_half_size
        self._hold_counter[ids] = self._episode_steps[ids] = 0

    def _sheet_axes(self) -> tuple[np.ndarray, np.ndarray]:
        """The sheet's long and short axis in the world, (num_envs, 3) each."""
        w, x, y, z = self._qpos[:, 9:13].T
        long_axis = np.stack([1 - 2 * (y * y + z * z), 2 * (x * y + w * z), 2 * (x * z - w * y)], axis=1)
        short_axis = np.stack([2 * (x * y - w * z), 1 - 2 * (x * x + z * z), 2 * (y * z + w * x)], axis=1)
        return long_axis, short_axis

    def _is_inside(self, long_axis: np.ndarray, short_axis: np.ndarray) -> np.ndarray:
        """Whether all four corners lie on the table inside the tape, (num_envs,) bool."""
        a, b = SHEET_HALF_SIZE[0] * long_axis, SHEET_HALF_SIZE[1] * short_axis
        corners = self._qpos[:, None, 6:9] + np.stack([a + b, a - b, -a + b, -a - b], axis=1)  # (num_envs, 4, 3)
        offset = np.abs(corners[:, :, :2] - SQUARE_POS).max(axis=(1, 2))
        return (offset <= self._tape_half_size) & (corners[:, :, 2].max(axis=1) < FLAT_HEIGHT)

    def _state_info(self, long_axis: np.ndarray) -> dict[str, np.ndarray]:
        yaw = np.arctan2(long_axis[:, 1], long_axis[:, 0])
        quarter = np.pi / 2
        return {
            "is_success": self._hold_counter >= self.hold_steps,
            "dist_to_goal": np.linalg.norm(self._qpos[:, 6:8] - SQUARE_POS, axis=1),
            "orientation_error": np.abs(yaw - quarter * np.round(yaw / quarter)),
        }

    def _reward_terms(self, infos: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {
            "success": self.success_weight * (self._hold_counter == self.hold_steps),  # once
            "distance": self.distance_weight * infos["dist_to_goal"],
            "orientation": self.orientation_weight * infos["orientation_error"],
            "time": np.full(self.num_envs, self.time_weight),
            "reach": self.reach_weight * np.linalg.norm(self._fingertip - self._qpos[:, 6:9], axis=1),
        }

    def _observe(self, long_axis: np.ndarray) -> np.ndarray:
        norm = np.maximum(np.hypot(long_axis[:, 0], long_axis[:, 1]), 1e-9)
        state = np.concatenate(
            [
                self._qpos[:, :6],
                self._qvel[:, :6],
                self._joint_target - self._qpos[:, :6],
                self._qpos[:, 6:9],
                long_axis[:, 1::-1] / norm[:, None],  # sine, cosine
                SQUARE_POS - self._qpos[:, 6:8],
                self._fingertip,
                self._qpos[:, 6:8] - self._fingertip[:, :2],
                self._tape_half_size[:, None],
                self._hold_counter[:, None],
            ],
            axis=1,
        )
        return ((state - OBS_ZERO) * OBS_SCALE).astype(np.float32)


class PaperSquareEnv(gym.Env):
    """One environment of `PaperSquareVectorEnv`, which documents it and its arguments."""

    metadata = {"render_modes": ["rgb_array", "human"], "render_fps": POLICY_HZ}

    def __init__(self, render_mode: str | None = None, num_threads: int = 1, **kwargs):
        kwargs |= {"render_mode": render_mode, "num_threads": num_threads, "autoreset_mode": AutoresetMode.DISABLED}
        self.envs = PaperSquareVectorEnv(1, **kwargs)
        self.render_mode = render_mode
        self.metadata = {**self.metadata, "render_fps": self.envs.metadata["render_fps"]}
        self.action_space = self.envs.single_action_space
        self.observation_space = self.envs.single_observation_space

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        """Start an episode; returns observation (obs_dim,) float32 and info."""
        super().reset(seed=seed)
        observations, infos = self.envs.reset(seed=[seed])
        return observations[0], self._first(infos)

    def step(self, action: np.ndarray):
        """Advance one policy step with action (6,) in [-1, 1]."""
        observations, rewards, terminations, truncations, infos = self.envs.step(np.asarray(action)[None])
        return observations[0], float(rewards[0]), bool(terminations[0]), bool(truncations[0]), self._first(infos)

    def render(self) -> np.ndarray | None:
        """The image (height, width, 3) uint8, or None in mode "human"."""
        frames = self.envs.render()
        return None if frames is None else frames[0]

    def close(self) -> None:
        self.envs.close()

    @staticmethod
    def _first(infos: dict) -> dict:
        return {key: value[0].item() for key, value in infos.items() if not key.startswith("_")}


def has_display() -> bool:
    return bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


def make_renderer(model: mujoco.MjModel, height: int, width: int) -> mujoco.Renderer:
    """An offscreen renderer; without a display and MUJOCO_GL, on whichever of EGL and OSMesa works here."""
    if platform.system() == "Linux" and not has_display() and not os.environ.get("MUJOCO_GL"):
        for backend in ("egl", "osmesa"):
            # In a process of its own: a backend that fails leaves PyOpenGL bound to it.
            probe = f"import mujoco.{backend} as gl; context = gl.GLContext(8, 8); context.make_current()"
            environment = {**os.environ, "MUJOCO_GL": backend, "PYOPENGL_PLATFORM": backend}
            if subprocess.run([sys.executable, "-c", probe], env=environment, capture_output=True).returncode == 0:
                break
        else:
            raise RuntimeError(
                "headless rendering needs EGL or OSMesa, and neither works here; on Debian or Ubuntu: "
                "apt-get install libegl1 libgl1-mesa-dri (or libosmesa6)"
            )
        os.environ["MUJOCO_GL"] = os.environ["PYOPENGL_PLATFORM"] = backend
        # mujoco chose its context class when it was imported
        importlib.import_module("mujoco.rendering.classic.gl_context").GLContext = importlib.import_module(
            f"mujoco.{backend}"
        ).GLContext
    return mujoco.Renderer(model, height, width)


def close_viewer(viewer, threads: set[threading.Thread]) -> None:
    viewer.close()
    for thread in threads:  # it still draws its last frame, and must not outlive the window
        thread.join(timeout=5.0)


def remake(kind: type, arguments: dict, attributes: dict, physics: np.ndarray) -> VectorEnv:
    """An environment as another was, for `copy` and `pickle`."""
    envs = kind.__new__(kind)
    PaperSquareVectorEnv.__init__(envs, **arguments)
    for name, value in attributes.items():
        if isinstance(getattr(envs, name, None), np.ndarray):  # it may look into the batch
            getattr(envs, name)[...] = value
        else:
            setattr(envs, name, value)
    envs._set_physics(physics)
    return envs


def make_single(**kwargs) -> "PaperSquareEnv":
    """What `gym.make` calls: its TimeLimit ends the episodes, after the registered number of steps or another one."""
    return PaperSquareEnv(max_episode_steps=2**31, **kwargs)


gym.register(
    "PaperSquare-v0",
    entry_point="env_paper_square:make_single",
    vector_entry_point="env_paper_square:PaperSquareVectorEnv",
    max_episode_steps=400,
)


if __name__ == "__main__":
    num_envs, num_steps = 64, 800
    envs = PaperSquareVectorEnv(num_envs)
    rng = np.random.default_rng(0)
    observations, infos = envs.reset(seed=0)
    print(f"PaperSquare-v0: observation {observations.shape}, action {envs.action_space.shape}")
    start, episodes, successes, return_sum = time.perf_counter(), 0, 0, 0.0
    moved = np.zeros(num_envs)
    for _ in range(num_steps):
        before = infos["dist_to_goal"]
        observations, rewards, terminations, truncations, infos = envs.step(rng.uniform(-1.0, 1.0, (num_envs, 6)))
        done = terminations | truncations
        moved[~done] += np.abs(infos["dist_to_goal"] - before)[~done]
        episodes, successes = episodes + done.sum(), successes + terminations.sum()
        return_sum += rewards.sum()
    seconds = time.perf_counter() - start
    print(f"random actions: {num_envs * num_steps} steps, {episodes} episodes ended, {successes} in success")
    print(f"mean return {return_sum / max(episodes, 1):.1f}; the sheets moved {1000 * moved.mean():.0f} mm each")
    simulations = [(envs.batch.get_model(i), envs.batch.get_data(i)) for i in range(num_envs)]
    start = time.perf_counter()
    for _ in range(20):  # the bound: from here on, one thread that only calls mj_step, times the cores
        for model, data in simulations:
            mujoco.mj_step(model, data, envs.control_ticks * envs.physics_steps)
    bound = available_cores() * 20 * num_envs / (time.perf_counter() - start)
    speed = num_envs * num_steps / seconds
    print(f"{speed:,.0f} steps/s, {speed / bound:.2f} of what the physics alone would take on all cores")
