"""Trainings go on where they were stopped, to the last bit: killed at any moment, with a damaged state, on a full disk.

python -m pytest -m campaign tests/test_resume.py -s    # kill -9, six times per script, at random moments: half an hour
"""

import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_imitation import TINY, demos  # noqa: F401
from test_scripts import ROOT, run_script
from torch.optim.optimizer import register_optimizer_step_post_hook

import checkpoints
from base_policies import make_base_policy
from checkpoints import PREVIOUS, STATE, load_state, read_checkpoint, save_state, write_whole
from env_paper_square import PaperSquareVectorEnv

EPISODES = "--eval-episodes 1 --test-episodes 1 --num-threads 1"
PPO = f"{EPISODES} --num-envs 4 --num-steps 8 --minibatch-size 16 --update-epochs 2 --total-timesteps 192"
PPO += " --eval-freq 80 --save-freq 50 --curriculum"
SAC = "--num-envs 4 --total-timesteps 120 --learning-starts 40 --batch-size 8 --buffer-size 60 --utd 0.4"
IL = f"--base-policy hybrid --hybrid-bases jacobian il --il-checkpoint {ROOT / 'assets' / 'act.pt'}"
SHORT = {
    "ppo.py": PPO,
    "ppo_residual.py": f"{PPO} {IL}",
    "sac_residual.py": f"{EPISODES} {SAC} --eval-freq 50 --save-freq 20 {IL}",
    "act.py": f"{TINY['act.py']} --train-steps 24 --eval-freq 10 --save-freq 5 --log-freq 4",
    "diffusion_policy.py": f"{TINY['diffusion_policy.py']} --train-steps 24 --eval-freq 10 --save-freq 5 --log-freq 4",
}
LONG = {
    "ppo.py": "--total-timesteps 81920 --eval-freq 20000 --save-freq 10000 --curriculum",
    "ppo_residual.py": f"--total-timesteps 81920 --eval-freq 20000 --save-freq 10000 {IL}",
    "sac_residual.py": "--total-timesteps 6000 --learning-starts 2000 --eval-freq 2000 --save-freq 1000",
    "act.py": "--train-steps 300 --eval-freq 100 --save-freq 50 --log-freq 20 --torch-threads 1",
    "diffusion_policy.py": "--train-steps 300 --eval-freq 100 --save-freq 50 --log-freq 20 --torch-threads 1",
}


class Killed(BaseException):
    """Stands in for kill -9 where a process of its own would take too long."""


@pytest.fixture(autouse=True)
def signals():
    """The handlers that trainings leave behind."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def dataset_of(name, demos):  # noqa: F811
    return f"--dataset {demos}" if name in TINY else ""


def train(name, flags, monkeypatch, folder, at_step=0, what=None):
    """Run a script and do something, `what()`, in its gradient step number `at_step`; returns the folder of the run."""
    steps = 0

    def count(*_):
        nonlocal steps
        steps += 1
        if steps == at_step:
            what()

    folder.mkdir(exist_ok=True)
    hook = register_optimizer_step_post_hook(count)
    try:
        run_script(name, flags, monkeypatch, folder)
    finally:
        hook.remove()
    assert not at_step
    return next(folder.glob("runs/*"))


def kill():
    raise Killed


def what_a_run_made(run_dir):
    """Weights, evaluations and curves, all but the times."""
    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0}).Reload()
    keys = [key for key in events.Tags()["scalars"] if not key.startswith("time/") and key != "charts/SPS"]
    curves = {key: [(scalar.step, scalar.value) for scalar in events.Scalars(key)] for key in keys}
    evaluations = json.loads((run_dir / "results.json").read_text())["evaluations"]
    evaluations = [{key: value for key, value in row.items() if "seconds" not in key} for row in evaluations]
    last, best = (read_checkpoint(run_dir / name) for name in ("last.pt", "best.pt"))
    return last["model"], best["model"], curves, evaluations, best["global_step"]


def assert_same(run_dir, other):
    for ours, theirs in zip(what_a_run_made(run_dir), what_a_run_made(other), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", SHORT)
def test_a_run_that_was_killed_and_stopped_ends_as_one_that_was_not(name, demos, monkeypatch, tmp_path, capfd):  # noqa: F811
    flags = f"{SHORT[name]} {dataset_of(name, demos)}"
    plain = train(name, flags, monkeypatch, tmp_path / "plain")
    with pytest.raises(Killed):
        train(name, flags, monkeypatch, tmp_path / "killed", 16, kill)
    (run_dir,) = tmp_path.glob("killed/runs/*")
    killed_at = load_state(run_dir)["global_step"]
    assert killed_at > 0
    resume = f"--resume runs/{run_dir.name}"
    for number in (signal.SIGTERM, signal.SIGINT):
        with pytest.raises(SystemExit) as end:
            train(name, resume, monkeypatch, tmp_path / "killed", 3, lambda number=number: signal.raise_signal(number))
        assert end.value.code == 128 + number
        assert f"{name} {resume}\n" in capfd.readouterr().err
    assert load_state(run_dir)["global_step"] > killed_at
    train(name, resume, monkeypatch, tmp_path / "killed")
    assert_same(plain, run_dir)
    with pytest.raises(SystemExit):
        train(name, resume, monkeypatch, tmp_path / "killed")
    assert "this run has come to its end\n" in capfd.readouterr().err


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A folder with the same run of ppo_residual.py twice: plain, and killed after some saves."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as monkeypatch:
        train("ppo_residual.py", f"{PPO} --exp-name plain", monkeypatch, folder)
        with pytest.raises(Killed):
            train("ppo_residual.py", f"{PPO} --exp-name killed", monkeypatch, folder, 21, kill)
    return folder


@pytest.fixture
def folder(stopped, tmp_path):
    """A copy to break: plain, killed."""
    shutil.copytree(stopped / "runs", tmp_path / "runs")
    return tmp_path


def find(folder, name):
    return next(folder.glob(f"runs/{name}*"))


DAMAGE = {
    "truncated": lambda content: content[: len(content) // 2],
    "the last byte": lambda content: content[:-1],
    "empty": lambda content: b"",
    "a bit": lambda content: (
        content[: len(content) // 2] + bytes([content[len(content) // 2] ^ 1]) + content[len(content) // 2 + 1 :]
    ),
    "zeros": lambda content: bytes(len(content)),
    "gone": None,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_state_is_noticed_and_the_one_before_it_taken(damage, folder, monkeypatch, capfd):
    run_dir = find(folder, "killed")
    state = run_dir / STATE
    steps = [read_checkpoint(run_dir / name)["global_step"] for name in (PREVIOUS, STATE)]
    assert 0 < steps[0] < steps[1]
    content = state.read_bytes()
    state.unlink()
    if DAMAGE[damage] is not None:
        state.write_bytes(DAMAGE[damage](content))
    assert load_state(run_dir)["global_step"] == steps[0]
    error = capfd.readouterr().err
    assert error.startswith(f"warning: {state}") and f"going on from {PREVIOUS}, step {steps[0]}" in error
    if damage == "a bit":
        train("ppo_residual.py", f"--resume runs/{run_dir.name}", monkeypatch, folder)
        assert_same(find(folder, "plain"), run_dir)


def test_a_damaged_state_does_not_displace_a_whole_one(folder):
    run_dir = find(folder, "killed")
    before = read_checkpoint(run_dir / PREVIOUS)["global_step"]
    (run_dir / STATE).write_bytes(b"damaged")
    save_state({"global_step": 1000}, run_dir)
    assert [read_checkpoint(run_dir / name)["global_step"] for name in (PREVIOUS, STATE)] == [before, 1000]


@pytest.mark.parametrize("where", ["write_bytes", "replace", "fsync"])
def test_what_fails_to_be_written_leaves_what_was_there(where, folder, monkeypatch):
    """A disk that fails at each of the steps of a save."""
    run_dir = find(folder, "killed")
    before = load_state(run_dir)["global_step"]

    def fail(*_):
        raise OSError(28, "No space left on device")

    failing = pytest.MonkeyPatch()
    failing.setattr(*((os, where) if where == "fsync" else (Path, where)), fail)
    with pytest.raises(OSError, match="No space left on device: '.*state_new.pt'"):
        save_state({"global_step": 1000}, run_dir)
    failing.undo()
    assert load_state(run_dir)["global_step"] == before and not list(run_dir.glob("*.tmp"))
    save_state({"global_step": 1000}, run_dir)
    assert load_state(run_dir)["global_step"] == 1000


def test_a_file_is_whole_or_not_there(tmp_path):
    def half(path):
        path.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        write_whole(tmp_path / "new" / "file", half)
    assert not list((tmp_path / "new").iterdir())


@pytest.mark.skipif(os.name != "posix", reason="needs a limit on the size of files")
@pytest.mark.parametrize("largest", [100_000, 4_000])  # bytes: the second save fails, the first TensorBoard's
def test_a_full_disk_ends_a_training_with_one_line(largest, tmp_path):
    import resource

    command = [sys.executable, str(ROOT / "ppo_residual.py"), *shlex.split(PPO)]
    limit = {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))}
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, **limit)
    last = result.stderr.splitlines()[-1]
    assert result.returncode == 2 and last.startswith("error: [Errno 27] ") and "Traceback" not in result.stderr
    (run_dir,) = tmp_path.glob("runs/*")
    assert load_state(run_dir)["script"] == "ppo_residual" and not list(run_dir.glob("*.tmp"))


REFUSED = {
    "runs/nothing": "cannot be read: [Errno 2] No such file",
    "runs": "cannot be read: [Errno 2] No such file",
    "runs/killed --alpha 0.3": "goes on with the flags that the run was started with: leave out all others",
    "runs/plain": "this run has come to its end",
    "runs/other": "this run is of 'ppo', not of ppo_residual.py",
    "runs/short": "its state lacks 'evaluations'",
    "runs/shapes": "next_obs is torch.float32 [3, 7], not torch.float32 [4, 38]",
    "runs/more": "it takes 2 processes, as before",
    "runs/base": "its imitation-learned base has changed since the run began",
    "runs/damaged": "is not a checkpoint of this project (cannot be read:",
}


@pytest.mark.parametrize("flags", REFUSED)
def test_what_cannot_be_gone_on_with_is_refused_in_one_line(flags, folder, monkeypatch, capfd):
    for name in ("plain", "killed"):
        find(folder, name).rename(folder / "runs" / name)
    killed = folder / "runs" / "killed"
    state = load_state(killed)
    own = state["processes"][0]
    changes = {
        "other": {"script": "ppo"},
        "shapes": {"processes": [{**own, "next_obs": torch.zeros(3, 7)}]},
        "more": {"processes": 2 * state["processes"]},
        "base": {"args": {**state["args"], **parse_il()}, "processes": [{**own, "base": il_memory(own)}]},
        "short": {key: value for key, value in state.items() if key != "evaluations"},
    }
    for name, change in changes.items():
        (folder / "runs" / name).mkdir()
        save_state(change if name == "short" else {**state, **change}, folder / "runs" / name)
    shutil.copytree(killed, folder / "runs" / "damaged")
    for name in (STATE, PREVIOUS):
        (folder / "runs" / "damaged" / name).write_bytes(b"damaged")
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.name.endswith(".pt")}
    capfd.readouterr()
    with pytest.raises(SystemExit) as end:
        train("ppo_residual.py", f"--resume {flags}", monkeypatch, folder)
    error = capfd.readouterr().err
    assert end.value.code == 2 and error.count("\n") == 1 and REFUSED[flags] in error
    assert error.startswith(f"error: --resume {flags.split()[0]}: ")
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.name.endswith(".pt")}


def parse_il():
    return {"base_policy": "il", "il_checkpoint": str(ROOT / "assets" / "act.pt")}


def il_memory(own):
    policy = make_base_policy("il", il_checkpoint=str(ROOT / "assets" / "act.pt"))
    policy.reset(np.ones(4, dtype=bool))
    return [{**policy.state_dict(), "fingerprint": "another"}, own["base"][1]]


def test_demonstrations_that_changed_are_refused(demos, monkeypatch, tmp_path, capfd):  # noqa: F811
    shutil.copytree(demos, tmp_path / "demos")
    with pytest.raises(Killed):
        train("act.py", f"{SHORT['act.py']} --dataset demos", monkeypatch, tmp_path, 12, kill)
    with pytest.raises(SystemExit):
        run_script("record_demos.py", "--append --num-episodes 1 --policy jacobian", monkeypatch, tmp_path)
    with pytest.raises(SystemExit) as end:
        train("act.py", f"--resume {next(tmp_path.glob('runs/*'))}", monkeypatch, tmp_path)
    assert end.value.code == 2
    assert "the demonstrations in demos are not those that it began with" in capfd.readouterr().err


def test_a_run_that_had_not_begun_begins_anew(monkeypatch, tmp_path):
    plain = train("ppo.py", PPO, monkeypatch, tmp_path / "plain")

    def stop(*_):
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr("eval.validate", stop)  # before the first state
        train("ppo.py", PPO, monkeypatch, tmp_path / "killed")
    (run_dir,) = tmp_path.glob("killed/runs/*")
    train("ppo.py", f"--resume runs/{run_dir.name}", monkeypatch, tmp_path / "killed")
    assert_same(plain, run_dir)


@pytest.mark.parametrize("threads", [1, 3])
def test_environments_go_on_to_the_last_bit(threads):
    """In another process's place: with other threads, after other episodes, through a file."""
    base, rng = make_base_policy("jacobian"), np.random.default_rng(0)
    noise = rng.uniform(-1.0, 1.0, (120, 40, 6))
    envs, others = (PaperSquareVectorEnv(40, num_threads=count) for count in (2, threads))
    obs, _ = envs.reset(seed=0, options={"episode_steps": np.arange(40) * 10})
    others.reset(seed=7)
    for step in range(60):
        obs, *_ = envs.step(base(obs) + noise[step])
        others.step(noise[step])
    envs.tape_half_size = 0.1
    others.load_state_dict(checkpoints.plain(envs.state_dict()))
    again = obs
    for step in range(60, 120):
        obs, rewards, terminations, truncations, _ = envs.step(base(obs) + noise[step])
        again, *others_results, _ = others.step(base(again) + noise[step])
        for ours, theirs in zip((obs, rewards, terminations, truncations), (again, *others_results), strict=True):
            np.testing.assert_array_equal(ours, theirs)
    assert (envs.state_dict()["_tape_half_size"] == 0.1).any()  # episodes ended on the way


@pytest.mark.campaign
@pytest.mark.parametrize("name", LONG)
def test_killed_at_random_moments(name, demos, tmp_path):  # noqa: F811
    """kill -9, six times per script; each time the run goes on, from no earlier than its last state."""
    flags = [*shlex.split(f"{LONG[name]} --eval-episodes 10 --test-episodes 10 {dataset_of(name, demos)}")]
    command = [sys.executable, str(ROOT / name)]
    start = time.time()
    subprocess.run([*command, *flags, "--exp-name", "plain"], cwd=tmp_path, check=True, capture_output=True)
    duration, kills, unbegun, reached = time.time() - start, 0, 0, [0]
    rng, again = random.Random(0), [*flags, "--exp-name", "killed"]
    while True:
        process = subprocess.Popen([*command, *again], cwd=tmp_path, stderr=subprocess.PIPE, text=True)
        try:
            _, error = process.communicate(timeout=rng.uniform(1.0, duration / 2) if kills < 6 else None)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            kills += 1
        else:
            assert process.returncode == 0 or error.endswith("this run has come to its end\n"), error
            break
        run_dirs = list(tmp_path.glob("runs/killed*/state.pt"))  # it may not have got so far
        if run_dirs:
            reached.append(load_state(run_dirs[0].parent).get("global_step", 0))
            assert reached[-1] >= reached[-2]
            again = ["--resume", str(run_dirs[0].parent)]
        else:
            unbegun += 1
    assert_same(next(tmp_path.glob("runs/plain*")), next(tmp_path.glob("runs/killed*")))
    print(f"{name}: {kills} kills, {unbegun} of them before the run began; steps saved: {reached}")
