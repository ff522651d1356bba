"""A policy on the arm: what may be sent, what is done of every fault, what is logged, and the simulated arm itself.

Nothing here has touched an arm. What LeRobot's driver does is tested on a bus of servos that are none, where it is:

    .venv-lerobot/bin/python -m pytest tests/test_real_arm.py
"""

import csv
import io
import json
import runpy
import shlex
import signal
import sys
import threading
import time
import types
from datetime import datetime, timezone
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from fake_bus import LOWEST, OVERLOAD, POSITION, TEMPERATURE, TORQUE, FakeBus
from gymnasium.vector import AutoresetMode

import simulated_arm
from arm_calibration import Touch, TouchedArm, fit_touches, load_calibration, take_touches
from base_policies import ZeroPolicy, joints_to_lerobot, joints_to_rad
from env_paper_square import JOINTS, SQUARE_POS, PaperSquareVectorEnv, make_observation
from eval import TEST_SEED, load_policy, play_episodes
from lerobot_dataset import load_demos, load_transitions
from real_arm import (
    CLEAR,
    COLUMNS,
    HOME,
    HOME_STEP,
    KEYS,
    SERVO_LIMITS,
    Args,
    Arm,
    Servos,
    Stop,
    fingertip_bottom,
    judge,
    limited,
    play_episode,
)
from runs import UserError
from simulated_arm import SimulatedArm, TrueSheet

ROOT = Path(__file__).resolve().parent.parent
CHECKPOINT = ROOT / "assets/ppo_residual.safetensors"
LOW, HIGH = PaperSquareVectorEnv(1, num_threads=1).model.actuator_ctrlrange.T
PRESSED = HOME + [0, 0.16, 0, 0, 0, 0]  # the fingertip on the sheet
NOMINAL = {"randomize_arm": False}
QUICK = "--clock virtual --sheet truth"


class Told(SimulatedArm):
    """A simulated arm without a clock that keeps what it was sent, rad, and fails at read k as `faults(k)` tells."""

    def __init__(self, faults=lambda k: None, **kwargs):
        super().__init__(**{"real_time": False, "camera": "", **kwargs})
        self.faults, self.reads, self.sent, self.disconnected = faults, 0, [], 0

    def get_observation(self):
        self.reads += 1
        fault = self.faults(self.reads)
        if isinstance(fault, Exception):
            raise fault
        return super().get_observation() | (fault or {})

    def send_action(self, action):
        self.sent.append(joints_to_rad(np.array([action[key] for key in KEYS])))
        return super().send_action(action)

    def disconnect(self):
        self.disconnected += 1
        super().disconnect()


def limits(**changes):
    return {"low": LOW, "high": HIGH, "act_scale": 0.02, "gap": np.radians(8), "depth": 0.005} | changes


def make_arm(robot, offsets=None, **changes):
    """An arm that takes its targets where it is, and its log."""
    log = io.StringIO()
    writer = csv.DictWriter(log, COLUMNS)
    writer.writeheader()
    robot.connect()
    arm = Arm(robot, np.zeros(5) if offsets is None else offsets, limits(**changes), writer)
    arm.start()
    return arm, log


def observe(target, last_action, pose, hold_counter, measured, tape=0.08):
    return make_observation(*(np.asarray(x)[None] for x in (target, last_action, pose, tape, hold_counter)))


def play(arm, policy, sheet=None, move_gripper=True, **flags):
    of_task = observe, PaperSquareVectorEnv(move_gripper=move_gripper).acting, sheet or TrueSheet(arm.robot), 0.08
    return play_episode(arm, policy, *of_task, 0, Args(**flags))


class Constant(ZeroPolicy):
    """One action for ever."""

    def __init__(self, *action):
        self.action = np.resize(action, (1, 6)).astype(float)

    def __call__(self, obs):
        return self.action


# The limits


def test_what_a_policy_may_want_is_sent_as_it_is():
    wanted = HOME + [0.02, -0.02, 0.01, 0, 0.02, -0.02]
    target, reason = limited(wanted, HOME, HOME, LOW, HIGH)
    np.testing.assert_allclose(target, wanted, atol=1e-12)
    assert reason == ""


@pytest.mark.parametrize(
    "wanted, known, word",
    [
        (HOME + np.nan, {}, "hold: the policy's action is not finite"),
        (HOME + [np.inf, 0, 0, 0, 0, 0], {}, "hold: the policy's action is not finite"),
        (HOME + [0.02, 0, 0, 0, 0, 0], {"measured": HOME - [0.13, 0, 0, 0, 0, 0]}, "hold: shoulder_pan would"),
        (PRESSED + [0, 0.02, 0, 0, 0, 0], {"last": PRESSED, "measured": PRESSED, "depth": -0.005}, "hold: the fing"),
        (HOME, {"misses": 1}, "hold: 1 reads"),
        (HOME, {"misses": 2}, "hold: 2 reads"),
        (HOME, {"misses": 3}, "stop: 3 reads"),
        (HOME, {"pose_age": 0.51}, "hold: the sheet was last seen 0.5 s ago"),
        (HOME, {"pose_age": 2.01}, "stop: the sheet was last seen 2.0 s ago"),
        (HOME, {"trouble": "elbow_flex is hot"}, "stop: elbow_flex is hot"),
        (HOME + np.nan, {"misses": 3}, "stop: 3 reads"),  # a stop comes first
        (HOME + np.nan, {"misses": 1}, "hold: the policy's action is not finite"),  # in their order
    ],
)
def test_each_limit_holds_or_stops(wanted, known, word):
    known = {"last": HOME, "measured": HOME} | known
    target, reason = limited(wanted, low=LOW, high=HIGH, **known)
    assert reason.startswith(word)
    np.testing.assert_array_equal(target, known["last"])


def test_a_step_is_no_longer_than_act_scale_and_no_joint_leaves_its_range():
    target, reason = limited(HOME + [1, -1, 0, 0, 0, 0], HOME, HOME, LOW, HIGH)
    np.testing.assert_allclose(target - HOME, [0.02, -0.02, 0, 0, 0, 0], atol=1e-12)
    assert reason == ""
    edge = np.array([HIGH[0] - 0.005, *HOME[1:]])
    target, _ = limited(edge + 0.02, edge, edge, LOW, HIGH)
    assert target[0] == HIGH[0]
    outside = np.array([HIGH[0] + 0.1, *HOME[1:]])  # folded by hand: back step by step
    assert limited(outside + 0.02, outside, outside, LOW, HIGH)[0][0] == outside[0]
    assert limited(outside - 0.02, outside, outside, LOW, HIGH)[0][0] == pytest.approx(outside[0] - 0.02)


def test_a_joint_that_is_far_from_its_target_may_only_come_nearer():
    measured = HOME - [0.3, 0, 0, 0, 0, 0]
    assert limited(HOME + [0.001, 0, 0, 0, 0, 0], HOME, measured, LOW, HIGH)[1].startswith("hold: shoulder_pan")
    back, reason = limited(HOME - [0.02, 0, 0, 0, 0, 0], HOME, measured, LOW, HIGH)
    assert back[0] == pytest.approx(HOME[0] - 0.02) and reason == ""


def test_a_fingertip_that_is_too_low_may_only_rise():
    deep = HOME + [0, 0.22, 0, 0, 0, 0]
    assert fingertip_bottom(deep) < -0.005
    assert limited(deep + [0, 0.01, 0, 0, 0, 0], deep, deep, LOW, HIGH)[1].startswith("hold: the fingertip")
    assert limited(deep - [0, 0.01, 0, 0, 0, 0], deep, deep, LOW, HIGH)[1] == ""
    near = HOME + [0, 0.18, 0, 0, 0, 0]
    assert -0.005 < fingertip_bottom(near) < 0  # on a table that is 10 mm higher it is too low
    assert limited(near + [0, 0.001, 0, 0, 0, 0], near, near, LOW, HIGH)[1] == ""
    higher = limited(near + [0, 0.001, 0, 0, 0, 0], near, near, LOW, HIGH, table_height=0.01)
    assert higher[1].startswith("hold: the fingertip")


def test_whatever_is_wrong_there_is_never_more_motion():
    rng = np.random.default_rng(0)
    words = set()
    for _ in range(3000):
        last = rng.uniform(LOW - 0.05, HIGH + 0.05)
        measured = last + rng.normal(0, 0.1, 6)
        wanted = last + rng.choice([0.01, 1.0, np.nan], p=[0.6, 0.3, 0.1]) * rng.normal(size=6)
        known = {"misses": rng.integers(4), "pose_age": rng.exponential(0.5), "table_height": rng.uniform(-0.01, 0.01)}
        target, reason = limited(wanted, last, measured, LOW, HIGH, **known)
        assert np.isfinite(target).all() and np.abs(target - last).max() <= 0.02 + 1e-12
        assert (target >= np.minimum(LOW, last)).all() and (target <= np.maximum(HIGH, last)).all()
        assert not reason or np.array_equal(target, last)
        far = np.maximum(np.abs(last - measured), np.radians(8))
        assert (np.abs(target - measured) <= far + 1e-9).all()
        words.add(reason[:9])
    assert {"", "hold: the", "stop: 3 r", "stop: the"} <= words


# Faults, on the simulated arm


def test_a_policy_of_nans_never_moves_the_arm():
    arm, log = make_arm(Told())
    episode = play(arm, Constant(np.nan), seconds=1)
    assert len(episode["frames"]) == 30 and not episode["stopped"]
    assert np.ptp(arm.robot.sent, axis=0).max() < 1e-9
    reasons = {row["reason"] for row in csv.DictReader(io.StringIO(log.getvalue())) if row["doing"] == "play"}
    assert reasons == {"hold: the policy's action is not finite"}


@pytest.mark.parametrize("moves", [True, False])
def test_the_gripper_moves_if_the_policys_task_says_so(moves):
    arm, _ = make_arm(Told())
    play(arm, Constant(0, 0, 0, 0, 0.5, 0.5), move_gripper=moves, seconds=1)
    travel = np.ptp(arm.robot.sent, axis=0)
    assert travel[4] > 0.1 and (travel[5] > 0.1) == moves and not travel[:4].any()


def test_a_jump_of_the_pose_moves_no_joint_by_more_than_a_step():
    policy, _, _ = load_policy(str(CHECKPOINT))
    arm, _ = make_arm(Told(seed=1))
    sheet = TrueSheet(arm.robot)
    update = sheet.update

    def jumping(frame, now):
        last = update(frame, now)
        sheet.last = last._replace(pose=last.pose + (arm.robot.steps // 7 % 2) * np.array([0.2, 0.3, 2.0]))

    sheet.update = jumping
    play(arm, policy, sheet, seconds=3)
    sent = np.array(arm.robot.sent)
    assert len(sent) > 60 and np.abs(np.diff(sent, axis=0)).max() <= 0.02 + 1e-9
    assert (sent >= LOW - 1e-9).all() and (sent <= HIGH + 1e-9).all()


def test_a_frozen_camera_holds_the_arm_and_then_stops_it():
    arm, _ = make_arm(Told(freeze_after=1.0, fixed={"lag": 2}))
    episode = play(arm, Constant(0.3, 0, 0, 0, 0, 0), seconds=10)
    assert episode["stopped"].startswith("the sheet was last seen 2.")
    moved = np.flatnonzero(np.abs(np.diff(arm.robot.sent, axis=0)).max(axis=1) > 1e-9)
    assert len(arm.robot.sent) == pytest.approx((1 + 2) * 30, abs=4)
    assert moved.max() + 1 == pytest.approx((1 + 0.5) * 30, abs=4)


def test_a_stalled_joint_is_not_pressed_on():
    stuck = joints_to_lerobot(HOME)[0]
    arm, _ = make_arm(Told(lambda k: {"shoulder_pan.pos": stuck}))
    episode = play(arm, Constant(1, 0, 0, 0, 0, 0), seconds=2)
    assert not episode["stopped"]
    assert np.degrees(arm.robot.sent[-1][0] - HOME[0]) <= 8 + 1e-9
    assert np.degrees(arm.robot.sent[-1][0] - HOME[0]) > 6


@pytest.mark.parametrize("error", [ConnectionError("no status packet"), TimeoutError("the frame is too old")])
def test_a_lost_read_holds_and_three_stop(error):
    arm, _ = make_arm(Told(lambda k: error if k in (10, 20, 21) or k > 40 else None))
    episode = play(arm, Constant(0.1, 0, 0, 0, 0, 0), seconds=5)
    assert "3 reads or commands in a row were lost" in episode["stopped"] and str(error) in episode["stopped"]
    still = np.flatnonzero(np.abs(np.diff(arm.robot.sent, axis=0)).max(axis=1) < 1e-9)
    assert len(still) == 3 + 2  # of the third the arm stops


def test_an_unplugged_bus_raises_at_the_start_in_one_line():
    robot = Told(lambda k: ConnectionError("no port"))
    robot.connect()
    arm = Arm(robot, np.zeros(5), limits(), csv.DictWriter(io.StringIO(), COLUMNS))
    with pytest.raises(UserError, match="does not answer: no port"):
        arm.start()


def test_a_sheet_that_is_not_seen_is_waited_for_and_then_given_up():
    arm, _ = make_arm(Told())
    blind = types.SimpleNamespace(last=None, update=lambda frame, now: None)
    episode = play(arm, Constant(1), blind)
    assert "the sheet is not seen" in episode["stopped"] and not episode["frames"]
    assert np.ptp(arm.robot.sent, axis=0).max() < 1e-9 and len(arm.robot.sent) == pytest.approx(60, abs=2)


@pytest.mark.parametrize("name", SERVO_LIMITS)
def test_a_servo_that_suffers_stops_the_arm_within_a_second(name):
    value = {}
    bus = types.SimpleNamespace(motors=dict.fromkeys(JOINTS), read=lambda what, joint: value.get((what, joint), 0))
    servos = Servos(bus)
    assert not any(servos.look() for _ in range(60))
    value[name, "elbow_flex"] = -SERVO_LIMITS[name] if name == "Present_Load" else SERVO_LIMITS[name]
    looks = [servos.look() for _ in range(36)]
    assert any("elbow_flex has" in look for look in looks)
    if name != "Present_Temperature":  # a peak is none
        assert sum(map(bool, looks)) == 1


def test_the_arm_goes_home_slowly_and_off_the_table_first():
    arm, _ = make_arm(Told(**NOMINAL))
    assert CLEAR > fingertip_bottom(PRESSED) > -0.005
    arm.target = PRESSED.copy()
    while np.abs(arm.target - arm.measured).max() > 0.1:  # the soft arm goes there
        arm.robot.send_action(dict(zip(KEYS, joints_to_lerobot(PRESSED).tolist(), strict=True)))
        arm.read()
    arm.robot.sent.clear()
    arm.go_home()
    way = np.array([PRESSED, *arm.robot.sent])
    assert np.abs(np.diff(way, axis=0)).max() <= HOME_STEP + 1e-9
    heights = [fingertip_bottom(joints) for joints in way]
    assert min(heights) >= heights[0] - 1e-6 and heights[10] > CLEAR
    np.testing.assert_allclose(way[-1], HOME, atol=1e-9)


def test_the_arm_gives_up_going_home_where_something_blocks_it():
    start = HOME + [0.8, 0, 0, 0, 0, 0]
    stuck = dict(zip(KEYS, joints_to_lerobot(start).tolist(), strict=True))
    arm, _ = make_arm(Told(lambda k: stuck))
    with pytest.raises(Stop, match="does not get home: shoulder_pan"):
        arm.go_home()
    assert np.degrees(np.abs(np.array(arm.robot.sent) - start)).max() <= 8 + 1e-9


# What a policy sees, and how it is judged


def test_the_observation_is_the_environments():
    policy, task, _ = load_policy(str(CHECKPOINT))
    envs = task(1, autoreset_mode=AutoresetMode.DISABLED)
    obs, _ = envs.reset(seed=[TEST_SEED])
    policy.reset(np.ones(1, bool))
    expected = []
    for _ in range(100):
        expected.append(obs[0])
        obs, _, terminations, truncations, _ = envs.step(policy(obs))
        if terminations[0] or truncations[0]:
            break
    arm, _ = make_arm(Told(seed=TEST_SEED, task=task))
    arm.target = HOME.copy()
    episode = play(arm, policy, limit_gap=45.0)
    seen = np.array([frame[0] for frame in episode["frames"]])
    assert len(expected) > 50 and envs.drawn["lag"][0, 0] > 0
    # While nothing was seen inside: the environment counts no later than the runner
    np.testing.assert_allclose(seen[: len(expected)], expected, atol=2e-4)


def test_an_episode_is_judged_as_eval_judges_it():
    seeds = [TEST_SEED, TEST_SEED + 1, TEST_SEED + 4]
    policy, task, _ = load_policy(str(CHECKPOINT))
    task = partial(task, force_weight=0.0)
    for policy in (policy, policy.base_policy):  # noqa: B020
        for seed in seeds:
            expected = play_episodes(policy, [seed], task, 1)
            envs = task(1, autoreset_mode=AutoresetMode.DISABLED)
            obs, _ = envs.reset(seed=[seed])
            policy.reset(np.ones(1, bool))
            poses, done, norms = [envs.sheet_pose[0]], False, []
            while not done:
                obs, _, terminations, truncations, _ = envs.step(policy(obs))
                poses.append(envs.sheet_pose[0])
                norms.append(np.linalg.norm(getattr(policy, "residual_action", 0.0)))
                done = terminations[0] or truncations[0]
            episode = {"poses": np.array(poses), "norms": np.array(norms), "solved": terminations[0], "stopped": ""}
            for name, value in judge(episode, 0.08).items():
                if name in ("failure", "was_inside", "inside"):
                    assert value == expected[name][0] or name != "failure"
                else:
                    assert value == pytest.approx(expected[name][0], abs=1e-6), name
            assert judge(episode | {"stopped": "lost"}, 0.08)["failure"] == ("" if terminations[0] else "stopped")


# Calibration


def calibration(path, **changes):
    facts = {"offsets": [0.01, -0.02, 0.0, 0.03, 0.0], "table_height": 0.001, "camera": {"square": [*SQUARE_POS, 0.0]}}
    facts |= {"created": datetime.now(timezone.utc).isoformat(), "residual": 0.0005}
    path.write_text(json.dumps({name: value for name, value in (facts | changes).items() if value is not None}))
    return str(path)


def test_a_calibration_is_read_and_a_wrong_one_refused(tmp_path, monkeypatch):
    path = tmp_path / "arm.json"
    flags = "--clock virtual --sheet truth --seconds 0.1 --calibration-file arm.json"
    calibration(path)
    (robot,) = run_script(flags, tmp_path, monkeypatch)
    np.testing.assert_allclose(robot.sent[-1], HOME - [0.01, -0.02, 0.0, 0.03, 0.0, 0.0], atol=1e-5)
    wrong = [{"offsets": [0.3, 0, 0, 0, 0]}, {"offsets": [0.0] * 6}, {"table_height": 0.02}, {"table_height": "nan"}]
    for change in (*wrong, {"offsets": [float("nan")] * 5}, {"created": None}, {"created": "yesterday"}):
        with pytest.raises(UserError, match="arm.json"):
            load_calibration(calibration(path, **change))
    path.write_text("[]")
    with pytest.raises(UserError, match="touch"):
        load_calibration(path)
    with pytest.raises(UserError, match="days ago"):
        load_calibration(calibration(path, created="2020-01-01T00:00:00+00:00"))


def test_offsets_that_touches_told_undo_the_errors_of_the_zeros():
    touched = TouchedArm(Touch(seed=1))
    found, _, _ = fit_touches(*take_touches(touched, Touch()), 0.08)
    errors = touched.offsets * [1, 1, 1, 1, 0]  # of the roll, touches tell nothing
    nothing = {"delay": 0, "backlash": 0, "servo_friction": 0.0, "stiffness": 1000.0}
    for offsets, off in ((errors, 0.003), (found[:5] * [1, 1, 1, 1, 0], 0.008), (np.zeros(5), 0.05)):
        arm, _ = make_arm(Told(fixed={"offset": errors, **nothing}), offsets)
        arm.go_home()
        for _ in range(30):
            arm.send(HOME)
        arm.read()
        links = arm.robot.envs._qpos[0, :5]
        assert np.abs(links - HOME[:5]).max() < off and np.abs(arm.measured - HOME).max() < 0.01
        assert off < 0.01 or np.abs(links - HOME[:5]).max() > 0.02


# The simulated arm


def test_the_simulated_arm_has_lerobots_interface():
    robot = SimulatedArm(real_time=False, camera="")
    assert list(robot.action_features) == KEYS == list(robot.observation_features)
    assert not robot.is_connected and robot.is_calibrated and len(robot.cameras) == 0
    robot.connect(calibrate=False)
    assert robot.is_connected
    sent = robot.send_action(dict.fromkeys(KEYS, 1000.0))
    np.testing.assert_allclose(list(sent.values()), joints_to_lerobot(HIGH))
    with pytest.raises(ValueError, match="finite"):
        robot.send_action(dict.fromkeys(KEYS, float("nan")))
    observation = robot.get_observation()
    assert list(observation) == KEYS and all(isinstance(value, float) for value in observation.values())
    robot.disconnect()
    assert not robot.is_connected


def test_one_action_is_one_step_of_the_environment():
    robot, envs = SimulatedArm(seed=3, real_time=False, camera=""), PaperSquareVectorEnv(1, num_threads=1)
    robot.connect()
    envs.reset(seed=3)
    rng, targets = np.random.default_rng(0), HOME
    for step in range(40):
        action = rng.uniform(-1, 1, (1, 6))
        targets = np.clip(targets + 0.02 * action[0], LOW, HIGH)
        envs.step(action)
        robot.send_action(dict(zip(KEYS, joints_to_lerobot(targets).tolist(), strict=True)))
        assert robot.now() == pytest.approx((step + 1) / 30)
        read = [robot.get_observation()[key] for key in KEYS]
        np.testing.assert_allclose(read, joints_to_lerobot(envs.joint_measured[0]), atol=0.1)
        np.testing.assert_allclose(robot.moment.seen_pose, envs.seen_pose[0], atol=1e-4)


@pytest.mark.parametrize("delay", [0, 2])
def test_actions_are_late_by_the_delay(delay):
    robot = SimulatedArm(real_time=False, camera="", fixed={"delay": delay, "servo_friction": 0.0, "backlash": 0.0})
    robot.connect()
    moved = []
    for _ in range(6):
        robot.send_action(dict(zip(KEYS, joints_to_lerobot(HOME + [0.3, 0, 0, 0, 0, 0]).tolist(), strict=True)))
        moved.append(robot.get_observation()["shoulder_pan.pos"] > 0.5)
    assert moved.index(True) in (delay, delay + 1) and not any(moved[:delay])


def test_reads_are_lost_as_often_as_asked_for():
    robot = SimulatedArm(real_time=False, camera="", lost_reads=0.2)
    robot.connect()
    lost = 0
    for _ in range(1000):
        try:
            robot.get_observation()
        except ConnectionError:
            lost += 1
    assert 150 < lost < 250


def test_another_episode_is_another_arm_and_the_same_again():
    robot, drawn = SimulatedArm(seed=5, real_time=False, camera=""), []
    robot.connect()
    for seed in (5, 6, 5):
        robot.reset(seed)
        drawn.append((robot.envs.drawn["stiffness"].copy(), robot.moment.sheet_pose))
    for k in range(2):
        assert not np.array_equal(drawn[0][k], drawn[1][k])
        np.testing.assert_array_equal(drawn[0][k], drawn[2][k])


def test_frames_are_late_by_the_lag_and_a_frozen_camera_shows_nothing_new():
    robot = SimulatedArm(seed=2, real_time=False, fixed={"lag": 3, "delay": 0}, freeze_after=8.5 / 30)
    robot.connect()
    shown, taken = [], {}
    for step in range(14):
        observation = robot.get_observation()
        shown.append(id(observation["top"]))
        taken |= {id(frame): round(30 * when) for when, frame in robot.frames}
        targets = HOME + [0.02 * step, 0, 0, 0, 0, 0]
        robot.send_action(dict(zip(KEYS, joints_to_lerobot(targets).tolist(), strict=True)))
    assert observation["top"].shape == (480, 640, 3) and observation["top"].dtype == np.uint8
    assert [taken[frame] for frame in shown] == [0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 8, 8]
    own = robot.envs.render_frame(camera="top")
    robot.look()
    robot.freeze_after = np.inf
    robot.look()
    np.testing.assert_array_equal(robot.frames[-1][1], own)  # what it draws is the arm as it is
    robot.disconnect()


def test_in_real_time_the_arm_goes_on_by_itself():
    robot, others = SimulatedArm(seed=2, fixed={"lag": 1, "delay": 0}), set(threading.enumerate())
    robot.connect()
    try:
        first = robot.get_observation()
        robot.send_action(dict(zip(KEYS, joints_to_lerobot(HOME + [0.4, 0, 0, 0, 0, 0]).tolist(), strict=True)))
        steps, began = robot.steps, time.perf_counter()
        time.sleep(1.5)
        rate = (robot.steps - steps) / (time.perf_counter() - began)
        assert 1 < rate < 31  # 30, but for what else the machine does
        after = robot.get_observation()
        assert after["shoulder_pan.pos"] > first["shoulder_pan.pos"] + 15  # the last target holds
        assert (after["top"] != first["top"]).any() and len(robot.frames) > 3
        assert robot.now() - robot.frames[-1][0] < 1.0
        robot.reset(9)
        assert robot.get_observation()["shoulder_pan.pos"] < 3 and robot.frames[0][0] >= robot.start
    finally:
        robot.disconnect()
    assert not robot.threads and set(threading.enumerate()) <= others


# The script


def run_script(flags, folder, monkeypatch, arm=None, at=(0, None)):
    """Run real_arm.py in a folder; returns the robots that it made. With `at` = (k, act), act(robot) at command k."""
    made, actions = [], [at[1]] * bool(at[1])

    class Script(Told):
        def __init__(self, *args, **kwargs):
            kwargs |= {"seed": args[0], "real_time": args[1], "camera": args[2]}
            super().__init__(**kwargs)
            made.append(self)

        def send_action(self, action):
            if len(self.sent) == at[0] and actions:
                actions.pop()(self)
            return super().send_action(action)

    monkeypatch.setattr(simulated_arm, "SimulatedArm", arm or Script)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["real_arm.py", *shlex.split(flags)])
    for module in (sys, threading):
        monkeypatch.setattr(module, "excepthook", module.excepthook)
    numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
    handlers = [signal.getsignal(number) for number in numbers]
    try:
        runpy.run_path(str(ROOT / "real_arm.py"), run_name="__main__")
    finally:
        for number, handler in zip(numbers, handlers, strict=True):
            signal.signal(number, handler)
    return made


def read_log(folder):
    (path,) = folder.glob("runs/real_arm__*/steps.csv")
    return list(csv.DictReader(path.open()))


def test_a_rehearsal_is_logged_counted_plotted_and_recorded(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")  # which LeRobot's environment may not have
    run_script(f"{QUICK} --episodes 2 --record demos --plot --seed 2000000", tmp_path, monkeypatch)
    (folder,) = tmp_path.glob("runs/real_arm__2000000__*")
    (row,) = json.loads((folder / "results.json").read_text())["policies"].values()
    assert [episode["success"] for episode in row["episodes"]] == [True, True]
    assert [episode["seed"] for episode in row["episodes"]] == [2_000_000, 2_000_001]
    assert row["mean_residual_norm"] > 0.1 and row["fingertip_force_n"]["median"] > 0.5
    assert (folder / "results.png").stat().st_size > 5000 and (folder / "steps.png").stat().st_size > 5000
    rows = read_log(tmp_path)
    assert {row["doing"] for row in rows} == {"home", "play"} and list(rows[0]) == COLUMNS
    played = [row for row in rows if row["doing"] == "play"]
    demos = load_demos("demos", joints="commanded")
    assert len(demos["state"]) == len(played) == sum(episode["length"] for episode in row["episodes"])
    sent = np.array([[float(row[f"target_{joint}"]) for joint in JOINTS] for row in played])
    np.testing.assert_allclose(demos["action"], joints_to_lerobot(sent), atol=0.01)
    measured = np.array([[float(row[f"measured_{joint}"]) for joint in JOINTS] for row in played])
    np.testing.assert_allclose(load_demos("demos")["state"], joints_to_lerobot(measured), atol=0.01)
    learned_from = load_transitions("demos")  # by sac_residual.py
    wanted = np.array([[float(row[f"action_{joint}"]) for joint in JOINTS] for row in played])
    agree = np.abs(learned_from["actions"] - wanted) < 0.01
    assert agree[:, :5].mean() > 0.9 and learned_from["terminations"].sum() == 2  # limits changed some
    run_script(f"{QUICK} --episodes 1 --record demos --append --base-only --seconds 1", tmp_path, monkeypatch)
    assert load_demos("demos")["episode"].max() == 2


def test_results_have_the_fields_of_eval(tmp_path, monkeypatch):
    from eval import summarize

    run_script(f"{QUICK} --seconds 0.5 --base-only", tmp_path, monkeypatch)
    (path,) = tmp_path.glob("runs/*/results.json")
    ((name, row),) = json.loads(path.read_text())["policies"].items()
    expected = summarize(play_episodes(ZeroPolicy(), [0], partial(PaperSquareVectorEnv, max_episode_steps=3)))
    assert name == "base jacobian" and row.keys() == expected.keys()
    assert row["episodes"][0].keys() == expected["episodes"][0].keys()
    assert row["failures"] == {"never touched": 1}


def interrupt(robot):
    signal.raise_signal(signal.SIGINT)


def fail(robot):
    raise ZeroDivisionError("a bug")


def close_window(robot):
    robot.show = lambda: True


@pytest.mark.parametrize(
    "what", [interrupt, lambda robot: signal.raise_signal(signal.SIGTERM), fail, close_window, "lost", "done"]
)
def test_every_way_out_brings_the_arm_home_and_lets_go(what, tmp_path, monkeypatch):
    def act(robot):
        if what == "lost":
            reads = robot.reads
            robot.faults = lambda k: ConnectionError("lost") if k < reads + 5 else None
        elif what != "done":
            what(robot)

    folder, made = tmp_path, []
    connect = Told.connect
    monkeypatch.setattr(Told, "connect", lambda self: (made.append(self), connect(self)))
    if what is fail:
        with pytest.raises(ZeroDivisionError):
            run_script(f"{QUICK} --seconds 3", folder, monkeypatch, at=(70, act))
    else:
        run_script(f"{QUICK} --seconds 3", folder, monkeypatch, at=(70, act))
    (robot,) = made
    np.testing.assert_allclose(robot.sent[-1], HOME, atol=1e-6)
    assert robot.disconnected == 1 and not robot.is_connected
    assert np.abs(np.diff(robot.sent, axis=0)).max() <= 0.02 + 1e-9
    way = np.abs(np.diff(robot.sent[-15:], axis=0))
    assert way.max() <= HOME_STEP + 1e-9
    assert read_log(folder)[-1]["doing"] == "home"


def test_a_second_ctrl_c_lets_go_at_once(tmp_path, monkeypatch, capsys):
    def twice(robot):
        signal.raise_signal(signal.SIGINT)

    class Impatient(Told):
        def __init__(self, *args, **kwargs):
            super().__init__(**kwargs | {"seed": args[0]})

        def send_action(self, action):
            if len(self.sent) in (70, 74):
                self.sent.append(self.sent[-1])
                signal.raise_signal(signal.SIGINT)
            return super().send_action(action)

        def disconnect(self):
            super().disconnect()
            assert len(self.sent) < 80

    run_script(f"{QUICK} --seconds 3", tmp_path, monkeypatch, arm=Impatient)
    assert "not home: Ctrl-C; the torque goes off here" in capsys.readouterr().out


def test_a_dry_run_sends_nothing(tmp_path, monkeypatch, capsys):
    (robot,) = run_script(f"{QUICK} --dry-run --seconds 2", tmp_path, monkeypatch)
    assert not robot.sent and robot.disconnected == 1 and robot.steps == 60
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("joints")]
    assert len(lines) == 4 and all("action [" in line and "fingertip [" in line for line in lines)


def test_a_step_waits_for_a_key(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("builtins.input", lambda prompt: asked.append(prompt))
    run_script(f"{QUICK} --step --seconds 0.2", tmp_path, monkeypatch)
    assert [prompt.split(",")[0] for prompt in asked] == [f"step {k}" for k in range(6)]


@pytest.mark.parametrize(
    "flags, word",
    [
        ("--robot so101 --sheet truth", "LeRobot|simulated arm only"),
        ("--fixed delay 99", "from 0 to 30"),
        ("--calibration-file nowhere.json", "nowhere.json"),
        ("--base-only --model-path assets/ppo.safetensors", "has no base"),
        ("--model-path nowhere", "no checkpoint at nowhere"),
    ],
)
def test_what_is_wrong_is_said_before_anything_moves(flags, word, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=word):
        run_script(f"{QUICK} {flags}" if "--sheet" not in flags else flags, tmp_path, monkeypatch)
    assert not (tmp_path / "runs").exists()


def test_without_lerobot_one_line_says_what_to_install(tmp_path, monkeypatch):
    for name in ("lerobot", "lerobot.cameras.opencv"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match="docs/real_arm.md"):
        run_script("--robot so101 --port x --id y", tmp_path, monkeypatch)


class Eye:
    """A stand-in for `SheetCamera`: it sees the sheet at one place in every new frame."""

    frames = 0

    def __init__(self, tape_half_size, markers, arm):
        self.last = None

    def update(self, frame, now):
        assert frame.shape == (480, 640, 3)
        Eye.frames += 1
        self.last = simulated_arm.Sight(np.array([0.19, -0.09, 0.1]), now, 1.0)
        return self.last


def test_the_camera_is_asked_for_every_new_frame(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sheet_camera", types.SimpleNamespace(SheetCamera=Eye))
    Eye.frames = 0
    run_script("--clock virtual --seconds 1 --fixed lag 0", tmp_path, monkeypatch)
    assert Eye.frames == 1 + 30
    played = [row for row in read_log(tmp_path) if row["doing"] == "play"]
    assert len(played) == 30 and {row["sheet_yaw"] for row in played} == {"0.1"}


@pytest.mark.parametrize("markers", ["", "--no-markers"])
def test_the_camera_sees_the_sheet_of_the_simulated_arm(markers, tmp_path, monkeypatch):
    """The whole way: rendered frames, with markers or with print, their poses, the episode to its end."""
    camera = pytest.importorskip("sheet_camera").SheetCamera
    seen, look = [], camera._by_markers
    monkeypatch.setattr(camera, "_by_markers", lambda self, frame: seen.append(look(self, frame)) or seen[-1])
    run_script(f"--clock virtual --seed 2000000 {markers}", tmp_path, monkeypatch)
    assert any(seen) is not bool(markers)
    played = [row for row in read_log(tmp_path) if row["doing"] == "play"]
    assert float(played[-1]["hold_counter"]) >= 7  # of 8
    assert abs(float(played[0]["sheet_x"]) - 0.1679) < 0.003 and abs(float(played[0]["sheet_y"]) + 0.1079) < 0.003


# LeRobot's driver, on servos that are none


SWEEPS = {"shoulder_pan": 2500, "shoulder_lift": 2300, "elbow_flex": 2200, "wrist_flex": 2200, "wrist_roll": 3700}
SWEEPS["gripper"] = 1300


@pytest.fixture
def bus(tmp_path, monkeypatch):
    """A bus with a calibration file of its servos, and a camera of black frames."""
    pytest.importorskip("lerobot")
    pytest.importorskip("scservo_sdk")
    from lerobot.motors.feetech import feetech
    from lerobot.robots.so_follower import so_follower

    def patient(handler, packet_length):  # the driver waits for 50 ms, in which a busy machine may do something else
        handler.packet_start_time, handler.packet_timeout = handler.getCurrentTime(), 300.0

    monkeypatch.setattr(feetech, "patch_setPacketTimeout", patient)

    ranges = [(2047 - sweep // 2, 2047 + sweep // 2) for sweep in SWEEPS.values()]
    folder = tmp_path / "calibration/robots/so_follower"
    folder.mkdir(parents=True)
    names = ("id", "drive_mode", "homing_offset", "range_min", "range_max")
    joints = {joint: dict(zip(names, (k + 1, 0, 0, *ranges[k]), strict=True)) for k, joint in enumerate(SWEEPS)}
    (folder / "mine.json").write_text(json.dumps(joints))
    base = "lerobot.robots.robot.HF_LEROBOT_CALIBRATION"
    monkeypatch.setattr(base, tmp_path / "calibration")
    monkeypatch.setattr(so_follower, "make_cameras_from_configs", lambda configs: {"top": Camera()})
    monkeypatch.setitem(sys.modules, "sheet_camera", types.SimpleNamespace(SheetCamera=Eye))
    bus = FakeBus(ranges)
    for k, degrees in enumerate(joints_to_lerobot(HOME)[:5]):  # by hand, near home
        bus.put(k + 1, POSITION, 2047 + round(degrees * 4095 / 360) + 60 * (k == 0))
    yield bus
    assert not any(bus.torques())  # whatever it was
    bus.unplug()


class Camera:
    is_connected = False
    height, width = 480, 640

    def connect(self):
        self.is_connected = True

    def disconnect(self):
        self.is_connected = False

    def read_latest(self):
        return np.zeros((480, 640, 3), np.uint8)

    async_read = read_latest


def so101(bus, flags, tmp_path, monkeypatch):
    command = f"--robot so101 --port {bus.port} --id mine {flags}"
    return run_script(command, tmp_path, monkeypatch)


def degrees_sent(bus):
    """(commands, 6): five joints in degrees, the gripper in percent, as the servos got them."""
    sent = np.array([list(ticks.values()) for ticks in bus.sent], dtype=float)
    sent[:, :5] = (sent[:, :5] - 2047) * 360 / 4095
    sent[:, 5] = (sent[:, 5] - bus.get(6, LOWEST)) * 100 / SWEEPS["gripper"]
    return sent


def test_lerobots_driver_is_sent_home_plays_and_lets_go(bus, tmp_path, monkeypatch):
    so101(bus, "--seconds 1", tmp_path, monkeypatch)
    sent = degrees_sent(bus)
    assert bus.sent[0] == {**bus.sent[0], 1: 2047 + 60}  # first where it is: no jump when the torque comes on
    assert np.abs(np.diff(sent[:, :5], axis=0)).max() <= np.degrees(0.02) + 0.1
    np.testing.assert_allclose(sent[-1], joints_to_lerobot(HOME), atol=0.1)  # truncated to ticks
    played = [row for row in read_log(tmp_path) if row["doing"] == "play"]
    assert len(played) == 30
    measured = np.array([[float(row[f"measured_{joint}"]) for joint in JOINTS] for row in played])
    targets = np.array([[float(row[f"target_{joint}"]) for joint in JOINTS] for row in played])
    behind = targets[:-1, :5] - measured[1:, :5]  # an arm that is there at once, but for what the driver truncates
    assert behind.min() > -1e-4 and behind.max() < np.radians(360 / 4095) + 1e-4 and behind.mean() > 0.0003
    (row,) = json.loads(next(tmp_path.glob("runs/*/results.json")).read_text())["policies"].values()
    assert row["failures"] == {"never touched": 1}


def test_a_dry_run_leaves_the_servos_limp(bus, tmp_path, monkeypatch):
    torques = []
    monkeypatch.setattr(Eye, "update", lambda self, frame, now: torques.append(bus.torques()))
    so101(bus, "--dry-run --seconds 0.5", tmp_path, monkeypatch)
    assert not bus.sent and len(torques) == 15 and not np.any(torques)


@pytest.mark.parametrize("way", ["Ctrl-C", "bug", "overload", "hot", "lost", "few lost"])
def test_the_torque_is_off_after_every_way_out(way, bus, tmp_path, monkeypatch, capsys):
    update, count = Eye.update, []

    def act(self, frame, now):
        update(self, frame, now)
        count.append(len(bus.sent))
        assert all(bus.torques())
        if len(count) != 10:
            return
        if way == "Ctrl-C":
            signal.raise_signal(signal.SIGINT)
        elif way == "bug":
            raise ZeroDivisionError
        elif way == "overload":
            bus.status[3] = OVERLOAD
        elif way == "hot":
            bus.memory[2][TEMPERATURE] = 75
        elif way == "lost":
            bus.lost = 1.0
            threading.Timer(0.6, setattr, (bus, "lost", 0.0)).start()
        else:
            bus.lost = 0.02

    monkeypatch.setattr(Eye, "update", act)
    if way == "bug":
        with pytest.raises(ZeroDivisionError):
            so101(bus, "--seconds 2", tmp_path, monkeypatch)
    else:
        so101(bus, "--seconds 2", tmp_path, monkeypatch)
    said = capsys.readouterr().out
    words = {"Ctrl-C": "stopped by Ctrl-C", "overload": "elbow_flex reports an error", "lost": "in a row were lost"}
    words |= {"hot": "shoulder_lift has temperature 75", "bug": "", "few lost": "wrote"}
    assert words[way] in said
    assert not any(bus.torques())
    if way in ("Ctrl-C", "bug", "few lost"):
        np.testing.assert_allclose(degrees_sent(bus)[-1], joints_to_lerobot(HOME), atol=0.1)
    if way == "few lost":
        rows = read_log(tmp_path)
        assert any("were lost" in row["reason"] for row in rows)


def test_an_unplugged_bus_ends_in_one_line(bus, tmp_path, monkeypatch):
    update, count = Eye.update, []

    def act(self, frame, now):
        update(self, frame, now)
        count.append(0)
        if len(count) == 10:
            bus.unplug()

    monkeypatch.setattr(Eye, "update", act)
    with pytest.raises(UserError, match="switch the arm's power off"):
        so101(bus, "--seconds 2", tmp_path, monkeypatch)
    for memory in bus.memory.values():
        memory[TORQUE] = 0  # by the switch


def test_servos_of_another_calibration_are_refused(bus, tmp_path, monkeypatch):
    bus.put(3, LOWEST, 1000)
    with pytest.raises(UserError, match="lerobot-calibrate"):
        so101(bus, "", tmp_path, monkeypatch)
    assert not bus.sent
    with pytest.raises(UserError, match="lerobot-calibrate --robot.id=other"):
        run_script(f"--robot so101 --port {bus.port} --id other", tmp_path, monkeypatch)
    with pytest.raises(UserError, match="cannot connect"):
        run_script("--robot so101 --port /dev/nowhere --id mine", tmp_path, monkeypatch)


def test_the_calibrated_range_is_not_left(bus, tmp_path, monkeypatch):
    class Pusher(ZeroPolicy):
        def __call__(self, obs):
            return np.array([[0, 0, 0, 0, 0, -1.0]])

    monkeypatch.setattr("eval.load_policy", partial(load_pusher, Pusher()))
    so101(bus, "--seconds 2", tmp_path, monkeypatch)
    assert degrees_sent(bus)[:, 5].min() >= -0.01


def load_pusher(policy, path, script=""):
    _, task, checkpoint = load_policy(str(CHECKPOINT))
    return policy, task, checkpoint
