"""Record demonstrations, of a policy or of a person at the keyboard, as a LeRobotDataset v3.0, with pyarrow alone.

    python record_demos.py --num-episodes 50                                   # of the residual policy in assets/
    python record_demos.py --policy jacobian --only-successes --noise-std 0.2  # of a base policy; noise as in DART
    python record_demos.py --teleop keyboard --output-dir mine --videos        # of a person, in MuJoCo's viewer
    python record_demos.py --num-episodes 50 --append                          # more of them

act.py, diffusion_policy.py and LeRobot train on the folder; `load_demos` reads it. Every so many episodes are written
whole, meta/info.json last: however a recording ends, the folder holds the episodes that info.json counts.
"""

import importlib
import json
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
import tyro
from gymnasium.vector import AutoresetMode
from tqdm import tqdm

from base_policies import ENV_STATE, ArmKinematics, JacobianIKPolicy, joints_to_lerobot, make_base_policy, to_lerobot
from env_paper_square import JOINTS, OBS, PaperSquareVectorEnv, to_si
from eval import POLICY_HZ, VALIDATION_SEED, check_rendering, fail, load_checkpoint

TASK = "Slide the sheet of paper into the tape square."
CAMERAS = ("top", "side", "wrist")
FLUSH_EPISODES = 25  # written at a time
GIVE_UP = 200  # failures in a row
QUANTILES = {"q01": 0.01, "q10": 0.1, "q50": 0.5, "q90": 0.9, "q99": 0.99}
STATISTICS = ("min", "max", "mean", "std", "count", *QUANTILES)
PER_FOLDER = 1000  # files, LeRobot's chunks_size

# Keys of the teleoperation by their GLFW codes: name, what it does, axis of the motion, sign. MuJoCo's passive viewer
# binds none of them: it has the letters, 0 to 5, brackets and function keys, and Page Up only for a selected body.
KEYS = {
    265: ("Up", "away from the base", 0, 1),
    264: ("Down", "towards the base", 0, -1),
    263: ("Left", "to the left, as seen from the base", 1, 1),
    262: ("Right", "to the right", 1, -1),
    266: ("Page Up", "up", 2, 1),
    267: ("Page Down", "down", 2, -1),
    ord("6"): ("6", "wrist pitch, fingers down", 3, 1),
    ord("7"): ("7", "wrist pitch, fingers up", 3, -1),
    ord("8"): ("8", "wrist roll, to the left", 4, 1),
    ord("9"): ("9", "wrist roll, to the right", 4, -1),
    ord("="): ("=", "open the gripper", 5, 1),
    ord("-"): ("-", "close the gripper", 5, -1),
}
VERDICTS = {257: ("Enter", "save"), 259: ("Backspace", "discard")}
PRESS = np.array([0.008, 0.008, 0.002, 0.1, 0.1, 0.1])  # motion of one press: m, m, m, rad, rad, rad
PACE = np.array([0.002, 0.002, 0.001, 0.01, 0.01, 0.02])  # of one step at most; faster, the joints could not follow
TELEOP_STEPS = 1800  # a minute: a person is slower than the 400 steps of an episode
TELEOP_DAMPING = 0.003  # m


@dataclass
class Args:
    output_dir: str = "demos"
    """folder of the dataset; must be new or empty, unless --append"""
    model_path: str = "assets/ppo_residual.pt"
    """checkpoint of the policy to record, which plays its mean action"""
    policy: str = ""
    """base policy to record instead: zero, jacobian, hybrid, or il (--model-path is then of an imitation script)"""
    teleop: Literal["", "keyboard"] = ""
    """record a person instead, who drives the arm in MuJoCo's viewer; the keys are printed"""
    num_episodes: int = 50
    """episodes to write"""
    only_successes: bool = False
    """drop the episodes that fail, and play on until num_episodes succeeded"""
    seed: int | None = None
    """seed of the first episode; episode k, dropped ones counted, has seed + k (default: 0, or with --append the one
    after the largest that was recorded)"""
    noise_std: float = 0.0
    """standard deviation of the noise on the executed action, in units of the action; what is recorded is the action
    that the policy wanted there, as in DART (arXiv 1703.09327)"""
    noise_correlation: float = 0.8
    """correlation of the noise between one step and the next"""
    num_envs: int = 16
    """environments stepped together"""
    num_threads: int = 0
    """threads that step the physics; 0 takes all cores"""
    append: bool = False
    """add to the dataset in output_dir"""
    videos: bool = False
    """also record the cameras top, side and wrist as MP4; much slower"""
    video_height: int = 96
    """height of the videos, pixels; they are 4:3"""


def check_args(args: Args) -> None:
    """Raise ValueError, one line for the user, for values that do not fit."""
    if min(args.num_episodes, args.num_envs) < 1 or args.num_threads < 0:
        raise ValueError("--num-episodes and --num-envs must be at least 1, and --num-threads not negative")
    if not (0 <= args.noise_std < np.inf and 0 <= args.noise_correlation < 1):
        raise ValueError("--noise-std must be finite and not negative, and --noise-correlation lie in [0, 1)")
    if args.seed is not None and not 0 <= args.seed <= VALIDATION_SEED - args.num_episodes:
        raise ValueError(f"--seed plus --num-episodes must lie below {VALIDATION_SEED}, where held-out episodes begin")
    if args.video_height % 48 or not 48 <= args.video_height <= 960:
        raise ValueError(f"--video-height must be a multiple of 48, up to 960, found {args.video_height}")
    if args.teleop and args.noise_std:
        raise ValueError("--noise-std is for policies: a person makes noise enough")


# The dataset


def make_features(video_height: int = 0) -> dict[str, dict]:
    """The features of info.json, in the order of the data's columns; with cameras if `video_height`, pixels."""
    joints = [f"{joint}.pos" for joint in JOINTS]
    rows = [f"{name}_{k}" for name in ENV_STATE for k in range(OBS[name].stop - OBS[name].start)]
    video = {
        "video.height": video_height,
        "video.width": 4 * video_height // 3,
        "video.codec": "h264",
        "video.pix_fmt": "yuv420p",
        "video.is_depth_map": False,
        "video.fps": POLICY_HZ,
        "video.channels": 3,
        "has_audio": False,
    }
    shape = [video_height, 4 * video_height // 3, 3]
    cameras = {"dtype": "video", "shape": shape, "names": ["height", "width", "channels"], "info": video}
    return {
        "observation.state": {"dtype": "float32", "shape": [len(joints)], "names": joints},
        "observation.environment_state": {"dtype": "float32", "shape": [len(rows)], "names": rows},
        "action": {"dtype": "float32", "shape": [len(joints)], "names": joints},
        "next.reward": {"dtype": "float32", "shape": [1], "names": None},
        "next.done": {"dtype": "bool", "shape": [1], "names": None},
        "next.success": {"dtype": "bool", "shape": [1], "names": None},
        **{f"observation.images.{camera}": cameras for camera in CAMERAS if video_height},
        "timestamp": {"dtype": "float32", "shape": [1], "names": None},
        **{
            name: {"dtype": "int64", "shape": [1], "names": None}
            for name in ("frame_index", "episode_index", "index", "task_index")
        },
    }


@contextmanager
def readable(root: Path) -> Iterator[None]:
    """Turn whatever reading a dataset raises into a ValueError with one line for the user."""
    try:
        yield
    except (OSError, LookupError, TypeError, AttributeError, ValueError, OverflowError, pa.ArrowException) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"cannot use {root} as a dataset of demonstrations: {reason}") from error


def read_info(root: Path) -> dict:
    """meta/info.json; raises ValueError if it is not that of a LeRobotDataset v3.0."""
    if not (root / "meta" / "info.json").is_file():
        raise ValueError("it has no meta/info.json")
    info = json.loads((root / "meta" / "info.json").read_text())
    if info["codebase_version"] != "v3.0":
        raise ValueError(f"its codebase_version is {info['codebase_version']}, not v3.0")
    return info


def read_episodes(root: Path, total: int, columns: Sequence[str]) -> pa.Table:
    """Columns of the first `total` episodes of meta/episodes, in order; raises ValueError if there are fewer."""
    paths = sorted((root / "meta" / "episodes").glob("chunk-*/file-*.parquet"))
    tables = [pq.read_table(path, columns=["episode_index", *columns]).replace_schema_metadata() for path in paths]
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
            raise ValueError(f"its {key} has the shape {info['features'][key]['shape']}, not [{size}]")
    episodes = read_episodes(root, num_episodes, ("length", "data/chunk_index", "data/file_index"))
    lengths = episodes["length"].to_numpy()
    files = zip(episodes["data/chunk_index"].to_pylist(), episodes["data/file_index"].to_pylist(), strict=True)
    names = [info["data_path"].format(chunk_index=chunk, file_index=file) for chunk, file in dict.fromkeys(files)]
    columns = list(dict.fromkeys(["episode_index", "frame_index", *sizes]))
    table = pa.concat_tables(pq.read_table(root / name, columns=columns).replace_schema_metadata() for name in names)
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


def load_demos(root: str | Path, num_episodes: int = 0) -> dict[str, np.ndarray]:
    """Demonstrations of a LeRobotDataset v3.0, this script's or LeRobot's own, of its first episodes or (0) of all.

    Returns float32 arrays "state" (frames, 6) and "action" (frames, 6), joint angles and absolute joint targets in
    LeRobot's units, "environment_state" (frames, 14), and "episode" (frames,) int64. Raises ValueError, with one line
    for the user, if there is no such dataset, if it is damaged, or holds fewer episodes.
    """
    root = Path(root)
    with readable(root):
        info = read_info(root)
        total = info["total_episodes"]
        if total < max(num_episodes, 1):
            raise ValueError(f"it holds {total} episodes, and {max(num_episodes, 1)} are asked for")
        sizes = {"observation.state": 6, "observation.environment_state": 14, "action": 6}
        arrays = read_frames(root, info, {**sizes, "episode_index": 1}, num_episodes or total)
        for key in sizes:
            if not np.isfinite(arrays[key]).all():
                raise ValueError(f"its {key} is not finite everywhere")
    demos = {key.removeprefix("observation."): arrays[key].astype(np.float32, copy=False) for key in sizes}
    return demos | {"episode": arrays["episode_index"]}


def describe(values: np.ndarray) -> dict[str, np.ndarray]:
    """LeRobot's statistics of values (n, size): each (size,), but count (1,)."""
    values = values.astype(np.float64)
    statistics = {"min": values.min(0), "max": values.max(0), "mean": values.mean(0), "std": values.std(0)}
    quantiles = np.quantile(values, list(QUANTILES.values()), axis=0)
    return statistics | {"count": np.array([len(values)])} | dict(zip(QUANTILES, quantiles, strict=True))


def merge(statistics: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Statistics of several episodes as one's; exact but for the quantiles, the mean of theirs, as LeRobot has them."""
    parts = {name: np.stack([one[name] for one in statistics]) for name in statistics[0]}  # (episodes, size)
    share = parts["count"] / parts["count"].sum()
    merged = {name: (share * values).sum(0) for name, values in parts.items()}
    variance = (share * (parts["std"] ** 2 + (parts["mean"] - merged["mean"]) ** 2)).sum(0)
    bounds = {"min": parts["min"].min(0), "max": parts["max"].max(0)}
    return merged | bounds | {"std": np.sqrt(variance), "count": parts["count"].sum(0)}


def write(path: Path, save: Callable[[Path], object]) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    save(temporary)
    temporary.replace(path)


def write_json(path: Path, value: dict) -> None:
    write(path, lambda temporary: temporary.write_text(json.dumps(value, indent=4) + "\n"))


def write_parquet(path: Path, tables: Sequence[pa.Table]) -> None:
    """Write each table as a row group."""

    def save(temporary: Path) -> None:
        with pq.ParquetWriter(temporary, tables[0].schema) as writer:
            for table in tables:
                writer.write_table(table)

    write(path, save)


class Dataset:
    """Writes a dataset in flushes: new files of videos, data and episodes, then tasks, stats and, last, info.json.

    What earlier flushes wrote stays as it is, so a recording that is killed leaves the episodes that info.json counts;
    what it does not count is cleared away when another one appends.

    Args: `root`; `features`; `append`; `flush_every` (episodes). Raises ValueError for a folder that it cannot use.
    """

    def __init__(self, root: Path, features: dict, append: bool = False, flush_every: int = FLUSH_EPISODES):
        self.root, self.flush_every, self.info_path = root, flush_every, root / "meta" / "info.json"
        self.cameras = [key for key, feature in features.items() if feature["dtype"] == "video"]
        self.pending, self.num_files, self.next_seed = [], 0, 0
        self.statistics = {key: [] for key in features}  # of all until the last flush as one, of every episode since
        path = "chunk-{chunk_index:03d}/file-{file_index:03d}"
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
            "data_path": f"data/{path}.parquet",
            "video_path": f"videos/{{video_key}}/{path}.mp4" if self.cameras else None,
            "features": features,
        }
        existing = next(folder for folder in (root.absolute(), *root.absolute().parents) if folder.exists())
        if not (existing.is_dir() and os.access(existing, os.W_OK)):
            raise ValueError(f"{existing} is not a folder that can be written to")
        if any(file.is_file() and file.suffix != ".tmp" for file in root.rglob("*")):
            if not append:
                raise ValueError(f"{root} is not empty: add to it with --append, or choose another --output-dir")
            with readable(root):
                self.resume()

    def resume(self) -> None:
        """Go on where a dataset of this script ends; raises ValueError if it is another's or has other features."""
        info = read_info(self.root)
        if any(info[key] != self.info[key] for key in ("features", "fps", "data_path", "video_path")):
            raise ValueError("--append needs the same features and fps, so the same --videos and --video-height")
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
                write(self.root / path, partial(Path.write_bytes, data=film))
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
    import imageio

    # A key frame every other frame, as LeRobot has them: it reads single frames; one thread: the same bytes everywhere
    options = {"codec": "libx264", "output_params": ["-g", "2", "-threads", "1"]}
    film = imageio.mimwrite("<bytes>", frames, format="mp4", fps=POLICY_HZ, **options)
    some = np.stack(frames[::10])
    return film, describe(some.reshape(-1, 3) / 255) | {"count": np.array([len(some)])}


# Recording


def draw_noise(seed: int, steps: int, std: float, correlation: float) -> np.ndarray:
    """The noise of an episode, (steps, 6), in units of the action: autoregressive, stationary from the first step."""
    noise = std * np.random.default_rng([seed, 2]).normal(size=(steps, len(JOINTS)))  # [seed, 1] is eval.py's
    for step in range(1, steps):
        noise[step] = correlation * noise[step - 1] + np.sqrt(1.0 - correlation**2) * noise[step]
    return noise


def record_episodes(
    policy,
    envs: PaperSquareVectorEnv,
    first_seed: int,
    num_episodes: int,
    only_successes: bool = False,
    noise_std: float = 0.0,
    noise_correlation: float = 0.0,
    cameras: Sequence[str] = (),
    stop: Callable[[], object] = lambda: False,
) -> Iterator[dict | None]:
    """Play episodes of rising seeds; yields each in the order of the seeds, or None for one that is dropped.

    Ends after `num_episodes` that are kept, or when `stop()`. An episode holds the dataset's features by name, (length,
    size) or (length,), cameras as `encode` returns them, and its "seed". A policy with a `verdict` ends its episode by
    "save" or "discard". Raises ValueError if success stays out or the held-out episodes are reached.
    """
    num_envs = envs.num_envs
    seeds = first_seed + np.arange(num_envs)
    next_seed, released, finished = first_seed + num_envs, first_seed, {}  # finished: by seed, until it is its turn
    kept, failures = 0, 0  # failures: in a row
    active, fresh = np.ones(num_envs, dtype=bool), np.ones(num_envs, dtype=bool)
    frames, films = [[] for _ in seeds], [{} for _ in seeds]  # of the episodes that are being played
    noise = np.zeros((num_envs, envs.max_episode_steps, len(JOINTS)))
    while active.any() and not stop():
        if fresh.any():
            if seeds[fresh].max() >= VALIDATION_SEED:
                raise ValueError(f"the seeds reach {VALIDATION_SEED}, where held-out episodes begin")
            obs, _ = envs.reset(seed=seeds.tolist(), options={"reset_mask": fresh})
            policy.reset(fresh)
            for i in np.flatnonzero(fresh):
                frames[i], films[i] = [], {camera: [] for camera in cameras}
                noise[i] = draw_noise(seeds[i], envs.max_episode_steps, noise_std, noise_correlation)
        for i in np.flatnonzero(active):
            for camera, film in films[i].items():
                film.append(envs.render_frame(i, camera))

        action = np.clip(policy(obs), -1.0, 1.0)
        si = to_si(obs)
        joint_target = si[:, OBS["joint_pos"]] + si[:, OBS["joint_target_error"]]  # (num_envs, 6), rad
        wanted = np.clip(joint_target + envs.act_scale * action, envs.ctrl_low, envs.ctrl_high)
        state, environment_state = to_lerobot(obs)
        executed = action + noise[np.arange(num_envs), [len(steps) for steps in frames]]
        obs, rewards, terminations, truncations, _ = envs.step(executed)
        verdict = getattr(policy, "verdict", "")
        done = terminations | truncations | bool(verdict)
        frame = {
            "observation.state": state,
            "observation.environment_state": environment_state,
            "action": joints_to_lerobot(wanted).astype(np.float32),
            "next.reward": rewards.astype(np.float32),
            "next.done": done,
            "next.success": terminations,
        }
        for i in np.flatnonzero(active):
            frames[i].append({key: values[i] for key, values in frame.items()})

        ended = np.flatnonzero(done & active)
        for i in ended:
            keep = (terminations[i] or not only_successes) and verdict != "discard"
            if keep:
                episode = {key: np.stack([step[key] for step in frames[i]]) for key in frame}
                episode |= {f"observation.images.{camera}": encode(film) for camera, film in films[i].items()}
            finished[int(seeds[i])] = {**episode, "seed": int(seeds[i])} if keep else None
            frames[i], kept = [], kept + keep
        active[ended] = False
        # One more only if it is wanted: what was played are then the same episodes whatever num_envs
        restarted = ended[: num_episodes - kept - active.sum()]
        active[restarted] = True
        seeds[restarted] = next_seed + np.arange(len(restarted))
        next_seed += len(restarted)
        fresh = np.isin(np.arange(num_envs), restarted)
        envs.paused[:] = ~active
        while released in finished:
            episode = finished.pop(released)
            released += 1
            failures = 0 if episode else failures + 1
            yield episode
            if failures == GIVE_UP:
                raise ValueError(f"{GIVE_UP} episodes in a row failed, too many for --only-successes")


class KeyboardPolicy:
    """A person at the keyboard of MuJoCo's viewer, as a policy of one environment; an episode waits for its first key.

    The viewer reports that a key is pressed, and neither that it is held nor let go: a press asks for a motion of a
    fixed length, which is then made at `PACE`. Args: `envs`, in mode "human"; `stop`, as of `record_episodes`.
    """

    def __init__(self, envs: PaperSquareVectorEnv, stop: Callable[[], object]):
        self.envs, self.stop = envs, stop
        self.kinematics = ArmKinematics()
        self.keys = deque()  # pressed, not yet seen to; the viewer's thread appends
        envs.key_callback = self.keys.append
        self.reset(np.ones(1, dtype=bool))

    def reset(self, mask: np.ndarray) -> None:
        self.keys.clear()
        self.left, self.begun, self.verdict = np.zeros(6), False, ""

    def __call__(self, obs: np.ndarray) -> np.ndarray:
        while True:
            while self.keys:
                key = self.keys.popleft()
                if key in VERDICTS:
                    self.verdict = VERDICTS[key][1] if self.begun or VERDICTS[key][1] == "discard" else ""
                else:
                    self.left = self.left + key_to_motion(key)
            self.begun = self.begun or self.left.any()
            if self.begun or self.verdict or self.stop():
                break
            self.envs.render()
        motion = np.clip(self.left, -PACE, PACE)
        self.left = self.left - motion
        return motion_to_action(obs, motion[None], self.envs.act_scale, self.kinematics)


def key_to_motion(key: int) -> np.ndarray:
    """The motion (6,) that a press of a key, by its GLFW code, asks for: x, y, z, pitch, roll, gripper; m and rad."""
    motion = np.zeros(len(PRESS))
    if key in KEYS:
        _, _, axis, sign = KEYS[key]
        motion[axis] = sign * PRESS[axis]
    return motion


def motion_to_action(obs: np.ndarray, motion: np.ndarray, act_scale: float, kinematics: ArmKinematics) -> np.ndarray:
    """Actions (num_envs, 6) that move the fingertip's target by `motion` (num_envs, 6): x, y, z, pitch, roll, gripper.

    Damped least squares on the joint targets; pitch and roll are the fingers' own, and stay as they are when the
    fingertip moves. A step longer than `act_scale`, rad, is scaled as a whole.
    """
    si = to_si(obs)
    _, jacobian = kinematics(si[:, OBS["joint_pos"]] + si[:, OBS["joint_target_error"]])
    weight = JacobianIKPolicy.ANGLE_WEIGHT  # m per rad
    rows = np.zeros((len(obs), 5, 5))  # task by joint
    rows[:, :3] = jacobian
    rows[:, 3, 1:4] = weight
    rows[:, 4, [0, 4]] = weight, -weight  # fingers down, their heading is shoulder_pan - wrist_roll
    error = motion[:, :5] * [1.0, 1.0, 1.0, weight, weight]
    columns = rows.swapaxes(1, 2)
    damped = rows @ columns + TELEOP_DAMPING**2 * np.eye(5)
    step = (columns @ np.linalg.solve(damped, error[:, :, None]))[:, :, 0]  # (num_envs, 5), rad
    action = np.concatenate([step, motion[:, 5:]], axis=1) / act_scale
    return action / np.maximum(np.abs(action).max(axis=1, keepdims=True), 1.0)


if __name__ == "__main__":
    args = tyro.cli(Args)
    stopped = []  # signals that came
    try:
        check_args(args)
        if args.videos:
            check_rendering()
        env_kwargs = {"num_threads": args.num_threads, "autoreset_mode": AutoresetMode.DISABLED}
        if args.teleop:
            env_kwargs |= {"render_mode": "human", "max_episode_steps": TELEOP_STEPS}
        elif args.policy:
            policy = make_base_policy(args.policy, il_checkpoint=args.model_path)
        else:
            checkpoint = load_checkpoint(args.model_path)
            policy = importlib.import_module(checkpoint["script"]).make_policy(checkpoint)
            env_kwargs |= checkpoint["env_kwargs"]
        if args.videos:
            env_kwargs |= {"height": args.video_height, "width": 4 * args.video_height // 3}
        features = make_features(args.video_height * args.videos)
        dataset = Dataset(Path(args.output_dir), features, args.append, 1 if args.teleop else FLUSH_EPISODES)
        first_seed = dataset.next_seed if args.seed is None else args.seed
        torch.set_num_threads(1)  # the cores are for the physics
        envs = PaperSquareVectorEnv(1 if args.teleop else min(args.num_envs, args.num_episodes), **env_kwargs)

        def stop() -> bool:
            return bool(stopped) or envs.viewer_closed

        if args.teleop:
            policy = KeyboardPolicy(envs, stop)
            envs.reset(seed=first_seed)
            envs.render()
            print("\n".join(f"{name:10} {what}" for name, what, *_ in (*KEYS.values(), *VERDICTS.values())))
            print("An episode begins with the first key and is saved at its end. ] is the view from above.")
    except (ValueError, RuntimeError, OSError) as error:
        fail(str(error))
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: stopped.append(number))

    start, lengths, successes, dropped, trouble = time.perf_counter(), [], 0, 0, ""
    bar = tqdm(total=args.num_episodes, desc="recording", unit="ep")
    noise, cameras = (args.noise_std, args.noise_correlation), CAMERAS if args.videos else ()
    task = (first_seed, args.num_episodes, args.only_successes)
    try:
        try:
            for episode in record_episodes(policy, envs, *task, *noise, cameras, stop):
                if episode is None:
                    dropped += 1
                    bar.set_postfix(dropped=dropped)
                    continue
                dataset.add(episode)
                lengths.append(len(episode["action"]))
                successes += bool(episode["next.success"][-1])
                bar.update()
        finally:
            dataset.flush()
    except OSError as error:
        fail(f"cannot write on: {error}; {args.output_dir} holds the episodes that were written before")
    except ValueError as error:
        trouble = str(error)
    bar.close()
    envs.close()
    if lengths:
        print(
            f"{len(lengths)} episodes, {sum(lengths)} frames; {100 * successes / len(lengths):.0f} % successes, "
            f"{dropped} dropped; mean length {np.mean(lengths) / POLICY_HZ:.1f} s, "
            f"recorded in {time.perf_counter() - start:.0f} s"
        )
        total = f"{dataset.info['total_episodes']} episodes in {args.output_dir}"
        print(f"{total}; train on them: python act.py --dataset {args.output_dir}")
    else:
        print("no episode was finished, and nothing written")
    if trouble:
        fail(trouble)
    sys.exit(128 + stopped[0] if stopped else 0)
