"""The base policies: kinematics, one step of the controller, whole episodes, blends and the factory."""

from types import SimpleNamespace

import mujoco
import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal

import base_policies
from base_policies import (
    BASES,
    CONTACT_HEIGHT,
    BaseFlags,
    HybridPolicy,
    JacobianIKPolicy,
    ZeroPolicy,
    joints_to_lerobot,
    joints_to_rad,
    make_base,
    to_lerobot,
)
from env_paper_square import (
    FINGERTIPS,
    OBS,
    OBS_SCALE,
    OBS_ZERO,
    SCENE_PATH,
    SQUARE_POS,
    PaperSquareEnv,
    PaperSquareVectorEnv,
    kinematics,
    to_si,
)
from eval import play_episodes
from runs import UserError, load_checkpoint, save_checkpoint


def edited(observations, **values):
    """Observations with some entries replaced, given in SI units."""
    observations = observations.copy()
    for name, value in values.items():
        observations[:, OBS[name]] = (np.asarray(value) - OBS_ZERO[OBS[name]]) * OBS_SCALE[OBS[name]]
    return observations


def first_observations(num_envs=1):
    return PaperSquareVectorEnv(num_envs).reset(seed=0)[0]


@pytest.fixture(scope="module")
def met_observations():
    """Observations (320, obs_dim) that the controller meets on its way, all phases among them, and shaken."""
    envs, policy = PaperSquareVectorEnv(16), JacobianIKPolicy()
    rng, met = np.random.default_rng(0), []
    observations, _ = envs.reset(seed=0)
    for step in range(200):
        observations, *_ = envs.step(policy(observations) + rng.normal(0.0, 0.1, (16, 6)))
        if step % 10 == 0:
            met.append(observations)
    return np.concatenate(met)


# Kinematics


def test_kinematics_are_those_of_the_model():
    model = mujoco.MjModel.from_xml_path(str(SCENE_PATH))
    data, site = mujoco.MjData(model), model.site(FINGERTIPS[0]).id
    postures = np.random.default_rng(0).uniform(*model.actuator_ctrlrange.T, (50, 6))
    positions, jacobians = kinematics(postures)
    assert positions.shape == (50, 3) and jacobians.shape == (50, 3, 5)
    for posture, position, jacobian in zip(postures, positions, jacobians, strict=True):
        data.qpos[:6] = posture
        mujoco.mj_kinematics(model, data)
        mujoco.mj_comPos(model, data)
        expected = np.zeros((3, model.nv))
        mujoco.mj_jacSite(model, data, expected, None, site)
        assert_allclose(position, data.site_xpos[site], rtol=0, atol=1e-9)
        assert_allclose(jacobian, expected[:, :5], rtol=0, atol=1e-9)


# One step of the Jacobian controller


def test_actions_are_in_range_alone_and_of_the_observation_alone(met_observations):
    """Rows of a batch do not see each other, calls do not see those before, the gripper stays as it is."""
    for policy in (JacobianIKPolicy(), JacobianIKPolicy(speed_limit=1.0, gain=1.0)):
        actions = policy(met_observations)
        assert actions.shape == (len(met_observations), 6) and np.abs(actions).max() <= 1.0
        assert_array_equal(actions[:, 5], 0.0)
        policy.reset(np.ones(len(met_observations), dtype=bool))
        assert_array_equal(actions, np.concatenate([policy(observation[None]) for observation in met_observations]))
    assert np.abs(actions).max() == 1.0  # the faster one was clipped


@pytest.mark.parametrize(("act_scale", "speed_limit"), [(0.02, 0.016), (0.05, 0.015)])
def test_speed_limit_scales_the_whole_step(met_observations, act_scale, speed_limit):
    limited = JacobianIKPolicy(act_scale=act_scale, speed_limit=speed_limit)(met_observations) * act_scale  # rad
    free = JacobianIKPolicy(act_scale=100.0, speed_limit=np.inf)(met_observations) * 100.0
    assert np.abs(limited).max() <= speed_limit + 1e-12
    fast = np.abs(free).max(axis=1) > speed_limit
    assert fast.sum() > 10 and (~fast).sum() > 10
    assert_allclose(limited[~fast], free[~fast], rtol=0, atol=1e-12)
    scale = speed_limit / np.abs(free[fast]).max(axis=1, keepdims=True)
    assert_allclose(limited[fast], scale * free[fast], rtol=0, atol=1e-12)


def test_errors_are_taken_at_the_joint_targets_not_at_the_joint_angles(met_observations):
    """So a press cannot wind up: where the arm hangs behind its targets makes no difference to the command."""
    policy, joint_target = JacobianIKPolicy(), to_si(met_observations)[:, OBS["joint_target"]]
    lag = np.random.default_rng(0).normal(0.0, 0.02, joint_target.shape)
    lagging = edited(met_observations, joint_measured=joint_target - lag)
    assert_array_equal(policy(lagging), policy(met_observations))
    elsewhere = edited(met_observations, joint_target=joint_target + lag)
    assert np.abs(policy(elsewhere) - policy(met_observations)).max(axis=1).min() > 1e-2


# Phases


def target(sheet, fingertip):
    """The fingertip's target (3,) for a sheet (xy) and a fingertip (xyz), in m."""
    rows = {"sheet_pos": sheet, "sheet_to_square": SQUARE_POS - sheet, "fingertip_pos": fingertip}
    observations = edited(first_observations(), **rows, fingertip_to_sheet=sheet - fingertip[:2])
    return JacobianIKPolicy().fingertip_target(to_si(observations), fingertip[None])[0]


SHEET = np.array([0.2, -0.08])
HIGH, LOW = 0.025, CONTACT_HEIGHT


@pytest.mark.parametrize(
    ("sheet", "offset", "height", "way", "target_height"),
    [  # way: of the target, ahead of the fingertip
        pytest.param(SHEET, [0.03, 0.04], HIGH, "sheet", "hover_height", id="above"),
        pytest.param(SHEET, [0.002, -0.001], HIGH, "sheet", "press_height", id="press"),
        pytest.param(SHEET, [0.004, -0.003], LOW, "square", "press_height", id="drag"),
        pytest.param(SQUARE_POS + [0.003, -0.004], [0.0, 0.0], LOW, "square", "press_height", id="drag, near the goal"),
        pytest.param(SQUARE_POS + [0.002, -0.003], [0.02, 0.0], LOW, None, "RELEASE_HEIGHT", id="lift"),
        pytest.param(SQUARE_POS + [0.002, -0.003], [0.02, 0.0], HIGH, "sheet", "RELEASE_HEIGHT", id="lifted"),
    ],
)
def test_target_of_each_phase(sheet, offset, height, way, target_height):
    *xy, z = target(sheet, np.array([*(sheet + offset), height]))
    assert z == getattr(JacobianIKPolicy(), target_height)
    expected = {"sheet": -np.array(offset), "square": SQUARE_POS - sheet, None: np.zeros(2)}[way]
    length = np.linalg.norm(expected)
    expected = expected * min(1.0, JacobianIKPolicy.LEAD / max(length, 1e-9))
    assert_allclose(xy - sheet - offset, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("offset", "height", "phase"),
    [
        (0.009, HIGH, "press"),
        (0.011, HIGH, "above"),
        (0.049, HIGH, "above"),
        (0.009, LOW, "drag"),
        (0.011, LOW, "drag"),  # a drag begun within 1 cm is held on to up to 5 cm
        (0.049, LOW, "drag"),
        (0.051, LOW, "above"),
        (0.009, CONTACT_HEIGHT + 0.0012, "drag"),
        (0.009, CONTACT_HEIGHT + 0.0018, "press"),
        (0.03, CONTACT_HEIGHT + 0.0018, "above"),
    ],
)
def test_drag_is_held_on_to_over_a_wider_radius_than_it_takes_to_begin(offset, height, phase):
    fingertip, policy = np.array([*(SHEET + [offset, 0.0]), height]), JacobianIKPolicy()
    dx, dy, _ = target(SHEET, fingertip) - fingertip
    assert target(SHEET, fingertip)[2] == (policy.hover_height if phase == "above" else policy.press_height)
    way_x, way_y = SQUARE_POS - SHEET if phase == "drag" else SHEET - fingertip[:2]
    assert dx * way_y == pytest.approx(dy * way_x, abs=1e-6) and dx * way_x + dy * way_y > 0


def test_heights_are_above_and_below_contact():
    assert JacobianIKPolicy.RELEASE_HEIGHT > JacobianIKPolicy.LOW_HEIGHT > CONTACT_HEIGHT
    policy = JacobianIKPolicy(press_depth=0.003, hover_height=0.04)
    assert policy.press_height == pytest.approx(CONTACT_HEIGHT - 0.003) and policy.hover_height == 0.04


# Whole episodes


@pytest.mark.parametrize("yaw", [0.0, 0.25, -0.25])
def test_jacobian_policy_centres_a_sheet_and_leaves_it_turned(yaw):
    env, policy, ended = PaperSquareEnv(randomize=False), JacobianIKPolicy(), False
    observation, _ = env.reset(seed=0)
    env.envs.batch.qpos[0, [9, 12]] = np.cos(yaw / 2), np.sin(yaw / 2)
    while not ended:
        observation, _, terminated, truncated, info = env.step(policy(observation[None])[0])
        ended = terminated or truncated
    assert info["is_success"] == (yaw == 0.0)
    assert yaw == 0.0 or (info["dist_to_goal"] < 0.005 and info["orientation_error"] > 0.12)


def test_jacobian_policy_half_solves_the_task_and_fails_for_the_right_reason():
    episodes = play_episodes(JacobianIKPolicy(), range(3_000_000, 3_000_064))
    success = episodes["success"] > 0
    assert 0.20 <= success.mean() <= 0.55
    assert (episodes["final_distance_m"] > 0.02).mean() < 0.05  # not stuck
    assert (episodes["final_yaw_error_rad"][~success] > 0.05).all()


# Zero, hybrid


class ConstantPolicy:
    """A base that always says the same and keeps the masks it was reset with."""

    def __init__(self, value):
        self.value, self.masks = value, []

    def __call__(self, obs, mask=None):
        return np.full((len(obs), 6), self.value)

    def reset(self, mask):
        self.masks.append(mask)


def observations_at(*distances):
    """One observation per distance from the sheet to the square, in m."""
    observations = first_observations(len(distances))
    directions = np.stack([np.cos(np.arange(len(distances))), np.sin(np.arange(len(distances)))], axis=1)
    return edited(observations, sheet_to_square=np.asarray(distances)[:, None] * directions)


def test_blend_is_the_mean_by_weights_of_any_scale(met_observations):
    jacobian = JacobianIKPolicy()
    policy = HybridPolicy([jacobian, ConstantPolicy(0.5), ZeroPolicy()], [2.0, 1.0, 1.0])
    assert_allclose(policy(met_observations), 0.5 * jacobian(met_observations) + 0.125, rtol=0, atol=1e-12)


def test_switch_takes_turns_by_the_way_of_the_sheet():
    """Of the nominal 0.18 m, 20 % belong to the first base, 50 % to the second, 30 % to the third."""
    policy = HybridPolicy([ConstantPolicy(v) for v in (0.1, 0.2, 0.3)], [2.0, 5.0, 3.0], "switch")
    behind = np.array([0.0, 0.19, 0.21, 0.5, 0.69, 0.71, 1.0])
    actions = policy(observations_at(*(0.18 * (1 - behind))))
    assert actions.shape == (7, 6)
    assert_array_equal(actions, np.repeat([[0.1], [0.1], [0.2], [0.2], [0.2], [0.3], [0.3]], 6, axis=1))


@pytest.mark.parametrize("weights", [[1.0, 0.0], [0.0, 1.0]])
def test_switch_never_asks_a_base_of_weight_zero_however_far_the_sheet(weights):
    policy = HybridPolicy([ConstantPolicy(0.0), ConstantPolicy(1.0)], weights, "switch")
    assert_array_equal(policy(observations_at(0.001, 0.1, 0.18, 0.24, 0.5)), weights[1])


def test_hybrid_forwards_the_reset():
    bases = [ConstantPolicy(0.0), ConstantPolicy(1.0)]
    mask = np.array([True, False, True])
    HybridPolicy(bases, [0.5, 0.5]).reset(mask)
    for base in bases:
        assert len(base.masks) == 1
        assert_array_equal(base.masks[0], mask)


@pytest.mark.parametrize(
    ("count", "weights", "message"),
    [
        (2, [1.0], "found 2 bases and 1 weights"),
        (0, [], "found 0 bases"),
        (2, [0.0, 0.0], "must not all be zero"),
        (2, [-0.5, 1.5], "must not be negative"),
        (2, [np.nan, 1.0], "hybrid weights"),
    ],
)
def test_hybrid_refuses_what_it_cannot_use(count, weights, message):
    with pytest.raises(UserError, match=message):
        HybridPolicy([ZeroPolicy()] * count, weights)


# Imitation-learned bases


class CountingNetwork:
    """Step k of the n-th chunk that it is asked for moves all joints by n + k / 10 deg."""

    chunk_size, n_action_steps, temporal_ensemble_coeff = 4, 3, 0.0

    def __init__(self):
        self.asked = 0

    def to(self, device):
        return self

    def predict(self, state, environment_state):
        numbers = self.asked + torch.arange(len(state))
        self.asked += len(state)
        moves = numbers[:, None] + 0.1 * torch.arange(self.chunk_size)  # (num, chunk_size), deg
        return state[:, None] + moves.cumsum(1)[:, :, None]


def frozen(monkeypatch, act_scale=np.pi, joints="commanded", observe_measured=True, **attributes):
    network = CountingNetwork()
    vars(network).update(attributes)
    script = SimpleNamespace(make_network=lambda checkpoint: network)
    monkeypatch.setattr(base_policies, "load_module", lambda name, defines: script)
    checkpoint = {"script": "imitator", **({"args": {"joints": joints}} if joints else {})}  # LeRobot has no args
    return make_base(
        "il", SimpleNamespace(observe_measured=observe_measured), act_scale=act_scale, checkpoint=checkpoint
    )


def moved(policy, observations, mask=None):
    """What the policy does to the first joint of each environment, deg."""
    return np.rad2deg(policy(observations, mask)[:, 0] * policy.act_scale)


def test_lerobot_units_are_degrees_and_percent_of_the_grippers_travel():
    low, high = mujoco.MjModel.from_xml_path(str(SCENE_PATH)).actuator_ctrlrange.T
    assert_allclose(joints_to_lerobot(low), [*np.rad2deg(low[:5]), 0.0], atol=1e-9)
    assert_allclose(joints_to_lerobot(high), [*np.rad2deg(high[:5]), 100.0])
    assert_allclose(joints_to_rad(joints_to_lerobot(low + 0.3 * (high - low))), low + 0.3 * (high - low))
    observations = edited(first_observations(3), joint_measured=low)
    state, environment_state = to_lerobot(observations, PaperSquareVectorEnv)
    assert state.dtype == environment_state.dtype == np.float32
    assert_allclose(state[0], [0.0, np.rad2deg(-0.14), np.rad2deg(0.52), np.rad2deg(1.19), 0.0, 24.716], atol=0.05)
    assert_array_equal(environment_state, observations[:, 12:27])  # all but the joints and the last action
    state, environment_state = to_lerobot(observations, PaperSquareVectorEnv, measured=True)
    assert_allclose(state, joints_to_lerobot(low)[None].repeat(3, axis=0), atol=1e-4)
    assert_array_equal(environment_state, observations[:, 12:27])


@pytest.mark.parametrize(("joints", "row"), [("commanded", 0.1), ("measured", 0.2), (None, 0.2)])
def test_a_network_sees_the_joints_that_it_was_trained_on(monkeypatch, joints, row):
    policy, seen = frozen(monkeypatch, joints=joints), []
    policy.network.predict = lambda state, _: seen.append(state) or state[:, None].expand(-1, 4, -1)
    observations = edited(first_observations(2), joint_target=np.full(6, 0.1), joint_measured=np.full(6, 0.2))
    assert_allclose(policy(observations) * policy.act_scale, row - 0.1, atol=1e-6)  # on from the joint target
    assert_allclose(seen[0], joints_to_lerobot(np.full((2, 6), row)), atol=1e-4)
    assert policy.measured == (row == 0.2)
    if policy.measured:
        with pytest.raises(UserError, match="add --observe-measured"):
            frozen(monkeypatch, joints=joints, observe_measured=False)
    else:
        frozen(monkeypatch, joints=joints, observe_measured=False)


def test_a_chunk_is_played_as_increments_and_asked_for_again_when_used_up(monkeypatch):
    policy, lag = frozen(monkeypatch, joints="measured"), np.rad2deg(0.02)  # the first target is the network's own
    observations = edited(first_observations(), joint_target=np.zeros(6), joint_measured=np.full(6, -0.02))
    assert_allclose(moved(policy, observations), 0.0 - lag, atol=1e-4)
    # A residual took the arm away: the chunk goes on from there
    far = edited(observations, joint_target=np.full(6, 0.5), joint_measured=np.full(6, 0.48))
    assert_allclose(moved(policy, far), 0.1, atol=1e-4)
    assert_allclose(moved(policy, far), 0.2, atol=1e-4)
    assert policy.network.asked == 1
    assert_allclose(moved(policy, far), 1.0 - lag, atol=1e-4)  # three of four were played
    assert_allclose(moved(policy, edited(far, joint_measured=np.full(6, 0.4))), 1.1, atol=1e-4)


def test_chunks_and_pointers_are_each_environments_own(monkeypatch):
    policy, observations = frozen(monkeypatch), first_observations(3)
    policy.reset(np.ones(3, dtype=bool))
    assert_allclose(moved(policy, observations), [0.0, 1.0, 2.0], atol=1e-4)
    policy.reset(np.array([False, True, False]))  # the second starts an episode: a new chunk, the others go on
    assert_allclose(moved(policy, observations), [0.1, 3.0, 2.1], atol=1e-4)
    last = moved(policy, observations[:1], np.array([True, False, False]))  # the first ended: its row alone
    assert_allclose(last, [0.2], atol=1e-4)
    policy.reset(np.array([True, False, False]))
    assert_allclose(moved(policy, observations), [4.0, 3.1, 2.2], atol=1e-4)
    assert_allclose(moved(policy, observations), [4.1, 3.2, 5.0], atol=1e-4)
    assert_allclose(moved(policy, observations), [4.2, 6.0, 5.1], atol=1e-4)


def test_temporal_ensemble_is_the_weighted_mean_of_all_predictions_for_a_step(monkeypatch):
    coeff, chunks = 0.3, []
    policy = frozen(monkeypatch, temporal_ensemble_coeff=coeff)
    rng = np.random.default_rng(0)

    def predict(state, environment_state):
        chunks.append(torch.from_numpy(rng.normal(0.0, 3.0, (len(state), 4, 6))))
        return chunks[-1]

    policy.network.predict = predict
    observations = edited(first_observations(2), joint_target=np.zeros(6))
    starts = np.zeros(2, dtype=int)  # the second environment starts an episode at step 3
    for step in range(8):
        if step == 3:
            policy.reset(np.array([False, True]))
            starts[1] = 3
        action = policy(observations)
        for env, start in enumerate(starts):
            asked = range(max(start, step - 3), step + 1)  # when the predictions for this step were made
            weights = [np.exp(-coeff * i) for i in range(len(asked))]  # the oldest first
            expected = sum(w * chunks[t][env, step - t].numpy() for w, t in zip(weights, asked, strict=True))
            assert_allclose(action[env] * policy.act_scale, joints_to_rad(expected / sum(weights)), atol=1e-6)


def test_increments_are_clipped_and_a_reset_forgets_another_number_of_environments(monkeypatch):
    policy = frozen(monkeypatch)
    for num_envs in (3, 1, 2):
        policy.reset(np.ones(num_envs, dtype=bool))
        first = policy.network.asked
        assert_allclose(moved(policy, first_observations(num_envs)), first + np.arange(num_envs), atol=1e-4)
    policy = frozen(monkeypatch, act_scale=0.02)
    policy.network.asked = 5
    assert_array_equal(policy(first_observations(2)), np.ones((2, 6)))


# The factory


@pytest.mark.parametrize("name", BASES)
def test_every_base_is_built_from_default_flags_or_says_what_it_lacks(name):
    try:
        policy = make_base(name, BaseFlags(), act_scale=0.05)
    except UserError as error:
        assert "needs --" in str(error) and "\n" not in str(error)
        policy = make_base(name, BaseFlags(il_checkpoint="assets/act.safetensors"), act_scale=0.05)
    policy.reset(np.ones(2, dtype=bool))
    action = policy(first_observations(2))
    assert action.shape == (2, 6) and np.abs(action).max() <= 1.0


def test_flags_reach_the_bases():
    flags = BaseFlags(hybrid_bases=("zero", "jacobian"), hybrid_weights=(3, 1), hybrid_mode="switch", ik_gain=0.3)
    hybrid = make_base("hybrid", flags, act_scale=0.05)
    zero, jacobian = hybrid.policies
    assert (type(zero), type(jacobian)) == (ZeroPolicy, JacobianIKPolicy)
    assert (jacobian.act_scale, jacobian.gain, hybrid.mode) == (0.05, 0.3, "switch")
    assert_allclose(hybrid.weights, [0.75, 0.25])


def test_a_missing_or_foreign_checkpoint_is_an_error_of_one_line(tmp_path):
    for name in ("il", "hybrid"):
        with pytest.raises(UserError, match="needs --il-checkpoint"):
            make_base(name, BaseFlags(hybrid_bases=("il", "zero")))
    state = load_checkpoint("assets/act.safetensors")
    save_checkpoint({key: state[key] for key in ("script", "args")}, tmp_path / "state")  # of a run
    for path, message in (
        ("nowhere", "no checkpoint at nowhere"),
        ("assets/ppo_residual.safetensors", r"ppo_residual\.py does not define make_network"),
        (str(tmp_path / "state"), r"not a policy's checkpoint of act\.py"),
    ):
        with pytest.raises(UserError, match=message) as error:
            make_base("il", BaseFlags(il_checkpoint=path))
        assert "\n" not in str(error.value)


class NoisyPolicy(JacobianIKPolicy):
    """A base with a generator, of which it says nothing."""

    def __init__(self):
        super().__init__()
        self.rng = np.random.default_rng(3)

    def __call__(self, obs, mask=None):
        return super().__call__(obs, mask) + self.rng.normal(size=(len(obs), 6))


def test_the_state_of_a_base_is_all_of_its_attributes():
    policy, observations = HybridPolicy([NoisyPolicy(), ZeroPolicy()], [1.0, 1.0]), first_observations(2)
    policy(observations)
    state = policy.state_dict()
    expected = policy(observations)
    other = HybridPolicy([NoisyPolicy(), ZeroPolicy()], [1.0, 1.0])
    other.load_state_dict(state)
    assert_array_equal(other(observations), expected)


def test_a_base_reads_the_rows_of_its_own_environment():
    """In an environment with one more row, in front, the controller acts as ever."""

    class Longer(PaperSquareVectorEnv):
        OBS_ROWS = {"extra": ([0.0], [1.0]), **PaperSquareVectorEnv.OBS_ROWS}
        OBS = {"extra": slice(0, 1), **{name: slice(s.start + 1, s.stop + 1) for name, s in OBS.items()}}
        to_si = staticmethod(lambda obs: np.concatenate([obs[:, :1], to_si(obs[:, 1:])], axis=1))

    observations = first_observations(3)
    longer = np.concatenate([np.full((3, 1), 7.0), observations], axis=1)
    assert_array_equal(make_base("jacobian", BaseFlags(), Longer)(longer), JacobianIKPolicy()(observations))
