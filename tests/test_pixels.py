"""Frames: of the state that they come with, late, varied, the same by the same seed, and made only on request."""

import os
import pickle
import subprocess
import sys
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode
from numpy.testing import assert_array_equal
from test_runs import ROOT, assert_one_line

import env_paper_square
import eval as evaluation
import pixels
from base_policies import JacobianIKPolicy
from env_paper_square import PaperSquareEnv, PaperSquareVectorEnv
from runs import UserError

CAMERAS, SIZE = ("top", "wrist"), 24


def make(num_envs=2, **kwargs):
    return PaperSquareVectorEnv(num_envs, **{"pixels": CAMERAS, "pixel_size": SIZE, **kwargs})


@pytest.fixture(scope="module", autouse=True)
def _rendering():
    try:
        envs = make(1)
        envs.reset(seed=0)
        envs.close()
    except UserError as error:  # neither EGL nor OSMesa
        pytest.skip(str(error))


def play(envs, steps, seed=0):
    """Observations of random actions, the first one included; the last ones of the episodes that ended, by step."""
    rng = np.random.default_rng(1)
    seen, finals = [envs.reset(seed=seed)[0]], {}
    for step in range(1, steps + 1):
        obs, _, _, _, infos = envs.step(rng.uniform(-1, 1, (envs.num_envs, 6)))
        seen.append(obs)
        if "final_obs" in infos:
            finals[step] = infos["final_obs"]
    return seen, finals


def direct(envs, index, camera):
    """A frame of an environment as it is now, by another renderer than its own."""
    eyes = pixels.Eyes(1, [camera], envs.pixel_size, envs.markers)
    one = slice(index, index + 1)
    states = {"qpos": np.array(envs._qpos[one]), "tape_half_size": envs._tape_half_size[one]}
    states["base_pos"] = envs._body_pos[one, envs._base]
    eyes.look(np.zeros(1, dtype=int), states, {name: x[one] for name, x in envs.drawn.items()})
    eyes.close()
    return eyes.frames[camera][0]


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_frames_are_of_the_state_that_they_are_returned_with(mode):
    envs = make(3, autoreset_mode=mode, fixed={"lag": 0}, max_episode_steps=5)
    rng = np.random.default_rng(0)
    obs, _ = envs.reset(seed=0)
    for step in range(12):
        for camera in CAMERAS:
            for i in range(3):
                assert_array_equal(obs[camera][i], direct(envs, i, camera), err_msg=f"{step} {camera} {i}")
        assert (obs["top"][0] != obs["top"][1]).any()
        obs, _, terminations, truncations, _ = envs.step(rng.uniform(-1, 1, (3, 6)))
        if mode == AutoresetMode.DISABLED and (truncations | terminations).any():
            obs, _ = envs.reset(options={"reset_mask": truncations | terminations})
    envs.close()


def test_the_last_frames_of_an_episode_are_its_own():
    ending, going_on = (make(fixed={"lag": 0}, max_episode_steps=steps) for steps in (4, 100))
    (seen, finals), (others, _) = (play(envs, 4) for envs in (ending, going_on))
    for i in range(2):
        for name, x in finals[4][i].items():
            assert_array_equal(x, others[4][name][i])
            assert (x != seen[4][name][i]).any()  # which is the next episode's first


def test_frames_are_late_by_the_lag():
    late, prompt = (play(make(fixed={"lag": lag}), 9)[0] for lag in (3, 0))
    for camera in CAMERAS:
        for step in range(10):
            assert_array_equal(late[step][camera], prompt[max(step - 3, 0)][camera])
        assert (prompt[9][camera] != prompt[6][camera]).any()


def test_an_episode_is_the_same_with_frames_and_without():
    seen, _ = play(make(max_episode_steps=6), 20)
    others, _ = play(PaperSquareVectorEnv(2, max_episode_steps=6), 20)
    for obs, other in zip(seen, others, strict=True):
        assert_array_equal(obs["state"], other)


def test_a_seed_gives_the_same_frames_however_many_threads_step():
    one, other = (play(make(5, num_threads=threads, max_episode_steps=6), 15)[0] for threads in (1, 2))
    for obs, also in zip(one, other, strict=True):
        for name, x in obs.items():
            assert_array_equal(x, also[name])


def test_looks_are_what_was_drawn_and_within_their_range():
    envs = make(64)
    envs.reset(seed=0)
    drawn = envs.drawn
    assert 0.0018 < np.abs(drawn["camera_pos"]).max() <= pixels.CAMERA_POS
    assert np.radians(0.9) < np.abs(drawn["camera_angle"]).max() <= pixels.CAMERA_ANGLE
    assert len(np.unique(drawn["camera_pos"])) == drawn["camera_pos"].size
    for name in ("table", "paper", "arm", "tape"):
        assert drawn[name].std(axis=0).min() > 0.02 and drawn[name].min() >= 0 and drawn[name].max() <= 1
    eye, nominal = (pixels.Eyes(1, CAMERAS, SIZE) for _ in range(2))
    eye.dress({name: drawn[name][3] for name in pixels.LOOKS})
    for k, camera in enumerate(env_paper_square.CAMERAS):
        moved = eye.scene.camera(camera).pos - nominal.scene.camera(camera).pos
        np.testing.assert_allclose(moved, drawn["camera_pos"][3].reshape(-1, 3)[k])
        dot = abs(eye.scene.camera(camera).quat @ nominal.scene.camera(camera).quat)
        angle = np.linalg.norm(drawn["camera_angle"][3].reshape(-1, 3)[k])
        np.testing.assert_allclose(2 * np.arccos(min(dot, 1.0)), angle, rtol=1e-4)
    for name, material in pixels.MATERIALS.items():
        np.testing.assert_allclose(eye.scene.material(material).rgba[:3], drawn[name][3], rtol=1e-6)


def test_looks_can_be_fixed_and_switched_off():
    blue = make(fixed={"table": np.array([0.0, 0.0, 1.0]), "light": 1.0}, pixels=("top",), pixel_size=64)
    frame = blue.reset(seed=0)[0]["top"][0]
    assert (frame[:4, :4, 2] > 100).all() and (frame[:4, :4, :2] < 20).all()  # a corner of the table
    plain, nominal = make(6, randomize_looks=0.0, randomize_camera=0.0), make(6, randomize_arm=False)
    for envs in (plain, nominal):
        envs.reset(seed=0)
        for name in pixels.LOOKS:
            assert (envs.drawn[name] == envs.drawn[name][0]).all(), name
        assert not envs.drawn["camera_pos"].any()


def test_arguments_that_make_no_frames_are_refused():
    for kwargs in ({"pixels": ("front",)}, {"pixel_size": 4}, {"randomize_camera": -1}, {"randomize_looks": 2}):
        with pytest.raises(ValueError, match=next(iter(kwargs))):
            make(**kwargs)
    with pytest.raises(ValueError, match="chair.* table"):
        PaperSquareVectorEnv(1, fixed={"chair": 0.5})
    with pytest.raises(ValueError, match="table"):
        make(fixed={"table": 1.5})
    assert_array_equal(PaperSquareVectorEnv(1, fixed={"table": 0.5}).reset(seed=0)[0].shape, (1, 33))  # nothing sees it


def test_spaces_hold_the_observations():
    envs = make(2)
    obs, _ = envs.reset(seed=0)
    assert envs.observation_space.contains(obs)
    single = PaperSquareEnv(pixels=CAMERAS, pixel_size=SIZE)
    first, _ = single.reset(seed=0)
    assert single.observation_space.contains(first) and single.observation_space == envs.single_observation_space
    for name, x in first.items():
        assert_array_equal(x, obs[name][0])
    made = gym.make("PaperSquare-v0", pixels=CAMERAS, pixel_size=SIZE)
    assert_array_equal(made.reset(seed=0)[0]["top"], first["top"])
    made.close()


def test_copies_and_states_go_on_with_the_same_frames():
    envs = make()
    play(envs, 7)
    copy, other = pickle.loads(pickle.dumps(envs)), make()
    other.reset(seed=5)
    other.load_state_dict(envs.state_dict())
    actions = np.full((2, 6), 0.5)
    for _ in range(3):
        obs, also, again = (each.step(actions)[0] for each in (envs, copy, other))
        for name, x in obs.items():
            assert_array_equal(x, also[name])
            assert_array_equal(x, again[name])


@pytest.mark.parametrize("kwargs", [{}, {"pixels": (), "render_mode": "rgb_array", "height": SIZE, "width": SIZE}])
def test_closing_environments_leaves_others_their_frames(kwargs):
    first, second = make(**kwargs), make(fixed={"lag": 0})
    first.reset(seed=0)
    first.render()
    second.reset(seed=0)
    first.close()
    obs, *_ = second.step(np.zeros((2, 6)))
    for camera in CAMERAS:
        assert_array_equal(obs[camera][1], direct(second, 1, camera))


def test_what_is_paused_is_not_looked_at():
    envs = make()
    before, _ = envs.reset(seed=0)
    envs.paused[1] = True
    for _ in range(6):
        obs, *_ = envs.step(np.ones((2, 6)))
    assert_array_equal(obs["top"][1], before["top"][1])
    assert (obs["top"][0] != before["top"][0]).any()


def test_without_pixels_there_is_no_renderer(monkeypatch):
    def refuse(*args):
        raise AssertionError("a renderer was made")

    monkeypatch.setattr(env_paper_square, "make_renderer", refuse)
    monkeypatch.setattr(pixels, "make_renderer", refuse)
    evaluation.play_episodes(JacobianIKPolicy(), range(2), PaperSquareVectorEnv)
    code = (
        "import sys, env_paper_square as e; e.PaperSquareVectorEnv(2).reset(seed=0); assert 'pixels' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_triton_is_loaded_before_a_renderer(tmp_path):
    """torch's CUDA build loads it late, when an optimizer is made, and loaded after Mesa's EGL it crashes."""
    (tmp_path / "triton.py").write_text("import sys\nassert 'OpenGL' not in sys.modules\nprint('loaded')\n")
    program = "import torch, env_paper_square as e; e.PaperSquareVectorEnv(1, pixels=('top',)).reset(seed=0)"
    environment = {name: x for name, x in os.environ.items() if name != "MUJOCO_GL"} | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "loaded\n"), done.stderr


def test_where_nothing_renders_one_line_says_what_to_install(tmp_path):
    (tmp_path / "OpenGL").mkdir()
    (tmp_path / "OpenGL" / "__init__.py").write_text("raise ImportError('no OpenGL here')\n")
    environment = {name: x for name, x in os.environ.items() if name not in ("DISPLAY", "WAYLAND_DISPLAY", "MUJOCO_GL")}
    environment["PYTHONPATH"] = str(tmp_path)
    command = [
        sys.executable,
        str(ROOT / "dagger.py"),
        "--total-timesteps",
        "64",
        "--num-envs",
        "2",
        "--num-steps",
        "8",
    ]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert_one_line(SimpleNamespace(code=done.returncode, err=done.stderr), "libegl1")
    assert not list((tmp_path / "runs").glob("*"))
