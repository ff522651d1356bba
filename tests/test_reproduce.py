"""reproduce.py and benchmark.py: statistics, resuming, damage, committed tables; every row of the benchmark."""

import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import submitit
import tyro
from scipy.stats import norm
from test_scripts import RL, ROOT, SCRIPTS, run_script
from torch.utils.tensorboard import SummaryWriter

import benchmark
import eval as evaluation
import reproduce
import runs
from base_policies import JacobianIKPolicy
from env_paper_square import PaperSquareVectorEnv
from reproduce import Suite, interquartile_mean, interval, probability_of_improvement

METHODS = {"base": "eval.py --policy jacobian", "PPO": "ppo.py --num-envs 2"}
SUITE = Suite(METHODS, ("base",), seeds=2, episodes=8)
RUNS = Path("results", "quick_runs.csv")


# Statistics


def test_interquartile_mean_drops_the_outer_quarters():
    assert interquartile_mean(np.array([0.0, 9.0, 1.0, 2.0, 3.0, 4.0, 100.0, -50.0])) == (1 + 2 + 3 + 4) / 4
    assert interquartile_mean(np.array([5.0, 1.0, 2.0, 9.0, 3.0, 7.0])) == (0.5 * 2 + 3 + 5 + 0.5 * 7) / 3


def test_probability_of_improvement_counts_pairs_and_halves_ties():
    x, y = np.array([0.9, 0.5, 0.5]), np.array([0.5, 0.1])
    pairs = [1.0 if a > b else 0.5 if a == b else 0.0 for a in x for b in y]
    assert probability_of_improvement(x, y) == pytest.approx(np.mean(pairs))
    assert probability_of_improvement(y, x) == pytest.approx(1 - np.mean(pairs))


def test_bootstrap_intervals_are_the_normal_ones_and_draw_from_every_method_on_its_own():
    sample = np.random.default_rng(0).normal(5.0, 2.0, 400)
    half = norm.ppf(0.975) * sample.std() / np.sqrt(len(sample))
    np.testing.assert_allclose(interval(np.mean, sample), [sample.mean() - half, sample.mean() + half], atol=0.02)

    def difference(x, y, axis=-1):
        return x.mean(axis=axis) - y.mean(axis=axis)

    rng = np.random.default_rng(1)
    x, y = rng.normal(0.0, 1.0, 300), rng.normal(0.0, 3.0, 100)
    for other, variance in ((y, y.var() / 100), (np.array([2.0]), 0.0)):  # what is deterministic does not vary
        low, high = interval(difference, x, other)
        assert (high - low) / 2 == pytest.approx(norm.ppf(0.975) * np.sqrt(x.var() / 300 + variance), rel=0.05)


def made_up_run(method, seed, failed, episodes=100):
    row = dict.fromkeys(reproduce.RUN_COLUMNS, "")
    row |= {"method": method, "seed": str(seed), "steps": "0", "episodes": str(episodes)}
    return row | {"failed_episodes": " ".join(str(k) for k in failed)}


def test_differences_are_paired_on_the_same_episodes():
    # both fail 40 and 50 of 100 episodes, and 40 of them are the same ones
    rows = [made_up_run("a", 1, range(40)), made_up_run("b", 1, range(50)), made_up_run("c", 1, range(40, 90))]
    table = reproduce.format_comparisons(rows, ("a",)).splitlines()[2:]
    same, other = ([float(x) for x in re.findall(r"-?\d+\.\d", line)] for line in table)
    assert same[0] == other[0] == -10.0
    assert same[2] - same[1] < 0.5 * (other[2] - other[1])  # 0 to 1 differ in ten episodes only


def test_table_of_methods_on_known_data():
    rows = [made_up_run("m", seed, range(failed)) for seed, failed in ((1, 0), (2, 10), (3, 20), (4, 90))]
    (row,) = reproduce.format_methods(rows, []).splitlines()[2:]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[:2] == ["m", "4"] and cells[2].startswith("70.0 (") and cells[3].startswith("85.0 (")
    assert cells[4] == "10.0 (5.5 to 17.4)"  # Wilson's interval of 10 of 100


# The matrix


@pytest.mark.parametrize("suite", reproduce.SUITES)
def test_dry_run_prints_commands_that_parse(suite, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    reproduce.main(reproduce.Args(suite=suite, dry_run=True, seeds=2))
    lines = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
    suite = reproduce.SUITES[suite]
    trained = sum("eval.py" not in command for command in suite.methods.values())
    assert len(lines) == 2 * trained * 2 + len(suite.methods) - trained + bool(suite.demos)
    folders = set()
    for _, name, *flags in lines:
        args = tyro.cli(SCRIPTS[name].Args, args=flags)
        folders |= {(args.exp_name, args.seed)} if name not in ("eval.py", "record_demos.py") else set()
    assert len(folders) == trained * 2  # no two runs share one
    assert set(suite.references) <= set(suite.methods) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", [
    "reproduce.py --cores-per-run 1000", "reproduce.py --only nothing", "benchmark.py --num-envs 3",
    "benchmark.py --training-steps 1",
])  # fmt: skip
def test_flags_that_do_not_fit_are_told_and_nothing_is_written(command, monkeypatch, tmp_path):
    name, flag, value = command.split()
    with pytest.raises(runs.UserError, match=flag):
        run_script(name, f"{flag} {value}", monkeypatch, tmp_path)
    assert not list(tmp_path.iterdir())


class Executor:
    """submitit's, but for runs that cost nothing, done here and now."""

    asked = {}

    def __init__(self, folder, cluster):
        self.asked.update(cluster=cluster)

    def update_parameters(self, **parameters):
        self.asked.update(parameters)

    def submit(self, function, *arguments):
        outcome, error = None, None
        try:
            outcome = function(*arguments)
        except RuntimeError as raised:
            error = raised
        return SimpleNamespace(done=lambda: True, exception=lambda: error, result=lambda: outcome, cancel=lambda: None)


@pytest.fixture
def matrix(monkeypatch, tmp_path):
    """`matrix(**flags)` runs a suite whose runs cost nothing; returns the (method, seed) that it ran."""
    ran = []

    def run(lines):
        if "--alpha" in lines[0]:
            raise RuntimeError("--alpha must be from 0 to 1")
        name, seed = re.fullmatch(r"runs/(\w+?)(?:__(\d)__TIME/.*)?", lines[-1][-1]).groups(default="1")
        episodes = lines[-1][lines[-1].index("--n-episodes") + 1]
        ran.append((name, int(seed)))
        row = {name: "0" for name in reproduce.RUN_COLUMNS[7:-1]} | {"episodes": episodes, "failed_episodes": "1 3"}
        curve = [{"step": step, "training_s": 1.5, "success": 0.25} for step in (0, 32) if len(lines) > 1]
        return row | {"versions": "v", "machine": "m"}, curve

    def main(**flags):
        ran.clear()
        failures = reproduce.main(reproduce.Args(suite="quick", **flags))
        return failures or list(ran)

    monkeypatch.setattr(reproduce, "SUITES", {"quick": SUITE})
    monkeypatch.setattr(reproduce, "run", run)
    monkeypatch.setattr(submitit, "AutoExecutor", Executor)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    for name in ("plot_curves", "plot_success"):
        monkeypatch.setattr(reproduce, name, lambda *args: None)
    monkeypatch.chdir(tmp_path)
    return main


EVERYTHING = [("base", 1), ("PPO", 1), ("PPO", 2)]


def test_what_is_whole_is_not_run_again_and_what_is_damaged_is(matrix, capsys):
    assert matrix() == EVERYTHING and matrix() == []
    whole = RUNS.read_text()
    for damage in (whole.replace(",1 3,", ",1 4,", 1), whole[:-9], whole[:-40] + "\0" * 40):
        RUNS.write_text(damage)
        capsys.readouterr()
        assert len(matrix()) == 1 and "1 of 3 rows are damaged" in capsys.readouterr().err
        assert matrix() == [] and ",1 4," not in RUNS.read_text()
    curves = RUNS.with_name("quick_curves.csv")  # a curve belongs to its run
    curves.write_text(curves.read_text().replace(",32,", ",31,", 1))
    assert matrix() == [("PPO", 1)] and matrix() == []


def test_no_damage_goes_unnoticed(matrix):
    """Bytes changed, cut out or put in anywhere: no row is read that was not written, and reading never fails."""
    matrix()
    rows, curves = reproduce.read_rows("quick", RUNS.parent)
    assert (len(rows), len(curves)) == (3, 4)
    rng = np.random.default_rng(0)
    for trial in range(600):
        path = (RUNS, RUNS.with_name("quick_curves.csv"))[trial % 2]
        good = path.read_bytes()
        at, kind, byte = rng.integers(len(good)), trial % 3, bytes([rng.integers(256)])
        bad = (good[:at] + byte + good[at + 1 :], good[:at] + good[at + 1 :], good[:at] + byte + good[at:])[kind]
        path.write_bytes(bad)
        read, points = reproduce.read_rows("quick", RUNS.parent)
        assert all(row in rows for row in read) and all(point in curves for point in points)
        path.write_bytes(good)


def test_other_commands_are_run_again_other_episodes_refused_and_runs_of_other_suites_taken(matrix, monkeypatch):
    matrix(seeds=1)
    changed = METHODS | {"PPO": METHODS["PPO"] + " --gamma 0.9"}
    monkeypatch.setattr(reproduce, "SUITES", {"quick": Suite(changed, ("base",), 1, 8)})
    assert matrix() == [("PPO", 1)]
    rows, _ = reproduce.read_rows("quick", RUNS.parent)
    assert [row["command"] for row in rows] == list(changed.values())
    with pytest.raises(runs.UserError, match="--output-dir"):
        matrix(episodes=9)

    other = Suite({"zero": "eval.py --policy zero", "the same": changed["PPO"]}, ("zero",), 1, 8)
    monkeypatch.setattr(reproduce, "SUITES", {"sac": reproduce.SUITES["quick"], "quick": other})
    RUNS.rename(RUNS.with_name("sac_runs.csv"))
    RUNS.with_name("quick_curves.csv").rename(RUNS.with_name("sac_curves.csv"))
    assert matrix() == [("zero", 1)]
    (_, ours), curves = reproduce.read_rows("quick", RUNS.parent)
    assert ours == rows[1] | {"method": "the same", "checksum": ours["checksum"]} and len(curves) == 2


def test_a_failed_run_is_told_and_the_others_go_on(matrix, monkeypatch, capsys):
    monkeypatch.setattr(reproduce, "SUITES", {"quick": Suite({"bad": "ppo.py --alpha 2", **METHODS}, ("base",), 1, 8)})
    assert matrix() == 1 and "--alpha must be" in capsys.readouterr().err
    assert [row["method"] for row in reproduce.read_rows("quick", RUNS.parent)[0]] == ["base", "PPO"]


def test_demonstrations_are_recorded_once_and_first(matrix, monkeypatch):
    recorded = []

    def record(command, **kwargs):
        recorded.append(command)
        Path(command[-1]).mkdir(parents=True)

    monkeypatch.setattr(subprocess, "run", record)
    monkeypatch.setattr(reproduce, "current_commit", lambda: "commit")
    monkeypatch.setattr(reproduce, "SUITES", {"quick": Suite(METHODS, (), 1, 8, demos=True)})
    assert matrix() == [("base", 1), ("PPO", 1)] and matrix(output_dir="other") and matrix() == []
    assert len(recorded) == 1 and "record_demos.py" in recorded[0][1] and reproduce.demos_folder().is_dir()


def test_a_cluster_is_asked_for_what_the_flags_say(matrix):
    assert matrix(executor="slurm", slurm_partition="gpu", cores_per_run=2, timeout_min=7) == EVERYTHING
    asked = {"cluster": "slurm", "slurm_partition": "gpu", "cpus_per_task": 2, "timeout_min": 7}
    assert asked.items() <= Executor.asked.items()


def test_without_submitit_it_says_so_and_without_a_place_to_write_nothing_runs(matrix, monkeypatch):
    RUNS.parent.write_text("a file where a folder should be")
    with pytest.raises(OSError, match="results"):
        matrix()
    RUNS.parent.unlink()
    monkeypatch.setitem(sys.modules, "submitit", None)  # as if it were not installed
    with pytest.raises(runs.UserError, match="pip install submitit"):
        matrix()
    assert not [path for path in Path().rglob("*") if path.suffix not in ("", ".lock")]


def test_a_method_that_left_the_suite_leaves_its_rows_behind(matrix, monkeypatch):
    matrix()
    changed = {**{name: command for name, command in METHODS.items() if name != "PPO"}, "new": "ppo.py --num-envs 4"}
    monkeypatch.setitem(reproduce.SUITES, "quick", Suite(changed, ("base",), seeds=2, episodes=8))
    matrix()
    assert {row["method"] for row in reproduce.read_rows("quick", RUNS.parent)[0]} == set(changed)


def test_a_suite_end_to_end(monkeypatch, tmp_path, capsys):
    methods = {name: reproduce.SUITES["quick"].methods[name] for name in ("base alone", "residual, PPO")}
    monkeypatch.setattr(reproduce, "SUITES", {"quick": Suite(methods, ("base alone",), 1, 8)})
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # submitit's jobs import reproduce
    monkeypatch.chdir(tmp_path)
    assert reproduce.main(reproduce.Args(suite="quick")) == 0
    rows, curves = reproduce.read_rows("quick", RUNS.parent)
    assert [(row["method"], row["command"], row["seed"]) for row in rows] == [(*item, "1") for item in methods.items()]
    assert [point["step"] for point in curves] == ["0", "1024"] and {row["episodes"] for row in rows} == {"8"}
    for column in set(reproduce.RUN_COLUMNS) - {"failed_episodes", "median_time_to_success_s"}:
        assert rows[0][column] != "" != rows[1][column], column
    table = RUNS.with_name("table.md").read_text()
    assert reproduce.format_suite("quick", rows, curves) in table and table in f"{table}{capsys.readouterr().out}"
    for name in ("quick_curves.png", "quick_success.png"):
        assert RUNS.with_name(name).stat().st_size > 5000
    base = reproduce.solved(rows[:1])[0]
    episodes = evaluation.play_episodes(JacobianIKPolicy(), range(2_000_000, 2_000_008))
    np.testing.assert_array_equal(base, episodes["success"])
    assert 0 < base.mean() < 1
    assert RUNS.parent.resolve() in runs.LOCKS  # two processes would overwrite each other's rows


def test_stopped_it_takes_its_runs_along(tmp_path):
    command = [sys.executable, str(ROOT / "reproduce.py"), "--suite", "quick"]
    process = subprocess.Popen(command, cwd=tmp_path, start_new_session=True, stderr=subprocess.PIPE, text=True)
    while not list(tmp_path.glob("runs/pure_RL*")) and process.poll() is None:
        time.sleep(0.05)
    process.terminate()
    assert "goes on from here" in process.communicate()[1] and process.returncode == 1
    for _ in range(200):
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:  # nobody of the group is left
            return
        time.sleep(0.1)
    pytest.fail("its runs go on")


# The committed results


def test_tables_are_those_of_the_measurements(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    table = Path("results", "table.md").read_text()
    assert table == reproduce.format_everything(Path("results")) and "damaged" not in capsys.readouterr().err


@pytest.mark.parametrize("suite", [path.stem.removesuffix("_runs") for path in ROOT.glob("results/*_runs.csv")])
def test_committed_rows_are_complete(suite):
    rows, _ = reproduce.read_rows(suite, ROOT / "results")
    for method, command in reproduce.SUITES[suite].methods.items():
        ours = [row for row in rows if row["method"] == method]
        assert {row["command"] for row in ours} == {command}
        assert len(ours) == (1 if "eval.py" in command else reproduce.SUITES[suite].seeds)
        assert {int(row["episodes"]) for row in ours} == {reproduce.SUITES[suite].episodes}


# The benchmark

TINY = "--seconds 0.01 --num-envs 1 2 --warmup-steps 1"
TRAINING = "--total-timesteps 512 --num-envs 8 --num-steps 16 --minibatch-size 128 --eval-episodes 1 --test-episodes 1"


@pytest.mark.parametrize("name", ["random", "jacobian"])
def test_the_benchmark_replays_what_the_environments_do_to_the_last_bit(name):
    envs = PaperSquareVectorEnv(4)
    policy = evaluation.RandomPolicy() if name == "random" else JacobianIKPolicy()
    obs, _ = envs.reset(seed=0, options={"episode_steps": np.array([0, 330, 360, 390])})
    policy.reset(np.ones(4, dtype=bool))
    ends = 0
    for _ in range(100):
        actions = 1.5 * policy(obs)  # some are clipped
        seconds, qpos = benchmark.replay(envs, actions)
        obs, _, terminations, truncations, _ = envs.step(actions)
        done = terminations | truncations
        np.testing.assert_array_equal(qpos[~done], envs.batch.bind("qpos")[~done])
        policy.reset(done)
        ends += done.sum()
    assert seconds > 0 and ends >= 3  # what follows a reset is replayed too


def test_the_benchmark_prints_every_row(monkeypatch, tmp_path, capsys):
    def run(command, cwd=None, **kwargs):  # the processes that it starts, which other tests start for real
        if "--total-timesteps" in command:
            with SummaryWriter(Path(cwd) / "runs" / "run") as writer:
                for step, seconds in ((4096, 9.0), (8192, 1.0)):  # the first rollout does not count
                    writer.add_scalar("time/collect", seconds, step)
                    writer.add_scalar("time/update", 3 * seconds, step)
        return SimpleNamespace(returncode=0, stdout="0.002\n500000\n")

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr("importlib.util.find_spec", {"stable_baselines3": True}.get)  # it may be missing
    act = ROOT / "assets" / "act.safetensors"
    flags = f"{TINY} --repeats 2 --bases jacobian {act} --training-steps 8192 --sb3-steps 1"
    rows = run_script("benchmark.py", flags, monkeypatch, tmp_path)["samples"]
    table = capsys.readouterr().out
    for start in (
        "random, num_envs 1,",
        "jacobian, num_envs 2,",
        "residual, num_envs 64,",
        f"base {act}",
        "agent",
        *RL,
    ):
        assert any(row.startswith(start) for row in rows), start
    for row, samples in rows.items():
        assert f"\n{row} " in table and len(samples) == 2
    assert table.count("times as fast as Stable-Baselines3") == 4
    assert re.search("\nppo.py  +1,024 .* 512 .* MB\nppo.py, collection  +4,096 .*\nppo.py, update  +1,365 ", table)
    assert not list(tmp_path.iterdir())


def test_the_benchmark_without_trainings_and_stable_baselines3(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: None)
    flags = f"{TINY} --repeats 1 --training-steps 0 --bases jacobian"
    rows = run_script("benchmark.py", flags, monkeypatch, tmp_path)["samples"]
    assert rows and not [row for row in rows if "collection" in row or "Baselines" in row]
    (pin,) = re.findall(r"pip install (stable-baselines3==\S+)", capsys.readouterr().out)
    assert pin in (ROOT / "tests" / "requirements.txt").read_text().split() and pin in benchmark.__doc__


def test_the_benchmark_trains_by_the_scripts_themselves():
    whole, collect, update, peak = benchmark.train("ppo_residual.py", TRAINING.split(), 128)
    assert 1 / whole == pytest.approx(1 / collect + 1 / update) and peak > 100
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):  # a training that fails is no row of zeros
        benchmark.run_child(".", "-c", "1 / 0")


@pytest.mark.slow
@pytest.mark.parametrize("call", ["train_and_replay('ppo_residual.py', 128, *{})", "learn_with_sb3(False, 1)",
                                  "learn_with_sb3(True, 1, True)"])  # fmt: skip
def test_the_benchmark_finds_the_bound_of_trainings_and_trains_by_stable_baselines3(call, monkeypatch):
    if "sb3" in call:
        pytest.importorskip("stable_baselines3")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # several times faster where other tests run beside it
    assert benchmark.run_function(call.format(TRAINING.split())) > 0
