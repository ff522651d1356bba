"""What makes a training faster changes nothing of it: compiled, in several processes."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from checkpoints import load_checkpoint, read_checkpoint

ROOT = Path(__file__).resolve().parent.parent
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
COMMON = "--eval-episodes 1 --test-episodes 1 --num-threads 1"
PPO = f"{COMMON} --num-envs 8 --num-steps 16 --minibatch-size 32 --update-epochs 2 --total-timesteps 256"
RUNS = {  # short: rounding errors grow with every contact
    "ppo.py": f"{PPO} --eval-freq 1000",
    "ppo_residual.py": f"{PPO} --eval-freq 1000",
    "sac_residual.py": f"{COMMON} --num-envs 4 --total-timesteps 480 --learning-starts 400 --eval-freq 1000",
}


def train(name, flags, folder, launcher=()):
    """Train in processes of their own; returns the checkpoint and the losses by name."""
    folder.mkdir()
    command = [sys.executable, *launcher, str(ROOT / name), *shlex.split(flags)]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    (run_dir,) = folder.glob("runs/*")  # one writer
    events = EventAccumulator(str(run_dir)).Reload()
    keys = [key for key in events.Tags()["scalars"] if key.startswith("losses/")]
    losses = {key: torch.tensor([scalar.value for scalar in events.Scalars(key)]) for key in keys}
    return torch.load(run_dir / "last.pt", weights_only=True), losses


@pytest.mark.parametrize("name", RUNS)
def test_compiled_or_in_two_processes_the_updates_are_the_same(name, tmp_path):
    checkpoint, losses = train(name, RUNS[name], tmp_path / "plain")
    if name != "sac_residual.py":  # compiled, it is no faster
        compiled, compiled_losses = train(name, f"{RUNS[name]} --compile", tmp_path / "compiled")
        torch.testing.assert_close(compiled["model"], checkpoint["model"], rtol=0, atol=1e-5)
        torch.testing.assert_close(compiled_losses, losses, rtol=1e-3, atol=1e-4)
    split, _ = train(name, RUNS[name], tmp_path / "split", TORCHRUN)  # whose losses are of half of each minibatch
    assert checkpoint["global_step"] == split["global_step"] == int(re.search(r"timesteps (\d+)", RUNS[name])[1])
    torch.testing.assert_close(split["model"], checkpoint["model"], rtol=0, atol=1e-5)


def test_two_processes_that_were_stopped_go_on(tmp_path):
    flags = f"{RUNS['ppo_residual.py']} --total-timesteps 2048 --save-freq 128"  # the first saves come soon
    checkpoint, _ = train("ppo_residual.py", flags, tmp_path / "whole", TORCHRUN)
    command = [sys.executable, *TORCHRUN, str(ROOT / "ppo_residual.py")]
    folder = tmp_path / "stopped"
    folder.mkdir()
    process = subprocess.Popen([*command, *shlex.split(flags)], cwd=folder, stderr=subprocess.PIPE, text=True)
    while not [path for path in folder.glob("runs/*/state.pt") if "global_step" in read_checkpoint(path)]:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate()
    (run_dir,) = folder.glob("runs/*")
    assert process.returncode != 0 and error.count(f"--resume runs/{run_dir.name}") == 1  # the first process says it
    assert 0 < read_checkpoint(run_dir / "state.pt")["global_step"] < 2048
    resumed = subprocess.run([*command, "--resume", f"runs/{run_dir.name}"], cwd=folder, capture_output=True, text=True)
    assert resumed.returncode == 0, resumed.stderr
    torch.testing.assert_close(load_checkpoint(run_dir / "last.pt")["model"], checkpoint["model"], rtol=0, atol=0)


def test_no_thread_of_the_group_outlives_python(tmp_path):
    """One that frees a tensor while Python ends aborts the process, once in 60 trainings."""
    (tmp_path / "script.py").write_text(
        "import atexit, os, pathlib, torch\n"
        "threads = lambda: [path.read_text().strip() for path in pathlib.Path('/proc/self/task').glob('*/comm')]\n"
        "say = lambda when: os.write(1, f'{when} {any(\"gloo\" in name for name in threads())}\\n'.encode())\n"
        "atexit.register(say, 'after')\n"
        "from flags import find_processes\n"
        "find_processes()\n"
        "torch.distributed.all_reduce(torch.optim.Adam([torch.zeros(1)]).param_groups[0]['params'][0])\n"
        "say('before')\n"
    )
    command = [sys.executable, *TORCHRUN, str(tmp_path / "script.py")]
    result = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert sorted(result.stdout.splitlines()) == ["after False"] * 2 + ["before True"] * 2


def test_what_cannot_be_shared_among_processes_is_an_error(tmp_path):
    flags = [*shlex.split(RUNS["ppo.py"]), "--num-envs", "9", "--minibatch-size", "16"]
    command = [sys.executable, *TORCHRUN, str(ROOT / "ppo.py"), *flags]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode != 0 and not (tmp_path / "runs").exists()
    assert "error: --num-envs and --minibatch-size must be divisible by the 2 processes" in result.stderr


def test_the_block_of_several_processes_is_the_same_in_all_scripts():
    blocks = set()
    for name in RUNS:
        blocks.add(re.search("    # Several processes.*?\n    try:", (ROOT / name).read_text(), re.DOTALL)[0])
    assert len(blocks) == 1
