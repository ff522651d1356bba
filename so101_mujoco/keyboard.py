"""A keyboard as the hand on the arm: a terminal's keys, and the joint targets they move. Knows nothing of LeRobot."""

import atexit
import os
import re
import select
import sys

import mujoco
import numpy as np

from env_paper_square import OBS, OBS_ZERO, POLICY_HZ, SCENE_PATH, EnvArgs
from record_demos import KEYS as VIEWER_KEYS
from record_demos import PACE, PRESS, key_to_motion, motion_to_action
from runs import UserError

HOME = OBS_ZERO[OBS["joint_target"]]  # (6,), rad
BACKSPACE = "\x7f"

# The keys of record_demos.py, but letters for arrows and Page Up: LeRobot's recording has arrows, Escape, n, r and q
LETTERS = {"w": 265, "s": 264, "a": 263, "d": 262, "i": 266, "k": 267}
KEYS = LETTERS | {chr(code): code for code in VIEWER_KEYS if code < 128}
HELP = [f"{key:10} {VIEWER_KEYS[code][1]}" for key, code in KEYS.items()] + ["Backspace  put the sheet back"]


class KeyboardTargets:
    """The joint targets, `target` (6,), rad, that keys move: the fingertip's, its pitch and roll, and the gripper's.

    A press asks for a motion of a fixed length, made at a fixed pace; while a key repeats, the motion goes on.
    """

    def __init__(self):
        self.low, self.high = mujoco.MjModel.from_xml_path(str(SCENE_PATH)).actuator_ctrlrange.T  # rad
        self.home()

    def home(self) -> None:
        self.target, self.left = HOME.copy(), np.zeros(6)  # left: of the motions asked for

    def press(self, key: str) -> None:
        # Never more than one press: a terminal repeats keys faster than the arm follows
        self.left = np.clip(self.left + key_to_motion(KEYS[key]), -PRESS, PRESS)

    def move(self, seconds: float) -> np.ndarray:
        """Move the targets for so long, but no farther than in one policy step of the environment; returns them."""
        steps = min(POLICY_HZ * seconds, 1.0)
        motion = np.clip(self.left, -PACE * steps, PACE * steps)
        self.left = self.left - motion
        most = EnvArgs.act_scale * steps  # rad
        action = motion_to_action(self.target[None], motion[None], most)[0]
        self.target = np.clip(self.target + most * action, self.low, self.high)
        return self.target


class Terminal:
    """The terminal that the process was started in: its keys as they are pressed. Ctrl-C stays what it is."""

    is_open = False

    def open(self) -> None:
        """Raises UserError if there is none."""
        try:
            import pty
            import termios
            import tty
        except ImportError as error:
            raise UserError("so101_keyboard reads a terminal of Linux or macOS: on Windows, use WSL") from error
        if not sys.stdin.isatty():
            raise UserError("so101_keyboard reads a terminal, and there is none: start the command in one")
        self.stdin, self.is_open = sys.stdin, True
        before = termios.tcgetattr(self.stdin)
        self.restore = lambda: termios.tcsetattr(self.stdin, termios.TCSADRAIN, before)
        tty.setcbreak(self.stdin)
        # LeRobot 0.6 reads keys from stdin as well, and would take away some of ours: it gets a terminal of its own,
        # which stays open, because it goes on reading when this device is disconnected
        self.others, theirs = pty.openpty()
        sys.stdin = self.theirs = os.fdopen(theirs)
        atexit.register(self.close)  # LeRobot does not disconnect where another device fails to connect

    def read(self) -> list[str]:
        """Which of our keys, `KEYS` and Backspace, were pressed since the last time; LeRobot gets the others."""
        if not select.select([self.stdin], [], [], 0)[0]:
            return []
        text = os.read(self.stdin.fileno(), 1024).decode(errors="ignore").replace("\b", BACKSPACE)
        keys = re.findall(r"\x1b[\[O][0-9;]*.|.", text, re.DOTALL)  # an arrow, say, is several characters
        others = "".join(key for key in keys if key not in KEYS and key != BACKSPACE)
        os.write(self.others, others.encode())
        return [key for key in keys if key in KEYS or key == BACKSPACE]

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self.is_open:
            self.is_open = False
            sys.stdin = self.stdin
            self.restore()
            atexit.unregister(self.close)
