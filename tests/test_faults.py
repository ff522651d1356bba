"""Faults of the machine: a disk that is full, and trainings so long that memory or the time of a step could grow.

python -m pytest -m campaign tests/test_faults.py -s    # an hour each of ppo_residual.py and sac_residual.py
"""

import json
import os
import resource
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode
from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader
from test_scripts import TINY, run_script

import eval as evaluation
import reproduce
from env_paper_square import PaperSquareVectorEnv
from lerobot_dataset import load_demos

ROOT = Path(__file__).resolve().parent.parent
# Steps of a training that learns nothing, so that its episodes stay what they are, and a step's work with them
ENDLESS = "--num-threads 1 --total-timesteps 1000000000 --learning-rate 1e-12 --eval-episodes 20"
LONG = {
    "ppo_residual.py": "--eval-freq 100000",
    "sac_residual.py": "--eval-freq 10000 --learning-starts 2000 --buffer-size 20000",  # full early
}


def run(flags, folder, largest=resource.RLIM_INFINITY, **environment):
    """Run `python flags` in a folder; files of more than `largest` bytes do not fit on the disk."""
    return subprocess.run(
        [sys.executable, *shlex.split(flags)],
        cwd=folder,
        env={**os.environ, **environment},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest)),
        capture_output=True,
        text=True,
    )


def assert_fails_with_one_line(done, message):
    last = done.stderr.splitlines()[-1].split("\r")[-1].strip()  # after the progress
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert last.startswith("error: ") and message in last


def files_of(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("flags", "largest", "lost"),
    [
        ("", 1000, "results.json"),
        ("--plot", 10_000, "results.png"),
        ("--sweep mass 0.5 1 --sweep-points 2", 10_000, "sweep_mass.png"),
    ],
)
def test_eval_on_a_full_disk_keeps_what_was_there(tmp_path, flags, largest, lost):
    names = ("results.json", "results.png", "sweep_mass.png")
    for name in names:
        (tmp_path / name).write_text("before")
    command = f"{ROOT}/eval.py --policy jacobian --n-episodes 2 --num-threads 1 --output-dir . {flags}"
    done = run(command, tmp_path, largest)
    assert_fails_with_one_line(done, "File too large")
    assert set(files_of(tmp_path)) == set(names) and (tmp_path / lost).read_text() == "before"
    if lost == "results.png":
        assert len(json.loads((tmp_path / "results.json").read_text())["policies"]) == 1


@pytest.mark.parametrize("cut", [30, 5000, -1])
def test_a_film_that_ffmpeg_cut_short_is_an_error(monkeypatch, cut):
    """imageio says nothing if ffmpeg finds the disk full."""
    imageio = pytest.importorskip("imageio")
    frames = list(np.random.default_rng(0).integers(0, 255, (30, 48, 64, 3), dtype=np.uint8))
    whole = evaluation.encode_mp4(frames, fps=30)
    assert len(whole) > 10_000
    monkeypatch.setattr(imageio, "mimwrite", lambda *args, **kwargs: whole[:cut])
    with pytest.raises(OSError, match="whole film"):
        evaluation.encode_mp4(frames, fps=30)


def test_recording_on_a_full_disk_keeps_what_was_there(tmp_path):
    command = f"{ROOT}/record_demos.py --policy jacobian --num-threads 1 --append --num-episodes 2"
    assert run(command, tmp_path).returncode == 0
    before = files_of(tmp_path)
    done = run(command, tmp_path, 20_000)
    assert_fails_with_one_line(done, "demos holds the episodes that were written before")
    assert files_of(tmp_path) == before and load_demos(tmp_path / "demos")["episode"][-1] == 1


def test_reproduce_on_a_full_disk_keeps_its_rows(tmp_path):
    """A run that another suite has too is taken from there, so that its row is the first thing that is written."""
    folder = tmp_path / "results"
    shutil.copytree(ROOT / "results", folder, ignore=shutil.ignore_patterns("*.png", "*.md"))
    rows = (folder / "precision_runs.csv").read_text().splitlines(keepends=True)
    (folder / "precision_runs.csv").write_text("".join(row for row in rows if "clearance 6 mm, base" not in row))
    before = files_of(folder)
    done = run(f"{ROOT}/reproduce.py --suite precision --only 'base alone'", tmp_path, 100)
    assert_fails_with_one_line(done, "what results held is intact, and the same command goes on from here")
    assert files_of(folder) == before
    runs, _ = reproduce.read_rows("precision", folder)
    assert len(runs) == len(rows) - 2


@pytest.mark.parametrize("name", ["ppo.py", "ppo_residual.py", "sac_residual.py"])
def test_diverged_physics_leave_nothing_in_a_training_that_is_not_finite(name, monkeypatch, tmp_path):
    step, calls, ended = PaperSquareVectorEnv.step, 0, []

    def push(envs, actions):
        """The sheets of the training's environments, one after the other, with a force that no number can hold."""
        nonlocal calls
        if envs.autoreset_mode != AutoresetMode.SAME_STEP:
            return step(envs, actions)
        force, calls = [1e12, 1e300, np.nan][calls % 3], calls + 1
        envs.batch.xfrc_applied[calls % 2, envs.model.body("sheet").id, 2] = force
        result = step(envs, actions)
        envs.batch.xfrc_applied[:] = 0.0
        ended.append(result[4]["final_info"]["physics_reset"].sum())
        assert np.isfinite(np.stack(result[4]["final_obs"][result[3]])).all()
        return result

    monkeypatch.setattr(PaperSquareVectorEnv, "step", push)
    script = run_script(name, TINY[name], monkeypatch, tmp_path)
    assert script["physics_resets"] == sum(ended) == calls == 16
    stored = vars(script["rb"]) if "rb" in script else {key: script[key] for key in ("obs", "rewards", "values")}
    networks = [script[name] for name in ("agent", "actor", "qf1", "qf2_target") if name in script]
    tensors = {key: x for part in (stored, *(net.state_dict() for net in networks)) for key, x in part.items()}
    tensors = {key: x for key, x in tensors.items() if torch.is_tensor(x)}
    assert networks and len(tensors) > 10
    for key, tensor in tensors.items():
        assert tensor.isfinite().all(), key
    (events,) = tmp_path.glob("runs/*/events.out.*")
    scalars = [value for event in LegacyEventFileLoader(str(events)).Load() for value in event.summary.value]
    assert len(scalars) > 20 and all(np.isfinite(value.simple_value) for value in scalars)


def watch(script, flags, folder, seconds, every):
    """Run a training for some seconds and kill it; returns its pid's samples (n, 3): time (s), memory (MB), CPU (s)."""
    command = [sys.executable, str(ROOT / script), *shlex.split(flags)]
    samples, ticks, page = [], os.sysconf("SC_CLK_TCK"), os.sysconf("SC_PAGE_SIZE")
    with open(folder / "output.txt", "w") as output:
        process = subprocess.Popen(command, cwd=folder, stdout=output, stderr=output)
    try:
        until = time.time() + seconds
        while process.poll() is None and time.time() < until:
            fields = Path(f"/proc/{process.pid}/stat").read_text().rsplit(")", 1)[1].split()  # proc(5), from field 3 on
            user, system, pages = (int(fields[k - 3]) for k in (14, 15, 24))
            samples.append([time.time(), pages * page / 1e6, (user + system) / ticks])
            time.sleep(every)
    finally:
        ended = process.poll()
        process.kill()
        process.wait()
    assert ended is None, (folder / "output.txt").read_text()[-2000:]
    np.savetxt(folder / "samples.txt", samples)
    return np.array(samples)


def growth(folder, warm_up):
    """What a training that was watched grew from its first quarter to its last, after warm_up (s): memory, step time.

    Returns the difference of the median memory, MB; the quotient of the CPU time per step, all threads together, which
    neighbours on the machine disturb less than the time by the clock; and the steps from first to last.
    """
    samples = np.loadtxt(folder / "samples.txt")
    (events,) = folder.glob("runs/*/events.out.*")
    steps = [(e.wall_time, e.step) for e in LegacyEventFileLoader(str(events)).Load() if e.step]
    seconds, steps = np.maximum.accumulate(np.array(steps)).T
    samples = samples[(samples[:, 0] >= seconds[0] + warm_up) & (samples[:, 0] <= seconds[-1])]
    first, *_, last = np.array_split(samples, 4)
    (early, late) = (
        (part[-1, 2] - part[0, 2]) / np.diff(np.interp(part[[0, -1], 0], seconds, steps))[0] for part in (first, last)
    )
    memory = np.median(last[:, 1]) - np.median(first[:, 1])
    return memory, late / early, np.diff(np.interp(samples[[0, -1], 0], seconds, steps))[0]


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc, which Linux has")
@pytest.mark.campaign
@pytest.mark.parametrize("script", LONG)
def test_a_long_training_grows_neither_memory_nor_step_time(tmp_path, script):
    watch(script, f"{ENDLESS} {LONG[script]}", tmp_path, 3600, every=2)
    memory, time_ratio, steps = growth(tmp_path, warm_up=60)
    print(f"{script}, {steps:,.0f} steps: memory {memory:+.1f} MB, CPU time per step times {time_ratio:.3f}")
    assert memory < 5 and time_ratio < 1.05


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc, which Linux has")
def test_a_short_training_does_not_grow(tmp_path):
    """Memory alone, and coarsely: 100 kB lost in each step of the rollout would be noticed."""
    flags = "--num-envs 16 --num-steps 16 --minibatch-size 64 --update-epochs 1 --eval-freq 4096 --eval-episodes 1"
    watch("ppo_residual.py", f"{ENDLESS} {flags}", tmp_path, 15, every=0.2)
    memory, _, steps = growth(tmp_path, warm_up=3)
    assert steps > 1000 and memory < 20
