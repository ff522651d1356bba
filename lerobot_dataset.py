"""LeRobotDataset v3.0, the folder that demonstrations are kept in: written and read with pyarrow alone.

`Dataset` writes what record_demos.py records, some episodes at a time, meta/info.json last: however a recording ends,
the folder holds the episodes that info.json counts. `load_demos` reads such a folder, this project's or LeRobot's own.
"""

import itertools
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from torch.utils.data import TensorDataset

from base_policies import env_state_rows, joints_to_rad
from env_paper_square import JOINTS, POLICY_HZ, EnvArgs, PaperSquareVectorEnv, eval_kwargs, with_defaults
from figures import decode_mp4, encode_mp4, shrink
from runs import UserError, digest, env_of, lock, write_json, write_whole

TASK_FILE = "meta/environment.json"  # this project's own: which environment was recorded
TASK = "Slide the sheet of paper into the tape square."
KEYS = ("observation.state", "observation.environment_state", "action")  # that imitation needs
CAMERAS = ("top", "side", "wrist")
FLUSH_EPISODES = 25  # written at a time
QUANTILES = {"q01": 0.01, "q10": 0.1, "q50": 0.5, "q90": 0.9, "q99": 0.99}
STATISTICS = ("min", "max", "mean", "std", "count", *QUANTILES)
PER_FOLDER = 1000  # files, LeRobot's chunks_size
PATH = "chunk-{chunk_index:03d}/file-{file_index:03d}"  # of this project's datasets and of LeRobot's
MOST_FRAMES = 10**7  # 1 GB in memory: 25,000 episodes of full length
MOST_BYTES = 2**32  # of one file, unpacked; LeRobot makes files of 100 MB


def make_features(
    env: type = PaperSquareVectorEnv, cameras: Sequence[str] = (), video_height: int = 96
) -> dict[str, dict]:
    """The features of info.json, in the order of the data's columns; the cameras' videos are as wide as high, pixels.

    `env` is the class of the environment that is recorded.
    """
    joints = [f"{joint}.pos" for joint in JOINTS]
    rows = [f"{name}_{k}" for name in env_state_rows(env) for k in range(len(env.OBS_ROWS[name][0]))]
    video = {
        "video.height": video_height,
        "video.width": video_height,
        "video.codec": "h264",
        "video.pix_fmt": "yuv420p",
        "video.is_depth_map": False,
        "video.fps": POLICY_HZ,
        "video.channels": 3,
        "has_audio": False,
    }
    shape = [video_height, video_height, 3]
    film = {"dtype": "video", "shape": shape, "names": ["height", "width", "channels"], "info": video}
    return {
        "observation.state": {"dtype": "float32", "shape": [len(joints)], "names": joints},
        "observation.environment_state": {"dtype": "float32", "shape": [len(rows)], "names": rows},
        "action": {"dtype": "float32", "shape": [len(joints)], "names": joints},
        "commanded": {"dtype": "float32", "shape": [len(joints)], "names": joints},  # the targets before the action
        "next.reward": {"dtype": "float32", "shape": [1], "names": None},
        "next.done": {"dtype": "bool", "shape": [1], "names": None},
        "next.success": {"dtype": "bool", "shape": [1], "names": None},
        **{f"observation.images.{camera}": film for camera in cameras},
        "timestamp": {"dtype": "float32", "shape": [1], "names": None},
        **{
            name: {"dtype": "int64", "shape": [1], "names": None}
            for name in ("frame_index", "episode_index", "index", "task_index")
        },
    }


@contextmanager
def readable(root: Path) -> Iterator[None]:
    """Turn whatever reading a dataset raises into a UserError."""
    try:
        yield
    except (
        *(OSError, LookupError, TypeError, AttributeError, ValueError, ArithmeticError, RecursionError, MemoryError),
        pa.ArrowException,
    ) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"cannot use {root} as a dataset of demonstrations: {reason}") from error


def read_info(root: Path) -> dict:
    """meta/info.json; raises ValueError if it is not that of a LeRobotDataset v3.0, or if its folder has links out."""
    if not (root / "meta" / "info.json").is_file():
        raise ValueError("it has no meta/info.json; record some: python record_demos.py --output-dir FOLDER")
    for path in root.rglob("*"):
        if path.is_symlink() and not path.resolve().is_relative_to(root.resolve()):
            raise ValueError(f"{path.relative_to(root)} is a link out of it: put the file itself there")
    info = json.loads((root / "meta" / "info.json").read_text())
    if info["codebase_version"] != "v3.0":
        raise ValueError(f"its codebase_version is {info['codebase_version']!r:.100}, not v3.0")
    for key in ("total_episodes", "total_frames"):
        if type(info[key]) is not int or not 0 <= info[key] <= MOST_FRAMES:
            raise ValueError(f"its {key} is {info[key]!r:.100}, not a number from 0 to {MOST_FRAMES:,}")
    return info


def read_table(path: Path, columns: Sequence[str]) -> pa.Table:
    """Columns of a Parquet file; raises ValueError before too much memory is taken."""
    with pq.ParquetFile(path, page_checksum_verification=True) as file:  # which this project writes
        # Of row groups: where the metadata of a column is damaged, asking for it ends the process (pyarrow 25)
        size = sum(file.metadata.row_group(k).total_byte_size for k in range(file.metadata.num_row_groups))
        if not (0 <= file.metadata.num_rows <= MOST_FRAMES and 0 <= size <= MOST_BYTES):
            rows = f"{file.metadata.num_rows:,} rows"
            raise ValueError(f"{path.name} has {rows}, {size:,} bytes unpacked, which is too much")
        return file.read(columns=list(columns)).replace_schema_metadata()


def read_episodes(root: Path, total: int, columns: Sequence[str]) -> pa.Table:
    """Columns of the first `total` episodes of meta/episodes, in order; raises ValueError if there are fewer."""
    paths = sorted((root / "meta" / "episodes").glob("chunk-*/file-*.parquet"))
    tables = [read_table(path, ["episode_index", *columns]) for path in paths]
    episodes = pa.concat_tables(tables).sort_by("episode_index")[:total] if tables else {"episode_index": pa.array([])}
    if episodes["episode_index"].to_pylist() != list(range(total)):
        raise ValueError(f"its meta/episodes does not hold the {total} episodes asked for")
    return episodes


def read_frames(root: Path, info: dict, sizes: dict[str, int], num_episodes: int) -> dict[str, np.ndarray]:
    """The first episodes' features by name, (frames, size), or (frames,) of size 1; raises ValueError."""
    for key, size in sizes.items():
        if key not in info["features"]:
            raise ValueError(f"it lacks the feature {key}")
        if list(info["features"][key]["shape"]) != [size]:
            raise ValueError(f"its {key} has the shape {info['features'][key]['shape']!r:.100}, not [{size}]")
    episodes = read_episodes(root, info["total_episodes"], ("length", "data/chunk_index", "data/file_index"))
    lengths = episodes["length"].to_numpy()
    if not 0 < lengths.min() <= lengths.max() <= MOST_FRAMES or lengths.sum() != info["total_frames"]:
        raise ValueError(f"its meta/episodes does not hold the {info['total_frames']} frames of meta/info.json")
    episodes, lengths = episodes[:num_episodes], lengths[:num_episodes]
    if info["data_path"] != f"data/{PATH}.parquet":  # which could name any file
        raise ValueError(f"its data_path is {info['data_path']!r:.100}, not LeRobot's data/{PATH}.parquet")
    files = zip(episodes["data/chunk_index"].to_pylist(), episodes["data/file_index"].to_pylist(), strict=True)
    names = [info["data_path"].format(chunk_index=chunk, file_index=file) for chunk, file in dict.fromkeys(files)]
    columns = list(dict.fromkeys(["episode_index", "frame_index", *sizes]))
    table = pa.concat_tables(read_table(root / name, columns) for name in names)
    table = table.filter(pc.less(table["episode_index"], num_episodes))
    begins = np.repeat(np.cumsum(lengths) - lengths, lengths)
    if not (
        np.array_equal(table["episode_index"], np.repeat(np.arange(num_episodes), lengths))
        and np.array_equal(table["frame_index"], np.arange(len(table)) - begins)
    ):
        raise ValueError("its frames are not those that meta/episodes describes")
    arrays = {}
    for key, size in sizes.items():
        column = table[key].combine_chunks()
        nested = pa.types.is_nested(column.type)
        values = column.flatten() if nested else column
        lengths = pc.unique(pc.list_value_length(column)).to_pylist() if nested else [1]
        if values.null_count or lengths != [size]:
            raise ValueError(f"its data of {key} does not have {size} values in every frame")
        arrays[key] = values.to_numpy(zero_copy_only=False).reshape((-1, size) if size > 1 else -1)
    return arrays


def load_demos(
    root: str | Path,
    num_episodes: int = 0,
    env: type = PaperSquareVectorEnv,
    joints: str = "measured",
    cameras: Sequence[str] = (),
    size: int = 64,
) -> dict[str, np.ndarray]:
    """Demonstrations of a LeRobotDataset v3.0, this script's or LeRobot's own, of its first episodes or (0) of all.

    Returns float32 arrays "state" (frames, 6) and "action" (frames, 6), joint angles and absolute joint targets in
    LeRobot's units, "environment_state" (frames, 15 for `env`, whose observation it must be), and "episode" (frames,)
    int64. With `joints` "commanded", the state is where the joints were sent before: what was recorded as such, else
    the action before. The environment state may follow the joints in observation.state, as lerobot-record writes what
    so101_mujoco observes. With `cameras` it is not asked for, and one zero; by its name there is each camera's video,
    (frames, size, size, 3) uint8, the middle of wider ones. Raises UserError if there is no such dataset, if it is
    damaged, or holds fewer episodes.
    """
    root = Path(root)
    with readable(root):
        info = read_info(root)
        total = info["total_episodes"]
        if total < max(num_episodes, 1):
            raise ValueError(f"it holds {total} episodes, and {max(num_episodes, 1)} are asked for")
        expected = make_features(env)
        state, rest, _ = KEYS
        together = info["features"].get(state, {}).get("names") == expected[state]["names"] + expected[rest]["names"]
        keys = [key for key in KEYS if key != rest or together or not cameras]
        keys += ["commanded"] * (joints == "commanded" and "commanded" in info["features"])
        sizes = {key: expected[key]["shape"][0] for key in keys}
        read = {key: size for key, size in sizes.items() if key != rest or not together}
        read[state] += sizes[rest] if together else 0
        arrays = read_frames(root, info, {**read, "episode_index": 1}, num_episodes or total)
        if together:
            arrays[state], arrays[rest] = np.split(arrays[state], [sizes[state]], axis=1)
        for key in sizes:
            if not np.isfinite(arrays[key]).all():
                raise ValueError(f"its {key} is not finite everywhere")
        films = {camera: read_video(root, info, camera, num_episodes or total, size) for camera in cameras}
    demos = {key.removeprefix("observation."): arrays[key].astype(np.float32, copy=False) for key in sizes}
    episode = arrays["episode_index"]
    if joints == "commanded" and "commanded" not in demos:  # LeRobot's own
        goes_on = np.append(False, episode[1:] == episode[:-1])
        demos["commanded"] = np.where(goes_on[:, None], np.roll(demos["action"], 1, axis=0), demos["state"])
    if cameras:
        demos |= {"environment_state": np.zeros((len(episode), 1), dtype=np.float32), **films}
    return demos | {"state": demos.pop("commanded", demos["state"]), "episode": episode}


def load_transitions(
    root: str | Path, env: type = PaperSquareVectorEnv, act_scale: float = 0.02, observe_measured: bool = False
) -> dict[str, np.ndarray]:
    """Demonstrations as record_demos.py writes them, as the transitions that the environment made of them.

    Returns arrays "obs" and "next_obs" (num, obs_dim) float32, "actions" (num, 6) in units of `act_scale`, "rewards",
    "terminations" and "dones" (num,). Actions are what was executed, noise and all, but of the last step what was
    wanted. The last step of an episode without success is left out: nothing was recorded after it. Raises UserError as
    `load_demos`, and if a step exceeds `act_scale`.
    """
    root = Path(root)
    demos = load_demos(root, env=env, joints="commanded")
    with readable(root):
        info = read_info(root)
        outcomes = read_frames(root, info, {"next.reward": 1, "next.success": 1}, info["total_episodes"])
    targets, wanted = joints_to_rad(demos["state"]), joints_to_rad(demos["action"])
    last = np.append(demos["episode"][1:] != demos["episode"][:-1], True)
    executed = np.where(last[:, None], wanted, np.roll(targets, -1, axis=0))
    actions = (executed - targets) / act_scale
    if np.abs(actions).max() > 1.001:
        raise UserError(f"the steps in {root} are of up to {np.abs(actions).max() * act_scale:.3g} rad: --act-scale")
    actions = np.clip(actions, -1.0, 1.0)

    zero = env.to_si(np.zeros(env.OBS_DIM))
    obs = np.tile(zero, (len(targets), 1))
    obs[:, env.OBS["joint_target"]] = targets
    if observe_measured:
        obs[:, env.OBS["joint_measured"]] = joints_to_rad(load_demos(root, env=env)["state"])
    obs = (obs - zero) * env.OBS_SCALE
    obs[:, env.OBS["last_action"]] = np.where(np.roll(last, 1)[:, None], 0.0, np.roll(actions, 1, axis=0))
    obs[:, np.concatenate([np.r_[env.OBS[name]] for name in env_state_rows(env)])] = demos["environment_state"]

    cut = last & ~outcomes["next.success"]
    transitions = {
        "obs": obs.astype(np.float32),
        "actions": actions,
        "rewards": outcomes["next.reward"],
        "next_obs": np.roll(obs, -1, axis=0).astype(np.float32),
        "terminations": outcomes["next.success"],
        "dones": last | np.roll(cut, -1),
    }
    return {name: values[~cut] for name, values in transitions.items()}


def read_video(root: Path, info: dict, camera: str, num_episodes: int, size: int) -> np.ndarray:
    """A camera's frames of the first episodes, (frames, size, size, 3) uint8: the middle of the image, scaled; raises
    ValueError."""
    key = f"observation.images.{camera}"
    if info["features"].get(key, {}).get("dtype") != "video":
        raise ValueError(f"it has no video {key}; record some: python record_demos.py --videos")
    if info["video_path"] != f"videos/{{video_key}}/{PATH}.mp4":  # which could name any file
        raise ValueError(f"its video_path is {info['video_path']!r:.100}, not LeRobot's")
    columns = [f"videos/{key}/{name}" for name in ("chunk_index", "file_index", "from_timestamp")]
    episodes = read_episodes(root, info["total_episodes"], ("length", *columns))[:num_episodes]
    lengths, chunks, files, starts = (episodes[name].to_pylist() for name in ("length", *columns))
    frames = np.empty((sum(lengths), size, size, 3), dtype=np.uint8)
    where = itertools.groupby(zip(chunks, files, starts, lengths, strict=True), key=lambda row: row[:2])
    done = 0
    for (chunk, file), rows in where:  # episodes that share a file are read together
        path = root / info["video_path"].format(video_key=key, chunk_index=chunk, file_index=file)
        film = [shrink(frame, size) for frame in decode_mp4(path)]
        for *_, start, length in rows:
            first = round(start * info["fps"])
            if first + length > len(film):
                raise ValueError(f"its video {key} ends after {len(film)} frames of {first + length}")
            frames[done : done + length] = film[first : first + length]
            done += length
    return frames


def load_task(root: str | Path) -> tuple[type, dict]:
    """The class of the environment that was recorded, and its arguments; the default one's where nothing says so.

    Raises UserError if there is no such environment.
    """
    path = Path(root) / TASK_FILE
    if not path.is_file():  # LeRobot's own
        return PaperSquareVectorEnv, eval_kwargs(EnvArgs())
    with readable(Path(root)):
        env = json.loads(path.read_text())
        kind, kwargs = env_of({"env": env}), env["kwargs"]
        return kind, {"act_scale": kind(1, **kwargs).act_scale, **kwargs}  # raises for what it does not take


class Frames(TensorDataset):
    """A training's frames in memory, `frames[indices]`; in its state a digest, since --resume must find the same."""

    def to(self, device) -> None:
        self.tensors = tuple(x.to(device) for x in self.tensors)

    def state_dict(self) -> dict:
        return {"sha256": digest({str(k): x.cpu() for k, x in enumerate(self.tensors)})}

    def load_state_dict(self, state: dict) -> None:
        if state != self.state_dict():
            raise ValueError("the demonstrations are not those that the run began with")


def describe(values: np.ndarray) -> dict[str, np.ndarray]:
    """LeRobot's statistics of values (n, size): each (size,), but count (1,)."""
    if values.dtype.kind == "f":
        values = values.astype(np.float64)  # the extremes of others stay of their own type, as LeRobot has them
    statistics = {"min": values.min(0), "max": values.max(0), "mean": values.mean(0), "std": values.std(0)}
    quantiles = np.quantile(values.astype(np.float64), list(QUANTILES.values()), axis=0)
    return statistics | {"count": np.array([len(values)])} | dict(zip(QUANTILES, quantiles, strict=True))


def merge(statistics: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Statistics of several episodes as one's; exact but for the quantiles, the mean of theirs, as LeRobot has them."""
    parts = {name: np.stack([one[name] for one in statistics]) for name in statistics[0]}  # (episodes, size)
    share = parts["count"] / parts["count"].sum()
    merged = {name: (share * values).sum(0) for name, values in parts.items()}
    variance = (share * (parts["std"] ** 2 + (parts["mean"] - merged["mean"]) ** 2)).sum(0)
    bounds = {"min": parts["min"].min(0), "max": parts["max"].max(0)}
    return merged | bounds | {"std": np.sqrt(variance), "count": parts["count"].sum(0)}


def write_parquet(path: Path, tables: Sequence[pa.Table]) -> None:
    """Write each table as a row group, each page with its checksum."""

    def save(temporary: Path) -> None:
        with pq.ParquetWriter(temporary, tables[0].schema, write_page_checksum=True) as writer:
            for table in tables:
                writer.write_table(table)

    write_whole(path, save)


class Dataset:
    """Writes a dataset in flushes: new files of videos, data and episodes, then tasks, stats and, last, info.json.

    What earlier flushes wrote stays as it is, so a recording that is killed leaves the episodes that info.json counts;
    what it does not count is cleared away when another one appends.

    Args: `root`; `features`; `env` (a checkpoint's "env": what is recorded); `append`; `flush_every` (episodes). Raises
    UserError for a folder that it cannot use.
    """

    def __init__(self, root: Path, features: dict, env: dict, append: bool = False, flush_every: int = FLUSH_EPISODES):
        self.env = json.loads(json.dumps(env))
        self.root, self.flush_every, self.info_path = root, flush_every, root / "meta" / "info.json"
        self.cameras = [key for key, feature in features.items() if feature["dtype"] == "video"]
        self.pending, self.num_files, self.next_seed = [], 0, 0
        self.statistics = {key: [] for key in features}  # of all until the last flush as one, of every episode since
        self.info = {
            "codebase_version": "v3.0",
            "robot_type": "so101_follower",
            "total_episodes": 0,
            "total_frames": 0,
            "total_tasks": 1,
            "chunks_size": PER_FOLDER,
            "data_files_size_in_mb": 100,
            "video_files_size_in_mb": 200,
            "fps": POLICY_HZ,
            "splits": {"train": "0:0"},
            "data_path": f"data/{PATH}.parquet",
            "video_path": f"videos/{{video_key}}/{PATH}.mp4" if self.cameras else None,
            "features": features,
        }
        root.mkdir(parents=True, exist_ok=True)
        lock(root)
        if any(file.is_file() and file.suffix not in (".tmp", ".lock") for file in root.rglob("*")):
            if not append:
                raise UserError(f"{root} is not empty: add to it with --append, or choose another --output-dir")
            with readable(root):
                self.resume()

    def resume(self) -> None:
        """Go on where a dataset of this script ends; raises ValueError if it is another's or has other features."""
        info = read_info(self.root)
        if any(info[key] != self.info[key] for key in ("features", "fps", "data_path", "video_path")):
            raise ValueError("--append needs the same features and fps, so the same --videos and --video-height")
        if (self.root / TASK_FILE).is_file():
            envs = json.loads((self.root / TASK_FILE).read_text()), self.env
            before, now = (env | {"kwargs": with_defaults(env["kwargs"])} for env in envs)
            if before != now:
                raise ValueError("--append needs the same environment, and it was recorded in another one")
        self.info, total = info, info["total_episodes"]
        if total:
            read_frames(self.root, info, {"episode_index": 1}, total)  # they are all there
            columns = [f"stats/{key}/{name}" for key in self.statistics for name in STATISTICS]
            episodes = read_episodes(self.root, total, ["data/chunk_index", "data/file_index", *columns]).to_pylist()
            self.num_files = PER_FOLDER * episodes[-1]["data/chunk_index"] + episodes[-1]["data/file_index"] + 1
            for row in episodes:
                for key, statistics in self.statistics.items():
                    statistics.append({name: np.ravel(row[f"stats/{key}/{name}"]) for name in STATISTICS})
        for number in range(self.num_files):
            metadata = pq.read_schema(self.episodes_path(number)).metadata or {}
            if b"seeds" not in metadata:
                raise ValueError("--append goes on with what record_demos.py recorded, and this has no seeds")
            self.next_seed = max(self.next_seed, 1 + max(json.loads(metadata[b"seeds"])))
        counts = dict.fromkeys(("data", "meta/episodes"), self.num_files) | {
            f"videos/{key}": total for key in self.cameras
        }
        for folder, count in counts.items():
            for path in (self.root / folder).glob("chunk-*/file-*"):
                number = PER_FOLDER * int(path.parent.name[6:]) + int(path.name[5:8])  # chunk-000/file-000.parquet
                if number >= count or path.suffix == ".tmp":
                    path.unlink()

    def episodes_path(self, number: int) -> Path:
        chunk, file = divmod(number, PER_FOLDER)
        return self.root / "meta" / "episodes" / f"chunk-{chunk:03d}" / f"file-{file:03d}.parquet"

    def add(self, episode: dict) -> None:
        """Take an episode as `record_episodes` yields it."""
        self.pending.append(episode)
        if len(self.pending) >= self.flush_every:
            self.flush()

    def flush(self) -> None:
        """Write the episodes since the last flush."""
        if not self.pending:
            return
        if not self.info_path.exists():
            write_json(self.info_path, self.info)  # of no episodes yet: whatever follows belongs to a dataset
        if not (self.root / TASK_FILE).exists():
            write_json(self.root / TASK_FILE, self.env)
        pending, self.pending = self.pending, []
        tables, rows = zip(*(self.lay_out(episode) for episode in pending), strict=True)
        chunk, file = divmod(self.num_files, PER_FOLDER)
        write_parquet(self.root / self.info["data_path"].format(chunk_index=chunk, file_index=file), tables)
        seeds = json.dumps([episode["seed"] for episode in pending])
        write_parquet(
            self.episodes_path(self.num_files), [pa.Table.from_pylist(rows).replace_schema_metadata({"seeds": seeds})]
        )
        write_parquet(self.root / "meta" / "tasks.parquet", [tasks_table()])
        self.statistics = {key: [merge(statistics)] for key, statistics in self.statistics.items()}
        merged = {key: self.to_lists(key, statistics) for key, (statistics,) in self.statistics.items()}
        write_json(self.root / "meta" / "stats.json", merged)
        write_json(self.info_path, self.info)
        self.num_files += 1

    def lay_out(self, episode: dict) -> tuple[pa.Table, dict]:
        """Number an episode and count it in; returns its frames and its row of meta/episodes, and writes its videos."""
        index, start, length = self.info["total_episodes"], self.info["total_frames"], len(episode["action"])
        episode = episode | {
            "timestamp": (np.arange(length) / POLICY_HZ).astype(np.float32),
            "frame_index": np.arange(length),
            "episode_index": np.full(length, index),
            "index": start + np.arange(length),
            "task_index": np.zeros(length, dtype=np.int64),
        }
        chunk, file = divmod(self.num_files, PER_FOLDER)
        row = {
            "episode_index": index,
            "tasks": [TASK],
            "length": length,
            "data/chunk_index": chunk,
            "data/file_index": file,
            "dataset_from_index": start,
            "dataset_to_index": start + length,
            "meta/episodes/chunk_index": chunk,
            "meta/episodes/file_index": file,
        }
        chunk, file = divmod(index, PER_FOLDER)
        columns = {}
        for key, statistics in self.statistics.items():
            if key in self.cameras:
                film, values = episode[key]
                path = self.info["video_path"].format(video_key=key, chunk_index=chunk, file_index=file)
                write_whole(self.root / path, partial(Path.write_bytes, data=film))
                row |= {f"videos/{key}/chunk_index": chunk, f"videos/{key}/file_index": file}
                row |= {f"videos/{key}/from_timestamp": 0.0, f"videos/{key}/to_timestamp": length / POLICY_HZ}
            else:
                columns[key], values = to_column(episode[key]), describe(episode[key].reshape(length, -1))
            statistics.append(values)
            row |= {f"stats/{key}/{name}": value for name, value in self.to_lists(key, values).items()}
        total = index + 1
        self.info |= {"total_episodes": total, "total_frames": start + length, "splits": {"train": f"0:{total}"}}
        return pa.table(columns), row

    def to_lists(self, key: str, statistics: dict[str, np.ndarray]) -> dict[str, list]:
        """Statistics as lists; those of a camera are (3, 1, 1), by channel, row and column, but for the count."""
        shape = (3, 1, 1) if key in self.cameras else -1
        return {name: value.reshape(-1 if name == "count" else shape).tolist() for name, value in statistics.items()}


def to_column(values: np.ndarray) -> pa.Array:
    flat = pa.array(values.ravel())
    return flat if values.ndim == 1 else pa.FixedSizeListArray.from_arrays(flat, values.shape[1])


def tasks_table() -> pa.Table:
    """meta/tasks.parquet: the task is the index of the data frame, which the metadata says."""
    columns = {"task_index": ("int64", "int64"), "task": ("unicode", "object")}
    description = [
        {"name": name, "field_name": name, "pandas_type": kind, "numpy_type": numpy_type, "metadata": None}
        for name, (kind, numpy_type) in columns.items()
    ]
    metadata = {"index_columns": ["task"], "column_indexes": [], "columns": description, "pandas_version": "2.0.0"}
    return pa.table({"task_index": [0], "task": [TASK]}).replace_schema_metadata({"pandas": json.dumps(metadata)})


def encode(frames: list[np.ndarray]) -> tuple[bytes, dict[str, np.ndarray]]:
    """Frames (height, width, 3) uint8 as an MP4, and the statistics of every tenth, values in [0, 1]."""
    # A key frame every other frame, as LeRobot has them: it reads single frames; one thread: the same bytes everywhere
    film = encode_mp4(frames, fps=POLICY_HZ, codec="libx264", output_params=["-g", "2", "-threads", "1"])
    some = np.stack(frames[::10])
    return film, describe(some.reshape(-1, 3) / 255) | {"count": np.array([len(some)])}
