"""eval.py and figures.py: episodes, causes of failure, sweeps, overrides of the task, plots and films."""

import json
from functools import partial

import numpy as np
import pytest
from test_scripts import ROOT, run_script

import eval as evaluation
import figures
import runs
from base_policies import JacobianIKPolicy, ZeroPolicy
from env_paper_square import SHEET_HALF_SIZE, EnvArgs, PaperSquareVectorEnv, room

ASSETS = {path.stem: str(path) for path in sorted((ROOT / "assets").glob("*.safetensors"))}
SEEDS = range(2_000_000, 2_000_003)
OUTCOME = ("success", "return", "length", "final_distance_m", "final_yaw_error_rad")
SHORT = partial(PaperSquareVectorEnv, max_episode_steps=40)


def run_eval(flags, monkeypatch, folder):
    """What `python eval.py flags` writes to results.json."""
    run_script("eval.py", flags, monkeypatch, folder)
    return json.loads((folder / "eval_results" / "results.json").read_text())


# Episodes


def test_results_of_every_policy_are_of_the_same_episodes(monkeypatch, tmp_path, capsys):
    paths = " ".join(ASSETS[name] for name in ("ppo", "ppo_residual", "sac_residual"))
    flags = f"--model-path {paths} --compare-base --compare-zero --compare-random --n-episodes 3 --plot"
    results = run_eval(flags, monkeypatch, tmp_path)
    table = capsys.readouterr().out
    assert {"base jacobian", "zero", "random"} < results["policies"].keys() and len(results["policies"]) == 6
    for name, row in results["policies"].items():
        assert [episode["seed"] for episode in row["episodes"]] == list(SEEDS)
        assert row["success_rate"] == np.mean([episode["success"] for episode in row["episodes"]])
        assert f"\n{name} " in table
    assert results["policies"]["zero"]["success_rate"] == 0
    assert 20_000 < (tmp_path / "eval_results" / "results.png").stat().st_size < 300_000
    # fields that other programs read
    assert {"seed", "success", "return", "length", "final_distance_m", "final_yaw_error_rad", "failure"} <= set(
        results["policies"]["zero"]["episodes"][0]
    )
    assert results["args"]["n_episodes"] == 3


def test_episodes_do_not_depend_on_the_number_of_environments():
    one, many = (evaluation.play_episodes(JacobianIKPolicy(), range(5), num_envs=n) for n in (2, 5))
    for name in ("seed", *OUTCOME):
        np.testing.assert_array_equal(one[name], many[name])


def test_summary_uses_the_wilson_interval():
    success = np.arange(100) < 30
    episodes = {name: np.ones(100) for name in ("return", "final_distance_m", "final_yaw_error_rad", "residual_norm")}
    episodes |= {"success": success, "length": np.where(success, 60, 400), "seed": np.arange(100)}
    episodes |= {"failure": np.where(success, "", "turned"), "residual_norm_by_step": np.array([1.23456, 0.5])}
    episodes["failure"][-1] = "moved"
    row = evaluation.summarize({**episodes, "forces": np.array([1.0, 2.0, 9.0])})
    z, n, p = 1.959964, 100, 0.3
    centre, half = p + z * z / (2 * n), z * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    np.testing.assert_allclose(row["ci95"], [(centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n)])
    assert row["median_time_to_success_s"] == 2.0 and row["residual_norm_by_step"] == [1.2346, 0.5]
    assert row["fingertip_force_n"] == {"median": 2.0, "p99": pytest.approx(8.86), "max": 9.0}
    assert list(row["failures"].items()) == [("turned", 69), ("moved", 1)]
    assert evaluation.format_table({"base": row}).endswith("  69 turned, 1 moved")
    assert evaluation.format_table({"base": {**row, "failures": {}}}).endswith("  -")


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
        bounds = room(np.array(yaw_error), tape_half_size)
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


class ScriptedEnvs(PaperSquareVectorEnv):
    """The sheet of each environment is carried along a path of its seed's own."""

    def reset(self, *, seed=None, options=None):
        self.seeds = list(seed)
        return super().reset(seed=seed, options=options)

    def step(self, actions):
        for i, seed in enumerate(self.seeds):
            step, (x, y) = self._episode_steps[i] + 1, (0.19, 0.09)
            if seed == 0:
                x += 0.03 * (step not in (3, 4))
            y += 0.04 * (seed == 2)
            x, y = {3: (x, -0.05 + 0.001 * step), 4: (0.6, 0.0)}.get(seed, (x, y))
            yaw = 0.3 * (seed == 1)
            self._qpos[i, 6:13] = x, y, 0.0005, np.cos(yaw / 2), 0, 0, np.sin(yaw / 2)
            self._qvel[i] = 0
        self.batch.forward()
        return super().step(actions)


def test_play_records_what_tells_failures_apart():
    for num_envs, fixed in ((5, {}), (2, {"bias": 0.05, "lag": 9})):  # whatever the policy sees
        task = partial(ScriptedEnvs, max_episode_steps=45, fixed=fixed)
        episodes = evaluation.play_episodes(ZeroPolicy(), range(5), task, num_envs)
        expected = ["left the square", "turned", "off-centre", "time ran out", "out of reach"]
        assert episodes["failure"].tolist() == expected
        assert episodes["approach_m"][3] == pytest.approx(0.03, abs=0.001)
    episodes = evaluation.play_episodes(ZeroPolicy(), range(5), SHORT, num_envs=2)
    assert set(episodes["failure"]) == {"never touched"}  # in the environments' later episodes too


class Counting:
    """Has a residual of norm k / 100 at step k of an episode."""

    def __call__(self, obs):
        self.steps += 1
        self.residual_action = np.eye(6)[:1] * self.steps[:, None] / 100
        return np.zeros((len(obs), 6))

    def reset(self, mask):
        self.steps = np.where(mask, 0, getattr(self, "steps", np.zeros(len(mask))))


def test_residuals_are_averaged_over_the_episodes_that_are_played():
    class Uneven(PaperSquareVectorEnv):
        """Ends each environment's episodes after a length of its own."""

        def step(self, actions):
            obs, rewards, terminations, _, infos = super().step(actions)
            return obs, rewards, terminations, self._episode_steps >= 5 + 2 * np.arange(self.num_envs), infos

    episodes = evaluation.play_episodes(Counting(), range(8), Uneven, 3)
    assert set(episodes["length"]) == {5, 7, 9}
    np.testing.assert_allclose(episodes["residual_norm_by_step"], np.arange(1, 10) / 100)
    np.testing.assert_allclose(episodes["residual_norm"], (episodes["length"] + 1) / 200)


# Sweeps

SWEPT = {  # name: a value that policies are not trained for
    "friction": 0.5, "mass": 2.0, "stiffness": 8.0, "servo_friction": 0.6, "height": -0.005, "backlash": 0.03,
    "delay": 7, "lag": 9, "xy": 0.02, "yaw": 0.1, "offset": 0.05, "bias": 0.01, "noise": 0.003,
}  # fmt: skip


def draws(task):
    """What the episodes of `SEEDS` draw, by name, the noise of their first observations, and the ticks."""
    envs = task(3)
    envs.reset(seed=list(SEEDS))
    noise = envs.seen_pose - envs.sheet_pose - envs.drawn["bias"]
    return {**envs.drawn, "noise": noise, "tick": envs.encoder_tick}


@pytest.mark.parametrize("randomize_arm", [True, False])
@pytest.mark.parametrize("name", evaluation.SWEEPS)
def test_a_sweep_sets_one_thing_or_scales_how_widely_it_is_drawn_and_leaves_all_others(name, randomize_arm):
    task = partial(PaperSquareVectorEnv, randomize_arm=randomize_arm)
    before, after = draws(task), draws(evaluation.disturbed(task, name, SWEPT[name]))
    expected = np.full_like(before[name], SWEPT[name])
    if name in ("xy", "yaw", "offset", "bias", "noise"):
        expected = draws(PaperSquareVectorEnv)[name] * SWEPT[name] / getattr(EnvArgs, f"randomize_{name}")
    np.testing.assert_allclose(after.pop(name), expected, atol=1e-12)
    for other, value in after.items():
        np.testing.assert_allclose(value, before[other], atol=1e-12, err_msg=other)


@pytest.mark.parametrize("name", evaluation.SWEEPS)
def test_a_sweep_changes_every_outcome_however_many_environments_play(name):
    held = []

    class Keeping(PaperSquareVectorEnv):
        def step(self, actions):
            held.append(self.drawn.get(name, np.zeros(0)).copy())
            return super().step(actions)

    task = partial(Keeping, max_episode_steps=120)
    plain = evaluation.play_episodes(JacobianIKPolicy(), SEEDS, task)
    held.clear()
    swept = evaluation.disturbed(task, name, SWEPT[name])
    many, few = (evaluation.play_episodes(JacobianIKPolicy(), SEEDS, swept, n) for n in (3, 2))
    assert (plain["return"] != many["return"]).all()
    np.testing.assert_array_equal(many["return"], few["return"])
    if name not in evaluation.SCALES:
        assert all((values == SWEPT[name]).all() for values in held)  # in the environments' later episodes too


def test_sweeps_write_tables_a_plot_and_json(monkeypatch, tmp_path, capsys):
    flags = "--policy jacobian zero --n-episodes 2 --randomize-arm False --sweep-points 5"
    results = run_eval(f"{flags} --sweep delay 0 2.5 --sweep height -0.002 0.002", monkeypatch, tmp_path)
    delay, height = results["sweeps"]
    assert (delay["name"], delay["values"]) == ("delay", [0, 1, 2])
    assert (height["name"], height["values"]) == ("height", pytest.approx([-0.002, -0.001, 0.0, 0.001, 0.002]))
    for name, row in results["policies"].items():  # of a nominal arm: without delay, and on a table where it should be
        for rows in (delay["policies"][name], [height["policies"][name][2], *height["policies"][name][:-1]]):
            assert rows[0].items() <= row.items()
        assert len(delay["policies"][name]) == 3 and len(height["policies"][name]) == 5
    assert set(delay["policies"]) == set(results["policies"]) == {"jacobian", "zero"}
    assert (tmp_path / "eval_results" / "sweeps.png").stat().st_size > 10_000
    table = capsys.readouterr().out
    assert "\n0      100.0 %   0.0 %\n" in table and "\n-0.002  " in table


def test_sweep_values():
    np.testing.assert_allclose(evaluation.sweep_values("mass", 0.5, 2.0, 4), [0.5, 1.0, 1.5, 2.0])
    np.testing.assert_allclose(evaluation.sweep_values("height", -0.003, 0.001, 3), [-0.003, -0.001, 0.001])
    for name in ("delay", "lag"):
        assert evaluation.sweep_values(name, 0.5, 9.5, 3).tolist() == [1, 5, 9]
    for bad, message in {
        ("friction", 2, 0.5): "0.01 <= LOW < HIGH <= 100", ("mass", 0, 1): "0.01 <= LOW", ("stiffness", 0, 9): "0.1 <=",
        ("yaw", 1, 1): "0 <= LOW < HIGH", ("backlash", -0.01, 0.01): "0 <= LOW", ("lag", -1, 2): "0 <= LOW",
        ("height", 0.002, -0.002): "-0.015 <= LOW < HIGH <= 0.015", ("height", 0, 0.1): "<= 0.015",
        ("offset", 0, 0.5): "--randomize-offset must be from 0 to 0.2", ("delay", 0.2, 1.8): "whole numbers",
    }.items():  # fmt: skip
        with pytest.raises(runs.UserError, match=message):
            evaluation.sweep_values(*bad, 5)


# Which policies, in which task


def write(tmp_path, **kwargs):
    """A copy of the residual's checkpoint for another task."""
    checkpoint = runs.load_checkpoint(ASSETS["ppo_residual"])
    checkpoint["env"]["kwargs"] |= kwargs
    path = tmp_path / f"{len(list(tmp_path.iterdir()))}.safetensors"
    runs.save_checkpoint(checkpoint, path)
    return str(path)


def test_overrides_reach_every_environment():
    flags = {"tape_half_size": 0.076, "randomize_xy": 0.01, "randomize_yaw": 0.02, "randomize_arm": False}
    args = evaluation.Args(model_path=(ASSETS["ppo_residual"],), policy=("jacobian",), compare_base=True, **flags)
    policies, tasks = evaluation.load_policies(args)
    alone = evaluation.load_policies(evaluation.Args(policy=("jacobian",), **flags))[1]
    assert len(policies) == 3 and policies.keys() == tasks.keys()
    for task in (*tasks.values(), *alone.values()):
        envs = task(1)
        assert {name: getattr(envs, name) for name in flags} == flags
    (trained,) = evaluation.load_policies(evaluation.Args(model_path=(ASSETS["ppo_residual"],)))[1].values()
    checkpoint = runs.load_checkpoint(ASSETS["ppo_residual"])
    assert trained.func is PaperSquareVectorEnv and checkpoint["env"]["kwargs"].items() <= trained.keywords.items()


def test_checkpoints_for_different_squares_are_compared_on_one_only(tmp_path):
    paths = tuple(write(tmp_path, tape_half_size=size) for size in (0.08, 0.078))
    with pytest.raises(runs.UserError, match="tape_half_size"):
        evaluation.load_policies(evaluation.Args(model_path=paths))
    args = evaluation.Args(model_path=paths, compare_base=True, tape_half_size=0.077)
    policies, tasks = evaluation.load_policies(args)
    assert len(policies) == 3 and {task.keywords["tape_half_size"] for task in tasks.values()} == {0.077}


def test_bases_are_told_apart_by_what_they_are_not_by_a_path_or_a_name(tmp_path):
    """Two residuals on two imitators that lay at one path, and a third on the first imitator at another path."""
    paths, residual = [], runs.load_checkpoint(ASSETS["ppo_residual"])
    for name, base, il_checkpoint in (("a", "act", "il"), ("b", "diffusion_policy", "il"), ("c", "act", "moved")):
        flags = {"exp_name": name, "base_policy": "il", "il_checkpoint": il_checkpoint}
        checkpoint = {**residual, "args": residual["args"] | flags, "base": runs.load_checkpoint(ASSETS[base])}
        runs.save_checkpoint(checkpoint, tmp_path / f"{name}.safetensors")
        paths.append(str(tmp_path / f"{name}.safetensors"))
    policies, _ = evaluation.load_policies(evaluation.Args(model_path=tuple(paths), compare_base=True))
    bases = {name: policy.checkpoint["script"] for name, policy in policies.items() if name.startswith("base ")}
    assert sorted(bases.values()) == ["act", "diffusion_policy"] and len(policies) == 5


def test_a_checkpoint_from_before_a_flag_has_the_same_base(tmp_path):
    paths, residual = [], runs.load_checkpoint(ASSETS["sac_residual"])
    for name in ("before", "now"):
        kwargs = {
            key: value for key, value in residual["env"]["kwargs"].items() if (name, key) != ("before", "move_gripper")
        }
        env, args = residual["env"] | {"kwargs": kwargs}, residual["args"] | {"exp_name": name}
        runs.save_checkpoint(residual | {"env": env, "args": args}, tmp_path / f"{name}.safetensors")
        paths.append(str(tmp_path / f"{name}.safetensors"))
    policies, _ = evaluation.load_policies(evaluation.Args(model_path=tuple(paths), compare_base=True))
    assert list(policies) == ["base jacobian", "before seed 1", "now seed 1"]


def test_policies_beside_a_checkpoint_act_at_its_scale(tmp_path):
    args = evaluation.Args(model_path=(write(tmp_path, act_scale=0.04),), policy=("jacobian",))
    policies, tasks = evaluation.load_policies(args)
    assert policies["jacobian"].act_scale == tasks["jacobian"].keywords["act_scale"] == 0.04


@pytest.mark.parametrize("flags", [{}, {"model_path": (ASSETS["ppo"],), "compare_base": True}])
def test_nothing_to_play_is_told(flags):
    with pytest.raises(runs.UserError, match="nothing to evaluate|base policy"):
        evaluation.load_policies(evaluation.Args(**flags))


# Films and plots


@pytest.fixture
def rendering():
    try:
        figures.check_rendering()
    except runs.UserError as error:
        pytest.skip(str(error))


def test_films_are_of_the_best_the_median_and_the_failures():
    def episodes(*lengths):
        return [{"seed": 10 + k, "success": length < 400, "length": length} for k, length in enumerate(lengths)]

    mixed = episodes(400, 90, 60, 120, 400, 70, 100, 400)
    assert list(figures.choose_films(mixed, 4).items()) == [
        (12, "best"), (11, "median"), (10, "failure"), (14, "failure")
    ]  # fmt: skip
    assert list(figures.choose_films(mixed, 1)) == [12]
    assert list(figures.choose_films(mixed, 9)) == [12, 11, 10, 14, 17]
    assert figures.choose_films(episodes(80), 4) == {10: "best"}
    assert figures.choose_films(episodes(90, 80, 80), 4) == {11: "best", 12: "median"}


def test_films_are_named_after_what_they_show(rendering, monkeypatch, tmp_path):
    filmed, film_episode = [], figures.film_episode

    def spy(policies, tasks, *args):
        filmed.extend(task.keywords["randomize_xy"] for task in tasks.values())
        film_episode(policies, tasks, *args)

    monkeypatch.setattr(figures, "film_episode", spy)
    flags = f"--model-path {ASSETS['ppo_residual']} --compare-base --n-episodes 3 --save-video --video-height 48"
    results = run_eval(f"{flags} --video-stride 15 --video-episodes 2 --randomize-xy 0.03", monkeypatch, tmp_path)
    episodes = next(row for name, row in results["policies"].items() if not name.startswith("base"))["episodes"]
    expected = {f"{kind}_{seed}.mp4" for seed, kind in figures.choose_films(episodes, 2).items()}
    films = {path.name for path in (tmp_path / "eval_results").glob("*.mp4")}
    assert films == expected and len(films) == 2 and filmed == [0.03] * 4
