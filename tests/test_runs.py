"""What every script relies on: limits of flags, files that are whole and harmless, a run's folder.

python -m pytest -m campaign tests/test_runs.py    # every bit of a checkpoint
"""

import contextlib
import dataclasses
import importlib
import io
import json
import math
import os
import pickle
import re
import runpy
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Annotated, Literal, get_args, get_origin, get_type_hints

import gymnasium as gym
import numpy as np
import pytest
import safetensors.torch
import torch
import tyro
from gymnasium.vector import AutoresetMode
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer.event_file_writer import AtomicCounter
from test_scripts import TINY, run_script
from torch.optim.optimizer import register_optimizer_step_post_hook

import ppo
from env_paper_square import PaperSquareVectorEnv, eval_kwargs
from figures import encode_mp4
from runs import (
    Between,
    Real,
    UserError,
    Whole,
    data_of,
    describe_env,
    fingerprint,
    fits,
    load_checkpoint,
    save_checkpoint,
)

ROOT = Path(__file__).resolve().parent.parent
EPISODES = "--eval-episodes 2 --test-episodes 2 --num-threads 1"
PPO = f"{EPISODES} --num-envs 4 --num-steps 8 --minibatch-size 16 --update-epochs 2 --total-timesteps 192"
PPO += " --eval-freq 80 --save-freq 50"
SAC = "--num-envs 4 --total-timesteps 120 --learning-starts 40 --batch-size 8 --buffer-size 60 --utd 0.4"
IMITATION = "--train-steps 24 --batch-size 8 --eval-freq 12 --save-freq 5 --log-freq 4 --torch-threads 1"
IMITATION += " --chunk-size 4 --n-action-steps 4"
SHORT = {  # trainings of some 24 gradient steps, with saves and evaluations on the way
    "ppo": PPO,
    "ppo_residual": f"{PPO} --curriculum",
    "sac_residual": f"{EPISODES} {SAC} --eval-freq 50 --save-freq 20",
    "dagger": f"{EPISODES} --num-envs 2 --num-steps 8 --total-timesteps 96 --batch-size 4 --utd 0.25 --eval-freq 40 "
    f"--save-freq 20 --torch-threads 1 --pixels top --pixel-size 36 --teacher {ROOT}/assets/ppo_residual.safetensors",
    "act": f"{EPISODES} {IMITATION} --dim-model 16 --n-heads 2 --dim-feedforward 32",
    "diffusion_policy": f"{EPISODES} {IMITATION} --channels 8 --embedding-size 16",
}


EVENT_FILES = AtomicCounter(10**6)


class Killed(BaseException):
    """Stands in for kill -9 where a process of its own would take too long."""


def kill():
    raise Killed


@dataclasses.dataclass
class Done:
    code: int
    out: str
    err: str
    variables: dict


def run(folder, command, at=(0, None), path=()):
    """Run `python command` in a folder, whose scripts and modules it takes, and do something in gradient step `at`.

    It is not a process of its own, which would take seconds to import torch, but of the project it imports all anew.
    """
    script, *flags = shlex.split(command)
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True) for _ in range(2))
    variables, code, steps = {}, 0, 0

    def count(*_):
        nonlocal steps
        steps += 1
        if steps == at[0]:
            at[1]()

    names = [path.stem for place in (ROOT, folder) for path in place.glob("*.py")]
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    registry, threads = dict(gym.registry), torch.get_num_threads()
    hook = register_optimizer_step_post_hook(count)
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.chdir(folder)
        patch.setattr(sys, "argv", [script, *flags])
        others = [place for place in sys.path if Path(place or ".").resolve() not in (ROOT, ROOT / "tests")]
        patch.setattr(sys, "path", [str((folder / script).parent), *map(str, path), *others])
        # Files of one second are read in the order of these numbers, which are of one length here
        patch.setattr("tensorboard.summary.writer.event_file_writer._global_uid", EVENT_FILES)
        for module in (sys, threading):
            patch.setattr(module, "excepthook", module.__excepthook__)
        own = {name: sys.modules.pop(name) for name in names if name in sys.modules}
        gym.registry.pop("PaperSquare-v0", None)
        try:
            variables = runpy.run_path(script, run_name="__main__")
        except Killed:
            code = -signal.SIGKILL
        except SystemExit as end:
            code = end.code or 0
        except Exception:
            try:
                code = 1
                sys.excepthook(*sys.exc_info())
            except SystemExit as end:
                code = end.code
        finally:
            hook.remove()
            for lock in getattr(sys.modules.get("runs"), "LOCKS", {}).values():  # which end with the process
                lock.release()
            for name in names:
                sys.modules.pop(name, None)
            sys.modules.update(own)
            gym.registry.clear()
            gym.registry.update(registry)
            torch.set_num_threads(threads)
            for number, handler in handlers.items():
                signal.signal(number, handler)
    out, err = (stream.buffer.getvalue().decode() for stream in (out, err))
    return Done(code, out, err, variables)


def only(folder, pattern):
    """The one path that fits, relative to the folder."""
    (path,) = folder.glob(pattern)
    return path.relative_to(folder)


def what_a_run_made(run_dir):
    """Weights, evaluations and curves, all but the times."""
    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0}).Reload()
    keys = [key for key in events.Tags()["scalars"] if not key.startswith("time/") and key != "charts/SPS"]
    curves = {key: [(scalar.step, scalar.value) for scalar in events.Scalars(key)] for key in keys}
    evaluations = json.loads((run_dir / "results.json").read_text())["evaluations"]
    evaluations = [{key: value for key, value in row.items() if "seconds" not in key} for row in evaluations]
    last, best = (load_checkpoint(run_dir / f"{name}.safetensors") for name in ("last", "best"))
    return last["model"], best["model"], curves, evaluations, best["global_step"]


def assert_same(run_dir, other):
    """To the bit."""
    for ours, theirs in zip(what_a_run_made(run_dir), what_a_run_made(other), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


def assert_one_line(done, message):
    """A script ended with one line, an error that holds the message."""
    lines = done.err.strip().splitlines()
    assert done.code == 2 and len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0], done.err


def flip(content, bit):
    """The bytes with one bit changed."""
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


# Limits of flags

SCRIPTS = {path.stem: importlib.import_module(path.stem) for path in ROOT.glob("*.py") if "Args" in path.read_text()}
SCRIPTS = {name: module.Args for name, module in SCRIPTS.items() if hasattr(module, "Args")}


def limits_of(kind):
    """The limits in a flag's type, of the number or of those of a tuple, and the number's own type; None without."""
    if get_origin(kind) is Annotated:
        found = [part for part in kind.__metadata__ if isinstance(part, Between)]
        return (found[0], get_args(kind)[0]) if found else limits_of(get_args(kind)[0])
    return next(filter(None, map(limits_of, get_args(kind))), None)


def limited_flags(args):
    """Of every flag of an `Args` with limits: name, limits, the number's type, and what makes a value of a number."""
    for name, kind in get_type_hints(args, include_extras=True).items():
        if found := limits_of(kind):
            if name == "sweep":
                yield name, *found, lambda x: (("xy", 0.0, x),)
            else:
                yield name, *found, (lambda x: (x,)) if "tuple" in str(kind) else lambda x: x


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_limit_is_kept_by_the_command_line_and_by_a_checkpoint(script, capsys):
    kind, count = SCRIPTS[script], 0
    for name, limits, number, value_of in limited_flags(kind):
        flag, step = f"--{name.replace('_', '-')}", 1 if number is int else 1e-3
        outside = [limits.low - step, limits.high + step, -(10**30), 10**30] + [math.nan, math.inf] * (number is float)
        for value in map(value_of, (*outside, "1", True, [1], 1j)):
            allowed = f"{limits.low} to {limits.high}"
            with pytest.raises(ValueError, match=f"^{flag} must be .*{re.escape(allowed)}.*found ") as error:
                kind(**{name: value})
            assert str(error.value).endswith(f"found {value!r:.100}")
        for value in (limits.low, limits.high):
            try:
                kind(**{name: value_of(number(value))})
            except ValueError as error:  # it may not fit the other flags
                assert not str(error).startswith(f"{flag} must be from"), error
        value = value_of(outside[count % len(outside)])
        with pytest.raises(SystemExit) as end:
            parts = value[0] if name == "sweep" else value
            tyro.cli(kind, args=[flag, *map(str, parts)] if isinstance(parts, tuple) else [f"{flag}={value}"])
        told = " ".join(re.findall(r"[^\s│]+", capsys.readouterr().err))
        assert end.value.code == 2 and f"{flag} must be" in told and "found" in told, (value, told)
        count += 1
    assert count >= 4
    with pytest.raises(SystemExit):
        tyro.cli(kind, args=["--help"])
    text = capsys.readouterr().out
    hints = get_type_hints(kind, include_extras=True)
    shown = [limits for name, limits, *_ in limited_flags(kind) if limits in getattr(hints[name], "__metadata__", ())]
    assert shown and all(f"{limits.low}..{limits.high}" in text for limits in shown)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_bad_flag_ends_a_script_and_nothing_is_written(script, tmp_path):
    name, limits, *_ = next(iter(limited_flags(SCRIPTS[script])))
    for bad in (f"--{name.replace('_', '-')}=1e99", "--xyzzy 3", f"--{name.replace('_', '-')}="):
        done = run(tmp_path, f"{ROOT}/{script}.py {bad}")
        assert done.code == 2 and bad.split("=")[0].split()[0] in done.err and "Traceback" not in done.err
        assert not list(tmp_path.iterdir())


def test_types_of_every_kind_fit_their_values_only():
    kinds = {
        int: [3, -(10**30)], float: [3, 0.5, math.nan], bool: [True], str: ["3", ""], type(None): [None],
        list[int]: [[], [3]], tuple[int, ...]: [(3,), ()], tuple[str, float]: [("3", 1.0)], Literal[1, 2]: [2],
        Path: [Path("3")], Real[0, 1]: [0, 1, 0.5], Whole[0, 1] | None: [None, 1], Path | None: [None],
    }  # fmt: skip
    for kind, values in kinds.items():
        assert all(fits(kind, value) for value in values), kind
    misfits = {
        int: [True, 0.5, "3", None], float: ["3", None, True, 1j], bool: [1, "x"], str: [3, None, b"3"],
        list[int]: [(3,), [0.5], 3], tuple[int, ...]: [[3], 3], Literal[1, 2]: [3, "1", None],
        Real[0, 1]: [-0.1, math.nan, "1", True], Whole[0, 1] | None: [2, 0.5, "1"],
    }  # fmt: skip
    for kind, values in misfits.items():
        for value in values:
            assert not fits(kind, value), (kind, value)


# Runs


def test_two_runs_of_one_second_get_two_folders(monkeypatch, tmp_path):
    monkeypatch.setattr("time.strftime", lambda _: "now")
    for _ in range(3):
        assert run(tmp_path, f"{ROOT}/ppo.py {SHORT['ppo']} --eval-episodes 1 --exp-name 'ü b'").code == 0
    names = [f"ü b__1__now{suffix}" for suffix in ("", "-2", "-3")]
    assert sorted(path.name for path in tmp_path.glob("runs/*")) == names
    assert all((tmp_path / "runs" / name / "results.json").exists() for name in names)


@pytest.mark.parametrize("kind", ["file", "dangling", "pipe"])
def test_runs_that_is_no_folder_is_told(kind, odd):
    (odd / kind).rename(odd / "runs")
    done = run(odd, f"{ROOT}/ppo.py {SHORT['ppo']}")
    assert_one_line(done, "runs")


# Files

EXACT = [np.float32, np.float64, np.float16, np.int8, np.int64, np.uint8, np.bool_]
numbers = st.floats() | st.integers() | st.booleans()
leaves = numbers | st.none() | st.text() | st.builds(Path, st.sampled_from(["a", "/b/c", "."]))
leaves |= st.builds(lambda kind, x: kind(x), st.sampled_from(EXACT), st.integers(0, 100))
leaves |= st.builds(np.ones, st.sampled_from([0, 3, (2, 0), (2, 3)]), st.sampled_from(EXACT))
leaves |= st.builds(lambda shape: torch.arange(12.0).reshape(3, 4).T[:shape], st.integers(0, 4))
keys = st.text() | st.integers() | st.sampled_from(["$tensor", "$array", "$dict", "$tuple", "$path"])
values = st.recursive(leaves, lambda x: st.lists(x) | st.tuples(x, x) | st.dictionaries(keys, x), max_leaves=8)


def same(one, other):
    if isinstance(one, (torch.Tensor, np.ndarray)):
        alike = type(one) is type(other) and one.dtype == other.dtype and one.shape == other.shape
        return alike and (one == other).all()
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return type(one) is type(other) and len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and (one == other or one != one and other != other)


@settings(max_examples=150, deadline=None, database=None, derandomize=True)
@given(values)
def test_whatever_is_saved_comes_back_as_it_was(tmp_path_factory, value):
    path = tmp_path_factory.getbasetemp() / "value.safetensors"
    checkpoint = {"script": "x", "args": {}, "value": value, "shared": [x := torch.zeros(2), x]}
    save_checkpoint(checkpoint, path)
    assert same(load_checkpoint(path), checkpoint)


def test_infos_of_an_environment_come_back_as_they_were():
    """A copy may name what reset returns beside the observations; arrays of objects are among it later."""
    final_obs = np.full((2, 1), None, dtype=object)
    final_obs[1, 0] = np.arange(3.0)
    again = data_of({"final_obs": final_obs})["final_obs"]
    assert again.dtype == object and again.shape == (2, 1) and again[0, 0] is None
    np.testing.assert_array_equal(again[1, 0], np.arange(3.0))


@pytest.fixture(scope="module")
def honest(tmp_path_factory):
    """A small checkpoint of a policy, in a file."""
    args = ppo.Args(hidden_size=2, exp_name="small")
    env = describe_env(PaperSquareVectorEnv, eval_kwargs(args))
    model = ppo.Agent(PaperSquareVectorEnv.OBS_DIM, 6, 2, 0.4).state_dict()
    checkpoint = {"script": "ppo", "args": dataclasses.asdict(args), "env": env, "global_step": 7, "model": model}
    path = tmp_path_factory.mktemp("honest") / "small.safetensors"
    save_checkpoint(checkpoint, path)
    return path


def refused(path):
    """Whether a file is refused, by an error of one line; if it is taken, it must hold what it held."""
    try:
        assert fingerprint(load_checkpoint(path)) == fingerprint(load_checkpoint(path.with_name("small.safetensors")))
    except UserError as error:
        assert len(str(error).splitlines()) == 1 and str(error).startswith(str(path))
        return True
    return False


def test_no_flipped_bit_and_no_cut_is_taken_for_something_else(honest):
    content, path, rng = honest.read_bytes(), honest.with_name("damaged"), np.random.default_rng(0)
    for bit in rng.integers(8 * len(content), size=400).tolist():
        path.write_bytes(flip(content, bit))
        refused(path)
    body = 8 + int.from_bytes(content[:8], "little")
    for bit in rng.integers(8 * body, 8 * len(content), size=100).tolist():
        path.write_bytes(flip(content, bit))
        assert refused(path)
    for end in [0, 1, 7, 8, 9, body, len(content) - 1, *rng.integers(len(content), size=50).tolist()]:
        path.write_bytes(content[:end])
        assert refused(path)


@pytest.mark.campaign
def test_every_bit_and_every_length_of_a_checkpoint(honest):
    content, path = honest.read_bytes(), honest.with_name("damaged")
    for bit in range(8 * len(content)):
        path.write_bytes(flip(content, bit))
        refused(path)
    for end in range(len(content)):
        path.write_bytes(content[:end])
        assert refused(path)


class Hostile:
    def __reduce__(self):
        return open, ("executed", "w")


@pytest.fixture
def odd(tmp_path):
    """A folder with what may lie where a checkpoint is expected."""
    (tmp_path / "file").write_text("a file")
    (tmp_path / "empty").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "pickle").write_bytes(pickle.dumps({"script": Hostile()}))
    torch.save({"script": Hostile()}, tmp_path / "zip")
    header = json.dumps({"x": {"dtype": "F32", "shape": [10**12], "data_offsets": [0, 4 * 10**12]}}).encode()
    (tmp_path / "claims").write_bytes(len(header).to_bytes(8, "little") + header + bytes(16))
    (tmp_path / "claims_header").write_bytes((2**62).to_bytes(8, "little") + b"{}")
    safetensors.torch.save_file({"x": torch.zeros(2)}, tmp_path / "another")
    return tmp_path


NO_CHECKPOINT = ["nowhere", "file", "empty", "folder", "dangling", "loop", "pipe", "file/x"]
NO_CHECKPOINT += ["pickle", "zip", "claims", "claims_header", "another"]


@pytest.mark.parametrize("name", NO_CHECKPOINT)
def test_a_file_that_is_no_checkpoint_is_told_and_not_executed(name, odd):
    before = sorted(odd.iterdir())
    for command in ("eval.py --model-path", "ppo_residual.py --base-policy il --il-checkpoint"):
        assert_one_line(run(odd, f"{ROOT}/{command} {name}"), name)
    assert sorted(odd.iterdir()) == before


EVIL = {  # what a checkpoint asks for, and what it is told
    "../evil": ({"script": "../evil"}, "there is no"),
    "a path": ({"script": "{folder}/evil"}, "there is no"),
    "evil": ({"script": "evil"}, "there is no"),
    "json": ({"script": "json"}, "there is no"),
    "no policy": ({"script": "figures"}, "does not define make_policy"),
    "a number": ({"script": 7}, ""),
    "environment": ({"env": {"module": "evil"}}, "there is no"),
    "environment of a path": ({"env": {"module": "../evil"}}, "there is no"),
    "no environment": ({"env": {"module": "runs", "class": "Run"}}, ""),
    "shapes": ({"model": {"critic.1.bias": torch.zeros(3)}}, "do not fit the network"),
    "lacks weights": ({"model": None}, "do not fit the network"),
    "flags": ({"args": {"hidden_size": 10**9}}, "--hidden-size must be from 1 to 4096"),
    "other flags": ({"args": {"surplus": 1}}, "the flags in the checkpoint are not those of ppo.py"),
    "no flags": ({"args": 7}, ""),
}


@pytest.mark.parametrize("name", EVIL)
def test_a_checkpoint_does_not_choose_what_is_imported_and_fits_or_is_refused(name, honest, tmp_path):
    source = "open('executed', 'w')\ndef make_policy(*_): pass\nclass PaperSquareVectorEnv: pass\n"
    (tmp_path / "evil.py").write_text(source)
    changes, told = EVIL[name]
    checkpoint = load_checkpoint(honest)
    for key, value in changes.items():
        if isinstance(value, str):
            value = value.format(folder=tmp_path)
        checkpoint[key] = checkpoint[key] | value if isinstance(value, dict) else value
    save_checkpoint(checkpoint, tmp_path / "strange")
    done = run(tmp_path, f"{ROOT}/eval.py --model-path strange --n-episodes 1")
    assert done.code == 2 and done.err.startswith("\nerror: ") and told in done.err, done.err
    assert not (tmp_path / "executed").exists() and not (tmp_path / "eval_results").exists()


# Faults of the machine


@pytest.mark.skipif(os.name != "posix", reason="needs a limit on the size of files")
@pytest.mark.parametrize(
    ("command", "largest", "lost"),
    [
        ("eval.py --policy jacobian --n-episodes 2", 1000, "results.json"),
        ("eval.py --policy jacobian --n-episodes 2 --plot", 10_000, "results.png"),
        ("record_demos.py --policy jacobian --append --num-episodes 2", 20_000, "meta/info.json"),
    ],
)
def test_a_full_disk_is_told_and_what_was_there_is_kept(command, largest, lost, tmp_path):
    import resource

    command = f"{ROOT}/{command} --num-threads 1 --output-dir kept"
    assert run(tmp_path, command).code == 0
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    limit = {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))}
    words = [sys.executable, *shlex.split(f"{command} --seed 5")]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, **limit)
    last = done.stderr.splitlines()[-1].split("\r")[-1].strip()  # after the progress
    assert done.returncode == 2 and last.startswith("error: ") and "File too large" in last
    assert "Traceback" not in done.stderr
    after = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert after.keys() == before.keys()
    assert after[tmp_path / "kept" / lost] == before[tmp_path / "kept" / lost]


@pytest.mark.parametrize("cut", [30, 5000, -1])
def test_a_film_that_ffmpeg_cut_short_is_an_error(monkeypatch, cut):
    """imageio says nothing if ffmpeg finds the disk full."""
    imageio = pytest.importorskip("imageio")
    frames = list(np.random.default_rng(0).integers(0, 255, (30, 48, 64, 3), dtype=np.uint8))
    whole = encode_mp4(frames, fps=30)
    assert len(whole) > 10_000
    monkeypatch.setattr(imageio, "mimwrite", lambda *args, **kwargs: whole[:cut])
    with pytest.raises(OSError, match="whole film"):
        encode_mp4(frames, fps=30)


@pytest.mark.parametrize("name", TINY)
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
        return result

    monkeypatch.setattr(PaperSquareVectorEnv, "step", push)
    script = run_script(name, TINY[name], monkeypatch, tmp_path)
    assert script["episodes"].physics_resets == sum(ended) == calls == 16
    stored = vars(script["rb"]) if "rb" in script else {key: script[key] for key in ("obs", "rewards", "values")}
    networks = [script[name].state_dict() for name in ("agent", "actor", "qf1", "qf2_target") if name in script]
    tensors = [x for part in (stored, *networks) for x in part.values() if torch.is_tensor(x)]
    assert len(tensors) > 10 and all(x.isfinite().all() for x in tensors)
    events = EventAccumulator(str(tmp_path / only(tmp_path, "runs/*"))).Reload()
    scalars = [scalar.value for key in events.Tags()["scalars"] for scalar in events.Scalars(key)]
    assert len(scalars) > 20 and np.isfinite(scalars).all()


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc, which Linux has")
@pytest.mark.campaign
@pytest.mark.parametrize("flags", ["ppo_residual.py", "sac_residual.py --learning-starts 2000 --buffer-size 20000"])
def test_a_long_training_grows_neither_memory_nor_step_time(flags, tmp_path):
    """An hour that learns nothing, so that its episodes stay what they are; from its first quarter to its last."""
    flags += " --num-threads 1 --total-timesteps 1000000000 --learning-rate 1e-12 --eval-freq 100000 --eval-episodes 20"
    samples, ticks, page = [], os.sysconf("SC_CLK_TCK"), os.sysconf("SC_PAGE_SIZE")
    process = subprocess.Popen([sys.executable, *shlex.split(f"{ROOT}/{flags}")], cwd=tmp_path)
    until = time.time() + 3600
    while process.poll() is None and time.time() < until:
        fields = Path(f"/proc/{process.pid}/stat").read_text().rsplit(")", 1)[1].split()  # proc(5), from field 3 on
        user, system, pages = (int(fields[k - 3]) for k in (14, 15, 24))
        samples.append([time.time(), pages * page / 1e6, (user + system) / ticks])  # s, MB, s
        time.sleep(2)
    ended = process.poll()
    process.kill()
    process.wait()
    assert ended is None
    events = EventAccumulator(str(tmp_path / only(tmp_path, "runs/*")), size_guidance={"scalars": 0}).Reload()
    logged = np.array([[scalar.wall_time, scalar.step] for scalar in events.Scalars("charts/SPS")])
    samples = np.array(samples)
    samples = samples[(samples[:, 0] >= logged[0, 0] + 60) & (samples[:, 0] <= logged[-1, 0])]  # warmed up
    first, *_, last = np.array_split(samples, 4)
    seconds = [(part[-1, 2] - part[0, 2]) / np.ptp(np.interp(part[[0, -1], 0], *logged.T)) for part in (first, last)]
    memory = np.median(last[:, 1]) - np.median(first[:, 1])
    print(f"{flags}: memory {memory:+.1f} MB, CPU time per step times {seconds[1] / seconds[0]:.3f}")
    assert memory < 5 and seconds[1] / seconds[0] < 1.05
