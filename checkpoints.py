"""What the scripts write to go on from: checkpoints of policies, and the whole state of a training for --resume.

    python ppo_residual.py --resume runs/NAME

Files are written whole or not at all. Damage is seen by the checksums of the ZIP format, which torch.save writes and
torch.load does not look at. Files may come from strangers: nothing in them is executed, and no memory is taken for more
than they hold. A run's folder holds `state.pt` and the one before it, `state_previous.pt`, which is taken if the first
is damaged.
"""

import hashlib
import importlib
import io
import json
import math
import os
import pickletools
import signal
import sys
import time
import warnings
import zipfile
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import NoReturn, TypeVar

import numpy as np
import torch

from env_paper_square import OBS, EnvArgs, eval_kwargs
from flags import SHORT, check_flags, fail, printable

Network = TypeVar("Network", bound=torch.nn.Module)

IL_SCRIPTS = ("act", "diffusion_policy")
SCRIPTS = ("ppo_residual", "ppo", "sac_residual", *IL_SCRIPTS)  # that a checkpoint may come from
STATE, PREVIOUS = "state.pt", "state_previous.pt"
MOST_STEPS = 10**11  # more than any training's
DEEPEST, LARGEST_INT = 20, 2**128  # of content: containers in one another, and the integers of random generators
DTYPES = {getattr(torch, name) for name in ("float32", "float64", "int64", "int32", "int8", "uint8", "bool")}
GLOBALS = {  # what the pickle in a checkpoint may name; torch.load knows more, as arrays of any size out of nothing
    "collections OrderedDict",
    "torch._utils _rebuild_tensor_v2",
    *(f"torch {name}Storage" for name in ("Float", "Double", "Long", "Int", "Char", "Byte", "Bool")),
}


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


def only_data(content: object, size: int) -> object:
    """`content` in plain containers; raises ValueError for anything but tensors, numbers, text, and containers of them.

    Also for more than the `size` bytes of its file: few suffice for a tensor of any size, one number over and over, or
    for a list that holds a list twice, which holds a list twice.
    """
    left = size

    def take(value: object, depth: int) -> object:
        nonlocal left
        kind = type(value)
        if kind is torch.Tensor:
            dense = value.layout == torch.strided and value.device.type == "cpu" and not value.is_nested
            if not dense or value.dtype not in DTYPES or value.requires_grad:
                raise ValueError(f"it holds a {SHORT.repr(value.dtype)} tensor that this project does not write")
            left -= value.nbytes
        elif kind is int and abs(value) >= LARGEST_INT:
            raise ValueError("it holds too large a number")
        left -= 1
        if left < 0 or depth > DEEPEST:
            raise ValueError("it unfolds to more than there is in it")
        if kind in (dict, OrderedDict):
            if not all(type(key) in (str, int) for key in value):
                raise ValueError("it holds keys that are neither text nor numbers")
            return {take(key, depth): take(item, depth + 1) for key, item in value.items()}
        if kind in (list, tuple):
            return kind([take(item, depth + 1) for item in value])
        if kind in (torch.Tensor, bool, int, float, str, type(None)):
            return value
        raise ValueError(f"it holds a {kind.__name__}")

    return take(content, 0)


def read_checkpoint(path: Path) -> dict:
    """What `save_checkpoint` wrote; raises ValueError, with one line for the user, for anything else."""
    whole = io.BytesIO()  # torch.load reads a ZIP in its own way: it gets one that is written anew, of checked parts
    try:
        size = path.stat().st_size
        with zipfile.ZipFile(path) as file, zipfile.ZipFile(whole, "w") as copy:
            records = {record.filename: record for record in file.infolist()}
            if any(record.compress_type != zipfile.ZIP_STORED for record in records.values()):
                raise zipfile.BadZipFile("it is compressed")  # torch.save's are not, and may not grow in memory
            if len(records) < len(file.infolist()) or sum(r.file_size for r in records.values()) > size:
                raise zipfile.BadZipFile("its records overlap")
            for name, record in records.items():
                content = file.read(record)  # raises if the checksum does not fit
                if name.endswith("data.pkl"):
                    named = {arg for code, arg, _ in pickletools.genops(content) if code.name == "GLOBAL"}
                    if named - GLOBALS:
                        raise ValueError(f"it names {SHORT.repr(sorted(named - GLOBALS)[0])}")
                copy.writestr(name, content)
        whole.seek(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            content = torch.load(whole, map_location="cpu", weights_only=True)
        content = only_data(content, size)
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__}")
    except Exception as error:  # whatever the unpickler raises: of a text file, an IndexError
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} is not a checkpoint of this project (cannot be read: {reason[:100]})") from error
    return content


def check_finite(tensors: object) -> None:
    if not isinstance(tensors, dict) or not all(isinstance(x, torch.Tensor) for x in tensors.values()):
        raise ValueError("its weights are no tensors")
    for name, x in tensors.items():
        if not x.isfinite().all():
            raise ValueError(f"its {SHORT.repr(name)} is not finite")


def check_checkpoint(checkpoint: object) -> dict:
    """A checkpoint with all the flags of its script; raises ValueError if one of the scripts would not write it.

    Whether the weights fit the network is found by `rebuild`, when it is built.
    """
    expected = {"script", "args", "model", "env_kwargs", "global_step", "obs_names"}
    if not isinstance(checkpoint, dict) or not expected <= checkpoint.keys():
        raise ValueError(f"it lacks {', '.join(sorted(expected))}")
    script, step, env_kwargs = (checkpoint[key] for key in ("script", "global_step", "env_kwargs"))
    if script not in SCRIPTS:  # a checkpoint does not get to choose what is imported
        raise ValueError(f"it comes from an unknown script: expected one of {', '.join(SCRIPTS)}")
    if checkpoint["obs_names"] != list(OBS):
        raise ValueError(f"it was trained on other observations, {SHORT.repr(checkpoint['obs_names'])}; train it anew")
    if type(step) is not int or not 0 <= step <= MOST_STEPS:
        raise ValueError(f"its global_step is {SHORT.repr(step)}")
    try:
        args = importlib.import_module(script).Args(**checkpoint["args"])
        check_flags(args)
        if env_kwargs.keys() != eval_kwargs(EnvArgs()).keys():
            raise ValueError(f"its env_kwargs are {SHORT.repr(list(env_kwargs))}")
        check_flags(EnvArgs(**env_kwargs))
    except (TypeError, AttributeError) as error:
        raise ValueError(f"its flags do not fit {script}.py: {error}") from error
    check_finite(checkpoint["model"])
    base = checkpoint.get("base")
    if script not in IL_SCRIPTS and script != "ppo":
        bases = args.hybrid_bases if args.base_policy == "hybrid" else (args.base_policy,)
        if ("il" in bases) != (base is not None):
            raise ValueError("it lacks its base, or holds one that it has no use for")
    elif base is not None:
        raise ValueError("it holds a base that it has no use for")
    if base is not None and (not isinstance(base, dict) or base.get("script") not in (*IL_SCRIPTS, "lerobot_policy")):
        raise ValueError(f"its base comes from none of {', '.join(IL_SCRIPTS)}")
    if base is not None and base["script"] in IL_SCRIPTS:
        base = check_checkpoint(base)
    return {**checkpoint, "args": asdict(args), **({"base": base} if "base" in checkpoint else {})}


def load_checkpoint(path: str | Path) -> dict:
    """The checkpoint of a policy that one of the training scripts wrote.

    Raises ValueError, with one line for the user, if the file is missing or is not such a checkpoint.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no checkpoint at {path}: give the .pt file that a training script wrote under runs/")
    checkpoint = read_checkpoint(path)
    try:
        return check_checkpoint(checkpoint)
    except ValueError as error:
        raise ValueError(f"{path} is not a checkpoint of this project: {error}") from error


def check_like(found: object, expected: object, where: str, finite: bool = True) -> None:
    """Raise ValueError unless `found` has the keys, lengths, types and shapes of `expected`, and finite numbers.

    An empty dict or list stands for one of any length, of numbers or lists of them; a tensor of no rows for any rows.
    """
    wanted, kind = type(expected), type(found)
    kinds = (float, int) if wanted is float else (dict, OrderedDict) if wanted in (dict, OrderedDict) else (wanted,)
    if kind not in kinds:
        raise ValueError(f"its {where} is a {kind.__name__}, not a {wanted.__name__}")
    if kind is torch.Tensor:
        rows = slice(1 if expected.shape[:1] == (0,) else 0, None)
        fits = found.dim() == expected.dim() and found.shape[rows] == expected.shape[rows]
        if not fits or found.dtype != expected.dtype:
            kinds = [f"{x.dtype} {list(x.shape)}" for x in (found, expected)]
            raise ValueError(f"its {where} is {kinds[0]}, not {kinds[1]}")
    if finite and not (found.isfinite().all() if kind is torch.Tensor else kind is not float or math.isfinite(found)):
        raise ValueError(f"its {where} is not finite")
    if wanted in (dict, OrderedDict, list, tuple) and not expected:
        check_numbers(found, where)
    elif kind in (list, tuple):
        if len(found) != len(expected):
            raise ValueError(f"its {where} has {len(found)} entries, not {len(expected)}")
        for k, item in enumerate(found):
            check_like(item, expected[k], f"{where}.{k}", finite)
    elif kind in (dict, OrderedDict):
        if odd := sorted(found.keys() ^ expected.keys(), key=str):
            raise ValueError(f"its {where} lacks or should not have {SHORT.repr(odd[0])}")
        for key in expected:
            check_like(found[key], expected[key], f"{where}.{key}", finite)


def check_numbers(found: dict | list | tuple, where: str, depth: int = 2) -> None:
    """Raise ValueError for anything but finite numbers and, if `depth` allows, containers of them."""
    for item in found.values() if isinstance(found, dict) else found:
        if isinstance(item, (list, tuple)) and depth > 1:
            check_numbers(item, where, depth - 1)
        elif not isinstance(item, (int, float)) or not math.isfinite(item):
            raise ValueError(f"its {where} holds {SHORT.repr(item)}, not a number")


def rebuild(make: Callable[[], Network], weights: dict) -> Network:
    """The network that `make` makes, with the weights of a checkpoint; raises ValueError if these are another's.

    They are compared before memory is taken for it, of which flags alone may ask a lot. What `make` draws by randn must
    name its device: for such on "meta", torch imports hundreds of modules, seconds long.
    """
    with torch.random.fork_rng(devices=[]):  # the training's own random numbers go on as if this were not
        with torch.device("meta"):
            expected = make().state_dict()
        try:
            check_like(weights, expected, "model", finite=False)  # a training that diverges goes on
        except ValueError as error:
            raise ValueError(f"the checkpoint's weights do not fit the network of its flags: {error}") from error
        network = make()
    network.load_state_dict(weights)
    return network


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
        step = SHORT.repr(state.get("global_step", 0))
        print(printable(f"warning: {error}; going on from {PREVIOUS}, step {step}"), file=sys.stderr)
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
        if run_dir.is_dir() and any(path.is_symlink() for path in run_dir.iterdir()):
            raise ValueError("it holds a link, through which the run would write elsewhere: put the file itself there")
        state = load_state(run_dir)
        if state["script"] != script:
            raise ValueError(f"this run is of {SHORT.repr(state['script'])}, not of {script}.py")
        if (run_dir / "results.json").exists():
            raise ValueError("this run has come to its end")
        args, step = type(args)(**state["args"]), state.get("global_step", 0)
        check_flags(args)
        if type(step) is not int or not 0 <= step <= MOST_STEPS:
            raise ValueError(f"its global_step is {SHORT.repr(step)}")
        return args, run_dir, state if "global_step" in state else {}


def restore(parts: dict, state: dict, expected: dict) -> None:
    """Load networks, optimizers and a buffer by name from a state; raises ValueError for another training's.

    `expected` is what the training would save before its first step. Out of a stranger's state, a tensor of another
    shape would else be met by an optimizer that does not look.
    """
    expected = plain(expected)
    numbers = dict.fromkeys(("global_step", "seconds", "eval_seconds", "success_rate", "mean_length"))
    if not isinstance(state["evaluations"], list) or not state["evaluations"]:
        raise ValueError("its evaluations are none")
    for row in state["evaluations"]:
        if not isinstance(row, dict) or not numbers.keys() <= row.keys():
            raise ValueError("its evaluations lack numbers")
        check_numbers(row, "evaluations", depth=1)
    expected["evaluations"] = state["evaluations"]
    for name, part in parts.items():
        if isinstance(part, torch.optim.Optimizer):
            parameters = [parameter.detach() for group in part.param_groups for parameter in group["params"]]
            moments = [{"step": torch.zeros(()), "exp_avg": x, "exp_avg_sq": x} for x in parameters]
            begun = isinstance(state[name], dict) and state[name].get("state") != {}
            expected[name]["state"] = dict(enumerate(moments)) if begun else {}
    check_like(state, expected, "state")
    for name, part in parts.items():
        if isinstance(part, torch.optim.Optimizer):
            groups = zip(state[name]["param_groups"], expected[name]["param_groups"], strict=True)
            if any({**found, "lr": 0.0} != {**wanted, "lr": 0.0} for found, wanted in groups):
                raise ValueError(f"its {name} was made with other flags")
        part.load_state_dict(state[name])


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
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError, ArithmeticError, MemoryError) as error:
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
