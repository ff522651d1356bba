"""LeRobot's Robot and Teleoperator around `SimulatedArm` and the keyboard."""

import logging
import time
from functools import cached_property

import numpy as np
from lerobot.robots import Robot
from lerobot.teleoperators import Teleoperator
from lerobot.utils.decorators import check_if_already_connected, check_if_not_connected

from base_policies import joints_to_lerobot, to_lerobot
from env_paper_square import JOINTS, is_inside, kinematics, make_observation
from lerobot_dataset import make_features
from simulated_arm import SimulatedArm
from so101_mujoco.config_plugin import SO101KeyboardConfig, SO101MujocoConfig
from so101_mujoco.keyboard import BACKSPACE, HELP, KeyboardTargets, Terminal

ACTION_FEATURES = {f"{joint}.pos": float for joint in JOINTS}
SHEET_FEATURES = dict.fromkeys(make_features()["observation.environment_state"]["names"], float)
NEW_SHEET = "new_sheet"  # beside the joints in an action of so101_keyboard
RAISED, RAISED_FOR = 0.15, 1.0  # m, s: a fingertip so high for so long asks for a new sheet, by any teleoperator
PAUSE = 0.5  # s: so long LeRobot has not asked where it saves an episode, or connects a robot


class SO101Mujoco(Robot):
    """The simulated arm in real time, with the sheet before it."""

    config_class = SO101MujocoConfig
    name = "so101_mujoco"

    def __init__(self, config: SO101MujocoConfig):
        super().__init__(config)
        self.config = config
        self.arm = SimulatedArm(config.seed, camera=config.camera, viewer=config.viewer, fixed=config.fixed)
        self.cameras = self.arm.cameras

    @cached_property
    def observation_features(self) -> dict:
        return ACTION_FEATURES | (SHEET_FEATURES if self.config.sheet else {}) | self.cameras

    @cached_property
    def action_features(self) -> dict:
        return ACTION_FEATURES

    @property
    def is_connected(self) -> bool:
        return self.arm.is_connected

    @property
    def is_calibrated(self) -> bool:
        return self.arm.is_calibrated

    @check_if_already_connected
    def connect(self, calibrate: bool = True) -> None:
        self.arm.connect()
        self.begin()

    def calibrate(self) -> None:
        self.arm.calibrate()

    def configure(self) -> None:
        self.arm.configure()

    @check_if_not_connected
    def disconnect(self) -> None:
        self.arm.disconnect()

    def begin(self) -> None:
        self.seen_inside, self.low_at = 0, None  # low_at: when the fingertip was low last, s, if it was in this episode
        logging.info(f"so101_mujoco: seed {self.arm.seed}")

    def put_back(self) -> None:
        """Put the sheet, and the arm, where the next episode starts."""
        self.arm.reset(self.arm.seed + 1)
        self.begin()

    @check_if_not_connected
    def get_observation(self) -> dict:
        """Joints in degrees and percent; where the sheet is seen, by the names of the rows; the camera's last frame."""
        observation = self.arm.get_observation()
        if self.arm.show():
            raise KeyboardInterrupt("the viewer was closed")
        return observation | (self.see_sheet() if self.config.sheet else {})

    def see_sheet(self) -> dict[str, float]:
        envs, pose = self.arm.envs, self.arm.moment.seen_pose[None]
        tape_half_size = np.array([envs.tape_half_size])
        self.seen_inside = self.seen_inside + 1 if is_inside(pose, tape_half_size)[0] else 0
        if self.seen_inside == envs.hold_steps:
            logging.info("so101_mujoco: the sheet is in the square")
        joints = self.arm.target[None]  # where they were sent last, as load_demos takes it
        obs = make_observation(joints, np.zeros((1, 6)), pose, tape_half_size, np.array([self.seen_inside]))
        _, rows = to_lerobot(obs, type(envs))
        return dict(zip(SHEET_FEATURES, rows[0].tolist(), strict=True))

    @check_if_not_connected
    def send_action(self, action: dict) -> dict:
        """Send joint targets in degrees and percent; returns them as far as the joints go."""
        sent = self.arm.send_action({key: float(action[key]) for key in ACTION_FEATURES})
        now = time.perf_counter()
        if kinematics(self.arm.target[None])[0][0, 2] < RAISED:
            self.low_at = now
        if action.get(NEW_SHEET) or (self.low_at is not None and now - self.low_at > RAISED_FOR):
            self.put_back()
        return sent


class SO101Keyboard(Teleoperator):
    """The keys of the terminal, as joint targets that start from the simulated arm's home."""

    config_class = SO101KeyboardConfig
    name = "so101_keyboard"

    def __init__(self, config: SO101KeyboardConfig):
        super().__init__(config)
        self.targets, self.terminal = KeyboardTargets(), Terminal()

    @cached_property
    def action_features(self) -> dict:
        return ACTION_FEATURES

    @cached_property
    def feedback_features(self) -> dict:
        return {}

    @property
    def is_connected(self) -> bool:
        return self.terminal.is_open

    @property
    def is_calibrated(self) -> bool:
        return True

    @check_if_already_connected
    def connect(self, calibrate: bool = True) -> None:
        self.terminal.open()
        self.targets.home()
        self.moved = time.perf_counter()
        print("\n".join(HELP))

    def calibrate(self) -> None:
        """Nothing to do."""

    def configure(self) -> None:
        """Nothing to do."""

    @check_if_not_connected
    def get_action(self) -> dict:
        """Joint targets in degrees and percent, and `NEW_SHEET` when that was asked for."""
        keys, now = self.terminal.read(), time.perf_counter()
        pause, self.moved = now - self.moved, now
        if pause > PAUSE:  # what was typed meanwhile was not meant for what comes now
            keys = []
        for key in keys:
            if key == BACKSPACE:
                self.targets.home()
            else:
                self.targets.press(key)
        target = self.targets.move(pause)
        action = dict(zip(ACTION_FEATURES, joints_to_lerobot(target).tolist(), strict=True))
        return action | ({NEW_SHEET: 1.0} if BACKSPACE in keys else {})

    def send_feedback(self, feedback: dict) -> None:
        """A keyboard feels nothing."""

    @check_if_not_connected
    def disconnect(self) -> None:
        self.terminal.close()
