"""A simulated SO-101 behind LeRobot's interface for robots: degrees and percent in, degrees, percent and frames out.

    robot = SimulatedArm(seed=7, fixed={"delay": 2})
    robot.connect()
    robot.send_action({"shoulder_pan.pos": 10.0, ...})          # absolute joint targets
    robot.get_observation()["top"]                              # the camera's last frame, (480, 640, 3) uint8
    robot.disconnect()

The arm is that of `PaperSquareVectorEnv`, with all that it draws: servos, joints' zeros, ticks, play, delay, the height
of the table, the camera's lag. Here are only the clock, the camera's thread, and what a bus and a camera do wrong.
"""

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from gymnasium.vector import AutoresetMode

from base_policies import joints_to_lerobot, joints_to_rad
from env_paper_square import JOINTS, POLICY_HZ, PaperSquareVectorEnv

FRAME_SHAPE = (480, 640, 3)


class Moment(NamedTuple):
    """What is known of the simulated arm after a step; never changed, so that threads may share it."""

    time: float  # s, of `now`
    joints: np.ndarray  # (6,), as the servos report them, LeRobot's units
    seen_pose: np.ndarray  # (3,), where the sheet is seen: late, biased, noisy, m and rad
    sheet_pose: np.ndarray  # (3,), where it is
    solved: bool  # as the environment judges it
    force: float  # on the harder pressed fingertip, N
    lag: float  # of the camera, s
    state: np.ndarray  # the physics
    seed: int  # of the episode


class Sight(NamedTuple):
    """Where the sheet was seen, with the fields of a sighting of the camera."""

    pose: np.ndarray
    time: float
    confidence: float


class SimulatedArm:
    """An arm with a sheet before it, by the duck type of LeRobot's Robot.

    With `real_time` a thread steps the physics at 30 Hz whatever the caller does, and the last target holds; another
    one renders, so that frames are late by what rendering takes, and by the episode's `lag`. Otherwise `send_action`
    is one policy step, at once, with a frame of every step.

    Args: `seed` of the first episode; `real_time`; `camera`, a name, "" for none; `lost_reads`, probability that
    `get_observation` raises ConnectionError, as the driver does of a lost reply; `freeze_after`, seconds from the start
    of an episode after which the camera shows nothing new; `viewer`, a window of MuJoCo's; `task(1, **kwargs)`, what
    makes the environment, and its arguments.
    """

    name = "so101_mujoco"

    def __init__(
        self,
        seed: int = 0,
        real_time: bool = True,
        camera: str = "top",
        lost_reads: float = 0.0,
        freeze_after: float = float("inf"),
        viewer: bool = False,
        task: Callable = PaperSquareVectorEnv,
        **kwargs,
    ):
        kwargs = {"markers": True} | kwargs
        kwargs |= {
            "num_threads": 1,
            "autoreset_mode": AutoresetMode.DISABLED,
            "max_episode_steps": 2**31,
        }
        self.envs = task(1, **kwargs)
        height, width, _ = FRAME_SHAPE
        # Given the state of the first, it draws what a camera sees, in a thread of its own
        self.eye = task(1, camera=camera, height=height, width=width, **kwargs) if camera else None
        self.window = task(1, render_mode="human", **kwargs) if viewer else None
        self.seed, self.real_time, self.lost_reads, self.freeze_after = seed, real_time, lost_reads, freeze_after
        self.cameras = {camera: FRAME_SHAPE} if camera else {}
        self.action_features = {f"{joint}.pos": float for joint in JOINTS}
        self.observation_features = self.action_features | self.cameras
        self.is_connected, self.is_calibrated = False, True
        self.lock, self.stepped, self.threads, self.trouble = threading.Lock(), threading.Event(), [], None
        self.frames = deque(maxlen=64)  # (time when it was taken, frame), more than the largest lag
        self.steps, self.posed_for = 0, {}  # the episode that another environment is set up for
        self.low, self.high = self.envs.ctrl_low, self.envs.ctrl_high  # (6,), rad

    def connect(self, calibrate: bool = True) -> None:
        self.is_connected = True
        self.reset(self.seed)
        for target in (self.keep_time, self.keep_watch) if self.real_time else ():
            self.threads.append(threading.Thread(target=target, daemon=True))
            self.threads[-1].start()
        self.wait_for_frame()
        self.show()  # UserError without a display

    def calibrate(self) -> None:
        """Nothing to do: its zeros are wrong on purpose."""

    def configure(self) -> None:
        """Nothing to do."""

    def disconnect(self) -> None:
        self.is_connected = False
        for thread in self.threads:
            thread.join()
        self.threads = []
        for envs in (self.envs, self.window) if self.real_time else (self.envs, self.window, self.eye):
            if envs is not None:  # the eye is closed where it was used, by its thread
                envs.close()

    def reset(self, seed: int) -> None:
        """Draw another arm, at home, and put its sheet down: the episode `seed` of the environment."""
        with self.lock:
            self.envs.reset(seed=[seed])
            self.seed, self.target = seed, self.envs.joint_target[0].copy()
            self.read_rng = np.random.default_rng([seed, 3])
            self.frames.clear()
            self.publish(False)
            self.start = self.moment.time
        if not self.real_time:
            self.look()
        elif self.threads:
            self.wait_for_frame()

    def get_observation(self) -> dict:
        if self.read_rng.random() < self.lost_reads:
            raise ConnectionError("no status packet: a read was lost, as it was asked for")
        if self.trouble:
            raise self.trouble
        observation = dict(zip(self.action_features, self.moment.joints.tolist(), strict=True))
        latest = self.now() - self.moment.lag + 1e-6
        for camera in self.cameras:
            there = [frame for taken, frame in list(self.frames) if taken <= latest]
            observation[camera] = there[-1] if there else self.frames[0][1]
        return observation

    def send_action(self, action: dict) -> dict:
        """Set the joint targets, and without `real_time` advance one step; returns them as the servos take them."""
        wanted = joints_to_rad(np.array([action[key] for key in self.action_features], dtype=np.float64))
        if not np.isfinite(wanted).all():
            raise ValueError(f"joint targets must be finite, found {action}")
        self.target = np.clip(wanted, self.low, self.high)
        if not self.real_time:
            self.step()
            self.look()
        return dict(zip(self.action_features, joints_to_lerobot(self.target).tolist(), strict=True))

    def now(self) -> float:
        """The clock that frames are dated by, s: real, or one step per action."""
        return time.perf_counter() if self.real_time else self.moment.time

    def show(self) -> bool:
        """Show the arm in the viewer, if it has one; whether its window was closed. Keeps to real time."""
        if self.window is None:
            return False
        if not self.window.viewer_closed:
            self.pose(self.window, self.moment)
            self.window.render()
        return self.window.viewer_closed

    def step(self) -> None:
        """Send the servos the last target for one policy step."""
        with self.lock:
            self.envs.joint_target[0] = self.target
            _, _, terminations, _, _ = self.envs.step(np.zeros((1, len(JOINTS))))
            self.steps += 1
            self.publish(bool(terminations[0]))
        self.stepped.set()

    def publish(self, solved: bool) -> None:
        """Make the present state of the environment the moment that others read."""
        envs = self.envs
        self.moment = Moment(
            time=time.perf_counter() if self.real_time else self.steps / POLICY_HZ,
            joints=joints_to_lerobot(envs.joint_measured[0]),
            seen_pose=envs.seen_pose[0],
            sheet_pose=envs.sheet_pose[0],
            solved=solved,
            force=float(envs.fingertip_force.max()),
            lag=float(envs.drawn["lag"][0, 0]) / POLICY_HZ,
            state=np.array(envs.batch.state),
            seed=self.seed,
        )

    def look(self) -> None:
        """Take a frame of the present moment."""
        moment = self.moment
        if self.eye is None or self.is_frozen(moment):
            return
        self.pose(self.eye, moment)
        frame = self.eye.render_frame(shadows=not self.real_time)
        if moment.seed == self.seed:  # not of the episode before
            self.frames.append((moment.time, frame))

    def is_frozen(self, moment: Moment) -> bool:
        return moment.time - self.start > self.freeze_after

    def pose(self, envs, moment: Moment) -> None:
        """Give another environment the state of this moment, and what its episode has drawn."""
        if self.posed_for.get(envs) != moment.seed:
            envs.reset(seed=[moment.seed])
            self.posed_for[envs] = moment.seed
        envs.batch.state[:] = moment.state

    def keep_time(self) -> None:
        """Of real time's thread: a step every 30th of a second."""
        due = time.perf_counter()
        while self.is_connected:
            due = max(due + 1.0 / POLICY_HZ, time.perf_counter() - 0.5)  # what is far behind stays so
            time.sleep(max(0.0, due - time.perf_counter()))
            self.step()

    def keep_watch(self) -> None:
        """Of the camera's thread: a frame of every step, or of as many as it can draw."""
        try:
            while self.is_connected and self.eye is not None:
                self.stepped.wait(0.1)
                self.stepped.clear()
                self.look()
        except Exception as error:  # raised where frames are asked for
            self.trouble = error
        finally:
            if self.eye is not None:
                self.eye.close()

    def wait_for_frame(self) -> None:
        while self.cameras and not self.frames and not self.trouble:
            time.sleep(0.005)
        if self.trouble:
            raise self.trouble


class TrueSheet:
    """Where the environment says that the sheet is seen, in the place of the camera's `SheetCamera`."""

    def __init__(self, robot: SimulatedArm):
        self.robot, self.last = robot, None

    def update(self, frame: np.ndarray | None, time: float) -> Sight | None:
        moment = self.robot.moment
        if not self.robot.is_frozen(moment):
            self.last = Sight(moment.seen_pose, moment.time - moment.lag, 1.0)
        return self.last
