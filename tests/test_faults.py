"""Long runs: does a training's memory grow, or the time of its steps?

python -m pytest -m campaign tests/test_faults.py -s    # an hour of ppo_residual.py, ten minutes of sac_residual.py
"""

import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

ROOT = Path(__file__).resolve().parent.parent
# Steps of a training that learns nothing, so that its episodes stay what they are, and a step's work with them
ENDLESS = "--num-threads 1 --total-timesteps 1000000000 --learning-rate 1e-12 --eval-episodes 20"
LONG = {
    "ppo_residual.py": "--eval-freq 100000",
    "sac_residual.py": "--eval-freq 10000 --learning-starts 2000 --buffer-size 20000",  # full early
}


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
@pytest.mark.parametrize(("script", "minutes"), [("ppo_residual.py", 60), ("sac_residual.py", 10)])
def test_a_long_training_grows_neither_memory_nor_step_time(tmp_path, script, minutes):
    watch(script, f"{ENDLESS} {LONG[script]}", tmp_path, 60 * minutes, every=2)
    memory, time_ratio, steps = growth(tmp_path, warm_up=60)
    print(f"{script}, {steps:,.0f} steps: memory {memory:+.1f} MB, CPU time per step times {time_ratio:.3f}")
    assert memory < 5 and time_ratio < 1.05
