"""Bad input: beyond its limits every flag of every script ends in one line and writes nothing; within, the script runs.

python -m pytest -m campaign tests/test_flags.py -s     # an hour: hundreds of values of every flag, and trainings
"""

import contextlib
import io
import itertools
import math
import os
import re
import runpy
import shutil
import signal
import sys
import time
from dataclasses import fields
from functools import partial
from typing import Annotated, Literal, get_args, get_origin

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_imitation import TINY as IMITATION
from test_imitation import demos  # noqa: F401, a fixture
from test_scripts import ROOT, SCRIPTS, TINY

import eval as evaluation
import flags
from env_paper_square import PaperSquareVectorEnv

LIMITS = flags.LIMITS
FIELDS = [(name, field) for name, kind in SCRIPTS.items() for field in fields(kind)]
NUMBERS = (int, float)


def option(field):
    return f"--{field.name.replace('_', '-')}"


def plain(kind):
    """The kind of a flag without what stands around it, and of a tuple's last entry."""
    while get_origin(kind) not in (None, Literal):
        parts = [part for part in get_args(kind) if part not in (Ellipsis, type(None))]
        kind = parts[0] if get_origin(kind) is Annotated else parts[-1]
    return kind


def is_tuple(field):
    return any(get_origin(kind) is tuple for kind in (field.type, *get_args(field.type)))


def run(name, words, folder):
    """Run a script as the shell would, in `folder`; returns its exit code and stderr."""
    errors, code = io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(errors):
        patch.chdir(folder)
        patch.setattr(sys, "argv", [name, *words])
        patch.setattr(signal, "signal", lambda *_: None)  # which some would leave set
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                runpy.run_path(str(ROOT / name), run_name="__main__")
        except SystemExit as end:
            code = end.code or 0
    return code, errors.getvalue()


def assert_refused(name, words, folder, expected=""):
    there = sorted(folder.rglob("*"))
    code, error = run(name, words, folder)
    assert code == 2 and error.startswith("error: ") and error.count("\n") == 1 and error.endswith("\n"), (words, error)
    assert expected in error and len(error) < 5000, (words, error)
    assert sorted(folder.rglob("*")) == there, words


# Values


NOT_TEXT = [*"\0\n\x1b\ud800\udcff", "a\tb", "x" * 300, "ü" * 128, "a/" * 2001]
NO_NUMBER = ["", "abc", "1,5", "0x1", "1e", "--", "²", "None ", "[1]", "True", "9" * 5000 + "x"]


def beyond(name, kind):
    """Words that are no value of a flag."""
    if kind is int:
        low, high = LIMITS[name]
        outside = st.integers(max_value=low - 1) | st.integers(min_value=high + 1)
        huge = [2**31, 2**63, 2**70, 10**12, 10**30, 10**4000, -1, -(2**63)]
        return outside.map(str) | st.sampled_from(
            [*(str(value) for value in huge if not low <= value <= high), *NO_NUMBER, "1.5", "nan", "inf", "9" * 5000]
        )
    if kind is float:
        low, high = LIMITS[name]
        outside = st.floats(max_value=low, exclude_max=True) | st.floats(min_value=high, exclude_min=True)
        return outside.map(repr) | st.sampled_from(["nan", "-nan", "inf", "-inf", "1e999", *NO_NUMBER])
    if get_origin(kind) is Literal:
        near = [choice[:-1] + "x" for choice in get_args(kind)] + [choice.upper() + " " for choice in get_args(kind)]
        return (st.sampled_from(near + NOT_TEXT) | st.text()).filter(lambda word: word not in get_args(kind))
    if kind is bool:
        return st.text(min_size=1)
    controls = st.builds("{}{}".format, st.text(), st.sampled_from(NOT_TEXT))
    slashes = st.sampled_from(["../x", "/", "a/b", "..\\x", "x" * 201]) if name == "exp_name" else st.nothing()
    return controls | slashes


def bad_lines(field):
    """Command lines that misuse a flag."""
    words = beyond(field.name, plain(field.type))
    if field.default not in ("", ()) and plain(field.type) is str:
        words |= st.just("")
    lines = words.map(lambda word: [f"{option(field)}={word}"])
    if plain(field.type) in NUMBERS:
        lines |= words.filter(lambda word: word[:2] != "--").map(lambda word: [option(field), word])
    if field.name == "sweep":  # a name and two numbers
        bad = words.filter(lambda word: word[:2] != "--")
        lines = bad.map(lambda word: ["--sweep", "xy", "0", word])
        lines |= st.sampled_from(["", "xy", "xy 0", "yaw 0 1 2", "yaw 2 1", "0 1 xy", "wind 0 1"]).map(
            lambda text: ["--sweep", *text.split()]
        )
    return lines


def try_bad_values(name, field, examples, folder):
    tried = []

    @settings(max_examples=examples, deadline=None, database=None, derandomize=True, suppress_health_check=HealthCheck)
    @given(bad_lines(field))
    def refused(line):
        assert_refused(name, line, folder, option(field))
        tried.append(line)

    refused()
    return len(tried)


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_flag_refuses_bad_values_in_one_line_and_writes_nothing(name, tmp_path):
    for field in fields(SCRIPTS[name]):
        assert try_bad_values(name, field, 3, tmp_path) >= 3


@pytest.mark.parametrize("word", NOT_TEXT)
@pytest.mark.parametrize("name", SCRIPTS)
def test_text_that_is_no_file_name(name, word, tmp_path):
    for field in fields(SCRIPTS[name]):
        if plain(field.type) is str:
            assert_refused(name, [f"{option(field)}={word}"], tmp_path, option(field))


@pytest.mark.campaign
@pytest.mark.parametrize("name", SCRIPTS)
def test_hundreds_of_bad_values_of_every_flag(name, tmp_path, capsys):
    count = sum(try_bad_values(name, field, 200, tmp_path) for field in fields(SCRIPTS[name]))
    with capsys.disabled():
        print(f"\n{name}: {count} bad values of {len(fields(SCRIPTS[name]))} flags, all refused")


# Limits


def test_every_number_has_limits_that_its_defaults_keep():
    numbers = {field.name for _, field in FIELDS if plain(field.type) in NUMBERS}
    assert numbers == LIMITS.keys()
    for kind in SCRIPTS.values():
        flags.check_flags(kind())
    for name, (low, high) in LIMITS.items():
        assert math.isfinite(low) and math.isfinite(high) and low < high, name


@pytest.mark.parametrize(("name", "field"), [pair for pair in FIELDS if plain(pair[1].type) in NUMBERS])
def test_values_at_the_limits_are_accepted_and_the_next_ones_not(name, field, monkeypatch):
    kind = plain(field.type)
    for value, direction in zip(LIMITS[field.name], (-math.inf, math.inf), strict=True):
        words = ["xy", "0", repr(value)] if field.name == "sweep" else [repr(value)]
        monkeypatch.setattr(sys, "argv", [name, option(field), *words])
        found = getattr(flags.parse(SCRIPTS[name]), field.name)
        assert (found[-1] if is_tuple(field) else found) == value
        words[-1] = repr(value + int(math.copysign(1, direction)) if kind is int else math.nextafter(value, direction))
        monkeypatch.setattr(sys, "argv", [name, option(field), *words])
        with pytest.raises(SystemExit):
            flags.parse(SCRIPTS[name])


WRONG = ["1", b"1", True, None, 1, 1.5, math.nan, [1], (1,), ("x", 0), {}, object, torch.ones(3), 2**70, "", "\0", 1j]


def allowed(field, value):
    """Of the few values above."""
    kind = plain(field.type)
    if value is None:
        return type(None) in get_args(field.type)
    if is_tuple(field):
        return value == (1,) and kind in NUMBERS and field.name != "sweep"
    number = {int: (int,), float: (int, float)}.get(kind)
    if number and isinstance(value, number) and not isinstance(value, bool):
        return LIMITS[field.name][0] <= value <= LIMITS[field.name][1]
    if kind is str or get_origin(kind) is Literal:
        return (value == "1" and kind is str) or (isinstance(value, str) and value == "" == field.default)
    return kind is bool and value is True


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_checkpoints_flags_are_of_their_types(name):
    for field, value in itertools.product(fields(SCRIPTS[name]), WRONG):
        args = SCRIPTS[name](**{field.name: value})
        if allowed(field, value):
            flags.check_flags(args)
            continue
        with pytest.raises(ValueError, match=f"^{option(field)} must be .*found ") as error:
            flags.check_flags(args)
        assert "\n" not in str(error.value) and len(str(error.value)) < 500


# Words


MEANT = {
    "ppo.py --lerning-rate 1": "--learning-rate",
    "ppo.py --num_env 1": "--num-envs",
    "ppo.py --no-aneal-lr": "--no-anneal-lr",
    "act.py --device cudo": "cuda",
    "ppo_residual.py --alpha-schedule liner": "linear",
    "ppo_residual.py --base-policy jacobean": "jacobian",
    "sac_residual.py --hybrid-bases jacobian zeor": "zero",
    "sac_residual.py --hybrid-mode swich": "switch",
    "diffusion_policy.py --prediction-type eps": "epsilon",
    "record_demos.py --policy hybird": "hybrid",
    "record_demos.py --teleop keybord": "keyboard",
    "eval.py --policy zero randon": "random",
    "eval.py --base-policy jacobin": "jacobian",
    "eval.py --sweep fricton 0.5 2": "friction",
    "eval.py --camera sied": "side",
    "eval.py --video-format mp3": "mp4",
    "reproduce.py --suite papre": "paper",
    "reproduce.py --executor slrum": "slurm",
    "reproduce.py --only pure-RL": "pure RL (PPO)",
    "benchmark.py --bases jacobain": "jacobian",
}


@pytest.mark.parametrize("command", MEANT)
def test_what_was_probably_meant(command, tmp_path):
    name, *words = command.split()
    assert_refused(name, words, tmp_path, f"did you mean {MEANT[command]}?")


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("ppo.py --num-envs 1 2", "'2' after --num-envs"),
        ("ppo.py --track 3", "'3' after --track"),
        ("ppo.py 3", "unexpected '3'"),
        ("ppo.py --num-envs", "--num-envs must be a whole number from 1 to 32,768, found nothing"),
        ("ppo.py --num-envs --track", "found nothing"),
        ("ppo.py --n-envs=x --seed 2", "--num-envs must be a whole number from 1 to 32,768, found 'x'"),
        ("ppo.py --xyzzy", "unknown flag '--xyzzy'"),
        ("eval.py --policy zero jacobin random", "'zero' 'jacobin' 'random' (did you mean jacobian?)"),
    ],
)
def test_words_that_no_flag_takes(command, expected, tmp_path):
    name, *words = command.split()
    assert_refused(name, words, tmp_path, expected)


def test_help_is_as_it_was(tmp_path):
    for name in SCRIPTS:
        assert run(name, ["--help"], tmp_path) == (0, "")


# Flags that do not fit each other


BETWEEN = {
    "ppo.py --num-envs 32768 --num-steps 1000 --minibatch-size 2": "--num-envs times --num-steps",
    "ppo.py --seed 8000": "--seed times --num-envs",
    "ppo_residual.py --minibatch-size 1000": "--minibatch-size",
    "ppo_residual.py --total-timesteps 4095": "--total-timesteps",
    "ppo_residual.py --base-policy il": "--il-checkpoint",
    "ppo_residual.py --base-policy hybrid --hybrid-bases jacobian": "--hybrid-bases",
    "ppo_residual.py --base-policy hybrid --hybrid-weights 0 0": "--hybrid-weights",
    "sac_residual.py --base-policy hybrid --hybrid-weights": "--hybrid-weights",
    "sac_residual.py --buffer-size 10": "--buffer-size",
    "sac_residual.py --total-timesteps 15": "--total-timesteps",
    "act.py --n-heads 3": "--n-heads",
    "act.py --n-action-steps 17": "--n-action-steps",
    "act.py --chunk-size 400 --batch-size 65536": "--batch-size times --chunk-size",
    "diffusion_policy.py --chunk-size 400 --batch-size 65536": "--batch-size times --chunk-size",
    "diffusion_policy.py --chunk-size 17": "--chunk-size",
    "diffusion_policy.py --num-inference-steps 101": "--num-inference-steps",
    "record_demos.py --seed 999999": "--seed",
    "record_demos.py --video-height 100": "--video-height",
    "eval.py --policy zero --sweep delay 0.1 0.9": "--sweep",
    "eval.py --policy zero --sweep mass 2 1": "--sweep",
    "eval.py --policy il": "--il-checkpoint",
    "eval.py --compare-base --policy zero": "--compare-base",
    "eval.py": "--model-path",
    "benchmark.py --num-envs 3": "--num-envs",
    "benchmark.py --num-envs": "--num-envs",
    "benchmark.py --training-steps 8191": "--training-steps",
    "reproduce.py --only nothing": "--only",
    "reproduce.py --cores-per-run 1024": "--cores-per-run",
}


@pytest.mark.parametrize("command", BETWEEN)
def test_flags_that_do_not_fit_each_other(command, tmp_path):
    name, *words = command.split()
    assert_refused(name, words, tmp_path, BETWEEN[command])


# Files and folders


@pytest.fixture
def odd(tmp_path):
    """A folder with what may lie where something else is expected."""
    (tmp_path / "file").write_text("a file")
    (tmp_path / "empty").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "pipe")
    return tmp_path


LONG = "/".join(["x" * 255] * 15)  # each name is allowed, and a file system takes no more of them


@pytest.mark.parametrize("path", ["nowhere", "file", "empty", "folder", "dangling", "loop", "pipe", "file/x", LONG])
@pytest.mark.parametrize(
    "command",
    [
        "eval.py --model-path",
        "eval.py --policy il --il-checkpoint",
        "record_demos.py --model-path",
        "ppo_residual.py --base-policy il --il-checkpoint",
        "act.py --dataset",
        "benchmark.py --bases",
    ],
)
def test_paths_where_something_else_lies(command, path, odd):
    name, *words = command.split()
    assert_refused(name, [*words, path], odd, path[:20])


@pytest.mark.parametrize("path", ["file", "file/x", "dangling", "dangling/x", "loop", "pipe", "/proc/x", LONG * 2])
@pytest.mark.parametrize(
    "command", ["eval.py --policy zero", "record_demos.py --policy zero", "reproduce.py --only base"]
)
def test_output_folders_that_cannot_be(command, path, odd):
    name, *words = command.split()
    assert_refused(name, [*words, "--output-dir", path], odd)


@pytest.mark.parametrize("kind", ["file", "dangling", "loop", "pipe"])
@pytest.mark.parametrize("name", [*TINY, "act.py", "reproduce.py"])
def test_runs_that_is_no_folder(name, kind, odd, demos):  # noqa: F811
    (odd / kind).rename(odd / "runs")
    assert_refused(name, ["--dataset", str(demos)] if name == "act.py" else [], odd)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
@pytest.mark.parametrize("name", [*TINY, "reproduce.py"])
def test_folders_without_the_right_to_write(name, tmp_path):
    tmp_path.chmod(0o555)
    assert_refused(name, [], tmp_path)


def test_names_that_need_all_the_bytes_run(tmp_path):
    name = "ü" * 100
    code, error = run("ppo.py", [*TINY["ppo.py"].split(), "--exp-name", name, "--seed", "499998"], tmp_path)
    assert code == 0, error
    (run_dir,) = tmp_path.glob("runs/*")
    assert run_dir.name.startswith(name) and (run_dir / "results.json").is_file()


@pytest.mark.parametrize("name", TINY)
def test_two_runs_of_one_name_in_one_second(name, tmp_path, monkeypatch):
    monkeypatch.setattr(time, "strftime", lambda _: "now")
    assert run(name, TINY[name].split(), tmp_path)[0] == 0
    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert_refused(name, TINY[name].split(), tmp_path, "__now")
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == written


# Several processes


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"RANK": "x"}, "RANK"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE"),
        ({"WORLD_SIZE": "-2"}, "WORLD_SIZE"),
        ({"WORLD_SIZE": "9" * 30}, "WORLD_SIZE"),
        ({"RANK": "1"}, "RANK 1"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK 2"),
        ({"LOCAL_WORLD_SIZE": "0"}, "LOCAL_WORLD_SIZE 0"),
        ({"LOCAL_WORLD_SIZE": "2.0"}, "LOCAL_WORLD_SIZE"),
        ({"LOCAL_RANK": "first"}, "LOCAL_RANK"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "torchrun"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}, "torchrun"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "x"}, "torchrun"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "99999999"}, "torchrun"),
    ],
)
@pytest.mark.parametrize("name", TINY)
def test_variables_of_torchrun_that_make_no_sense(name, variables, expected, tmp_path, monkeypatch):
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)
    assert_refused(name, [], tmp_path, expected)


@pytest.mark.parametrize("name", ["act.py", "eval.py", "record_demos.py"])
def test_the_rank_is_asked_for_in_every_script_with_a_device(name, tmp_path, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "first")
    assert_refused(name, [], tmp_path, "LOCAL_RANK")


# Within the limits


RL = "--total-timesteps 512 --num-envs 4 --eval-freq 1000 --eval-episodes 1 --test-episodes 1 --num-threads 2"
PPO = f"{RL} --num-steps 32 --minibatch-size 64 --update-epochs 2"
SHORT = {
    "ppo.py": PPO,
    "ppo_residual.py": PPO,
    "sac_residual.py": f"{RL} --learning-starts 256 --batch-size 16 --buffer-size 2000",
    **{name: f"{words} --dataset ../demos" for name, words in IMITATION.items()},
    "record_demos.py": "--policy jacobian --num-episodes 2",
    "eval.py": f"--model-path {ROOT}/assets/ppo_residual.pt {ROOT}/assets/act.pt --policy jacobian --n-episodes 2",
    "benchmark.py": "--repeats 1 --seconds 0.01 --num-envs 1 --warmup-steps 1 --training-steps 0 --sb3-steps 0 "
    "--bases jacobian",
    "reproduce.py": "--dry-run",
}
TOO_LONG = {  # flags whose largest value takes hours, or does not go with the others: an odd one in its place
    "num_envs": 37, "num_steps": 33, "total_timesteps": 777, "eval_episodes": 3, "test_episodes": 3, "n_episodes": 3,
    "num_episodes": 3, "train_steps": 7, "num_demos": 3, "n_action_steps": 4, "n_heads": 16, "update_epochs": 7,
    "minibatch_size": 128, "utd": 3.7, "sweep_points": 3, "num_inference_steps": 100, "repeats": 2, "seconds": 0.03,
    "warmup_steps": 7, "training_steps": 0, "sb3_steps": 0, "cores_per_run": 2, "seed": 7777, "batch_size": 777,
    "torch_threads": 5, "num_threads": 33, "hidden_size": 257, "video_height": 96,
}  # fmt: skip
WITH = {  # what a flag needs to have an effect, or to fit the others
    "alpha_start": "--alpha-schedule linear",
    "alpha_end": "--alpha-schedule linear",
    "curriculum_start": "--curriculum",
    "chunk_size": "--n-action-steps 1",
    "num_envs": "--total-timesteps 4736 --minibatch-size 32",
    "num_steps": "--minibatch-size 2 --total-timesteps 528",
    "minibatch_size": "--total-timesteps 128",
    "n_heads": "--dim-model 16",
    "prog_explore": "--learning-starts 0",
    "noise_correlation": "--noise-std 1",
    "hybrid_mode": "",
    "video_height": "--videos --save-video --video-episodes 1 --video-stride 30",
    "video_stride": "--save-video --video-height 48",
    "video_episodes": "--save-video --video-height 48",
    "sweep_points": "--sweep delay 0 9",
}


def legal_lines(name, field):
    """Command lines that use a flag at its limits and between."""
    own, kind = {option(field) for field in fields(SCRIPTS[name])}, plain(field.type)
    groups = [group.split() for group in re.split(" (?=--)", WITH.get(field.name, "")) if group]
    extra = [word for group in groups if group[0] in own for word in group]
    if field.name == "sweep":
        return [["--sweep", *words.split()] for words in SWEEPS]
    if field.name.startswith("hybrid"):
        extra = ["--base-policy" if "--base-policy" in own else "--policy", "hybrid"]
    if kind is bool:
        return [] if field.name in NOT_HERE else [[option(field)], [option(field).replace("--", "--no-")]]
    if get_origin(kind) is Literal:
        return [[*extra, option(field), choice] for choice in get_args(kind) if choice not in {*NOT_HERE, ""}]
    if kind is str:
        return [[option(field), "ü '\"{}%s;$x" * 3]] if field.name == "exp_name" else []
    low, high = LIMITS[field.name]
    high = TOO_LONG.get(field.name, high)
    middle = (low + high) // 16 * 8 if kind is int else low + (high - low) / math.e
    values = dict.fromkeys((low, min(max(low, middle), high), high))
    rest = ["1"] if field.name == "hybrid_weights" else []
    return [[*extra, option(field), repr(value), *rest] for value in values]


TOGETHER = {  # which have to fit the others, or take long
    "total_timesteps", "learning_starts", "buffer_size", "train_steps", "chunk_size", "utd", "eval_freq",
}  # fmt: skip


@pytest.fixture
def short_episodes(monkeypatch):
    """Evaluations of the trainings play 20 steps."""
    make = partial(PaperSquareVectorEnv, max_episode_steps=20)
    monkeypatch.setattr(evaluation, "PaperSquareVectorEnv", make)


@pytest.mark.parametrize("extreme", [0, 1])
@pytest.mark.parametrize("name", [*TINY, *IMITATION])
def test_a_training_with_its_flags_at_their_limits_runs(name, extreme, tmp_path, demos, short_episodes):  # noqa: F811
    (tmp_path / "demos").symlink_to(demos)
    line = []
    for field in fields(SCRIPTS[name]):
        if plain(field.type) in NUMBERS and not is_tuple(field) and field.name not in TOGETHER:
            small = plain(field.type) is float or extreme == 0 and field.name not in ("num_envs", "num_steps")
            line += [option(field), repr(LIMITS[field.name][extreme])] if small else []
    line += ["--chunk-size", "2"] if name in IMITATION else []
    (tmp_path / "here").mkdir()
    code, error = run(name, [*SHORT[name].split(), *line], tmp_path / "here")
    assert code == 0, error
    (path,) = tmp_path.glob("here/runs/*/last.pt")
    assert all(tensor.isfinite().all() for tensor in torch.load(path)["model"].values())


SWEEPS = ["mass 0.001 400", "friction 0.001 400", "xy 0 400", "yaw 0 400", "noise 0 400", "delay 0 400"]
NOT_HERE = {  # which need what is not there, or film, minutes long without a GPU
    "track", "render", "keyboard", "slurm", "cuda", "compile", "dry_run", "capture_video", "videos", "save_video",
}  # fmt: skip


class Hang(BaseException):
    pass


@pytest.mark.campaign
@pytest.mark.parametrize("name", SCRIPTS)
def test_what_is_accepted_runs(name, tmp_path, capsys, demos, short_episodes):  # noqa: F811
    def hang(*_):
        raise Hang

    signal.signal(signal.SIGALRM, hang)
    (tmp_path / "demos").symlink_to(demos)
    ran, refused, failures = 0, [], []
    for field in fields(SCRIPTS[name]):
        for k, line in enumerate(legal_lines(name, field)):
            folder = tmp_path / f"{field.name}_{k}"
            folder.mkdir()
            signal.alarm(200)
            start = time.perf_counter()
            try:
                code, error = run(name, [*SHORT[name].split(), *line], folder)
                weights = [torch.load(path)["model"] for path in folder.rglob("last.pt")]
                finite = all(tensor.isfinite().all() for model in weights for tensor in model.values())
            except (Exception, Hang) as trouble:
                failures.append((line, repr(trouble)[:300]))
                continue
            finally:
                signal.alarm(0)
                torch.set_num_threads(1)
                shutil.rmtree(folder)
            ran += code == 0
            if code == 2 and error.startswith("error: ") and error.count("\n") == 1:
                refused.append((line, error))
            elif code or not finite:
                failures.append((line, code, error[-300:], "finite" if finite else "NOT FINITE"))
            if time.perf_counter() - start > 20:
                with capsys.disabled():
                    print(f"{name} {' '.join(line)}: {time.perf_counter() - start:.0f} s")
    with capsys.disabled():
        print(f"\n{name}: {ran} runs at the limits, {len(refused)} refused, {len(failures)} failed")
        print(*refused, *failures, sep="\n")
    assert not failures
