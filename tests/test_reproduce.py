"""reproduce.py: statistics, resuming, damaged results, and that the tables are those of the measurements."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tyro
from scipy.stats import norm

import act
import diffusion_policy
import eval as evaluation
import ppo
import ppo_residual
import record_demos
import reproduce
import sac_residual
from reproduce import Suite, interquartile_mean, interval, probability_of_improvement

ROOT = Path(__file__).resolve().parent.parent
MODULES = (act, diffusion_policy, evaluation, ppo, ppo_residual, record_demos, sac_residual)
SCRIPTS = {f"{module.__name__}.py": module for module in MODULES}
TINY = "--total-timesteps 32 --num-envs 2 --num-steps 8 --minibatch-size 8 --eval-episodes 1"
TINY_SUITE = Suite({"base": "eval.py --policy jacobian", "PPO, tiny": f"ppo.py {TINY}"}, ("base",), 2, 2)


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """A suite of one base and one short training, and an empty folder to run it in."""
    monkeypatch.setattr(reproduce, "SUITES", {"tiny": TINY_SUITE})
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # submitit's jobs import reproduce
    monkeypatch.chdir(tmp_path)
    return tmp_path / "results" / "tiny_runs.csv"


def run_folders():
    return sorted(path.name for path in Path("runs").glob("PPO_tiny__*"))


# Statistics


def test_interquartile_mean_drops_the_outer_quarters():
    assert interquartile_mean(np.array([0.0, 9.0, 1.0, 2.0, 3.0, 4.0, 100.0, -50.0])) == (1 + 2 + 3 + 4) / 4


def test_probability_of_improvement_counts_pairs_and_halves_ties():
    x, y = np.array([0.9, 0.5, 0.5]), np.array([0.5, 0.1])
    pairs = [1.0 if a > b else 0.5 if a == b else 0.0 for a in x for b in y]
    assert probability_of_improvement(x, y) == pytest.approx(np.mean(pairs))
    assert probability_of_improvement(y, x) == pytest.approx(1 - np.mean(pairs))


def test_bootstrap_interval_of_a_mean_is_the_normal_one():
    sample = np.random.default_rng(0).normal(5.0, 2.0, 400)
    half = norm.ppf(0.975) * sample.std() / np.sqrt(len(sample))
    np.testing.assert_allclose(interval(np.mean, sample), [sample.mean() - half, sample.mean() + half], atol=0.02)


def test_bootstrap_draws_from_every_method_on_its_own():
    def difference(x, y, axis=-1):
        return x.mean(axis=axis) - y.mean(axis=axis)

    rng = np.random.default_rng(1)
    x, y = rng.normal(0.0, 1.0, 300), rng.normal(0.0, 3.0, 100)
    half = norm.ppf(0.975) * np.sqrt(x.var() / 300 + y.var() / 100)
    low, high = interval(difference, x, y)
    assert (high - low) / 2 == pytest.approx(half, rel=0.05)
    # a single run of something deterministic does not vary
    low, high = interval(difference, x, np.array([2.0]))
    assert (high - low) / 2 == pytest.approx(norm.ppf(0.975) * x.std() / np.sqrt(300), rel=0.05)


def made_up_run(method, seed, failed, episodes=100):
    row = {name: "" for name in reproduce.RUN_COLUMNS}
    failed = " ".join(str(k) for k in failed)
    return row | {
        "method": method,
        "seed": str(seed),
        "steps": "0",
        "episodes": str(episodes),
        "failed_episodes": failed,
    }


def test_differences_are_paired_on_the_same_episodes():
    # both fail 40 and 50 of 100 episodes, and 40 of them are the same ones
    runs = [made_up_run("a", 1, range(40)), made_up_run("b", 1, range(50)), made_up_run("c", 1, range(40, 90))]
    table = reproduce.format_comparisons(runs, ("a",)).splitlines()[2:]
    same, other = ([float(x) for x in re.findall(r"-?\d+\.\d", line)] for line in table)
    assert same[0] == other[0] == -10.0
    assert same[2] - same[1] < 0.5 * (other[2] - other[1])  # 0 to 1 differ in ten episodes only


def test_table_of_methods_on_known_data():
    runs = [made_up_run("m", seed, range(failed)) for seed, failed in ((1, 0), (2, 10), (3, 20), (4, 90))]
    (row,) = reproduce.format_methods(runs, []).splitlines()[2:]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[:2] == ["m", "4"] and cells[2].startswith("70.0 (") and cells[3].startswith("85.0 (")
    assert cells[4] == "10.0 (5.5 to 17.4)"  # Wilson's interval of 10 of 100


# The matrix


@pytest.mark.parametrize("suite", reproduce.SUITES)
def test_dry_run_prints_commands_that_parse(suite, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "assets").symlink_to(ROOT / "assets")
    reproduce.main(reproduce.Args(suite=suite, dry_run=True))
    lines = capsys.readouterr().out.splitlines()
    if reproduce.SUITES[suite].demos:
        assert lines.pop(0) == "python record_demos.py --num-episodes 100 --output-dir demos"
    trained = sum("eval.py" not in command for command in reproduce.SUITES[suite].methods.values())
    alone = len(reproduce.SUITES[suite].methods) - trained
    assert len(lines) == 2 * trained * reproduce.SUITES[suite].seeds + alone
    folders = set()
    for line in lines:
        python, name, *flags = shlex.split(line)
        args = tyro.cli(SCRIPTS[name].Args, args=flags)
        if name != "eval.py":
            SCRIPTS[name].check_args(args)
            folders.add((args.exp_name, args.seed))
    assert len(folders) == trained * reproduce.SUITES[suite].seeds  # no two runs share one
    assert set(reproduce.SUITES[suite].references) <= set(reproduce.SUITES[suite].methods)
    assert [path.name for path in tmp_path.iterdir()] == ["assets"]


@pytest.mark.parametrize(
    "flags",
    [
        "--suite papers",
        "--seeds -1",
        "--cores-per-run 0",
        "--cores-per-run 100000",
        "--only nothing",
        "--timeout-min 0",
    ],
)
def test_bad_flags_end_with_one_line(flags, tmp_path):
    command = [sys.executable, str(ROOT / "reproduce.py"), *flags.split()]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_the_quick_suite_end_to_end(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.chdir(tmp_path)
    assert reproduce.main(reproduce.Args(suite="quick")) == 0
    runs, curves = reproduce.read_rows("quick", Path("results"))
    methods = reproduce.SUITES["quick"].methods
    assert [(row["method"], row["seed"]) for row in runs] == [
        (method, str(seed)) for method in methods for seed in ((1,) if "base" in method else (1, 2))
    ]
    for row in runs:
        curve = reproduce.of_run(row, curves)
        assert row["episodes"] == "8" and row["command"] == methods[row["method"]]
        assert [point["step"] for point in curve] == ([] if "base" in row["method"] else ["0", row["steps"]])
        for column in set(reproduce.RUN_COLUMNS) - {"failed_episodes", "median_time_to_success_s", "commit"}:
            assert row[column] != "", column
    table = Path("results", "table.md").read_text()
    assert reproduce.format_suite("quick", runs, curves) in table and table in f"{table}{capsys.readouterr().out}"
    for name in ("quick_curves.png", "quick_success.png"):
        assert Path("results", name).stat().st_size > 5000
    base = reproduce.solved(runs[:1])[0]
    assert 0 < base.mean() < 1  # and which episodes it solved is what eval.py says
    episodes = evaluation.play_episodes(evaluation.make_base_policy("jacobian"), range(2_000_000, 2_000_008), {})
    np.testing.assert_array_equal(base, episodes["success"])


def test_what_is_whole_is_not_run_again_and_what_is_damaged_is(tiny, capfd):
    assert reproduce.main(reproduce.Args(suite="tiny")) == 0
    lines, first = tiny.read_text().splitlines(keepends=True), run_folders()
    assert len(lines) == 4 and len(first) == 2
    before = tiny.read_text()
    reproduce.main(reproduce.Args(suite="tiny"))
    assert tiny.read_text() == before and run_folders() == first
    damages = {
        "a digit": before.replace(",32,", ",33,", 1),
        "half a line": before[:-30],
        "no line end": before.rstrip("\n"),
        "zeros": before[:-40] + "\0" * 40,
    }
    for name, text in damages.items():
        tiny.write_text(text)
        runs, _ = reproduce.read_rows("tiny", Path("results"))
        assert len(runs) == (3 if name == "no line end" else 2), name
    tiny.write_text(before[:-30])
    capfd.readouterr()
    reproduce.main(reproduce.Args(suite="tiny"))
    assert "1 of 3 rows are damaged" in capfd.readouterr().err
    after, curves = reproduce.read_rows("tiny", Path("results"))
    assert [(row["method"], row["seed"]) for row in after] == [("base", "1"), ("PPO, tiny", "1"), ("PPO, tiny", "2")]
    assert len(run_folders()) == 3 and len(curves) == 4
    # a curve belongs to its run
    curves_path = tiny.with_name("tiny_curves.csv")
    curves_path.write_text(curves_path.read_text().replace(",32,", ",31,", 1))
    assert len(reproduce.read_rows("tiny", Path("results"))[0]) == 2


def test_no_damage_goes_unnoticed(tiny):
    """Bytes changed, cut out or put in anywhere: no row is read that was not written, and reading never fails."""
    runs = [
        made_up_run(method, seed, range(3)) | {"command": "c", "steps": "32"}
        for method in TINY_SUITE.methods
        for seed in (1, 2)
    ]
    curves = [{"method": r["method"], "seed": r["seed"], "step": s, "training_s": "1.5", "success": "0.25"}
              for r in runs for s in ("0", "32")]  # fmt: skip
    runs = [row | {"checksum": reproduce.checksum(row, reproduce.of_run(row, curves))} for row in runs]
    tiny.parent.mkdir()
    reproduce.write_rows("tiny", runs, curves, tiny.parent)
    assert reproduce.read_rows("tiny", tiny.parent) == (runs, curves)
    rng = np.random.default_rng(0)
    for trial in range(600):
        path = (tiny, tiny.with_name("tiny_curves.csv"))[trial % 2]
        good = path.read_bytes()
        at, kind, byte = rng.integers(len(good)), trial % 3, bytes([rng.integers(256)])
        bad = (good[:at] + byte + good[at + 1 :], good[:at] + good[at + 1 :], good[:at] + byte + good[at:])[kind]
        path.write_bytes(bad)
        read, points = reproduce.read_rows("tiny", tiny.parent)
        assert all(row in runs for row in read) and all(point in curves for point in points)
        path.write_bytes(good)


def test_other_commands_or_episodes_are_run_again(tiny, monkeypatch):
    reproduce.main(reproduce.Args(suite="tiny", seeds=1))
    suite = Suite(TINY_SUITE.methods | {"PPO, tiny": f"ppo.py {TINY} --gamma 0.9"}, ("base",), 1, 2)
    monkeypatch.setattr(reproduce, "SUITES", {"tiny": suite})
    reproduce.main(reproduce.Args(suite="tiny"))
    runs, curves = reproduce.read_rows("tiny", Path("results"))
    assert [row["command"] for row in runs] == list(suite.methods.values()) and len(curves) == 2
    reproduce.main(reproduce.Args(suite="tiny", episodes=3, only="base"))
    assert [row["episodes"] for row in reproduce.read_rows("tiny", Path("results"))[0]] == ["3", "2"]
    assert "| judged by other episodes |" in Path("results", "table.md").read_text()


def test_demonstrations_are_recorded_once_and_first(tiny, monkeypatch):
    train = "act.py --dataset demos --train-steps 1 --batch-size 8 --eval-episodes 1 --torch-threads 1"
    suite = Suite({"base": "eval.py --policy zero", "ACT, tiny": train}, (), 1, 2, demos="demos")
    monkeypatch.setattr(reproduce, "SUITES", {"tiny": suite})
    record = f"record_demos.py --num-episodes 2 --model-path {ROOT}/assets/ppo_residual.pt --output-dir"
    monkeypatch.setattr(reproduce, "RECORD", record)
    assert reproduce.main(reproduce.Args(suite="tiny")) == 0
    recorded = Path("demos/meta/info.json").stat().st_mtime_ns
    assert reproduce.main(reproduce.Args(suite="tiny", episodes=3)) == 0
    assert Path("demos/meta/info.json").stat().st_mtime_ns == recorded
    _, row = reproduce.read_rows("tiny", Path("results"))[0]
    assert (row["steps"], row["episodes"]) == ("1", "3")


def test_a_run_of_another_suite_is_not_repeated(tiny, monkeypatch):
    other = Suite({"alone": "eval.py --policy zero", "the same": TINY_SUITE.methods["PPO, tiny"]}, ("alone",), 2, 2)
    monkeypatch.setattr(reproduce, "SUITES", {"tiny": TINY_SUITE, "other": other})
    reproduce.main(reproduce.Args(suite="tiny", seeds=1))
    first = run_folders()
    reproduce.main(reproduce.Args(suite="other", seeds=1))
    assert run_folders() == first and len(list(Path("runs").glob("alone"))) == 1
    theirs, ours = (reproduce.read_rows(suite, Path("results")) for suite in ("tiny", "other"))
    own = {"method": "the same", "checksum": ours[0][1]["checksum"]}
    assert ours[0][1] == theirs[0][1] | own and ours[1] == [point | {"method": "the same"} for point in theirs[1]]


def test_killed_at_any_moment_it_resumes(tmp_path):
    code = f"""
import sys; sys.path.insert(0, {str(ROOT / "tests")!r})
import reproduce, test_reproduce
reproduce.SUITES = {{"tiny": test_reproduce.TINY_SUITE}}
reproduce.main(reproduce.Args(suite="tiny"))
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, start_new_session=True, env=environment)
    path = tmp_path / "results" / "tiny_runs.csv"
    while not path.is_file() and process.poll() is None:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)  # with the runs on their way
    process.wait()
    saved = path.read_text()
    assert 1 <= len(saved.splitlines()) - 1 < 3
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True)
    lines = path.read_text().splitlines()
    assert len(lines) == 4 and len({tuple(line.split(",")[:4]) for line in lines}) == 4
    assert set(saved.splitlines()) <= set(lines)  # what was there has not been run again


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


def test_a_failed_run_is_told_and_the_others_go_on(tiny, monkeypatch, capfd):
    suite = Suite({"bad": "ppo_residual.py --alpha 2", **TINY_SUITE.methods}, ("base",), 1, 2)
    monkeypatch.setattr(reproduce, "SUITES", {"tiny": suite})
    assert reproduce.main(reproduce.Args(suite="tiny")) == 1
    assert "--alpha must be" in capfd.readouterr().err
    assert [row["method"] for row in reproduce.read_rows("tiny", Path("results"))[0]] == ["base", "PPO, tiny"]


FAKE_SLURM = {  # runs each batch file here and now
    "sbatch": """cat "$1" >> sbatch.txt
SLURM_JOB_ID=$$ SLURM_NTASKS=1 SLURM_JOB_NUM_NODES=1 SLURM_NODEID=0 SLURM_PROCID=0 SLURM_LOCALID=0 \\
    bash "$1" > /dev/null 2>&1 &
echo "Submitted batch job $$"
""",
    "srun": """while :; do case "$1" in --unbuffered) shift ;; --*) shift 2 ;; *) break ;; esac; done
exec "$@"
""",
    "sacct": """echo "JobID|State|NodeList"
""",
}


def test_the_same_matrix_goes_to_slurm(tiny, monkeypatch):
    folder = tiny.parent.parent / "bin"
    folder.mkdir()
    for name, text in FAKE_SLURM.items():
        (folder / name).write_text(f"#!/bin/sh\n{text}")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    args = reproduce.Args(suite="tiny", executor="slurm", slurm_partition="gpu", cores_per_run=2, timeout_min=7)
    assert reproduce.main(args) == 0
    runs, curves = reproduce.read_rows("tiny", Path("results"))
    assert [(row["method"], row["seed"]) for row in runs] == [("base", "1"), ("PPO, tiny", "1"), ("PPO, tiny", "2")]
    assert {(row["cores"], row["side_by_side"]) for row in runs} == {("2", "3")} and len(curves) == 4
    for flag in ("--partition=gpu", "--cpus-per-task=2", "--time=7"):
        assert Path("sbatch.txt").read_text().count(f"#SBATCH {flag}\n") == 3


@pytest.mark.skipif(shutil.which("srun") is not None, reason="this is a cluster")
def test_without_slurm_or_a_place_to_write_it_says_so(tiny, capfd):
    tiny.parent.write_text("a file where a folder should be")
    for args in (reproduce.Args(suite="tiny", executor="slurm"), reproduce.Args(suite="tiny")):
        with pytest.raises(SystemExit) as end:
            reproduce.main(args)
        error = capfd.readouterr().err
        assert end.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1


def test_without_submitit_it_says_what_to_install(tiny, monkeypatch, capfd):
    monkeypatch.setitem(sys.modules, "submitit", None)  # as if it were not installed
    with pytest.raises(SystemExit) as end:
        reproduce.main(reproduce.Args(suite="tiny"))
    assert end.value.code == 2 and "pip install submitit" in capfd.readouterr().err and not tiny.exists()


# The committed results


def test_tables_are_those_of_the_measurements(monkeypatch):
    monkeypatch.chdir(ROOT)
    table = Path("results", "table.md").read_text()
    assert table == reproduce.format_everything(Path("results"))
    shown = re.findall(r"^\|.*(?:\bpoints|interquartile).*\n(?:\|.*\n)+", Path("README.md").read_text(), re.MULTILINE)
    assert len(shown) >= 2
    for rows in shown:
        assert rows in table


@pytest.mark.parametrize("suite", ["paper", "ablations", "precision"])
def test_committed_rows_are_whole_and_complete(suite, monkeypatch, capfd):
    monkeypatch.chdir(ROOT)
    runs, _ = reproduce.read_rows(suite, Path("results"))
    assert "damaged" not in capfd.readouterr().err
    for method, command in reproduce.SUITES[suite].methods.items():
        rows = [row for row in runs if row["method"] == method]
        assert {row["command"] for row in rows} == {command}
        assert len(rows) == (1 if "eval.py" in command else reproduce.SUITES[suite].seeds)
        assert {int(row["episodes"]) for row in rows} == {reproduce.SUITES[suite].episodes}
