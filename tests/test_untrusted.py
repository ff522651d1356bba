"""Files from strangers: nothing in them is executed, no memory taken for more than they hold, and they end in one line.

    python -m pytest -m campaign tests/test_untrusted.py -s    # every bit, every leaf: an hour on one core

What a file is refused with is a ValueError of one line, which the scripts print (tests/test_scripts.py, test_flags.py).
"""

import io
import itertools
import json
import os
import pickle
import runpy
import shutil
import signal
import struct
import subprocess
import sys
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import act
import diffusion_policy
import eval as evaluation
import lerobot_dataset
import lerobot_policy
import ppo
import ppo_residual
import sac_residual
from checkpoints import read_checkpoint, save_checkpoint
from env_paper_square import OBS_DIM, PaperSquareVectorEnv
from flags import fail
from lerobot_dataset import Dataset, load_demos, make_features

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = {
    "ppo": (ppo, {"hidden_size": 4}),
    "ppo_residual": (ppo_residual, {"hidden_size": 4}),
    "sac_residual": (sac_residual, {"hidden_size": 4}),
    "act": (
        act,
        {"dim_model": 8, "n_heads": 2, "dim_feedforward": 8, "latent_dim": 2, "chunk_size": 4, "n_action_steps": 2},
    ),
    "diffusion_policy": (diffusion_policy, {"channels": 8, "embedding_size": 4, "chunk_size": 4, "n_action_steps": 2}),
}
WRONG = [  # what a leaf may become
    *(None, True, False, -1, 0, 1, 3, 10**9, 2**63, -(10**30), 10**50, 0.5, -1.0, 1e300, float("nan"), float("inf")),
    *("", "x", "../../x", "a\nb\x1b[2J", "x" * 100_000, "sample", "il", "hybrid", "cuda"),
    *([], {}, (), [1], ["x"], [[1.0], [1.0, 2.0]], {"x": 1}, {1: {"x": [1]}}, ("il", "il")),
    *(
        torch.zeros(0),
        torch.zeros(()),
        torch.zeros(3),
        torch.full((4, 4), float("nan")),
        torch.ones(2, dtype=torch.int64),
    ),
    torch.zeros(1).expand(10**6, 10**6),
]
OBSERVATIONS = np.zeros((2, OBS_DIM), dtype=np.float32)


def one_line(error):
    assert len(str(error).splitlines()) == 1 and len(str(error)) < 1000, str(error)[:2000]
    return False


def honest(script, **flags):
    """A small checkpoint of a script."""
    module, small = SCRIPTS[script]
    args = module.Args(**small, **flags)
    if script in ("act", "diffusion_policy"):
        return module.make_checkpoint(args, module.Network(args), 7)
    x_dim = OBS_DIM + 6 * getattr(args, "base_input", False)
    network = module.Actor if script == "sac_residual" else module.Agent
    return module.make_checkpoint(args, network(x_dim, 6, args.hidden_size, args.init_std), 7)


def plays(path):
    """Whether a checkpoint is taken and plays; it must be refused by a ValueError of one line if not."""
    try:
        (policy,), env_kwargs = (
            list(x.values()) for x in evaluation.load_policies(evaluation.Args(model_path=(str(path),)))
        )
        PaperSquareVectorEnv(1, **env_kwargs[0]).close()
        assert policy(OBSERVATIONS).shape == (2, 6)
        return True
    except ValueError as error:
        return one_line(error)


def leaves(content, path=()):
    """The paths of all containers and leaves in a content."""
    yield path
    items = (
        content.items()
        if isinstance(content, dict)
        else enumerate(content)
        if isinstance(content, (list, tuple))
        else ()
    )
    for key, item in items:
        yield from leaves(item, (*path, key))


def changed(content, path, change):
    """The content with `change` made to what is at the path: ("is", value), ("lacks",) or ("more",)."""
    if not path:
        return change[1] if change[0] == "is" else {}
    key, *rest = path
    if isinstance(content, (list, tuple)):
        items = list(content)
        if rest or change[0] == "is":
            items[key] = changed(items[key], rest, change)
        else:
            items[key : key + 1] = [] if change[0] == "lacks" else [items[key]] * 2
        return type(content)(items)
    if rest or change[0] == "is":
        return {**content, key: changed(content.get(key), rest, change)}
    if change[0] == "lacks":
        return {name: item for name, item in content.items() if name != key}
    return {**content, f"{key}x": content[key]}


CHANGES = [("lacks",), ("more",), *(("is", value) for value in WRONG)]


def zipped(pickled, path, records=(), **options):
    """A file as torch.save writes it, with another pickle and other records."""
    with zipfile.ZipFile(path, "w", **options) as file:
        for name, content in {"data.pkl": pickled, "version": b"3\n", "byteorder": b"little", **dict(records)}.items():
            file.writestr(f"archive/{name}", content)
    return path


def tensor(sizes, strides, bytes_claimed, kind=b"torch FloatStorage", function=b"torch._utils _rebuild_tensor_v2"):
    """A pickle, by hand, of a tensor of any size and strides over the storage data/0."""

    def number(k):
        return b"\x8a\x09" + k.to_bytes(9, "little", signed=True)

    def numbers(values):
        return b"(" + b"".join(map(number, values)) + b"t"

    def text(value):
        return b"X" + struct.pack("<I", len(value)) + value

    def name(value):
        return b"c" + value.replace(b" ", b"\n") + b"\n"

    storage = b"(" + text(b"storage") + name(kind) + text(b"0") + text(b"cpu") + number(bytes_claimed) + b"tQ"
    rest = number(0) + numbers(sizes) + numbers(strides) + b"\x89" + name(b"collections OrderedDict") + b")R"
    return b"\x80\x02}" + text(b"a") + name(function) + b"(" + storage + rest + b"tRs."


class Hostile:
    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def bombs(folder):
    """Hostile files by name: code, and few bytes that ask for much memory."""
    deep, own, laughs = [], [], [0]
    for _ in range(100_000):
        deep = [deep]
    own.append(own)
    for _ in range(3):
        laughs = [laughs] * 100
    four = {"data/0": bytes(16)}
    files = {}
    for name, function, args in (
        ("system", os.system, ("touch executed",)),
        ("exec", exec, ("open('executed', 'w')",)),
        ("popen", subprocess.Popen, (["touch", "executed"],)),
        ("bytearray", bytearray, (2**36,)),
    ):
        files[f"pickle_{name}"] = folder / f"{name}.pkl"
        files[f"pickle_{name}"].write_bytes(pickle.dumps({"model": Hostile(function, *args)}, 2))
        files[name] = zipped(pickle.dumps({"model": Hostile(function, *args)}, 2), folder / f"{name}.pt")
    files["legacy"] = folder / "legacy.pt"
    torch.save({"model": Hostile(os.system, "touch executed")}, files["legacy"], _use_new_zipfile_serialization=False)
    pickles = {
        "storage": (tensor([4], [1], 10**12), four),
        "storage_negative": (tensor([4], [1], -4), four),
        "storage_short": (tensor([4], [1], 8), four),
        "sizes": (tensor([10**6, 10**6], [10**6, 1], 4), four),
        "strides": (tensor([10**6, 10**6], [0, 0], 4), four),
        "strides_negative": (tensor([4], [-1], 4), four),
        "sizes_negative": (tensor([-4], [1], 4), four),
        "half": (tensor([4], [1], 4, b"torch HalfStorage"), {"data/0": bytes(8)}),
        "parameter": (tensor([4], [1], 4, function=b"torch._utils _rebuild_parameter"), four),
        "quantised": (tensor([10**6, 10**6], [0, 0], 4, function=b"torch._utils _rebuild_qtensor"), four),
        "untyped": (
            b"\x80\x02}X\x01\0\0\0actorch\nUntypedStorage\n\x8a\x06" + (2**36).to_bytes(6, "little") + b"\x85Rs.",
            {},
        ),
        "typed": (
            b"\x80\x02}X\x01\0\0\0actorch\nFloatStorage\n\x8a\x06" + (2**36).to_bytes(6, "little") + b"\x85Rs.",
            {},
        ),
        "memo": (b"\x80\x02}r\xff\xff\xff\xff.", {}),
        "text": (b"\x80\x02X\xff\xff\xff\x7fabc.", {}),
        "long": (b"\x80\x02\x8b\xff\xff\xff\x7fabc.", {}),
        "deep": (b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".", {}),
        "own": (pickle.dumps(own, 2), {}),
        "laughs": (pickle.dumps({"a": laughs}, 2), {}),
        "number": (pickle.dumps({"a": 2**1000}, 2), {}),
    }
    for name, (pickled, records) in pickles.items():
        files[name] = zipped(pickled, folder / f"{name}.pt", records)
    for name, value in (
        ("sparse", torch.eye(3).to_sparse()),
        ("meta", torch.empty(10**6, 10**6, device="meta")),
        ("nested", torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)])),
        ("complex", torch.zeros(3, dtype=torch.complex64)),
        ("gradient", torch.zeros(3, requires_grad=True)),
        ("expanded", torch.zeros(1).expand(10**6, 10**6)),
        ("counter", Counter("abc")),
        ("set", {1}),
        ("bytes", b"abc"),
        ("type", torch.float32),
    ):
        files[name] = folder / f"{name}.pt"
        torch.save({"model": value}, files[name])
    four = {"data/0": bytes(2**28)}
    files["compressed"] = zipped(tensor([4], [1], 2**26), folder / "z.pt", four, compression=zipfile.ZIP_DEFLATED)
    twice = folder / "twice.pt"
    files["twice"] = zipped(pickle.dumps({}, 2), twice)
    with pytest.warns(UserWarning), zipfile.ZipFile(twice, "a") as file:
        file.writestr("archive/data.pkl", pickle.dumps({}, 2))
    checkpoint = honest("act")
    for name, flags in {
        "wide": {
            "dim_model": 1024,
            "dim_feedforward": 4096,
            "n_encoder_layers": 12,
            "n_vae_layers": 12,
            "batch_size": 1,
        },
        "wider": {"dim_model": 10**9},
    }.items():
        files[name] = folder / f"{name}.pt"
        torch.save({**checkpoint, "args": checkpoint["args"] | flags}, files[name])
    return files


WATCHED = """
import encodings.cp437, os, resource, sys  # the first: of ZIP's names
from pathlib import Path
import act, diffusion_policy, ppo, ppo_residual, sac_residual, eval as evaluation, torch
evaluation.load_policies(evaluation.Args(model_path=(sys.argv[1],)))[0].popitem()[1](torch.zeros(1, 32).numpy())
if os.path.exists("/proc/self/statm"):
    taken = int(open("/proc/self/statm").read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (taken + 2**28, resource.RLIM_INFINITY))
events = []
EVENTS = ("exec", "compile", "import", "marshal.", "ctypes.", "os.", "subprocess.", "socket.", "shutil.", "urllib.")
def watch(event, args):
    writes = event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+")
    if writes or event.startswith(EVENTS) and event not in ("os.listdir", "os.scandir"):
        events.append(f"{event} {args}"[:200])
sys.addaudithook(watch)
for path in sys.argv[2:]:
    del events[:]
    try:
        evaluation.load_policies(evaluation.Args(model_path=(path,)))
        print("taken", path)
    except ValueError as error:
        print("refused", path, len(str(error).splitlines()), *events, str(error).replace("\\n", "|"))
    except BaseException as error:
        print("raised", path, repr(error))
"""


def test_hostile_files_are_refused_and_nothing_is_executed_or_allocated(tmp_path):
    """By an audit hook and an address space of 256 MB more than an honest checkpoint takes, in a process of its own."""
    files = bombs(tmp_path)
    first = [ROOT / "assets" / "act.pt"]
    command = [sys.executable, "-W", "error::UserWarning", "-c", WATCHED, *map(str, [*first, *files.values()])]
    run = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    lines = run.stdout.splitlines()
    assert run.returncode == 0 and not run.stderr, run.stderr[-3000:]
    assert len(lines) == len(files)
    for (name, path), line in zip(files.items(), lines, strict=True):
        assert line.startswith(f"refused {path} 1 {path}" if name not in ("wide",) else f"refused {path} 1 "), (
            name,
            line,
        )
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("system", "it names 'posix system'"),
        ("bytearray", "it names '__builtin__ bytearray'"),
        ("storage", "does not match expected size"),
        ("strides", "unfolds to more"),
        ("expanded", "unfolds to more"),
        ("laughs", "unfolds to more"),
        ("deep", "unfolds to more"),
        ("own", "unfolds to more"),
        ("number", "too large a number"),
        ("compressed", "it is compressed"),
        ("twice", "its records overlap"),
        ("gradient", "that this project does not write"),
        ("set", "it names"),
        ("type", "it names"),
        ("wide", "do not fit the network"),
    ],
)
def test_what_a_hostile_file_is_refused_for(name, reason, hostile):
    with pytest.raises(ValueError, match=reason):
        evaluation.load_policies(evaluation.Args(model_path=(str(hostile[name]),)))


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    return bombs(tmp_path_factory.mktemp("hostile"))


@pytest.mark.parametrize(
    ("name", "where", "value", "reason"),
    [
        ("ppo", ("env_kwargs", "act_scale"), 1e300, "--act-scale must be"),
        ("ppo", ("env_kwargs", "width"), 10**6, "env_kwargs are"),
        ("ppo", ("model", "critic.1.bias"), torch.full((4,), float("nan")), "is not finite"),
        ("ppo", ("model", "critic.1.bias"), torch.zeros(5), "do not fit the network"),
        ("ppo", ("model", "critic.1.bias"), torch.zeros(4, dtype=torch.float64), "do not fit the network"),
        ("ppo", ("args", "hidden_size"), 10**9, "--hidden-size must be"),
        ("ppo", ("global_step",), -1, "global_step"),
        ("ppo", ("script",), "os", "unknown script"),
        ("ppo", ("base",), {"script": "act"}, "no use for"),
        (
            "ppo_residual",
            ("args", "base_policy"),
            "il",
            "lacks its base",
        ),  # args name a file, which is not its to choose
        ("ppo_residual", ("args", "base_policy"), "x", "--base-policy must be"),
        ("il", ("base",), None, "lacks its base"),
        ("il", ("base", "script"), "os", "its base comes from none of"),
        ("il", ("base", "args", "dim_model"), 10**9, "--dim-model must be"),
        ("il", ("base", "model", "vae_cls"), torch.full((1, 1, 8), float("inf")), "is not finite"),
    ],
)
def test_what_a_wrong_checkpoint_is_refused_for(name, where, value, reason, checkpoints, tmp_path):
    torch.save(changed(read_checkpoint(checkpoints[name]), where, ("is", value)), tmp_path / "wrong.pt")
    with pytest.raises(ValueError, match=reason) as error:
        evaluation.load_policies(evaluation.Args(model_path=(str(tmp_path / "wrong.pt"),)))
    one_line(error.value)


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_training_that_diverged_is_still_evaluated(name, checkpoints):
    checkpoint = read_checkpoint(checkpoints[name])
    for x in checkpoint["model"].values():
        x.fill_(float("nan"))
    assert np.isnan(SCRIPTS[name][0].make_policy(checkpoint)(OBSERVATIONS)).any()


def test_a_file_is_not_read_in_two_ways(checkpoints, tmp_path):
    """Two archives in one file: the ZIP64 locator's offset leads to the first, which torch.load alone goes by."""
    first, second = io.BytesIO(), checkpoints["ppo"].read_bytes()
    torch.save({"hidden": 1}, first)
    first, path = first.getvalue(), tmp_path / "two.pt"
    locator = second[-42:-34] + (len(first) - 98).to_bytes(8, "little") + second[-26:-22]
    assert locator[:4] == b"PK\6\7"
    path.write_bytes(first + second[:-42] + locator + second[-22:])
    assert torch.load(path).keys() == {"hidden"}
    damaged(path.read_bytes(), read_checkpoint(checkpoints["ppo"]), path)


def test_errors_do_not_command_the_terminal(capfd):
    with pytest.raises(SystemExit):
        fail("two\nlines and \x1b[2J")
    assert capfd.readouterr().err == "error: two\\nlines and \\x1b[2J\n"


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A small honest checkpoint of each script, and a residual one on an imitation-learned base: path by name."""
    folder = tmp_path_factory.mktemp("honest")
    for script in SCRIPTS:
        save_checkpoint(honest(script), folder / f"{script}.pt")
    il = honest("ppo_residual", base_policy="il", il_checkpoint=str(folder / "act.pt"))
    save_checkpoint(il, folder / "il.pt")
    return {path.stem: path for path in sorted(folder.iterdir())}


def same(one, other):
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return type(one) is type(other) and one == other


def damaged(content, original, path):
    """Whether a damaged file is refused; if not, it must hold what the original does."""
    path.write_bytes(content)
    try:
        assert same(read_checkpoint(path), original)
    except ValueError as error:
        return not one_line(error)
    return False


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_checkpoint_is_refused_or_the_same(checkpoints, tmp_path, data):
    honest = checkpoints["ppo"].read_bytes()
    original, path = read_checkpoint(checkpoints["ppo"]), tmp_path / "damaged.pt"
    bit, end = data.draw(st.integers(0, 8 * len(honest) - 1)), data.draw(st.integers(0, len(honest) - 1))
    flipped = bytearray(honest)
    flipped[bit // 8] ^= 1 << bit % 8
    damaged(flipped, original, path)
    assert damaged(honest[:end], original, path)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_a_flipped_bit_of_a_weight_is_always_seen(checkpoints, tmp_path_factory, data):
    honest, path = checkpoints["ppo"].read_bytes(), checkpoints["ppo"].with_name("flipped.pt.tmp")
    weight = read_checkpoint(checkpoints["ppo"])["model"]["critic.1.weight"].numpy().tobytes()
    byte, bit = data.draw(st.integers(0, len(weight) - 1)), data.draw(st.integers(0, 7))
    flipped = bytearray(honest)
    flipped[honest.index(weight) + byte] ^= 1 << bit
    assert damaged(flipped, None, path)


@pytest.mark.campaign
def test_every_bit_and_every_length_of_a_checkpoint(checkpoints, tmp_path):
    honest, counts = checkpoints["ppo"].read_bytes(), Counter()
    original, path = read_checkpoint(checkpoints["ppo"]), tmp_path / "damaged.pt"
    for bit in range(8 * len(honest)):
        flipped = bytearray(honest)
        flipped[bit // 8] ^= 1 << bit % 8
        counts["flips refused" if damaged(flipped, original, path) else "flips without effect"] += 1
    for end in range(len(honest)):
        assert damaged(honest[:end], original, path)
        counts["lengths refused"] += 1
    print(f"{len(honest)} bytes:", dict(counts))


def mutants(content):
    """All mutants of a content, each with its path: every leaf and container gone, doubled, or any of `WRONG`."""
    yield from itertools.product(list(leaves(content))[1:], CHANGES)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_wrong_checkpoint_is_refused_in_one_line_or_plays(checkpoints, tmp_path, data):
    original = read_checkpoint(checkpoints[data.draw(st.sampled_from(sorted(checkpoints)))])
    where = data.draw(st.sampled_from(list(leaves(original))[1:]))
    torch.save(changed(original, where, data.draw(st.sampled_from(CHANGES))), tmp_path / "wrong.pt")
    plays(tmp_path / "wrong.pt")


@pytest.mark.parametrize("name", ["ppo", "ppo_residual", "sac_residual", "act", "diffusion_policy", "il"])
def test_an_honest_checkpoint_plays(name, checkpoints):
    assert plays(checkpoints[name])


@pytest.mark.campaign
@pytest.mark.parametrize("name", ["ppo", "ppo_residual", "sac_residual", "act", "diffusion_policy", "il"])
def test_every_leaf_of_a_checkpoint(name, checkpoints, tmp_path):
    counts, failures = Counter(), []
    original, path = read_checkpoint(checkpoints[name]), tmp_path / "wrong.pt"
    for where, change in mutants(original):
        torch.save(changed(original, where, change), path)
        try:
            counts["taken" if plays(path) else "refused"] += 1
        except Exception as error:
            failures.append((where, str(change)[:80], repr(error)[:200]))
    print(name, dict(counts), f"{len(failures)} failures")
    assert not failures, failures[:20]


# A folder to --resume

TINY = "--num-threads 1 --eval-episodes 1 --test-episodes 1"
RL = f"{TINY} --num-envs 2 --total-timesteps 16 --save-freq 1 --hidden-size 4"
PPO = f"{RL} --num-steps 4 --minibatch-size 8 --update-epochs 1"
IL = f"{TINY} --train-steps 3 --save-freq 2 --batch-size 4 --chunk-size 4 --n-action-steps 2 --dataset demos"
RUNS = {
    "ppo": PPO,
    "ppo_residual": PPO,
    "sac_residual": f"{RL} --learning-starts 4 --batch-size 4 --buffer-size 20",
    "act": f"{IL} --dim-model 8 --n-heads 2 --dim-feedforward 8",
    "diffusion_policy": f"{IL} --channels 8 --embedding-size 4",
}


def write_demos(folder, num_episodes=2):
    rng, dataset = np.random.default_rng(0), Dataset(folder, make_features(), flush_every=1)
    for seed in range(num_episodes):
        sizes = {"observation.state": 6, "observation.environment_state": 14, "action": 6}
        frames = {key: rng.normal(size=(10, size)).astype(np.float32) for key, size in sizes.items()}
        flags = {key: np.zeros(10, dtype=bool) for key in ("next.done", "next.success")}
        dataset.add({**frames, **flags, "next.reward": np.zeros(10, dtype=np.float32), "seed": seed})
    return folder


def run(script, flags, monkeypatch, folder):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *flags.split()])
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        return runpy.run_path(str(ROOT / f"{script}.py"), run_name="__main__")
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """Of each script's training that was stopped: its working folder, its run's folder, and the state in there."""
    made = {}

    def get(script, monkeypatch):
        if script not in made:
            folder = tmp_path_factory.mktemp(script)
            write_demos(folder / "demos")
            run_dir = run(script, RUNS[script], monkeypatch, folder)["run_dir"]
            (folder / run_dir / "results.json").unlink()
            made[script] = folder, folder / run_dir, read_checkpoint(folder / run_dir / "state.pt")
        return made[script]

    return get


def resumes(script, state, stopped, monkeypatch, capfd):
    """Whether --resume takes a state; it ends in one line and code 2 if not."""
    folder, run_dir, _ = stopped
    for name in ("results.json", "state_previous.pt"):
        (run_dir / name).unlink(missing_ok=True)
    torch.save(state, run_dir / "state.pt")
    capfd.readouterr()
    try:
        run(script, f"--resume {run_dir}", monkeypatch, folder)
        return True
    except SystemExit as end:
        error = capfd.readouterr().err
        last = error.splitlines()[-1]
        assert end.code == 2 and last.startswith("error: ") and error.count("error") == 1, error[-1000:]
        assert not set(error) & {"\x1b"}
        return False
    finally:
        (run_dir / "results.json").unlink(missing_ok=True)


@pytest.fixture
def quick(monkeypatch):
    """Evaluations that take no time."""
    memory, play_episodes = [], evaluation.play_episodes

    def play(policy, seeds, env_kwargs, *args, **kwargs):
        memory[:] = memory or [play_episodes(evaluation.RandomPolicy(), [0], {"max_episode_steps": 5})]
        return memory[0]

    monkeypatch.setattr(evaluation, "play_episodes", play)


@pytest.mark.parametrize("script", RUNS)
def test_an_honest_state_is_gone_on_from_and_a_wrong_one_refused(script, stopped, quick, monkeypatch, capfd):
    folder, run_dir, state = stopped(script, monkeypatch)
    assert resumes(script, state, (folder, run_dir, state), monkeypatch, capfd)
    name = next(name for name in ("agent", "q_optimizer", "optimizer") if name in state)
    optimizer = "q_optimizer" if script == "sac_residual" else "optimizer"
    wrong = [
        changed(state, (optimizer, "state", 0, "exp_avg"), ("is", torch.zeros(3))),
        changed(state, (optimizer, "param_groups", 0, "betas"), ("is", (float("nan"), "x"))),
        changed(state, (optimizer, "param_groups", 0, "eps"), ("is", -1.0)),
        changed(state, ("evaluations",), ("is", [])),
        changed(state, ("global_step",), ("is", "x\n\x1b[2J")),
        changed(state, ("args", "seed"), ("is", -1)),
        changed(state, (name,), ("lacks",)),
    ]
    for other in wrong:
        assert not resumes(script, other, (folder, run_dir, state), monkeypatch, capfd)


def test_a_run_folder_with_a_link_is_refused(stopped, quick, monkeypatch, capfd):
    folder, run_dir, state = stopped("ppo", monkeypatch)
    (folder / "precious").write_text("mine")
    (run_dir / "state_new.pt.tmp").symlink_to(folder / "precious")
    try:
        assert not resumes("ppo", state, (folder, run_dir, state), monkeypatch, capfd)
        assert (folder / "precious").read_text() == "mine"
    finally:
        (run_dir / "state_new.pt.tmp").unlink()


@pytest.mark.campaign
@pytest.mark.parametrize("script", RUNS)
def test_many_leaves_of_a_state(script, stopped, quick, monkeypatch, capfd):
    folder, run_dir, state = stopped(script, monkeypatch)
    every = list(mutants(state))
    counts, failures = Counter(), []
    for k in np.random.default_rng(0).permutation(len(every))[: int(os.environ.get("MUTANTS", 400))]:
        where, change = every[k]
        try:
            taken = resumes(script, changed(state, where, change), (folder, run_dir, state), monkeypatch, capfd)
            counts["taken" if taken else "refused"] += 1
        except BaseException as error:
            failures.append((where, str(change)[:80], repr(error)[:300]))
    with capfd.disabled():
        print(script, dict(counts), f"of {len(every)}, {len(failures)} failures")
    assert not failures, "\n".join(map(str, failures[:30]))


# Datasets and LeRobot folders


@pytest.fixture
def demos(tmp_path):
    return write_demos(tmp_path / "demos")


def reads(folder):
    """Whether a dataset is read, and appended to; it must be refused by a ValueError of one line if not."""
    taken = True
    for use in (load_demos, lambda folder: Dataset(folder, make_features(), append=True)):
        try:
            use(folder)
        except ValueError as error:
            taken = one_line(error)
    return taken


def test_an_honest_dataset_is_read(demos):
    assert reads(demos) and len(load_demos(demos)["action"]) == 20


EVIL_PATHS = [
    "{chunk_index.__class__.__mro__}{file_index}",
    "../secret/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
    "/etc/passwd",
    "data/{chunk_index:0999999999d}{file_index}",
    "data/chunk-000/file-000.parquet",
    7,
]


@pytest.mark.parametrize("key", ["data_path", "video_path"])
@pytest.mark.parametrize("path", EVIL_PATHS)
def test_paths_out_of_a_dataset_are_not_followed(demos, key, path):
    info = json.loads((demos / "meta" / "info.json").read_text())
    (demos / "meta" / "info.json").write_text(json.dumps(info | {key: path}))
    with pytest.raises(ValueError, match="append needs the same" if key == "video_path" else "data_path") as error:
        Dataset(demos, make_features(), append=True) if key == "video_path" else load_demos(demos)
    one_line(error.value)


@pytest.mark.parametrize(
    "link", ["data/chunk-000", "data/chunk-000/file-000.parquet", "data/chunk-001", "meta/info.json"]
)
def test_links_out_of_a_dataset_are_refused_and_nothing_behind_them_is_cleared_away(demos, tmp_path, link):
    (tmp_path / "elsewhere").mkdir()
    precious = tmp_path / "elsewhere" / "file-999.parquet"
    precious.write_text("mine")
    path = demos / link
    if path.exists():
        path.rename(tmp_path / "elsewhere" / "moved")
    path.symlink_to(
        tmp_path / "elsewhere" / "moved" if (tmp_path / "elsewhere" / "moved").exists() else precious.parent
    )
    with pytest.raises(ValueError, match="is a link out of it"):
        load_demos(demos)
    with pytest.raises(ValueError, match="is a link out of it"):
        Dataset(demos, make_features(), append=True)
    assert precious.read_text() == "mine"


def frames_of(demos, **columns):
    """Replace columns of a dataset's first file."""
    path = demos / "data" / "chunk-000" / "file-000.parquet"
    table = pq.read_table(path)
    for name, column in columns.items():
        table = table.set_column(table.schema.get_field_index(name), name, column)
    pq.write_table(table, path)


def test_columns_that_unfold_are_refused_before_they_do(demos, monkeypatch):
    rows = 50_000  # in a dictionary and run lengths a few bytes
    zeros = pa.FixedSizeListArray.from_arrays(pa.array(np.zeros(6 * rows, dtype=np.float32)), 6)
    table = pa.table({"episode_index": np.zeros(rows, dtype=np.int64), "frame_index": np.arange(rows), "action": zeros})
    pq.write_table(table, demos / "data" / "chunk-000" / "file-000.parquet")
    monkeypatch.setattr(lerobot_dataset, "MOST_FRAMES", rows - 1)
    monkeypatch.setattr(pq.ParquetFile, "read", None)
    with pytest.raises(ValueError, match="which is too much") as error:
        lerobot_dataset.read_table(demos / "data" / "chunk-000" / "file-000.parquet", ["action"])
    one_line(error.value)


def test_lengths_that_unfold_are_refused_before_they_do(demos):
    path = demos / "meta" / "episodes" / "chunk-000" / "file-000.parquet"
    table = pq.read_table(path)
    for length in (10**12, 2**62, -1, 0):
        column = table.schema.get_field_index("length")
        pq.write_table(table.set_column(column, "length", pa.array([length])), path)
        with pytest.raises(ValueError, match="lengths below 1, or more than") as error:
            load_demos(demos)
        one_line(error.value)


@pytest.mark.parametrize("column", ["observation.state", "episode_index", "frame_index"])
def test_columns_of_other_kinds_are_refused(demos, column):
    for values in (["x"] * 10, [b"x"] * 10, [{"a": 1}] * 10, [None] * 10, [[["x"]]] * 10, [[1.0, 2.0]] * 10):
        frames_of(demos, **{column: pa.array(values)})
        assert not reads(demos)


@pytest.mark.campaign
def test_every_leaf_and_many_bytes_of_a_dataset(demos, tmp_path):
    """In processes of their own, a hundred inputs each: what falls over in Arrow's C++ would take this one with it."""
    original = json.loads((demos / "meta" / "info.json").read_text())
    rng, counts, failures = np.random.default_rng(0), Counter(), []

    def leaf(copy, where, change):
        content = changed(original, where, change)
        (copy / "meta" / "info.json").write_text(json.dumps(content))

    def damage(copy, name, at, size):
        content = bytearray((copy / name).read_bytes())
        content[at : at + size] = rng.integers(0, 256, size, dtype=np.uint8).tobytes()
        (copy / name).write_bytes(content)

    jobs = [
        (leaf, where, change)
        for where, change in mutants(original)
        if change[0] != "is" or not any(isinstance(part, torch.Tensor) for part in [change[1]])
    ]
    jobs = [job for job in jobs if all(isinstance(key, (str, int)) for key in job[1])]
    files = [str(path.relative_to(demos)) for path in demos.rglob("*.parquet")]
    for name in files:
        size = (demos / name).stat().st_size
        jobs += [
            (damage, name, at, int(rng.integers(1, 9)))
            for at in rng.integers(0, size, int(os.environ.get("DAMAGES", 1500))).tolist()
        ]
    for start in range(0, len(jobs), 100):
        pid = os.fork()
        if pid == 0:
            code = 0
            for job in jobs[start : start + 100]:
                copied = tmp_path / "copy"
                shutil.rmtree(copied, ignore_errors=True)
                shutil.copytree(demos, copied)
                try:
                    job[0](copied, *job[1:])
                    reads(copied)
                except Exception as error:
                    print("failed", str(job[1:])[:300], repr(error)[:300], flush=True)
                    code = 1
            os._exit(code)
        _, status = os.waitpid(pid, 0)
        counts["inputs"] += len(jobs[start : start + 100])
        if status:
            failures.append((start, status))
    print(dict(counts), "failures", failures)
    assert not failures


def lerobot_files():
    def blob(header):
        header = json.dumps(header).encode()
        return torch.frombuffer(bytearray(len(header).to_bytes(8, "little") + header + bytes(24)), dtype=torch.uint8)

    def text(content):
        return torch.frombuffer(bytearray(json.dumps(content).encode()), dtype=torch.uint8)

    inputs = {"observation.state": ("STATE", 6), "observation.environment_state": ("ENV", 14)}
    steps = [
        {"registry_name": "to_batch_processor"},
        {"registry_name": "normalizer_processor", "state_file": STATISTICS},
    ]
    return {
        "config.json": {
            "type": "act",
            "n_obs_steps": 1,
            "input_features": {key: {"type": kind, "shape": [size]} for key, (kind, size) in inputs.items()},
            "output_features": {"action": {"type": "ACTION", "shape": [6]}},
            **{"chunk_size": 16, "dim_model": 32, "n_encoder_layers": 4, "vision_backbone": "resnet18", "dropout": 0.1},
        },
        "policy_preprocessor.json": {"steps": steps},
        "policy_postprocessor.json": {"steps": []},
        "model.safetensors": {"weight": {"dtype": "U8", "shape": [24], "data_offsets": [0, 24]}},
        STATISTICS: {"weight": {"dtype": "U8", "shape": [24], "data_offsets": [0, 24]}},
    }, lambda name, content: (text if name.endswith(".json") else blob)(content)


STATISTICS = "policy_preprocessor_step.safetensors"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        (("dim_model",), 10**9),
        (("chunk_size",), 10_000),
        (("horizon",), 10_000),
        (("n_encoder_layers",), 10**6),
        (("down_dims",), [512] * 1000),
        (("down_dims",), [10**9]),
        (("dropout",), float("nan")),
        (("input_features", "observation.state", "type"), "VISUAL"),  # for which LeRobot would download a network
    ],
)
def test_a_lerobot_config_that_asks_for_too_much_is_refused(key, value):
    contents, encode = lerobot_files()
    files = {name: encode(name, content) for name, content in contents.items()}
    assert lerobot_policy.check_lerobot(files)["type"] == "act"
    config = changed(contents["config.json"], key, ("is", value))
    with pytest.raises(ValueError) as error:
        lerobot_policy.check_lerobot(files | {"config.json": encode("config.json", config)})
    one_line(error.value)


def test_a_link_out_of_a_lerobot_folder_is_refused(tmp_path):
    (tmp_path / "policy").mkdir()
    (tmp_path / "secret").write_text("{}")
    for name in lerobot_policy.LEROBOT_NEEDED:
        (tmp_path / "policy" / name).write_text("{}")
    (tmp_path / "policy" / "policy_preprocessor_secret.json").symlink_to(tmp_path / "secret")
    with pytest.raises(ValueError, match="a link out of it"):
        lerobot_policy.read_folder(tmp_path / "policy")


@pytest.mark.campaign
def test_every_leaf_of_a_lerobot_folder():
    contents, encode = lerobot_files()
    files = {name: encode(name, content) for name, content in contents.items()}
    counts, failures = Counter(), []
    for name, content in contents.items():
        for where, change in mutants(content):
            try:
                changed_file = encode(name, changed(content, where, change))
            except TypeError:
                continue  # JSON has no such thing
            try:
                lerobot_policy.check_lerobot(files | {name: changed_file})
                counts["taken"] += 1
            except ValueError as error:
                one_line(error)
                counts["refused"] += 1
            except Exception as error:
                failures.append((name, where, str(change)[:80], repr(error)[:200]))
    print(dict(counts), len(failures), "failures")
    assert not failures, failures[:20]
