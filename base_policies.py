"""Frozen base policies for the residual scripts: zero, Jacobian IK, hybrid, imitation-learned.

A base policy is called as `policy(obs) -> action`, with observations (num_envs, obs_dim) of `PaperSquareVectorEnv` and
actions (num_envs, 6) in [-1, 1]; `policy.reset(mask)` takes the boolean mask (num_envs,) of the environments that just
started an episode. `make_base_policy(name, ...)` builds one by name; `python eval.py --policy jacobian` plays one.
`BaseArgs` are the flags that the residual scripts inherit, `make_base(args)` builds what they ask for.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import mujoco
import numpy as np

from env_paper_square import FINGERTIPS, JOINTS, OBS, SCENE_PATH, to_si

BASE_POLICIES = ("zero", "jacobian", "hybrid", "il")
CONTACT_HEIGHT = 0.009  # m, the fingertip's centre on the sheet: 1 mm of card and the fingertip's radius of 8 mm
NOMINAL_WAY = 0.18  # m, from the sheet's nominal start to the square


@dataclass
class BaseArgs:
    base_policy: str = "jacobian"
    """frozen policy that the residual corrects: zero, jacobian, hybrid or il"""
    ik_gain: float = 0.5
    """jacobian: share of the error made good per step"""
    ik_damping: float = 0.01
    """jacobian: damping of the least squares, m"""
    ik_speed_limit: float = 0.01
    """jacobian: largest joint step, rad"""
    ik_press_depth: float = 0.0015
    """jacobian: how far below contact the fingertip is sent, m"""
    ik_hover_height: float = 0.025
    """jacobian: height of the fingertip's centre away from the sheet, m"""
    il_checkpoint: str = ""
    """il: file or folder of the imitation-learned policy"""
    hybrid_bases: tuple[str, ...] = ("jacobian", "zero")
    """hybrid: the bases to combine"""
    hybrid_weights: tuple[float, ...] = (0.5, 0.5)
    """hybrid: a weight for each base"""
    hybrid_mode: Literal["blend", "switch"] = "blend"
    """hybrid: mean of the actions, or one base after the other along the sheet's way"""


class ZeroPolicy:
    """Holds still: with it, a residual script is pure RL."""

    def __call__(self, obs: np.ndarray) -> np.ndarray:
        return np.zeros((len(obs), len(JOINTS)))

    def reset(self, mask: np.ndarray) -> None:
        pass


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


class JacobianIKPolicy:
    """Press-and-drag by damped least squares: steers where the sheet lies and has no notion of its yaw.

    The phase follows from the observation alone and sets the fingertip's target:

    | phase | when                                                             | target                         |
    |-------|------------------------------------------------------------------|--------------------------------|
    | lift  | the sheet is within `CENTRED_DISTANCE` of the square's centre    | up, and over the sheet's centre |
    | drag  | the fingertip is low, and within `DRAG_RADIUS` of sheet's centre | on, by the sheet's way, pressed |
    | press | the fingertip is within `PRESS_RADIUS` of the sheet's centre     | the sheet's centre, pressed     |
    | above | otherwise                                                        | hover at the sheet's centre     |

    A drag once begun is held on to over a wider radius than it takes to begin one (hysteresis). Five task rows for the
    five arm joints: the fingertip's position; the fingers' pitch, kept pointing down; their heading, kept from turning
    with the shoulder. The gripper stays as it is. Errors are taken at the joint targets, not at the joint angles, so
    `press_depth` below contact sets the force of the press and nothing winds up. A step faster than `speed_limit` is
    scaled as a whole: clipped joint by joint it would point elsewhere.

    Args: `act_scale` (rad per step, as the environment's), `gain` (share of the error made good per step), `damping`
    (m), `speed_limit` (rad per step), `press_depth` (m), `hover_height` (m, of the fingertip's centre).
    """

    CENTRED_DISTANCE = 0.004  # m
    PRESS_RADIUS = 0.01  # m
    DRAG_RADIUS = 0.05  # m
    LOW_HEIGHT = CONTACT_HEIGHT + 0.0015  # m
    RELEASE_HEIGHT = CONTACT_HEIGHT + 0.0025  # m
    LEAD = 0.006  # m, how far ahead of the fingertip its target runs: height comes right before it gets there
    PITCH = np.pi / 2  # rad, straight down
    ANGLE_WEIGHT = 0.05  # m per rad, of pitch and heading against position

    def __init__(
        self,
        act_scale: float = 0.02,
        gain: float = 0.5,
        damping: float = 0.01,
        speed_limit: float = 0.01,
        press_depth: float = 0.0015,
        hover_height: float = 0.025,
    ):
        self.act_scale, self.gain, self.damping, self.speed_limit = act_scale, gain, damping, speed_limit
        self.press_height = CONTACT_HEIGHT - press_depth
        self.hover_height = hover_height
        self.kinematics = ArmKinematics()

    def __call__(self, obs: np.ndarray) -> np.ndarray:
        state = to_si(obs)  # (num_envs, obs_dim), SI units
        joint_target = state[:, OBS["joint_pos"]] + state[:, OBS["joint_target_error"]]
        commanded, jacobian = self.kinematics(joint_target)
        pitch = joint_target[:, 1:4].sum(axis=1)  # rad, about three parallel axes

        error = np.zeros((len(obs), 5))
        error[:, :3] = self.fingertip_target(state, commanded) - commanded
        error[:, 3] = self.ANGLE_WEIGHT * (self.PITCH - pitch)
        rows = np.zeros((len(obs), 5, 5))  # task by joint
        rows[:, :3] = jacobian
        rows[:, 3, 1:4] = self.ANGLE_WEIGHT
        rows[:, 4, [0, 4]] = self.ANGLE_WEIGHT, -self.ANGLE_WEIGHT  # fingers down, heading is shoulder_pan - wrist_roll

        columns = rows.swapaxes(1, 2)
        damped = rows @ columns + self.damping**2 * np.eye(5)
        step = self.gain * (columns @ np.linalg.solve(damped, error[:, :, None]))[:, :, 0]  # (num_envs, 5), rad
        step *= np.minimum(1.0, self.speed_limit / np.maximum(np.abs(step).max(axis=1, keepdims=True), 1e-9))
        action = np.zeros((len(obs), len(JOINTS)))
        action[:, :5] = step / self.act_scale
        return np.clip(action, -1.0, 1.0)

    def fingertip_target(self, state: np.ndarray, commanded: np.ndarray) -> np.ndarray:
        """The phases above; state (num_envs, obs_dim) and commanded fingertip (num_envs, 3) in SI units."""
        sheet, fingertip = state[:, OBS["sheet_pos"]][:, :2], state[:, OBS["fingertip_pos"]]
        to_square = state[:, OBS["sheet_to_square"]]
        offset = np.linalg.norm(fingertip[:, :2] - sheet, axis=1)
        low = fingertip[:, 2] < self.LOW_HEIGHT
        centred = np.linalg.norm(to_square, axis=1) < self.CENTRED_DISTANCE
        drag = ~centred & low & (offset < self.DRAG_RADIUS)
        press = ~centred & ~drag & (offset < self.PRESS_RADIUS)

        way = np.where(drag[:, None], to_square, sheet - commanded[:, :2]) * ~(centred & low)[:, None]
        way *= np.minimum(1.0, self.LEAD / np.maximum(np.linalg.norm(way, axis=1, keepdims=True), 1e-9))
        height = np.select([drag | press, centred], [self.press_height, self.RELEASE_HEIGHT], self.hover_height)
        return np.concatenate([commanded[:, :2] + way, height[:, None]], axis=1)

    def reset(self, mask: np.ndarray) -> None:
        pass


class FrozenILPolicy:
    """An imitation-learned policy (ACT, diffusion, or a LeRobot folder) as a frozen base; not implemented yet.

    Args: `checkpoint`, the file or folder to load. Raises NotImplementedError: a base that cannot be loaded is an
    error, never a zero policy.
    """

    def __init__(self, checkpoint: str):
        raise NotImplementedError(
            f"base policy 'il' cannot be loaded yet (asked for checkpoint {checkpoint!r}): use zero, jacobian or hybrid"
        )

    def __call__(self, obs: np.ndarray) -> np.ndarray:
        raise NotImplementedError

    def reset(self, mask: np.ndarray) -> None:
        raise NotImplementedError


class HybridPolicy:
    """Several bases as one, by weight.

    `blend`: the weighted mean of their actions. `switch`: they take turns along the sheet's way to the square, each for
    the share of the way that is its weight (weights 0.7 and 0.3: the first acts until 70 % of the nominal 0.18 m lie
    behind the sheet). Args: `policies`, `weights` (not negative, their sum positive; scaled to sum to one), `mode`.
    Raises ValueError for weights or modes that it cannot use.
    """

    def __init__(self, policies: Sequence, weights: Sequence[float], mode: str = "blend"):
        if mode not in ("blend", "switch"):
            raise ValueError(f"hybrid mode must be 'blend' or 'switch', found {mode!r}")
        if len(policies) != len(weights) or not len(policies):
            raise ValueError(
                f"hybrid needs one weight per base, found {len(policies)} bases and {len(weights)} weights"
            )
        if not (np.isfinite(weights).all() and min(weights) >= 0 and sum(weights) > 0):
            raise ValueError(f"hybrid weights must not be negative and must not all be zero, found {list(weights)}")
        self.policies, self.mode = list(policies), mode
        self.weights = np.asarray(weights, dtype=np.float64) / np.sum(weights)

    def __call__(self, obs: np.ndarray) -> np.ndarray:
        actions = np.stack([policy(obs) for policy in self.policies])  # (bases, num_envs, 6)
        if self.mode == "blend":
            return np.tensordot(self.weights, actions, axes=1)
        to_square = to_si(obs)[:, OBS["sheet_to_square"]]
        progress = 1.0 - np.linalg.norm(to_square, axis=1) / NOMINAL_WAY
        progress = np.clip(progress, 0.0, np.nextafter(1.0, 0.0))  # a base of weight 0 gets no turn
        turn = np.searchsorted(np.cumsum(self.weights)[:-1], progress, side="right")  # (num_envs,), index of the base
        return actions[turn, np.arange(len(obs))]

    def reset(self, mask: np.ndarray) -> None:
        for policy in self.policies:
            policy.reset(mask)


def make_base_policy(
    name: str,
    *,
    il_checkpoint: str = "",
    hybrid_bases: Sequence[str] = ("jacobian", "zero"),
    hybrid_weights: Sequence[float] = (0.5, 0.5),
    hybrid_mode: str = "blend",
    **ik,
):
    """Build the base policy `name`, one of zero, jacobian, hybrid, il.

    `ik` goes to `JacobianIKPolicy` as it is (`act_scale`, `gain`, ...). Raises ValueError for an unknown name or
    arguments that do not fit, NotImplementedError for il.
    """
    if name == "zero":
        return ZeroPolicy()
    if name == "jacobian":
        return JacobianIKPolicy(**ik)
    if name == "il":
        return FrozenILPolicy(il_checkpoint)
    if name == "hybrid":
        if "hybrid" in hybrid_bases:
            raise ValueError("hybrid cannot be one of its own bases: choose from zero, jacobian, il")
        policies = [make_base_policy(base, il_checkpoint=il_checkpoint, **ik) for base in hybrid_bases]
        return HybridPolicy(policies, hybrid_weights, hybrid_mode)
    raise ValueError(f"unknown base policy {name!r}: choose from {', '.join(BASE_POLICIES)}")


def make_base(args: BaseArgs):
    """Build the base policy that the flags of a residual script ask for; raises as `make_base_policy`."""
    return make_base_policy(
        args.base_policy,
        il_checkpoint=args.il_checkpoint,
        hybrid_bases=args.hybrid_bases,
        hybrid_weights=args.hybrid_weights,
        hybrid_mode=args.hybrid_mode,
        act_scale=args.act_scale,
        gain=args.ik_gain,
        damping=args.ik_damping,
        speed_limit=args.ik_speed_limit,
        press_depth=args.ik_press_depth,
        hover_height=args.ik_hover_height,
    )
