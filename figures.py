"""Plots and films of what eval.py measures, on files; nothing here changes a number."""

import csv
import importlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv

from env_paper_square import POLICY_HZ, EnvArgs, PaperSquareVectorEnv, room
from runs import write_whole

LARGEST_RESIDUAL = 6**0.5  # norm of a residual action with all six entries at their bounds


def pyplot():
    """Matplotlib's pyplot, drawing to files; imported here because most evaluations plot nothing."""
    import matplotlib

    matplotlib.use("Agg")
    return importlib.import_module("matplotlib.pyplot")


def save_figure(figure, path: Path, dpi: int) -> None:
    """Write a figure as PNG, and close it."""
    write_whole(path, lambda temporary: figure.savefig(temporary, dpi=dpi, format="png"))
    pyplot().close(figure)


def plot_sweeps(sweeps: list[dict], facts: dict[str, tuple], path: Path) -> None:
    """Success over the values of each sweep, with the 95 % intervals as bands and the range of the trainings.

    `facts` has of each name what is varied, and that range, as `eval.SWEEPS`.
    """
    plt = pyplot()
    columns = min(len(sweeps), 3)
    rows = -(-len(sweeps) // columns)
    shape = (3.2 * columns + 3.2 * (columns == 1), 3.0 * rows + (rows == 1))
    figure, axes = plt.subplots(rows, columns, figsize=shape, layout="constrained", squeeze=False, sharey=True)
    for axis in axes.flat[len(sweeps) :]:
        axis.set_axis_off()
    for sweep, axis in zip(sweeps, axes.flat, strict=False):
        label, trained = facts[sweep["name"]]
        axis.axvspan(*trained, color="0.9", label="training range")
        for policy, points in sweep["policies"].items():
            (line,) = axis.plot(sweep["values"], [100 * row["success_rate"] for row in points], "o-", label=policy)
            low, high = 100 * np.array([row["ci95"] for row in points]).T
            axis.fill_between(sweep["values"], low, high, color=line.get_color(), alpha=0.2, linewidth=0)
        axis.set(xlabel=label, ylim=(-3, 103))
        axis.xaxis.label.set_size("small")
        axis.locator_params(axis="x", nbins=5)
        axis.grid(alpha=0.3)
    for axis in axes[:, 0]:
        axis.set_ylabel("success, %")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize="small")
    save_figure(figure, path, dpi=110)


def plot_results(results: dict[str, dict], path: Path, tape_half_size: float = EnvArgs.tape_half_size) -> None:
    """Success, time to success, where the sheet ends against what fits, and residual norm; tape in m."""
    plt = pyplot()
    figure, axes = plt.subplots(2, 2, figsize=(10, 7.5), layout="constrained")
    (bars, times), (finals, norms) = axes
    for k, (name, row) in enumerate(results.items()):
        rate, (low, high) = row["success_rate"], row["ci95"]
        errors = [[100 * max(rate - low, 0)], [100 * max(high - rate, 0)]]
        bars.barh(k, 100 * rate, color=f"C{k}", xerr=errors, capsize=4, label=name)
        bars.text(104, k, f"{100 * rate:.1f} %", va="center")
        episodes = row["episodes"]
        seconds = sorted(episode["length"] / POLICY_HZ for episode in episodes if episode["success"])
        end = max(episode["length"] for episode in episodes) / POLICY_HZ
        share = 100 * np.append(np.arange(len(seconds) + 1), len(seconds)) / len(episodes)
        times.step([0, *seconds, end], share, where="post", color=f"C{k}")
        distances = [max(1000 * episode["final_distance_m"], 0.5) for episode in episodes]  # a log scale has no zero
        yaws = [np.degrees(episode["final_yaw_error_rad"]) for episode in episodes]
        finals.scatter(distances, yaws, s=8, color=f"C{k}", alpha=0.5)
        by_step = row["residual_norm_by_step"]
        norms.plot(np.arange(1, len(by_step) + 1) / POLICY_HZ, by_step, color=f"C{k}")
    bars.set(xlabel="success, % (bar: 95 % interval)", xlim=(0, 122), xticks=range(0, 101, 20), yticks=[])
    bars.invert_yaxis()
    times.set(xlabel="time, s", ylabel="episodes solved by then, %", xlim=(0, None), ylim=(-3, 103))

    # Each side of the square bounds the offset along it; drawn for a sheet that is off along one of them only
    yaw = np.linspace(0, np.pi / 4, 2000)
    yaw = yaw[room(yaw, tape_half_size)[:, 0] >= 0.0005]
    long, short = 1000 * room(yaw, tape_half_size).T
    finals.plot(long, np.degrees(yaw), "k-", label="fits up to here, off along its length only")
    finals.plot(short, np.degrees(yaw), "k:", label="fits up to here, off across it only")
    finals.legend(loc="upper center", fontsize="small")
    finals.set(xlabel="final distance, mm (0.5: or less)", xscale="log", ylabel="final yaw error, deg", ylim=(-1, 46))
    norms.set(xlabel=f"time, s (mean of the episodes still played; at most {LARGEST_RESIDUAL:.2f})")
    norms.set(ylabel="norm of the residual action", xlim=(0, None), ylim=(0, None))
    for axis in axes.flat:
        axis.grid(alpha=0.3)
    figure.legend(*bars.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    save_figure(figure, path, dpi=100)


def plot_steps(log: Path, path: Path) -> None:
    """The last episode in a log of real_arm.py: where the joints were sent and are, the sheet's way, the steps' times.

    Grey: the arm held.
    """
    with log.open(newline="") as file:
        rows = list(csv.DictReader(file))
    last = max((row["episode"] for row in rows if row["episode"]), key=int, default="")
    rows = [row for row in rows if row["episode"] == last]

    def column(name: str) -> np.ndarray:
        return np.array([float(row[name] or "nan") for row in rows])

    plt = pyplot()
    figure, axes = plt.subplots(3, 3, figsize=(13, 9), layout="constrained")
    time = column("time") - float(rows[0]["time"])
    held = np.array([row["reason"] != "" for row in rows])
    joints = [name.removeprefix("target_") for name in rows[0] if name.startswith("target_")]
    for joint, axis in zip(joints, axes.flat, strict=False):
        axis.plot(time, np.degrees(column(f"target_{joint}")), label="sent")
        axis.plot(time, np.degrees(column(f"measured_{joint}")), label="measured")
        axis.set(title=joint, ylabel="deg")
    axes[0, 0].legend()
    way, age, periods = axes[2]
    way.plot(1000 * column("sheet_x"), 1000 * column("sheet_y"))
    way.set(title="the sheet's way, as it was seen", xlabel="x, mm", ylabel="y, mm", aspect="equal")
    age.plot(time, column("sheet_age"))
    age.set(title="age of the sheet's pose", xlabel="time, s", ylabel="s", ylim=(0, None))
    periods.plot(time[1:], 1000 * np.diff(time))
    periods.set(title="time between steps", xlabel="time, s", ylabel="ms", ylim=(0, None))
    for axis in (*axes.flat[:6], age, periods):
        low, high = axis.get_ylim()
        axis.fill_between(time, low, high, where=held, color="0.85", linewidth=0, zorder=0)
        axis.set_ylim(low, high)
        axis.grid(alpha=0.3)
    save_figure(figure, path, dpi=90)


def choose_films(episodes: list[dict], count: int) -> dict[int, str]:
    """Which of a policy's episodes, as results.json has them, are worth a film: the kind of each by its seed.

    The fastest success, that of median length, then the first failures; `count` at most, no episode twice.
    """
    solved = sorted((episode for episode in episodes if episode["success"]), key=lambda episode: episode["length"])
    chosen = {}
    if solved:
        chosen[solved[0]["seed"]] = "best"
        chosen.setdefault(solved[(len(solved) - 1) // 2]["seed"], "median")
    chosen |= {episode["seed"]: "failure" for episode in episodes if not episode["success"]}
    return dict(list(chosen.items())[:count])


def check_rendering() -> None:
    """Raise UserError if offscreen rendering does not work here."""
    envs = PaperSquareVectorEnv(1)
    envs.reset(seed=0)
    envs.render_frame()
    envs.close()


def run_episode(policy, envs: VectorEnv, seed: int) -> Iterator[tuple[int, str, np.ndarray | dict]]:
    """Play one episode in a single environment; yields the step, the outcome, which is empty until the end, and the
    observation."""
    obs, _ = envs.reset(seed=[seed])
    policy.reset(np.ones(1, dtype=bool))
    step, outcome = 0, ""
    yield step, outcome, obs
    while not outcome:
        obs, _, terminations, truncations, _ = envs.step(policy(obs))
        step, outcome = step + 1, "success" if terminations[0] else "failure" if truncations[0] else ""
        yield step, outcome, obs


def encode_mp4(frames: Sequence[np.ndarray], **options) -> bytes:
    """Frames (height, width, 3) uint8 as an MP4; options are imageio's. Raises OSError if it is not whole."""
    import imageio

    film = imageio.mimwrite("<bytes>", frames, "mp4", **options)
    kinds, end = set(), 0  # of its boxes, each of which begins with its size; a full disk is nothing to imageio
    while end < len(film) and (size := int.from_bytes(film[end : end + 4], "big")) >= 8:
        kinds.add(film[end + 4 : end + 8])
        end += size
    if end != len(film) or b"moov" not in kinds:
        raise OSError("ffmpeg did not write the whole film: is there room in the folder for temporary files?")
    return film


def decode_mp4(path: Path) -> Iterator[np.ndarray]:
    """The frames of a film, (height, width, 3) uint8 each; raises OSError or ValueError if it cannot be read."""
    import imageio

    with imageio.get_reader(path, "mp4") as film:
        yield from film


def shrink(frame: np.ndarray, size: int) -> np.ndarray:
    """The middle of an image (height, width, 3) uint8, as a square of `size` pixels."""
    from PIL import Image

    height, width = frame.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    box = (left, top, left + side, top + side)
    return np.asarray(Image.fromarray(frame).resize((size, size), Image.Resampling.BOX, box))


def film_episode(
    policies: dict, tasks: dict, seed: int, path: Path, camera: str = "side", height: int = 480, stride: int = 2
) -> None:
    """Film one episode, the policies side by side, each with its name and outcome; path ends in .mp4 or .webp.

    `tasks[name](num_envs)` makes the environment of a policy. A bar at the lower edge is the norm of the residual
    action, in a frame of its largest length. Beside a policy that sees pixels is what it sees.
    """
    from PIL import Image, ImageDraw

    view = {"render_mode": "rgb_array", "camera": camera, "height": height, "width": 4 * height // 3}
    films = []
    for name, policy in policies.items():
        envs = tasks[name](1, autoreset_mode=AutoresetMode.DISABLED, **view)
        film = []
        for step, outcome, obs in run_episode(policy, envs, seed):
            if step % stride == 0 or outcome:
                residual_action = getattr(policy, "residual_action", None)  # (1, 6), at step 0 of an earlier episode
                norm = None if residual_action is None else float(np.linalg.norm(residual_action)) * (step > 0)
                seen = [x[0] for name, x in obs.items() if name != "state"] if isinstance(obs, dict) else []
                film.append((step, outcome, norm, envs.render_frame(), seen))
        envs.close()
        size = height // 24  # of the letters, pixels
        for k, (step, outcome, norm, frame, seen) in enumerate(film):
            picture = Image.fromarray(frame)
            draw = ImageDraw.Draw(picture)
            text = f"{name}  {step / POLICY_HZ:.1f} s" + (f": {outcome}" if outcome else "")
            draw.text((12, 8), text, fill=(20, 20, 20), font_size=size)
            if norm is not None:
                left, right, low = 12 + 5 * size, picture.width - 12, picture.height - 8
                draw.text((12, low), "residual", fill=(20, 20, 20), font_size=size, anchor="lb")
                draw.rectangle((left, low - size, right, low), outline=(20, 20, 20))
                filled = left + (right - left) * min(norm / LARGEST_RESIDUAL, 1.0)
                draw.rectangle((left, low - size, filled, low), fill=(31, 119, 180))
            side = height // max(len(seen), 1)
            scaled = [Image.fromarray(x).resize((side, side), Image.Resampling.NEAREST) for x in seen]
            film[k] = np.concatenate([picture, np.concatenate(scaled)], axis=1) if seen else np.asarray(picture)
        films.append(film)
    longest = max(len(film) for film in films)
    films = [film + [film[-1]] * (longest + 15 - len(film)) for film in films]
    pictures = [np.concatenate(frames, axis=1) for frames in zip(*films, strict=True)]
    if path.suffix == ".webp":
        first, *others = [Image.fromarray(picture) for picture in pictures]
        options = {"append_images": others, "duration": 1000 * stride // POLICY_HZ, "loop": 0, "quality": 60}
        write_whole(path, lambda temporary: first.save(temporary, "WEBP", save_all=True, **options))
    else:
        film = encode_mp4(pictures, fps=POLICY_HZ // stride, macro_block_size=8)
        write_whole(path, lambda temporary: temporary.write_bytes(film))


def watch(policies: dict, tasks: dict, seeds: Sequence[int]) -> None:
    """Play the episodes in MuJoCo's viewer, one policy after the other, until its window is closed."""
    for name, policy in policies.items():
        envs = tasks[name](1, autoreset_mode=AutoresetMode.DISABLED, render_mode="human")
        for seed in seeds:
            for _, outcome, _ in run_episode(policy, envs, seed):
                if outcome:
                    print(f"{name}, episode {seed}: {outcome}")
                if envs.viewer_closed:
                    envs.close()
                    return
        envs.close()
