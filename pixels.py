"""Cameras on the simulated arm: frames of a batch of environments, with looks that vary.

    envs = PaperSquareVectorEnv(16, pixels=("top", "side"), pixel_size=64)
    observations, infos = envs.reset(seed=0)
    observations["top"]                             # (16, 64, 64, 3) uint8, beside observations["state"]

The environment imports it only for that. A frame takes 0.7 ms of a core, because nothing in it is finer than its
pixels: what is round has few faces, the table has no grain, and there are no shadows. One core renders them all: MuJoCo
holds Python's lock meanwhile.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import mujoco
import numpy as np

from env_paper_square import (
    CAMERAS,
    PIXEL_ARGUMENTS,
    SCENE_PATH,
    close_renderer,
    make_renderer,
    pose_scene,
    scene_option,
)
from runs import Flags, Real, Whole

FACES = 8  # around what is round
CAMERA_POS, CAMERA_ANGLE = 0.002, 0.01745  # m and rad, by how much cameras are off along and about each axis
MATERIALS = {"table": "desk", "paper": "paper", "arm": "printed", "tape": "tape"}  # in the scene

# What is drawn for every episode, by name: how many numbers, and the limits of their values
LOOKS = {
    "camera_pos": (3 * len(CAMERAS), -0.1, 0.1),  # m, along the axes of what the camera is mounted on
    "camera_angle": (3 * len(CAMERAS), -0.5, 0.5),  # rad, about the camera's own axes
    "light": (3, 0, 10),  # from all around, of the lamp, of the window; times nominal
    **dict.fromkeys(MATERIALS, (3, 0, 1)),  # red, green, blue
}


@dataclass
class PixelArgs(Flags):
    pixels: tuple[Literal[CAMERAS], ...] = ("top", "side")
    """cameras"""
    pixel_size: Whole[36, 512] = 64
    """height and width of their frames, pixels"""
    randomize_camera: Real[0, 10] = 1.0
    """by how much the cameras are off at most, times 2 mm and 1 degree along and about each axis"""
    randomize_looks: Real[0, 1] = 1.0
    """share of the range of light and colours"""


def pixel_kwargs(args: PixelArgs) -> dict:
    """The constructor arguments of the environment that are these flags."""
    return {name: getattr(args, name) for name in PIXEL_ARGUMENTS}


def draw_looks(seeds: np.ndarray, camera: float, looks: float) -> dict[str, np.ndarray]:
    """The looks of episodes, (num, size) by name, as widely as the two scales say; `seeds` (num, any) uint32."""
    episodes = []
    for seed in seeds:
        rng = np.random.default_rng(seed)
        unit = {name: rng.uniform(-1.0, 1.0, size) for name, (size, *_) in LOOKS.items()}
        anything = {
            "light": 1.0 + 0.3 * unit["light"],
            "table": rng.uniform(0.15, 0.7) + 0.15 * unit["table"],  # a grey, and a tint
            "paper": 0.9 + 0.1 * unit["paper"],
            "arm": 0.5 + 0.45 * unit["arm"],
            "tape": np.array([0.8, 0.13, 0.13]) + 0.12 * unit["tape"],
        }
        nominal = {"light": 1.0, "table": (0.7, 0.55, 0.41), "paper": (0.96, 0.96, 0.95), "arm": (1.0, 0.77, 0.11)}
        nominal |= {"tape": (0.82, 0.09, 0.1)}
        drawn = {name: np.asarray(nominal[name]) * (1 - looks) + looks * x for name, x in anything.items()}
        drawn["camera_pos"] = camera * CAMERA_POS * unit["camera_pos"]
        drawn["camera_angle"] = camera * CAMERA_ANGLE * unit["camera_angle"]
        episodes.append(drawn)
    return {name: np.stack([drawn[name] for drawn in episodes]) for name in LOOKS}


class Eyes:
    """Cameras of `num_envs` environments: `frames[name]` (num_envs, size, size, 3) uint8, what each saw last."""

    def __init__(self, num_envs: int, cameras: Sequence[str], size: int, markers: bool = False):
        self.frames = {camera: np.zeros((num_envs, size, size, 3), dtype=np.uint8) for camera in cameras}
        self.option = scene_option(markers)
        self.scene = mujoco.MjModel.from_xml_path(str(SCENE_PATH))
        self.data = mujoco.MjData(self.scene)
        self.cameras = [self.scene.camera(name).id for name in CAMERAS]
        self.materials = {name: self.scene.material(material).id for name, material in MATERIALS.items()}
        self.cam_pos, self.cam_quat = self.scene.cam_pos.copy(), self.scene.cam_quat.copy()
        self.diffuse, self.ambient = self.scene.light_diffuse.copy(), self.scene.vis.headlight.ambient.copy()
        quality = self.scene.vis.quality
        quality.offsamples, quality.numquads, quality.numslices, quality.numstacks = 0, 1, FACES, FACES
        self.scene.mat_texid[:] = -1
        self.renderer = make_renderer(self.scene, size, size)
        for flag in (mujoco.mjtRndFlag.mjRND_SHADOW, mujoco.mjtRndFlag.mjRND_REFLECTION):
            self.renderer.scene.flags[flag] = False

    def look(self, ids: np.ndarray, states: dict, looks: dict) -> None:
        """Render the environments `ids` anew; `states` are the arguments of `pose_scene`, and `looks` what was drawn,
        (num_envs, ...) each, by name."""
        for i in ids:
            self.dress({name: looks[name][i] for name in LOOKS})
            pose_scene(self.scene, self.data, **{name: x[i] for name, x in states.items()})
            for camera, frames in self.frames.items():
                self.renderer.update_scene(self.data, camera, self.option)
                self.renderer.render(out=frames[i])

    def dress(self, looks: dict[str, np.ndarray]) -> None:
        """Give the scene the looks of one episode."""
        self.scene.cam_pos[self.cameras] = self.cam_pos[self.cameras] + looks["camera_pos"].reshape(-1, 3)
        self.scene.cam_quat[:] = self.cam_quat
        for camera, angle in zip(self.cameras, looks["camera_angle"].reshape(-1, 3), strict=True):
            mujoco.mju_quatIntegrate(self.scene.cam_quat[camera], angle, 1.0)
        self.scene.vis.headlight.ambient[:] = self.ambient * looks["light"][0]
        self.scene.light_diffuse[:] = self.diffuse * looks["light"][1:, None]
        for name, material in self.materials.items():
            self.scene.mat_rgba[material, :3] = looks[name]

    def close(self) -> None:
        close_renderer(self.renderer)
