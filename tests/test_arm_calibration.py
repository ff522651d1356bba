"""LeRobot's calibration files are judged by what is known of SO-101s; touches find what was planted; arm.json is read.

LeRobot's driver is replaced by a module of the same names, so that what is asked of it can be counted.
"""

import json
import sys
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from types import ModuleType, SimpleNamespace

import mujoco
import numpy as np
import pytest
from numpy.testing import assert_allclose
from test_runs import ROOT, assert_one_line, run

import arm_calibration
from arm_calibration import (
    CORNERS,
    POSTURES,
    TIP_RADIUS,
    Touch,
    TouchedArm,
    corner_places,
    find_faults,
    fit_touches,
    load_calibration,
    take_touches,
)
from env_paper_square import FINGERTIPS, JOINTS, SCENE_PATH, SQUARE_POS, PaperSquareVectorEnv, kinematics
from runs import UserError

GOOD = {  # ticks, as public calibrations have them
    "shoulder_pan": (700, 3424),
    "shoulder_lift": (870, 3219),
    "elbow_flex": (900, 3120),
    "wrist_flex": (850, 3178),
    "wrist_roll": (0, 4095),
    "gripper": (2030, 3505),
}


def lerobot_calibration(**changes):
    """A calibration file's content, with changes joint by joint."""
    joints = {
        name: {"id": k, "drive_mode": 0, "homing_offset": 100 * k, "range_min": low, "range_max": high}
        for k, (name, (low, high)) in enumerate(GOOD.items(), start=1)
    }
    for name, change in changes.items():
        joints[name] |= change
    return joints


@pytest.fixture
def home(tmp_path, monkeypatch):
    """LeRobot's folder of followers' calibrations, with that of the arm "mine"."""
    monkeypatch.setenv("HF_LEROBOT_CALIBRATION", str(tmp_path / "calibration"))
    folder = tmp_path / "calibration/robots/so_follower"
    folder.mkdir(parents=True)
    (folder / "mine.json").write_text(json.dumps(lerobot_calibration()))
    return folder


# LeRobot's calibration file


def test_a_good_calibration_has_no_faults(home):
    assert not any(find_faults(lerobot_calibration()).values())
    done = run(ROOT, "arm_calibration.py check --id mine")
    assert done.code == 0 and done.out.count(" ok") == 6 and "wrist_roll turns without stops" in done.out


@pytest.mark.parametrize(
    ("joint", "change", "fault"),
    [
        ("shoulder_lift", {"range_min": 0, "range_max": 4095}, "360 degrees: it wrapped"),
        ("wrist_flex", {"range_min": 3, "range_max": 4090}, "it wrapped"),
        ("elbow_flex", {"range_min": 1200}, "short sweep"),
        ("gripper", {"range_max": 3100}, "short sweep"),
        ("shoulder_pan", {"range_max": 3900}, "more than it can"),
        ("wrist_roll", {"range_min": 1000, "range_max": 3000}, "short sweep"),
        ("wrist_flex", {"homing_offset": -2048}, "homing_offset -2048"),
        ("shoulder_lift", {"drive_mode": 1}, "drive_mode 1"),
        ("shoulder_pan", {"id": 2}, "has the servo 2, not 1"),
        ("elbow_flex", {"range_min": 3120, "range_max": 900}, "3120 to 900 is none"),
        ("elbow_flex", {"range_max": 5000}, "is none within 0 to 4095"),
    ],
)
def test_each_fault_is_told_of_its_joint_alone(home, joint, change, fault):
    faults = find_faults(lerobot_calibration(**{joint: change}))
    assert [name for name, found in faults.items() if found] == [joint]
    assert len(faults[joint]) == 1 and fault in faults[joint][0]
    (home / "mine.json").write_text(json.dumps(lerobot_calibration(**{joint: change})))
    done = run(ROOT, "arm_calibration.py check --id mine")
    assert fault in done.out
    assert_one_line(done, f"{joint}: calibrate again")


def test_what_is_no_calibration_file_is_said(home):
    assert_one_line(run(ROOT, "arm_calibration.py check --id yours"), "yours.json")
    for content in ("no json", "[]", "{}", json.dumps(lerobot_calibration(gripper={"id": "six"}))):
        (home / "mine.json").write_text(content)
        assert_one_line(run(ROOT, "arm_calibration.py check --id mine"), "is not a calibration of LeRobot's")


def test_paths_are_those_of_lerobot(tmp_path, monkeypatch):
    path = arm_calibration.calibration_path
    for name in ("HF_LEROBOT_CALIBRATION", "HF_LEROBOT_HOME", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    end = "calibration/robots/so_follower/a.json"
    assert path("a") == tmp_path / ".cache/huggingface/lerobot" / end
    monkeypatch.setenv("HF_HOME", "/hf")
    assert str(path("a")) == f"/hf/lerobot/{end}"
    monkeypatch.setenv("HF_LEROBOT_HOME", "/lerobot")
    assert str(path("a")) == f"/lerobot/{end}"
    monkeypatch.setenv("HF_LEROBOT_CALIBRATION", "/other")
    assert str(path("a")) == "/other/robots/so_follower/a.json"


# Touches


def touches(args=None, **changes):
    arm = TouchedArm(args or Touch())
    vars(arm).update(changes)
    return arm, *take_touches(arm, Touch())


@pytest.mark.parametrize("seed", range(4))
def test_planted_errors_are_recovered(seed):
    arm, joints, corners = touches(Touch(seed=seed))
    assert np.abs(arm.offsets).max() > 0.01
    values, deviations, distances = fit_touches(joints, corners, 0.08)
    assert_allclose(np.degrees(values[:4] - arm.offsets[:4]), 0, atol=0.3)
    assert_allclose(values[5], arm.table_height, atol=0.001)
    assert_allclose(distances, 0, atol=0.003)
    assert (np.abs(values[:6] - [*arm.offsets, arm.table_height]) < 4 * deviations[:6]).all()


def test_wrist_roll_is_not_told_by_touches_and_the_deviation_says_so():
    _, joints, corners = touches()
    _, deviations, _ = fit_touches(joints, corners, 0.08)
    assert np.degrees(deviations[4]) > 0.8 and (np.degrees(deviations[1:4]) < 0.2).all()


def test_a_square_turned_about_the_base_is_told_together_with_the_pan():
    """Either is half a degree uncertain; what the camera and the arm make of it together is not."""
    turn, exact = np.radians(1.0), np.zeros(3)
    arm = TouchedArm(Touch(seed=2))
    cos, sin = np.cos(turn), np.sin(turn)
    square = np.append(np.array([[cos, -sin], [sin, cos]]) @ (SQUARE_POS - [0.0388, 0]) + [0.0388, 0], turn)
    arm, joints, corners = touches(Touch(seed=2), places=corner_places(square, 0.08), touch_error=exact)
    values, _, _ = fit_touches(joints, corners, 0.08)
    assert np.degrees(abs(values[0] - arm.offsets[0])) > 0.5
    found, expected = values[0] + values[8], arm.offsets[0] + turn  # the pan turns clockwise
    assert_allclose(np.degrees(found), np.degrees(expected), atol=0.1)


def test_a_square_put_elsewhere_is_found():
    square = np.array([*(SQUARE_POS + [0.004, 0.0]), 0.0])
    _, joints, corners = touches(Touch(sim_touch=0.0), places=corner_places(square, 0.08))
    values, _, _ = fit_touches(joints, corners, 0.08)
    assert_allclose(values[6:8], square[:2], atol=0.0015)


def test_the_rehearsed_postures_are_within_the_joint_ranges_and_touch_the_corner():
    arm = TouchedArm(Touch(sim_touch=0.0))
    scene = mujoco.MjModel.from_xml_path(str(SCENE_PATH))
    ranges, data = np.array([scene.joint(name).range for name in JOINTS]), mujoco.MjData(scene)
    for corner in range(len(CORNERS)):
        for tilt, turn in POSTURES:
            arm.put(corner, tilt, turn)
            assert ((arm.joints >= ranges[:, 0]) & (arm.joints <= ranges[:, 1])).all(), (corner, tilt, turn)
            data.qpos[:6] = arm.joints
            mujoco.mj_kinematics(scene, data)
            place = [*corner_places(np.array([*SQUARE_POS, 0]), 0.08)[corner], arm.table_height + TIP_RADIUS]
            assert_allclose(data.site(FINGERTIPS[0]).xpos, place, atol=1e-5)


def test_offsets_and_height_have_the_signs_of_the_environment():
    """An arm of the environment with these errors is where its reported joints and the fit's offsets say."""
    offset, height = np.array([0.03, -0.02, 0.03, 0.02, -0.03]), 0.003
    envs = PaperSquareVectorEnv(1, fixed={"offset": offset, "height": height})
    envs.reset(seed=0)
    tip = envs._fingertip[0]  # the table being at 0
    reached, _ = kinematics(envs.joint_measured[:, :5] + offset)
    assert_allclose(reached[0] - [0, 0, height], tip, atol=1e-3)
    wrong, _ = kinematics(envs.joint_measured[:, :5] - offset)
    assert np.linalg.norm(wrong[0] - [0, 0, height] - tip) > 0.005


def test_touch_in_simulation_writes_what_is_read(tmp_path):
    done = run(tmp_path, f"{ROOT}/arm_calibration.py touch --seed 3")
    assert done.code == 0, done.err
    calibration, arm = load_calibration(tmp_path / "arm.json"), TouchedArm(Touch(seed=3))
    assert_allclose(calibration.offsets[:4], arm.offsets[:4], atol=np.radians(0.3))
    assert_allclose(calibration.table_height, arm.table_height, atol=0.001)
    assert calibration.square.shape == (3,) and calibration.offsets.shape == (5,)


def test_trials_print_how_exact_it_is(tmp_path):
    done = run(tmp_path, f"{ROOT}/arm_calibration.py touch --trials 2")
    assert done.code == 0 and len(done.out.splitlines()) == 6 and not list(tmp_path.iterdir())


@pytest.fixture
def so101(home, monkeypatch):
    """LeRobot's driver as far as it is used, over a simulated arm; and somebody who presses Enter."""
    arm, calls, state = TouchedArm(Touch(seed=5)), [], SimpleNamespace(calibrated=True, port=True, slip=None)
    order = [(corner, *posture) for corner in range(4) for posture in POSTURES]

    class SO101Follower:
        def __init__(self, config):
            assert config.use_degrees and config.id == "mine" and config.port == "/dev/null"
            self.bus = SimpleNamespace(disable_torque=lambda: calls.append("torque off"))

        def connect(self, calibrate):
            assert calibrate is False  # else it would wait for somebody at the keyboard
            if not state.port:
                raise ConnectionError("no such port")
            calls.append("connect")

        @property
        def is_calibrated(self):
            return state.calibrated

        def get_observation(self):
            assert calls[1] == "torque off"
            if len(prompts) == 5 and "lost" not in calls:
                calls.append("lost")
                raise ConnectionError("no status packet")
            calls.append("read")
            observation = arm.get_observation()
            if calls.count("read") == 20:
                observation["elbow_flex.pos"] += 5.0  # still moving
            return observation

        def disconnect(self):
            calls.append("disconnect")

    module = ModuleType("lerobot.robots.so_follower")
    module.SO101Follower, module.SO101FollowerConfig = SO101Follower, SimpleNamespace
    for name in ("lerobot", "lerobot.robots"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    prompts = []

    def enter(prompt):
        """Move the arm to the next corner, unless the same is asked for again."""
        if prompts and prompt != prompts[-1]:
            number = len(set(prompts)) - 1
            corner, *posture = order[number]
            arm.put((corner + 1) % 4 if number == state.slip else corner, *posture)
        prompts.append(prompt)

    monkeypatch.setattr("builtins.input", enter)
    return SimpleNamespace(arm=arm, calls=calls, state=state, prompts=prompts)


HARDWARE = f"{ROOT}/arm_calibration.py touch --robot so101 --port /dev/null --id mine"


def test_touching_with_the_driver(so101, home, tmp_path):
    done = run(tmp_path, HARDWARE)
    assert done.code == 0, done.err
    assert so101.calls[:2] == ["connect", "torque off"] and so101.calls[-1] == "disconnect"
    assert so101.calls.count("lost") == 1 and so101.calls.count("read") == 2 * 16 + 2
    assert (
        len(so101.prompts) == 18
        and so101.prompts[4] == so101.prompts[5]
        and "16 of 16: outer corner far right, finger slanted" in so101.prompts[-1]
    )
    calibration = load_calibration(tmp_path / "arm.json", "mine")
    assert_allclose(calibration.offsets[:4], so101.arm.offsets[:4], atol=np.radians(0.3))
    with pytest.raises(UserError, match="is not of --id yours"):
        (home / "yours.json").write_text((home / "mine.json").read_text())
        load_calibration(tmp_path / "arm.json", "yours")
    (home / "mine.json").write_text(json.dumps(lerobot_calibration(wrist_roll={"homing_offset": 7})))
    with pytest.raises(UserError, match="as LeRobot has calibrated it last"):
        load_calibration(tmp_path / "arm.json", "mine")


def test_what_stops_touching(so101, home, tmp_path):
    so101.state.slip = 6
    assert_one_line(run(tmp_path, HARDWARE), "touch 7 is")
    assert so101.calls[-1] == "disconnect"
    so101.calls.clear()
    so101.prompts.clear()
    so101.state.calibrated = False
    assert_one_line(run(tmp_path, HARDWARE), "hold another calibration")
    assert so101.calls == ["connect", "disconnect"]
    so101.state.port = False
    assert_one_line(run(tmp_path, HARDWARE), "no arm at --port '/dev/null': no such port")
    (home / "mine.json").write_text(json.dumps(lerobot_calibration(gripper={"range_max": 2500})))
    assert_one_line(run(tmp_path, HARDWARE), "the calibration has faults")
    assert not (tmp_path / "arm.json").exists()


# arm.json


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("arm")
    arm_calibration.touch(replace(Touch(), output=str(folder / "arm.json")))
    return json.loads((folder / "arm.json").read_text())


def days_ago(days):
    return (datetime.now(timezone.utc) - timedelta(days=days)).isoformat()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"created": days_ago(31)}, "more than 30 days ago"),
        ({"created": days_ago(-1)}, "or to come"),
        ({"created": "yesterday"}, "is not what"),
        ({"created": "2030-01-01T00:00:00"}, "is not what"),  # of no time zone
        ({"offsets": [0, 0, 0.12, 0, 0]}, "elbow_flex is 6.9 degrees off"),
        ({"offsets": [0, float("nan"), 0, 0, 0]}, "shoulder_lift is nan degrees off"),
        ({"offsets": [0, 0, 0, 0]}, "offsets"),
        ({"table_height": -0.02}, "the table is at -20.0 mm"),
        ({"camera": {"square": [0.19, 0.12, 0]}}, "the tape square is 0 and 30 mm"),
        ({"camera": {}}, "is not what"),
        ({"residual": 0.004}, "touches are 4.0 mm off"),
        ({"residual": None}, "is not what"),
    ],
)
def test_a_stale_or_impossible_file_is_refused(written, changes, message, tmp_path):
    path = tmp_path / "arm.json"
    path.write_text(json.dumps(written | {"created": days_ago(29)}))
    load_calibration(path)
    path.write_text(json.dumps(written | changes))
    with pytest.raises(UserError, match=message):
        load_calibration(path)


def test_no_file_and_no_json(tmp_path):
    with pytest.raises(UserError, match="touch writes it"):
        load_calibration(tmp_path / "arm.json")
    (tmp_path / "arm.json").write_text("{")
    with pytest.raises(UserError, match="is not JSON"):
        load_calibration(tmp_path / "arm.json")
