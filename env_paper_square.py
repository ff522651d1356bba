"""Paper-in-Square: an SO-101 arm slides a sheet of A6 card into a square of red tape (MuJoCo, Gymnasium).

    python env_paper_square.py                      # self-test: random actions, prints what happened and steps/s
    gym.make("PaperSquare-v0")                      # after `import env_paper_square`
    gym.make_vec("PaperSquare-v0", num_envs=64, vectorization_mode="vector_entry_point")

`PaperSquareVectorEnv` holds the physics, the reward and the observation; `PaperSquareEnv` is one of its environments.
The environment knows nothing of base policies or residuals. `EnvArgs` are the flags that the training scripts inherit.
"""

import atexit
import importlib.util
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

from runs import Flags, Real, UserError, Whole, available_cores, data_of, restored

try:
    from mujoco.batch import Batch
except ImportError as error:
    raise ImportError(f"mujoco {mujoco.__version__} has no mujoco.batch, which came with 3.17: update it") from error

SCENE_PATH = Path(__file__).resolve().parent / "assets" / "paper_square.xml"
JOINTS = ("shoulder_pan", "shoulder_lift", "elbow_flex", "wrist_flex", "wrist_roll", "gripper")
FINGERTIPS = ("fixed_fingertip", "moving_fingertip")  # sites; the first is the one that is steered
CAMERAS = ("top", "side", "desk", "wrist")
PIXEL_ARGUMENTS = ("pixels", "pixel_size", "randomize_camera", "randomize_looks")  # of the environment: what it sees
SHEET_HALF_SIZE = np.array([0.074, 0.0525])  # A6, m
SHEET_THICKNESS = 0.001  # m
SQUARE_POS = np.array([0.19, 0.09])  # centre of the tape square, m
TAPE_WIDTH = 0.0125  # m
TAPE_SIDES = {"front": (1, 0), "back": (-1, 0), "left": (0, 1), "right": (0, -1)}  # where from the square's centre
PRINT_GROUP, MARKER_GROUP = 1, 4  # of the scene's geoms: what may be on the sheet
FLAT_HEIGHT = 0.01  # a corner higher than this is not on the table, m
POLICY_HZ = 30  # steps per second

# Servos as others measured or identified them, from the softest to the stiffest: assets/README.md has the sources
STIFFNESS = (14.0, 51.0)  # N.m/rad
SERVO_FRICTION = (0.05, 0.4)  # dry, N.m
FORCE_LIMIT = 5.0  # N, what a fingertip may press without losing reward
REACH_LIFTED, REACH_TILTED = 0.05, 10.0  # m and m/m, what a lifted fingertip and one higher than the other add to it
SHEET_LEVER = 0.1  # m, by which an error of the sheet's corners is one of its yaw
NOISE_STEPS = 400  # after which the noise of a longer episode repeats

# What is drawn for every episode: how many numbers, and the limits of their values; new ones go to the end
DRAWS = {
    "xy": (2, -1, 1),
    "yaw": (1, -6.2832, 6.2832),
    "friction": (2, 0.01, 100),
    "mass": (1, 0.01, 100),
    "stiffness": (6, 0.1, 1e4),
    "servo_friction": (6, 0, 2),
    "offset": (5, -0.2, 0.2),
    "delay": (1, 0, 30),
    "height": (1, -0.015, 0.015),
    "backlash": (1, 0, 0.1),
    "bias": (3, -0.5, 0.5),
    "lag": (1, 0, 30),
}
_ends = np.cumsum([size for size, *_ in DRAWS.values()]).tolist()
DRAWN_AT = {name: slice(end - size, end) for (name, (size, *_)), end in zip(DRAWS.items(), _ends, strict=True)}
NUM_DRAWS = _ends[-1]
OF_THE_SHEET = ("xy", "yaw", "friction", "mass")  # what --no-randomize-arm leaves

# name -> (SI value at which the entry is zero, scale): centred on the start and of order one, within -5 to 5
OBS_ROWS = {
    "joint_target": ([0.0, -0.14, 0.52, 1.19, 0.0, 0.3], [3.0] * 6),
    "last_action": ([0.0] * 6, [1.0] * 6),
    "sheet_pos": ([0.19, 0.0], [10.0] * 2),
    "sheet_yaw": ([0.0, 1.0], [5.0, 2.5]),
    "yaw_error": ([0.0, 1.0], [6.0, 2.5]),
    "sheet_to_square": ([0.0] * 2, [30.0] * 2),
    "fingertip_pos": ([0.19, 0.0, 0.01], [10.0, 10.0, 100.0]),
    "fingertip_to_sheet": ([0.0] * 2, [30.0] * 2),
    "tape_half_size": ([0.08], [50.0]),
    "hold_counter": ([0.0], [0.5]),
    "joint_measured": ([0.0, -0.14, 0.52, 1.19, 0.0, 0.3], [3.0] * 6),
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
    move_gripper: bool = True
    """let actions move the gripper too; off: it stays as far open as it is at the start"""
    tape_half_size: Real[0.001, 1] = 0.08
    """half the inside width of the tape square, m"""
    randomize: bool = True
    """randomise all that follows at every reset (evaluations always do)"""
    randomize_xy: Real[0, 1] = 0.05
    """largest offset of the sheet's start in x and y, m"""
    randomize_yaw: Real[0, 6.2832] = 0.3
    """largest yaw of the sheet's start, rad"""
    randomize_friction: Real[0, 0.99] = 0.2
    """largest relative change of the friction coefficients"""
    randomize_mass: Real[0, 0.99] = 0.1
    """largest relative change of the sheet's mass"""
    randomize_arm: bool = True
    """randomise all that follows, the arm and how it is seen, too; off: the nominal arm, prompt and exact"""
    randomize_stiffness: Real[0, 1] = 1.0
    """share of the range from 14 to 51 N.m/rad that the stiffness of each servo is drawn from; 0: as identified"""
    randomize_servo_friction: Real[0, 1] = 1.0
    """share of the range from 0.05 to 0.4 N.m that the dry friction of each servo is drawn from; 0: as identified"""
    randomize_offset: Real[0, 0.2] = 0.0175
    """largest error of a joint's zero, rad"""
    randomize_delay: Whole[0, 30] = 3
    """most policy steps by which actions reach the servos late"""
    randomize_height: Real[0, 0.015] = 0.002
    """largest error of the table's height under the arm, m"""
    randomize_backlash: Real[0, 0.1] = 0.0087
    """largest play of the gears, either way, rad"""
    randomize_bias: Real[0, 0.05] = 0.001
    """largest error, all episode long, of where the sheet is seen, m; of its yaw as if at a lever of 0.1 m"""
    randomize_noise: Real[0, 0.05] = 0.0003
    """standard deviation of where the sheet is seen at each step, m; of its yaw as if at a lever of 0.1 m"""
    randomize_lag: Whole[0, 30] = 3
    """most policy steps by which the sheet is seen late"""
    encoder_tick: Real[0, 0.1] = 0.001534
    """what the servos resolve of joint angles, a 4096th of a turn, rad; part of randomize_arm; 0: all"""
    observe_measured: bool = False
    """fill the rows joint_measured of the observation, which policies that LeRobot trained need; else they are 0"""
    success_weight: Real[-1e4, 1e4] = 10.0
    """reward, once, for a success"""
    distance_weight: Real[-1e4, 1e4] = -2.0
    """reward per m between the sheet's centre and the square's, each step"""
    orientation_weight: Real[-1e4, 1e4] = -1.0
    """reward per rad between the sheet's yaw and a multiple of 90 degrees, each step"""
    time_weight: Real[-1e4, 1e4] = -0.01
    """reward each step"""
    reach_weight: Real[-1e4, 1e4] = 0.0
    """reward per m of the reach, from the hand to the sheet, each step; negative draws it there, level and pressing"""
    force_weight: Real[-1e4, 1e4] = -0.003
    """reward per N by which a fingertip presses harder than 5 N, each step"""
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
    scales = [field for field in scales if field.name != "randomize_arm"]  # whether: it is another task
    return kwargs | {field.name: max(field.default, kwargs[field.name]) for field in scales}


def with_defaults(kwargs: dict) -> dict:
    """Constructor arguments of a recording, with flags that came later at what leaves the environment as it was."""
    return eval_kwargs(EnvArgs()) | kwargs


def nominal_arm() -> dict:
    """The constructor arguments that leave the arm nominal, one by one, as `randomize_arm=False` does all together."""
    arm = {f"randomize_{name}": 0 for name in (*DRAWS, "noise") if name not in OF_THE_SHEET}
    return {"randomize_arm": True, "encoder_tick": 0, **arm}


def half_extents(yaw: np.ndarray) -> np.ndarray:
    """Half of what a sheet with this yaw takes up along x and along y, m, (..., 2)."""
    cos, sin = np.abs(np.cos(yaw)), np.abs(np.sin(yaw))
    long, short = SHEET_HALF_SIZE
    return np.stack([long * cos + short * sin, long * sin + short * cos], axis=-1)


def room(yaw_error: np.ndarray, tape_half_size: float) -> np.ndarray:
    """How far from the square's centre a sheet with this yaw error may lie and fit, m, (..., 2).

    The two bounds hold for the offsets along the square's sides, first along the side that the sheet's longer extent is
    parallel to: the sheet fits if neither is exceeded. A negative first one: it does not fit, however well centred.
    """
    return tape_half_size - half_extents(yaw_error)


class ArmKinematics:
    """Position and Jacobian of the fixed fingertip for a batch of postures, from the model's own kinematic tree."""

    def __init__(self):
        model = mujoco.MjModel.from_xml_path(str(SCENE_PATH))
        bodies = [model.joint(name).bodyid[0] for name in JOINTS[:5]]  # a chain: each the parent of the next
        self.offsets = model.body_pos[bodies].copy()  # (5, 3), m, in the parent's frame
        rotations = np.zeros((5, 9))
        for rotation, body in zip(rotations, bodies, strict=True):
            mujoco.mju_quat2Mat(rotation, model.body_quat[body])
        self.rotations = rotations.reshape(5, 3, 3)
        self.fingertip = model.site(FINGERTIPS[0]).pos.copy()  # (3,), m, in the frame of the last body

    def __call__(self, joint_pos: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Joint angles (num_envs, >= 5), rad, to fingertip (num_envs, 3), m, and Jacobian (num_envs, 3, 5), m/rad."""
        num_envs = len(joint_pos)
        position, rotation = np.zeros((num_envs, 3)), np.broadcast_to(np.eye(3), (num_envs, 3, 3))
        cos, sin = np.cos(joint_pos), np.sin(joint_pos)
        anchors, axes = np.empty((num_envs, 5, 3)), np.empty((num_envs, 5, 3))
        for k in range(5):
            position = position + rotation @ self.offsets[k]
            x, y, z = np.moveaxis(rotation @ self.rotations[k], 2, 0)  # the frame's columns, (num_envs, 3) each
            c, s = cos[:, k, None], sin[:, k, None]
            rotation = np.stack([c * x + s * y, c * y - s * x, z], axis=2)  # turned about the local z axis
            anchors[:, k], axes[:, k] = position, z
        position = position + rotation @ self.fingertip
        jacobian = np.cross(axes, position[:, None] - anchors).swapaxes(1, 2)  # a hinge: axis x lever arm
        return position, jacobian


kinematics = ArmKinematics()


def is_inside(sheet_pose: np.ndarray, tape_half_size: np.ndarray) -> np.ndarray:
    """Whether all corners of a sheet with the pose (num_envs, 3), m, m, rad, lie inside the tape, (num_envs,) bool."""
    return (np.abs(sheet_pose[:, :2] - SQUARE_POS) + half_extents(sheet_pose[:, 2])).max(axis=1) <= tape_half_size


def quarter_turns(yaw: np.ndarray) -> np.ndarray:
    """How far a yaw is from the nearest quarter turn, rad, -pi / 4 to pi / 4."""
    return yaw - np.pi / 2 * np.round(yaw / (np.pi / 2))


def make_observation(
    joint_target: np.ndarray,
    last_action: np.ndarray,
    sheet_pose: np.ndarray,
    tape_half_size: np.ndarray,
    hold_counter: np.ndarray,
    joint_measured: np.ndarray | None = None,
) -> np.ndarray:
    """The observation, (num_envs, obs_dim) float32, of what is known of a simulated arm and of one on a desk alike.

    Args: `joint_target` (num_envs, 6), where the servos were sent last, rad; `last_action` (num_envs, 6), clipped;
    `sheet_pose` (num_envs, 3) as it is seen, x, y, yaw, m and rad; `tape_half_size` (num_envs,), m; `hold_counter`
    (num_envs,), how many times in a row the sheet was seen inside; `joint_measured` (num_envs, 6), rad, if known.
    """
    xy, yaw = sheet_pose[:, :2], sheet_pose[:, 2]
    yaw = yaw - np.pi * np.round(yaw / np.pi)  # after half a turn the sheet is the same
    fingertip, _ = kinematics(joint_target)
    if joint_measured is None:
        joint_measured = np.broadcast_to(OBS_ZERO[OBS["joint_measured"]], joint_target.shape)
    rows = {
        "joint_target": joint_target,
        "last_action": last_action,
        "sheet_pos": xy,
        "sheet_yaw": np.stack([np.sin(yaw), np.cos(yaw)], axis=1),
        "yaw_error": np.stack([quarter_turns(yaw), np.cos(4.0 * yaw)], axis=1),
        "sheet_to_square": SQUARE_POS - xy,
        "fingertip_pos": fingertip,
        "fingertip_to_sheet": xy - fingertip[:, :2],
        "tape_half_size": tape_half_size[:, None],
        "hold_counter": hold_counter[:, None],
        "joint_measured": joint_measured,
    }
    state = np.concatenate([rows[name] for name in OBS_ROWS], axis=1)
    return ((state - OBS_ZERO) * OBS_SCALE).astype(np.float32)


class PaperSquareVectorEnv(VectorEnv):
    """Slide the sheet into the tape square, `num_envs` arms at once.

    ## Task
    A sheet of A6 card (148 x 105 mm, 5 g, 1 mm thick) lies on a table in front of an SO-101 arm; a square of red tape,
    160 x 160 mm inside, is centred at (0.19, 0.09) m. A fingertip pressed on the sheet drags it by friction. All four
    corners must lie inside the tape for 5 consecutive steps. Lengths in m, angles in rad, world frame: the arm's base
    at the origin, x forward, y left, z up, table at z = 0.

    ## Action space
    `Box(-1, 1, (6,), float32)`; larger values are clipped, and the gripper's is 0 without `move_gripper`.
    `joint_target += act_scale * action`, clipped to the control range. The servos follow the target, interpolated
    linearly over the control ticks of one policy step, and of an episode's arm (see Starting state): late by its delay,
    in whole ticks of the encoder, off by the errors of the joints' zeros, and less the play of the gears.

    | index | joint         | range, rad     |
    |-------|---------------|----------------|
    | 0     | shoulder_pan  | -1.920 to 1.920 |
    | 1     | shoulder_lift | -1.745 to 1.745 |
    | 2     | elbow_flex    | -1.690 to 1.690 |
    | 3     | wrist_flex    | -1.658 to 1.658 |
    | 4     | wrist_roll    | -2.744 to 2.744 |
    | 5     | gripper       | -0.175 to 1.745 |

    ## Observation space
    `Box(-inf, inf, (33,), float32)`, at the slices `OBS[name]`: the value in the unit below, minus where it is zero,
    times a scale, so that every entry is of order one. `to_si(obs)` gives the values back. It is what is known of an
    arm on a desk, and `make_observation` makes it for either: where the joints were *sent*, and where the sheet is
    *seen*, which is late, biased and noisy. The rows joint_measured are at home unless `observe_measured`.

    | rows  | name               | content                                  | unit   | zero at       | scale       |
    |-------|--------------------|------------------------------------------|--------|---------------|-------------|
    | 0-5   | joint_target       | joint targets                            | rad    | home          | 3           |
    | 6-11  | last_action        | the action before, clipped               | -      | 0             | 1           |
    | 12-13 | sheet_pos          | centre of the sheet                      | m      | 0.19, 0       | 10          |
    | 14-15 | sheet_yaw          | sine and cosine of yaw, less half turns  | -      | 0, 1          | 5, 2.5      |
    | 16-17 | yaw_error          | yaw from a quarter turn, cosine of 4 yaw | rad, - | 0, 1          | 6, 2.5      |
    | 18-19 | sheet_to_square    | sheet's centre to square's centre, xy    | m      | 0             | 30          |
    | 20-22 | fingertip_pos      | fixed fingertip at the joint targets     | m      | 0.19, 0, 0.01 | 10, 10, 100 |
    | 23-24 | fingertip_to_sheet | from there to the sheet's centre, xy     | m      | 0             | 30          |
    | 25    | tape_half_size     | half the inside width of the tape square | m      | 0.08          | 50          |
    | 26    | hold_counter       | steps in a row that it was seen inside   | steps  | 0             | 0.5         |
    | 27-32 | joint_measured     | joint angles as the servos report them   | rad    | home          | 3           |

    ## Rewards
    The sum of the terms; `info["reward/<term>"]` holds each, weighted and signed.

    | term        | default weight | formula                                                 |
    |-------------|----------------|---------------------------------------------------------|
    | success     | 10             | 1 on the step that ends the episode in success, else 0  |
    | distance    | -2             | distance from the sheet's centre to the square's, m     |
    | orientation | -1             | angle from the sheet's yaw to a multiple of 90 deg, rad |
    | time        | -0.01          | 1                                                       |
    | reach       | 0              | from the hand to the sheet, m, as below                 |
    | force       | -0.003         | what the harder pressed fingertip has above 5 N, N      |

    The reach is the distance from the fixed fingertip to the sheet's centre, and 0.05 m for every fingertip that does
    not press, and 10 times by how much one fingertip is higher than the other.

    ## Starting state
    The arm at the keyframe `home`; the sheet at (0.19, -0.09). Every episode draws, uniformly but for the stiffness:

    | name           | what                                                     | default               |
    |----------------|----------------------------------------------------------|-----------------------|
    | xy, yaw        | pose of the sheet                                        | +-0.05 m, +-0.3 rad   |
    | friction       | friction under sheet and under fingertips, times nominal | 1 +- 0.2              |
    | mass           | mass of the sheet, times nominal                         | 1 +- 0.1              |
    | stiffness      | stiffness of each servo, uniform in its logarithm        | 14 to 51 N.m/rad      |
    | servo_friction | dry friction of each servo                               | 0.05 to 0.4 N.m       |
    | offset         | errors of the joints' zeros, but the gripper's           | +-0.0175 rad          |
    | delay          | of the actions                                           | 0 to 3 policy steps   |
    | height         | of the table under the arm                               | +-0.002 m             |
    | backlash       | play of the gears, either way                            | 0 to 0.0087 rad       |
    | bias           | error of where the sheet is seen: x, y, yaw              | +-0.001 m, +-0.01 rad |
    | lag            | of where the sheet is seen                               | 0 to 3 policy steps   |

    and where the sheet is seen is noisy at every step. Each has a scale, the argument `randomize_<name>`;
    `randomize=False` turns all of them off, `randomize_arm=False` all from the stiffness on and the encoder's ticks.
    Every episode draws the same numbers whatever the scales, so ablations are paired. `envs.drawn[name]` (num_envs,
    size) holds what was drawn, which no observation tells; `fixed={"delay": 2}` makes it so in all episodes.

    ## Episode end
    Terminated on success, truncated after `max_episode_steps` (400 steps are 13.3 s). Truncated as well if the physics
    diverge (MuJoCo warns, or a number is not finite): the environment stays as it was before the step, and
    `info["physics_reset"]` says so.

    ## Pixels
    With `pixels=("top", "side")`, some of top, side, desk and wrist, observations are dicts: "state" is all of the
    above, and by its name each camera's frames, (num_envs, pixel_size, pixel_size, 3) uint8, as late as the sheet's
    pose is. Every episode draws their looks (`pixels.LOOKS`): each camera is off by up to 2 mm and 1 degree along and
    about its axes, times `randomize_camera`; the light and the colours of table, sheet, arm and tape are any moderate
    ones, or nearer to the nominal ones by `randomize_looks` below 1. The rest of an episode is the same as without.

    ## Arguments
    `num_envs`; `max_episode_steps`; `hold_steps`; `fixed`; `physics_hz`, `control_hz`, `policy_hz` (each must divide
    the one before it); `autoreset_mode` (`SAME_STEP`, `NEXT_STEP`, or `DISABLED` with `reset(options={"reset_mask":
    mask})`); `render_mode` (None, "rgb_array", "human": the first environment in MuJoCo's viewer), `camera` (top, side,
    desk, wrist), `width`, `height`, `markers` (images show the sheet with those of docs/sheet.pdf instead of its
    print); `pixels`, `pixel_size`, `randomize_camera`, `randomize_looks` (see Pixels); and all of `EnvArgs`, by
    keyword. `envs.tape_half_size` may be assigned, and holds from each environment's next episode on.

    Raises ValueError for arguments, seeds or actions that it cannot use.
    """

    # What observations hold, for whoever reads them: bases, evaluations, recordings
    OBS_ROWS, OBS, OBS_DIM, OBS_SCALE, to_si = OBS_ROWS, OBS, OBS_DIM, OBS_SCALE, staticmethod(to_si)

    # What no step changes, or what follows from the rest
    _FIXED = {"model", "batch", "spec", "autoreset_mode", "metadata", "key_callback"}
    _FIXED |= {"_fingertip", "_moving_fingertip", "fingertip_force"}
    _FIXED |= {"single_action_space", "single_observation_space", "action_space", "observation_space"}
    _FIXED |= {"_renderer", "_viewer", "_close_renderer", "_close_viewer", "_scene", "_scene_data", "_next_frame"}
    _FIXED |= {"_eyes", "_close_eyes", "_arguments"}

    def __init__(
        self,
        num_envs: int = 1,
        *,
        max_episode_steps: int = 400,
        hold_steps: int = 5,
        fixed: dict | None = None,
        physics_hz: int = 360,
        control_hz: int = 180,
        policy_hz: int = POLICY_HZ,
        autoreset_mode: AutoresetMode | str = AutoresetMode.SAME_STEP,
        render_mode: str | None = None,
        camera: str = "side",
        width: int = 640,
        height: int = 480,
        markers: bool = False,
        pixels: Sequence[str] = (),
        pixel_size: int = 64,
        randomize_camera: float = 1.0,
        randomize_looks: float = 1.0,
        **flags,
    ):
        arguments = {name: value for name, value in locals().items() if name not in ("self", "flags", "__class__")}
        args = EnvArgs(**flags)  # checks their limits
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
        if not set(pixels) <= set(CAMERAS) or not 8 <= pixel_size <= 512:
            raise ValueError(
                f"pixels are of {', '.join(CAMERAS)}, 8 to 512 high, found pixels={pixels}, pixel_size={pixel_size}"
            )
        if not 0 <= randomize_camera <= 10 or not 0 <= randomize_looks <= 1:
            raise ValueError(
                "randomize_camera must be from 0 to 10 and randomize_looks from 0 to 1, "
                f"found {randomize_camera} and {randomize_looks}"
            )
        looks = importlib.import_module("pixels").LOOKS if pixels or set(fixed or ()) - set(DRAWS) else {}
        self.fixed = fixed or {}
        for name, value in self.fixed.items():
            _, low, high = (DRAWS | looks).get(name, (0, np.inf, -np.inf))
            whole = name not in ("delay", "lag") or np.all(np.mod(value, 1) == 0)
            if not (low <= np.min(value) and np.max(value) <= high and whole):
                raise ValueError(
                    f"fixed takes {name!r} from {low} to {high}, found {value}; it knows {', '.join(DRAWS | looks)}"
                )
        self._arguments = arguments | flags  # for copies
        self.num_envs, self.max_episode_steps, self.hold_steps = num_envs, max_episode_steps, hold_steps
        vars(self).update(vars(args))  # act_scale, tape_half_size, the weights and so on
        arm = args.randomize and args.randomize_arm
        self._scales = {
            name: getattr(args, f"randomize_{name}") * (args.randomize if name in OF_THE_SHEET else arm)
            for name in (*DRAWS, "noise")
        }
        self._scales |= {"camera": randomize_camera * arm, "looks": randomize_looks * arm}
        self.pixels, self.pixel_size = tuple(pixels), pixel_size
        self.encoder_tick = args.encoder_tick * arm
        self.control_ticks = control_hz // policy_hz
        self.physics_steps = physics_hz // control_hz
        self.autoreset_mode = AutoresetMode(autoreset_mode)
        self.render_mode, self.camera, self.width, self.height = render_mode, camera, width, height
        self.markers = markers
        self.metadata = {
            "render_modes": ["rgb_array", "human"],
            "render_fps": policy_hz,
            "autoreset_mode": self.autoreset_mode,
        }
        self.single_action_space = gym.spaces.Box(-1.0, 1.0, (6,), np.float32)
        self.single_observation_space = gym.spaces.Box(-np.inf, np.inf, (OBS_DIM,), np.float32)
        if pixels:
            frame = gym.spaces.Box(0, 255, (pixel_size, pixel_size, 3), np.uint8)
            spaces = {"state": self.single_observation_space, **dict.fromkeys(pixels, frame)}
            self.single_observation_space = gym.spaces.Dict(spaces)
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
        self.batch = Batch(self.model, num_envs, args.num_threads or available_cores(), persistent=True)
        self._block = 32 * self.batch.nthread  # environments stepped together, so few that the caches hold their data
        self.pair_friction = self.batch.expand("pair_friction")  # (num_envs, pairs, 5), drawn at every reset
        self._body_mass, self._body_inertia = self.batch.expand("body_mass"), self.batch.expand("body_inertia")
        self._sheet = self.model.body("sheet").id
        self.sheet_mass = self._body_mass[:, self._sheet]  # (num_envs,), kg, drawn at every reset
        self._sheet_pair = self.model.pair("sheet_table").id
        self._finger_pairs = [self.model.pair(f"{finger}_sheet").id for finger in FINGERTIPS]
        self.ctrl_low, self.ctrl_high = self.model.actuator_ctrlrange.T.copy()  # (6,), rad
        self._base = self.model.body("base").id
        self._body_pos, self._frictionloss = self.batch.expand("body_pos"), self.batch.expand("dof_frictionloss")
        self._gainprm, self._biasprm = self.batch.expand("actuator_gainprm"), self.batch.expand("actuator_biasprm")
        self._home_qpos, self._home_ctrl = self.model.key("home").qpos, self.model.key("home").ctrl

        # Live arrays over the simulations' states, current after every call
        self._qpos, self._qvel, self._ctrl = (self.batch.bind(name) for name in ("qpos", "qvel", "ctrl"))
        self._fingertip, self._moving_fingertip = (  # (num_envs, 3), m
            self.batch.bind("site_xpos")[:, self.model.site(name).id] for name in FINGERTIPS
        )
        self.fingertip_force = self.batch.bind("sensordata")  # (num_envs, 2), N, along the normals, of FINGERTIPS

        self._rngs: list[np.random.Generator | None] = [None] * num_envs
        self.paused = np.zeros(num_envs, dtype=bool)  # set an entry, and that environment costs and does nothing
        # Of each episode, SI
        self.drawn = {name: np.zeros((num_envs, size)) for name, (size, *_) in (DRAWS | looks).items()}
        self._noise = np.zeros((num_envs, NOISE_STEPS, 3), dtype=np.float32)  # standard normal
        self.joint_target, self._last_action = np.zeros((num_envs, 6)), np.zeros((num_envs, 6))
        steps = {
            name: 1 + int(np.max([self._scales[name], np.max(self.fixed.get(name, 0))])) for name in ("delay", "lag")
        }
        self._targets = np.zeros((num_envs, steps["delay"], 6))  # the last joint targets, newest first
        self._command = np.zeros((num_envs, 6))  # where the links are sent, rad
        self._poses = np.zeros((num_envs, steps["lag"], 3))  # the last poses of the sheet, newest first
        self._sights = np.zeros((num_envs, steps["lag"] if pixels else 0, self.model.nq))  # the last states
        self._tape_half_size = np.zeros(num_envs)
        self.hold_counter = np.zeros(num_envs, dtype=np.int64)
        self._seen_inside = np.zeros(num_envs, dtype=np.int64)  # as the hold counter, of the sheet as it is seen
        self._episode_steps = np.zeros(num_envs, dtype=np.int64)
        self._ended = np.zeros(num_envs, dtype=bool)  # of NEXT_STEP: what the coming step starts anew
        self._renderer = self._viewer = self._scene = self._scene_data = self._eyes = None
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
        infos = self._state_info()
        return self._observe(mask), {**infos, **{f"_{key}": mask.copy() for key in infos}}

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
        self._last_action = self.acting(actions)
        target = self.joint_target + self.act_scale * self._last_action
        self.joint_target = np.clip(target, self.ctrl_low, self.ctrl_high)
        previous = self._command
        self._targets, command = self._send(self.joint_target)
        self._command = np.where(fresh[:, None], previous, command)
        change = self._command - previous
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

        inside = is_inside(self.sheet_pose, self._tape_half_size) & self._is_flat()
        self.hold_counter = np.where(inside & ~diverged & ~fresh, self.hold_counter + 1, 0)
        self._see(~fresh)
        terminations = self.hold_counter >= self.hold_steps
        truncations = ~terminations & (diverged | (self._episode_steps >= self.max_episode_steps))
        infos = {**self._state_info(), "physics_reset": diverged}
        terms = {name: np.where(fresh, 0.0, term) for name, term in self._reward_terms(infos).items()}
        rewards = np.sum(list(terms.values()), axis=0)
        infos |= {f"reward/{name}": value for name, value in terms.items()}
        observations = self._observe(~self.paused)
        if self.render_mode == "human":
            self.render()

        done = terminations | truncations
        self._ended = done & (self.autoreset_mode == AutoresetMode.NEXT_STEP)
        if self.autoreset_mode == AutoresetMode.SAME_STEP and done.any():
            final_obs = np.full(self.num_envs, None, dtype=object)
            final_info = {key: np.where(done, value, np.zeros_like(value)) for key, value in infos.items()}
            for i in np.flatnonzero(done):
                final_obs[i] = rows_of(observations, i)
            self._start_episodes(np.flatnonzero(done))
            observations, fresh = self._observe(done), self._state_info()
            infos = {key: np.where(done, fresh.get(key, np.zeros_like(v)), v) for key, v in infos.items()}
            masks = {f"_{key}": np.ones_like(done) if key in fresh else ~done for key in infos}
            final_info |= {f"_{key}": done.copy() for key in final_info}
            infos |= {"final_obs": final_obs, "final_info": final_info, "_final_obs": done, "_final_info": done.copy()}
        else:
            masks = {f"_{key}": np.ones_like(done) for key in infos}
        return observations, rewards, terminations, truncations, {**infos, **masks}

    def acting(self, actions: np.ndarray) -> np.ndarray:
        """What acts of actions (..., 6): within -1 to 1, and nothing of the gripper's unless it may move."""
        return np.clip(actions, -1.0, 1.0) * [1, 1, 1, 1, 1, self.move_gripper]

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

    def render_frame(self, index: int = 0, camera: str | None = None, shadows: bool = True) -> np.ndarray:
        """Environment `index` seen by `camera` (default: the constructor's), (height, width, 3) uint8."""
        if self._renderer is None:
            self._load_scene()
            self._renderer = make_renderer(self._scene, self.height, self.width)
            self._close_renderer = finalizer(self, close_renderer, self._renderer)
        self._pose_scene(index)
        self._renderer.update_scene(self._scene_data, camera or self.camera, scene_option(self.markers))
        self._renderer.scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = shadows  # half the time of a frame without a GPU
        return self._renderer.render()

    def _show(self) -> None:
        if self._viewer is None:
            if platform.system() == "Linux" and not has_display():
                raise UserError("MuJoCo's viewer needs a display, and neither DISPLAY nor WAYLAND_DISPLAY is set")
            viewer = importlib.import_module("mujoco.viewer")
            self._load_scene()
            threads = set(threading.enumerate())
            hidden = {"show_left_ui": False, "show_right_ui": False}
            self._viewer = viewer.launch_passive(
                self._scene, self._scene_data, key_callback=self.key_callback, **hidden
            )
            threads = set(threading.enumerate()) - threads
            self._close_viewer = finalizer(self, close_viewer, self._viewer, threads)
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
        base_pos = self._body_pos[index, self._base]
        pose_scene(self._scene, self._scene_data, self._qpos[index], self._tape_half_size[index], base_pos)

    def close_extras(self, **kwargs) -> None:
        if self._renderer is not None:
            self._close_renderer()
        if self._viewer is not None:
            self._close_viewer()
        if self._eyes is not None:
            self._close_eyes()
        self._renderer = self._viewer = self._eyes = None

    def _draw(self, ids: np.ndarray) -> None:
        """Draw what differs from episode to episode for the environments `ids`, whose generators give the same numbers
        whatever the scales."""
        uniform = np.stack([self._rngs[i].uniform(-1.0, 1.0, NUM_DRAWS) for i in ids])
        self._noise[ids] = [self._rngs[i].standard_normal(self._noise.shape[1:], dtype=np.float32) for i in ids]
        unit = {name: uniform[:, part] for name, part in DRAWN_AT.items()}
        drawn = {name: self._scales[name] * values for name, values in unit.items()}
        drawn |= {name: 1.0 + drawn[name] for name in ("friction", "mass")}  # times nominal
        drawn |= {name: np.floor((unit[name] + 1) / 2 * (self._scales[name] + 1)) for name in ("delay", "lag")}
        drawn["backlash"] = self._scales["backlash"] * (unit["backlash"] + 1) / 2
        drawn["bias"] = drawn["bias"] / [1.0, 1.0, SHEET_LEVER]
        for name, (low, high), nominal in (
            ("stiffness", STIFFNESS, self.model.actuator_gainprm[:, 0]),
            ("servo_friction", SERVO_FRICTION, self.model.dof_frictionloss[:6]),
        ):
            anywhere = low * (high / low) ** ((unit[name] + 1) / 2)
            drawn[name] = nominal * (anywhere / nominal) ** self._scales[name]
        if self.pixels:  # from the bits of these numbers, so that an episode is the same with cameras and without
            seeds, scales = uniform.view(np.uint32), (self._scales["camera"], self._scales["looks"])
            drawn |= importlib.import_module("pixels").draw_looks(seeds, *scales)
        for name, values in drawn.items():
            self.drawn[name][ids] = self.fixed.get(name, values)

    def _start_episodes(self, ids: np.ndarray) -> None:
        """Begin new episodes in the environments `ids`."""
        self._draw(ids)
        drawn = {name: values[ids] for name, values in self.drawn.items()}
        nominal = self.model.pair_friction
        self.pair_friction[ids, self._sheet_pair] = nominal[self._sheet_pair] * drawn["friction"][:, :1]
        for pair in self._finger_pairs:
            self.pair_friction[ids, pair] = nominal[pair] * drawn["friction"][:, 1:]
        self._body_mass[ids, self._sheet] = self.model.body_mass[self._sheet] * drawn["mass"][:, 0]
        self._body_inertia[ids, self._sheet] = self.model.body_inertia[self._sheet] * drawn["mass"]
        stiffness = drawn["stiffness"] / self.model.actuator_gainprm[:, 0]  # times nominal; the damping goes with it
        self._gainprm[ids, :, 0] = drawn["stiffness"]
        self._biasprm[ids, :, 1:3] = self.model.actuator_biasprm[:, 1:3] * stiffness[:, :, None]
        self._frictionloss[ids, :6] = drawn["servo_friction"]
        self._body_pos[ids, self._base, 2] = self.model.body_pos[self._base, 2] - drawn["height"][:, 0]
        self.batch.set_const(ids)  # what MuJoCo derives from the masses
        self.batch.reset(ids, stage=mujoco.mjtStage.mjSTAGE_NONE.value)
        yaw = drawn["yaw"][:, 0]
        self._qpos[ids] = self._home_qpos
        self._qpos[ids, :5] += drawn["offset"]
        self._qpos[ids, 6:8] += drawn["xy"]
        self._qpos[ids, 9], self._qpos[ids, 12] = np.cos(yaw / 2.0), np.sin(yaw / 2.0)
        self._ctrl[ids] = self._command[ids] = self._qpos[ids, :6]
        self.joint_target[ids], self._last_action[ids] = self._home_ctrl, 0.0
        self._targets[ids] = self._home_ctrl
        self.batch.forward(ids, mujoco.mjtStage.mjSTAGE_VEL.value)
        self._poses[ids] = self.sheet_pose[ids, None]
        self._sights[ids] = self._qpos[ids, None]
        self._tape_half_size[ids] = self.tape_half_size
        self.hold_counter[ids] = self._seen_inside[ids] = self._episode_steps[ids] = 0

    def _send(self, joint_target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The last joint targets with this one, and what the links then get: late, in whole ticks, off by the joints'
        zeros, less the play."""
        targets = np.concatenate([joint_target[:, None], self._targets[:, :-1]], axis=1)
        wanted = self._in_ticks(targets[np.arange(self.num_envs), self.drawn["delay"][:, 0].astype(int)])
        wanted[:, :5] += self.drawn["offset"]
        play = self.drawn["backlash"]
        return targets, np.clip(self._command, wanted - play, wanted + play)

    def _in_ticks(self, angles: np.ndarray) -> np.ndarray:
        return np.floor(angles / self.encoder_tick) * self.encoder_tick if self.encoder_tick else angles.copy()

    def _see(self, stepped: np.ndarray) -> None:
        """Take in where the sheet is, for `seen_pose` to tell of it in time; count where, in the mask, it is inside."""
        self._poses = np.concatenate([self.sheet_pose[:, None], self._poses[:, :-1]], axis=1)
        if self.pixels:
            self._sights = np.concatenate([self._qpos[:, None], self._sights[:, :-1]], axis=1)
        seen = is_inside(self.seen_pose, self._tape_half_size)
        self._seen_inside = np.where(seen & stepped, self._seen_inside + 1, 0)

    @property
    def sheet_pose(self) -> np.ndarray:
        """Where the sheet is: x, y, yaw, (num_envs, 3), m and rad."""
        w, x, y, z = self._qpos[:, 9:13].T
        yaw = np.arctan2(2 * (x * y + w * z), 1 - 2 * (y * y + z * z))
        return np.concatenate([self._qpos[:, 6:8], yaw[:, None]], axis=1)

    @property
    def seen_pose(self) -> np.ndarray:
        """Where the sheet is seen, late and not quite there: x, y, yaw, (num_envs, 3), m and rad."""
        every = np.arange(self.num_envs)
        noise = self._noise[every, self._episode_steps % NOISE_STEPS] * (
            self._scales["noise"] / np.array([1.0, 1.0, SHEET_LEVER])
        )
        return self._poses[every, self.drawn["lag"][:, 0].astype(int)] + self.drawn["bias"] + noise

    @property
    def joint_measured(self) -> np.ndarray:
        """Joint angles as the servos report them, (num_envs, 6), rad: off by their zeros, in whole ticks."""
        angles = self._qpos[:, :6].copy()
        angles[:, :5] -= self.drawn["offset"]
        return self._in_ticks(angles)

    def _is_flat(self) -> np.ndarray:
        """Whether no corner of the sheet is off the table, (num_envs,) bool."""
        w, x, y, z = self._qpos[:, 9:13].T
        rise = SHEET_HALF_SIZE[0] * np.abs(2 * (x * z - w * y)) + SHEET_HALF_SIZE[1] * np.abs(2 * (y * z + w * x))
        return self._qpos[:, 8] + rise < FLAT_HEIGHT

    def _state_info(self) -> dict[str, np.ndarray]:
        pose = self.sheet_pose
        return {
            "is_success": self.hold_counter >= self.hold_steps,
            "dist_to_goal": np.linalg.norm(pose[:, :2] - SQUARE_POS, axis=1),
            "orientation_error": np.abs(quarter_turns(pose[:, 2])),
        }

    def _reward_terms(self, infos: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        reach = np.linalg.norm(self._fingertip - self._qpos[:, 6:9], axis=1)
        reach += REACH_LIFTED * (self.fingertip_force == 0.0).sum(axis=1)
        reach += REACH_TILTED * np.abs(self._fingertip[:, 2] - self._moving_fingertip[:, 2])
        return {
            "success": self.success_weight * (self.hold_counter == self.hold_steps),  # once
            "distance": self.distance_weight * infos["dist_to_goal"],
            "orientation": self.orientation_weight * infos["orientation_error"],
            "time": np.full(self.num_envs, self.time_weight),
            "reach": self.reach_weight * reach,
            "force": self.force_weight * np.maximum(self.fingertip_force.max(axis=1) - FORCE_LIMIT, 0.0),
        }

    def _observe(self, mask: np.ndarray | None = None) -> np.ndarray | dict[str, np.ndarray]:
        """The observations; cameras look anew at the environments of the mask (num_envs,) only."""
        known = self.joint_target, self._last_action, self.seen_pose, self._tape_half_size, self._seen_inside
        state = make_observation(*known, self.joint_measured if self.observe_measured else None)
        if not self.pixels:
            return state
        if self._eyes is None:
            make_eyes = importlib.import_module("pixels").Eyes
            self._eyes = make_eyes(self.num_envs, self.pixels, self.pixel_size, self.markers)
            self._close_eyes = finalizer(self, self._eyes.close)
            mask = None
        ids = np.arange(self.num_envs) if mask is None else np.flatnonzero(mask)
        seen = self._sights[np.arange(self.num_envs), self.drawn["lag"][:, 0].astype(int)]
        states = {"qpos": seen, "tape_half_size": self._tape_half_size, "base_pos": self._body_pos[:, self._base]}
        self._eyes.look(ids, states, self.drawn)
        return {"state": state, **{camera: frames.copy() for camera, frames in self._eyes.frames.items()}}


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
        return rows_of(observations, 0), self._first(infos)

    def step(self, action: np.ndarray):
        """Advance one policy step with action (6,) in [-1, 1]."""
        observations, rewards, terminations, truncations, infos = self.envs.step(np.asarray(action)[None])
        outcome = float(rewards[0]), bool(terminations[0]), bool(truncations[0])
        return rows_of(observations, 0), *outcome, self._first(infos)

    def render(self) -> np.ndarray | None:
        """The image (height, width, 3) uint8, or None in mode "human"."""
        frames = self.envs.render()
        return None if frames is None else frames[0]

    def close(self) -> None:
        self.envs.close()

    @staticmethod
    def _first(infos: dict) -> dict:
        return {key: value[0].item() for key, value in infos.items() if not key.startswith("_")}


def rows_of(observations: np.ndarray | dict[str, np.ndarray], which) -> np.ndarray | dict[str, np.ndarray]:
    """The observations of some environments, or of one, by index; of the state alone or with frames."""
    if isinstance(observations, dict):
        return {name: x[which] for name, x in observations.items()}
    return observations[which]


def state_of(observations: np.ndarray | dict[str, np.ndarray]) -> np.ndarray:
    """The observations without frames, (num_envs, obs_dim)."""
    return observations["state"] if isinstance(observations, dict) else observations


def stack_observations(observations: Sequence) -> np.ndarray | dict[str, np.ndarray]:
    """Observations of single environments as those of a batch."""
    if isinstance(observations[0], dict):
        return {name: np.stack([observation[name] for observation in observations]) for name in observations[0]}
    return np.stack(observations)


def has_display() -> bool:
    return bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


def make_renderer(model: mujoco.MjModel, height: int, width: int) -> mujoco.Renderer:
    """An offscreen renderer; without a display and MUJOCO_GL, on whichever of EGL and OSMesa works here."""
    # torch's CUDA build loads triton when it first wants it, and that crashes once Mesa's EGL is there
    if "torch" in sys.modules and importlib.util.find_spec("triton"):
        importlib.import_module("triton")
    if platform.system() == "Linux" and not has_display() and not os.environ.get("MUJOCO_GL"):
        for backend in ("egl", "osmesa"):
            # In a process of its own: a backend that fails leaves PyOpenGL bound to it.
            probe = f"import mujoco.{backend} as gl; context = gl.GLContext(8, 8); context.make_current()"
            environment = {**os.environ, "MUJOCO_GL": backend, "PYOPENGL_PLATFORM": backend}
            if subprocess.run([sys.executable, "-c", probe], env=environment, capture_output=True).returncode == 0:
                break
        else:
            raise UserError(
                "headless rendering needs EGL or OSMesa, and neither works here; on Debian or Ubuntu: "
                "apt-get install libegl1 libgl1-mesa-dri (or libosmesa6)"
            )
        os.environ["MUJOCO_GL"] = os.environ["PYOPENGL_PLATFORM"] = backend
        # mujoco chose its context class when it was imported
        importlib.import_module("mujoco.rendering.classic.gl_context").GLContext = importlib.import_module(
            f"mujoco.{backend}"
        ).GLContext
    return mujoco.Renderer(model, height, width)


def close_renderer(renderer: mujoco.Renderer) -> None:
    renderer.render()  # makes its context the current one: another's would lose what it draws with
    renderer.close()


def as_drawn(qpos: np.ndarray) -> np.ndarray:
    """The state (13,) that a picture of the state `qpos` (13,) is taken of: a sheet within 3 mm of lying flat does.

    In the physics its contact is so soft that the finger presses it into the table, by a millimetre at most, which
    would hide that part of it; a card on a desk stays in sight.
    """
    qpos = qpos.copy()
    w, x, y, z = qpos[9:13]
    rise = SHEET_HALF_SIZE @ np.abs([2 * (x * z - w * y), 2 * (y * z + w * x)])
    if qpos[8] + rise < 0.003:
        yaw = np.arctan2(2 * (x * y + w * z), 1 - 2 * (y * y + z * z))
        qpos[8:13] = SHEET_THICKNESS / 2, np.cos(yaw / 2), 0.0, 0.0, np.sin(yaw / 2)
    return qpos


def pose_scene(
    scene: mujoco.MjModel, data: mujoco.MjData, qpos: np.ndarray, tape_half_size: float, base_pos: np.ndarray
) -> None:
    """Give the scene, the model with everything that a camera sees, the state of one environment."""
    inner, outer = tape_half_size, tape_half_size + TAPE_WIDTH
    middle = (inner + outer) / 2
    sides = [mujoco.mj_name2id(scene, mujoco.mjtObj.mjOBJ_GEOM, f"tape_{side}") for side in TAPE_SIDES]
    scene.geom_pos[sides, :2] = middle * np.array(list(TAPE_SIDES.values()))
    scene.geom_size[sides, :2] = [(TAPE_WIDTH / 2, outer)] * 2 + [(inner, TAPE_WIDTH / 2)] * 2
    scene.body_pos[mujoco.mj_name2id(scene, mujoco.mjtObj.mjOBJ_BODY, "base")] = base_pos
    data.qpos[:] = as_drawn(qpos)
    mujoco.mj_kinematics(scene, data)
    mujoco.mj_camlight(scene, data)


def scene_option(markers: bool = False) -> mujoco.MjvOption:
    """What a renderer's `update_scene` takes to show the sheet with its print or, if `markers`, with those instead."""
    option = mujoco.MjvOption()
    option.geomgroup[[PRINT_GROUP, MARKER_GROUP]] = not markers, markers
    return option


def finalizer(envs: VectorEnv, *call) -> weakref.finalize:
    """Have a call made when the environments are gone, at exit at the latest, and before what was set up until now ends
    there: a renderer's context, the viewer's thread."""
    call = weakref.finalize(envs, *call)
    atexit.register(call)
    return call


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
