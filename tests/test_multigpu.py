"""ppo_residual_multigpu.py makes the updates of one process, is stopped and goes on; --compile changes no update."""

import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
import torch
from test_runs import ROOT, assert_one_line, assert_same, only, run
from torch.optim.optimizer import register_optimizer_step_post_hook

from runs import load_checkpoint

FLAGS = "--eval-episodes 1 --test-episodes 1 --num-threads 1 --num-envs 8 --num-steps 16 --minibatch-size 32"
FLAGS += " --update-epochs 2 --total-timesteps 512 --eval-freq 200 --save-freq 128"
STEPS = 8  # gradient steps of an update: 2 epochs of 4 minibatches
# Starts the script as torchrun starts it, and in a gradient step saves the networks, or stops one of the processes
STARTER = f"""
import os, runpy, signal, sys, torch
from torch.optim.optimizer import register_optimizer_step_post_hook
script, what, number = sys.argv.pop(1), sys.argv.pop(1), 0
def count(optimizer, *_):
    global number
    number += 1
    if what == "weights" and number == {STEPS} and os.environ["RANK"] == "0":
        torch.save(optimizer.param_groups[0]["params"], "weights")
    if what == "stop" and number == 2 * {STEPS} + 3 and os.environ["RANK"] == "1":
        signal.raise_signal(signal.SIGTERM)
register_optimizer_step_post_hook(count)
sys.path.insert(0, os.path.dirname(script))
runpy.run_path(script, run_name="__main__")
"""


def torchrun(folder, *words):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment)


def test_two_processes_make_the_updates_of_one_and_go_on_where_they_were_stopped(tmp_path):
    script, flags = str(ROOT / "ppo_residual_multigpu.py"), shlex.split(FLAGS)
    (tmp_path / "start.py").write_text(STARTER)
    whole = torchrun(tmp_path, "start.py", script, "weights", *flags, "--exp-name", "whole")
    assert whole.returncode == 0, whole.stderr
    weights = []

    def keep(optimizer, *_):
        weights.append([x.detach().clone() for x in optimizer.param_groups[0]["params"]])

    hook = register_optimizer_step_post_hook(keep)
    assert run(tmp_path, f"{ROOT}/ppo_residual.py {FLAGS} --exp-name one").code == 0
    hook.remove()
    split = torch.load(tmp_path / "weights")
    torch.testing.assert_close(split, weights[STEPS - 1], rtol=0, atol=1e-5)
    moved = [(one - other).abs().max() for one, other in zip(weights[STEPS - 1], weights[0], strict=True)]
    assert max(moved) > 1e-3  # a hundred times what is allowed

    stopped = torchrun(tmp_path, "start.py", script, "stop", *flags, "--exp-name", "parts")
    run_dir = only(tmp_path, "runs/parts__*")  # of one writer
    assert stopped.returncode != 0 and stopped.stderr.count(f"--resume {run_dir}\n") == 1, stopped.stderr
    assert load_checkpoint(tmp_path / run_dir / "state.safetensors")["global_step"] == 3 * 128
    resumed = torchrun(tmp_path, script, "--resume", str(run_dir))
    assert resumed.returncode == 0, resumed.stderr
    assert_same(tmp_path / only(tmp_path, "runs/whole__*"), tmp_path / run_dir)
    played = run(tmp_path, f"{ROOT}/eval.py --model-path {run_dir}/last.safetensors --compare-base --n-episodes 1")
    assert played.code == 0, played.err


def test_what_cannot_be_shared_among_processes_is_told_and_nothing_written(tmp_path):
    alone = run(tmp_path, f"{ROOT}/ppo_residual_multigpu.py {FLAGS}")
    assert_one_line(alone, "torchrun --standalone --nproc-per-node=N ppo_residual_multigpu.py")
    flags = shlex.split(f"{FLAGS} --num-envs 9 --minibatch-size 16")
    result = torchrun(tmp_path, str(ROOT / "ppo_residual_multigpu.py"), *flags)
    assert result.returncode != 0
    assert "error: --num-envs and --minibatch-size must be divisible by the 2 processes" in result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(shutil.which("diff") is None, reason="needs the command diff")
def test_the_diff_is_about_processes():
    command = ["diff", "ppo_residual.py", "ppo_residual_multigpu.py"]
    text = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout
    hunks = re.split(r"^\d.*\n", text, flags=re.MULTILINE)[1:]
    assert len(hunks) > 5
    for hunk in hunks:
        assert re.search(
            r"process|average_gradients|\brank\b|world_size|\bdist\b|gather|own_|\bnum_envs|torchrun|num_threads|available_cores|\bos\b",
            hunk,
        ), hunk
    one, split = ((ROOT / name).read_text() for name in command[1:])
    assert not re.search("rank|world_size|torch.distributed|torchrun", one) and "torch.distributed" in split


def test_compiled_the_updates_are_the_same(tmp_path):
    models = []
    for more in ("", "--compile"):
        done = run(tmp_path, f"{ROOT}/ppo_residual.py {FLAGS} --total-timesteps 256 {more} --exp-name 'a{more}'")
        assert done.code == 0, done.err
        models.append(load_checkpoint(tmp_path / only(tmp_path, f"runs/a{more}__*") / "last.safetensors")["model"])
    torch.testing.assert_close(*models, rtol=0, atol=1e-5)
