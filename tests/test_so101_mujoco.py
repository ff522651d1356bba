"""The plug-in: keys and what they move, datasets as lerobot-record writes them, and, with LeRobot, its own commands.

LeRobot lives in an environment of its own, as tests/test_lerobot.py says; where it is not, its tests are skipped. The
leader's needs `pip install --no-deps "feetech-servo-sdk>=1,<2"` there as well.

    .venv-lerobot/bin/python -m pytest tests/test_so101_mujoco.py
"""

import importlib
import itertools
import json
import logging
import os
import shlex
import sys
import termios
import time

import mujoco
import numpy as np
import pytest
from fake_bus import POSITION, FakeBus
from numpy.testing import assert_allclose, assert_array_equal

from base_policies import env_state_rows, joints_to_lerobot, joints_to_rad
from env_paper_square import (
    JOINTS,
    OBS,
    OBS_ZERO,
    POLICY_HZ,
    SCENE_PATH,
    SQUARE_POS,
    EnvArgs,
    PaperSquareVectorEnv,
    eval_kwargs,
    kinematics,
    to_si,
)
from lerobot_dataset import Dataset, load_demos, load_task, make_features
from record_demos import KEYS as VIEWER_KEYS
from record_demos import PACE, PRESS
from runs import UserError, describe_env
from simulated_arm import SimulatedArm
from so101_mujoco.keyboard import BACKSPACE, HELP, HOME, KEYS, KeyboardTargets, Terminal

STATE, REST = "observation.state", "observation.environment_state"
ARROWS = {"\x1b[C": "right", "\x1b[D": "left", "\x1bOC": "right", "\x1b": "Escape"}


@pytest.fixture
def typewriter(monkeypatch):
    """Writes to a terminal that is this process's."""
    ours, theirs = os.openpty()
    with os.fdopen(theirs) as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        yield lambda text: os.write(ours, text.encode())
    os.close(ours)


def read(terminal, count):
    """The keys of a terminal until there are so many, within a second."""
    keys, end = [], time.monotonic() + 1
    while len(keys) < count and time.monotonic() < end:
        keys += terminal.read()
    return keys


def pose(targets):
    """What the keys move: fingertip, pitch, roll and gripper, (6,), m and rad."""
    joints = targets.target
    return np.concatenate([kinematics(joints[None])[0][0], [joints[1:4].sum(), joints[0] - joints[4], joints[5]]])


# The keyboard; runs without LeRobot


def test_the_keys_are_those_of_record_demos_and_none_of_lerobots():
    assert sorted(KEYS.values()) == sorted(VIEWER_KEYS)
    assert not {"n", "r", "q", BACKSPACE, *ARROWS} & set(KEYS)
    assert [line.split()[0] for line in HELP] == [*KEYS, "Backspace"]


def test_it_starts_from_home_within_the_ranges():
    scene = mujoco.MjModel.from_xml_path(str(SCENE_PATH))
    assert_allclose(HOME, scene.key("home").ctrl, rtol=0, atol=1e-6)
    assert_allclose(KeyboardTargets().high, scene.actuator_ctrlrange[:, 1])


@pytest.mark.parametrize("key", KEYS)
def test_a_press_is_a_motion_of_its_length_and_of_nothing_else(key):
    _, _, axis, sign = VIEWER_KEYS[KEYS[key]]
    targets = KeyboardTargets()
    before = pose(targets)
    targets.press(key)
    for _ in range(30):
        targets.move(1 / POLICY_HZ)
    moved = (pose(targets) - before) / PRESS
    assert abs(moved[axis] - sign) < 0.15  # damped
    assert np.abs(np.delete(moved, axis)).max() < 0.15
    after = targets.target.copy()
    assert_array_equal(targets.move(1 / POLICY_HZ), after)  # then it stands


@pytest.mark.parametrize("rate", [15, 30, 60])
def test_a_held_key_moves_at_its_pace_and_stops_soon_after(rate):
    targets = KeyboardTargets()
    lowest_rate = min(rate, POLICY_HZ)  # no farther in a step than the environment, however late
    for _ in range(rate):
        before = targets.target.copy()
        targets.press("a")
        targets.move(1 / rate)
        assert np.abs(targets.target - before).max() <= EnvArgs.act_scale + 1e-9
    way = pose(targets)[1]
    assert abs(way / (PACE[1] * lowest_rate) - 1) < 0.1
    for _ in range(rate):
        targets.move(1 / rate)
    assert pose(targets)[1] - way <= PRESS[1]
    targets.home()
    assert_array_equal(targets.move(1.0), HOME)


def test_targets_stay_in_the_joints_ranges():
    targets = KeyboardTargets()
    for key in ("=", "w", "9", "-", "s", "8"):
        for _ in range(400):
            targets.press(key)
            targets.move(1 / POLICY_HZ)
        assert np.isfinite(targets.target).all()
        assert (targets.low <= targets.target).all() and (targets.target <= targets.high).all()
    assert targets.target[5] == targets.low[5]


def test_the_terminal_gives_keys_unechoed_and_is_left_as_it_was(typewriter):
    stdin, terminal = sys.stdin, Terminal()
    before = termios.tcgetattr(stdin)
    terminal.open()
    flags = termios.tcgetattr(stdin)[3]
    assert not flags & (termios.ICANON | termios.ECHO) and flags & termios.ISIG  # Ctrl-C is one still
    assert terminal.read() == []
    typewriter("wwZ9\x7f\b=")
    assert read(terminal, 6) == ["w", "w", "9", BACKSPACE, BACKSPACE, "="]
    terminal.close()
    assert sys.stdin is stdin and termios.tcgetattr(stdin) == before
    terminal.close()  # once more is nothing
    terminal.open()  # and again
    typewriter("w")
    assert read(terminal, 1) == ["w"]
    terminal.close()


def test_what_else_is_typed_goes_to_whoever_reads_stdin(typewriter):
    """As LeRobot 0.6 does: it puts stdin, if that is a terminal, in this mode, and reads its file."""
    import tty

    terminal = Terminal()
    terminal.open()
    assert sys.stdin.isatty()
    tty.setcbreak(sys.stdin)
    typewriter("wn\x1b[Cwr\x1b[5~\x1bOD\x1bq6")  # an arrow, Page Up, another arrow, Escape
    assert read(terminal, 3) == ["w", "w", "6"]
    assert os.read(sys.stdin.fileno(), 100) == b"n\x1b[Cr\x1b[5~\x1bOD\x1bq"
    terminal.close()


def test_without_a_terminal_it_says_so(monkeypatch):
    with open(os.devnull) as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        with pytest.raises(UserError, match="reads a terminal, and there is none"):
            Terminal().open()
        monkeypatch.setitem(sys.modules, "termios", None)  # as on Windows
        with pytest.raises(UserError, match="on Windows, use WSL"):
            Terminal().open()


# Datasets; runs without LeRobot


def test_load_demos_takes_a_state_of_joints_and_sheet_apart(tmp_path):
    """What lerobot-record writes of the plug-in: one feature of 21 numbers, by their names."""
    rng, features = np.random.default_rng(0), make_features()
    frames = {key: rng.normal(size=(7, *features[key]["shape"])).astype(np.float32) for key in (STATE, REST, "action")}
    names = features[STATE]["names"] + features[REST]["names"]

    def write(folder, names):
        state = {"dtype": "float32", "shape": [len(names)], "names": names}
        kept = {STATE: state} | {key: features[key] for key in features if key not in (STATE, REST, "commanded")}
        dataset = Dataset(tmp_path / folder, kept, describe_env(PaperSquareVectorEnv, eval_kwargs(EnvArgs())))
        joined = {STATE: np.concatenate([frames[STATE], frames[REST]], axis=1), "action": frames["action"], "seed": 0}
        rest = {
            "next.reward": np.zeros(7, np.float32),
            "next.done": np.zeros(7, bool),
            "next.success": np.zeros(7, bool),
        }
        dataset.add(joined | rest)
        dataset.flush()
        return tmp_path / folder

    demos = load_demos(write("joined", names))
    assert_array_equal(demos["state"], frames[STATE])
    assert_array_equal(demos["environment_state"], frames[REST])
    commanded = load_demos(tmp_path / "joined", joints="commanded")["state"]
    assert_array_equal(commanded, np.concatenate([frames[STATE][:1], frames["action"][:-1]]))
    with pytest.raises(UserError, match=r"its observation.state has the shape \[21\], not \[6\]"):
        load_demos(write("turned", names[::-1]))  # 21 others


# LeRobot's own commands; skipped without LeRobot


@pytest.fixture
def lerobot(tmp_path, monkeypatch):
    """Runs a command of LeRobot's on the simulated arm, which it returns; what LeRobot would say aloud, `say` hears."""
    pytest.importorskip("lerobot")
    from so101_mujoco import plugin

    robots, connect = [], plugin.SO101Mujoco.connect
    monkeypatch.setattr(plugin.SO101Mujoco, "connect", lambda robot: (robots.append(robot), connect(robot)))

    def run(tool, flags, say=lambda text: None):
        script = importlib.import_module(f"lerobot.scripts.lerobot_{tool}")
        if hasattr(script, "log_say"):
            monkeypatch.setattr(script, "log_say", lambda text, *args, **kwargs: say(text))
        command = [f"lerobot-{tool}", "--robot.type=so101_mujoco", *shlex.split(flags)]
        for device in ("robot", "teleop") if "--teleop" in flags else ("robot",):
            command += [f"--{device}.discover_packages_path=so101_mujoco", f"--{device}.calibration_dir={tmp_path}"]
        monkeypatch.setattr(sys, "argv", command)
        script.main()
        assert not robots[-1].is_connected
        return robots[-1]

    return run


@pytest.fixture
def at_call(typewriter, monkeypatch):
    """Takes {number of a call of get_action: keys}, and types them just before it."""
    pytest.importorskip("lerobot")
    from so101_mujoco.plugin import SO101Keyboard

    def plan(keys):
        calls, get_action = itertools.count(), SO101Keyboard.get_action

        def type_and_get(teleop):
            typewriter(keys.get(next(calls), ""))
            return get_action(teleop)

        monkeypatch.setattr(SO101Keyboard, "get_action", type_and_get)

    return plan


def fingertip(joints):
    """Of joints in LeRobot's units, (..., 6), m."""
    return kinematics(joints_to_rad(np.asarray(joints, dtype=np.float64)).reshape(-1, 6))[0]


def test_record_and_replay(lerobot, at_call, typewriter, tmp_path, capfd):
    """Two episodes, a new sheet between them, read by LeRobot and by this project; the first one, once more."""
    from lerobot.datasets.lerobot_dataset import LeRobotDataset
    from lerobot.scripts.lerobot_record import DatasetRecordConfig

    at_call(dict.fromkeys(range(2, 20), "a"))
    before, stdin = termios.tcgetattr(sys.stdin), sys.stdin
    root = tmp_path / "pushes"
    local = f"--play_sounds=false --dataset.repo_id=local/pushes --dataset.root={root}"
    flags = f"{local} --dataset.single_task=Slide --dataset.num_episodes=2 --dataset.episode_time_s=3"
    encoder = "vcodec" if hasattr(DatasetRecordConfig, "vcodec") else "rgb_encoder.vcodec"  # before 0.6, since
    flags += f" --dataset.reset_time_s=1 --dataset.push_to_hub=false --dataset.{encoder}=h264"
    flags += " --robot.seed=5 --teleop.type=so101_keyboard"
    robot = lerobot("record", flags, lambda text: text == "Reset the environment" and typewriter(BACKSPACE))
    assert robot.arm.seed == 6
    told = "".join(capfd.readouterr())
    assert told.count("so101_mujoco: seed 5") == told.count("so101_mujoco: seed 6") == 1
    assert termios.tcgetattr(stdin) == before and sys.stdin is stdin

    demos, theirs = load_demos(root), LeRobotDataset("local/pushes", root=root, video_backend="pyav")
    assert (theirs.num_episodes, len(theirs), theirs.meta.robot_type) == (2, len(demos["state"]), "so101_mujoco")
    assert theirs[3]["observation.images.top"].shape == (3, 480, 640)
    for i in (0, 1, len(theirs) - 1):
        assert_array_equal(theirs[i][STATE].numpy(), np.concatenate([demos["state"][i], demos["environment_state"][i]]))
        assert_array_equal(theirs[i]["action"].numpy(), demos["action"][i])
    assert load_task(root)[0] is PaperSquareVectorEnv

    first = demos["episode"] == 0
    state, action = demos["state"][first], demos["action"][first]
    assert_allclose(joints_to_rad(action[0]), HOME, rtol=0, atol=1e-6)
    assert fingertip(action[-1])[0, 1] > 0.01  # to the left
    assert np.abs(np.diff(joints_to_rad(action), axis=0)).max() < EnvArgs.act_scale + 1e-6
    assert fingertip(state[-1])[0, 1] - fingertip(state[0])[0, 1] > 0.01  # the arm follows

    obs = np.zeros((len(first), len(OBS_ZERO)))
    rows = np.concatenate([np.arange(len(OBS_ZERO))[OBS[name]] for name in env_state_rows(PaperSquareVectorEnv)])
    obs[:, rows] = demos["environment_state"]
    seen = to_si(obs)
    assert_allclose(seen[first][1:, OBS["fingertip_pos"]], fingertip(action[:-1]), rtol=0, atol=1e-5)
    envs = PaperSquareVectorEnv(1, num_threads=1)
    for episode in (0, 1):
        envs.reset(seed=[5 + episode])
        assert_allclose(seen[demos["episode"] == episode][0, OBS["sheet_pos"]], envs.seen_pose[0, :2], atol=0.002)

    again = lerobot("replay", f"{local} --dataset.episode=0 --robot.seed=5")
    assert_allclose(again.arm.moment.joints, state[-1], rtol=0, atol=1.0)  # degrees
    assert np.abs(state[-1] - state[0]).max() > 4


def test_teleoperate(lerobot, at_call, capfd):
    """Backspace is a new sheet, and home again."""
    at_call(dict.fromkeys(range(2, 12), "d") | {20: BACKSPACE})
    robot = lerobot("teleoperate", "--fps=30 --teleop_time_s=2 --teleop.type=so101_keyboard --robot.camera=")
    assert robot.cameras == {} and robot.arm.seed == 1
    assert_allclose(robot.arm.target, HOME, rtol=0, atol=1e-6)
    assert "put the sheet back" in capfd.readouterr().out


def test_a_leader_arm_drives_it_as_it_is(lerobot, tmp_path):
    pytest.importorskip("scservo_sdk")
    names, posture = ("id", "drive_mode", "homing_offset", "range_min", "range_max"), [20, -30, 40, 50, -10, 60]
    joints = {joint: dict(zip(names, (k + 1, 0, 0, 1000, 3094), strict=True)) for k, joint in enumerate(JOINTS)}
    (tmp_path / "mine.json").write_text(json.dumps(joints))
    leader = FakeBus([(1000, 3094)] * 6)
    for k, degrees in enumerate(posture[:5]):
        leader.put(k + 1, POSITION, 2047 + round(degrees * 4095 / 360))
    leader.put(6, POSITION, 1000 + round(posture[5] / 100 * 2094))
    flags = f"--teleop.type=so101_leader --teleop.port={leader.port} --teleop.id=mine --robot.camera="
    robot = lerobot("teleoperate", f"{flags} --fps=30 --teleop_time_s=2")
    leader.unplug()
    assert_allclose(joints_to_lerobot(robot.arm.target), posture, rtol=0, atol=0.1)
    assert_allclose(robot.arm.moment.joints, posture, rtol=0, atol=6.0)  # it sags, and zeros are off by a degree


@pytest.fixture
def robot(tmp_path):
    """The plug-in's robot of some flags; without LeRobot, skipped."""
    pytest.importorskip("lerobot")
    from so101_mujoco.plugin import SO101Mujoco, SO101MujocoConfig

    made = []

    def make(**flags):
        made.append(SO101Mujoco(SO101MujocoConfig(calibration_dir=tmp_path, **{"camera": "", **flags})))
        return made[-1]

    yield make
    for each in made:
        if each.is_connected:
            each.disconnect()


def test_the_features_are_what_is_observed_and_sent(robot, monkeypatch):
    from lerobot.utils.errors import DeviceAlreadyConnectedError, DeviceNotConnectedError

    arm = robot(camera="side")
    with pytest.raises(DeviceNotConnectedError):
        arm.get_observation()
    arm.connect()
    with pytest.raises(DeviceAlreadyConnectedError):
        arm.connect()
    observation = arm.get_observation()
    assert set(observation) == set(arm.observation_features)
    assert [key for key, kind in arm.observation_features.items() if kind is float] == [
        *arm.action_features,
        *make_features()[REST]["names"],
    ]
    assert observation["side"].shape == arm.observation_features["side"] and observation["side"].std() > 1
    home = dict(zip(arm.action_features, joints_to_lerobot(HOME), strict=True))
    sent = arm.send_action(home | {"shoulder_pan.pos": 500.0})  # degrees
    assert list(sent) == list(arm.action_features) and abs(sent["shoulder_pan.pos"] - 110) < 0.1
    with pytest.raises(ValueError, match="finite"):
        arm.send_action(home | {"gripper.pos": float("nan")})
    with pytest.raises(KeyError):
        arm.send_action({"shoulder_pan.pos": 0.0})
    monkeypatch.setattr(SimulatedArm, "show", lambda self: True)
    with pytest.raises(KeyboardInterrupt, match="the viewer was closed"):  # which LeRobot takes for Ctrl-C
        arm.get_observation()
    arm.disconnect()
    assert not arm.is_connected
    assert set(robot(sheet=False).observation_features) == set(arm.action_features)


def test_a_raised_fingertip_puts_the_sheet_back_once(robot, monkeypatch):
    from so101_mujoco import plugin

    monkeypatch.setattr(plugin, "RAISED_FOR", 0.2)  # s
    arm = robot()
    arm.connect()
    low, high = (
        dict(zip(arm.action_features, joints_to_lerobot(HOME - [0, lift, 0, 0, 0, 0]), strict=True))
        for lift in (0.0, 1.0)
    )
    assert fingertip(list(high.values()))[0, 2] > plugin.RAISED > fingertip(list(low.values()))[0, 2]

    def hold(action):
        for _ in range(10):
            arm.send_action(action)
            time.sleep(0.05)

    hold(high)
    assert arm.arm.seed == 0  # it was not low yet: a leader may lie anywhere when the command starts
    hold(low)
    assert arm.arm.seed == 0
    hold(high)
    assert arm.arm.seed == 1
    hold(high)
    assert arm.arm.seed == 1


def test_a_sheet_seen_in_the_square_is_counted_and_told_of(robot, caplog):
    caplog.set_level(logging.INFO)
    arm = robot()
    arm.connect()
    arm.disconnect()  # or the arm would go on telling where the sheet is
    moment = arm.arm.moment

    def counts(xy):
        arm.arm.moment = moment._replace(seen_pose=np.array([*xy, 0.0]))
        return [arm.see_sheet()["hold_counter_0"] for _ in range(6)]

    assert counts([0.19, -0.09]) == [0] * 6
    assert "in the square" not in caplog.text
    assert counts(SQUARE_POS) == [0.5, 1.0, 1.5, 2.0, 2.5, 3.0]  # scaled
    assert caplog.text.count("the sheet is in the square") == 1
    assert counts([0.19, -0.09])[0] == 0
