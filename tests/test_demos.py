"""record_demos.py: the dataset on disk, what is recorded, append and interruption, noise, teleoperation, videos."""

import json
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import mujoco
import mujoco.viewer
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from gymnasium.vector import AutoresetMode
from numpy.testing import assert_allclose, assert_array_equal

import eval as evaluation
import lerobot_dataset
import record_demos
from base_policies import ArmKinematics, JacobianIKPolicy, ZeroPolicy, joint_targets, joints_to_lerobot, joints_to_rad
from env_paper_square import JOINTS, OBS, SCENE_PATH, PaperSquareVectorEnv, to_si
from lerobot_dataset import Dataset, load_demos, load_task, make_features
from record_demos import KeyboardPolicy, motion_to_action, record_episodes
from runs import UserError, describe_env

ROOT = Path(__file__).resolve().parent.parent
FRAME_KEYS = ("observation.state", "observation.environment_state", "action")
QUANTILES = {"q01": 0.01, "q10": 0.1, "q50": 0.5, "q90": 0.9, "q99": 0.99}
ANGLES = slice(0, 5)
ENV = describe_env(PaperSquareVectorEnv, {})


def make_envs(num_envs=2, steps=30, **kwargs):
    return PaperSquareVectorEnv(
        num_envs, max_episode_steps=steps, autoreset_mode=AutoresetMode.DISABLED, num_threads=1, **kwargs
    )


def record(num_episodes, num_envs=2, steps=30, policy=None, seed=0, **kwargs):
    envs = make_envs(num_envs, steps)
    episodes = list(record_episodes(policy or JacobianIKPolicy(), envs, seed, num_episodes, **kwargs))
    envs.close()
    return episodes


def save(root, episodes, flush_every=3, append=False):
    dataset = Dataset(root, make_features(), ENV, append, flush_every)
    for episode in episodes:
        dataset.add(episode)
    dataset.flush()
    return dataset


def files_of(root):
    paths = [path for path in root.rglob("*") if path.is_file() and path.suffix != ".lock"]
    return {str(path.relative_to(root)): path.read_bytes() for path in paths}


def run_cli(flags, monkeypatch, folder):
    """Run record_demos.py as `python record_demos.py flags` would, in `folder`; returns the exit code."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["record_demos.py", *shlex.split(flags), "--num-threads", "1"])
    if not (folder / "assets").exists():
        (folder / "assets").symlink_to(ROOT / "assets")
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        runpy.run_path(str(ROOT / "record_demos.py"), run_name="__main__")
    except SystemExit as end:
        return end.code
    except (UserError, OSError) as error:  # what the hook of `parse` does
        print(f"error: {error}", file=sys.stderr)
        return 2
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


# The format


def test_files_are_those_of_the_format(written):
    parquet = [f"{part}/chunk-000/file-00{k}.parquet" for part in ("data", "meta/episodes") for k in range(3)]
    meta = {"meta/info.json", "meta/stats.json", "meta/tasks.parquet"}
    assert set(files_of(written)) == {*meta, "meta/environment.json", *parquet}


def test_info_json(written):
    scalars = {"next.reward": "float32", "next.done": "bool", "next.success": "bool", "timestamp": "float32"}
    scalars |= dict.fromkeys(("frame_index", "episode_index", "index", "task_index"), "int64")
    joints = ["shoulder_pan.pos", "shoulder_lift.pos", "elbow_flex.pos", "wrist_flex.pos", "wrist_roll.pos"]
    info = json.loads((written / "meta" / "info.json").read_text())
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
    for key in ("observation.state", "action"):
        assert features.pop(key) == {"dtype": "float32", "shape": [6], "names": [*joints, "gripper.pos"]}
    names = features["observation.environment_state"].pop("names")
    assert len(set(names)) == 14 and names[0] == "sheet_pos_0" and names[-1] == "hold_counter_0"
    assert features.pop("observation.environment_state") == {"dtype": "float32", "shape": [14]}
    assert features == {key: {"dtype": kind, "shape": [1], "names": None} for key, kind in scalars.items()}


def test_data_files(written, episodes):
    types = {"observation.state": pa.list_(pa.float32(), 6), "action": pa.list_(pa.float32(), 6)}
    types |= {"observation.environment_state": pa.list_(pa.float32(), 14), "next.reward": pa.float32()}
    types |= {"next.done": pa.bool_(), "next.success": pa.bool_(), "timestamp": pa.float32()}
    types |= dict.fromkeys(("frame_index", "episode_index", "index", "task_index"), pa.int64())
    index = 0
    for k, episode in enumerate(episodes):
        file = pq.ParquetFile(written / "data" / "chunk-000" / f"file-00{k // 3}.parquet")
        assert file.num_row_groups == (3, 3, 1)[k // 3]
        table = file.read_row_group(k % 3)  # one each
        assert dict(zip(table.column_names, table.schema.types, strict=True)) == types
        length = len(episode["action"])
        for key in (*FRAME_KEYS, "next.reward", "next.done", "next.success"):
            assert table[key].to_pylist() == episode[key].tolist()
        assert table["frame_index"].to_pylist() == list(range(length))
        assert table["index"].to_pylist() == list(range(index, index + length))
        assert_array_equal(table["timestamp"], (np.arange(length) / 30).astype(np.float32))
        assert set(table["episode_index"].to_pylist()) == {k} and set(table["task_index"].to_pylist()) == {0}
        index += length


def statistics(values):
    """What LeRobot expects for values (n, size), written down anew."""
    plain = {name: getattr(np, name)(values, axis=0) for name in ("min", "max", "mean", "std")}
    return plain | {"count": [len(values)]} | {name: np.quantile(values, q, axis=0) for name, q in QUANTILES.items()}


def test_episodes_and_their_statistics(written, episodes):
    start = 0
    for k, episode in enumerate(episodes):
        table = pq.read_table(written / "meta" / "episodes" / "chunk-000" / f"file-00{k // 3}.parquet")
        row, length = table.to_pylist()[k % 3], len(episode["action"])
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
        start += length
        assert len(found) == 11 * 10
        for key in (*FRAME_KEYS, "next.reward", "next.done"):
            for name, expected in statistics(episode[key].reshape(length, -1).astype(float)).items():
                assert_allclose(found[f"stats/{key}/{name}"], expected, atol=1e-9)
                kind = pa.int64() if name == "count" else pa.float64()
                if (key, name) in (("next.done", "min"), ("next.done", "max")):  # as LeRobot has them
                    kind = pa.bool_()
                assert table.schema.field(f"stats/{key}/{name}").type == pa.list_(kind)


def test_stats_json_covers_all_frames(written, episodes):
    stats = json.loads((written / "meta" / "stats.json").read_text())
    assert set(stats) == set(make_features())
    for key in (*FRAME_KEYS, "next.reward", "next.success"):
        values = np.concatenate([episode[key] for episode in episodes]).reshape(201, -1).astype(float)
        expected = statistics(values)
        assert set(stats[key]) == set(expected)
        for name in ("min", "max", "mean", "std", "count"):
            assert_allclose(stats[key][name], expected[name], atol=1e-9)
        for name, q in QUANTILES.items():  # as LeRobot merges them
            parts = [
                np.quantile(episode[key].astype(float), q, axis=0) * len(episode[key]) / 201 for episode in episodes
            ]
            assert_allclose(stats[key][name], np.ravel(np.sum(parts, axis=0)), atol=1e-6)
    assert stats["index"]["max"] == [200] and stats["episode_index"]["max"] == [6]


def test_the_task_is_the_index_of_the_data_frame(written):
    table = pq.read_table(written / "meta" / "tasks.parquet")
    assert table.to_pydict() == {"task_index": [0], "task": ["Slide the sheet of paper into the tape square."]}
    metadata = json.loads(table.schema.metadata[b"pandas"])
    assert metadata["index_columns"] == ["task"]
    assert {column["name"] for column in metadata["columns"]} == {"task_index", "task"}


# Reading


@pytest.mark.parametrize("num_episodes", [0, 1, 4])
def test_load_demos_returns_what_was_recorded(written, episodes, num_episodes):
    wanted = episodes[: num_episodes or None]
    demos = load_demos(written, num_episodes)
    assert list(demos) == ["state", "environment_state", "action", "episode"]
    for key in FRAME_KEYS:
        values = demos[key.removeprefix("observation.")]
        assert values.dtype == np.float32
        assert_array_equal(values, np.concatenate([episode[key] for episode in wanted]))
    assert demos["episode"].dtype == np.int64
    assert_array_equal(demos["episode"], np.repeat(np.arange(len(wanted)), [len(e["action"]) for e in wanted]))


def test_load_demos_reads_other_layouts(dataset, episodes):
    """All episodes in one file, lists of any length, other columns, and frames that info.json does not count."""
    files = sorted((dataset / "data").rglob("*.parquet"))
    table = pa.concat_tables([pq.read_table(path) for path in files])
    for key in FRAME_KEYS:
        lists = pa.array(table[key].to_pylist(), pa.list_(pa.float32()))
        table = table.set_column(table.column_names.index(key), key, lists)
    for path in files:
        path.unlink()
    pq.write_table(table.drop_columns("next.reward"), dataset / "data" / "chunk-000" / "file-000.parquet")
    paths = sorted((dataset / "meta" / "episodes").rglob("*.parquet"))
    rows = pa.concat_tables([pq.read_table(path) for path in paths])
    rows = rows.select(["episode_index", "length", "data/chunk_index", "data/file_index"])
    rows = rows.set_column(3, "data/file_index", pa.array([0] * 7)).set_column(2, "data/chunk_index", pa.array([0] * 7))
    for path in paths[1:]:
        path.unlink()
    pq.write_table(rows, paths[0])
    edit_info(dataset, total_episodes=5, total_frames=sum(len(e["action"]) for e in episodes[:5]))
    assert_array_equal(load_demos(dataset)["action"], np.concatenate([e["action"] for e in episodes[:5]]))


def edit_info(root, **changes):
    info = json.loads((root / "meta" / "info.json").read_text()) | changes
    (root / "meta" / "info.json").write_text(json.dumps(info))


def edit_data(root, key, change):
    path = root / "data" / "chunk-000" / "file-000.parquet"
    table = pq.read_table(path)
    pq.write_table(table.set_column(table.column_names.index(key), key, change(table[key])), path)


def edit_features(root, change):
    features = json.loads((root / "meta" / "info.json").read_text())["features"]
    change(features)
    edit_info(root, features=features)


def with_nan(column):
    values = column.to_pylist()
    values[3][1] = float("nan")
    return pa.array(values, column.type)


DAMAGE = {
    "no info.json": lambda root: (root / "meta" / "info.json").unlink(),
    "no folder": shutil.rmtree,
    "broken JSON": lambda root: (root / "meta" / "info.json").write_text('{"codebase_version": "v3.0",'),
    "JSON of something else": lambda root: (root / "meta" / "info.json").write_text("[1, 2]"),
    "binary info.json": lambda root: (root / "meta" / "info.json").write_bytes(b"\xff\xfe\x00"),
    "older format": lambda root: edit_info(root, codebase_version="v2.1"),
    "no episodes": lambda root: edit_info(root, total_episodes=0),
    "text for a count": lambda root: edit_info(root, total_episodes="many"),
    "more episodes than there are": lambda root: edit_info(root, total_episodes=9),
    "fewer episodes than there are": lambda root: edit_info(root, total_episodes=5),
    "no meta/episodes": lambda root: shutil.rmtree(root / "meta" / "episodes"),
    "no data": lambda root: shutil.rmtree(root / "data"),
    "data file cut short": lambda root: (root / "data/chunk-000/file-001.parquet").write_bytes(b"PAR1 and no more"),
    "empty data file": lambda root: (root / "data/chunk-000/file-001.parquet").write_bytes(b""),
    "episodes file cut short": lambda root: (root / "meta/episodes/chunk-000/file-000.parquet").write_bytes(b"PAR1"),
    "data file of other frames": lambda root: shutil.copy(
        root / "data/chunk-000/file-000.parquet", root / "data/chunk-000/file-001.parquet"
    ),
    "no feature": lambda root: edit_features(root, lambda features: features.pop("observation.environment_state")),
    "other shape": lambda root: edit_features(root, lambda features: features["action"].update(shape=[7])),
    "shape without data": lambda root: edit_data(root, "action", lambda column: pa.array([[1.0]] * len(column))),
    "ragged": lambda root: edit_data(
        root, "action", lambda c: pa.array([[0.0] * 5, [0.0] * 7, *c.to_pylist()[2:]], pa.list_(pa.float32()))
    ),
    "null": lambda root: edit_data(root, "action", lambda c: pa.array([None, *c.to_pylist()[1:]], c.type)),
    "NaN": lambda root: edit_data(root, "observation.state", with_nan),
    "text": lambda root: edit_data(root, "action", lambda column: pa.array([["a"] * 6] * len(column))),
    "frames in disorder": lambda root: edit_data(
        root, "frame_index", lambda column: pa.array(column.to_pylist()[::-1])
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_an_error_in_one_line(dataset, kind):
    DAMAGE[kind](dataset)
    with pytest.raises(ValueError) as caught:
        load_demos(dataset)
    assert str(dataset) in str(caught.value) and "\n" not in str(caught.value)


def damage_at_random(dataset, times):
    """Flip a bit of a file, or cut it short, and read; returns how often it was an error by file, and how often not.

    Whatever is no error must not have changed what is read: the bit was not of the data.
    """
    whole, rng, outcomes = load_demos(dataset), np.random.default_rng(0), Counter()
    for path in sorted(dataset / name for name in files_of(dataset)):
        content = path.read_bytes()
        for k in range(times):
            damaged, place = bytearray(content), rng.integers(len(content))
            if k % 5:
                damaged[place] ^= 1 << rng.integers(8)
            else:
                del damaged[place:]
            path.write_bytes(damaged)
            try:
                demos = load_demos(dataset)
            except ValueError as error:
                assert "\n" not in str(error) and str(dataset) in str(error)
                outcomes[path.relative_to(dataset).parts[0], "error"] += 1
            else:
                outcomes[path.relative_to(dataset).parts[0], "the same"] += 1
                for key, values in whole.items():
                    assert_array_equal(
                        demos[key], values, err_msg=f"{path.name}, {'bit' if k % 5 else 'cut'} at {place}"
                    )
            try:
                Dataset(dataset, make_features(), ENV, append=True)
            except ValueError as error:
                assert "\n" not in str(error)
        path.write_bytes(content)
    return outcomes


def test_flipped_bits_and_cut_files_are_noticed_or_change_nothing(dataset):
    outcomes = damage_at_random(dataset, 10)
    assert outcomes["data", "error"] > outcomes["data", "the same"]


@pytest.mark.campaign
def test_many_flipped_bits_and_cut_files(dataset):
    """python -m pytest -m campaign tests/test_demos.py -s"""
    print(damage_at_random(dataset, 1500))


@pytest.mark.parametrize("path", ["/etc/passwd", "../secret/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet", 7])
def test_a_dataset_does_not_choose_what_is_read(dataset, path):
    edit_info(dataset, data_path=path)
    with pytest.raises(UserError, match="data_path"):
        load_demos(dataset)


@pytest.mark.parametrize("link", ["data/chunk-000/file-000.parquet", "data/chunk-001", "meta/info.json"])
def test_links_out_of_a_dataset_are_refused_and_nothing_behind_them_is_cleared_away(dataset, tmp_path, link):
    (tmp_path / "elsewhere").mkdir()
    precious, path = tmp_path / "elsewhere" / "file-999.parquet", dataset / link
    precious.write_bytes(path.read_bytes() if path.exists() else b"mine")
    before = precious.read_bytes()
    path.unlink(missing_ok=True)
    path.symlink_to(precious if path.suffix else precious.parent)
    for use in (load_demos, lambda root: Dataset(root, make_features(), ENV, append=True)):
        with pytest.raises(UserError, match="is a link out of it"):
            use(dataset)
    assert precious.read_bytes() == before


def test_lengths_and_rows_that_unfold_are_refused_before_they_do(dataset, monkeypatch):
    path = dataset / "meta" / "episodes" / "chunk-000" / "file-000.parquet"
    table = pq.read_table(path)
    for length in (10**12, -1, 0):
        column = pa.array([length] * len(table))
        pq.write_table(table.set_column(table.schema.get_field_index("length"), "length", column), path)
        with pytest.raises(UserError, match="lengths below 1, or more than"):
            load_demos(dataset)
    monkeypatch.setattr(lerobot_dataset, "MOST_FRAMES", 10)
    monkeypatch.setattr(pq.ParquetFile, "read", None)
    with pytest.raises(ValueError, match="which is too much"):
        lerobot_dataset.read_table(dataset / "data" / "chunk-000" / "file-000.parquet", ["action"])


def test_too_few_episodes(written):
    with pytest.raises(ValueError, match="holds 7 episodes, and 8 are asked for"):
        load_demos(written, 8)


# What is recorded


def test_units_are_those_of_lerobot():
    low, high = mujoco.MjModel.from_xml_path(str(SCENE_PATH)).actuator_ctrlrange.T
    assert_allclose(joints_to_lerobot(low)[5], 0.0, atol=1e-12)
    assert_allclose(joints_to_lerobot(high)[5], 100.0)
    episode = record(1, 1, steps=2, policy=lambda_policy(lambda obs: np.tile([0, 0, 0, 0, 0, 1.0], (len(obs), 1))))[0]
    home = mujoco.MjModel.from_xml_path(str(SCENE_PATH)).key("home").qpos[:6]
    assert_allclose(episode["observation.state"][0][ANGLES], np.degrees(home[:5]), atol=1e-4)
    percent = 100 * (home[5] - low[5]) / (high[5] - low[5])
    assert_allclose(episode["observation.state"][0][5], percent, atol=1e-4)
    assert_allclose(episode["action"][:, 5], percent + 100 * 0.02 * np.array([1, 2]) / (high[5] - low[5]), atol=1e-3)
    assert_allclose(joints_to_rad(joints_to_lerobot(high)), high)


def lambda_policy(function):
    policy = ZeroPolicy()
    return type("Policy", (), {"__call__": lambda self, obs: function(obs), "reset": policy.reset})()


@pytest.mark.parametrize("seed", [0, 5])
def test_replaying_the_recorded_targets_gives_the_recorded_states(seed):
    episode = record(1, 1, steps=120, seed=seed)[0]
    envs = make_envs(1, steps=120)
    obs, _ = envs.reset(seed=seed)
    target = mujoco.MjModel.from_xml_path(str(SCENE_PATH)).key("home").ctrl
    moved = 0.0
    for k, wanted in enumerate(joints_to_rad(episode["action"].astype(float))):
        si = to_si(obs)[0]
        state = np.append(np.degrees(si[OBS["joint_pos"]][:5]), episode["observation.state"][k][5])
        assert_allclose(episode["observation.state"][k], state, atol=2e-3)
        sheet = episode["observation.environment_state"][k][:2] / 10.0 + [0.19, 0.0]  # m, OBS_ROWS' scale and zero
        assert_allclose(sheet, si[OBS["sheet_pos"]][:2], atol=1e-5)
        moved = max(moved, np.abs(sheet - [0.19, -0.09]).max())
        obs, rewards, terminations, truncations, _ = envs.step((wanted - target)[None] / envs.act_scale)
        assert_allclose(episode["next.reward"][k], rewards[0], atol=1e-5)
        assert episode["next.done"][k] == (terminations[0] or truncations[0])
        assert episode["next.success"][k] == terminations[0]
        target = wanted
    assert moved > 0.06  # the sheet was dragged in it


def test_success_is_recorded_on_the_last_frame():
    episode = record(1, 2, steps=400, only_successes=True)[-1]
    assert episode["next.success"].sum() == 1 and episode["next.success"][-1]
    assert episode["next.done"].sum() == 1 and episode["next.done"][-1]


def test_only_successes_are_the_first_ones_whatever_num_envs():
    everything = record(8, 4, steps=200)
    successful = [bool(episode["next.success"][-1]) for episode in everything]
    assert 2 <= sum(successful) < 8  # so there is something to drop
    count = sum(successful) - 1
    expected = [episode for episode, success in zip(everything, successful, strict=True) if success][:count]
    for num_envs in (1, 3):
        played = record(count, num_envs, steps=200, only_successes=True)
        kept = [episode for episode in played if episode]
        assert [episode["seed"] for episode in kept] == [episode["seed"] for episode in expected]
        assert len(played) == expected[-1]["seed"] + 1  # the dropped ones are told of, and none is played beyond
        for episode, other in zip(kept, expected, strict=True):
            assert_array_equal(episode["action"], other["action"])


def test_it_gives_up_on_a_policy_that_never_succeeds(monkeypatch):
    monkeypatch.setattr(record_demos, "GIVE_UP", 5)
    with pytest.raises(ValueError, match="5 episodes in a row failed"):
        record(1, 1, steps=3, policy=ZeroPolicy(), only_successes=True)


def test_a_stopped_recording_keeps_episodes_that_waited_for_an_earlier_one():
    """The first environment never ends within the steps; those of the others that ended are kept."""
    envs, steps = make_envs(3, 400), 0

    def stop():
        return steps > 60

    class EndsAll(ZeroPolicy):
        verdict = ""

        def __call__(self, obs, mask=None):
            nonlocal steps
            steps += 1
            envs._episode_steps[1:] = np.where(steps == 40, 399, envs._episode_steps[1:])
            return super().__call__(obs)

    kept = [episode["seed"] for episode in record_episodes(EndsAll(), envs, 5, 10, stop=stop)]
    assert kept == [6, 7]


def test_held_out_episodes_are_never_played():
    seed = evaluation.VALIDATION_SEED - 4
    assert [e["seed"] for e in record(4, 2, steps=3, policy=ZeroPolicy(), seed=seed)] == list(range(seed, seed + 4))
    with pytest.raises(ValueError, match="held-out"):
        record(1, 1, steps=3, policy=ZeroPolicy(), seed=seed, only_successes=True)


def test_noise_is_stationary_and_correlated():
    noise = np.stack([record_demos.draw_noise(seed, 60, 0.3, 0.8) for seed in range(400)])  # (400, 60, 6)
    assert_allclose(noise.std(axis=(0, 2)), 0.3, rtol=0.1)  # at every step, the first one too
    assert_allclose(np.mean(noise[:, 1:] * noise[:, :-1]) / 0.3**2, 0.8, atol=0.02)
    assert abs(noise.mean()) < 0.01
    assert not record_demos.draw_noise(0, 5, 0.0, 0.5).any()


def test_noise_disturbs_what_is_executed_not_what_is_recorded(monkeypatch):
    executed = []
    step = PaperSquareVectorEnv.step
    monkeypatch.setattr(
        PaperSquareVectorEnv, "step", lambda self, actions: (executed.append(actions[0].copy()), step(self, actions))[1]
    )
    always = np.tile([0.1, 0, 0, 0, 0, -0.1], (1, 1))
    episode = record(1, 1, steps=25, policy=lambda_policy(lambda obs: always), noise_std=0.2, noise_correlation=0.5)[0]
    assert_allclose(np.array(executed) - always, record_demos.draw_noise(0, 25, 0.2, 0.5))
    home = mujoco.MjModel.from_xml_path(str(SCENE_PATH)).key("home").ctrl
    reached = home + 0.02 * np.cumsum(np.clip(executed, -1, 1), axis=0)  # rad, joint targets after each step
    wanted = np.vstack([home, reached[:-1]]) + 0.02 * always
    assert_allclose(joints_to_rad(episode["action"].astype(float)), wanted, atol=1e-5)


def test_episodes_do_not_depend_on_num_envs():
    for episode, other in zip(record(5, 1, noise_std=0.3), record(5, 4, noise_std=0.3), strict=True):
        assert episode.keys() == other.keys()
        for key, values in episode.items():
            assert_array_equal(values, other[key])


# Append, interruption


def test_append_goes_on_and_leaves_what_is_there(dataset, episodes, written):
    before = files_of(dataset)
    added = save(dataset, record(2, seed=7), append=True)
    after = files_of(dataset)
    assert added.info["total_episodes"] == 9 and added.next_seed == 7
    for name, content in before.items():
        if not name.startswith("meta/") or "episodes" in name:
            assert after[name] == content
    new = set(after) - set(before)
    assert new == {"data/chunk-000/file-003.parquet", "meta/episodes/chunk-000/file-003.parquet"}
    nine = [*episodes, *record(2, seed=7)]
    assert_array_equal(load_demos(dataset)["state"], np.concatenate([e["observation.state"] for e in nine]))
    stats = json.loads((dataset / "meta" / "stats.json").read_text())["action"]
    actions = np.concatenate([e["action"] for e in nine]).astype(float)
    assert_allclose(stats["std"], actions.std(axis=0), atol=1e-9)
    assert stats["count"] == [261]


def test_append_clears_away_what_info_json_does_not_count(dataset):
    before = files_of(dataset)
    stray = [
        "data/chunk-000/file-003.parquet",
        "data/chunk-001/file-000.parquet",
        "data/chunk-000/file-001.parquet.tmp",
    ]
    stray += ["meta/episodes/chunk-000/file-004.parquet", "meta/episodes/chunk-000/file-003.parquet.tmp"]
    for name in [*stray, "notes.txt", "data/notes.txt"]:
        (dataset / name).parent.mkdir(exist_ok=True)
        (dataset / name).write_text("PAR1")
    rows = pq.read_table(dataset / "meta" / "episodes" / "chunk-000" / "file-002.parquet")
    rows = rows.set_column(0, "episode_index", pa.array([7]))
    pq.write_table(rows, dataset / "meta" / "episodes" / "chunk-000" / "file-004.parquet")
    assert load_demos(dataset)["episode"][-1] == 6
    Dataset(dataset, make_features(), ENV, append=True)
    after = files_of(dataset)
    assert {after.pop("notes.txt"), after.pop("data/notes.txt")} == {b"PAR1"}  # not ours
    assert after == before


def test_an_existing_folder_is_refused_without_append(dataset, tmp_path):
    before = files_of(dataset)
    with pytest.raises(ValueError, match="not empty.*--append"):
        Dataset(dataset, make_features(), ENV)
    assert files_of(dataset) == before
    (tmp_path / "other").mkdir()
    Dataset(tmp_path / "other", make_features(), ENV)  # an empty one is not
    (tmp_path / "other" / "notes.txt").write_text("mine")
    for append in (False, True):
        with pytest.raises(ValueError):
            Dataset(tmp_path / "other", make_features(), ENV, append)
    with pytest.raises(OSError, match="notes.txt"):
        Dataset(tmp_path / "other" / "notes.txt" / "demos", make_features(), ENV)


def test_a_dataset_says_which_environment_was_recorded(dataset, written):
    assert load_task(written) == (PaperSquareVectorEnv, {})
    with pytest.raises(UserError, match="same environment"):
        Dataset(dataset, make_features(), {**ENV, "kwargs": {"tape_half_size": 0.12}}, append=True)
    path = dataset / "meta" / "environment.json"
    path.write_text(path.read_text().replace("env_paper_square", "reproduce"))
    with pytest.raises(UserError, match="does not define PaperSquareVectorEnv"):
        load_task(dataset)
    path.unlink()  # LeRobot's own
    assert load_task(dataset)[1]["tape_half_size"] == 0.08


def test_another_process_has_a_dataset_to_itself(dataset):
    program = f"import runs, pathlib, time; runs.lock(pathlib.Path({str(dataset)!r})); print('held'); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-uc", program], cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(UserError, match="another process is writing"):
            Dataset(dataset, make_features(), ENV, append=True)
        process.kill()
    Dataset(dataset, make_features(), ENV, append=True)  # whatever became of it


def test_append_needs_the_same_features_and_a_dataset_of_its_own(dataset):
    before = files_of(dataset)
    with pytest.raises(ValueError, match="same features"):
        Dataset(dataset, make_features(video_height=48), ENV, append=True)
    assert files_of(dataset) == before
    path = dataset / "meta" / "episodes" / "chunk-000" / "file-001.parquet"
    pq.write_table(pq.read_table(path).replace_schema_metadata(), path)
    with pytest.raises(ValueError, match="no seeds"):
        Dataset(dataset, make_features(), ENV, append=True)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("renamed", [False, True])
def test_a_recording_killed_at_any_write_can_be_read_and_continued(tmp_path, monkeypatch, episodes, renamed):
    """Two flushes, of three episodes each; the process ends at each write, before or after the renaming."""
    replace = Path.replace
    moment, outcomes = 0, Counter()
    while True:
        root, left = tmp_path / f"{renamed}{moment}", moment

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
        except Killed:
            monkeypatch.setattr(Path, "replace", replace)
        else:
            break
        info = root / "meta" / "info.json"
        count = json.loads(info.read_text())["total_episodes"] if info.exists() else 0
        outcomes[count] += 1
        if count:
            assert_array_equal(load_demos(root)["action"], np.concatenate([e["action"] for e in episodes[:count]]))
        else:
            with pytest.raises(ValueError):
                load_demos(root)
        save(root, episodes[count:6], append=True)
        reference = tmp_path / "reference"
        if not reference.exists():
            save(reference, episodes[:6])
        assert {name for name in files_of(root) if not name.endswith(".tmp")} == set(files_of(reference))
        stats, expected = (json.loads((path / "meta" / "stats.json").read_text()) for path in (root, reference))
        for key in expected:
            for name, values in expected[key].items():
                assert_allclose(stats[key][name], values, atol=1e-9)
        (reference / "meta" / "stats.json").write_bytes((root / "meta" / "stats.json").read_bytes())  # but for rounding
        assert files_of(reference).items() <= files_of(root).items()
        moment += 1
    assert moment == 12 and outcomes[3] >= 4  # environment.json, info.json, then five files per flush
    monkeypatch.setattr(Path, "replace", replace)


def start(folder, flags, wait=True, flush_episodes=lerobot_dataset.FLUSH_EPISODES):
    program = f"""import lerobot_dataset, runpy
lerobot_dataset.FLUSH_EPISODES = {flush_episodes}
runpy.run_path("record_demos.py", run_name="__main__")"""
    process = subprocess.Popen(
        [sys.executable, "-c", program, "--num-threads", "1", "--output-dir", str(folder), *shlex.split(flags)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    until = time.monotonic() + 60
    while wait and not (folder / "meta" / "info.json").exists() and time.monotonic() < until:
        time.sleep(0.005)
    return process


def test_kill_9_leaves_a_dataset_that_append_continues(tmp_path, monkeypatch):
    process = start(tmp_path / "demos", "--num-episodes 5000")
    time.sleep(1.0)
    process.kill()
    process.wait()
    process.stdout.close(), process.stderr.close()
    info = json.loads((tmp_path / "demos" / "meta" / "info.json").read_text())
    total = info["total_episodes"]
    if total:
        assert load_demos(tmp_path / "demos")["episode"][-1] == total - 1
    assert run_cli("--append --num-episodes 2", monkeypatch, tmp_path) == 0
    assert load_demos(tmp_path / "demos")["episode"][-1] == total + 1


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
        process = start(root, f"--append --num-episodes {num_episodes} {flags}", wait=False, flush_episodes=3)
        if kill < kills:
            files = count_files(root)
            while kill % 2 and process.poll() is None and count_files(root) == files:
                time.sleep(0.005)
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
            if "--videos" in flags:
                check_films(root, demos["episode"], range(counts[-2], counts[-1]))
    assert counts[-1] == counts[-2] + 3
    print(f"{kills} kills {flags}; episodes after each: {counts}")
    reference = start(tmp_path / "whole", f"--num-episodes {counts[-1]} --policy jacobian")
    assert reference.communicate(timeout=600) and reference.returncode == 0
    whole = load_demos(tmp_path / "whole")
    for key, values in load_demos(root).items():
        assert_array_equal(values, whole[key])
    assert not list(root.rglob("*.tmp"))


def count_files(root):
    return sum(1 for _ in root.rglob("*"))


def check_films(root, episode, numbers):
    import imageio

    for number in numbers:
        for camera in lerobot_dataset.CAMERAS:
            film = root / "videos" / f"observation.images.{camera}" / "chunk-000" / f"file-{number:03d}.mp4"
            assert imageio.get_reader(film).count_frames() == np.sum(episode == number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_recording_with_whole_episodes(tmp_path, number):
    process = start(tmp_path / "demos", "--num-episodes 5000")
    time.sleep(0.1)
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 128 + number and "Traceback" not in err
    demos = load_demos(tmp_path / "demos")
    count = demos["episode"][-1] + 1
    assert f"{count} episodes, {len(demos['state'])} frames" in out and "python act.py --dataset" in out
    assert not list((tmp_path / "demos").rglob("*.tmp"))


# The command


def test_the_same_command_gives_the_same_bytes(tmp_path, monkeypatch, capsys):
    flags = "--policy jacobian --num-episodes 2 --noise-std 0.2 --seed 3 --output-dir"
    for name in ("a", "b"):
        assert run_cli(f"{flags} {name}", monkeypatch, tmp_path) == 0
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")
    out = capsys.readouterr().out
    assert "2 episodes, " in out and "train on them: python act.py --dataset b" in out


def test_the_default_policy_is_the_residual_one_and_append_takes_new_seeds(tmp_path, monkeypatch, capsys):
    assert run_cli("--num-episodes 3 --only-successes", monkeypatch, tmp_path) == 0
    assert run_cli("--num-episodes 2 --append", monkeypatch, tmp_path) == 0
    assert "5 episodes in demos" in capsys.readouterr().out
    demos = load_demos(tmp_path / "demos")
    starts = demos["environment_state"][np.flatnonzero(np.diff(demos["episode"], prepend=-1)), :2]
    assert len(np.unique(starts, axis=0)) == 5  # where the sheets lay


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--num-episodes 0", "--num-episodes"),
        ("--num-envs 0", "--num-envs"),
        ("--seed -1", "--seed"),
        ("--seed 999990 --num-episodes 20", "held-out"),
        ("--noise-std -1", "--noise-std"),
        ("--noise-std nan", "--noise-std"),
        ("--noise-correlation 1", "--noise-correlation"),
        ("--videos --video-height 100", "--video-height"),
        ("--policy magic", "magic"),
        ("--policy il", "needs --il-checkpoint"),
        ("--model-path nowhere", "no checkpoint at nowhere"),
        ("--teleop keyboard --noise-std 0.1", "--noise-std"),
        ("--teleop keyboard", "display"),
        ("--output-dir file/demos", "Not a directory: 'file/demos'"),
    ],
)
def test_mistakes_are_told_and_write_nothing(tmp_path, monkeypatch, capsys, flags, message):
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "file").write_text("")
    assert run_cli(flags, monkeypatch, tmp_path) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["assets", "file"] and not (tmp_path / "demos").exists()


# Teleoperation


class StubViewer:
    """In the place of an environment: shows frames, and presses keys in them."""

    act_scale, OBS, to_si = 0.02, OBS, staticmethod(to_si)

    def __init__(self, presses=()):
        self.presses, self.key_callback = list(presses), None

    def render(self):
        for key in self.presses.pop(0):
            self.key_callback(key)


@pytest.fixture(scope="module")
def home_obs():
    envs = make_envs(1)
    obs, _ = envs.reset(seed=0)
    return obs


def home_targets(obs):
    return joint_targets(to_si(obs), PaperSquareVectorEnv)


def moved_by(obs, action, kinematics):
    """Motion (n, 6) of fingertip, pitch, heading and gripper that actions make."""
    si = to_si(obs)
    before = si[:, OBS["joint_pos"]] + si[:, OBS["joint_target_error"]]
    after = before + 0.02 * action
    pose = [
        np.column_stack([kinematics(q)[0], q[:, 1:4].sum(axis=1), q[:, 0] - q[:, 4], q[:, 5]]) for q in (before, after)
    ]
    return pose[1] - pose[0]


DIRECTIONS = {"Up": (0, 1), "Down": (0, -1), "Left": (1, 1), "Right": (1, -1), "Page Up": (2, 1), "Page Down": (2, -1)}
DIRECTIONS |= {"6": (3, 1), "7": (3, -1), "8": (4, 1), "9": (4, -1), "=": (5, 1), "-": (5, -1)}


@pytest.mark.parametrize("name", DIRECTIONS)
def test_a_key_moves_the_arm_by_its_motion(name, home_obs):
    codes = {"Up": 265, "Down": 264, "Left": 263, "Right": 262, "Page Up": 266, "Page Down": 267}
    motion = record_demos.key_to_motion(codes.get(name) or ord(name))
    axis, sign = DIRECTIONS[name]
    assert np.flatnonzero(motion).tolist() == [axis] and np.sign(motion[axis]) == sign
    small = motion * 0.1
    action = motion_to_action(home_targets(home_obs), small[None], 0.02, ArmKinematics())
    assert np.abs(action).max() < 1.0
    error = np.abs(moved_by(home_obs, action, ArmKinematics())[0] - small)
    assert error[:3].max() < 3e-5 and error[3:].max() < 5e-4  # m, rad


def test_other_keys_do_nothing():
    for key in (ord("Q"), ord(" "), 256, 300):
        assert not record_demos.key_to_motion(key).any()


def test_a_motion_too_fast_is_scaled_as_a_whole(home_obs):
    motion = np.array([[0.03, -0.02, 0.0, 0.0, 0.0, 0.1]])
    action = motion_to_action(home_targets(home_obs), motion, 0.02, ArmKinematics())
    assert_allclose(np.abs(action).max(), 1.0)
    slow = motion_to_action(home_targets(home_obs), 0.1 * motion, 0.02, ArmKinematics())
    assert_allclose(action / np.linalg.norm(action), slow / np.linalg.norm(slow))


def test_an_episode_waits_for_its_first_key_and_a_press_is_made_in_full(home_obs):
    viewer = StubViewer([[], [], [ord("Q")], [263, 263]])
    policy = KeyboardPolicy(viewer, stop=lambda: False)
    kinematics = ArmKinematics()
    total = moved_by(home_obs, policy(home_obs), kinematics)
    assert viewer.presses == []  # it showed frames until the key came
    for _ in range(20):
        total = total + moved_by(home_obs, policy(home_obs), kinematics)
    assert_allclose(total[0, :3], [0.0, 2 * record_demos.PRESS[1], 0.0], atol=0.001)
    assert not policy(home_obs).any() and policy.verdict == ""


def test_enter_saves_and_backspace_discards(home_obs):
    viewer = StubViewer([[257], [264]])  # Enter before the episode began
    policy = KeyboardPolicy(viewer, stop=lambda: False)
    policy(home_obs)
    assert policy.verdict == "" and viewer.presses == []
    viewer.key_callback(257)
    policy(home_obs)
    assert policy.verdict == "save"
    policy.reset(np.ones(1, dtype=bool))
    assert policy.verdict == ""
    viewer.key_callback(259)
    policy(home_obs)
    assert policy.verdict == "discard"


def test_a_closed_window_ends_the_waiting(home_obs):
    assert not KeyboardPolicy(StubViewer(), stop=lambda: True)(home_obs).any()


def test_the_verdict_ends_the_episode():
    class Judge(ZeroPolicy):
        verdicts = ["", "", "discard", "", "save", "save"]

        def __call__(self, obs, mask=None):
            self.verdict = self.verdicts.pop(0)
            return super().__call__(obs)

    dropped, first, second = record(2, 1, policy=Judge())
    assert dropped is None
    assert (first["seed"], second["seed"]) == (1, 2)
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

    launched = {}
    window = Window()
    monkeypatch.setenv("DISPLAY", ":0")
    monkeypatch.setattr(mujoco.viewer, "launch_passive", lambda *args, **kwargs: (launched.update(kwargs), window)[1])
    envs = make_envs(1, render_mode="human")
    pressed = []
    envs.key_callback = pressed.append
    envs.reset(seed=0)
    assert not envs.viewer_closed
    envs.render()
    launched["key_callback"](265)
    assert pressed == [265] and not envs.viewer_closed
    window.close()
    assert envs.viewer_closed
    envs.close()


# Videos


def test_videos_show_the_frames_and_append(tmp_path, monkeypatch):
    try:
        evaluation.check_rendering()
    except RuntimeError as error:  # neither EGL nor OSMesa
        pytest.skip(str(error))
    import imageio

    envs = make_envs(1, steps=4, height=48, width=64)
    root = tmp_path / "demos"
    frames = []
    render_frame = envs.render_frame
    monkeypatch.setattr(
        envs, "render_frame", lambda i, camera: (frames.append((camera, render_frame(i, camera))), frames[-1][1])[1]
    )
    for append in (False, True):
        dataset = Dataset(root, make_features(video_height=48), ENV, append)
        for episode in record_episodes(JacobianIKPolicy(), envs, dataset.next_seed, 1, cameras=lerobot_dataset.CAMERAS):
            dataset.add(episode)
        dataset.flush()
    envs.close()
    info = json.loads((root / "meta" / "info.json").read_text())
    stats = json.loads((root / "meta" / "stats.json").read_text())
    assert info["video_path"] == "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
    rows = pq.read_table(root / "meta" / "episodes").sort_by("episode_index").to_pylist()
    for camera in ("top", "side", "wrist"):
        key = f"observation.images.{camera}"
        feature = info["features"][key]
        assert (feature["dtype"], feature["shape"]) == ("video", [48, 64, 3])
        assert feature["names"] == ["height", "width", "channels"] and feature["info"]["video.fps"] == 30
        seen = np.stack([frame for name, frame in frames if name == camera]).reshape(2, 4, 48, 64, 3)
        for k in range(2):
            film = np.stack(imageio.mimread(root / "videos" / key / "chunk-000" / f"file-00{k}.mp4"))
            assert film.shape == (4, 48, 64, 3)
            assert np.abs(film.astype(float) - seen[k]).mean() < 12  # compression
            assert (rows[k][f"videos/{key}/chunk_index"], rows[k][f"videos/{key}/file_index"]) == (0, k)
            assert rows[k][f"videos/{key}/from_timestamp"] == 0.0
            assert_allclose(rows[k][f"videos/{key}/to_timestamp"], 4 / 30)
        sampled = seen[:, 0].reshape(-1, 3) / 255  # every tenth frame
        assert_allclose(np.squeeze(stats[key]["mean"]), sampled.mean(axis=0))
        assert_allclose(np.squeeze(stats[key]["std"]), sampled.std(axis=0))
        assert np.shape(stats[key]["max"]) == (3, 1, 1) and stats[key]["count"] == [2]
    assert "observation.images.top" not in pq.read_table(root / "data").column_names
    assert load_demos(root)["state"].shape == (8, 6)
    assert len(JOINTS) == 6
