"""record_demos.py and lerobot_dataset.py: the dataset on disk, what is recorded, append and interruption, damage."""

import json
import os
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path

import imageio
import mujoco
import mujoco.viewer
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from gymnasium.vector import AutoresetMode
from numpy.testing import assert_allclose, assert_array_equal
from test_scripts import TINY, run_script

import lerobot_dataset
import record_demos
from base_policies import JacobianIKPolicy, ZeroPolicy, joint_targets, joints_to_lerobot, joints_to_rad
from env_paper_square import OBS, SCENE_PATH, EnvArgs, PaperSquareVectorEnv, eval_kwargs, kinematics, to_si
from eval import VALIDATION_SEED
from figures import check_rendering, encode_mp4
from lerobot_dataset import KEYS, Dataset, load_demos, load_task, load_transitions, make_features
from record_demos import KeyboardPolicy, draw_noise, key_to_motion, motion_to_action, record_episodes
from runs import UserError, describe_env

ROOT = Path(__file__).resolve().parent.parent
ENV = describe_env(PaperSquareVectorEnv, eval_kwargs(EnvArgs()))
SCENE = mujoco.MjModel.from_xml_path(str(SCENE_PATH))
HOME = SCENE.key("home").ctrl  # rad
DATA, EPISODES = "data/chunk-000/file-000.parquet", "meta/episodes/chunk-000/file-000.parquet"
QUANTILES = {"q01": 0.01, "q10": 0.1, "q50": 0.5, "q90": 0.9, "q99": 0.99}


def make_envs(num_envs=1, steps=30, **kwargs):
    return PaperSquareVectorEnv(
        num_envs, max_episode_steps=steps, autoreset_mode=AutoresetMode.DISABLED, num_threads=1, **kwargs
    )


def record(num_episodes, num_envs=2, steps=30, policy=None, seed=0, **kwargs):
    return list(record_episodes(policy or JacobianIKPolicy(), make_envs(num_envs, steps), seed, num_episodes, **kwargs))


def appended(root, features=None, env=ENV):
    return Dataset(root, features or make_features(), env, append=True)


def save(root, episodes, append=False):
    dataset = Dataset(root, make_features(), ENV, append, flush_every=3)
    for episode in episodes:
        dataset.add(episode)
    dataset.flush()
    return dataset


def files_of(root):
    files = (path for path in root.rglob("*") if path.is_file() and path.suffix != ".lock")
    return {str(path.relative_to(root)): path.read_bytes() for path in files}


def json_of(root, name):
    return json.loads((root / "meta" / f"{name}.json").read_text())


def joined(episodes, key):
    return np.concatenate([episode[key] for episode in episodes])


def run_cli(flags, monkeypatch, folder):
    """Run record_demos.py as `python record_demos.py flags` would, in `folder`; returns the exit code."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["record_demos.py", *shlex.split(flags), "--num-threads", "1"])
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        runpy.run_path(str(ROOT / "record_demos.py"), run_name="__main__")
    except SystemExit as end:
        return end.code
    except Exception as error:
        with pytest.raises(SystemExit) as end:  # or it was a traceback
            sys.excepthook(type(error), error, error.__traceback__)
        return end.value.code
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


@pytest.fixture(scope="module")
def episodes():
    """Seven episodes of 30 steps, but for the third, of 21."""
    recorded = record(7)
    recorded[2] = {key: value if key == "seed" else value[:21] for key, value in recorded[2].items()}
    return recorded


@pytest.fixture(scope="module")
def written(tmp_path_factory, episodes):
    root = tmp_path_factory.mktemp("demos") / "set"
    save(root, episodes)
    return root


@pytest.fixture
def dataset(tmp_path, written):
    """A copy to break."""
    return Path(shutil.copytree(written, tmp_path / "set"))


# The format; that LeRobot reads it is tested in test_lerobot.py


def test_files_and_info_json_are_those_of_the_format(written):
    parquet = [f"{part}/chunk-000/file-00{k}.parquet" for part in ("data", "meta/episodes") for k in range(3)]
    meta = {f"meta/{name}" for name in ("info.json", "stats.json", "environment.json", "tasks.parquet")}
    assert set(files_of(written)) == {*meta, *parquet}
    info = json_of(written, "info")
    features = info.pop("features")
    assert info == {
        "codebase_version": "v3.0",
        "robot_type": "so101_follower",
        "total_episodes": 7,
        "total_frames": 201,
        "total_tasks": 1,
        "chunks_size": 1000,
        "data_files_size_in_mb": 100,
        "video_files_size_in_mb": 200,
        "fps": 30,
        "splits": {"train": "0:7"},
        "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
        "video_path": None,
    }
    for key, size in zip((*KEYS, "commanded"), (6, 15, 6, 6), strict=True):
        feature = features.pop(key)
        assert (feature["dtype"], feature["shape"], len(set(feature["names"]))) == ("float32", [size], size)
    scalars = {"next.reward": "float32", "next.done": "bool", "next.success": "bool", "timestamp": "float32"}
    scalars |= dict.fromkeys(("frame_index", "episode_index", "index", "task_index"), "int64")
    assert features == {key: {"dtype": kind, "shape": [1], "names": None} for key, kind in scalars.items()}
    tasks = pq.read_table(written / "meta" / "tasks.parquet")
    assert tasks.to_pydict() == {"task_index": [0], "task": ["Slide the sheet of paper into the tape square."]}
    assert json.loads(tasks.schema.metadata[b"pandas"])["index_columns"] == ["task"]


def statistics(values):
    """What LeRobot expects for values (n, size), written down anew."""
    plain = {name: getattr(np, name)(values, axis=0) for name in ("min", "max", "mean", "std")}
    return plain | {"count": [len(values)]} | {name: np.quantile(values, q, axis=0) for name, q in QUANTILES.items()}


def test_frames_episodes_and_statistics(written, episodes):
    kinds = dict.fromkeys(("observation.state", "action", "commanded"), pa.list_(pa.float32(), 6))
    kinds |= {"observation.environment_state": pa.list_(pa.float32(), 15), "next.reward": pa.float32()}
    kinds |= {"next.done": pa.bool_(), "next.success": pa.bool_(), "timestamp": pa.float32()}
    kinds |= dict.fromkeys(("frame_index", "episode_index", "index", "task_index"), pa.int64())
    start = 0
    for k, episode in enumerate(episodes):
        name, length = f"chunk-000/file-00{k // 3}.parquet", len(episode["action"])
        frames = pq.ParquetFile(written / "data" / name).read_row_group(k % 3)  # one each
        assert dict(zip(frames.column_names, frames.schema.types, strict=True)) == kinds
        for key in (*KEYS, "commanded", "next.reward", "next.done", "next.success"):
            assert frames[key].to_pylist() == episode[key].tolist()
        assert_array_equal(frames["frame_index"], np.arange(length))
        assert_array_equal(frames["index"], start + np.arange(length))
        assert_array_equal(frames["timestamp"], (np.arange(length) / 30).astype(np.float32))
        assert set(frames["episode_index"].to_pylist()) == {k} and set(frames["task_index"].to_pylist()) == {0}

        row = pq.read_table(written / "meta" / "episodes" / name).to_pylist()[k % 3]
        found = {key: row.pop(key) for key in list(row) if key.startswith("stats/")}
        assert row == {
            "episode_index": k,
            "tasks": ["Slide the sheet of paper into the tape square."],
            "length": length,
            "data/chunk_index": 0,
            "data/file_index": k // 3,
            "dataset_from_index": start,
            "dataset_to_index": start + length,
            "meta/episodes/chunk_index": 0,
            "meta/episodes/file_index": k // 3,
        }
        assert len(found) == len(kinds) * 10
        for key in (*KEYS, "commanded", "next.reward", "next.done"):
            for name, expected in statistics(episode[key].reshape(length, -1).astype(float)).items():
                assert_allclose(found[f"stats/{key}/{name}"], expected, atol=1e-9)
        start += length
    stats = json_of(written, "stats")
    assert stats.keys() == kinds.keys()
    for key in (*KEYS, "commanded", "next.reward", "next.success"):
        expected = statistics(joined(episodes, key).reshape(201, -1).astype(float))
        parts = [statistics(episode[key].astype(float)) for episode in episodes]
        for name in QUANTILES:  # as LeRobot merges them
            expected[name] = np.ravel(sum(np.asarray(part[name]) * part["count"][0] / 201 for part in parts))
        assert stats[key].keys() == expected.keys()
        for name, value in expected.items():
            assert_allclose(stats[key][name], value, atol=1e-6)


# Reading


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_table(path, **columns):
    """Replace columns of a Parquet file by what functions make of their lists."""
    table = pq.read_table(path)
    for name, change in columns.items():
        table = table.set_column(table.column_names.index(name), name, change(table[name].to_pylist()))
    pq.write_table(table, path)


@pytest.mark.parametrize("num_episodes", [0, 1, 4])
def test_load_demos_returns_what_was_recorded(written, episodes, num_episodes):
    wanted = episodes[: num_episodes or None]
    demos = load_demos(written, num_episodes)
    for key in KEYS:
        values = demos[key.removeprefix("observation.")]
        assert values.dtype == np.float32
        assert_array_equal(values, joined(wanted, key))
    assert demos["episode"].dtype == np.int64
    assert_array_equal(demos["episode"], np.repeat(np.arange(len(wanted)), [len(e["action"]) for e in wanted]))


def test_load_demos_has_the_commanded_joints_of_the_column_or_else_of_the_actions_before(dataset, episodes):
    commanded, measured = load_demos(dataset, joints="commanded"), load_demos(dataset)
    assert_array_equal(commanded["state"], joined(episodes, "commanded"))
    assert np.abs(commanded["state"] - measured["state"]).max(axis=0)[:5].min() > 1.0  # deg
    for key in ("action", "environment_state", "episode"):
        assert_array_equal(commanded[key], measured[key])
    edit_table(dataset / DATA, commanded=lambda rows: pa.array([[np.nan] * 6] * len(rows), pa.list_(pa.float32(), 6)))
    refused(partial(load_demos, joints="commanded"), dataset, "commanded is not finite")
    assert_array_equal(load_demos(dataset)["state"], measured["state"])  # which does without
    features = json_of(dataset, "info")["features"]  # LeRobot's own
    edit_json(dataset / "meta" / "info.json", features={key: features[key] for key in features if key != "commanded"})
    for path in (dataset / "data").rglob("*.parquet"):
        pq.write_table(pq.read_table(path).drop_columns("commanded"), path)
    demos = load_demos(dataset, joints="commanded")
    before = [np.vstack([episode["observation.state"][:1], episode["action"][:-1]]) for episode in episodes]
    assert_array_equal(demos["state"], np.concatenate(before))
    assert demos.keys() == measured.keys() and demos["state"].dtype == np.float32


def test_load_demos_reads_other_layouts(dataset, episodes):
    """All episodes in one file, lists of any length, other columns, and frames that info.json does not count."""
    for part in ("data", "meta/episodes"):
        paths = sorted((dataset / part).rglob("*.parquet"))
        table = pa.concat_tables([pq.read_table(path) for path in paths])
        for path in paths:
            path.unlink()
        pq.write_table(table.drop_columns("next.reward" if part == "data" else "tasks"), dataset / part / paths[0])
    lists = dict.fromkeys(KEYS, lambda rows: pa.array(rows, pa.list_(pa.float32())))
    edit_table(dataset / DATA, **lists)
    edit_table(dataset / EPISODES, **{"data/file_index": lambda rows: pa.array([0] * len(rows))})
    frames = sum(len(episode["action"]) for episode in episodes[:5])
    edit_json(dataset / "meta" / "info.json", total_episodes=5, total_frames=frames)
    assert_array_equal(load_demos(dataset)["action"], joined(episodes[:5], "action"))


def test_a_flag_that_came_later_is_at_its_default_in_what_was_recorded_before(dataset):
    edit_json(dataset / "meta" / "environment.json", kwargs={k: x for k, x in ENV["kwargs"].items() if "grip" not in k})
    with pytest.raises(UserError, match="same environment"):
        appended(dataset, env={**ENV, "kwargs": {**ENV["kwargs"], "move_gripper": False}})
    appended(dataset)


def test_a_dataset_says_which_environment_it_is_of(dataset):
    assert load_task(dataset) == (PaperSquareVectorEnv, eval_kwargs(EnvArgs()))
    kwargs = {**ENV["kwargs"], "tape_half_size": 0.1}
    with pytest.raises(UserError, match="same environment"):
        appended(dataset, env={**ENV, "kwargs": kwargs})
    edit_json(dataset / "meta" / "environment.json", kwargs=kwargs)
    assert load_task(dataset)[1]["tape_half_size"] == 0.1
    for wrong in ({"unheard_of": 1}, {"act_scale": -1}, [1], None):
        edit_json(dataset / "meta" / "environment.json", kwargs=wrong)
        refused(load_task, dataset)
    edit_json(dataset / "meta" / "environment.json", kwargs=kwargs, module="reproduce")
    refused(load_task, dataset, "does not define PaperSquareVectorEnv")
    edit_json(dataset / "meta" / "environment.json", module="env_paper_square")
    edit_json(dataset / "meta" / "environment.json", rows={"other": [[0.0], [1.0]]})
    refused(load_task, dataset, "other observations")
    (dataset / "meta" / "environment.json").unlink()  # LeRobot's own
    assert load_task(dataset)[0] is PaperSquareVectorEnv


def refused(use, root, message="."):
    with pytest.raises(UserError, match=message) as caught:
        use(root)
    assert str(root) in str(caught.value) or "environment" in str(caught.value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000


def write_info(text):
    return lambda root: (root / "meta" / "info.json").write_bytes(text)


def info_with(**changes):
    return lambda root: edit_json(root / "meta" / "info.json", **changes)


def data_with(key, change):
    return lambda root: edit_table(root / DATA, **{key: change})


def lengths_of(length):
    return lambda root: edit_table(root / EPISODES, length=lambda rows: pa.array([length] * len(rows)))


def ragged(root):
    """As many values, but not six in every frame."""
    for path in (root / "data").rglob("*.parquet"):
        shift = lambda rows: pa.array([rows[0][:5], [0.0, *rows[1]], *rows[2:]], pa.list_(pa.float32()))  # noqa: E731
        edit_table(path, action=shift)


DAMAGE = {
    "no folder": shutil.rmtree,
    "no info.json": lambda root: (root / "meta" / "info.json").unlink(),
    "broken JSON": write_info(b'{"codebase_version": "v3.0",'),
    "JSON of something else": write_info(b"[1, 2]"),
    "binary info.json": write_info(b"\xff\xfe\x00"),
    "deep JSON": write_info(b"[" * 100_000),
    "older format": info_with(codebase_version="v2.1"),
    "no episodes": info_with(total_episodes=0),
    "text for a count": info_with(total_episodes="many"),
    "more episodes than there are": info_with(total_episodes=9),
    "fewer episodes than there are": info_with(total_episodes=5),
    "more than any memory": info_with(total_episodes=10**15, total_frames=10**15),
    "no feature": info_with(features={}),
    "path as a program": info_with(data_path="{chunk_index.__class__.__mro__}{file_index}"),
    "path out of it": info_with(data_path="../secret/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"),
    "path to anything": info_with(data_path="/etc/passwd"),
    "path as a number": info_with(data_path=7),
    "no data": lambda root: shutil.rmtree(root / "data"),
    "no meta/episodes": lambda root: shutil.rmtree(root / "meta" / "episodes"),
    "data file cut short": lambda root: (root / DATA).write_bytes(b"PAR1 and no more"),
    "empty data file": lambda root: (root / DATA).write_bytes(b""),
    "episodes file cut short": lambda root: (root / EPISODES).write_bytes(b"PAR1"),
    "data of other episodes": lambda root: shutil.copy(root / DATA, root / DATA.replace("-000.", "-001.")),
    "other size": data_with("action", lambda rows: pa.array([[1.0]] * len(rows))),
    "ragged": ragged,
    "null": data_with("action", lambda rows: pa.array([None, *rows[1:]], pa.list_(pa.float32(), 6))),
    "NaN": data_with("observation.state", lambda rows: pa.array([[np.nan] * 6, *rows[1:]], pa.list_(pa.float32(), 6))),
    "text": data_with("action", lambda rows: pa.array([["a"] * 6] * len(rows))),
    "text for a number": data_with("episode_index", lambda rows: pa.array(["a"] * len(rows))),
    "lists for numbers": data_with("frame_index", lambda rows: pa.array([[k] for k in rows])),
    "frames in disorder": data_with("frame_index", lambda rows: pa.array(rows[::-1])),
    **{f"lengths of {length}": lengths_of(length) for length in (10**12, 2**62, -1, 0)},
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_an_error_in_one_line(dataset, kind):
    DAMAGE[kind](dataset)
    refused(load_demos, dataset)


def test_too_few_episodes(written):
    with pytest.raises(UserError, match="holds 7 episodes, and 8 are asked for"):
        load_demos(written, 8)


@pytest.mark.parametrize("link", ["data/chunk-000", DATA, "data/chunk-001", "meta/info.json"])
def test_links_out_of_a_dataset_are_refused_and_nothing_behind_them_is_touched(dataset, tmp_path, link):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "file-999.parquet").write_text("mine")
    if (dataset / link).exists():
        (dataset / link).rename(elsewhere / "moved")
    (dataset / link).symlink_to(elsewhere / "moved" if (elsewhere / "moved").exists() else elsewhere)
    for use in (load_demos, appended):
        refused(use, dataset, "is a link out of it")
    assert (elsewhere / "file-999.parquet").read_text() == "mine"


def check_damaged(dataset, whole):
    """Read and append to a damaged dataset; "error", or "the same" as the whole one."""
    try:
        demos = load_demos(dataset)
    except UserError as error:
        outcome = "error"
        assert "\n" not in str(error) and str(dataset) in str(error)
    else:
        outcome = "the same"  # the damage was not of what is read
        for key, values in whole.items():
            assert_array_equal(demos[key], values)
    try:
        appended(dataset)
    except UserError as error:
        assert "\n" not in str(error)
    return outcome


def damage(content, rng, kind):
    damaged, place = bytearray(content), rng.integers(len(content))
    if kind == "bit":
        damaged[place] ^= 1 << rng.integers(8)
    elif kind == "cut":
        del damaged[place:]
    else:
        damaged[place : place + 8] = rng.bytes(8)
    return bytes(damaged)


def damage_at_random(dataset, times):
    """Damage each file so often, in a process of its own, which what falls over in Arrow's C++ would take along."""
    whole, rng, outcomes = load_demos(dataset), np.random.default_rng(0), Counter()
    for path in sorted(path for path in dataset.rglob("*") if path.is_file() and path.suffix != ".lock"):
        content, aside = path.read_bytes(), Path(shutil.copytree(dataset, dataset.with_name("aside")))
        read_end, write_end = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                for k in range(times):
                    path.write_bytes(damage(content, rng, ("bit", "bit", "cut", "bytes")[k % 4]))
                    os.write(write_end, check_damaged(dataset, whole)[:1].encode())
                os._exit(0)
            except BaseException as error:
                print(path.name, k, repr(error)[:500], flush=True)
            os._exit(1)
        os.close(write_end)
        with open(read_end) as pipe:
            found = Counter(pipe.read())
        assert os.waitpid(pid, 0)[1] == 0, path
        outcomes += Counter({(path.relative_to(dataset).parts[0], key): count for key, count in found.items()})
        shutil.rmtree(dataset)
        aside.rename(dataset)
    return outcomes


def test_flipped_bits_and_cut_files_are_noticed_or_change_nothing(dataset):
    outcomes = damage_at_random(dataset, 8)
    assert outcomes["data", "e"] > outcomes["data", "t"]


@pytest.mark.campaign
def test_many_flipped_bits_and_cut_files(dataset):
    """python -m pytest -m campaign tests/test_demos.py -s"""
    print(damage_at_random(dataset, 1500))


# What is recorded


def played(function):
    return type("Policy", (ZeroPolicy,), {"__call__": lambda self, obs: function(obs)})()


def test_units_are_those_of_lerobot():
    low, high = SCENE.actuator_ctrlrange.T
    assert_allclose(joints_to_lerobot(low), [*np.degrees(low[:5]), 0.0], atol=1e-9)
    assert_allclose(joints_to_lerobot(high)[5], 100.0)
    episode = record(1, 1, steps=2, policy=played(lambda obs: np.eye(6)[[5] * len(obs)]))[0]
    percent = 100 * (HOME[5] - low[5]) / (high[5] - low[5])
    assert_allclose(episode["commanded"][0], [*np.degrees(HOME[:5]), percent], atol=1e-4)
    assert_allclose(episode["action"][:, 5], percent + 100 * 0.02 * np.array([1, 2]) / (high[5] - low[5]), atol=1e-3)


def test_states_are_joints_as_servos_report_them_and_commanded_are_the_targets_before_the_action():
    envs, truth, tick, offset = make_envs(fixed={"offset": 0.01}), [], EnvArgs.encoder_tick, [0.01] * 5 + [0.0]
    act = lambda obs: (truth.append(envs._qpos[0, :6].copy()), JacobianIKPolicy()(obs))[1]  # noqa: E731
    (episode,) = record_episodes(played(act), envs, 3, 1)
    state, commanded = (joints_to_rad(episode[key].astype(float)) for key in ("observation.state", "commanded"))
    assert_allclose(state / tick, np.floor((np.array(truth) - offset) / tick), atol=1e-3)
    assert_allclose(commanded[0], HOME, atol=1e-6)
    assert_allclose(episode["commanded"][1:], episode["action"][:-1], atol=1e-4)
    assert np.abs(commanded - state)[20:, 1:4].max(axis=0).min() > 0.01  # soft servos are behind


def test_a_gripper_that_may_not_move_was_sent_nowhere():
    act = played(lambda obs: np.ones((len(obs), 6)))
    (episode,) = record_episodes(act, make_envs(move_gripper=False), 3, 1)
    assert_array_equal(episode["action"][:, 5], episode["commanded"][0, 5])
    assert np.ptp(episode["action"][:, 4]) > 10  # degrees


def test_replaying_the_recorded_targets_gives_the_recorded_states():
    recorded, envs = (make_envs(steps=120, encoder_tick=0) for _ in range(2))  # in ticks, rounding would tell
    (episode,) = record_episodes(JacobianIKPolicy(), recorded, 5, 1)
    obs, _ = envs.reset(seed=5)
    target, moved = HOME, 0.0
    for k, wanted in enumerate(joints_to_rad(episode["action"].astype(float))):
        assert_allclose(episode["observation.state"][k], joints_to_lerobot(envs.joint_measured[0]), atol=2e-3)
        sheet = episode["observation.environment_state"][k][:2] / 10.0 + [0.19, 0.0]  # m, OBS_ROWS' scale and zero
        assert_allclose(sheet, to_si(obs)[0, OBS["sheet_pos"]], atol=1e-5)
        moved = max(moved, np.abs(sheet - [0.19, -0.09]).max())
        obs, rewards, terminations, truncations, _ = envs.step((wanted - target)[None] / envs.act_scale)
        assert_allclose(episode["next.reward"][k], rewards[0], atol=1e-5)
        assert episode["next.done"][k] == (terminations[0] or truncations[0])
        assert episode["next.success"][k] == terminations[0]
        target = wanted
    assert moved > 0.06  # the sheet was dragged in it


@pytest.mark.parametrize("tape_half_size, noise_std", [(0.08, 0.3), (0.3, 0.0)])  # the sheet begins in the larger one
def test_transitions_are_those_that_the_environment_made(tmp_path, monkeypatch, tape_half_size, noise_std):
    seen, executed, paid = [], [], []

    def reset(envs, **kwargs):
        obs, infos = PaperSquareVectorEnv.reset(envs, **kwargs)
        seen.append([obs[0].copy()])
        return obs, infos

    def step(envs, actions):
        obs, rewards, *rest = PaperSquareVectorEnv.step(envs, actions)
        seen[-1].append(obs[0].copy())
        executed.append(np.clip(actions[0], -1, 1))
        paid.append(rewards[0])
        return obs, rewards, *rest

    envs = make_envs(1, 12, observe_measured=True, tape_half_size=tape_half_size)
    monkeypatch.setattr(envs, "reset", partial(reset, envs))
    monkeypatch.setattr(envs, "step", partial(step, envs))
    save(tmp_path, list(record_episodes(JacobianIKPolicy(), envs, 0, 3, noise_std=noise_std)))
    found = load_transitions(tmp_path, observe_measured=True)
    success = tape_half_size == 0.3
    length = 5 if success else 12
    kept = np.tile(np.arange(length) < length - (not success), 3)  # but the last step of a failure
    assert_allclose(found["obs"], np.concatenate([obs[:-1] for obs in seen])[kept], atol=1e-4)
    assert_allclose(found["actions"], np.array(executed)[kept], atol=1e-4)
    assert_allclose(found["rewards"], np.array(paid)[kept], atol=1e-6)
    assert_array_equal(np.flatnonzero(found["dones"]), kept.sum() // 3 * np.arange(1, 4) - 1)
    assert_array_equal(found["terminations"], found["dones"] & success)
    following = np.concatenate([obs[1:] for obs in seen])[kept]
    known = ~found["terminations"]
    assert_allclose(found["next_obs"][known], following[known], atol=1e-4)
    refused(lambda root: load_transitions(root, act_scale=0.001), tmp_path, "up to .* rad: --act-scale")


def test_sac_learns_from_demonstrations_by_halves(dataset, tmp_path, monkeypatch):
    flags = f"{TINY['sac_residual.py']} --demos {dataset} --learning-rate 1e-12"
    script = run_script("sac_residual.py", flags, monkeypatch, tmp_path)
    rb, demo_rb, batch = script["rb"], script["demo_rb"], script["data"]
    demos = load_transitions(dataset)
    assert_array_equal(demo_rb.obs[:, 0], demos["obs"])
    assert_allclose(demo_rb.actions[:, 0], demos["actions"], atol=1e-6)
    assert_allclose(demo_rb.rewards[:, 0], script["args"].reward_scale * demos["rewards"], rtol=1e-6)
    for name in ("", "next_"):
        assert_allclose(
            demo_rb.__dict__[f"{name}base_actions"][:, 0], JacobianIKPolicy()(demos[f"{name}obs"]), atol=1e-6
        )
    for half, buffer in zip(batch["obs"].split(len(batch["obs"]) // 2), (rb, demo_rb), strict=True):
        assert (half[:, None] == buffer.obs.flatten(0, 1)).all(2).any(1).all()  # every one of them is in there


def test_only_successes_are_the_first_ones_whatever_num_envs():
    everything = record(8, 4, steps=200)
    successful = [episode for episode in everything if episode["next.success"].any()]
    assert 2 <= len(successful) < 8  # so there is something to drop
    for episode in successful:
        assert episode["next.success"].sum() == episode["next.done"].sum() == 1 and episode["next.success"][-1]
    expected = successful[:-1]
    for num_envs in (1, 3):
        shown = record(len(expected), num_envs, steps=200, only_successes=True)
        kept = [episode for episode in shown if episode]
        assert [episode["seed"] for episode in kept] == [episode["seed"] for episode in expected]
        assert len(shown) == expected[-1]["seed"] + 1  # the dropped ones are told of, and none is played beyond
        assert_array_equal(joined(kept, "action"), joined(expected, "action"))


def test_a_stopped_recording_keeps_episodes_that_waited_for_an_earlier_one():
    envs, steps = make_envs(3, 400), []

    def act(obs):
        steps.append(1)
        if len(steps) == 40:
            envs._episode_steps[1:] = 399  # the first one's goes on
        return np.zeros((3, 6))

    kept = record_episodes(played(act), envs, 5, 10, stop=lambda: len(steps) > 60)
    assert [episode["seed"] for episode in kept] == [6, 7]


def test_it_gives_up_on_a_policy_that_never_succeeds_and_before_the_held_out_episodes(monkeypatch):
    seed = VALIDATION_SEED - 4
    assert [e["seed"] for e in record(4, steps=3, policy=ZeroPolicy(), seed=seed)] == list(range(seed, seed + 4))
    with pytest.raises(UserError, match="held-out"):
        record(1, 1, steps=3, policy=ZeroPolicy(), seed=seed, only_successes=True)
    monkeypatch.setattr(record_demos, "GIVE_UP", 5)
    with pytest.raises(UserError, match="5 episodes in a row failed"):
        record(1, 1, steps=3, policy=ZeroPolicy(), only_successes=True)


def test_noise_is_stationary_and_correlated_and_in_what_is_executed_only(monkeypatch):
    noise = np.stack([draw_noise(seed, 60, 0.3, 0.8) for seed in range(400)])  # (400, 60, 6)
    assert_allclose(noise.std(axis=(0, 2)), 0.3, rtol=0.1)  # at every step, the first one too
    assert_allclose(np.mean(noise[:, 1:] * noise[:, :-1]) / 0.3**2, 0.8, atol=0.02)
    assert abs(noise.mean()) < 0.01

    executed, step = [], PaperSquareVectorEnv.step
    spy = lambda envs, actions: (executed.append(actions[0].copy()), step(envs, actions))[1]  # noqa: E731
    monkeypatch.setattr(PaperSquareVectorEnv, "step", spy)
    always = np.array([[0.1, 0, 0, 0, 0, -0.1]])
    episode = record(1, 1, steps=25, policy=played(lambda obs: always), noise_std=0.2, noise_correlation=0.5)[0]
    assert_allclose(np.array(executed) - always, draw_noise(0, 25, 0.2, 0.5))
    reached = HOME + 0.02 * np.cumsum(np.clip(executed, -1, 1), axis=0)  # rad, joint targets after each step
    before = np.vstack([HOME, reached[:-1]])
    assert_allclose(joints_to_rad(episode["commanded"].astype(float)), before, atol=1e-5)
    assert_allclose(joints_to_rad(episode["action"].astype(float)), before + 0.02 * always, atol=1e-5)


def test_episodes_do_not_depend_on_num_envs():
    for episode, other in zip(record(5, 1, noise_std=0.3), record(5, 4, noise_std=0.3), strict=True):
        assert episode.keys() == other.keys()
        for key, values in episode.items():
            assert_array_equal(values, other[key])


# Append, interruption


def test_append_goes_on_and_leaves_what_is_there(dataset, episodes):
    before, added = files_of(dataset), record(2, seed=7)
    saved = save(dataset, added, append=True)
    after = files_of(dataset)
    assert saved.info["total_episodes"] == 9 and saved.next_seed == 7
    changed = {name for name in after if before.get(name) != after[name]}
    new = {"data/chunk-000/file-003.parquet", "meta/episodes/chunk-000/file-003.parquet"}
    assert changed == {*new, "meta/info.json", "meta/stats.json"}
    nine = [*episodes, *added]
    assert_array_equal(load_demos(dataset)["state"], joined(nine, "observation.state"))
    stats = json_of(dataset, "stats")["action"]
    assert_allclose(stats["std"], joined(nine, "action").astype(float).std(axis=0), atol=1e-9)
    assert stats["count"] == [261]


def test_append_clears_away_what_info_json_does_not_count_and_nothing_else(dataset):
    before = files_of(dataset)
    stray = ["data/chunk-000/file-003.parquet", "data/chunk-001/file-000.parquet", DATA + ".tmp", EPISODES + ".tmp"]
    for name in [*stray, "notes.txt", "data/notes.txt"]:
        (dataset / name).parent.mkdir(exist_ok=True)
        (dataset / name).write_text("PAR1")
    shutil.copy(dataset / EPISODES, dataset / EPISODES.replace("-000.", "-004."))
    edit_table(dataset / EPISODES.replace("-000.", "-004."), episode_index=lambda rows: pa.array([7, 8, 9]))
    assert load_demos(dataset)["episode"][-1] == 6
    appended(dataset)
    after = files_of(dataset)
    assert {after.pop("notes.txt"), after.pop("data/notes.txt")} == {b"PAR1"}
    assert after == before


def test_folders_that_cannot_be_added_to_are_refused_and_left_as_they_are(dataset, tmp_path):
    before = files_of(dataset)
    program = f"import runs, pathlib, time; runs.lock(pathlib.Path({str(dataset)!r})); print('held'); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-uc", program], cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        refused(appended, dataset, "another process is writing")
        process.kill()
    with pytest.raises(UserError, match="not empty.*--append"):
        save(dataset, [])
    refused(lambda root: appended(root, make_features(cameras=("top",))), dataset, "same features")
    assert files_of(dataset) == before
    pq.write_table(pq.read_table(dataset / EPISODES).replace_schema_metadata(), dataset / EPISODES)
    refused(appended, dataset, "no seeds")
    (tmp_path / "other").mkdir()
    save(tmp_path / "other", [])  # an empty one is not refused
    (tmp_path / "other" / "notes.txt").write_text("mine")
    for append in (False, True):
        with pytest.raises(UserError):
            save(tmp_path / "other", [], append)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("renamed", [False, True])
def test_a_recording_killed_at_any_write_can_be_read_and_continued(tmp_path, monkeypatch, episodes, renamed):
    """Two flushes, of three episodes each; the process ends at each write, before or after the renaming."""
    replace, reference = Path.replace, tmp_path / "reference"
    save(reference, episodes[:6])
    outcomes = Counter()
    for moment in range(100):
        root, left = tmp_path / str(moment), moment

        def killed(self, target):
            nonlocal left
            left -= 1
            if left < 0 and not renamed:
                self.write_bytes(self.read_bytes()[:100])  # cut short, under its temporary name
                raise Killed
            replace(self, target)
            if left < 0:
                raise Killed

        monkeypatch.setattr(Path, "replace", killed)
        try:
            save(root, episodes[:6])
            break
        except Killed:
            monkeypatch.setattr(Path, "replace", replace)
        info = root / "meta" / "info.json"
        count = json.loads(info.read_text())["total_episodes"] if info.exists() else 0
        outcomes[count] += 1
        if count:
            assert_array_equal(load_demos(root)["action"], joined(episodes[:count], "action"))
        else:
            refused(load_demos, root)
        save(root, episodes[count:6], append=True)
        stats, expected = json_of(root, "stats"), json_of(reference, "stats")
        for key in expected:
            for name, values in expected[key].items():
                assert_allclose(stats[key][name], values, atol=1e-9)
        (root / "meta" / "stats.json").write_bytes((reference / "meta" / "stats.json").read_bytes())  # but for rounding
        left_over = files_of(root)
        assert {name: left_over[name] for name in left_over if not name.endswith(".tmp")} == files_of(reference)
    monkeypatch.setattr(Path, "replace", replace)
    assert moment >= 11 and outcomes[3] >= 4  # info.json, then five files per flush


def start(folder, flags, flush_episodes=lerobot_dataset.FLUSH_EPISODES):
    program = f"""import lerobot_dataset, runpy
lerobot_dataset.FLUSH_EPISODES = {flush_episodes}
runpy.run_path("record_demos.py", run_name="__main__")"""
    command = [sys.executable, "-c", program, "--num-threads", "1", "--output-dir", str(folder), *shlex.split(flags)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_until(condition, process):
    until = time.monotonic() + 60
    while not condition() and process.poll() is None and time.monotonic() < until:
        time.sleep(0.005)


def count_files(root):
    return sum(1 for _ in root.rglob("*"))


def test_kill_9_leaves_a_dataset_that_append_continues_and_a_signal_whole_episodes(tmp_path):
    root = tmp_path / "demos"
    process = start(root, "--num-episodes 5000")
    wait_until(lambda: (root / DATA).exists(), process)
    process.kill()
    process.communicate()
    total = json_of(root, "info")["total_episodes"]
    if total:
        assert load_demos(root)["episode"][-1] == total - 1

    process = start(root, "--append --num-episodes 5000", flush_episodes=1000)
    wait_until(lambda: re.search(r" [1-9]\d*/5000", process.stderr.readline()), process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGINT and "Traceback" not in err
    count = load_demos(root)["episode"][-1] + 1 - total
    assert count > 0 and f"{count} episodes, " in out and "python act.py --dataset" in out
    assert not list(root.rglob("*.tmp"))


@pytest.mark.campaign
@pytest.mark.parametrize(("flags", "kills"), [("", 40), ("--videos --video-height 48 --num-envs 1", 20)])
def test_many_kills_and_appends_end_in_the_dataset_of_one_recording(tmp_path, flags, kills):
    """python -m pytest -m campaign tests/test_demos.py -s

    Half the kills come at any time from the program's start on, half at a moment at which files are being written, and
    that is after every third episode, so that there is progress between the kills.
    """
    rng, root, counts = np.random.default_rng(0), tmp_path / "demos", [0]
    states = np.zeros((0, 6), dtype=np.float32)
    flags = f"--policy jacobian {flags}"
    for kill in range(kills + 1):  # and one that comes to its end
        num_episodes = 3 if kill == kills else 5000
        process, files = start(root, f"--append --num-episodes {num_episodes} {flags}", 3), count_files(root)
        if kill < kills:
            wait_until(lambda now=kill % 2 == 0, files=files: now or count_files(root) != files, process)
            time.sleep(rng.uniform(0.0, 0.3 if kill % 2 else 10.0))
            process.kill()
        _, error = process.communicate(timeout=600)
        assert process.returncode == (-signal.SIGKILL if kill < kills else 0), error
        info = root / "meta" / "info.json"
        counts.append(json.loads(info.read_text())["total_episodes"] if info.exists() else 0)
        assert counts[-1] >= counts[-2]
        if counts[-1]:
            demos = load_demos(root)
            assert demos["episode"][-1] + 1 == counts[-1]
            assert_array_equal(demos["state"][: len(states)], states)  # what was there
            states = demos["state"]
            for number in range(counts[-2], counts[-1]) if "--videos" in flags else ():
                for camera in lerobot_dataset.CAMERAS:
                    film = root / "videos" / f"observation.images.{camera}" / "chunk-000" / f"file-{number:03d}.mp4"
                    assert imageio.get_reader(film).count_frames() == np.sum(demos["episode"] == number)
    assert counts[-1] == counts[-2] + 3
    print(f"{kills} kills {flags}; episodes after each: {counts}")
    reference = start(tmp_path / "whole", f"--num-episodes {counts[-1]} --policy jacobian")
    assert reference.communicate(timeout=600) and reference.returncode == 0
    whole = load_demos(tmp_path / "whole")
    for key, values in load_demos(root).items():
        assert_array_equal(values, whole[key])
    assert not list(root.rglob("*.tmp"))


# The command


def test_the_same_command_gives_the_same_bytes_and_append_takes_new_seeds(tmp_path, monkeypatch, capsys):
    for name in ("a", "b"):  # of the policy in assets/
        assert (
            run_cli(f"--num-episodes 3 --only-successes --noise-std 0.2 --output-dir {name}", monkeypatch, tmp_path)
            == 0
        )
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")
    assert run_cli("--policy jacobian --num-episodes 2 --append --output-dir b", monkeypatch, tmp_path) == 0
    out = capsys.readouterr().out
    assert "3 episodes, " in out and "5 episodes in b; train on them: python act.py --dataset b" in out
    demos = load_demos(tmp_path / "b")
    starts = demos["environment_state"][np.flatnonzero(np.diff(demos["episode"], prepend=-1)), :2]
    assert len(np.unique(starts, axis=0)) == 5  # where the sheets lay


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--num-episodes 0", "--num-episodes"),
        ("--seed 999990 --num-episodes 20", "held-out"),
        ("--noise-std nan", "--noise-std"),
        ("--videos --video-height 100", "--video-height"),
        ("--policy magic", "magic"),
        ("--policy il", "needs --il-checkpoint"),
        ("--model-path nowhere.pt", "no checkpoint at nowhere.pt"),
        ("--teleop keyboard --noise-std 0.1", "--noise-std"),
        ("--teleop keyboard", "display"),
        ("--output-dir file/demos", "file"),
    ],
)
def test_mistakes_are_told_and_write_nothing(tmp_path, monkeypatch, capsys, flags, message):
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "file").write_text("")
    assert run_cli(flags, monkeypatch, tmp_path) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


# Teleoperation


class StubViewer:
    """In the place of an environment: shows frames, and presses keys in them."""

    act_scale, to_si, OBS = 0.02, staticmethod(to_si), OBS

    def __init__(self, presses=()):
        self.presses, self.key_callback = list(presses), None

    def render(self):
        for key in self.presses.pop(0):
            self.key_callback(key)


@pytest.fixture(scope="module")
def home_obs():
    return make_envs().reset(seed=0)[0]


def moved_by(obs, action):
    """Motion (6,) of fingertip, pitch, heading and gripper that an action (1, 6) makes."""
    before = joint_targets(to_si(obs), PaperSquareVectorEnv)
    pose = [
        np.column_stack([kinematics(q)[0], q[:, 1:4].sum(axis=1), q[:, 0] - q[:, 4], q[:, 5]])[0]
        for q in (before, before + 0.02 * action)
    ]
    return pose[1] - pose[0]


CODES = {"Up": 265, "Down": 264, "Left": 263, "Right": 262, "Page Up": 266, "Page Down": 267}
DIRECTIONS = {"Up": (0, 1), "Down": (0, -1), "Left": (1, 1), "Right": (1, -1), "Page Up": (2, 1), "Page Down": (2, -1)}
DIRECTIONS |= {"6": (3, 1), "7": (3, -1), "8": (4, 1), "9": (4, -1), "=": (5, 1), "-": (5, -1)}


def test_each_key_moves_the_arm_by_its_motion_and_other_keys_do_nothing(home_obs):
    targets = joint_targets(to_si(home_obs), PaperSquareVectorEnv)
    for name, (axis, sign) in DIRECTIONS.items():
        motion = key_to_motion(CODES.get(name) or ord(name))
        assert np.flatnonzero(motion).tolist() == [axis] and np.sign(motion[axis]) == sign
        action = motion_to_action(targets, 0.1 * motion[None], 0.02)
        assert np.abs(action).max() < 1.0
        error = np.abs(moved_by(home_obs, action) - 0.1 * motion)
        assert error[:3].max() < 3e-5 and error[3:].max() < 5e-4  # m, rad
    for key in (ord("Q"), ord(" "), 256, 300):
        assert not key_to_motion(key).any()
    fast = np.array([[0.03, -0.02, 0.0, 0.0, 0.0, 0.1]])  # is scaled as a whole
    fast, slow = (motion_to_action(targets, scale * fast, 0.02) for scale in (1.0, 0.1))
    assert_allclose(np.abs(fast).max(), 1.0)
    assert_allclose(fast / np.linalg.norm(fast), slow / np.linalg.norm(slow))


def test_an_episode_waits_for_its_first_key_and_ends_by_a_verdict(home_obs):
    viewer = StubViewer([[257], [], [ord("Q")], [263, 263]])  # Enter before the episode began is no verdict
    policy = KeyboardPolicy(viewer, stop=lambda: False)
    total = moved_by(home_obs, policy(home_obs))
    assert viewer.presses == [] and policy.verdict == ""  # it showed frames until the key came
    for _ in range(20):
        total = total + moved_by(home_obs, policy(home_obs))
    assert_allclose(total[:3], [0.0, 2 * record_demos.PRESS[1], 0.0], atol=0.001)  # both presses in full
    assert not policy(home_obs).any()
    for key, verdict in ((257, "save"), (259, "discard")):
        viewer.key_callback(key)
        policy(home_obs)
        assert policy.verdict == verdict
        policy.reset(np.ones(1, dtype=bool))
        assert policy.verdict == ""
        policy.begun = True
    assert not KeyboardPolicy(StubViewer(), stop=lambda: True)(home_obs).any()  # a closed window ends the waiting


def test_the_verdict_ends_the_episode():
    class Judge(ZeroPolicy):
        verdicts = ["", "", "discard", "", "save", "save"]

        def __call__(self, obs, mask=None):
            self.verdict = self.verdicts.pop(0)
            return super().__call__(obs)

    dropped, first, second = record(2, 1, policy=Judge())
    assert dropped is None and (first["seed"], second["seed"]) == (1, 2)
    assert first["next.done"].tolist() == [False, True] and len(second["action"]) == 1
    assert not first["next.success"].any()


def test_the_viewer_gets_the_key_callback(monkeypatch):
    class Window:
        running = True

        def sync(self):
            pass

        def is_running(self):
            return self.running

        def close(self):
            self.running = False

    launched, window, pressed = {}, Window(), []
    monkeypatch.setenv("DISPLAY", ":0")
    monkeypatch.setattr(mujoco.viewer, "launch_passive", lambda *args, **kwargs: (launched.update(kwargs), window)[1])
    envs = make_envs(render_mode="human")
    envs.key_callback = pressed.append
    envs.reset(seed=0)
    envs.render()
    launched["key_callback"](265)
    assert pressed == [265] and not envs.viewer_closed
    window.close()
    assert envs.viewer_closed
    envs.close()


# Videos


def test_videos_show_the_frames_and_append(tmp_path):
    try:
        check_rendering()
    except UserError as error:  # neither EGL nor OSMesa
        pytest.skip(str(error))
    cameras, root, seen = ("top", "wrist"), tmp_path / "demos", []

    class Watching(JacobianIKPolicy):
        def __call__(self, obs):
            seen.append({camera: obs[camera][0].copy() for camera in cameras})
            return super().__call__(obs)

    envs, features = make_envs(steps=4, pixels=cameras, pixel_size=48), make_features(cameras=cameras, video_height=48)
    for _ in range(2):
        dataset = appended(root, features)
        for episode in record_episodes(Watching(), envs, dataset.next_seed, 1, cameras=cameras):
            dataset.add(episode)
        dataset.flush()
    info, stats = json_of(root, "info"), json_of(root, "stats")
    assert info["video_path"] == "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
    rows = pq.read_table(root / "meta" / "episodes").sort_by("episode_index").to_pylist()
    demos = load_demos(root, cameras=cameras, size=48)
    assert demos["state"].shape == (8, 6) and not demos["environment_state"].any()
    for camera in cameras:
        key = f"observation.images.{camera}"
        feature = info["features"][key]
        assert (feature["dtype"], feature["shape"]) == ("video", [48, 48, 3])
        assert feature["names"] == ["height", "width", "channels"] and feature["info"]["video.fps"] == 30
        frames = np.stack([frame[camera] for frame in seen]).reshape(2, 4, 48, 48, 3)
        for k in range(2):
            film = np.stack(imageio.mimread(root / "videos" / key / "chunk-000" / f"file-00{k}.mp4"))
            assert film.shape == (4, 48, 48, 3)
            assert np.abs(film.astype(float) - frames[k]).mean() < 12  # compression
            assert_array_equal(demos[camera][4 * k : 4 * k + 4], film)
            assert (rows[k][f"videos/{key}/chunk_index"], rows[k][f"videos/{key}/file_index"]) == (0, k)
            assert rows[k][f"videos/{key}/from_timestamp"] == 0.0
            assert_allclose(rows[k][f"videos/{key}/to_timestamp"], 4 / 30)
        sampled = frames[:, 0].reshape(-1, 3) / 255  # every tenth frame
        assert_allclose(np.squeeze(stats[key]["mean"]), sampled.mean(axis=0))
        assert_allclose(np.squeeze(stats[key]["std"]), sampled.std(axis=0))
        assert np.shape(stats[key]["max"]) == (3, 1, 1) and stats[key]["count"] == [2]
    assert load_demos(root, 1, cameras=["top"], size=16)["top"].shape == (4, 16, 16, 3)
    assert "observation.images.top" not in pq.read_table(root / "data").column_names
    assert load_demos(root)["environment_state"].shape == (8, 15)
    refused(partial(load_demos, cameras=["side"]), root, "--videos")
    refused(appended, root, "same features")
    edit_json(root / "meta" / "info.json", video_path="../{video_key}{chunk_index}{file_index}")
    refused(lambda root: appended(root, features), root, "same features")
    refused(partial(load_demos, cameras=["top"]), root, "video_path")


def test_videos_of_several_episodes_in_a_file_and_of_other_sizes(tmp_path):
    root, k = tmp_path / "demos", np.arange(7)
    frames = np.zeros((7, 48, 64, 3), dtype=np.uint8) + (30 * k + 20).astype(np.uint8)[:, None, None, None]
    frames[:, :, :8] = frames[:, :, -8:] = 0  # outside of the middle
    film = root / "videos" / "observation.images.top" / "chunk-000" / "file-000.mp4"
    film.parent.mkdir(parents=True)
    film.write_bytes(encode_mp4(frames, fps=30, codec="libx264", macro_block_size=8))
    info = {"total_episodes": 2, "fps": 30, "features": {"observation.images.top": {"dtype": "video"}}}
    info["video_path"] = f"videos/{{video_key}}/{lerobot_dataset.PATH}.mp4"
    episodes = {"episode_index": [0, 1], "length": [3, 4]}
    episodes |= {f"videos/observation.images.top/{name}": [0, 0] for name in ("chunk_index", "file_index")}
    episodes["videos/observation.images.top/from_timestamp"] = [0.0, 3 / 30]
    (root / "meta" / "episodes" / "chunk-000").mkdir(parents=True)
    pq.write_table(pa.table(episodes), root / "meta" / "episodes" / "chunk-000" / "file-000.parquet")
    found = lerobot_dataset.read_video(root, info, "top", 2, 16)
    assert found.shape == (7, 16, 16, 3)
    assert_allclose(found.reshape(7, -1).mean(axis=1), 30 * k + 20, atol=6)
