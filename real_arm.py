"""Run a policy on an SO-101, at 30 Hz: on the simulated arm, or on one on a desk. It was never run on hardware.

    python real_arm.py --model-path runs/NAME/last.safetensors                     # rehearse, in real time
    python real_arm.py --clock virtual --sheet truth --episodes 100                # as fast as it can, with true poses
    python real_arm.py --robot so101 --port /dev/ttyACM0 --id mine --dry-run       # reads and prints, sends nothing
    python real_arm.py --robot so101 --port /dev/ttyACM0 --id mine --step          # Enter for each step
    python real_arm.py --robot so101 --port /dev/ttyACM0 --id mine --calibration-file arm.json

Any checkpoint that eval.py plays. The robots are of LeRobot's interface; `limited` is what stands between a policy and
the servos. Ctrl-C, an error, a closed window: the arm goes home slowly, then its torque is switched off.
docs/real_arm.md is the way from a boxed arm to the first push.
"""

import csv
import importlib
import re
import signal
import sys
import time
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro

from arm_calibration import TIP_RADIUS, load_calibration
from base_policies import joints_to_lerobot, joints_to_rad, to_lerobot
from env_paper_square import (
    DRAWS,
    JOINTS,
    OBS,
    OBS_ZERO,
    POLICY_HZ,
    SQUARE_POS,
    EnvArgs,
    is_inside,
    kinematics,
    quarter_turns,
)
from eval import APPROACH_STEPS, ARM_AXIS, TEST_SEED, classify_failures, format_table, load_policy, summarize
from figures import plot_results, plot_steps
from lerobot_dataset import Dataset, make_features
from runs import Flags, Real, UserError, Whole, new_run_dir, parse, write_json
from simulated_arm import SimulatedArm, TrueSheet

KEYS = [f"{joint}.pos" for joint in JOINTS]
COLUMNS = ["time", "doing", "reason", "episode", "step", *(f"target_{joint}" for joint in JOINTS)]  # s, rad
COLUMNS += [*(f"measured_{joint}" for joint in JOINTS), *(f"action_{joint}" for joint in JOINTS)]
COLUMNS += ["sheet_x", "sheet_y", "sheet_yaw", "sheet_age", "confidence", "hold_counter"]  # m, m, rad, s
HOME = OBS_ZERO[OBS["joint_target"]]  # (6,), rad
HOME_STEP = 0.01  # rad per step on the way home: 17 degrees per second
LIFT = 0.2  # rad of shoulder_lift by which the arm leaves the table before it goes home
CLEAR = 0.008  # m, of the fingertip's lowest point: it is not on the sheet
HOLD_STEPS = 8  # in a row that the sheet must be seen inside: the task's 5, and 3 by which it may be seen early
POSE_HOLD, POSE_STOP = 0.5, 2.0  # s, age of the sheet's pose
MISSES = 3  # reads or commands in a row that may not be lost

# What the servos report of themselves, and where it is too much: load in 0.1 % of the stall torque, currents in 6.5 mA
SERVO_LIMITS = {"Present_Load": 900, "Present_Current": 230, "Present_Temperature": 60}
LEROBOT_NEEDED = "--robot so101 needs LeRobot's driver beside this torch: see docs/real_arm.md, Install"


@dataclass
class Args(Flags):
    model_path: str = "assets/ppo_residual.safetensors"
    """checkpoint of the policy, which plays its mean action"""
    script: str = ""
    """play the checkpoint by this file, the source that a run keeps, instead of by the script beside real_arm.py"""
    base_only: bool = False
    """play the base policy of the checkpoint alone"""
    robot: Literal["sim", "so101"] = "sim"
    """the simulated arm, or a real one by LeRobot's SO101Follower"""
    port: str = ""
    """so101: its serial port, as lerobot-find-port says"""
    id: str = ""
    """so101: the name that it was calibrated by"""
    camera: str = "0"
    """so101: number or path of the camera that sees sheet and tape"""
    camera_arm: Literal["left", "right", "top", "bottom"] = "left"
    """where in the camera's picture the arm's base is, as seen from the tape square"""
    calibration_file: str = ""
    """what arm_calibration.py touch wrote: errors of the joints' zeros, height of the table"""
    sheet: Literal["camera", "truth"] = "camera"
    """where the sheet's pose comes from: camera frames, or of the simulated arm what its environment says"""
    markers: bool = True
    """the sheet has the markers of docs/sheet.pdf; off: it is blank or printed, and the camera goes by its outline"""
    dry_run: bool = False
    """read and print what the policy would do, and send nothing; a real arm stays limp"""
    step: bool = False
    """wait for Enter before every step"""
    episodes: Whole[1, 10**6] = 1
    """episodes to play"""
    seconds: Real[0.1, 600] = 13.3
    """longest episode, s"""
    limit_gap: Real[1, 45] = 8.0
    """largest distance from a measured joint to a target farther off, degrees; beyond, the arm holds"""
    limit_depth: Real[0, 0.02] = 0.005
    """how far below the table the fingertip's lowest point may be sent, m; beyond, the arm holds"""
    clock: Literal["real", "virtual"] = "real"
    """sim: real time, or a step for each action, as fast as it can"""
    render: bool = False
    """sim: show it in MuJoCo's viewer, in real time"""
    seed: Whole[0, 2**32 - 1] = TEST_SEED
    """sim: seed of the first episode, which draws the arm and the sheet; episode k has seed + k"""
    fixed: tyro.conf.UseAppendAction[tuple[tuple[Literal[tuple(DRAWS)], float], ...]] = ()
    """sim: one of the things that every episode draws, at a value (SI units, steps): --fixed delay 2 --fixed lag 2"""
    lost_reads: Real[0, 1] = 0.0
    """sim: probability that a read is lost"""
    freeze_after: Real[0, 1e9] = 1e9
    """sim: time of an episode after which the camera shows nothing new, s"""
    record: str = ""
    """folder of a LeRobotDataset that the episodes are written to"""
    append: bool = False
    """add to the dataset"""
    plot: bool = False
    """draw results.png, as eval.py does, and steps.png, of the last episode"""


class Stop(Exception):
    """Why no further command may be sent but those that bring the arm home."""


def limited(
    wanted: np.ndarray,
    last: np.ndarray,
    measured: np.ndarray,
    low: np.ndarray,
    high: np.ndarray,
    act_scale: float = EnvArgs.act_scale,
    gap: float = np.radians(Args.limit_gap),
    depth: float = Args.limit_depth,
    table_height: float = 0.0,
    misses: int = 0,
    pose_age: float = 0.0,
    trouble: str = "",
) -> tuple[np.ndarray, str]:
    """What is sent instead of the joint targets that a policy wants, and why, in this order:

    1. not finite: hold, which is to send the last targets again;
    2. farther from the last targets than `act_scale`: so far;
    3. outside `low` to `high`, of the model and of the calibration: at the bound, or, from outside, no farther out;
    4. a target more than `gap` from its measured joint, and farther than the last one: hold (a stalled arm presses no
       harder, and may still be let go);
    5. the fingertip's lowest point more than `depth` below the table, and lower than before: hold;
    6. a lost read or command, `misses` of them in a row: hold, or stop at the third;
    7. a sheet whose pose is older than 0.5 s: hold; than 2 s: stop;
    8. `trouble` that the servos report: stop.

    All angles (6,), rad; `gap` rad, `depth` and `table_height` m, `pose_age` s. Returns the targets (6,), and a word on
    why: "", "hold: ..." or "stop: ...". What holds or stops sends `last`, and a stop comes before a hold.
    """
    reasons = []
    if not np.isfinite(wanted).all():
        reasons.append("hold: the policy's action is not finite")
        wanted = last
    target = np.clip(wanted, last - act_scale, last + act_scale)
    target = np.clip(target, np.minimum(low, last), np.maximum(high, last))  # from outside, no jump
    far = np.abs(target - measured) > np.maximum(gap, np.abs(last - measured))
    if far.any():
        joint = int(np.argmax(far))
        degrees = np.degrees(abs(target[joint] - measured[joint]))
        reasons.append(f"hold: {JOINTS[joint]} would be sent {degrees:.0f} degrees from where it is")
    before, after = fingertip_bottom(last), fingertip_bottom(target)
    if after < min(table_height - depth, before):
        reasons.append(f"hold: the fingertip would be sent {1000 * (table_height - after):.0f} mm below the table")
    if misses:
        reasons.append(f"{'stop' if misses >= MISSES else 'hold'}: {misses} reads or commands in a row were lost")
    if pose_age > POSE_HOLD:
        reasons.append(f"{'stop' if pose_age > POSE_STOP else 'hold'}: the sheet was last seen {pose_age:.1f} s ago")
    if trouble:
        reasons.append(f"stop: {trouble}")
    stops = [reason for reason in reasons if reason.startswith("stop")]
    reason = (stops + reasons + [""])[0]
    return (last if reason else target), reason


def fingertip_bottom(joints: np.ndarray) -> float:
    """Height of the fixed fingertip's lowest point in a posture (6,), rad; m."""
    return float(kinematics(joints[None])[0][0, 2]) - TIP_RADIUS


class Servos:
    """What a real arm's servos report of themselves: one register of one servo at each call, all within 0.6 s.

    A synchronous read leaves out the byte that reports an overload, so these are single reads. Load and current must be
    too high twice in a row, because a start from rest takes all for a moment; a simulated arm reports nothing.
    """

    def __init__(self, bus):
        self.bus, self.calls, self.high = bus, 0, defaultdict(int)

    def look(self) -> str:
        """What is wrong with the next servo, or ""; a lost reply is not: the positions are read at every step."""
        if self.bus is None:
            return ""
        names, joints = list(SERVO_LIMITS), list(self.bus.motors)
        name, joint = names[self.calls // len(joints) % len(names)], joints[self.calls % len(joints)]
        self.calls += 1
        try:
            value = abs(self.bus.read(name, joint))
        except OSError:
            return ""
        except RuntimeError as error:  # its status byte is set
            return f"{joint} reports an error: {' '.join(str(error).split())}"
        self.high[name, joint] = self.high[name, joint] + 1 if value >= SERVO_LIMITS[name] else 0
        if self.high[name, joint] < (1 if name == "Present_Temperature" else 2):
            return ""
        return f"{joint} has {name.removeprefix('Present_').lower()} {value}, at most {SERVO_LIMITS[name]} is allowed"


class Arm:
    """A robot of LeRobot's interface, in radians and in the model's zeros, at 30 Hz, within the limits.

    Args: `robot`; `offsets` (5,), rad, true minus reported joint angles, as arm_calibration.py has them; `limits`, by
    name, of `limited`; `writer`, of the log's rows.
    """

    def __init__(self, robot, offsets: np.ndarray, limits: dict, writer: csv.DictWriter):
        self.robot, self.offsets, self.limits, self.writer = robot, np.append(offsets, 0.0), limits, writer
        self.servos = Servos(getattr(robot, "bus", None))
        self.now = getattr(robot, "now", time.perf_counter)
        self.real_time = getattr(robot, "real_time", True)
        self.measured, self.target, self.misses, self.error, self.closed = None, None, 0, None, False
        self.began, self.due, self.periods, self.missed, self.reasons = None, None, [], 0, []

    def read(self) -> dict:
        """Read the joints, `measured` (6,), rad, and return the observation; one that is lost is {}, and a miss."""
        try:
            observation = self.robot.get_observation()
        except OSError as error:  # LeRobot's are ConnectionErrors, a camera's too old frame is a TimeoutError
            self.misses, self.error = self.misses + 1, error
            return {}
        self.measured = joints_to_rad(np.array([observation[key] for key in KEYS])) + self.offsets
        self.misses = 0
        return observation

    def send(self, wanted: np.ndarray, pose_age: float = 0.0) -> str:
        """Send joint targets (6,), rad, as far as the limits allow; returns why no farther. Raises Stop."""
        known = {"misses": self.misses, "pose_age": pose_age, "trouble": self.servos.look()}
        target, reason = limited(wanted, self.target, self.measured, **self.limits, **known)
        if reason.startswith("stop"):
            raise Stop(reason.removeprefix("stop: ") + f" ({self.error})" * (self.misses >= MISSES))
        try:
            degrees = joints_to_lerobot(target - self.offsets)
            self.robot.send_action(dict(zip(KEYS, degrees.tolist(), strict=True)))
            self.target = target
        except OSError as error:
            self.misses, self.error = self.misses + 1, error
        return reason

    def start_clock(self) -> None:
        self.began = time.perf_counter()
        self.due = self.began + 1.0 / POLICY_HZ

    def end_step(self, doing: str, reason: str, **facts) -> None:
        """Log the step, show it, and wait for the next 30th of a second; one that has passed is a missed deadline.

        Raises KeyboardInterrupt where the viewer's window is closed.
        """
        row = {"time": round(self.now(), 4), "doing": doing, "reason": reason, **facts}
        for name, joints in (("target", self.target), ("measured", self.measured)):
            row |= {f"{name}_{joint}": round(x, 5) for joint, x in zip(JOINTS, joints.tolist(), strict=True)}
        self.writer.writerow(row)
        self.reasons.append(reason)
        if hasattr(self.robot, "show") and self.robot.show() and not self.closed:
            self.closed = True
            raise KeyboardInterrupt("the window was closed")
        if not self.real_time:
            return
        late = time.perf_counter() > self.due
        time.sleep(max(0.0, self.due - time.perf_counter()))
        now = time.perf_counter()
        self.periods.append(now - self.began)
        self.missed += late
        self.began, self.due = now, (now if late else self.due) + 1.0 / POLICY_HZ  # lost time is not caught up with

    def start(self) -> None:
        """Take where the joints are for their target. Raises UserError if they cannot be read."""
        while not self.read():
            if self.misses >= MISSES:
                raise UserError(f"the arm does not answer: {self.error}")
        self.target = self.measured.copy()

    def go_home(self) -> None:
        """Off the table, then to the posture home, slowly and within the limits. Raises Stop."""
        lifted = self.target - [0, LIFT, 0, 0, 0, 0]
        way = [lifted, HOME] if fingertip_bottom(self.target) < CLEAR else [HOME]
        held = 0
        self.start_clock()
        for goal in way:
            goal = np.clip(goal, self.limits["low"], self.limits["high"])
            while np.abs(goal - self.target).max() > 1e-6:
                self.read()
                reason = self.send(self.target + np.clip(goal - self.target, -HOME_STEP, HOME_STEP))
                self.end_step("home", reason)
                held = held + 1 if reason else 0
                if held > POSE_STOP * POLICY_HZ:
                    raise Stop(f"the arm does not get home: {reason.removeprefix('hold: ')}")


def make_so101(args: Args):
    """LeRobot's SO101Follower, not yet connected, and its joints' ranges (6,), rad; raises UserError."""
    try:
        from lerobot.cameras.opencv import OpenCVCameraConfig
        from lerobot.robots.so_follower import SO101Follower, SO101FollowerConfig
    except ImportError as error:
        raise UserError(f"{LEROBOT_NEEDED} ({error})") from error
    if args.sheet == "truth":
        raise UserError("--sheet truth is known of the simulated arm only: leave it out")
    if not args.port or not args.id:
        raise UserError("--robot so101 needs --port, which lerobot-find-port says, and the --id it was calibrated by")
    camera = int(args.camera) if args.camera.isdigit() else Path(args.camera)
    cameras = {"top": OpenCVCameraConfig(index_or_path=camera, fps=POLICY_HZ, width=640, height=480)}
    config = SO101FollowerConfig(port=args.port, id=args.id, use_degrees=True, cameras=cameras)
    config.num_read_retries = 0  # of LeRobot 0.6, each up to 0.1 s long; the loop holds and counts instead
    robot = SO101Follower(config)
    if not robot.calibration:
        raise UserError(f"{robot.calibration_fpath} is not there: calibrate by lerobot-calibrate --robot.id={args.id}")
    half = [(robot.calibration[joint].range_max - robot.calibration[joint].range_min) / 2 for joint in JOINTS[:5]]
    half = np.array(half) * 360 / 4095  # degrees
    low, high = joints_to_rad(np.append(-half, 0.0)), joints_to_rad(np.append(half, 100.0))
    return robot, low, high


def connect(robot, dry_run: bool) -> None:
    """Connect a robot, a real one without a question on the terminal and without a jump; raises UserError."""
    try:
        if not hasattr(robot, "bus"):
            return robot.connect()
        robot.bus.connect()
        if not robot.is_calibrated:
            raise UserError(
                f"the servos hold another calibration than {robot.calibration_fpath}: run lerobot-calibrate"
            )
        if dry_run:
            robot.configure = lambda: None  # which turns the torque on
        else:  # or it would come on with the targets of the last time
            robot.bus.sync_write("Goal_Position", robot.bus.sync_read("Present_Position"))
        robot.bus.disconnect(disable_torque=False)
        robot.connect(calibrate=False)
    except (OSError, RuntimeError) as error:
        raise UserError(f"cannot connect to the arm: {' '.join(str(error).split())}") from error


def disconnect(robot) -> None:
    """Switch the torque off, and let go of the arm; raises UserError if it may be on still."""
    if not hasattr(robot, "bus"):
        return robot.disconnect()
    unknown = []
    for joint in robot.bus.motors if robot.bus.is_connected else ():
        try:  # one by one: the driver's own way ends at the first that reports an overload
            robot.bus.disable_torque(joint, num_retry=20)
        except RuntimeError:
            pass  # it has answered: it is off, and not well
        except Exception as error:  # a pulled plug raises whatever the operating system has
            unknown.append(f"{joint}: {' '.join(str(error).split())}")
    for part in (robot.bus, *robot.cameras.values()):
        if part.is_connected:
            part.disconnect(disable_torque=False) if part is robot.bus else part.disconnect()
    if unknown:
        raise UserError(f"the torque may still be on, switch the arm's power off: {'; '.join(unknown)}")


def make_sheet(args: Args, robot, tape_half_size: float):
    """What tells where the sheet is: it has `update(frame, time)` and `last`. Raises UserError."""
    if args.sheet == "truth":
        return TrueSheet(robot)
    try:
        return importlib.import_module("sheet_camera").SheetCamera(tape_half_size, args.markers, args.camera_arm)
    except ImportError as error:
        raise UserError(f"--sheet camera needs OpenCV: pip install opencv-python-headless ({error})") from error


def watch(arm: Arm, sheet, frame: np.ndarray | None) -> np.ndarray | None:
    """Read the joints, and let `sheet` see the camera's frame if it is not `frame`, the one before; returns it."""
    observation = arm.read()
    new = observation.get(next(iter(arm.robot.cameras), ""), frame)
    if observation and (new is None or new is not frame):
        sheet.update(new, arm.now())
    return new


def wait_for_sheet(arm: Arm, sheet) -> np.ndarray | None:
    """Hold until the sheet is seen; returns the last frame. Raises Stop after 2 s."""
    began, frame = arm.now(), None
    arm.start_clock()
    while arm.now() - began <= POSE_STOP:
        frame = watch(arm, sheet, frame)
        if not arm.misses and sheet.last is not None and sheet.last.time >= began - POSE_HOLD:
            return frame
        arm.end_step("wait", arm.send(arm.target))
    raise Stop("the sheet is not seen: is it in the camera's picture, with the tape, and is there light?")


def play_episode(arm: Arm, policy, observe, acting, sheet, tape_half_size: float, number: int, args: Args) -> dict:
    """Play until the sheet was seen inside for 8 steps in a row, `args.seconds` are over, or the arm must stop.

    `observe(target, last_action, pose, hold_counter, measured)` makes the observation (1, obs_dim), `acting(action)` is
    what acts of an action (6,). Returns "poses" (steps + 1, 3), true ones of the simulated arm; "solved", by its
    environment or, on a real one, as "seen_solved" is; "stopped", the reason or ""; and of each step "frames" of a
    dataset, "forces", N, and "norms" of the residual.
    """
    poses, frames, forces, norms = [], [], [], []
    simulated, solved, stopped, counter, last_action = hasattr(arm.robot, "moment"), False, "", 0, np.zeros(6)
    policy.reset(np.ones(1, dtype=bool))
    try:
        frame, step = wait_for_sheet(arm, sheet), 0
        while True:
            sight = sheet.last
            age = arm.now() - sight.time
            known = not arm.misses and age <= POSE_HOLD
            if step:
                counter = counter + 1 if known and is_inside(sight.pose[None], tape_half_size)[0] else 0
            poses.append(arm.robot.moment.sheet_pose if simulated else sight.pose)
            solved |= arm.robot.moment.solved if simulated else counter >= HOLD_STEPS
            if counter >= HOLD_STEPS or step >= args.seconds * POLICY_HZ:
                break
            if args.step:
                input(f"step {step}, sheet {describe_pose(sight.pose)}; Enter: go on, Ctrl-C: home ")
                arm.start_clock()
            obs = observe(arm.target, last_action, sight.pose, counter, arm.measured)
            action, wanted = np.zeros(6), arm.target
            if known:
                action = acting(policy(obs)[0])
                wanted = arm.target + arm.limits["act_scale"] * action
            measured = arm.measured
            reason = arm.send(wanted, age)
            last_action = np.zeros(6) if reason else action
            frames.append((obs[0], measured, arm.target))
            forces.append(arm.robot.moment.force if simulated else 0.0)
            norms.append(np.linalg.norm(getattr(policy, "residual_action", 0.0)))
            facts = {f"action_{joint}": round(x, 4) for joint, x in zip(JOINTS, action.tolist(), strict=True)}
            facts |= dict(zip(("sheet_x", "sheet_y", "sheet_yaw"), sight.pose.round(5).tolist(), strict=True))
            facts |= {"sheet_age": round(age, 3), "confidence": sight.confidence, "hold_counter": counter}
            arm.end_step("play", reason, episode=number, step=step, **facts)
            frame, step = watch(arm, sheet, frame), step + 1
    except Stop as error:
        stopped = str(error)
    poses = poses[: len(frames) + 1] or [arm.robot.moment.sheet_pose if simulated else np.zeros(3)]
    outcome = {"solved": bool(solved), "seen_solved": counter >= HOLD_STEPS, "stopped": stopped}
    return outcome | {"poses": np.stack(poses), "frames": frames, "forces": np.array(forces), "norms": np.array(norms)}


def describe_pose(pose: np.ndarray) -> str:
    return f"{1000 * pose[0]:.0f} {1000 * pose[1]:.0f} mm {np.degrees(pose[2]):.0f} deg"


def rewards_of(episode: dict) -> np.ndarray:
    """The environment's default reward of each step, (steps,), but for the price of force, which no arm measures."""
    poses = episode["poses"][1:]
    distances = np.linalg.norm(poses[:, :2] - SQUARE_POS, axis=1)
    rewards = EnvArgs.distance_weight * distances + EnvArgs.orientation_weight * np.abs(quarter_turns(poses[:, 2]))
    rewards += EnvArgs.time_weight
    rewards[-1:] += EnvArgs.success_weight * episode["solved"]
    return rewards


def judge(episode: dict, tape_half_size: float) -> dict:
    """What eval.py says of an episode, by name, from where the sheet was at each step."""
    poses = episode["poses"]
    distances = np.linalg.norm(poses[:, :2] - SQUARE_POS, axis=1)
    inside = is_inside(poses, tape_half_size)
    facts = {
        "success": float(episode["solved"]),
        "return": rewards_of(episode).sum(),
        "length": len(poses) - 1,
        "final_distance_m": distances[-1],
        "final_yaw_error_rad": np.abs(quarter_turns(poses[-1, 2])),
        "residual_norm": episode["norms"].mean() if len(episode["norms"]) else 0.0,
        "moved_m": np.linalg.norm(poses[:, :2] - poses[0, :2], axis=1).max(),
        "reach_m": np.linalg.norm(poses[-1, :2] - ARM_AXIS),
        "approach_m": distances[max(0, len(poses) - 1 - APPROACH_STEPS)] - distances[-1],
        "was_inside": float(inside.any()),
        "inside": float(inside[-1]),
    }
    failure = classify_failures({name: np.array([fact]) for name, fact in facts.items()}, tape_half_size)[0]
    return facts | {"failure": "stopped" if episode["stopped"] and failure else str(failure)}


def to_demo(episode: dict, env: type, seed: int) -> dict:
    """An episode as `Dataset.add` takes it; its joints are in the model's zeros."""
    obs, measured, target = (np.stack(some) for some in zip(*episode["frames"], strict=True))
    commanded, environment_state = to_lerobot(obs, env)
    last = np.arange(len(obs)) == len(obs) - 1
    return {
        "observation.state": joints_to_lerobot(measured).astype(np.float32),
        "observation.environment_state": environment_state,
        "action": joints_to_lerobot(target).astype(np.float32),
        "commanded": commanded,
        "next.reward": rewards_of(episode).astype(np.float32),
        "next.done": last,
        "next.success": last & episode["solved"],
        "seed": seed,
    }


def dry_run(arm: Arm, policy, observe, acting, sheet, seconds: float) -> None:
    """Print twice a second what is read, where the sheet is seen, and what the policy would do; send nothing."""
    frame = None
    arm.start_clock()
    for step in range(round(seconds * POLICY_HZ)):
        frame = watch(arm, sheet, frame)
        if step % (POLICY_HZ // 2) == 0:
            joints = " ".join(f"{x:.1f}" for x in joints_to_lerobot(arm.measured))
            fingertip = 1000 * kinematics(arm.measured[None])[0][0]
            seen = "not seen"
            if sheet.last is not None:
                obs = observe(arm.measured, np.zeros(6), sheet.last.pose, 0, arm.measured)
                age = arm.now() - sheet.last.time
                seen = f"{describe_pose(sheet.last.pose)}, {age:.2f} s ago; action {acting(policy(obs)[0]).round(2)}"
            lost = f"; lost: {arm.error}" if arm.misses else ""
            print(f"joints {joints}; fingertip {fingertip.round()} mm; sheet {seen}{lost}")
        arm.target = arm.measured
        if not arm.real_time:
            arm.robot.step()
        arm.end_step("dry run", "")


def report(name: str, episodes: list[dict], arm: Arm, args: Args, tape_half_size: float, folder: Path) -> None:
    """Print eval.py's table, write its results.json, and say how the loop kept its time."""
    judged = [judge(episode, tape_half_size) for episode in episodes]
    rows = {key: np.array([facts[key] for facts in judged]) for key in judged[0]}
    longest = max(len(episode["norms"]) for episode in episodes)
    by_step = [np.mean([e["norms"][k] for e in episodes if len(e["norms"]) > k]) for k in range(longest)]
    forces = np.concatenate([episode["forces"] for episode in episodes])
    rows |= {"seed": args.seed + np.arange(len(judged)), "forces": forces[forces > 0]}
    results = {name: summarize(rows | {"residual_norm_by_step": np.array(by_step)})}
    kinds = [re.sub(r"[\d.]+", "N", reason.removeprefix("hold: ")) for reason in arm.reasons if reason]
    loop = {"steps": len(arm.reasons), "held": {kind: kinds.count(kind) for kind in sorted(set(kinds))}}
    loop["seen_inside_but_not_there"] = sum(e["seen_solved"] and not e["solved"] for e in episodes)
    loop["stopped"] = [episode["stopped"] for episode in episodes if episode["stopped"]]
    if arm.periods:
        percentiles = np.percentile(1000 * np.array(arm.periods), [0, 1, 50, 99, 100]).round(2).tolist()
        loop["period_ms"] = dict(zip(("min", "p1", "median", "p99", "max"), percentiles, strict=True))
        loop["missed_deadlines"] = arm.missed
    write_json(folder / "results.json", {"policies": results, "loop": loop, "args": asdict(args)})
    print(format_table(results))
    print("\n".join(f"{key}: {value}" for key, value in loop.items()))
    if args.plot:
        plot_results(results, folder / "results.png", tape_half_size)


if __name__ == "__main__":
    args = parse(Args)
    torch.set_num_threads(1)
    policy, task, checkpoint = load_policy(args.model_path, args.script)
    name = f"{checkpoint['args']['exp_name']} seed {checkpoint['args']['seed']}"
    if args.base_only:
        if not hasattr(policy, "base_policy"):
            raise UserError(f"--base-only: the policy of {args.model_path} has no base")
        policy, name = policy.base_policy, f"base {checkpoint['args']['base_policy']}"
    try:
        envs = task(1, num_threads=1)
        if args.robot == "sim":
            camera = "desk" if args.sheet == "camera" else ""
            bad = {"lost_reads": args.lost_reads, "freeze_after": args.freeze_after, "fixed": dict(args.fixed)}
            view = {"viewer": args.render, "markers": args.markers}
            robot = SimulatedArm(args.seed, args.clock == "real", camera, task=task, **view, **bad)
            low, high = envs.ctrl_low, envs.ctrl_high
    except ValueError as error:
        raise UserError(str(error)) from error
    if args.robot == "so101":
        robot, low, high = make_so101(args)
    offsets, table_height = np.zeros(5), 0.0
    if args.calibration_file:
        calibration = load_calibration(args.calibration_file, args.id)
        offsets, table_height = calibration.offsets, calibration.table_height
    low, high = (np.clip(limit + np.append(offsets, 0.0), envs.ctrl_low, envs.ctrl_high) for limit in (low, high))
    limits = {"low": low, "high": high, "act_scale": envs.act_scale, "gap": np.radians(args.limit_gap)}
    limits |= {"depth": args.limit_depth, "table_height": table_height}
    tape_half_size = envs.tape_half_size
    make_observation = sys.modules[type(envs).__module__].make_observation

    def observe(target, last_action, pose, hold_counter, measured):
        known = (np.asarray(x)[None] for x in (target, last_action, pose, tape_half_size, hold_counter))
        return make_observation(*known, measured[None] if envs.observe_measured else None)

    sheet = make_sheet(args, robot, tape_half_size)
    dataset = None
    if args.record:
        dataset = Dataset(Path(args.record), make_features(type(envs)), checkpoint["env"], args.append, 1)
    folder = new_run_dir("real_arm", args.seed)
    log = (folder / "steps.csv").open("w", newline="", buffering=1)
    writer = csv.DictWriter(log, COLUMNS, lineterminator="\n")
    writer.writeheader()
    arm, episodes = Arm(robot, offsets, limits, writer), []
    numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    for number in numbers:
        signal.signal(number, signal.default_int_handler)  # as Ctrl-C

    try:
        connect(robot, args.dry_run)
        arm.start()
        if args.dry_run:
            dry_run(arm, policy, observe, envs.acting, sheet, args.seconds)
        for episode in range(args.episodes * (not args.dry_run)):
            if episode and args.robot == "sim":
                robot.reset(args.seed + episode)
                arm.start()
            elif episode:
                input("put the sheet back; Enter: the next episode ")
            arm.go_home()
            of_task = observe, envs.acting, sheet, tape_half_size
            episodes.append(play_episode(arm, policy, *of_task, episode, args))
            played = episodes[-1]
            outcome = played["stopped"] or ("success" if played["solved"] else "failure")
            print(f"episode {episode}: {outcome}, {(len(played['poses']) - 1) / POLICY_HZ:.1f} s")
            if dataset and played["frames"]:
                dataset.add(to_demo(played, type(envs), args.seed + episode))
            if args.robot == "so101":
                arm.go_home()
            if played["stopped"] and args.robot == "so101":
                break
    except KeyboardInterrupt as error:
        print(f"\nstopped by {str(error) or 'Ctrl-C'}: the arm goes home; Ctrl-C again: torque off at once")
    except Stop as error:
        print(f"stopped: {error}")
    finally:
        try:
            if arm.target is not None and not args.dry_run:
                arm.read()
                arm.go_home()
        except (Stop, KeyboardInterrupt) as error:
            print(f"not home: {str(error) or 'Ctrl-C'}; the torque goes off here")
        finally:
            for number in numbers:
                signal.signal(number, signal.SIG_IGN)
            log.close()
            disconnect(robot)
    if dataset:
        dataset.flush()
    if episodes:
        report(name, episodes, arm, args, tape_half_size, folder)
    if args.plot and arm.reasons:
        plot_steps(folder / "steps.csv", folder / "steps.png")
    print(f"wrote {folder}")
