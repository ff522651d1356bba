"""eval.py and figures.py: episodes, causes of failure, disturbances, overrides of the task, plots and films."""

import json
from functools import partial

import numpy as np
import pytest
from test_scripts import ROOT, run_script

import eval as evaluation
import figures
import runs
from base_policies import JacobianIKPolicy, ZeroPolicy
from env_paper_square import OBS, SHEET_HALF_SIZE, PaperSquareVectorEnv, room, to_si

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
    assert row["fingertip_force_n"] == {"median": 2.0, "max": 9.0}
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
    for num_envs in (5, 2):
        episodes = evaluation.play_episodes(
            ZeroPolicy(), range(5), partial(ScriptedEnvs, max_episode_steps=45), num_envs
        )
        expected = ["left the square", "turned", "off-centre", "time ran out", "out of reach"]
        assert episodes["failure"].tolist() == expected
        assert episodes["approach_m"][3] == pytest.approx(0.03, abs=0.001)
    episodes = evaluation.play_episodes(ZeroPolicy(), range(5), SHORT, num_envs=2)
    assert set(episodes["failure"]) == {"never touched"}  # in the environments' later episodes too


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


@pytest.mark.parametrize("delay", [0, 1, 3, 20])
def test_actions_arrive_so_many_steps_late_and_residuals_are_averaged_over_those_playing(delay):
    log = []

    class RecordingEnvs(PaperSquareVectorEnv):
        """Ends each environment's episodes after a length of its own, and keeps the first entry of every action."""

        def step(self, actions):
            obs, rewards, terminations, _, infos = super().step(actions)
            log.append((self._episode_steps.copy(), np.array(actions)[:, 0], ~self.paused))
            return obs, rewards, terminations, self._episode_steps >= 5 + 2 * np.arange(self.num_envs), infos

    episodes = evaluation.play_episodes(Counting(), range(8), RecordingEnvs, 3, disturbance=("delay", delay))
    longest = int(episodes["length"].max())
    assert len(set(episodes["length"])) == 3
    for steps, actions, playing in log:
        expected = np.maximum(steps - delay, 0) / 100  # zero until the first one arrives
        np.testing.assert_allclose(actions[playing], expected[playing])
    np.testing.assert_allclose(episodes["residual_norm_by_step"], np.arange(1, longest + 1) / 100)


DISTURBANCES = {  # name: a value that disturbs nothing, and one that disturbs
    "friction": (1.0, 0.5), "mass": (1.0, 2.0), "xy": (0.05, 0.02), "yaw": (0.3, 0.1), "noise": (0.0, 0.003),
    "delay": (0, 3),
}  # fmt: skip


@pytest.mark.parametrize("name", evaluation.SWEEPS)
def test_a_disturbance_of_nothing_changes_no_bit_and_others_change_every_outcome(name):
    nothing, much = DISTURBANCES[name]
    task = partial(PaperSquareVectorEnv, max_episode_steps=120)
    plain = evaluation.play_episodes(JacobianIKPolicy(), SEEDS, task)
    same = evaluation.play_episodes(JacobianIKPolicy(), SEEDS, task, disturbance=(name, nothing))
    many, few = (evaluation.play_episodes(JacobianIKPolicy(), SEEDS, task, n, disturbance=(name, much)) for n in (3, 2))
    for key in (*OUTCOME, "forces"):
        np.testing.assert_array_equal(plain[key], same[key])
    assert (plain["return"] != many["return"]).all()
    np.testing.assert_array_equal(many["return"], few["return"])


@pytest.mark.parametrize("name", ["friction", "mass"])
def test_factors_reach_the_simulation(name):
    made = []
    for factor in (1.0, 0.5):
        task = lambda *args, **kwargs: made.append(SHORT(*args, **kwargs)) or made[-1]  # noqa: E731
        evaluation.play_episodes(ZeroPolicy(), SEEDS, task, disturbance=(name, factor))
    nominal, scaled = made
    sheet, geom = nominal.model.body("sheet").id, nominal.model.geom("sheet").id
    touching = (nominal.model.pair_geom1 == geom) | (nominal.model.pair_geom2 == geom)
    friction, mass = (0.5, 1.0) if name == "friction" else (1.0, 0.5)
    for i in range(len(SEEDS)):
        ours, theirs = scaled.batch.get_model(i), nominal.batch.get_model(i)
        factors = np.where(touching, friction, 1.0)[:, None]
        np.testing.assert_allclose(ours.pair_friction, factors * theirs.pair_friction)
        np.testing.assert_allclose(ours.body_mass[sheet], mass * theirs.body_mass[sheet])
        np.testing.assert_allclose(ours.body_inertia[sheet], mass * theirs.body_inertia[sheet])


def test_noise_moves_the_sheet_alone_and_consistently():
    envs = PaperSquareVectorEnv(400)
    obs, _ = envs.reset(seed=0)
    noise, seen = evaluation.Disturbance("noise", 0.004), []
    for _ in range(2):
        noise.start(envs)
        noise.reset(np.ones(400, dtype=bool), range(400))
        seen += [noise.observe(obs), noise.observe(obs)]
    np.testing.assert_array_equal(seen[0], seen[2])  # the same again
    assert (seen[0] != seen[1]).any()  # and new at every step
    before, after = to_si(obs), to_si(seen[0])
    change = {name: (after - before)[:, rows] for name, rows in OBS.items()}
    xy = change["sheet_pos"][:, :2]
    assert xy.std(axis=0) == pytest.approx(0.004, rel=0.15)
    np.testing.assert_allclose(change.pop("sheet_to_square"), -xy, atol=1e-7)
    np.testing.assert_allclose(change.pop("fingertip_to_sheet"), xy, atol=1e-7)
    assert not change.pop("sheet_pos")[:, 2].any()
    yaws = [np.arctan2(*state[:, OBS["sheet_yaw"]].T) for state in (before, after)]
    assert (yaws[1] - yaws[0]).std() == pytest.approx(0.04, rel=0.15)
    np.testing.assert_allclose(np.linalg.norm(after[:, OBS["sheet_yaw"]], axis=1), 1.0, atol=1e-6)
    assert change.pop("sheet_yaw").any() and not any(rows.any() for rows in change.values())


def test_a_sweep_writes_a_table_a_plot_and_json(monkeypatch, tmp_path, capsys):
    flags = "--policy jacobian zero --n-episodes 2 --sweep delay 0 2.5 --sweep-points 5"
    results = run_eval(flags, monkeypatch, tmp_path)
    sweep = results["sweep"]
    assert sweep["name"] == "delay" and sweep["values"] == [0, 1, 2]
    assert set(sweep["policies"]) == set(results["policies"]) == {"jacobian", "zero"}
    for name, rows in sweep["policies"].items():
        assert len(rows) == 3 and rows[0].items() <= results["policies"][name].items()  # no delay is the evaluation
    assert (tmp_path / "eval_results" / "sweep_delay.png").stat().st_size > 10_000
    assert "\n0      100.0 %   0.0 %\n" in capsys.readouterr().out


def test_sweep_values():
    np.testing.assert_allclose(evaluation.sweep_values("mass", 0.5, 2.0, 4), [0.5, 1.0, 1.5, 2.0])
    assert evaluation.sweep_values("delay", 0.5, 9.5, 3).tolist() == [1, 5, 9]
    for bad, message in {
        ("friction", 2, 0.5): "LOW < HIGH", ("yaw", 1, 1): "LOW < HIGH", ("mass", 0, 1): "0 < LOW",
        ("delay", 0.2, 1.8): "whole numbers",
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
    flags = {"tape_half_size": 0.076, "randomize_xy": 0.01, "randomize_yaw": 0.02}
    args = evaluation.Args(model_path=(ASSETS["ppo_residual"],), policy=("jacobian",), compare_base=True, **flags)
    policies, tasks = evaluation.load_policies(args)
    alone = evaluation.load_policies(evaluation.Args(policy=("jacobian",), **flags))[1]
    assert len(policies) == 3 and policies.keys() == tasks.keys()
    for task in (*tasks.values(), *alone.values()):
        envs = task(1)
        assert envs.tape_half_size == 0.076 and envs.randomize_scales[:3].tolist() == [0.01, 0.01, 0.02]
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
