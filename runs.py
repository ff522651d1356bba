"""What every script needs and no paper writes about: limits of flags, a run's folder and files, stopping and going on.

    args = parse(Args)                                  # the command line, or with --resume the flags of that run
    run = Run(args, __file__, total=args.total_timesteps)
    run.begin(globals())                                # with --resume, every variable becomes what it was
    for iteration in ...:
        run.save(global_step)                           # now and then, and when the run is asked to stop
    run.end(global_step)

A script goes on from all that it has made before its loop. So a copy that adds a network, a hidden state or a generator
need not declare it, and what cannot be saved is an error before the training begins.

Files are safetensors, with JSON and a SHA-256 in the header: nothing in them is executed, damage is noticed, and they
are written whole or not at all.
"""

import ast
import copyreg
import hashlib
import importlib.util
import inspect
import itertools
import json
import numbers
import os
import random
import re
import shlex
import shutil
import signal
import sys
import threading
import time
import types
from collections import defaultdict, deque
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import numpy as np
import safetensors.torch
import torch
import tyro
from filelock import FileLock, Timeout
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent
STATE, PREVIOUS = "state.safetensors", "state_previous.safetensors"
LOCKS = {}  # by folder, held to the end of the process


class UserError(ValueError):
    """What a user can mend: it ends a script with its message alone, and exit code 2."""


# Flags


@dataclass(frozen=True)
class Between:
    """Limits of a number, themselves allowed."""

    low: float
    high: float


class Real:
    """`alpha: Real[0, 1] = 0.5` is a float flag with limits, which --help shows and `Flags` checks."""

    kind: type = float

    def __class_getitem__(cls, limits):
        return Annotated[cls.kind, Between(*limits), tyro.conf.arg(metavar="{}..{}".format(*limits))]


class Whole(Real):
    """`num_envs: Whole[1, 100] = 8` is an int flag with limits."""

    kind = int


def fits(kind: Any, value: object) -> bool:
    """Whether a value is of the type that a flag is annotated with, and within its limits; unknown types always fit."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Annotated:
        limits = [limit for limit in kind.__metadata__ if isinstance(limit, Between)]
        return fits(parts[0], value) and all(limit.low <= value <= limit.high for limit in limits)
    if origin in (Union, types.UnionType):
        return any(fits(part, value) for part in parts)
    if origin is Literal:
        return value in parts
    if origin in (tuple, list):
        kinds = [part for part in parts if part is not Ellipsis]
        return isinstance(value, origin) and all(any(fits(kind, item) for kind in kinds) for item in value)
    if kind in (int, float):
        return isinstance(value, numbers.Integral if kind is int else numbers.Real) and not isinstance(value, bool)
    return kind not in (bool, str, types.NoneType) or isinstance(value, kind)


def describe(kind: Any) -> str:
    """What `fits` asks for, in words."""
    limits = [limit for limit in getattr(kind, "__metadata__", ()) if isinstance(limit, Between)]
    if limits:
        return f"from {limits[0].low} to {limits[0].high}"
    parts = get_args(kind)[:1] if get_origin(kind) is Annotated else get_args(kind)
    parts = [part for part in parts if part is not Ellipsis]
    return " or ".join(map(describe, parts)) or getattr(kind, "__name__", repr(kind))


@dataclass
class Flags:
    """Base of every `Args`: checks each flag's limits, on the command line and when a checkpoint brings the flags.

    A `__post_init__` of a script's own may check more, and raises ValueError.
    """

    def __post_init__(self):
        for name, kind in get_type_hints(type(self), include_extras=True).items():
            value = getattr(self, name)
            if not fits(kind, value):
                raise ValueError(f"--{name.replace('_', '-')} must be {describe(kind)}, found {value!r:.100}")


@dataclass
class RunArgs(Flags):
    exp_name: str = ""
    """first part of the run's name; everything it writes is under runs/NAME (default: the script's name)"""
    seed: Whole[0, 2**32 - 1] = 1
    """seed of the networks, the exploration and the training episodes"""
    torch_threads: Whole[1, 256] = 1
    """torch's threads; more than one fights the physics for the cores of a small machine"""
    device: Literal["cpu", "cuda", "auto"] = "cpu"
    """where the networks are; auto takes cuda where there is one"""
    resume: str = ""
    """folder of a run, runs/NAME, that was stopped: go on with it, with its flags"""
    track: bool = False
    """also log to Weights & Biases"""
    wandb_project: str = "paper-square"
    """project to log to with --track"""
    capture_video: bool = False
    """film one held-out episode at the end"""
    eval_episodes: Whole[1, 10**6] = 100
    """held-out validation episodes of each evaluation during the training"""
    test_episodes: Whole[1, 10**6] = 200
    """held-out test episodes of the table at the end"""

    def __post_init__(self):
        super().__post_init__()
        if re.search(r"[/\\\0]", self.exp_name) or len(self.exp_name.encode()) > 200:
            raise ValueError(f"--exp-name becomes part of a folder's name, found {self.exp_name!r:.100}")


def parse(kind: type) -> Any:
    """The flags of the command line as a `kind`; with --resume, those that the run was started with.

    From here on a `UserError`, or a disk that refuses, ends the program with one line and exit code 2.
    """

    def hook(error_type, error, traceback):
        if not issubclass(error_type, (UserError, OSError)):
            return sys.__excepthook__(error_type, error, traceback)
        print(f"\nerror: {error}", file=sys.stderr)
        raise SystemExit(2)

    sys.excepthook = hook
    sys.stdout.reconfigure(errors="backslashreplace")  # a name that the terminal cannot show ends nothing
    # In TensorBoard's writer, a thread, an OSError comes up again when it is next called
    threading.excepthook = lambda args: issubclass(args.exc_type, OSError) or threading.__excepthook__(args)
    args = tyro.cli(kind)
    if not getattr(args, "resume", ""):
        return args
    if replace(args, resume="") != kind():
        raise UserError("--resume goes on with the flags that the run was started with: leave out all others")
    return replace(flags_of(kind, load_state(Path(args.resume))), resume=args.resume)


def flags_of(kind: type, checkpoint: dict) -> Any:
    """The flags of a checkpoint or a state as a `kind`; raises UserError if they are not those of its script."""
    try:
        return kind(**checkpoint["args"])
    except (TypeError, ValueError) as error:
        script = f"{checkpoint['script']}.py"
        keeps = f"its run keeps the script that it was started from: --script runs/NAME/{script}"
        raise UserError(f"the flags in the checkpoint are not those of {script} ({error}); {keeps}") from error


def available_cores() -> int:
    """Cores that this process may use, which on a shared machine are not all that it has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def find_device(name: str) -> torch.device:
    """The device that --device names; raises UserError if it is not there."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no GPU here")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


# Files


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


def write_json(path: Path, value: object) -> None:
    write_whole(path, lambda temporary: temporary.write_text(json.dumps(value, indent=1, default=str) + "\n"))


NO_STATE = (types.ModuleType, types.FunctionType, types.BuiltinFunctionType, types.MethodType, type, slice, range)
NO_STATE += (torch.device, torch.dtype, np.dtype, type(Any), type(Literal))


def pack(value: object, tensors: dict, path: str) -> object:
    """A value as JSON takes it, its tensors and arrays put into `tensors`; raises TypeError, naming what cannot be.

    Objects are kept by their state_dict, random generators by their states, other objects by their attributes.
    """
    if isinstance(value, torch.nn.Module):
        return pack({"state": value.state_dict(), "parts": parts_of(value)}, tensors, path)
    if hasattr(type(value), "state_dict"):  # optimisers, environments, bases
        return pack(value.state_dict(), tensors, path)
    if isinstance(value, np.random.Generator):
        return pack(value.bit_generator.state, tensors, path)
    if isinstance(value, torch.Generator):
        return pack(value.get_state(), tensors, path)
    if isinstance(value, np.ndarray) and value.dtype == object:  # infos hold some
        return {"$objects": [list(value.shape), pack(value.ravel().tolist(), tensors, path)]}
    if isinstance(value, (torch.Tensor, np.ndarray, np.number, np.bool_)):
        while path in tensors:
            path += "'"
        tensor = value if isinstance(value, torch.Tensor) else torch.from_numpy(np.array(value))
        tensors[path] = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        return {"$tensor" if tensor is value else "$array": path}
    if isinstance(value, (bool, int, float, str, types.NoneType)):
        return value
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, Path):
        return {"$path": str(value)}
    if isinstance(value, (Mapping, list, tuple, deque)) and vars_of(value):
        raise TypeError(f"{path} is a {type(value).__name__} with attributes, which cannot be saved")
    if isinstance(value, Mapping):
        items = {key: pack(item, tensors, f"{path}/{key}".lstrip("/")) for key, item in value.items()}
        plain = all(isinstance(key, str) and key[:1] != "$" for key in items)
        return items if plain else {"$dict": [[pack(key, tensors, path), item] for key, item in items.items()]}
    if isinstance(value, (list, tuple, deque)):
        items = [pack(item, tensors, f"{path}/{k}") for k, item in enumerate(value)]
        return {"$tuple": items} if isinstance(value, tuple) else items
    if isinstance(value, NO_STATE):
        return None
    attributes = attributes_of(value)
    if attributes is not None:
        return pack(attributes, tensors, path)
    raise TypeError(
        f"{path} is a {type(value).__name__}, which cannot be saved: give it state_dict and load_state_dict, or, if "
        "nothing of it is needed to go on, a name with a leading underscore"
    )


def vars_of(container: object) -> set[str]:
    """Attributes of a container, but for the one that torch's state_dict has."""
    return getattr(container, "__dict__", {}).keys() - {"_metadata"}


def attributes_of(value: object) -> dict | None:
    """What an object holds, by name, as `copy` finds it; None if that is not all of it."""
    try:
        make, args, attributes, *items = (*value.__reduce_ex__(2), None, None, None)[:5]
    except TypeError:  # files, locks, generators
        return None
    if isinstance(value, (random.Random, np.random.RandomState)):
        return {"state": attributes}
    plain = (make is copyreg.__newobj__ and len(args) == 1) or (make is type(value) and not args)
    own, slots = attributes if isinstance(attributes, tuple) and len(attributes) == 2 else (attributes, {})
    if not plain or any(items) or not all(isinstance(part, (dict, types.NoneType)) for part in (own, slots)):
        return None
    return (own or {}) | (slots or {})


def parts_of(module: torch.nn.Module) -> dict:
    """What the parts of a network hold besides their weights, by name: a hidden state, say."""
    parts = module.named_modules()
    return {name: {key: x for key, x in (vars(m) | m._buffers).items() if key[0] != "_"} for name, m in parts}


def unpack(value: object, tensors: dict) -> object:
    """The inverse of `pack`."""
    if isinstance(value, list):
        return [unpack(item, tensors) for item in value]
    match value:
        case {"$tensor": path}:
            return tensors[path]
        case {"$array": path}:
            return tensors[path].numpy()[()]  # of no dimensions, it is a number
        case {"$objects": [shape, items]}:
            array = np.empty(len(items), dtype=object)
            array[:] = unpack(items, tensors)
            return array.reshape(shape)
        case {"$path": path}:
            return Path(path)
        case {"$tuple": items}:
            return tuple(unpack(items, tensors))
        case {"$dict": items}:
            return {unpack(key, tensors): unpack(item, tensors) for key, item in items}
        case dict():
            return {key: unpack(item, tensors) for key, item in value.items()}
    return value


def data_of(value: object) -> object:
    """A copy of a value as data, which is what it comes back as from a file."""
    tensors = {}
    return unpack(pack(value, tensors, ""), tensors)


def digest(tensors: dict, content: str = "") -> str:
    """SHA-256 of tensors by name, and of a text."""
    sha = hashlib.sha256(content.encode())
    for name, x in sorted(tensors.items()):
        sha.update(f"{name} {x.dtype} {list(x.shape)}".encode())
        sha.update(x.contiguous().reshape(-1).view(torch.uint8).numpy())
    return sha.hexdigest()


def encode(value: object) -> tuple[dict, str, str]:
    """A value's tensors by name, the rest of it as JSON, and the digest of both."""
    tensors = {}
    content = json.dumps(pack(value, tensors, ""))
    return tensors, content, digest(tensors, content)


def fingerprint(value: object) -> str:
    """The same for the same data: whether two things are one, whatever their names are."""
    return encode(value)[2]


def lock(folder: Path) -> None:
    """Have a folder to oneself until this process ends; raises UserError if another one has it."""
    try:
        LOCKS.setdefault(folder.resolve(), FileLock(folder / "writer.lock", timeout=0)).acquire()
    except Timeout as error:
        raise UserError(f"another process is writing into {folder}: wait for it, or choose another folder") from error


def save_checkpoint(checkpoint: dict, path: Path) -> None:
    """Write what `pack` takes; raises TypeError for anything else, and OSError."""
    tensors, content, sha256 = encode(checkpoint)
    data = safetensors.torch.save(tensors, {"content": content, "sha256": sha256})
    write_whole(path, lambda temporary: temporary.write_bytes(data))


def load_checkpoint(path: str | Path) -> dict:
    """What `save_checkpoint` wrote, with at least "script" and "args"; raises UserError for any other file.

    A path that leads nowhere from here is taken from this project's folder, where assets/ lies.
    """
    found = Path(path) if Path(path).exists() else ROOT / path
    if not found.is_file():
        raise UserError(f"no checkpoint at {path}: give the file that a training script wrote under runs/")
    try:
        with safetensors.safe_open(found, "pt") as file:
            header, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if digest(tensors, header["content"]) != header["sha256"]:
            raise ValueError("what it holds has changed since it was written")
        checkpoint = unpack(json.loads(header["content"]), tensors)
        return {"script": checkpoint["script"], "args": checkpoint["args"], **checkpoint}
    except (OSError, safetensors.SafetensorError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is not a checkpoint of this project, or damaged: {error}") from error


# What a checkpoint names: its script, and the environment that it was trained in


def load_module(name: str, defines: str, path: str = "") -> types.ModuleType:
    """Import a file of this project by its name, from beside this file, and only if it defines `defines`.

    A checkpoint does not get to choose more than that of what is imported. `path` is the user's choice of another file,
    which goes by that name from then on. Raises UserError if there is none.
    """
    file = Path(path) if path else ROOT / f"{name}.py"
    if not file.is_file() or not (path or Path(name).name == name):
        raise UserError(f"there is no {file}; its run keeps the source: --script runs/NAME/{file.name}")
    tops = [node for node in ast.parse(file.read_bytes()).body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    if defines not in [node.name for node in tops]:
        raise UserError(f"{file} does not define {defines}")
    if path or name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, file)
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def check_rows(rows: dict, env: type) -> None:
    """Raise UserError, naming the first row that differs, unless an environment's observation has just these rows."""
    rows, expected = (json.loads(json.dumps(some)) for some in (rows, env.OBS_ROWS))  # tuples and lists alike
    for was, now in itertools.zip_longest(rows.items(), expected.items(), fillvalue="nothing"):
        if was != now:
            raise UserError(
                f"the policy was trained on other observations than those of {env.__module__}.py: it saw {was} where "
                f"there is {now} now (row, zeros, scales)"
            )


def describe_env(envs, kwargs: dict, script: str = "") -> dict:
    """What a checkpoint holds of an environment, an instance or its class: where that is, its rows, its arguments."""
    kind = envs if isinstance(envs, type) else type(envs.unwrapped)
    module = script if kind.__module__ == "__main__" else kind.__module__
    return {"module": module, "class": kind.__name__, "rows": kind.OBS_ROWS, "kwargs": kwargs}


def env_of(checkpoint: dict) -> type:
    """The class of the environment that a policy was trained in; raises UserError if it observes something else now."""
    env = checkpoint["env"]
    kind = getattr(load_module(env["module"], env["class"]), env["class"])
    if not hasattr(kind, "OBS_ROWS"):
        raise UserError(f"{env['class']} of {env['module']}.py is no environment")
    check_rows(env["rows"], kind)
    try:
        inspect.signature(kind).bind(1, **env["kwargs"])
    except TypeError as error:
        raise UserError(f"{env['class']} of {env['module']}.py has other arguments than it had: {error}") from error
    return kind


def rebuild(make: Callable[[], torch.nn.Module], weights: dict) -> torch.nn.Module:
    """The network that `make` makes, with a checkpoint's weights; raises UserError if these are another network's.

    The random numbers of a training go on as if this were not.
    """
    with torch.random.fork_rng(devices=[]):
        network = make()
    try:
        network.load_state_dict(weights)
    except (RuntimeError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"the checkpoint's weights do not fit the network of its flags: {reason:.300}") from error
    return network


# The state that --resume goes on from


def restored(value: object, state: object, name: str) -> object:
    """`value` as it was when it was packed: itself, changed in place, or what takes its place if it cannot be."""
    if isinstance(value, NO_STATE) or value is state:  # it was not there yet
        return value
    if isinstance(value, Enum):
        return type(value)[state]
    if isinstance(value, torch.nn.Module):
        value.load_state_dict(state["state"])
        for part, attributes in state["parts"].items():
            for key, item in attributes.items():
                module = value.get_submodule(part)
                setattr(module, key, restored(getattr(module, key), item, f"{name}.{part}.{key}"))
    elif hasattr(type(value), "load_state_dict"):
        value.load_state_dict(state)
    elif isinstance(value, np.random.Generator):
        value.bit_generator.state = state
    elif isinstance(value, torch.Generator):
        value.set_state(state)
    elif isinstance(value, (np.ndarray, torch.Tensor)):
        if value.shape != np.shape(state):
            raise ValueError(f"{name} was of shape {list(np.shape(state))}, and is of {list(value.shape)}")
        if isinstance(value, torch.Tensor) and 0 in value.stride():  # expanded: its numbers share their memory
            return state
        with torch.no_grad():
            value[...] = state
    elif isinstance(value, dict):
        new = {key: value[key] if key in value or isinstance(value, defaultdict) else state[key] for key in state}
        value.clear()
        value.update({key: restored(item, state[key], f"{name}[{key!r}]") for key, item in new.items()})
    elif isinstance(value, (list, tuple, deque)):
        old = [*value, *state[len(value) :]]
        items = [restored(old[k], item, f"{name}[{k}]") for k, item in enumerate(state)]
        if isinstance(value, tuple):
            return tuple(items)
        value.clear()
        value.extend(items)
    elif isinstance(value, (np.generic, bool, int, float, str, types.NoneType, Path)):
        return state
    elif isinstance(value, (random.Random, np.random.RandomState)):
        value.__setstate__(state["state"])
    else:
        for key, item in state.items():
            object.__setattr__(value, key, restored(getattr(value, key, item), item, f"{name}.{key}"))
    return value


def random_states(states: dict | None = None) -> dict:
    """The states of the generators that belong to nobody; `states` are set first."""
    if states:
        torch.set_rng_state(states["torch"])
        np.random.set_state(states["numpy"])
        random.setstate(states["python"])
    return {"torch": torch.get_rng_state(), "numpy": np.random.get_state(), "python": random.getstate()}


def load_state(run_dir: Path) -> dict:
    """The last whole state of a run, which may be the previous one, with a line on stderr; raises UserError."""
    try:
        return load_checkpoint(run_dir / STATE)
    except UserError as error:
        if not (run_dir / PREVIOUS).exists():
            raise
        print(f"warning: {error}; going on from {PREVIOUS}", file=sys.stderr)
        return load_checkpoint(run_dir / PREVIOUS)


def new_run_dir(exp_name: str, seed: int) -> Path:
    """Make the folder of a new run, runs/NAME; another that starts in the same second gets another name."""
    name = f"{exp_name}__{seed}__{time.strftime('%Y%m%d-%H%M%S')}"
    for suffix in itertools.chain([""], (f"-{k}" for k in itertools.count(2))):
        folder = Path("runs", name + suffix)
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            if not folder.is_dir():
                raise


class Run:
    """A training's folder, runs/NAME, with flags, source, curves and checkpoints, and the state that it goes on from.

    `total` is the length of the progress bar. Of several processes `rank` is this one's number, and `gather(x)` gives
    the list of all their x: the first one writes, and the state holds the variables of each.
    """

    def __init__(self, args: RunArgs, script: str, total: int, rank: int = 0, gather: Callable = lambda x: [x]):
        self.source, self.script, self.rank, self.gather = Path(script), Path(script).stem, rank, gather
        self.flags = replace(args, resume="", exp_name=args.exp_name or self.script)
        self.evaluations, self.signal, self.next_save = [], 0, 0
        self.dir, self.state = Path(args.resume), load_state(Path(args.resume)) if args.resume else None
        self.bar = tqdm(total=total, unit="step", unit_scale=True, disable=rank > 0 or None)  # None: unless a terminal

    def begin(self, namespace: dict) -> None:
        """Make the run's folder, or with --resume make the script's variables, its `globals()`, what they were.

        Names with a leading underscore are left alone. Raises UserError for a variable that could not be saved.
        """
        if "__name__" not in namespace:
            raise TypeError("begin takes globals(): the variables of a function cannot be brought back")
        others, self.namespace = (*NO_STATE, Flags, Run), namespace
        self.names = [name for name, value in namespace.items() if name[0] != "_" and not isinstance(value, others)]
        try:
            pack({name: namespace[name] for name in self.names}, {}, "")
        except (TypeError, RecursionError) as error:
            raise UserError(f"--resume could not go on from here: {error}") from error
        if self.flags.track:
            try:
                from wandb import Error as TrackingError
                from wandb import init as start_tracking
            except ImportError as error:  # also where a run left a folder of that name
                raise UserError("--track needs Weights & Biases: pip install wandb") from error
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.note_signal)
        self.start_time = time.perf_counter()
        if self.state:
            self.restore()
        elif self.rank == 0:
            self.make_dir()
        if self.rank == 0 and self.flags.track:
            names = {"id": re.sub(r"[^\w.-]", "_", self.dir.name), "name": self.dir.name, "resume": "allow"}
            project, config = self.flags.wandb_project, asdict(self.flags)
            try:
                start_tracking(project=project, config=config, sync_tensorboard=True, **names)
            except TrackingError as error:  # no login
                if not self.state:
                    shutil.rmtree(self.dir)
                raise UserError(f"--track: {error}") from error
        if self.rank == 0:
            self.writer = SummaryWriter(self.dir, purge_step=self.state["global_step"] + 1 if self.state else 0)
        if self.rank == 0 and not self.state:
            rows = [f"|{name}|{value}|" for name, value in asdict(self.flags).items()]
            self.writer.add_text("args", "\n".join(["|flag|value|", "|-|-|", *rows]))

    def make_dir(self) -> None:
        """Make the folder of a new run, with its flags and source."""
        self.dir = new_run_dir(self.flags.exp_name, self.flags.seed)
        write_json(self.dir / "args.json", asdict(self.flags))
        shutil.copyfile(self.source, self.dir / self.source.name)

    def restore(self) -> None:
        """Make the variables what they were when the state was saved; raises UserError if this script cannot go on."""
        if self.state["script"] != self.script:
            raise UserError(f"--resume {self.dir}: this run is of {self.state['script']}.py, not of {self.script}.py")
        if (self.dir / "results.json").exists():
            raise UserError(f"--resume {self.dir}: this run has come to its end")
        if self.rank == 0:
            lock(self.dir)
        if (self.dir / self.source.name).read_bytes() != self.source.read_bytes():
            print(f"warning: {self.source.name} has changed since the run began", file=sys.stderr)
        try:
            processes = self.state["processes"]
            if len(processes) != len(self.gather(0)):
                raise ValueError(f"it takes {len(processes)} processes, as before")
            if changed := sorted(processes[self.rank].keys() ^ self.names):
                raise ValueError(f"the script has other variables now: {', '.join(changed)}")
            for name, state in processes[self.rank].items():
                self.namespace[name] = restored(self.namespace[name], state, name)
            random_states(self.state["random"])
            self.evaluations, self.next_save = self.state["evaluations"], self.state["global_step"] + 1
            self.start_time -= self.state["seconds"]
            self.bar.update(self.state["global_step"])
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise UserError(f"--resume {self.dir}: its state does not fit: {error}") from error

    def log(self, global_step: int, scalars: dict, show: str = "") -> None:
        """Write scalars to TensorBoard, and advance the bar if it is to `show` one of them, beside the evaluation's."""
        if self.rank:
            return
        for key, scalar in scalars.items():
            self.writer.add_scalar(key, scalar, global_step)
        if show:
            self.bar.update(global_step - self.bar.n)
            shown = {show.rpartition("/")[2]: scalars.get(show, 0.0)}
            if self.evaluations:
                shown["eval"] = self.evaluations[-1]["success_rate"]
            self.bar.set_postfix({name: f"{value:.2f}" for name, value in shown.items()})

    def seconds(self) -> float:
        """How long it has been training, without the evaluations, s."""
        return time.perf_counter() - self.start_time - sum(row["eval_seconds"] for row in self.evaluations)

    def checkpoint(self, envs, env_kwargs: dict, global_step: int, **parts) -> dict:
        """What a policy is rebuilt from: `parts`, and what they belong to; `env_kwargs` are of the task it is for."""
        env = describe_env(envs, env_kwargs, self.script)
        return {"script": self.script, "args": asdict(self.flags), "env": env, "global_step": global_step, **parts}

    def save(self, global_step: int, now: bool = False) -> None:
        """Save the variables every --save-freq steps, or `now`; where the run is asked to stop, it ends here."""
        stopping = max(self.gather(self.signal))
        if global_step < self.next_save and not stopping and not now:
            return
        self.next_save = (global_step // self.flags.save_freq + 1) * self.flags.save_freq
        variables = data_of({name: self.namespace[name] for name in self.names})
        state = {"script": self.script, "args": asdict(self.flags), "global_step": global_step}
        state |= {"processes": self.gather(variables), "random": random_states()}
        state |= {"evaluations": self.evaluations, "seconds": time.perf_counter() - self.start_time}
        if self.rank == 0:
            self.writer.flush()
            new, current = self.dir / "state_new.safetensors", self.dir / STATE
            save_checkpoint(state, new)
            try:
                load_checkpoint(current)
                current.replace(self.dir / PREVIOUS)
            except UserError:
                pass  # not there yet, or damaged: the previous one is better
            new.replace(current)
        if stopping:
            self.gather(0)  # all wait for the first process
            self.stop(stopping)

    def stop(self, number: int, frame=None) -> None:
        """End the process by a signal, after the state was saved."""
        self.bar.close()
        if self.rank == 0:
            self.writer.close()
            command = shlex.join(["python", sys.argv[0], "--resume", str(self.dir)])
            command = command if self.source.resolve().parent == ROOT else f"PYTHONPATH=. {command}"
            print(f"stopped; go on with: {command}", file=sys.stderr)
        raise SystemExit(128 + number)

    def note_signal(self, number: int, frame) -> None:
        """Lets the script save before it ends; a second signal ends it at once."""
        self.signal = number
        signal.signal(number, signal.SIG_DFL)

    def end(self, global_step: int) -> None:
        """The training is over: save it, so that whatever comes now may be stopped at once."""
        self.save(global_step, now=True)
        self.bar.close()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.stop)


class Episodes:
    """The training's episodes in its curves: means over the last 100, and of what is summed, means per step.

    `rollout/` is of the episodes, with the rewards that the agent gets; `task/` is what the environment's info says at
    their ends; `reward/` are the terms of its reward, weighted. Each environment's first episode, which the scripts cut
    short on purpose, is left out.
    """

    def __init__(self, num_envs: int):
        self.returns, self.lengths, self.first = np.zeros(num_envs), np.zeros(num_envs), np.ones(num_envs, dtype=bool)
        self.last = defaultdict(partial(deque, maxlen=100))
        self.sums, self.steps, self.physics_resets = defaultdict(float), 0, 0

    def sum(self, group: str, **values) -> None:
        """Values of a step of every environment, arrays (num_envs,), to be shown as means per step, as GROUP/NAME."""
        for name, x in values.items():
            self.sums[f"{group}/{name}"] += float(x.sum())

    def add(self, rewards, terminations, truncations, infos) -> None:
        """A step of every environment: arrays (num_envs,), and infos."""
        done, final_info = terminations | truncations, infos.get("final_info", {})
        self.returns += rewards
        self.lengths += 1
        self.steps += len(rewards)
        for key, values in itertools.chain(infos.items(), final_info.items()):
            if key.startswith("reward/"):
                self.sums[key] += float(values.sum())
        if done.any():
            ends = {"rollout/ep_rew_mean": self.returns, "rollout/ep_len_mean": self.lengths}
            ends |= {"rollout/success_rate": terminations}
            ends |= {f"task/{key}": final_info[key] for key in ("dist_to_goal", "orientation_error")}
            for key, values in ends.items():
                self.last[key].extend(values[done & ~self.first].tolist())
            self.physics_resets += int(final_info["physics_reset"].sum())
            self.returns[done] = self.lengths[done] = self.first[done] = 0

    def scalars(self) -> dict[str, float]:
        """The values of the curves; the sums begin anew."""
        scalars = {key: np.mean(last) for key, last in self.last.items() if last}
        scalars |= {key: total / self.steps for key, total in self.sums.items()}
        self.sums.clear()
        self.steps = 0
        return {**scalars, "task/physics_resets": self.physics_resets}
