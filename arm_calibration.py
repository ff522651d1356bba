"""Whether an SO-101's calibration can be trusted, and what is left of its errors, by touching the tape square.

    python arm_calibration.py check --id my_arm                   # LeRobot's calibration file: what is wrong with it
    python arm_calibration.py touch --robot so101 --port /dev/ttyACM0 --id my_arm       # 16 touches by hand: arm.json
    python arm_calibration.py touch                               # the same in simulation, with errors planted
    python arm_calibration.py touch --trials 100                  # how exactly a hundred simulated arms are found

With its torque off, the arm is moved by hand until the tip of the fixed finger, the gripper closed, stands on a corner
of the tape. One least-squares fit of all touches gives the errors of the joints' zeros, the height of the table and
where the tape square is. Touches cannot tell everything: see `fit_touches`. It was never run on hardware.
"""

import hashlib
import json
import os
from dataclasses import dataclass, replace
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Literal

import numpy as np
from scipy.optimize import least_squares

from base_policies import damped_step, joints_to_lerobot, joints_to_rad
from env_paper_square import JOINTS, SQUARE_POS, TAPE_WIDTH, EnvArgs, kinematics
from runs import Flags, Real, UserError, Whole, parse, write_json

# Degrees that a joint sweeps from stop to stop: mean of 16 public calibrations of the SO-101. Which differences are
# too many is our choice: half of what a sweep misses on one side is an error of the joint's zero, in its middle.
SWEEPS = {"shoulder_pan": 239.5, "shoulder_lift": 206.5, "elbow_flex": 195.2, "wrist_flex": 204.7, "gripper": 129.7}
SHORT, LONG, WRAPPED = -12.0, 20.0, 340.0  # degrees: from there, from there, at all
TICKS = 4096  # of a turn
ARM_JOINTS = JOINTS[:5]  # of which the gripper is not one

TIP_RADIUS = 0.008  # m, of the fingertip of the kinematics; another one on the arm shows as another table height
CORNERS = {
    "far left": (1, 1),
    "near left": (-1, 1),
    "near right": (-1, -1),
    "far right": (1, -1),
}  # of the tape's outer edge, as the arm sees them
POSTURES = [(tilt, turn) for tilt in ("upright", "slanted") for turn in ("left", "right")]
PITCHES = {"upright": 75, "slanted": 40}  # of the finger below the horizon, degrees, in the rehearsal; 90 is down
NEAR_PITCHES = {"upright": 95, "slanted": 140}  # at the corner next to the base, the tip pointing back at it
TURN = 75  # degrees of the wrist, in the rehearsal

# How far things are off before they are touched (one standard deviation), and how exactly a hand puts the tip
PRIOR_OFFSET = np.radians(3.0)  # rad, of joints' zeros
PRIOR_SQUARE = np.array([0.002, 0.002, np.radians(1.0)])  # m, m, rad, of the tape square, put down with a ruler
TOUCH_ERROR = np.array([0.0007, 0.0007, 0.0004])  # m: x, y on the corner, z on the table

# What `load_calibration` takes
LARGEST_OFFSET = np.radians(6.0)  # rad; of more, the arm wants a new calibration by LeRobot
LARGEST_HEIGHT = 0.015  # m
LARGEST_SQUARE = np.array([0.01, 0.01, np.radians(3.0)])  # m, m, rad, from where it should be
LARGEST_RESIDUAL = 0.003  # m
MAX_AGE = timedelta(days=30)


@dataclass
class Check(Flags):
    id: str
    """the arm's id, as LeRobot was told it"""


@dataclass
class Touch(Flags):
    robot: Literal["sim", "so101"] = "sim"
    """what is touched with: a simulated arm, whose errors are known, or an SO-101 by LeRobot's driver"""
    port: str = ""
    """of the SO-101: its serial port, as lerobot-find-port says"""
    id: str = ""
    """of the SO-101: its id, as LeRobot was told it"""
    output: str = "arm.json"
    """file to write"""
    trials: Whole[1, 1000] = 1
    """of the simulated arm: more than one prints how exactly so many of them are found, and writes nothing"""
    tape_half_size: Real[0.001, 1] = EnvArgs.tape_half_size
    """half the inside width of the tape square, m"""
    seed: Whole[0, 2**32 - 1] = 1
    """of the simulated arm: what its errors are drawn with"""
    sim_offset: Real[0, 0.1] = 0.035
    """of the simulated arm: largest error of a joint's zero, rad"""
    sim_height: Real[0, 0.015] = 0.003
    """of the simulated arm: largest error of the table's height, m"""
    sim_touch: Real[0, 0.01] = 0.0005
    """of the simulated arm: standard deviation of where the tip is put, m; of its height, half of that"""


@dataclass
class ArmCalibration:
    """What touches have told: `offsets` (5,), true minus reported joint angles, rad; `table_height`, m, where the table
    is in the arm's base frame; `square`, x, y, yaw of the tape square there, m and rad; when."""

    offsets: np.ndarray
    table_height: float
    square: np.ndarray
    created: datetime


# LeRobot's calibration file


def calibration_path(arm_id: str) -> Path:
    """Where LeRobot keeps the calibration of a follower arm."""
    cache = Path(os.environ.get("HF_HOME", Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "huggingface"))
    home = Path(os.environ.get("HF_LEROBOT_HOME", cache / "lerobot"))
    folder = Path(os.environ.get("HF_LEROBOT_CALIBRATION", home / "calibration"))
    return folder.expanduser() / "robots" / "so_follower" / f"{arm_id}.json"


def read_calibration(path: Path) -> dict:
    """LeRobot's calibration file, {joint: {id, drive_mode, homing_offset, range_min, range_max}}; raises UserError."""
    if not path.is_file():
        raise UserError(f"no calibration {path}: run lerobot-calibrate --robot.type=so101_follower, or look at the id")
    try:
        joints = json.loads(path.read_text())
        for name in JOINTS:
            for key in ("id", "drive_mode", "homing_offset", "range_min", "range_max"):
                joints[name][key] = int(joints[name][key])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not a calibration of LeRobot's: {type(error).__name__} {error}") from error
    return joints


def find_faults(calibration: dict) -> dict[str, list[str]]:
    """What is wrong with each joint of a calibration, in words: an empty list is well."""
    faults = {}
    for number, name in enumerate(JOINTS, start=1):
        joint, found = calibration[name], []
        sweep = (joint["range_max"] - joint["range_min"]) * 360 / (TICKS - 1)
        if joint["id"] != number:
            found.append(f"has the servo {joint['id']}, not {number}: the servos' ids or the cables are mixed up")
        if joint["drive_mode"]:
            found.append(f"drive_mode {joint['drive_mode']}, which the driver ignores: its sign is not what it says")
        if abs(joint["homing_offset"]) > 2047:
            found.append(f"homing_offset {joint['homing_offset']} beyond the servo's +-2047")
        if not 0 <= joint["range_min"] < joint["range_max"] < TICKS:
            found.append(f"range {joint['range_min']} to {joint['range_max']} is none within 0 to {TICKS - 1}")
        elif name == "wrist_roll":
            if sweep < 315:
                found.append(f"sweeps {sweep:.0f} degrees, less than the 320 of the model: short sweep")
        elif sweep > WRAPPED:
            found.append(
                f"sweeps {sweep:.0f} degrees: it wrapped, the arm was not in its middle pose when it was homed"
            )
        elif not SHORT < sweep - SWEEPS[name] < LONG:
            what = "short sweep, not from stop to stop" if sweep < SWEEPS[name] else "more than it can, wrong zero"
            found.append(f"sweeps {sweep:.0f} degrees, others {SWEEPS[name]:.0f}: {what}")
        faults[name] = found
    return faults


def check(args: Check) -> None:
    """Print what a calibration file says and what is wrong with it; raises UserError if anything is."""
    path = calibration_path(args.id)
    calibration = read_calibration(path)
    faults = find_faults(calibration)
    print(path)
    for name, found in faults.items():
        low, high = calibration[name]["range_min"], calibration[name]["range_max"]
        print(
            f"{name:<14} {low:5d} to {high:4d} {(high - low) * 360 / (TICKS - 1):6.1f} deg  {'; '.join(found) or 'ok'}"
        )
    print(
        "wrist_roll turns without stops: its zero is the pose it was held in when it was homed, which no file can tell"
    )
    if any(faults.values()):
        bad = ", ".join(name for name, found in faults.items() if found)
        raise UserError(f"{bad}: calibrate again, lerobot-calibrate --robot.type=so101_follower --robot.id={args.id}")


# Touches


def corner_places(square: np.ndarray, half: float) -> np.ndarray:
    """The outer corners (4, 2), m, of a tape square with this pose (3,)."""
    cos, sin = np.cos(square[2]), np.sin(square[2])
    return square[:2] + (half + TAPE_WIDTH) * np.array(list(CORNERS.values())) @ [[cos, sin], [-sin, cos]]


def fit_touches(joints: np.ndarray, corners: np.ndarray, half: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Offsets (5), table height and the square's pose (3), in one vector (9,); their standard deviations (9,), as the
    least squares have them; and how far each touch is from its corner then, (touches, 3), m.

    Args: reported joint angles (touches, >= 5), rad; which corner each has touched, (touches,); `half`, half the inside
    width of the tape, m.

    What touches cannot tell: shoulder_pan from a square that was put down turned about the base, so that half a degree
    of either remains, of no consequence, because it is one frame for arm and camera alike; and wrist_roll, by which the
    tip moves a mere 0.14 mm per degree. Both are held near zero, and their standard deviations say so.
    """
    nominal = np.array([*SQUARE_POS, 0.0])

    def distances(values: np.ndarray) -> np.ndarray:
        reached, _ = kinematics(joints[:, :5] + values[:5])
        wanted = corner_places(values[6:], half)[corners]
        return reached - np.column_stack([wanted, np.full(len(wanted), values[5] + TIP_RADIUS)])

    def residuals(values: np.ndarray) -> np.ndarray:
        touches = (distances(values) / TOUCH_ERROR).ravel()
        return np.concatenate([touches, values[:5] / PRIOR_OFFSET, (values[6:] - nominal) / PRIOR_SQUARE])

    start = np.concatenate([np.zeros(6), nominal])
    fit = least_squares(residuals, start, x_scale=np.array([0.02] * 5 + [0.002] * 3 + [0.02]))
    deviations = np.sqrt(np.diag(np.linalg.inv(fit.jac.T @ fit.jac)))
    return fit.x, deviations, distances(fit.x)


def posture(corner: np.ndarray, pitch: float, heading: float) -> np.ndarray:
    """Joint angles (5,), rad, with the tip over a point (3,), m, the finger at a pitch and turned to a heading, rad."""
    joints = np.array([[0.0, -0.14, 0.52, 1.19, 0.0]])
    for _ in range(60):
        reached, jacobian = kinematics(joints)
        error = [*(corner - reached[0]), pitch - joints[0, 1:4].sum(), heading - joints[0, 0] + joints[0, 4]]
        joints = joints + np.clip(damped_step(jacobian, np.array([error]), 0.001), -0.1, 0.1)
    return joints[0]


class TouchedArm:
    """An arm in the hands of somebody who touches corners with it; reports joints as LeRobot's driver does.

    What is wrong with it is drawn: `offsets` (5,), rad, `table_height`, m. The square is where it should be.
    """

    def __init__(self, args: Touch):
        self.rng = np.random.default_rng(args.seed)
        self.offsets = self.rng.uniform(-args.sim_offset, args.sim_offset, 5)
        self.table_height = self.rng.uniform(-args.sim_height, args.sim_height)
        self.places = corner_places(np.array([*SQUARE_POS, 0.0]), args.tape_half_size)
        self.touch_error = args.sim_touch * np.array([1.0, 1.0, 0.5])
        self.joints = np.zeros(6)

    def put(self, corner: int, tilt: str, turn: str) -> None:
        """Move it to a corner, by hand."""
        place = np.append(self.places[corner], self.table_height + TIP_RADIUS)
        pitches = NEAR_PITCHES if list(CORNERS)[corner] == "near right" else PITCHES
        heading = TURN if turn == "left" else -TURN
        place = place + self.touch_error * self.rng.normal(size=3)
        self.joints[:5] = posture(place, np.radians(pitches[tilt]), np.radians(heading))

    def get_observation(self) -> dict[str, float]:
        reported = joints_to_lerobot(self.joints - np.append(self.offsets, 0.0))
        reported[:5] = np.floor(reported[:5] * TICKS / 360) * 360 / TICKS
        return {f"{name}.pos": float(value) for name, value in zip(JOINTS, reported, strict=True)}

    def disconnect(self) -> None:
        """There is nothing to let go of."""


def connect_so101(args: Touch):
    """An SO-101 by LeRobot's driver, its torque off; raises UserError."""
    read_calibration(calibration_path(args.id))  # without one, LeRobot would make the folder for it
    try:
        from lerobot.robots.so_follower import SO101Follower, SO101FollowerConfig

        robot = SO101Follower(SO101FollowerConfig(port=args.port, id=args.id, use_degrees=True))
    except ImportError as error:
        raise UserError(f"--robot so101 needs LeRobot with its servo driver, lerobot[feetech]: {error}") from error
    try:
        robot.connect(calibrate=False)
    except (ConnectionError, RuntimeError) as error:  # no such port; a servo that does not answer
        raise UserError(f"no arm at --port {args.port!r}: {' '.join(str(error).split())}") from error
    if not robot.is_calibrated:
        robot.disconnect()
        raise UserError(f"the servos hold another calibration than the file of --id {args.id}: lerobot-calibrate")
    robot.bus.disable_torque()
    return robot


def steady_joints(robot) -> np.ndarray:
    """Reported joint angles (6,), rad, when two readings in a row agree: it stands still, and no reply was late."""
    last = np.full(6, np.inf)
    while True:
        observation = robot.get_observation()
        joints = joints_to_rad(np.array([observation[f"{joint}.pos"] for joint in JOINTS]))
        if np.abs(joints - last).max() < 0.005:
            return joints
        last = joints


def take_touches(robot, args: Touch) -> tuple[np.ndarray, np.ndarray]:
    """Have each corner touched in each posture; reported joint angles (16, 6), rad, and which corner, (16,)."""
    joints, corners = [], []
    for corner, name in enumerate(CORNERS):
        for tilt, turn in POSTURES:
            where = f"{len(joints) + 1:2d} of 16: outer corner {name}, finger {tilt}, wrist turned {turn}"
            while len(joints) == len(corners):
                if args.robot == "sim":
                    robot.put(corner, tilt, turn)
                else:
                    input(f"{where}; Enter when the tip of the fixed finger stands on it. ")
                try:
                    joints.append(steady_joints(robot))
                except ConnectionError as error:  # now and then a reply is lost, and 15 touches shall not be
                    print(f"no answer, once more: {error}")
            corners.append(corner)
    return np.array(joints), np.array(corners)


def touch(args: Touch) -> None:
    """Ask for all touches, fit them, print and write what they tell."""
    if args.robot == "so101":
        if any(find_faults(read_calibration(calibration_path(args.id))).values()):
            raise UserError(f"the calibration has faults: python arm_calibration.py check --id {args.id}")
        input("Its torque goes off: hold the arm, close its gripper, then press Enter. ")
    robot = TouchedArm(args) if args.robot == "sim" else connect_so101(args)
    try:
        joints, corners = take_touches(robot, args)
    finally:
        robot.disconnect()
    values, deviations, distances = fit_touches(joints, corners, args.tape_half_size)
    report(values, deviations, distances)
    if args.robot == "sim":
        *angles, height = planted_errors(values, robot)
        found = ", ".join(f"{name} {angle:+.2f}" for name, angle in zip(ARM_JOINTS, angles, strict=True))
        print(f"off what was planted: {found} deg, table {height:+.2f} mm")
    content = {
        "offsets": values[:5].tolist(),
        "table_height": float(values[5]),
        "camera": {"square": values[6:].tolist()},
        "deviations": deviations.tolist(),
        "residual": float(np.sqrt((distances**2).sum(axis=1).mean())),
        "robot": args.robot,
        "id": args.id,
        "lerobot": digest(args.id) if args.robot == "so101" else "",
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    as_calibration(content, args.output)  # what would be refused is not written
    write_json(Path(args.output), content)
    print(f"wrote {args.output}")


def planted_errors(values: np.ndarray, arm: TouchedArm) -> np.ndarray:
    """How far a fit is from what was planted: five joints, degrees, and the table, mm."""
    return np.append(np.degrees(values[:5] - arm.offsets), 1000 * (values[5] - arm.table_height))


def try_many(args: Touch) -> None:
    """Print how exactly arms with other errors are found."""
    errors = []
    for seed in range(args.seed, args.seed + args.trials):
        arm = TouchedArm(replace(args, seed=seed))
        values, _, _ = fit_touches(*take_touches(arm, args), args.tape_half_size)
        errors.append(np.abs(planted_errors(values, arm)))
    for name, column in zip((*ARM_JOINTS, "table height"), np.array(errors).T, strict=True):
        middle, high, worst = np.percentile(column, [50, 95, 100])
        unit = "mm" if name == "table height" else "deg"
        print(f"{name:<14} {middle:.2f} {unit} median, {high:.2f} 95 %, {worst:.2f} largest")


def report(values: np.ndarray, deviations: np.ndarray, distances: np.ndarray) -> None:
    """Print a fit; raises UserError if a touch is far from its corner."""
    print("what              value  +- deviation")
    for name, value, deviation in zip(ARM_JOINTS, np.degrees(values[:5]), np.degrees(deviations[:5]), strict=True):
        print(f"{name:<14} {value:+8.2f} {deviation:8.2f}   deg")
    print(f"{'table height':<14} {1000 * values[5]:+8.2f} {1000 * deviations[5]:8.2f}   mm")
    for name, value, deviation in zip(("square x", "square y"), values[6:8] - SQUARE_POS, deviations[6:8], strict=True):
        print(f"{name:<14} {1000 * value:+8.2f} {1000 * deviation:8.2f}   mm from where it should be")
    print(f"{'square yaw':<14} {np.degrees(values[8]):+8.2f} {np.degrees(deviations[8]):8.2f}   deg")
    off = np.linalg.norm(distances, axis=1)
    print(f"touches are {1000 * np.sqrt((off**2).mean()):.1f} mm off, the worst {1000 * off.max():.1f} mm")
    if off.max() > 2 * LARGEST_RESIDUAL:
        raise UserError(f"touch {off.argmax() + 1} is {1000 * off.max():.0f} mm off: another corner? Touch them again")


# arm.json


def digest(arm_id: str) -> str:
    """SHA-256 of LeRobot's calibration file of an arm."""
    return hashlib.sha256(calibration_path(arm_id).read_bytes()).hexdigest()


def as_calibration(content: dict, path: str | Path) -> ArmCalibration:
    """What arm.json holds, checked; raises UserError."""
    try:
        offsets, square = np.array(content["offsets"], dtype=float), np.array(content["camera"]["square"], dtype=float)
        height, residual = float(content["table_height"]), float(content["residual"])
        created = datetime.fromisoformat(content["created"])
        age = datetime.now(timezone.utc) - created
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is not what `arm_calibration.py touch` writes: {error!r}") from error
    again = "touch the corners again, python arm_calibration.py touch"
    if offsets.shape != (5,) or square.shape != (3,):
        raise UserError(
            f"{path} has {offsets.shape} offsets and a square of {square.shape}, not (5,) and (3,): {again}"
        )
    for name, offset in zip(ARM_JOINTS, offsets, strict=True):
        if not abs(offset) <= LARGEST_OFFSET:
            raise UserError(f"{path}: {name} is {np.degrees(offset):.1f} degrees off, more than 6: lerobot-calibrate")
    if not abs(height) <= LARGEST_HEIGHT:
        raise UserError(f"{path}: the table is at {1000 * height:.1f} mm, beyond +-15: put the arm on the table")
    if not (np.abs(square - [*SQUARE_POS, 0.0]) <= LARGEST_SQUARE).all():
        x, y, yaw = *(1000 * (square[:2] - SQUARE_POS)), np.degrees(square[2])
        off = f"{x:.0f} and {y:.0f} mm and {yaw:.1f} degrees"
        raise UserError(f"{path}: the tape square is {off} off, more than 10, 10 and 3: tape it anew")
    if not residual <= LARGEST_RESIDUAL:
        raise UserError(f"{path}: touches are {1000 * residual:.1f} mm off, more than 3: {again}")
    if not -timedelta(hours=1) <= age <= MAX_AGE:
        raise UserError(f"{path} is of {content['created']}, more than {MAX_AGE.days} days ago or to come: {again}")
    return ArmCalibration(offsets, height, square, created)


def load_calibration(path: str | Path, arm_id: str = "") -> ArmCalibration:
    """What `touch` has written; raises UserError if it is not there, out of range, or stale: older than 30 days, or, of
    the arm `arm_id`, from before LeRobot's calibration was changed."""
    try:
        content = json.loads(Path(path).read_text())
    except FileNotFoundError as error:
        raise UserError(f"no {path}: python arm_calibration.py touch writes it") from error
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    calibration = as_calibration(content, path)
    if arm_id and (content.get("id"), content.get("lerobot")) != (arm_id, digest(arm_id)):
        raise UserError(f"{path} is not of --id {arm_id} as LeRobot has calibrated it last: touch the corners again")
    return calibration


if __name__ == "__main__":
    args = parse(Check | Touch)
    if isinstance(args, Check):
        check(args)
    elif args.trials > 1:
        try_many(args)
    else:
        touch(args)
