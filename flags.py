"""What the scripts take from outside: flags and their limits, folders, the device, processes; refused in one line.

`parse(Args)` reads the command line, `check_flags(args)` also checks the flags that a checkpoint holds.
"""

import atexit
import difflib
import itertools
import os
import re
import reprlib
import sys
import tempfile
import threading
import types
import unicodedata
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin

import torch
import torch.distributed as dist
import torch.distributed.nn  # before there is a process group, which its functions' defaults would keep for ever
import tyro
from tyro import _errors  # private, in the pinned version: the only way to errors of its own words

Args = TypeVar("Args")

# The least and the largest value of every flag that is a number, in its own unit, the same in all scripts. The largest
# are far above what makes sense and below what exhausts the memory of a workstation, or is no number of that kind
LIMITS = {
    # Task and reward
    "act_scale": (1e-6, 3.2),  # the joints' ranges are 1.9 to 5.5 rad
    "tape_half_size": (0.001, 1.0),
    "curriculum_start": (0.001, 1.0),
    "randomize_xy": (0.0, 1.0),
    "randomize_yaw": (0.0, 6.2832),
    "randomize_friction": (0.0, 0.99),  # 1 would leave none
    "randomize_mass": (0.0, 0.99),
    "success_weight": (-1e4, 1e4),
    "distance_weight": (-1e4, 1e4),
    "orientation_weight": (-1e4, 1e4),
    "time_weight": (-1e4, 1e4),
    "reach_weight": (-1e4, 1e4),
    "reward_scale": (1e-6, 1e3),
    # Runs
    "seed": (0, 2**32 - 1),
    "num_threads": (0, 1024),
    "torch_threads": (1, 256),  # they wait for each other by spinning
    "num_envs": (1, 32_768),  # 0.2 MB each
    "total_timesteps": (1, 10**10),
    "eval_freq": (1, 10**10),
    "save_freq": (1, 10**10),
    "eval_episodes": (1, 10**6),  # as many as lie between VALIDATION_SEED and TEST_SEED
    "test_episodes": (1, 10**6),
    "log_freq": (1, 10**7),
    # PPO and SAC
    "num_steps": (1, 10**6),
    "minibatch_size": (2, 10**7),  # one has no deviation to normalise its advantages by
    "update_epochs": (1, 1000),
    "learning_rate": (1e-12, 1.0),
    "gamma": (0.0, 0.99999),
    "gae_lambda": (0.0, 1.0),
    "clip_coef": (1e-6, 100.0),
    "ent_coef": (0.0, 100.0),
    "max_grad_norm": (1e-6, 1e6),
    "hidden_size": (1, 4096),
    "init_std": (1e-3, 10.0),
    "buffer_size": (1, 10**7),  # 0.4 kB each
    "batch_size": (1, 65_536),
    "utd": (1e-4, 100.0),
    "tau": (1e-6, 1.0),
    "n_step": (1, 400),  # an episode
    "policy_frequency": (1, 10**6),
    "target_entropy_scale": (-10.0, 10.0),
    "temperature": (1e-9, 1e3),
    # The residual
    "alpha": (0.0, 1.0),
    "alpha_start": (0.0, 1.0),
    "alpha_end": (0.0, 1.0),
    "residual_penalty": (0.0, 1e3),
    "learning_starts": (0, 10**10),
    "warmup_std": (0.0, 10.0),
    "prog_explore": (0, 10**10),
    # Bases
    "ik_gain": (1e-3, 2.0),  # beyond 2 the error grows
    "ik_damping": (1e-4, 1.0),  # 0 would divide by it where the arm is stretched
    "ik_speed_limit": (1e-6, 3.2),
    "ik_press_depth": (0.0, 0.1),
    "ik_hover_height": (0.0, 0.4),
    "hybrid_weights": (0.0, 1e6),
    # Imitation
    "num_demos": (0, 10**6),
    "train_steps": (1, 10**8),
    "weight_decay": (0.0, 1.0),
    "chunk_size": (1, 400),  # an episode
    "n_action_steps": (1, 400),
    "dim_model": (1, 1024),
    "n_heads": (1, 1024),
    "dim_feedforward": (1, 4096),
    "n_encoder_layers": (1, 12),
    "n_decoder_layers": (1, 12),
    "n_vae_layers": (1, 12),
    "latent_dim": (1, 1024),
    "dropout": (0.0, 0.99),
    "kl_weight": (0.0, 1e6),
    "temporal_ensemble_coeff": (0.0, 1e3),
    "channels": (8, 512),
    "embedding_size": (1, 4096),
    "num_train_timesteps": (1, 1000),
    "num_inference_steps": (1, 1000),
    "ema_decay": (0.0, 0.999999),
    # record_demos.py and eval.py
    "num_episodes": (1, 10**6),  # as many as lie below VALIDATION_SEED
    "n_episodes": (1, 10**6),
    "noise_std": (0.0, 10.0),
    "noise_correlation": (0.0, 0.999999),
    "sweep": (0.0, 400.0),  # a delay's episode
    "sweep_points": (2, 1000),
    "video_episodes": (1, 1000),
    "video_height": (48, 960),
    "video_stride": (1, 30),  # a second
    # reproduce.py and benchmark.py
    "seeds": (0, 1000),
    "episodes": (0, 10**6),
    "cores_per_run": (1, 1024),
    "timeout_min": (1, 10**6),
    "repeats": (1, 1000),
    "seconds": (1e-6, 3600.0),
    "warmup_steps": (0, 10**6),
    "training_steps": (0, 10**10),
    "sb3_steps": (0, 10**10),
}
ENTRIES = 1000  # most values of one flag
PATH_BYTES, NAME_BYTES = 4000, 255  # what file systems take
SHORT = reprlib.Repr()  # of values in errors
SHORT.maxstring = SHORT.maxother = SHORT.maxlong = 60


def printable(text: str) -> str:
    """One line that a terminal shows and does not obey, whatever a stranger's file put into it."""
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)


def fail(message: str) -> NoReturn:
    """End the program for a user's mistake: one line on stderr, exit code 2."""
    print(printable(f"error: {message}"), file=sys.stderr)
    raise SystemExit(2)


def did_you_mean(word: str, words) -> str:
    close = difflib.get_close_matches(word, words, n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def most_bytes(name: str) -> int:
    return NAME_BYTES - 55 if name == "exp_name" else NAME_BYTES  # a run's folder has its seed and the time, too


def fits(name: str, kind: Any, value: object) -> bool:
    """Whether a value is of the kind that the flag `name` is annotated with, and within its limits."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return fits(name, parts[0], value)
    if origin in (Union, types.UnionType):
        return any(fits(name, part, value) for part in parts)
    if origin is Literal:
        return isinstance(value, str) and value in parts
    if origin is tuple:
        if not isinstance(value, tuple) or len(value) > ENTRIES:
            return False
        parts = parts[:1] * len(value) if parts[-1] is Ellipsis else parts
        return len(parts) == len(value) and all(fits(name, *pair) for pair in zip(parts, value, strict=True))
    if kind is str:  # a path, or it becomes part of one
        if not isinstance(value, str) or len(value) > PATH_BYTES:
            return False
        if any(unicodedata.category(character) in ("Cc", "Cs") for character in value):  # Cs: bytes that are no UTF-8
            return False
        sizes = [len(part.encode()) for part in ([value] if name == "exp_name" else value.split("/"))]
        return value != "" and max(sizes) <= most_bytes(name) and not (name == "exp_name" and set("/\\") & set(value))
    if kind in (bool, types.NoneType):
        return isinstance(value, kind)
    low, high = LIMITS[name]
    number = isinstance(value, (int, float) if kind is float else int) and not isinstance(value, bool)
    return number and low <= value <= high  # which nan is not


def choices(kind: Any) -> list[str]:
    """The names that a flag of this kind knows."""
    if get_origin(kind) is Literal:
        return [part for part in get_args(kind) if part]
    return [choice for part in get_args(kind) for choice in choices(part)]


def describe(name: str, kind: Any) -> str:
    """What `fits` asks for, in words."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Annotated or (parts and parts[-1] in (Ellipsis, types.NoneType)):
        return describe(name, parts[0])
    if origin is Literal:
        *others, last = (part or "empty" for part in parts)
        return f"{', '.join(others)} or {last}"
    if origin is tuple:
        return "; ".join(describe(name, part) for part in parts)
    if kind is str:
        where = "without slashes" if name == "exp_name" else "in each part of a path"
        return f"text of 1 to {most_bytes(name)} bytes {where}, without control characters"
    if kind is bool:
        return "True or False"
    low, high = LIMITS[name]
    return f"a whole number from {low:,} to {high:,}" if kind is int else f"a number from {low:g} to {high:g}"


def complain(name: str, kind: Any, value: object) -> str:
    """The line for a value that does not fit; `value` is the flag's, or the words that the command line has for it."""
    words, known = value if isinstance(value, (tuple, list)) else [value], choices(kind)
    unknown = [word for word in words if isinstance(word, str) and word not in known]
    hint = did_you_mean(unknown[0], known) if unknown else ""
    found = " ".join(map(SHORT.repr, words)) if words else "nothing"
    return f"--{name.replace('_', '-')} must be {describe(name, kind)}, found {' '.join(found.split())}{hint}"


def check_flags(args: Any) -> None:
    """Raise ValueError, one line for the user, if a flag is of another type than its own or beyond its limits.

    For flags of the command line and for those that a checkpoint brings, `check_flags(Args(**checkpoint["args"]))`.
    """
    for field in fields(args):
        value = getattr(args, field.name)
        as_by_default = isinstance(value, str) and value == "" == field.default
        if not as_by_default and not fits(field.name, field.type, value):
            raise ValueError(complain(field.name, field.type, value))


def words_of(spellings: Sequence[str], line: Sequence[str]) -> list[str]:
    """What a command line has for a flag, the last time that it names it."""
    for k, word in reversed(list(enumerate(line))):
        flag, equals, value = word.partition("=")
        if flag.replace("_", "-") in spellings:
            return [value] if equals else list(itertools.takewhile(lambda word: word[:2] != "--", line[k + 1 :]))
    return []


def unknown(word: str, kind: Any, line: Sequence[str]) -> str:
    """The line for a word that no flag takes."""
    with_flag = word not in line and any(other.endswith(f"={word}") for other in line)
    if with_flag or not word.startswith("-"):
        end = next((k for k, other in enumerate(line, 1) if other == word or other.endswith(f"={word}")), 0)
        before = [other.partition("=")[0] for other in line[:end] if other[:2] == "--"]
        after = f" after {before[-1]}" if before else ""
        return f"unexpected {SHORT.repr(word)}{after}; --help lists the flags"
    flag, names = word.partition("=")[0], [field.name.replace("_", "-") for field in fields(kind)]
    hint = did_you_mean(flag.replace("_", "-"), [start + name for name in names for start in ("--", "--no-")])
    return f"unknown flag {SHORT.repr(flag)}{hint}; --help lists the flags"


def refuse_by_the_disk(kind: type[BaseException], error: BaseException, traceback: types.TracebackType | None) -> None:
    """A hook for what nobody caught: a full disk, or a folder that went away, is one line, no fault of the program."""
    if not issubclass(kind, OSError):
        sys.__excepthook__(kind, error, traceback)
    else:
        print(file=sys.stderr)  # below a progress bar
        fail(f"{error}; what was written before is whole")


def parse(kind: type[Args]) -> Args:
    """The flags of the command line as a `kind`, checked; ends the program, in one line, if they do not fit.

    From here on an OSError that nobody catches ends it in one line as well.
    """
    sys.excepthook = refuse_by_the_disk
    # In TensorBoard's writer it comes up again when it is next called
    threading.excepthook = lambda args: issubclass(args.exc_type, OSError) or threading.__excepthook__(args)
    types_of, line = {field.name: field.type for field in fields(kind)}, sys.argv[1:]

    def refuse(event: _errors.ParseErrorEvent) -> None:
        if isinstance(event, _errors.UnrecognizedArgs):
            fail(unknown(event.tokens[0], kind, line))
        flag = getattr(event, "argument", None)
        if flag is not None:
            name = flag.field.intern_name
            fail(complain(name, types_of[name], words_of(flag.lowered.name_or_flags, line)))

    with _errors.on_parse_error(refuse):
        args = tyro.cli(kind)
    try:
        check_flags(args)
    except ValueError as error:
        fail(str(error))
    return args


def check_folder(path: str | Path) -> None:
    """Raise ValueError, one line for the user, if no file can be written in a folder, which need not exist yet."""
    try:
        folder = Path(path).absolute()
        while not os.path.lexists(folder):
            folder = folder.parent
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(f"{path} is not a folder that can be written to: {error.strerror}") from error


def number_of(variable: str, default: int) -> int:
    """An environment variable of torchrun; raises ValueError, one line for the user, if it is no number."""
    text = os.environ.get(variable, str(default))
    if not re.fullmatch("[0-9]{1,6}", text):
        raise ValueError(f"{variable}, which torchrun sets, must be a whole number, found {SHORT.repr(text)}")
    return int(text)


def find_device(name: str) -> torch.device:
    """The device that --device names, a GPU for each process of torchrun; raises ValueError if it is not there."""
    gpus, rank = torch.cuda.device_count() if name != "cpu" else 0, number_of("LOCAL_RANK", 0)
    if name == "cpu" or (name == "auto" and gpus == 0):
        return torch.device("cpu")
    if rank >= gpus:
        raise ValueError(f"--device {name}: torch finds {gpus} GPUs here, and needs number {rank}")
    return torch.device("cuda", rank)


def find_processes() -> tuple[int, int]:
    """This process's number and how many there are, 0 and 1 without torchrun; has met the others when it returns.

    Ends the program, in one line, if the environment variables are not what torchrun makes of them.
    """
    try:
        rank, world_size = number_of("RANK", 0), number_of("WORLD_SIZE", 1)
        local_size = number_of("LOCAL_WORLD_SIZE", 1)
        if not (rank < world_size and 1 <= local_size <= world_size):
            raise ValueError(f"RANK {rank} and LOCAL_WORLD_SIZE {local_size} do not fit WORLD_SIZE {world_size}")
        if world_size > 1:
            dist.init_process_group()
            atexit.register(dist.destroy_process_group)  # ends its threads while Python still runs: they hold tensors
    except (ValueError, RuntimeError, OverflowError) as error:
        fail(f"cannot be one of several processes, start them by torchrun: {str(error).splitlines()[0]}")
    return rank, world_size
