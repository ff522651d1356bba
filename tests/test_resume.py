"""Trainings go on where they were stopped, to the last bit: with a damaged state, on a full disk, killed at any moment.

test_copies.py stops and resumes every script. The campaign kills with kill -9, six times per script, half an hour:

    python -m pytest -m campaign tests/test_resume.py -s
"""

import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from filelock import FileLock
from test_imitation import demos  # noqa: F401, a fixture
from test_runs import ROOT, SHORT, assert_one_line, assert_same, flip, kill, only, run

from runs import PREVIOUS, STATE, load_checkpoint, load_state, save_checkpoint

LONG = {
    "ppo": "--total-timesteps 81920 --eval-freq 20000 --save-freq 10000 --curriculum",
    "ppo_residual": "--total-timesteps 81920 --eval-freq 20000 --save-freq 10000 --base-policy hybrid --hybrid-bases "
    f"jacobian il --il-checkpoint {ROOT}/assets/act.safetensors",
    "sac_residual": "--total-timesteps 6000 --learning-starts 2000 --eval-freq 2000 --save-freq 1000",
    "dagger": "--total-timesteps 3072 --num-envs 8 --eval-freq 1500 --save-freq 500 --utd 0.05 --pixel-size 36 "
    f"--eval-episodes 4 --torch-threads 1 --teacher {ROOT}/assets/ppo_residual.safetensors",
    "act": "--train-steps 300 --eval-freq 100 --save-freq 50 --log-freq 20 --torch-threads 1",
    "diffusion_policy": "--train-steps 300 --eval-freq 100 --save-freq 50 --log-freq 20 --torch-threads 1",
}

# Whatever a script may hold is gone on with, or refused before its loop

SCRIPT = """
import collections, dataclasses, enum, functools, io, itertools, os, random, signal, threading, types
from pathlib import Path
import numpy as np
import torch
from runs import Run, RunArgs, Whole, parse

@dataclasses.dataclass
class Args(RunArgs):
    save_freq: Whole[1, 10] = 10

@dataclasses.dataclass
class Data:
    a: object
    b: object = None

@dataclasses.dataclass(frozen=True)
class Frozen:
    a: object

class Slots:
    __slots__ = ("a",)

class SlotsAndMore(Slots):
    pass

class Cell(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.steps = torch.nn.BatchNorm1d(2), [0]
        self.inner.hidden, self.note = torch.zeros(3), None
        self.register_buffer("silent", torch.zeros(1), persistent=False)

args = parse(Args)
net = torch.nn.Linear(2, 2)
{make}
run = Run(args, __file__, total=6)
global_step = 0
run.begin(globals())
for _ in range(global_step, 6):
    if global_step == 3 and "STOP" in os.environ:
        signal.raise_signal(signal.SIGINT)
    run.save(global_step)
    {advance}
    global_step += 1
print({show})
"""
KINDS = {  # of a variable x: what makes it, what a step does to it, what it has come to
    "NumPy's generator": ("x = np.random.default_rng(1)", "x.random()", "x.random()"),
    "its Mersenne Twister": ("x = np.random.Generator(np.random.MT19937(1))", "x.random()", "x.random()"),
    "its old generator": ("x = np.random.RandomState(1)", "x.normal()", "x.normal()"),
    "its own seeds": ("x = np.random.SeedSequence(1)", "x.spawn(1)", "x.spawn(1)[0].generate_state(1)"),
    "torch's generator": ("x = torch.Generator()", "torch.rand(1, generator=x)", "torch.rand(1, generator=x)"),
    "Python's generator": ("x = random.Random(1)", "x.gauss(0, 1)", "x.gauss(0, 1)"),
    "nobody's generators": (
        "x = [torch.manual_seed(1), random.seed(1), np.random.seed(1)][1]",
        "x = [random.random(), np.random.normal(), torch.rand(1)]",
        "x, random.random(), np.random.normal(), torch.rand(1)",
    ),
    "a deque": ("x = collections.deque([0.0], maxlen=3)", "x.append(x[-1] + 1)", "x"),
    "a defaultdict": ("x = collections.defaultdict(list)", "x[global_step % 2].append(global_step)", "x"),
    "a Counter": ("x = collections.Counter()", "x.update(str(global_step))", "x"),
    "a tuple of tensors": ("x = (torch.zeros(2), [np.zeros(1), 0])", "x[0].add_(1); x[1][0][0] += 2; x[1][1] += 3",
        "x"),
    "an alias": ("x = {'a': torch.zeros(2)}; y = x['a']", "y.add_(1)", "x, y is x['a']"),
    "numbers": ("x = [np.float32(1), True, 2**100, float('nan'), None, 1]", "x[0] /= np.float32(3); x[1] = not x[1]; "
        "x[2] += 1; x[4] = 'text'; x[5] = x[5] / 7", "x, type(x[0])"),
    "a path": ("x = Path('a')", "x = x / 'b'", "x"),
    "a list that grows": ("x = []", "x.append({'k': np.full(2, global_step)})", "x"),
    "objects": ("x = Data(types.SimpleNamespace(y=torch.zeros(1)))", "x.a.y += 1; x.b = (x.a.y.item(), 1)", "x"),
    "a network": ("x = Cell()", "x.inner(torch.ones(3, 2) * global_step); x.steps[0] += 1; x.inner.hidden += 1; "
        "x.note = 'late'; x.silent += 1", "x.state_dict(), x.steps, x.inner.hidden, x.note, x.silent"),
    "a parameter": ("x = torch.nn.Parameter(torch.zeros(2))", "x.data += 1", "x"),
    "a schedule": (
        "x = torch.optim.Adam(net.parameters()); y = torch.optim.lr_scheduler.CosineAnnealingLR(x, 9)",
        "x.step(); y.step()",
        "x.state_dict(), y.state_dict()",
    ),
    "an enumeration": ("x = [enum.Enum('Phase', 'LIFT DRAG').LIFT]", "x[0] = type(x[0]).DRAG", "x"),
    "a frozen object": ("x = Frozen(np.zeros(1))", "x.a[:] += 1", "x"),
    "a partial": ("x = functools.partial(max, np.zeros(1))", "x.args[0][:] += 1", "x"),
    "a view": ("x = torch.zeros(1).expand(3)", "x = x + 1", "x"),
    "a set": ("x = {1}", "x.add(global_step)", "x"),
    "bytes": ("x = b''", "x += b'a'", "x"),
    "slots": ("x = Slots(); x.a = 0", "x.a += 1", "x.a"),
    "slots and more": ("x = SlotsAndMore(); x.a = x.b = 0", "x.a += 1; x.b += 1", "x.a, x.b"),
    "a file": ("x = open(__file__)", "x.readline()", "x.readline()"),
    "a text in memory": ("x = io.StringIO()", "x.write('a')", "x.getvalue()"),
    "a lock": ("x = threading.Lock()", "", "x.locked()"),
    "a generator": ("x = (k for k in range(9))", "next(x)", "next(x)"),
    "an iterator": ("x = iter(list(range(9)))", "next(x)", "next(x)"),
    "an array of objects": ("x = np.array([0, None])", "x[0] += 1", "x"),
}  # fmt: skip
MAY_BE_REFUSED = list(KINDS)[list(KINDS).index("a schedule") + 1 :] + ["its own seeds"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_variable_goes_on_or_is_refused_before_the_loop(kind, monkeypatch, tmp_path):
    make, advance, show = KINDS[kind]
    text = SCRIPT.replace("{make}", make).replace("{advance}", advance).replace("{show}", show)
    (tmp_path / "mine.py").write_text(text)
    whole = run(tmp_path, "mine.py", path=[ROOT])
    if whole.code:
        assert_one_line(whole, "x")
        assert kind in MAY_BE_REFUSED and not (tmp_path / "runs").exists()
        return
    shutil.rmtree(tmp_path / "runs")
    with monkeypatch.context() as patch:
        patch.setenv("STOP", "1")
        assert run(tmp_path, "mine.py", path=[ROOT]).code == 128 + signal.SIGINT
    resumed = run(tmp_path, f"mine.py --resume {only(tmp_path, 'runs/*')}", path=[ROOT])
    assert resumed.code == 0 and resumed.out == whole.out, resumed


# Damage


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with the same run of ppo_residual.py twice: plain, and killed after some saves."""
    folder = tmp_path_factory.mktemp("runs")
    for name, at in (("plain", (0, None)), ("killed", (21, kill))):
        run(folder, f"{ROOT}/ppo_residual.py {SHORT['ppo_residual']} --exp-name {name}", at)
        (folder / only(folder, f"runs/{name}__*")).rename(folder / "runs" / name)
    return folder


@pytest.fixture
def folder(trained, tmp_path):
    """A copy of it to break."""
    shutil.copytree(trained / "runs", tmp_path / "runs")
    return tmp_path


DAMAGE = {
    "truncated": lambda content: content[: len(content) // 2],
    "a bit": lambda content: flip(content, 4 * len(content)),
    "gone": None,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_state_is_told_and_the_one_before_it_taken(damage, folder):
    run_dir, plain = folder / "runs/killed", folder / "runs/plain"
    state, previous = run_dir / STATE, run_dir / PREVIOUS
    assert 0 < load_checkpoint(previous)["global_step"] < load_checkpoint(state)["global_step"]
    content, kept = state.read_bytes(), previous.read_bytes()
    state.unlink()
    if DAMAGE[damage]:
        state.write_bytes(DAMAGE[damage](content))
    # Stopped at once, it saves: what was damaged must not take the place of what was not
    resume = f"{ROOT}/ppo_residual.py --resume runs/killed"
    stopped = run(folder, resume, at=(1, lambda: signal.raise_signal(signal.SIGINT)))
    told, *_ = stopped.err.splitlines()
    assert stopped.code == 128 + signal.SIGINT
    assert told.startswith("warning: ") and STATE in told and told.endswith(f"; going on from {PREVIOUS}")
    assert previous.read_bytes() == kept and load_checkpoint(state)["global_step"] > 0
    done = run(folder, resume)
    assert done.code == 0 and "warning" not in done.err
    assert_same(plain, run_dir)


def test_flipped_bits_and_cuts_of_a_state_never_pass(folder, capfd):
    run_dir = folder / "runs/killed"
    content, rng = (run_dir / STATE).read_bytes(), random.Random(0)
    steps = load_checkpoint(run_dir / PREVIOUS)["global_step"]
    damaged = [b"", b"text", bytes(len(content)), content[:-1], content + b"x"]
    damaged += [flip(content, rng.randrange(8 * len(content))) for _ in range(30)]
    damaged += [content[: rng.randrange(len(content))] for _ in range(30)]
    for data in damaged:
        (run_dir / STATE).write_bytes(data)
        assert load_state(run_dir)["global_step"] == steps
        error = capfd.readouterr().err
        assert error.count("\n") == 1 and error.startswith("warning: ")


@pytest.mark.parametrize("where", [(Path, "write_bytes"), (Path, "replace"), (os, "fsync")])
def test_what_fails_to_be_written_leaves_what_was_there(where, folder):
    """A disk that fails at each of the steps of a save."""
    run_dir = folder / "runs/killed"
    before = load_state(run_dir)["global_step"]

    def fail_later():
        def fail(*_):
            raise OSError(28, "No space left on device")

        patch.setattr(*where, fail)

    with pytest.MonkeyPatch.context() as patch:
        failed = run(folder, f"{ROOT}/ppo_residual.py --resume runs/killed", at=(1, fail_later))
    assert_one_line(failed, "[Errno 28] No space left on device")
    assert load_state(run_dir)["global_step"] >= before and not list(run_dir.glob("*.tmp"))
    assert run(folder, f"{ROOT}/ppo_residual.py --resume runs/killed").code == 0
    assert_same(folder / "runs/plain", run_dir)


@pytest.mark.skipif(os.name != "posix", reason="needs a limit on the size of files")
@pytest.mark.parametrize("largest", [150_000, 4_000])  # bytes: the second save fails, the first TensorBoard's
def test_a_full_disk_ends_a_training_with_one_line(largest, tmp_path):
    import resource

    command = [sys.executable, str(ROOT / "ppo_residual.py"), *shlex.split(SHORT["ppo_residual"])]
    limit = {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))}
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, **limit)
    last = result.stderr.splitlines()[-1]
    assert result.returncode == 2 and last.startswith("error: [Errno 27] ") and "Traceback" not in result.stderr
    assert not list(tmp_path.rglob("*.tmp"))
    for path in tmp_path.rglob("*.safetensors"):
        load_checkpoint(path)


# What cannot be gone on with

REFUSED = {
    "runs/nothing": "no checkpoint at runs/nothing/state.safetensors",
    "runs/unbegun": "no checkpoint at runs/unbegun/state.safetensors",
    "runs/killed --alpha 0.3": "goes on with the flags that the run was started with: leave out all others",
    "runs/plain": "this run has come to its end",
    "runs/other": "this run is of ppo.py, not of ppo_residual.py",
    "runs/shapes": "next_obs was of shape [3, 7], and is of [4, 39]",
    "runs/more": "it takes 2 processes, as before",
    "runs/variables": "the script has other variables now: surplus",
    "runs/flags": "--alpha must be from 0 to 1, found 2",
    "runs/damaged": "is not a checkpoint of this project, or damaged",
    "runs/taken": "another process is writing into",
}


@pytest.fixture
def broken(folder):
    """Beside them, runs that cannot be gone on with, by their names."""
    state = load_state(folder / "runs/killed")
    (own,) = state["processes"]
    changes = {
        "other": {"script": "ppo"},
        "shapes": {"processes": [{**own, "next_obs": own["next_obs"][:3, :7]}]},
        "more": {"processes": 2 * state["processes"]},
        "variables": {"processes": [{**own, "surplus": 1}]},
        "flags": {"args": {**state["args"], "alpha": 2}},
    }
    for name in (*changes, "damaged", "taken", "unbegun"):
        run_dir = folder / "runs" / name
        shutil.copytree(folder / "runs/killed", run_dir)
        for path in run_dir.glob("state*") if name != "taken" else ():
            if name in changes:
                save_checkpoint(state | changes[name], path)
            else:
                path.write_bytes(b"damaged") if name == "damaged" else path.unlink()
    return folder


@pytest.mark.parametrize("flags", REFUSED)
def test_what_cannot_be_gone_on_with_is_refused_and_left_as_it_is(flags, broken):
    before = {path: path.read_bytes() for path in broken.rglob("*.*") if path.is_file()}
    with FileLock(broken / "runs/taken/writer.lock"):
        refused = run(broken, f"{ROOT}/ppo_residual.py --resume {flags}")
    refused.err = re.sub("^warning: .*\n", "", refused.err)  # of the first of two damaged states
    assert_one_line(refused, REFUSED[flags])
    assert before == {path: path.read_bytes() for path in before}


def test_demonstrations_that_changed_are_refused(demos, tmp_path):  # noqa: F811
    shutil.copytree(demos, tmp_path / "demos")
    run(tmp_path, f"{ROOT}/act.py {SHORT['act']} --dataset demos", at=(9, kill))
    assert run(tmp_path, f"{ROOT}/record_demos.py --append --num-episodes 1 --policy jacobian").code == 0
    refused = run(tmp_path, f"{ROOT}/act.py --resume {only(tmp_path, 'runs/*')}")
    assert_one_line(refused, "the demonstrations are not those that the run began with")


@pytest.mark.campaign
@pytest.mark.parametrize("script", LONG)
def test_killed_at_random_moments(script, demos, tmp_path):  # noqa: F811
    """kill -9, six times per script; each time the run goes on, from no earlier than its last state."""
    dataset = ["--dataset", str(demos)] * (script in ("act", "diffusion_policy"))
    flags = [*shlex.split(f"{LONG[script]} --eval-episodes 10 --test-episodes 10"), *dataset]
    command = [sys.executable, str(ROOT / f"{script}.py")]
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
        states = list(tmp_path.glob(f"runs/killed*/{STATE}"))  # it may not have got so far
        if states:
            reached.append(load_state(states[0].parent)["global_step"])
            assert reached[-1] >= reached[-2]
            again = ["--resume", str(states[0].parent)]
        else:
            unbegun += 1
            for run_dir in tmp_path.glob("runs/killed*"):
                shutil.rmtree(run_dir)
    assert_same(tmp_path / only(tmp_path, "runs/plain*"), tmp_path / only(tmp_path, "runs/killed*"))
    print(f"{script}: {kills} kills, {unbegun} of them before the run began; steps saved: {reached}")
