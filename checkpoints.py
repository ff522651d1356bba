"""What the scripts write to go on from: checkpoints of policies, and the whole state of a training for --resume.

    python ppo_residual.py --resume runs/NAME

Files are written whole or not at all. Damage is seen by the checksums of the ZIP format, which torch.save writes and
torch.load does not look at. Nothing in a file is executed. A run's folder holds `state.pt` and the one before it,
`state_previous.pt`, which is taken if the first is damaged.
"""

import hashlib
import io
import json
import os
import signal
import sys
import time
import zipfile
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch

from env_paper_square import OBS
from flags import fail

IL_SCRIPTS = ("act", "diffusion_policy")
SCRIPTS = ("ppo_residual", "ppo", "sac_residual", *IL_SCRIPTS)  # that a checkpoint may come from
STATE, PREVIOUS = "state.pt", "state_previous.pt"


def write_whole(path: Path, save: Callable[[Path], object]) -> None:
    """Write a file whole or not at all: `save` gets the path of a temporary one, which then takes its place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        save(temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)  # a full disk has room again
        error.filename = error.filename or str(path)
        raise


def write_json(path: Path, value: dict, indent: int = 1) -> None:
    write_whole(path, lambda temporary: temporary.write_text(json.dumps(value, indent=indent) + "\n"))


def save_checkpoint(checkpoint: dict, path: Path) -> None:
    """Write tensors, numbers, strings and containers of them; raises OSError if the disk is full."""
    content = io.BytesIO()  # written by torch, a full disk would be a RuntimeError
    torch.save(checkpoint, content)
    write_whole(path, lambda temporary: temporary.write_bytes(content.getbuffer()))


def read_checkpoint(path: Path) -> dict:
    """What `save_checkpoint` wrote; raises ValueError, with one line for the user, for anything else."""
    try:
        with zipfile.ZipFile(path) as file:
            if any(record.compress_type != zipfile.ZIP_STORED for record in file.infolist()):
                raise zipfile.BadZipFile("it is compressed")  # torch.save's are not, and may not grow in memory
            damaged = file.testzip()
        if damaged:
            raise zipfile.BadZipFile(f"the checksum of {damaged} does not fit")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever the unpickler raises: of a text file, an IndexError
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} is not a checkpoint of this project (cannot be read: {reason[:100]})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not a checkpoint of this project (it holds a {type(content).__name__})")
    return content


def load_checkpoint(path: str | Path) -> dict:
    """The checkpoint of a policy that one of the training scripts wrote.

    Raises ValueError, with one line for the user, if the file is missing or is not such a checkpoint.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no checkpoint at {path}: give the .pt file that a training script wrote under runs/")
    checkpoint = read_checkpoint(path)
    expected = {"script", "args", "model", "env_kwargs", "global_step", "obs_names"}
    if not expected <= checkpoint.keys():
        raise ValueError(f"{path} is not a checkpoint of this project: it lacks {', '.join(sorted(expected))}")
    if checkpoint["script"] not in SCRIPTS:
        raise ValueError(f"{path} comes from an unknown script: expected one of {', '.join(SCRIPTS)}")
    if checkpoint["obs_names"] != list(OBS):
        raise ValueError(
            f"{path} was trained on other observations: {', '.join(checkpoint['obs_names'])}; train it anew"
        )
    return checkpoint


def plain(value):
    """A state as `read_checkpoint` takes it: arrays as tensors, numpy's numbers and other containers as Python's."""
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value.copy())
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, deque)):
        return (tuple if isinstance(value, tuple) else list)(plain(item) for item in value)
    return value


def save_state(state: dict, run_dir: Path) -> None:
    """Write the state of a training; the one before it stays, as the previous one. Raises OSError."""
    new, current = run_dir / "state_new.pt", run_dir / STATE
    save_checkpoint(plain(state), new)
    try:
        read_checkpoint(current)
    except ValueError:
        pass  # not there yet, or damaged: the previous one is better
    else:
        current.replace(run_dir / PREVIOUS)
    new.replace(current)


def load_state(run_dir: Path) -> dict:
    """The last whole state of a run, which may be the previous one, with a line on stderr; raises ValueError."""
    try:
        return read_checkpoint(run_dir / STATE)
    except ValueError as error:
        if not (run_dir / PREVIOUS).exists():
            raise
        state = read_checkpoint(run_dir / PREVIOUS)
        print(f"warning: {error}; going on from {PREVIOUS}, step {state.get('global_step', 0)}", file=sys.stderr)
        return state


def begin(args, script: str):
    """The run that a script's flags ask for: its flags, its folder under runs/, and the state that it goes on from.

    The state is None for a new run. With --resume the flags are those that the run was started with, and the state is
    {} if it got no farther than that. Ends the program, with one line, if there is nothing to go on from.
    """
    if not args.resume:
        return args, Path("runs") / f"{args.exp_name}__{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}", None
    run_dir = Path(args.resume)
    with fitting(run_dir):
        if replace(args, resume="") != type(args)():
            raise ValueError("it goes on with the flags that the run was started with: leave out all others")
        state = load_state(run_dir)
        if state["script"] != script:
            raise ValueError(f"this run is of {state['script']}.py, not of {script}.py")
        if (run_dir / "results.json").exists():
            raise ValueError("this run has come to its end")
        return type(args)(**state["args"]), run_dir, state if "global_step" in state else {}


def make_run_dir(run_dir: Path, script: str, args: dict) -> None:
    """Make the folder of a new run, which holds its flags; raises OSError."""
    run_dir.mkdir(parents=True)
    save_state({"script": script, "args": args}, run_dir)
    write_json(run_dir / "args.json", args)


@contextmanager
def fitting(run_dir: Path) -> Iterator[None]:
    """End the program with one line if what is done here to a state finds that it is not one of this run."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        if isinstance(error, LookupError):
            reason = f"its state lacks {reason}"
        fail(f"--resume {run_dir}: {reason}")


def fingerprint(value) -> str:
    """The same for the same tensors, numbers and strings: whether what a run was made from is still what it was."""
    content = io.BytesIO()
    torch.save(plain(value), content)
    return hashlib.sha256(content.getbuffer()).hexdigest()


class Stop:
    """Notes that the program is asked to stop, by SIGINT or SIGTERM, so that it can save first; twice is not noted."""

    def __init__(self):
        self.number = 0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.note)

    def note(self, number: int, frame) -> None:
        self.number = number
        signal.signal(number, signal.SIG_DFL)

    def exit(self, run_dir: Path) -> NoReturn:
        """End the program after the state was saved; the exit code is the signal's."""
        if os.environ.get("RANK", "0") == "0":
            print(f"stopped; go on with: python {sys.argv[0]} --resume {run_dir}", file=sys.stderr)
        raise SystemExit(128 + (self.number or signal.SIGTERM))  # 0: only another process was asked
