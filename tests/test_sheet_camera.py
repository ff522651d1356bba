"""What the camera sees: the printed sheet, poses from frames with the arm over the sheet, and None for anything else.

Frames are rendered once: two views of a few moments of one episode, with markers and without.
"""

import re
import time

import cv2
import mujoco
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode
from numpy.testing import assert_allclose
from test_runs import ROOT, assert_one_line, run

import sheet_camera
from base_policies import JacobianIKPolicy
from env_paper_square import (
    MARKER_GROUP,
    SCENE_PATH,
    SHEET_HALF_SIZE,
    SQUARE_POS,
    PaperSquareVectorEnv,
    as_drawn,
    scene_option,
)
from runs import UserError
from sheet_camera import (
    DICTIONARY,
    MARKER_SIZE,
    MARKERS,
    SheetCamera,
    camera_position,
    marker_boxes,
    print_sheet,
    rigid_fit,
    rotation,
    transform,
    worsen,
)

STEPS = range(0, 200, 20)


def pose_error(sighting, pose):
    """Distance, mm, and turn, degrees."""
    x, y, yaw = sighting.pose - pose
    return 1000 * np.hypot(x, y), np.degrees(abs((yaw + np.pi) % (2 * np.pi) - np.pi))


@pytest.fixture(scope="module")
def episode():
    """Frames (10, 480, 640, 3) of the camera "desk" by whether there are markers, and the sheet's poses (10, 3)."""
    envs = PaperSquareVectorEnv(1, autoreset_mode=AutoresetMode.DISABLED, render_mode="rgb_array", camera="desk")
    policy, frames, poses = JacobianIKPolicy(), {True: [], False: []}, []
    observations, _ = envs.reset(seed=3)
    for step in range(STEPS[-1] + 1):
        if step in STEPS:
            for envs.markers in (True, False):
                try:
                    frames[envs.markers].append(envs.render_frame())
                except UserError as error:  # neither EGL nor OSMesa
                    pytest.skip(str(error))
            poses.append(envs.sheet_pose[0])
        observations, *_ = envs.step(policy(observations))
    envs.close()
    assert np.ptp(poses, axis=0)[1] > 0.1  # it was dragged, the arm over it
    return {markers: np.array(images) for markers, images in frames.items()}, np.array(poses)


@pytest.mark.parametrize("markers", [True, False])
def test_poses_of_an_episode_with_the_arm_over_the_sheet(episode, markers):
    frames, poses = episode
    camera, errors, seconds = SheetCamera(markers=markers), [], []
    for k, (frame, pose) in enumerate(zip(frames[markers], poses, strict=True)):
        start = time.process_time()
        sighting = camera.update(frame, STEPS[k] / 30)
        seconds.append(time.process_time() - start)
        if sighting is not None:
            assert sighting is camera.last and sighting.time == STEPS[k] / 30 and 0 < sighting.confidence <= 1
            errors.append(pose_error(sighting, pose))
    assert len(errors) >= len(poses) - (not markers)
    assert_allclose(np.max(errors, axis=0), 0, atol=1.5)  # mm and degrees, the largest of all
    assert np.median(errors, axis=0)[0] < 0.5
    assert np.median(seconds) < 0.1  # on a busy machine; 7 ms alone


@pytest.mark.parametrize("markers", [True, False])
def test_a_worse_camera_is_still_good_enough(episode, markers):
    frames, poses = episode
    camera, rng = SheetCamera(markers=markers), np.random.default_rng(0)
    seen = [camera.update(worsen(frame, 8.0, rng), STEPS[k] / 30) for k, frame in enumerate(frames[markers])]
    errors = [pose_error(sighting, pose) for sighting, pose in zip(seen, poses, strict=True) if sighting]
    assert len(errors) >= len(poses) - 1
    assert_allclose(np.max(errors, axis=0), 0, atol=4.0)  # mm and degrees
    assert np.median(errors, axis=0)[0] < 1.5


def test_the_camera_is_found_by_the_tape(episode):
    frames, _ = episode
    camera = SheetCamera()
    camera.update(frames[True][0], 0.0)
    place = transform(camera.to_arm, camera.position[:2])
    truth = mujoco.MjModel.from_xml_path(str(SCENE_PATH)).camera("desk").pos
    assert_allclose([*place, camera.position[2]], truth, atol=0.02)


def test_a_camera_straight_above_is_somewhere_above():
    above = np.array([[0.001, 0, -0.32], [0, -0.001, 0.24], [0, 0, 1]])  # 640 x 480 pixels, one mm each
    assert_allclose(camera_position(above, (640, 480)), [0, 0, 0.64], atol=1e-6)


def paint_over(frame, camera, points, colour=(90, 70, 60)):
    """A copy of a frame in which a polygon (n, 2) on the table, m, in the arm's frame, is hidden."""
    pixels = transform(np.linalg.inv(camera.to_arm @ camera.homography), np.array(points)).round().astype(np.int32)
    return cv2.fillPoly(frame.copy(), [pixels], colour)


def sheet_part(pose, x0, y0, x1, y1):
    """A rectangle in the sheet's frame, from, to, in half sizes of it, on the table, (4, 2)."""
    corners = np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1]]) * SHEET_HALF_SIZE
    return pose[:2] + corners @ rotation(pose[2]).T


@pytest.mark.parametrize("corner", range(4))
def test_one_marker_or_one_corner_of_the_sheet_suffices(episode, corner):
    frames, poses = episode
    pose, (x, y) = poses[0], [(1, 1), (-1, 1), (-1, -1), (1, -1)][corner]
    camera = SheetCamera()
    assert camera.update(frames[True][0], 0.0).confidence == 1.0
    hidden = paint_over(frames[True][0], camera, sheet_part(pose, -1.2 * x, -1.2, 0, 1.2))
    hidden = paint_over(hidden, camera, sheet_part(pose, -1.2, -1.2 * y, 1.2, 0))
    sighting = camera.update(hidden, 0.1)
    assert sighting.confidence < 0.6
    assert_allclose(pose_error(sighting, pose), 0, atol=2.0)


def test_nothing_seen_keeps_the_last_pose_and_its_time(episode):
    frames, poses = episode
    camera = SheetCamera()
    first = camera.update(frames[True][0], 0.0)
    hidden = paint_over(frames[True][0], camera, sheet_part(poses[0], -1.2, -1.2, 1.2, 1.2), colour=(185, 145, 110))
    assert camera.update(hidden, 1.0) is None
    assert camera.last is first and first.time == 0.0
    again = camera.update(frames[True][0], 2.0)
    assert camera.last is again and again.time == 2.0


def test_the_tape_is_remembered_under_the_arm_and_found_anew_when_the_camera_is_moved(episode):
    frames, poses = episode
    camera = SheetCamera()
    camera.update(frames[True][0], 0.0)
    ring = np.array([[1, 1], [-1, 1], [-1, -1], [1, -1]]) * 0.1
    half_hidden = paint_over(frames[True][0], camera, SQUARE_POS + ring * [1, 1] + [0.05, 0.05])
    assert_allclose(pose_error(camera.update(half_hidden, 0.1), poses[0]), 0, atol=1.0)
    moved = np.roll(frames[True][0], (12, 25), axis=(0, 1))
    assert_allclose(pose_error(camera.update(moved, 0.2), poses[0]), 0, atol=1.5)


def test_no_tape_no_pose(episode):
    frames, _ = episode
    camera = SheetCamera()
    assert camera.update(np.full((480, 640, 3), 128, dtype=np.uint8), 0.0) is None
    assert camera.update(frames[True][0][:, :, ::-1].copy(), 0.0) is None  # blue tape
    assert camera.homography is None and camera.last is None
    red = np.zeros((480, 640, 3), dtype=np.uint8)
    red[100:300, 200:400] = 200, 20, 20  # a red sheet, which is no square of tape
    assert camera.update(red, 0.0) is None and camera.homography is None


def desk(size, boxes=(), yaw=0.2, tilt=0.0):
    """A picture, a pixel per mm, from above: tape square, and a white sheet of a size, mm, with dark boxes, mm."""
    image = np.full((1920, 2560, 3), (185, 145, 110), dtype=np.uint8)  # four times as fine, for smooth edges
    to_pixels = np.array([[0, -1000, 380], [-1000, 0, 430], [0, 0, 1.0]])  # the arm's base at the bottom

    def fill(points, colour):
        pixels = 4 * transform(to_pixels, np.asarray(points)) + 1.5
        cv2.fillPoly(image, [pixels.round().astype(np.int32)], colour)

    for half, colour in ((0.0925, (200, 20, 25)), (0.08, (185, 145, 110))):
        fill(SQUARE_POS + half * np.array([[1, 1], [-1, 1], [-1, -1], [1, -1]]), colour)
    place = np.array([0.19, -0.12])
    corners = np.array([[1, 1], [-1, 1], [-1, -1], [1, -1]])
    fill(place + corners * np.array(size) / 2000 @ rotation(yaw).T, (245, 245, 240))
    for x0, y0, x1, y1 in boxes:
        fill(place + np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1]]) @ rotation(yaw).T, (15, 15, 15))
    return cv2.resize(image, (640, 480), interpolation=cv2.INTER_AREA), np.array([*place, yaw])


@pytest.mark.parametrize("size", [(148, 105), (210, 148), (105, 74), (120, 120), (85, 54), (297, 210)])
def test_a_sheet_of_another_size_is_none(size):
    image, pose = desk(size)
    sighting = SheetCamera(markers=False, arm="bottom").update(image, 0.0)
    if size == (148, 105):
        assert_allclose(pose_error(sighting, pose), 0, atol=1.0)
    else:
        assert sighting is None


def test_markers_printed_at_another_scale_are_none():
    image, pose = desk((148, 105), marker_boxes())
    assert_allclose(pose_error(SheetCamera(arm="bottom").update(image, 0.0), pose), 0, atol=1.0)
    image, _ = desk((132, 94), 0.89 * marker_boxes())  # "fit to page"
    assert SheetCamera(arm="bottom").update(image, 0.0) is None


@pytest.mark.parametrize("yaw", [-3.0, -1.2, 0.0, 1.0, 2.2, 3.1])
def test_markers_tell_the_yaw_and_the_outline_does_but_for_half_a_turn(yaw):
    image, pose = desk((148, 105), marker_boxes(), yaw)
    camera = SheetCamera(arm="bottom")
    assert_allclose(pose_error(camera.update(image, 0.0), pose), 0, atol=1.0)
    blank, _ = desk((148, 105), yaw=yaw)  # as if all markers were hidden
    assert_allclose(pose_error(camera.update(blank, 0.1), pose), 0, atol=1.0)
    alone = SheetCamera(arm="bottom", markers=False).update(blank, 0.0)
    assert abs(alone.pose[2]) <= np.pi / 2 + 0.01
    assert abs(np.sin(alone.pose[2] - yaw)) < 0.01


def test_the_square_may_lie_elsewhere():
    image, pose = desk((148, 105), marker_boxes())
    moved = (0.2, 0.08, 0.05)
    sighting = SheetCamera(arm="bottom", square=moved).update(image, 0.0)
    expected = [*(moved[:2] + rotation(0.05) @ (pose[:2] - SQUARE_POS)), pose[2] + 0.05]
    assert_allclose(pose_error(sighting, expected), 0, atol=1.0)


def test_rigid_fit_undoes_a_motion():
    points = np.random.default_rng(0).normal(size=(5, 2))
    pose = np.array([0.3, -2.0, 2.5])
    assert_allclose(rigid_fit(points, points @ rotation(2.5).T + pose[:2]), pose, atol=1e-12)


# The sheet on paper, and in the scene


def test_the_printed_sheet_has_its_true_size(tmp_path):
    print_sheet(tmp_path / "sheet.pdf")
    committed = (ROOT / "docs/sheet.pdf").read_bytes()
    assert len(committed) < 100_000
    for content in ((tmp_path / "sheet.pdf").read_bytes(), committed):
        page = [float(x) for x in re.search(rb"/MediaBox \[([^]]*)\]", content)[1].split()]
        point = 25.4 / 72  # mm
        assert_allclose(np.array(page) * point, [0, 0, 148, 105], atol=0.01)
        shapes = re.findall(rb"((?:[\d. ]+ [ml]\n){4})h\n+f", content)
        corners = np.array([[float(x) for x in re.findall(rb"[\d.]+", shape)] for shape in shapes]) * point
        boxes = np.sort(corners.reshape(-1, 4, 2), axis=1)[:, [0, -1]].reshape(-1, 4) / 1000 - [*SHEET_HALF_SIZE] * 2
        assert_allclose(np.array(sorted(boxes.tolist())), marker_boxes(), atol=1e-5)
    low, high = marker_boxes()[:, :2], marker_boxes()[:, 2:]
    for centre in MARKERS:
        inside = (np.abs((low + high) / 2 - centre) < MARKER_SIZE / 2).all(axis=1)
        assert_allclose([low[inside].min(axis=0), high[inside].max(axis=0)], centre + 0.02 * np.array([[-1], [1]]))


def test_boxes_are_the_markers_of_the_dictionary():
    """Drawn one by one, they are what OpenCV draws."""
    boxes = marker_boxes()
    for number, centre in enumerate(MARKERS):
        modules = centre + MARKER_SIZE * (np.stack(np.meshgrid(np.arange(6), np.arange(6)), axis=2) - 2.5) / 6 * [1, -1]
        dark = ((modules[:, :, None] > boxes[:, :2]) & (modules[:, :, None] < boxes[:, 2:])).all(axis=3).any(axis=2)
        np.testing.assert_array_equal(dark, cv2.aruco.generateImageMarker(DICTIONARY, number, 6) == 0)


def test_markers_in_the_scene_are_the_printed_ones_and_shown_on_request():
    scene = mujoco.MjModel.from_xml_path(str(SCENE_PATH))
    shown = scene.geom_group == MARKER_GROUP
    assert (scene.geom_bodyid[shown] == scene.body("sheet").id).all()
    centres, halves = scene.geom_pos[shown, :2], scene.geom_size[shown, :2]
    boxes = np.concatenate([centres - halves, centres + halves], axis=1)
    expected = marker_boxes()
    distances = np.abs(boxes[:, None] - expected).max(axis=2)
    assert len(boxes) == len(expected) and (distances.min(axis=0) < 2e-5).all() and (distances.min(axis=1) < 2e-5).all()
    assert not scene_option().geomgroup[MARKER_GROUP] and scene_option(True).geomgroup[MARKER_GROUP]


def test_a_pressed_sheet_is_drawn_on_the_table():
    qpos = mujoco.MjModel.from_xml_path(str(SCENE_PATH)).key("home").qpos.copy()
    qpos[6:13] = 0.2, 0.0, -0.0004, np.cos(0.3), 0.004, -0.003, np.sin(0.3)  # sunk and tilted
    drawn = as_drawn(qpos)
    assert_allclose(drawn[8:13], [0.0005, np.cos(0.3), 0, 0, np.sin(0.3)], atol=1e-4)
    np.testing.assert_array_equal(drawn[:8], qpos[:8])
    qpos[8] = 0.01  # held up
    np.testing.assert_array_equal(as_drawn(qpos), qpos)


# By command


def test_watching_a_camera(episode, monkeypatch, tmp_path, capsys):
    frames, poses = episode
    picture = tmp_path / "seen.jpg"

    class Camera:
        count = 0

        def __init__(self, number):
            assert number == 2

        def set(self, *_):
            pass

        def read(self):
            self.count += 1
            if self.count == 3:
                raise KeyboardInterrupt
            return True, frames[True][0][:, :, ::-1]

        def release(self):
            released.append(True)

    released = []
    monkeypatch.setattr(cv2, "VideoCapture", Camera)
    sheet_camera.watch(sheet_camera.Args(camera=2, picture=str(picture)))
    x, y = (f"{1000 * value:.0f} mm" for value in poses[0][:2])
    assert released and f"x {x}, y {y}" in capsys.readouterr().out
    drawn = cv2.imread(str(picture)).astype(int)[:, :, ::-1]
    assert drawn.shape == (480, 640, 3) and 0.001 < (np.abs(drawn - frames[True][0]).max(axis=2) > 60).mean() < 0.1


def test_errors_are_one_line(tmp_path):
    assert_one_line(run(ROOT, "sheet_camera.py"), "nothing to do")
    assert_one_line(run(ROOT, "sheet_camera.py --camera 63"), "camera 63 gives no frame")
