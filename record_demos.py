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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import tyro
from gymnasium.vector import AutoresetMode
from tqdm import tqdm

from base_policies import ENV_STATE, joints_to_lerobot, make_base_policy, to_lerobot
from env_paper_square import JOINTS, OBS, PaperSquareVectorEnv, to_si
from eval import POLICY_HZ, VALIDATION_SEED, fail, load_checkpoint

TASK = "Slide the sheet of paper into the tape square."
CAMERAS = ("top", "side", "wrist")
FLUSH_EPISODES = 25  # written at a time
GIVE_UP = 200  # failures in a row
QUANTILES = {"q01": 0.01, "q10": 0.1, "q50": 0.5, "q90": 0.9, "q99": 0.99}
PER_FOLDER = 1000  # files, LeRobot's chunks_size
ROOT = Path(__file__).resolve().parent


@dataclass
class Args:
    output_dir: str = "demos"
    """folder of the dataset; must be new or empty, unless --append"""
    model_path: str = str(ROOT / "assets" / "ppo_residual.pt")
    """checkpoint of the policy to record, plays its mean action"""
    policy: str = ""
    """base policy to record instead: zero, jacobian, hybrid, or il, which is the checkpoint of act.py or
    diffusion_policy.py in --model-path"""
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


def read_info(root: Path) -> dict:
    """meta/info.json; raises ValueError if it is not that of a LeRobotDataset v3.0."""
    if not (root / "meta" / "info.json").is_file():
        raise ValueError("it has no meta/info.json")
    info = json.loads((root / "meta" / "info.json").read_text())
    if not str(info["codebase_version"]).startswith("v3."):
        raise ValueError(f"its codebase_version is {info['codebase_version']}, not v3.0")
    return info


def read_episodes(root: Path, total: int) -> pa.Table:
    """The first `total` episodes of meta/episodes, in order; raises ValueError if there are fewer."""
    tables = [pq.read_table(path) for path in sorted((root / "meta" / "episodes").glob("chunk-*/file-*.parquet"))]
    if not tables:
        raise ValueError("it has no meta/episodes")
    episodes = pa.concat_tables([table.replace_schema_metadata() for table in tables], promote_options="default")
    episodes = episodes.sort_by("episode_index")[:total]
    if episodes["episode_index"].to_pylist() != list(range(total)):
        raise ValueError(f"meta/episodes does not hold the {total} episodes that info.json counts")
    return episodes


def read_frames(root: Path, info: dict, keys: Sequence[str], num_episodes: int) -> dict[str, np.ndarray]:
    """Features (frames, size), or (frames,) of shape [1], of the first episodes, in order; raises ValueError."""
    for key in keys:
        if key not in info["features"]:
            raise ValueError(f"it lacks the feature {key}")
    episodes = read_episodes(root, num_episodes)
    lengths = np.array(episodes["length"], dtype=np.int64)
    files = zip(episodes["data/chunk_index"].to_pylist(), episodes["data/file_index"].to_pylist(), strict=True)
    columns = ["episode_index", "frame_index", *(key for key in keys if key not in ("episode_index", "frame_index"))]
    paths = [root / info["data_path"].format(chunk_index=chunk, file_index=file) for chunk, file in dict.fromkeys(files)]
    table = pa.concat_tables([pq.read_table(path, columns=columns).replace_schema_metadata() for path in paths])
    table = table.filter(pa.compute.less(table["episode_index"], num_episodes))
    episode, frame = (table[name].to_numpy() for name in columns[:2])
    ends = np.repeat(np.cumsum(lengths), lengths)
    if not (
        np.array_equal(episode, np.repeat(np.arange(num_episodes), lengths))
        and np.array_equal(frame, np.arange(len(frame)) - ends + np.repeat(lengths, lengths))
    ):
        raise ValueError("its frames are not those that meta/episodes describes")
    arrays = {}
    for key in keys:
        (size,) = info["features"][key]["shape"]
        column = table[key].combine_chunks()
        values = column.flatten() if pa.types.is_nested(column.type) else column
        if column.null_count or values.null_count or len(values) != size * len(table):
            raise ValueError(f"the data of {key} is not of the shape [{size}] that info.json says")
        arrays[key] = values.to_numpy(zero_copy_only=False).reshape((-1, size) if size > 1 else -1)
    return arrays


def load_demos(root: str | Path, num_episodes: int = 0) -> dict[str, np.ndarray]:
    """Demonstrations of a LeRobotDataset v3.0, this script's or LeRobot's own, of its first episodes or (0) of all.

    Returns float32 arrays "state" (frames, 6) and "action" (frames, 6), joint angles and absolute joint targets in
    LeRobot's units, "environment_state" (frames, 14), and "episode" (frames,) int64. Raises ValueError, with one line
    for the user, if there is no such dataset, if it is damaged, or holds fewer episodes.
    """
    root = Path(root)
    features = {"observation.state": 6, "observation.environment_state": 14, "action": 6}
    try:
        info = read_info(root)
        for key, size in features.items():
            shape = list(info["features"][key]["shape"]) if key in info["features"] else None
            if shape != [size]:
                raise ValueError(f"it lacks the feature {key}" if shape is None else f"its {key} has shape {shape}")
        total = int(info["total_episodes"])
        if total < max(num_episodes, 1):
            raise ValueError(f"it holds {total} episodes, and {max(num_episodes, 1)} are asked for")
        arrays = read_frames(root, info, [*features, "episode_index"], num_episodes or total)
        for key in features:
            arrays[key] = arrays[key].astype(np.float32)
            if not np.isfinite(arrays[key]).all():
                raise ValueError(f"its {key} is not finite everywhere")
    except (OSError, LookupError, TypeError, AttributeError, ValueError, OverflowError, pa.ArrowException) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{root} is no dataset of demonstrations that can be read: {reason}") from error
    return {key.removeprefix("observation."): arrays[key] for key in features} | {"episode": arrays["episode_index"]}


def describe(values: np.ndarray) -> dict[str, np.ndarray]:
    """LeRobot's statistics of values (n, size), each of shape (size,); count (1,)."""
    values = values.astype(np.float64)
    statistics = {"min": values.min(0), "max": values.max(0), "mean": values.mean(0), "std": values.std(0)}
    return statistics | {"count": np.array([len(values)])} | dict(
        zip(QUANTILES, np.quantile(values, list(QUANTILES.values()), axis=0), strict=True)
    )


def write(path: Path, save: Callable[[Path], None]) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    save(temporary)
    os.replace(temporary, path)


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
    """Writes a dataset, a file of data per flush; nothing that was written changes but meta's sums.

    Args: `root`; `features`; `append`. Raises ValueError, with one line for the user, for a folder it cannot use.
    """

    def __init__(self, root: Path, features: dict, append: bool):
        self.root, self.features, self.pending = root, features, []
        self.num_files, self.next_seed = 0, 0
        self.frames = {key: [] for key in features if features[key]["dtype"] != "video"}  # all, for the statistics
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
            "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
            "video_path": None,
            "features": features,
        }
        if any(feature["dtype"] == "video" for feature in features.values()):
            self.info["video_path"] = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
        used = root.exists() and (not root.is_dir() or any(p.is_file() and p.suffix != ".tmp" for p in root.rglob("*")))
        if used and not append:
            raise ValueError(f"{root} is there and not empty: --append adds to a dataset, --output-dir names another")

    def add(self, episode: dict) -> None:
        self.pending.append(episode)
        if len(self.pending) == FLUSH_EPISODES:
            self.flush()

    def flush(self) -> None:
        """Write the episodes since the last flush; info.json, which counts them, comes last."""
        if not self.pending:
            return
        if not (self.root / "meta" / "info.json").exists():
            write_json(self.root / "meta" / "info.json", self.info)
        chunk, file = divmod(self.num_files, PER_FOLDER)
        first_episode, start = self.info["total_episodes"], self.info["total_frames"]
        schema = pa.schema([(key, column_type(self.features[key])) for key in self.frames])
        tables, rows, frames = [], [], {key: list(arrays) for key, arrays in self.frames.items()}
        for k, episode in enumerate(self.pending, first_episode):
            length = len(episode["action"])
            data = episode["data"] if "data" in episode else episode
            data = {
                **data,
                "timestamp": (np.arange(length) / POLICY_HZ).astype(np.float32),
                "frame_index": np.arange(length),
                "episode_index": np.full(length, k),
                "index": start + np.arange(length),
                "task_index": np.zeros(length, dtype=np.int64),
            }
            tables.append(pa.table([to_column(data[key], schema.field(key).type) for key in self.frames], schema=schema))
            statistics = {key: describe(data[key].reshape(length, -1)) for key in self.frames}
            row = {
                "episode_index": k,
                "tasks": [TASK],
                "length": length,
                "data/chunk_index": chunk,
                "data/file_index": file,
                "dataset_from_index": start,
                "dataset_to_index": start + length,
                "meta/episodes/chunk_index": chunk,
                "meta/episodes/file_index": file,
            }
            for key, values in statistics.items():
                row |= {f"stats/{key}/{name}": value.tolist() for name, value in values.items()}
            rows.append(row)
            start += length
            for key in self.frames:
                frames[key].append(data[key])
        write_parquet(self.root / self.info["data_path"].format(chunk_index=chunk, file_index=file), tables)
        seeds = json.dumps([int(episode["seed"]) for episode in self.pending])
        episodes = pa.Table.from_pylist(rows).replace_schema_metadata({"seeds": seeds})
        write_parquet(self.root / "meta" / "episodes" / f"chunk-{chunk:03d}" / f"file-{file:03d}.parquet", [episodes])
        write_parquet(self.root / "meta" / "tasks.parquet", [tasks_table()])
        statistics = {
            key: describe(np.concatenate(arrays).reshape(start, -1)) for key, arrays in frames.items()
        }
        write_json(
            self.root / "meta" / "stats.json",
            {key: {name: value.tolist() for name, value in values.items()} for key, values in statistics.items()},
        )
        total = first_episode + len(self.pending)
        self.info |= {"total_episodes": total, "total_frames": start, "splits": {"train": f"0:{total}"}}
        write_json(self.root / "meta" / "info.json", self.info)
        self.frames, self.pending, self.num_files = frames, [], self.num_files + 1


def column_type(feature: dict) -> pa.DataType:
    scalar = {"float32": pa.float32(), "int64": pa.int64(), "bool": pa.bool_()}[feature["dtype"]]
    (size,) = feature["shape"]
    return pa.list_(scalar, size) if size > 1 else scalar


def to_column(values: np.ndarray, kind: pa.DataType) -> pa.Array:
    if values.ndim == 1:
        return pa.array(values, type=kind)
    return pa.FixedSizeListArray.from_arrays(pa.array(values.ravel(), type=kind.value_type), type=kind)


def tasks_table() -> pa.Table:
    """meta/tasks.parquet: the task is the pandas index, which its schema metadata says."""
    columns = [("task_index", "int64", "int64"), ("task", "unicode", "object")]
    metadata = {
        "index_columns": ["task"],
        "column_indexes": [],
        "columns": [
            {"name": name, "field_name": name, "pandas_type": kind, "numpy_type": numpy_type, "metadata": None}
            for name, kind, numpy_type in columns
        ],
        "pandas_version": "2.0.0",
    }
    table = pa.table({"task_index": pa.array([0], pa.int64()), "task": [TASK]})
    return table.replace_schema_metadata({"pandas": json.dumps(metadata)})


# Recording


def play_episodes(
    policy,
    envs: PaperSquareVectorEnv,
    first_seed: int,
    num_episodes: int,
    only_successes: bool = False,
    noise_std: float = 0.0,
    noise_correlation: float = 0.0,
    stop: Callable[[], bool] = lambda: False,
) -> Iterator[dict | None]:
    """Play episodes of rising seeds; yields each in the order of the seeds, or None for one that is dropped.

    Ends after `num_episodes` that are not, or when `stop()`.
    """
    num_envs = envs.num_envs
    sizes = {key: feature["shape"][0] for key, feature in make_features().items() if not key.endswith("ndex")}
    buffers = {key: np.zeros((num_envs, envs.max_episode_steps, size), np.float32) for key, size in sizes.items()}
    seeds = first_seed + np.arange(num_envs)
    length, noise = np.zeros(num_envs, dtype=np.int64), np.zeros((num_envs, len(JOINTS)))
    active, fresh = np.ones(num_envs, dtype=bool), np.ones(num_envs, dtype=bool)
    rngs = [None] * num_envs
    kept, next_seed, released, finished = 0, first_seed + num_envs, first_seed, {}
    while active.any() and not stop():
        if fresh.any():
            obs, _ = envs.reset(seed=seeds.tolist(), options={"reset_mask": fresh})
            policy.reset(fresh)
            length[fresh] = 0
            for i in np.flatnonzero(fresh):
                rngs[i] = np.random.default_rng([seeds[i], 2])  # eval.py's disturbances have [seed, 1]
                noise[i] = noise_std * rngs[i].normal(size=len(JOINTS))
        action = np.clip(policy(obs), -1.0, 1.0)
        si = to_si(obs)
        joint_target = si[:, OBS["joint_pos"]] + si[:, OBS["joint_target_error"]]  # (num_envs, 6), rad
        wanted = np.clip(joint_target + envs.act_scale * action, envs.ctrl_low, envs.ctrl_high)
        state, environment_state = to_lerobot(obs)
        obs, rewards, terminations, truncations, _ = envs.step(action + noise)
        done = terminations | truncations
        frame = {
            "observation.state": state,
            "observation.environment_state": environment_state,
            "action": joints_to_lerobot(wanted),
            "next.reward": rewards[:, None],
            "next.done": done[:, None],
            "next.success": terminations[:, None],
        }
        for key, values in frame.items():
            buffers[key][active, length[active]] = values[active]
        length[active] += 1
        for i in np.flatnonzero(active):
            step = noise_std * rngs[i].normal(size=len(JOINTS))
            noise[i] = noise_correlation * noise[i] + np.sqrt(1.0 - noise_correlation**2) * step

        ended = np.flatnonzero(done & active)
        for i in ended:
            keep = terminations[i] or not only_successes
            kept += keep
            episode = {key: buffers[key][i, : length[i]].copy() for key in frame}
            for key in ("next.reward", "next.done", "next.success"):
                episode[key] = episode[key][:, 0].astype(bool if key != "next.reward" else np.float32)
            finished[int(seeds[i])] = {**episode, "seed": int(seeds[i])} if keep else None
        active[ended] = False
        # An episode more only if it will be wanted: then those that were played are the first ones, whatever num_envs
        restarted = ended[: num_episodes - kept - active.sum()]
        fresh = np.isin(np.arange(num_envs), restarted)
        seeds[restarted] = next_seed + np.arange(len(restarted))
        next_seed += len(restarted)
        active[restarted] = True
        envs.paused[:] = ~active
        while released in finished:
            yield finished.pop(released)
            released += 1


if __name__ == "__main__":
    args = tyro.cli(Args)
    started = time.perf_counter()
    try:
        if args.policy:
            policy = make_base_policy(args.policy, il_checkpoint=args.model_path)
            env_kwargs = {}
        else:
            checkpoint = load_checkpoint(args.model_path)
            policy = importlib.import_module(checkpoint["script"]).make_policy(checkpoint)
            env_kwargs = checkpoint["env_kwargs"]
        dataset = Dataset(Path(args.output_dir), make_features(args.video_height * args.videos), args.append)
    except (ValueError, OSError) as error:
        fail(str(error))
    torch.set_num_threads(1)
    stopped = []
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, lambda *_: stopped.append(1))
    envs = PaperSquareVectorEnv(
        min(args.num_envs, args.num_episodes),
        num_threads=args.num_threads,
        autoreset_mode=AutoresetMode.DISABLED,
        **env_kwargs,
    )
    first_seed = dataset.next_seed if args.seed is None else args.seed
    bar = tqdm(total=args.num_episodes, unit="ep")
    dropped = 0
    for episode in play_episodes(
        policy,
        envs,
        first_seed,
        args.num_episodes,
        args.only_successes,
        args.noise_std,
        args.noise_correlation,
        lambda: bool(stopped),
    ):
        if episode is None:
            dropped += 1
        else:
            dataset.add(episode)
            bar.update()
    dataset.flush()
    bar.close()
    envs.close()
    print(f"{dataset.info['total_episodes']} episodes, {dataset.info['total_frames']} frames in {args.output_dir}")
    print(f"train on them: python act.py --dataset {args.output_dir}")
    sys.exit(130 if stopped else 0)
