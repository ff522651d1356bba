"""eval.py: causes of failure, disturbances and sweeps, overrides of the task, plots and films."""

import json
import runpy
import shlex
import sys
from pathlib import Path

import mujoco.viewer
import numpy as np
import pytest

import eval as evaluation
from base_policies import JacobianIKPolicy
from env_paper_square import OBS, OBS_DIM, SHEET_HALF_SIZE, PaperSquareVectorEnv, to_si

ROOT = Path(__file__).resolve().parent.parent
SEEDS = range(2_000_000, 2_000_003)
OUTCOME = ("success", "return", "length", "final_distance_m", "final_yaw_error_rad")


def run_eval(flags, monkeypatch, folder):
    """Run eval.py as `python eval.py flags` would, in `folder`; returns what it wrote to results.json."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["eval.py", *shlex.split(flags)])
    runpy.run_path(str(ROOT / "eval.py"), run_name="__main__")
    return json.loads((folder / "eval_results" / "results.json").read_text())


@pytest.fixture
def short_episodes(monkeypatch):
    """Episodes of 40 steps; the environments that were made, as (arguments, environment)."""
    made = []

    def make(*args, **kwargs):
        envs = PaperSquareVectorEnv(*args, max_episode_steps=40, **kwargs)
        made.append((kwargs, envs))
        return envs

    monkeypatch.setattr(evaluation, "PaperSquareVectorEnv", make)
    return made


# Why an episode failed


def fits(x, y, yaw, tape_half_size):
    """Whether all four corners of a sheet at (x, y) from the square's centre lie inside the tape."""
    corners = np.array([[1, 1], [1, -1], [-1, 1], [-1, -1]]) * SHEET_HALF_SIZE
    rotation = np.array([[np.cos(yaw), -np.sin(yaw)], [np.sin(yaw), np.cos(yaw)]])
    return np.abs(corners @ rotation.T + [x, y]).max() <= tape_half_size


def test_room_is_where_the_corners_fit():
    rng = np.random.default_rng(0)
    outcomes = []
    for _ in range(4000):
        tape_half_size, yaw = rng.uniform(0.075, 0.095), rng.uniform(-np.pi, np.pi)
        x, y = rng.uniform(-0.04, 0.04, 2)
        yaw_error = abs(yaw - np.pi / 2 * round(yaw / (np.pi / 2)))
        lengthwise, across = (x, y) if round(yaw / (np.pi / 2)) % 2 == 0 else (y, x)
        expected = fits(x, y, yaw, tape_half_size)
        bounds = evaluation.room(np.array(yaw_error), tape_half_size)
        assert bool((np.abs([lengthwise, across]) <= bounds).all()) == expected
        assert (bounds[0] >= 0) == fits(0, 0, yaw, tape_half_size)
        outcomes.append(expected)
    assert 100 < sum(outcomes) < 3900


CASES = {  # cause: what differs from a sheet that was dragged near the square and left there, almost straight
    "": {"success": 1},
    "never touched": {"moved_m": 0.0009, "reach_m": 0.5},
    "out of reach": {"reach_m": 0.43, "was_inside": 1},
    "left the square": {"was_inside": 1, "approach_m": 0.01},
    "time ran out": {"approach_m": 0.006, "final_yaw_error_rad": 0.3},
    "turned": {"final_yaw_error_rad": 0.13},
    "off-centre": {"final_yaw_error_rad": 0.12},
}


def test_every_failure_gets_its_cause():
    usual = {"success": 0, "moved_m": 0.2, "reach_m": 0.2, "was_inside": 0, "inside": 0, "approach_m": 0.004}
    usual |= {"final_yaw_error_rad": 0.0}
    cases = [usual | change for change in CASES.values()]
    episodes = {name: np.array([case[name] for case in cases]) for name in usual}
    assert evaluation.classify_failures(episodes, 0.08).tolist() == list(CASES)
    narrow = evaluation.classify_failures(episodes, 0.0795)  # the yaw that just fitted does no longer
    assert narrow.tolist() == [*list(CASES)[:-1], "turned"]
    episodes["inside"][-1] = 1  # a step or two more, and it had been held for long enough
    assert evaluation.classify_failures(episodes, 0.08)[-1] == "time ran out"


def test_the_arm_reaches_as_far_as_the_constant_says():
    kinematics = JacobianIKPolicy().kinematics
    joints = np.random.default_rng(0).uniform([0, 1.4, -1.5, -0.3, -0.5], [0, 1.74, -1.0, 0.3, 0.1], (200_000, 5))
    fingertip, _ = kinematics(joints)
    reach = np.linalg.norm(fingertip[:, :2] - evaluation.ARM_AXIS, axis=1)[np.abs(fingertip[:, 2] - 0.009) < 0.0005]
    assert evaluation.ARM_REACH - 0.002 < reach.max() < evaluation.ARM_REACH + 0.001


class ScriptedEnvs(PaperSquareVectorEnv):
    """The sheet of each environment is carried along `path(seed, step)`, (x, y, yaw)."""

    path = None

    def reset(self, *, seed=None, options=None):
        obs, infos = super().reset(seed=seed, options=options)
        self.seeds = list(seed)
        return obs, infos

    def step(self, actions):
        for i, seed in enumerate(self.seeds):
            x, y, yaw = self.path(seed, self._episode_steps[i] + 1)
            self._qpos[i, 6:13] = x, y, 0.0005, np.cos(yaw / 2), 0, 0, np.sin(yaw / 2)
            self._qvel[i] = 0
        self.batch.forward()
        return super().step(actions)


def test_play_records_what_tells_failures_apart(monkeypatch):
    def path(self, seed, step):
        square = {0: (0.19, 0.09), 1: (0.19, 0.09), 2: (0.19, 0.09), 3: (0.19, -0.05 + 0.001 * step), 4: (0.6, 0.0)}
        x, y = square[seed]
        inside = seed == 0 and step in (3, 4)
        return x + (0.03 if seed == 0 and not inside else 0.0), y + (0.04 if seed == 2 else 0.0), 0.3 * (seed == 1)

    monkeypatch.setattr(ScriptedEnvs, "path", path)
    make = ScriptedEnvs
    monkeypatch.setattr(evaluation, "PaperSquareVectorEnv", lambda n, **kw: make(n, max_episode_steps=45, **kw))
    for num_envs in (5, 2):
        episodes = evaluation.play_episodes(evaluation.make_base_policy("zero"), range(5), {}, num_envs)
        expected = ["left the square", "turned", "off-centre", "time ran out", "out of reach"]
        assert episodes["failure"].tolist() == expected
        assert episodes["approach_m"][3] == pytest.approx(0.03, abs=0.001)
    row = evaluation.summarize(episodes)
    assert sum(row["failures"].values()) == 5 and row["episodes"][1]["failure"] == "turned"


def test_an_arm_at_rest_never_touches_the_sheet(short_episodes):
    episodes = evaluation.play_episodes(evaluation.make_base_policy("zero"), range(5), {}, num_envs=2)
    assert set(episodes["failure"]) == {"never touched"}  # in the environments' later episodes too


def test_failures_are_counted_and_tabulated():
    failure = np.array(["turned", "off-centre", "turned", "", "turned"])
    episodes = {name: np.ones(5) for name in (*OUTCOME, "residual_norm", "seed")}
    episodes |= {"success": failure == "", "failure": failure, "forces": np.ones(2)}
    row = evaluation.summarize({**episodes, "residual_norm_by_step": np.array([1.23456, 0.5])})
    assert list(row["failures"].items()) == [("turned", 3), ("off-centre", 1)]
    assert row["residual_norm_by_step"] == [1.2346, 0.5]
    assert list(row["episodes"][0])[-1] == "failure"
    assert evaluation.format_table({"base": row}).endswith("  3 turned, 1 off-centre")
    assert evaluation.format_table({"base": {**row, "failures": {}}}).endswith("  -")


# Disturbances


class Counting:
    """Acts by its step in the episode, (i + 1) / 100 at step i, and has a residual of that norm."""

    def __call__(self, obs):
        self.steps += 1
        actions = np.zeros((len(obs), 6))
        actions[:, 0] = self.steps / 100
        self.residual_action = actions
        return actions

    def reset(self, mask):
        self.steps = np.where(mask, 0, getattr(self, "steps", np.zeros(len(mask))))


class RecordingEnvs(PaperSquareVectorEnv):
    """Ends each environment's episodes after a length of its own, and keeps the first entry of every action."""

    def step(self, actions):
        obs, rewards, terminations, truncations, infos = super().step(actions)
        self.log.append((self._episode_steps.copy(), np.array(actions)[:, 0], ~self.paused))
        return obs, rewards, terminations, self._episode_steps >= 5 + 2 * np.arange(self.num_envs), infos


@pytest.mark.parametrize("delay", [0, 1, 3, 20])
def test_actions_arrive_so_many_steps_late(delay, monkeypatch):
    monkeypatch.setattr(evaluation, "PaperSquareVectorEnv", RecordingEnvs)
    monkeypatch.setattr(RecordingEnvs, "log", [], raising=False)
    episodes = evaluation.play_episodes(Counting(), range(8), {}, num_envs=3, disturbance=("delay", delay))
    assert len(set(episodes["length"])) == 3
    for steps, actions, playing in RecordingEnvs.log:
        expected = np.maximum(steps - delay, 0) / 100  # zero until the first one arrives
        np.testing.assert_allclose(actions[playing], expected[playing])


def test_residual_norm_by_step_is_the_mean_of_those_still_playing(monkeypatch):
    monkeypatch.setattr(evaluation, "PaperSquareVectorEnv", RecordingEnvs)
    monkeypatch.setattr(RecordingEnvs, "log", [], raising=False)
    episodes = evaluation.play_episodes(Counting(), range(8), {}, num_envs=3)
    longest = int(episodes["length"].max())
    np.testing.assert_allclose(episodes["residual_norm_by_step"], np.arange(1, longest + 1) / 100)
    zero = evaluation.play_episodes(evaluation.make_base_policy("zero"), range(3), {}, num_envs=3)
    assert evaluation.summarize(zero)["residual_norm_by_step"] == []


@pytest.mark.parametrize("disturbance", [("friction", 1.0), ("mass", 1.0), ("delay", 0), ("noise", 0.0)])
def test_no_disturbance_is_the_same_to_the_bit(disturbance):
    plain = evaluation.play_episodes(JacobianIKPolicy(), SEEDS, {})
    disturbed = evaluation.play_episodes(JacobianIKPolicy(), SEEDS, {}, disturbance=disturbance)
    for name in (*OUTCOME, "forces"):
        np.testing.assert_array_equal(plain[name], disturbed[name])


@pytest.mark.parametrize("name", evaluation.SWEEPS)
def test_every_disturbance_changes_the_outcome_and_is_reproducible(name):
    value = {"friction": 0.5, "mass": 2.0, "xy": 0.02, "yaw": 0.1, "noise": 0.003, "delay": 3}[name]
    plain = evaluation.play_episodes(JacobianIKPolicy(), SEEDS, {})
    many = evaluation.play_episodes(JacobianIKPolicy(), SEEDS, {}, disturbance=(name, value))
    few = evaluation.play_episodes(JacobianIKPolicy(), SEEDS, {}, 2, disturbance=(name, value))
    assert (plain["return"] != many["return"]).all()
    np.testing.assert_array_equal(many["return"], few["return"])


@pytest.mark.parametrize("name", ["friction", "mass"])
def test_factors_reach_the_simulation(name, short_episodes):
    for factor in (1.0, 0.5):
        evaluation.play_episodes(evaluation.make_base_policy("zero"), SEEDS, {}, disturbance=(name, factor))
    (_, nominal), (_, scaled) = short_episodes
    sheet, geom = nominal.model.body("sheet").id, nominal.model.geom("sheet").id
    with_sheet = (nominal.model.pair_geom1 == geom) | (nominal.model.pair_geom2 == geom)
    assert with_sheet.sum() == 3
    for i in range(len(SEEDS)):
        ours, theirs = scaled.batch.get_model(i), nominal.batch.get_model(i)
        friction, mass = (0.5, 1.0) if name == "friction" else (1.0, 0.5)
        np.testing.assert_allclose(ours.pair_friction[with_sheet], friction * theirs.pair_friction[with_sheet])
        np.testing.assert_array_equal(ours.pair_friction[~with_sheet], theirs.pair_friction[~with_sheet])
        np.testing.assert_allclose(ours.body_mass[sheet], mass * theirs.body_mass[sheet])
        np.testing.assert_allclose(ours.body_inertia[sheet], mass * theirs.body_inertia[sheet])
    ratio = scaled.sheet_mass / nominal.sheet_mass, scaled.pair_friction / nominal.pair_friction
    assert ratio[0] == pytest.approx(1.0 if name == "friction" else 0.5)
    assert ratio[1][:, with_sheet] == pytest.approx(0.5 if name == "friction" else 1.0)


def test_noise_moves_the_sheet_alone_and_consistently():
    envs = PaperSquareVectorEnv(400)
    obs, _ = envs.reset(seed=0)
    seen = []
    for _ in range(2):
        noise = evaluation.Disturbance("noise", 0.004)
        noise.start(envs)
        noise.reset(np.ones(400, dtype=bool), range(400))
        seen += [noise.observe(obs), noise.observe(obs)]
    np.testing.assert_array_equal(seen[0], seen[2])  # the same again
    assert (seen[0] != seen[1]).any()  # and new at every step
    rows = ("sheet_pos", "sheet_yaw", "sheet_to_square", "fingertip_to_sheet")
    touched = np.zeros(OBS_DIM, dtype=bool)
    for name in rows:
        touched[OBS[name]] = True
    touched[OBS["sheet_pos"]][2] = False  # its height
    np.testing.assert_array_equal(seen[0][:, ~touched], obs[:, ~touched])
    before, after = to_si(obs), to_si(seen[0])
    change = {name: (after - before)[:, OBS[name]] for name in rows}
    xy = change["sheet_pos"][:, :2]
    np.testing.assert_allclose(change["sheet_to_square"], -xy, atol=1e-7)
    np.testing.assert_allclose(change["fingertip_to_sheet"], xy, atol=1e-7)
    assert xy.std(axis=0) == pytest.approx(0.004, rel=0.15)
    np.testing.assert_allclose(np.linalg.norm(after[:, OBS["sheet_yaw"]], axis=1), 1.0, atol=1e-6)
    yaws = [np.arctan2(*state[:, OBS["sheet_yaw"]].T) for state in (before, after)]
    assert (yaws[1] - yaws[0]).std() == pytest.approx(0.04, rel=0.15)


# Overrides of the task


def test_overrides_reach_every_environment(short_episodes):
    flags = {"tape_half_size": 0.076, "randomize_xy": 0.01, "randomize_yaw": 0.02}
    paths = (str(ROOT / "assets" / "ppo_residual.pt"),)
    args = evaluation.Args(model_path=paths, policy=("jacobian",), compare_base=True, **flags)
    policies, env_kwargs = evaluation.load_policies(args)
    assert len(policies) == 3
    for name, policy in policies.items():
        evaluation.play_episodes(policy, SEEDS, env_kwargs[name])
        envs = short_episodes[-1][1]
        assert envs.tape_half_size == 0.076 and envs.randomize_scales[:3].tolist() == [0.01, 0.01, 0.02]
    _, alone = evaluation.load_policies(evaluation.Args(policy=("jacobian",), **flags))
    assert alone == {"jacobian": {"act_scale": 0.02, **flags}}
    checkpoint = evaluation.load_checkpoint(paths[0])
    _, trained = evaluation.load_policies(evaluation.Args(model_path=paths))
    assert list(trained.values()) == [checkpoint["env_kwargs"]]


def test_one_square_makes_checkpoints_comparable(tmp_path):
    checkpoint, paths = evaluation.load_checkpoint(ROOT / "assets" / "ppo_residual.pt"), []
    for half_size in (0.08, 0.078):
        checkpoint["env_kwargs"]["tape_half_size"] = half_size
        paths.append(str(tmp_path / f"{half_size}.pt"))
        evaluation.save_checkpoint(checkpoint, Path(paths[-1]))
    args = evaluation.Args(model_path=tuple(paths), compare_base=True, tape_half_size=0.077)
    policies, env_kwargs = evaluation.load_policies(args)
    assert len(policies) == 3 and {kwargs["tape_half_size"] for kwargs in env_kwargs.values()} == {0.077}


# Sweeps


def test_a_sweep_writes_a_table_a_plot_and_json(monkeypatch, tmp_path, capsys):
    flags = "--policy jacobian zero --n-episodes 2 --sweep delay 0 2.5 --sweep-points 5"
    results = run_eval(flags, monkeypatch, tmp_path)
    sweep = results["sweep"]
    assert sweep["name"] == "delay" and sweep["values"] == [0, 1, 2]
    assert set(sweep["policies"]) == set(results["policies"]) == {"jacobian", "zero"}
    for name, rows in sweep["policies"].items():
        assert len(rows) == 3 and set(rows[0]) == {"success_rate", "ci95"}
        assert {key: results["policies"][name][key] for key in rows[0]} == rows[0]  # no delay is the evaluation itself
    assert (tmp_path / "eval_results" / "sweep_delay.png").stat().st_size > 10_000
    assert "\n0      100.0 %   0.0 %\n" in capsys.readouterr().out


def test_sweep_values():
    np.testing.assert_allclose(evaluation.sweep_values("mass", 0.5, 2.0, 4), [0.5, 1.0, 1.5, 2.0])
    assert evaluation.sweep_values("delay", 0.5, 9.5, 3).tolist() == [1, 5, 9]
    assert evaluation.sweep_values("noise", 0.0, 0.01, 2).tolist() == [0.0, 0.01]


BAD_FLAGS = {
    "--sweep fricton 0.5 2": "did you mean friction",
    "--sweep wind 0.5 2": "friction, mass, xy, yaw, noise or delay",
    "--sweep friction 2 0.5": "LOW < HIGH",
    "--sweep friction 1 1": "LOW < HIGH",
    "--sweep xy -0.1 0.1": "--sweep",
    "--sweep mass 0 1": "--sweep mass",
    "--sweep noise 0 inf": "--sweep",
    "--sweep yaw 0 nan": "--sweep",
    "--sweep delay 0.2 1.8": "whole numbers",
    "--sweep delay 0 1000000000": "400",
    "--sweep mass 1 2 --sweep-points 1": "sweep-points",
    "--tape-half-size 0": "tape-half-size",
    "--tape-half-size nan": "tape-half-size",
    "--randomize-xy -0.1": "randomize-xy",
    "--randomize-yaw inf": "randomize-yaw",
    "--video-episodes 0": "video-episodes",
}


@pytest.mark.parametrize("flags", BAD_FLAGS)
def test_bad_flags_end_with_one_line_and_write_nothing(flags, monkeypatch, tmp_path, capfd):
    with pytest.raises(SystemExit) as end:
        run_eval(f"--policy zero {flags}", monkeypatch, tmp_path)
    error = capfd.readouterr().err
    assert end.value.code == 2
    assert error.startswith("error: ") and error.count("\n") == 1 and BAD_FLAGS[flags] in error
    assert not list(tmp_path.iterdir())


# Films and plots


def test_films_are_of_the_best_the_median_and_the_failures():
    def episodes(*lengths):
        return [{"seed": 10 + k, "success": length < 400, "length": length} for k, length in enumerate(lengths)]

    mixed = episodes(400, 90, 60, 120, 400, 70, 100, 400)
    assert list(evaluation.choose_films(mixed, 4).items()) == [
        (12, "best"), (11, "median"), (10, "failure"), (14, "failure")
    ]  # fmt: skip
    assert list(evaluation.choose_films(mixed, 1)) == [12]
    assert list(evaluation.choose_films(mixed, 9)) == [12, 11, 10, 14, 17]
    assert evaluation.choose_films(episodes(80), 4) == {10: "best"}
    assert evaluation.choose_films(episodes(400, 400), 4) == {10: "failure", 11: "failure"}
    assert evaluation.choose_films(episodes(90, 80, 80), 4) == {11: "best", 12: "median"}


def test_films_are_named_after_what_they_show(monkeypatch, tmp_path):
    try:
        evaluation.check_rendering()
    except RuntimeError as error:
        pytest.skip(str(error))
    filmed = []
    monkeypatch.chdir(tmp_path)
    flags = f"--model-path {ROOT}/assets/ppo_residual.pt --compare-base --n-episodes 3 --save-video --video-height 48"
    make = PaperSquareVectorEnv.__init__

    def spy(self, *args, **kwargs):
        filmed.append(kwargs if "render_mode" in kwargs else {})
        make(self, *args, **kwargs)

    monkeypatch.setattr(PaperSquareVectorEnv, "__init__", spy)
    results = run_eval(f"{flags} --video-stride 15 --video-episodes 2 --randomize-xy 0.03", monkeypatch, tmp_path)
    episodes = next(row for name, row in results["policies"].items() if not name.startswith("base"))["episodes"]
    expected = {f"{kind}_{seed}.mp4" for seed, kind in evaluation.choose_films(episodes, 2).items()}
    films = {path.name for path in (tmp_path / "eval_results").glob("*.mp4")}
    assert films == expected and len(films) == 2
    tasks = [kwargs for kwargs in filmed if kwargs]
    assert len(tasks) == 4 and all(kwargs["randomize_xy"] == 0.03 for kwargs in tasks)


def test_the_residual_is_a_bar_at_the_lower_edge(tmp_path):
    try:
        evaluation.check_rendering()
    except RuntimeError as error:
        pytest.skip(str(error))
    from imageio import v3 as iio

    class Residual(evaluation.RandomPolicy):
        def __call__(self, obs):
            self.residual_action = np.full((1, 6), self.size)
            return np.zeros((1, 6))

    blue = {}
    for size in (0.2, 0.8):
        policy = Residual()
        policy.size = size
        kwargs = {"with": {"max_episode_steps": 4}}
        evaluation.film_episode({"with": policy}, kwargs, 0, tmp_path / "film.mp4", height=240, stride=1)
        picture = iio.imread(tmp_path / "film.mp4")[3][-14:].astype(int)
        blue[size] = ((picture[..., 2] - picture[..., 0]) > 60).mean()
    assert blue[0.8] / blue[0.2] == pytest.approx(4, rel=0.1)


def test_the_plot_needs_no_residual(tmp_path):
    rows = {}
    for name in ("zero", "jacobian"):
        policy = evaluation.make_base_policy(name)
        rows[name] = evaluation.summarize(evaluation.play_episodes(policy, range(2), {}, 2))
    evaluation.plot_results(rows, tmp_path / "results.png", 0.076)
    assert 20_000 < (tmp_path / "results.png").stat().st_size < 300_000


def test_closing_the_viewer_ends_the_watching(monkeypatch, capsys):
    class Window:
        frames = 0

        def sync(self):
            self.frames += 1

        def is_running(self):
            return self.frames < 3

        def close(self):
            pass

    windows = []
    monkeypatch.setenv("DISPLAY", ":0")
    monkeypatch.setattr(
        mujoco.viewer, "launch_passive", lambda *args, **kwargs: windows.append(Window()) or windows[-1]
    )
    policies = {"first": JacobianIKPolicy(), "second": JacobianIKPolicy()}
    evaluation.watch(policies, dict.fromkeys(policies, {}), [1, 2])
    assert [window.frames for window in windows] == [3] and capsys.readouterr().out == ""
