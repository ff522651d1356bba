"""Frozen base policies for the residual scripts: zero, Jacobian IK, hybrid, imitation-learned.

A base policy is called as `policy(obs) -> action`, with observations (num_envs, obs_dim) of `PaperSquareVectorEnv` and
actions (num_envs, 6) in [-1, 1]; `policy.reset(mask)` takes the boolean mask (num_envs,) of the environments that just
started an episode. `policy(obs, mask)` asks for the environments of the mask only, a row each.

`make_base(name, args, env)` builds one by name; `python eval.py --policy jacobian` plays one. A new one is a class, its
line in `BASES`, and its flags in `BaseFlags`, all in this file.
"""

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import mujoco
import numpy as np
import torch

from env_paper_square import JOINTS, PIXEL_ARGUMENTS, SCENE_PATH, PaperSquareVectorEnv, kinematics, rows_of, state_of
from runs import Flags, Real, UserError, check_rows, data_of, load_checkpoint, load_module, restored

CONTACT_HEIGHT = 0.009  # m, the fingertip's centre on the sheet: 1 mm of card and the fingertip's radius of 8 mm
ANGLE_WEIGHT = 0.05  # m per rad, of the fingers' pitch and heading against the fingertip's position
NOMINAL_WAY = 0.18  # m, from the sheet's nominal start to the square

# LeRobot's conventions for the SO-101: joints in degrees, the gripper in percent of its travel
_ctrlrange = mujoco.MjModel.from_xml_path(str(SCENE_PATH)).actuator_ctrlrange  # (6, 2), rad
LEROBOT_ZERO = np.array([0.0] * 5 + [_ctrlrange[5, 0]])  # rad
LEROBOT_SCALE = np.array([180.0 / np.pi] * 5 + [100.0 / (_ctrlrange[5, 1] - _ctrlrange[5, 0])])  # per rad


def joints_to_lerobot(joints: np.ndarray) -> np.ndarray:
    """Joint angles (..., 6), rad, as LeRobot has them: five in degrees, the gripper in percent of its travel."""
    return (joints - LEROBOT_ZERO) * LEROBOT_SCALE


def joints_to_rad(joints: np.ndarray) -> np.ndarray:
    """The inverse of `joints_to_lerobot`."""
    return joints / LEROBOT_SCALE + LEROBOT_ZERO


def env_state_rows(env: type) -> list[str]:
    """The rows of observation.environment_state: all that an environment observes but joints and last action."""
    return [name for name in env.OBS if not name.startswith("joint_") and name != "last_action"]


def to_lerobot(obs: np.ndarray, env: type, measured: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Observations (num, obs_dim) as an imitator sees them: state (num, 6), environment_state (num, 15), float32.

    The state, in LeRobot's units, is where the joints were sent or, if `measured`, where they are said to be; the
    environment state is what the observation holds of everything else, scaled as there, because LeRobot does not
    normalise it.
    """
    state = joints_to_lerobot(env.to_si(obs)[:, env.OBS["joint_measured" if measured else "joint_target"]])
    environment_state = np.concatenate([obs[:, env.OBS[name]] for name in env_state_rows(env)], axis=1)
    return state.astype(np.float32), environment_state.astype(np.float32)


def joint_targets(state: np.ndarray, env: type) -> np.ndarray:
    """Where the servos are sent, (num, 6), rad, from observations in SI units (num, obs_dim)."""
    return state[:, env.OBS["joint_target"]]


class BasePolicy:
    """What base policies have in common. `checkpoint` is what a residual's checkpoint must hold of one besides flags,
    `sees` the constructor arguments of the environment that give it the cameras that it looks through, if any.

    All its attributes are its state, for --resume.
    """

    checkpoint, sees = None, {}

    def reset(self, mask: np.ndarray) -> None:
        """Forget the episodes before; a policy of the observation alone has nothing to forget."""

    def state_dict(self) -> dict:
        return data_of(vars(self))

    def load_state_dict(self, state: dict) -> None:
        for name, value in state.items():
            setattr(self, name, restored(getattr(self, name), value, name))


class ZeroPolicy(BasePolicy):
    """Holds still: with it, a residual script is pure RL."""

    def __call__(self, obs: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
        return np.zeros((len(state_of(obs)), len(JOINTS)))


def damped_step(jacobian: np.ndarray, motion: np.ndarray, damping: float) -> np.ndarray:
    """Joint steps (num, 5), rad, for `motion` (num, 5): fingertip, m, the fingers' pitch and their heading, rad.

    Damped least squares, `damping` in m; jacobian (num, 3, 5), m/rad, as `kinematics` has it.
    """
    rows = np.zeros((len(motion), 5, 5))  # task by joint
    rows[:, :3] = jacobian
    rows[:, 3, 1:4] = ANGLE_WEIGHT
    rows[:, 4, [0, 4]] = ANGLE_WEIGHT, -ANGLE_WEIGHT  # fingers down, heading is shoulder_pan - wrist_roll
    error = motion * [1.0, 1.0, 1.0, ANGLE_WEIGHT, ANGLE_WEIGHT]
    columns = rows.swapaxes(1, 2)
    damped = rows @ columns + damping**2 * np.eye(5)
    return (columns @ np.linalg.solve(damped, error[:, :, None]))[:, :, 0]


class JacobianIKPolicy(BasePolicy):
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

    Args: `env` (the environment's class, whose observation it reads), `act_scale` (rad per step, as the environment's),
    `gain` (share of the error made good per step), `damping` (m), `speed_limit` (rad per step), `press_depth` (m),
    `hover_height` (m, of the fingertip's centre).
    """

    CENTRED_DISTANCE = 0.004  # m
    PRESS_RADIUS = 0.01  # m
    DRAG_RADIUS = 0.05  # m
    LOW_HEIGHT = CONTACT_HEIGHT + 0.0015  # m
    RELEASE_HEIGHT = CONTACT_HEIGHT + 0.0025  # m
    LEAD = 0.006  # m, how far ahead of the fingertip its target runs: height comes right before it gets there
    PITCH = np.pi / 2  # rad, straight down

    def __init__(
        self,
        env: type = PaperSquareVectorEnv,
        act_scale: float = 0.02,
        gain: float = 0.5,
        damping: float = 0.01,
        speed_limit: float = 0.01,
        press_depth: float = 0.004,
        hover_height: float = 0.025,
    ):
        self.env, self.act_scale, self.gain = env, act_scale, gain
        self.damping, self.speed_limit = damping, speed_limit
        self.press_height = CONTACT_HEIGHT - press_depth
        self.hover_height = hover_height

    def __call__(self, obs: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
        state = self.env.to_si(state_of(obs))  # (num_envs, obs_dim)
        joint_target = joint_targets(state, self.env)
        commanded, jacobian = kinematics(joint_target)
        pitch = joint_target[:, 1:4].sum(axis=1)  # rad, about three parallel axes

        error = np.zeros((len(state), 5))
        error[:, :3] = self.fingertip_target(state, commanded) - commanded
        error[:, 3] = self.PITCH - pitch
        step = self.gain * damped_step(jacobian, error, self.damping)  # (num_envs, 5), rad
        step *= np.minimum(1.0, self.speed_limit / np.maximum(np.abs(step).max(axis=1, keepdims=True), 1e-9))
        action = np.zeros((len(state), len(JOINTS)))
        action[:, :5] = step / self.act_scale
        return np.clip(action, -1.0, 1.0)

    def fingertip_target(self, state: np.ndarray, commanded: np.ndarray) -> np.ndarray:
        """The phases above; state (num_envs, obs_dim) and commanded fingertip (num_envs, 3) in SI units."""
        sheet, fingertip, to_square = (
            state[:, self.env.OBS[name]] for name in ("sheet_pos", "fingertip_pos", "sheet_to_square")
        )
        sheet = sheet[:, :2]
        offset = np.linalg.norm(fingertip[:, :2] - sheet, axis=1)
        low = fingertip[:, 2] < self.LOW_HEIGHT
        centred = np.linalg.norm(to_square, axis=1) < self.CENTRED_DISTANCE
        drag = ~centred & low & (offset < self.DRAG_RADIUS)
        press = ~centred & ~drag & (offset < self.PRESS_RADIUS)

        way = np.where(drag[:, None], to_square, sheet - commanded[:, :2]) * ~(centred & low)[:, None]
        way *= np.minimum(1.0, self.LEAD / np.maximum(np.linalg.norm(way, axis=1, keepdims=True), 1e-9))
        height = np.select([drag | press, centred], [self.press_height, self.RELEASE_HEIGHT], self.hover_height)
        return np.concatenate([commanded[:, :2] + way, height[:, None]], axis=1)


class FrozenILPolicy(BasePolicy):
    """An imitation-learned policy as a frozen base: of act.py, of diffusion_policy.py, or a LeRobot folder.

    From one observation the network predicts a chunk of absolute joint targets. Each environment has its own chunk and
    a pointer into it, and asks for the next one after `n_action_steps`, or when it starts an episode. A chunk is played
    as increments, from the joint target where it was asked for to its first, and on from one to the next: what a
    residual adds stays, where absolute targets would take it back one step later.

    With a `temporal_ensemble_coeff` m above zero, as ACT has it (arXiv 2304.13705), all environments ask at every step,
    and the target is the mean of all chunks' predictions for that step, weighted by exp(-m i), the oldest being i = 0.

    Args: `checkpoint`, what `load_il` returns; `env` (the environment's class, whose observation it reads); `act_scale`
    (rad per step, as the environment's); `device` of the network; `observe_measured`, as the environment's. Raises
    UserError if the parts do not fit, and, with a hint, if a LeRobot folder meets no lerobot: never a zero policy.
    """

    def __init__(
        self,
        checkpoint: dict,
        env: type = PaperSquareVectorEnv,
        act_scale: float = 0.02,
        device: torch.device | str = "cpu",
        observe_measured: bool = True,
    ):
        self.checkpoint, self.env, self.act_scale, self.device = checkpoint, env, act_scale, device
        if "env" in checkpoint:  # a LeRobot folder does not say
            check_rows(checkpoint["env"]["rows"], env)
        script = load_module(checkpoint["script"], "make_network")
        try:
            self.network = script.make_network(checkpoint).to(device)
        except KeyError as error:  # the state of a run, say
            raise UserError(f"this is not a policy's checkpoint of {checkpoint['script']}.py: no {error}") from error
        joints = getattr(self.network, "joints", "measured")  # LeRobot knows no other
        self.measured = checkpoint.get("args", {}).get("joints", joints) == "measured"
        self.n_action_steps, self.coeff = self.network.n_action_steps, self.network.temporal_ensemble_coeff
        self.cameras, self.sees = getattr(self.network, "cameras", ()), sight(checkpoint)  # none: the environment state
        if self.measured and not observe_measured:
            raise UserError("this base sees the joints as they are measured: add --observe-measured")
        self.pointer = np.zeros(0, dtype=np.int64)  # next step of the chunk; or how many chunks an ensemble has

    def reset(self, mask: np.ndarray) -> None:
        if len(mask) != len(self.pointer):
            chunks = self.network.chunk_size if self.coeff else 1  # (num_envs, chunks, chunk_size, 6), newest first
            self.chunks = np.zeros((len(mask), chunks, self.network.chunk_size, len(JOINTS)))
            self.pointer, mask = np.zeros(len(mask), dtype=np.int64), np.ones(len(mask), dtype=bool)
        self.pointer[mask] = 0 if self.coeff else self.n_action_steps  # none yet, or used up

    def __call__(self, obs: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
        state = state_of(obs)
        if state is obs and self.cameras:
            raise UserError("this base sees cameras, and the environment has none: ppo_residual.py gives it some")
        ids = np.arange(len(state)) if mask is None else np.flatnonzero(mask)
        if len(self.pointer) == 0:
            self.reset(np.ones(len(state) if mask is None else len(mask), dtype=bool))
        play = self.ensemble if self.coeff else self.play_chunk
        return np.clip(play(obs, ids, joint_targets(self.env.to_si(state), self.env)) / self.act_scale, -1.0, 1.0)

    def play_chunk(self, obs: np.ndarray, ids: np.ndarray, joint_target: np.ndarray) -> np.ndarray:
        """Increments (ids, 6), rad, by the chunks that the environments `ids` are in."""
        ask = self.pointer[ids] == self.n_action_steps
        if ask.any():
            targets = np.concatenate([joint_target[ask, None], self.predict(rows_of(obs, ask))], axis=1)
            self.chunks[ids[ask], 0] = np.diff(targets, axis=1)
            self.pointer[ids[ask]] = 0
        self.pointer[ids] += 1
        return self.chunks[ids, 0, self.pointer[ids] - 1]

    def ensemble(self, obs: np.ndarray, ids: np.ndarray, joint_target: np.ndarray) -> np.ndarray:
        """Increments (ids, 6), rad, to the weighted mean of what the last chunks have for this step."""
        self.chunks[ids] = np.concatenate([self.predict(obs)[:, None], self.chunks[ids, :-1]], axis=1)
        self.pointer[ids] = np.minimum(self.pointer[ids] + 1, self.chunks.shape[1])
        age = np.arange(self.chunks.shape[1])
        order = self.pointer[ids, None] - 1 - age  # (ids, chunks), 0 is the oldest
        weights = np.exp(-self.coeff * order.clip(0)) * (order >= 0)  # clipped, because exp of a large one is inf
        weights /= weights.sum(axis=1, keepdims=True)
        return np.einsum("nc,ncj->nj", weights, self.chunks[ids[:, None], age, age]) - joint_target

    def predict(self, obs: np.ndarray) -> np.ndarray:
        """Chunks of absolute joint targets (num, chunk_size, 6), rad, for observations (num, obs_dim)."""
        state, environment_state = to_lerobot(state_of(obs), self.env, self.measured)
        others = [obs[camera] for camera in self.cameras] if self.cameras else [environment_state]
        with torch.inference_mode():
            parts = [torch.from_numpy(part).to(self.device) for part in (state, *others)]
            chunk = self.network.predict(*parts)
        return joints_to_rad(chunk.cpu().numpy())


class HybridPolicy(BasePolicy):
    """Several bases as one, by weight.

    `blend`: the weighted mean of their actions. `switch`: they take turns along the sheet's way to the square, each for
    the share of the way that is its weight (weights 0.7 and 0.3: the first acts until 70 % of the nominal 0.18 m lie
    behind the sheet). Args: `policies`, `weights` (not negative, their sum positive; scaled to sum to one), `mode`,
    `env` (the environment's class). Raises UserError for weights that it cannot use.
    """

    def __init__(
        self,
        policies: Sequence,
        weights: Sequence[float],
        mode: Literal["blend", "switch"] = "blend",
        env: type = PaperSquareVectorEnv,
    ):
        if len(policies) != len(weights) or not len(policies):
            raise UserError(
                f"hybrid needs one weight per base, found {len(policies)} bases and {len(weights)} weights: "
                "see --hybrid-bases and --hybrid-weights"
            )
        if not (np.isfinite(weights).all() and min(weights) >= 0 and sum(weights) > 0):
            raise UserError(
                f"hybrid weights must not be negative and must not all be zero, found --hybrid-weights {list(weights)}"
            )
        self.policies, self.mode, self.env = list(policies), mode, env
        self.checkpoint = next(filter(None, (getattr(policy, "checkpoint", None) for policy in policies)), None)
        self.sees = next(filter(None, (getattr(policy, "sees", None) for policy in policies)), {})
        self.weights = np.asarray(weights, dtype=np.float64) / np.sum(weights)

    def __call__(self, obs: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
        actions = np.stack([policy(obs, mask) for policy in self.policies])  # (bases, num_envs, 6)
        if self.mode == "blend":
            return np.tensordot(self.weights, actions, axes=1)
        to_square = self.env.to_si(state_of(obs))[:, self.env.OBS["sheet_to_square"]]
        progress = 1.0 - np.linalg.norm(to_square, axis=1) / NOMINAL_WAY
        progress = np.clip(progress, 0.0, np.nextafter(1.0, 0.0))  # a base of weight 0 gets no turn
        turn = np.searchsorted(np.cumsum(self.weights)[:-1], progress, side="right")  # (num_envs,), index of the base
        return actions[turn, np.arange(len(turn))]

    def reset(self, mask: np.ndarray) -> None:
        for policy in self.policies:
            policy.reset(mask)


def load_il(path: str) -> dict:
    """What `FrozenILPolicy` needs, of a checkpoint of an imitation script, or a LeRobot folder.

    Raises UserError if there is none at `path`.
    """
    if not path:
        raise UserError(
            "base policy 'il' needs --il-checkpoint: a checkpoint of act.py or diffusion_policy.py, or a LeRobot folder"
        )
    if Path(path).is_dir():
        return importlib.import_module("lerobot_policy").read_folder(Path(path))
    return load_checkpoint(path)


def sight(checkpoint: dict) -> dict:
    """The constructor arguments of the environment that give an imitator its cameras, if it has any."""
    task = checkpoint.get("env", {}).get("kwargs", {})
    return {name: task[name] for name in PIXEL_ARGUMENTS if name in task}


def seen_by_base(args: "BaseArgs") -> dict:
    """As `BasePolicy.sees`, of the base that the flags ask for."""
    if args.base_policy != "il" and not (args.base_policy == "hybrid" and "il" in args.hybrid_bases):
        return {}
    return sight(load_il(args.il_checkpoint))


BASES = {  # by name, what builds it of the flags `args`, and of what `make_base` is given
    "zero": lambda args, **_: ZeroPolicy(),
    "jacobian": lambda args, env, act_scale, **_: JacobianIKPolicy(
        env, act_scale, args.ik_gain, args.ik_damping, args.ik_speed_limit, args.ik_press_depth, args.ik_hover_height
    ),
    "il": lambda args, env, act_scale, checkpoint, device: FrozenILPolicy(
        checkpoint or load_il(args.il_checkpoint), env, act_scale, device, getattr(args, "observe_measured", True)
    ),
    "hybrid": lambda args, env, **others: HybridPolicy(
        [BASES[name](args, env=env, **others) for name in args.hybrid_bases], args.hybrid_weights, args.hybrid_mode, env
    ),
}


@dataclass
class BaseFlags(Flags):
    ik_gain: Real[1e-3, 2] = 0.5  # beyond 2 the error grows
    """jacobian: share of the error made good per step"""
    ik_damping: Real[1e-4, 1] = 0.01  # 0 would divide by it where the arm is stretched
    """jacobian: damping of the least squares, m"""
    ik_speed_limit: Real[1e-6, 3.2] = 0.01
    """jacobian: largest joint step, rad"""
    ik_press_depth: Real[0, 0.1] = 0.004
    """jacobian: how far below contact the fingertip is sent, m"""
    ik_hover_height: Real[0, 0.4] = 0.025
    """jacobian: height of the fingertip's centre away from the sheet, m"""
    il_checkpoint: str = ""
    """il: checkpoint of act.py or diffusion_policy.py, or a LeRobot pretrained_model folder"""
    hybrid_bases: tuple[Literal[tuple(name for name in BASES if name != "hybrid")], ...] = ("jacobian", "zero")
    """hybrid: the bases to combine"""
    hybrid_weights: tuple[Real[0, 1e6], ...] = (0.5, 0.5)
    """hybrid: a weight for each base"""
    hybrid_mode: Literal["blend", "switch"] = "blend"
    """hybrid: mean of the actions, or one base after the other along the sheet's way"""


@dataclass
class BaseArgs(BaseFlags):
    base_policy: Literal[tuple(BASES)] = "jacobian"
    """frozen policy that the residual corrects"""


def make_base(
    name: str,
    args: BaseFlags,
    env: type = PaperSquareVectorEnv,
    act_scale: float = 0.02,
    checkpoint: dict | None = None,
    device: torch.device | str = "cpu",
):
    """Build the base policy `name`, one of `BASES`, from the flags `args`, for an environment's class or instance.

    `checkpoint` is the `checkpoint` of a policy that was built so before: with it, no other file is needed. `device` is
    where an imitation-learned base has its network. Raises UserError for flags that do not fit.
    """
    env = env if isinstance(env, type) else type(env.unwrapped)
    return BASES[name](args, env=env, act_scale=act_scale, checkpoint=checkpoint, device=device)
