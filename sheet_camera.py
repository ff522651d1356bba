"""Where the sheet lies, seen by a camera that stands still: the tape square gives the table, markers the sheet.

    python sheet_camera.py --print docs/sheet.pdf     # the sheet with its markers, to print at true size (100 %)
    python sheet_camera.py --camera 0 --arm left      # prints what it sees, and shows it in sheet_camera.jpg
    python sheet_camera.py --measure 10               # its errors on rendered frames of 10 simulated episodes: minutes

Without markers (`--no-markers`) it fits the known rectangle to the edges of a white sheet, which needs a darker or a
coloured desk. Measured on rendered frames only: it was never run on hardware.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
from gymnasium.vector import AutoresetMode

from env_paper_square import POLICY_HZ, SHEET_HALF_SIZE, SQUARE_POS, TAPE_WIDTH, EnvArgs
from eval import TEST_SEED, load_policy
from figures import pyplot, run_episode
from runs import Flags, Real, UserError, Whole, parse, write_whole

DICTIONARY = cv2.aruco.getPredefinedDictionary(cv2.aruco.DICT_4X4_50)
MARKER_SIZE = 0.04  # m, of the black square; smaller ones are missed at a pixel per mm
MARKERS = np.array([[1, 1], [-1, 1], [-1, -1], [1, -1]]) * [0.047, 0.0255]  # m, centres of 0 to 3, 7 mm from the edges
SHEET_HEIGHT = 0.0008  # m, of its face above the tape's
SQUARE_CORNERS = np.array([[1, 1], [-1, 1], [-1, -1], [1, -1]])  # counterclockwise, from above
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "top": (0, -1), "bottom": (0, 1)}  # in a picture, pixels
TABLE = (0.02, -0.28, 0.38, 0.22)  # m, x and y from, to: what is searched for a sheet without markers
LEAST_SEEN = 64  # points of a side's edges, of 322, without which the tape is not found
MM = 0.001


@dataclass
class Args(Flags):
    print: str = ""
    """write the sheet with its markers as a PDF of true size, 148 x 105 mm, to this file"""
    camera: Whole[-1, 64] = -1
    """number of a camera, as the system counts them: print pose, age and confidence, until Ctrl-C"""
    picture: str = "sheet_camera.jpg"
    """with --camera: what is seen, drawn into the frame, once a second"""
    width: Whole[160, 4096] = 640
    """width that the camera is asked for, pixels"""
    height: Whole[120, 4096] = 480
    """height that the camera is asked for, pixels"""
    measure: Whole[0, 10**4] = 0
    """play so many simulated episodes, and measure on their rendered frames"""
    model_path: str = "assets/ppo_residual.safetensors"
    """with --measure: checkpoint of the policy that moves the sheet"""
    view: Literal["desk", "top", "side"] = "desk"
    """with --measure: camera of the scene"""
    stride: Whole[1, 400] = 3
    """with --measure: steps from frame to frame, at 30 steps per second"""
    noise: Real[0, 50] = 0.0
    """with --measure: standard deviation of noise on the pixels' values, 0 to 255; above 0 also blur and JPEG"""
    markers: bool = True
    """look for the markers, and for the sheet's outline only where none is seen; off: for the outline alone"""
    arm: Literal["left", "right", "top", "bottom"] = "left"
    """with --camera: where in the picture the arm's base is, as seen from the tape square"""


@dataclass
class Sighting:
    """Where the sheet was seen: pose (3,), x, y, yaw in the arm's base frame, m and rad; time of the frame, s;
    confidence, the share of the markers' or the outline's length that was seen, 0 to 1."""

    pose: np.ndarray
    time: float
    confidence: float


# The printed sheet


def marker_boxes() -> np.ndarray:
    """The dark boxes of the four markers, (boxes, 4): x and y from, to, m, in the sheet's frame."""
    boxes, module = [], MARKER_SIZE / 6
    for number, (x, y) in enumerate(MARKERS):
        dark = cv2.aruco.generateImageMarker(DICTIONARY, number, 6) == 0  # row 0 is the upper one
        growing = {}  # first row by (from, to) of the columns
        for row in range(7):
            line = np.diff(np.r_[0, dark[row] if row < 6 else np.zeros(6), 0])
            runs = list(zip(np.flatnonzero(line == 1).tolist(), np.flatnonzero(line == -1).tolist(), strict=True))
            for first, last in growing.keys() - runs:
                top = growing.pop((first, last))
                left, upper = x - MARKER_SIZE / 2 + first * module, y + MARKER_SIZE / 2 - top * module
                boxes.append([left, upper - (row - top) * module, left + (last - first) * module, upper])
            growing = {run: growing.get(run, row) for run in runs}
    return np.array(sorted(boxes))


def print_sheet(path: Path) -> None:
    """Write the sheet as a PDF page of 148 x 105 mm: markers, a grey line to cut along, a length to check."""
    plt = pyplot()
    size = 2 * SHEET_HALF_SIZE / MM
    with plt.rc_context({"pdf.fonttype": 42, "pdf.compression": 0}):
        figure = plt.figure(figsize=size / 25.4)
        axes = figure.add_axes((0, 0, 1, 1), xlim=(-size[0] / 2, size[0] / 2), ylim=(-size[1] / 2, size[1] / 2))
        axes.set_axis_off()
        for x0, y0, x1, y1 in marker_boxes() / MM:
            axes.add_patch(plt.Rectangle((x0, y0), x1 - x0, y1 - y0, color="black", linewidth=0))
        axes.add_patch(plt.Rectangle(-size / 2, *size, fill=False, edgecolor="0.7", linewidth=0.5))
        axes.plot([-20, 20], [0, 0], color="0.7", linewidth=0.5, marker="|")
        axes.text(0, 4, "print at 100 %\nthis line: 40 mm", ha="center", color="0.6", fontsize=7)
        options = {
            "format": "pdf",
            "metadata": {"CreationDate": None, "Producer": None, "Creator": None},
            "facecolor": "none",
        }
        write_whole(path, lambda temporary: figure.savefig(temporary, **options))
        plt.close(figure)


# Geometry


def transform(homography: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Points (..., 2) by a homography (3, 3)."""
    points = points @ homography[:, :2].T + homography[:, 2]
    return points[..., :2] / points[..., 2:]


def rotation(yaw: float) -> np.ndarray:
    return np.array([[np.cos(yaw), -np.sin(yaw)], [np.sin(yaw), np.cos(yaw)]])


def rigid_fit(points: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """The pose (3,) that brings `points` (n, 2) closest to where they are `seen` (n, 2)."""
    centre, seen_centre = points.mean(axis=0), seen.mean(axis=0)
    (a, b), (c, d) = (points - centre).T @ (seen - seen_centre)
    yaw = np.arctan2(b - c, a + d)
    return np.append(seen_centre - rotation(yaw) @ centre, yaw)


def camera_position(homography: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Where a camera is, (3,), m, from what brings pixels onto the table (3, 3) and the picture's width and height.

    Pixels are square and the lens looks through the picture's middle; the focal length follows from the perspective.
    Seen from straight above there is none, and it does not matter much: a guess of one width is taken.
    """
    to_pixels = np.linalg.inv(homography)
    shift = np.array([[1, 0, -size[0] / 2], [0, 1, -size[1] / 2], [0, 0, 1]])
    (x1, y1, z1), (x2, y2, z2), third = (shift @ to_pixels).T
    scale = np.hypot(x1, y1)
    known = np.array([x1 * x2 + y1 * y2, x1**2 + y1**2 - x2**2 - y2**2]) / scale**2  # times 1 / focal^2 is ...
    wanted = -np.array([z1 * z2, z1**2 - z2**2]) / scale**2
    inverse = known @ wanted / max(known @ known, 1e-12)
    focal = np.clip(inverse, (3 * size[0]) ** -2, (0.4 * size[0]) ** -2) ** -0.5 if known @ known > 0.003 else size[0]
    first, second, third = (np.array(column) / [focal, focal, 1] for column in ((x1, y1, z1), (x2, y2, z2), third))
    scale = np.sign(third[2]) / np.linalg.norm(first)
    first, second, third = first * scale, second * scale, third * scale
    return -np.column_stack([first, second, np.cross(first, second)]).T @ third


# The tape


def redness(frame: np.ndarray) -> np.ndarray:
    """How red pixels are whatever the light, (H, W) uint8: what green and blue lack of red, as a share of it."""
    red, green, blue = cv2.split(frame)
    share = cv2.divide(cv2.subtract(red, cv2.max(green, blue)), red, scale=255)
    share[red < 50] = 0  # too dark to tell
    return cv2.medianBlur(share, 5)  # of a noisy camera; straight edges stay


def outer_corners(mask: np.ndarray) -> np.ndarray | None:
    """The four corners (4, 2), pixels, of what is red, by the sides of its hull that it fills most of."""
    points = cv2.findNonZero(mask)
    hull = None if points is None else cv2.approxPolyDP(cv2.convexHull(points), 1.5, True)[:, 0].astype(float)
    if hull is None or len(hull) < 4:
        return None
    ends = np.roll(hull, -1, axis=0)
    along = hull[:, None] + np.linspace(0, 1, 40)[:, None] * (ends - hull)[:, None]  # (sides, 40, 2)
    inner = along + 2.0 * (hull.mean(axis=0) - along) / np.linalg.norm(hull.mean(axis=0) - along, axis=2)[..., None]
    filled = cv2.remap(mask, inner.astype(np.float32), None, cv2.INTER_NEAREST).astype(bool).sum(axis=1)
    longest = np.sort(np.argsort(filled * np.linalg.norm(ends - hull, axis=1))[-4:])
    lines = [np.cross([*hull[k], 1.0], [*ends[k], 1.0]) for k in longest]
    corners = np.array([np.cross(lines[k - 1], lines[k]) for k in range(4)])
    with np.errstate(divide="ignore", invalid="ignore"):
        corners = corners[:, :2] / corners[:, 2:]
    if not np.abs(corners).max() < 1e5:  # parallel
        return None
    return corners[::-1] if cv2.contourArea(corners.astype(np.float32), oriented=True) > 0 else corners


def tape_edges(red: np.ndarray, homography: np.ndarray, half: float, tolerance: float) -> tuple[np.ndarray, ...]:
    """Where the tape's edges are seen: sides, 0 to 3, (n,); lines of the edges, (n, 3), m; points, (n, 2), pixels.

    `homography` brings pixels onto the table, the square's centre at its origin, to within `tolerance`, m.
    """
    along = np.linspace(-1.0, 1.0, 161) * (half - 0.002)
    reach = 0.01 + tolerance
    across = half + np.arange(-reach, TAPE_WIDTH + reach, 0.0005)
    sides, lines, points = [], [], []
    for side in range(4):
        turn = rotation(side * np.pi / 2)
        table = np.stack(np.broadcast_arrays(across, along[:, None]), axis=2) @ turn.T  # (161, depths, 2)
        pixels = transform(np.linalg.inv(homography), table).astype(np.float32)
        profile = cv2.blur(cv2.remap(red, pixels, None, cv2.INTER_LINEAR).astype(np.float32), (1, 5))
        level = 0.6 * np.percentile(profile, 95)  # between tape and desk, neither of which need be pure
        change = np.diff((profile > level).astype(np.int8), axis=1)
        once = np.flatnonzero(((change == 1).sum(axis=1) == 1) & ((change == -1).sum(axis=1) == 1))
        crossings = []
        for sign in (1, -1):
            at = (change[once] == sign).argmax(axis=1)
            low, high = profile[once, at], profile[once, at + 1]
            crossings.append(across[at] + 0.0005 * (level - low) / (high - low))
        inner, outer = crossings
        widening = outer - inner - TAPE_WIDTH  # what hides a part makes it narrow, a blurred picture wide, evenly
        found = (widening > -min(tolerance, 0.003)) & (widening < 0.004)
        found &= np.abs((outer + inner - TAPE_WIDTH) / 2 - half) < tolerance
        for edge, place in ((half, inner), (half + TAPE_WIDTH, outer)):
            table = np.stack([place[found], along[once[found]]], axis=1) @ turn.T
            points.append(transform(np.linalg.inv(homography), table))
            lines.append(np.tile([*turn[:, 0], -edge], (len(table), 1)))
            sides.append(np.full(len(table), side))
    return np.concatenate(sides), np.concatenate(lines), np.concatenate(points)


def line_equations(lines: np.ndarray, points: np.ndarray, homography: np.ndarray) -> np.ndarray:
    """The matrix (9, 9) whose least eigenvector is the homography that brings points, pixels, onto lines of the table.

    `homography` is nearly it; what is farther off than most, half hidden by something, counts less.
    """
    homogeneous = np.column_stack([points, np.ones(len(points))])
    rows = (lines[:, :, None] * (homogeneous / (homogeneous @ homography[2])[:, None])[:, None]).reshape(-1, 9)
    error = np.abs(rows @ homography.ravel())  # m
    rows *= np.sqrt(0.0002 / np.maximum(error, 0.0002))[:, None]  # Huber
    return rows.T @ rows


def solve_lines(equations: np.ndarray) -> np.ndarray:
    """The homography (3, 3) of `line_equations`."""
    scale = 1.0 / np.sqrt(np.diag(equations))  # pixels are hundreds, metres tenths
    homography = (scale * np.linalg.eigh(equations * np.outer(scale, scale))[1][:, 0]).reshape(3, 3)
    return homography / homography[2, 2]


def find_tape(red: np.ndarray, half: float) -> tuple[np.ndarray, np.ndarray] | None:
    """The homography (3, 3) from pixels onto the table, the square's centre at its origin, one of its quarter turns;
    and its `line_equations`. None if no tape square is seen, or one of its sides is hidden."""
    _, mask = cv2.threshold(red, 115, 255, cv2.THRESH_BINARY)
    _, parts, facts, _ = cv2.connectedComponentsWithStats(mask)
    if len(facts) < 2:
        return None
    largest = np.uint8(parts == 1 + facts[1:, cv2.CC_STAT_AREA].argmax())
    for corners in map(outer_corners, (largest, mask)):
        if corners is None:
            continue
        homography, _ = cv2.findHomography(corners, (half + TAPE_WIDTH) * SQUARE_CORNERS.astype(float))
        for tolerance in (0.01, 0.004, 0.0015, 0.0015):
            sides, lines, points = tape_edges(red, homography, half, tolerance)
            if np.bincount(sides, minlength=4).min() < (LEAST_SEEN if tolerance < 0.004 else 16):
                break
            equations = line_equations(lines, points, homography)
            homography = solve_lines(equations)
        else:
            return homography, equations
    return None


# The outline; on a map of the table with a pixel per mm

HALF = SHEET_HALF_SIZE / MM - 0.5  # mm, to the middles of the outermost pixels
PERIMETER = 4 * HALF.sum()  # mm


def whiteness(image: np.ndarray) -> np.ndarray:
    """Mask (H, W) uint8 of what is neither coloured nor dark, as paper is, in the shadow too."""
    mask = cv2.inRange(cv2.cvtColor(image, cv2.COLOR_RGB2HSV), (0, 0, 70), (180, 60, 255))
    mask = cv2.medianBlur(mask, 5)  # of a noisy camera; straight edges stay
    return cv2.morphologyEx(mask, cv2.MORPH_CLOSE, np.ones((5, 5), np.uint8))  # over what is printed on it


def in_sheet(points: np.ndarray, pose: np.ndarray) -> np.ndarray:
    """Points (n, 2) in the frame of a sheet with this pose (3,)."""
    return (points - pose[:2]) @ rotation(pose[2])


def outline_seen(points: np.ndarray, pose: np.ndarray, margin: float) -> tuple[np.ndarray, int]:
    """How many points are within a margin of each side, (4,): right, left, upper, lower; and how many are outside."""
    local = in_sheet(points, pose)
    beyond = np.abs(local) - HALF
    on = np.abs(beyond.max(axis=1)) < margin
    side = 2 * beyond.argmax(axis=1) + (local[np.arange(len(local)), beyond.argmax(axis=1)] < 0)
    return np.bincount(side[on], minlength=4), int((beyond.max(axis=1) >= margin).sum())


def outline_score(points: np.ndarray, pose: np.ndarray, margin: float) -> float:
    """How well a pose explains the edges of what is white: those inside the sheet may be of whatever covers it."""
    seen, outside = outline_seen(points, pose, margin)
    return seen.sum() - 2.0 * outside


def corner_poses(contours: list[np.ndarray]) -> list[np.ndarray]:
    """Poses (3,) that each have a corner of the sheet where two straight edges meet at a right angle."""
    edges = []  # a point of each, its direction, the contour on its left
    for contour in contours:
        polygon = cv2.approxPolyDP(contour.reshape(-1, 1, 2), 2.0, True)[:, 0].astype(float)
        if cv2.contourArea(polygon.astype(np.float32), oriented=True) < 0:
            polygon = polygon[::-1]
        for start, end in zip(polygon, np.roll(polygon, -1, axis=0), strict=True):
            length = np.linalg.norm(end - start)
            if length > 15:
                edges.append((start, (end - start) / length))
    poses = []
    for one, u in edges:
        for other, v in edges:
            if abs(u @ v) > 0.1 or u[0] * v[1] - u[1] * v[0] < 0:  # v follows u
                continue
            along = np.linalg.solve(np.column_stack([u, -v]), other - one)[0]
            corner = one + along * u
            for half, turn in ((HALF, 0.0), (HALF[::-1], np.pi / 2)):
                centre = corner - half[0] * u + half[1] * v
                poses.append(np.append(centre, np.arctan2(u[1], u[0]) + turn))
    return poses


def fit_outline(points: np.ndarray, pose: np.ndarray) -> np.ndarray | None:
    """The pose (3,) near a guess by least squares of the distances from the sides; None if those seen are parallel."""
    for margin in (4.0, 3.0, 2.0, 1.5, 1.5):
        local = in_sheet(points, pose)
        beyond = np.abs(local) - HALF
        axis = beyond.argmax(axis=1)
        on = np.abs(beyond.max(axis=1)) < margin
        if min((on & (axis == k)).sum() for k in (0, 1)) < 10:
            return None
        local, axis = local[on], axis[on]
        every = np.arange(len(local))
        sign = np.sign(local[every, axis])
        normals = np.eye(2)[axis] * sign[:, None]
        # Moving by (dx, dy, dyaw) in the sheet's frame moves a side outwards by ...
        rows = np.column_stack([normals, local[:, 0] * normals[:, 1] - local[:, 1] * normals[:, 0]])
        step = np.linalg.lstsq(rows, beyond[on, :][every, axis], rcond=None)[0]
        pose = np.append(pose[:2] + rotation(pose[2]) @ step[:2], pose[2] + step[2])
    return pose


class SheetCamera:
    """The sheet's pose from the frames of a camera that stands still.

    Args: `tape_half_size`, half the inside width of the tape square, m; `markers`, whether to look for them, and for
    the outline only where none is seen; `arm`, where in the picture the arm's base is as seen from the square: left,
    right, top or bottom; `square`, the pose of the tape square in the arm's base frame, x, y, yaw, m and rad.

    The tape is found when a fifth of each of its sides is seen, and remembered when less is. A yaw that the
    outline leaves open by a half turn is the one nearest to the last sighting's, or to zero. The yaw is between -pi and
    pi, as the simulation's is.
    """

    def __init__(
        self,
        tape_half_size: float = EnvArgs.tape_half_size,
        markers: bool = True,
        arm: str = "left",
        square: tuple[float, float, float] = (*SQUARE_POS, 0.0),
    ):
        self.tape_half_size, self.markers, self.arm, self.square = tape_half_size, markers, arm, square
        parameters = cv2.aruco.DetectorParameters()
        parameters.adaptiveThreshWinSizeMin = parameters.adaptiveThreshWinSizeMax = 19  # pixels; one pass for three
        parameters.cornerRefinementMethod = cv2.aruco.CORNER_REFINE_SUBPIX
        parameters.cornerRefinementWinSize = 3
        self.detector = cv2.aruco.ArucoDetector(DICTIONARY, parameters)
        self.homography = None  # (3, 3), pixels onto the table, the square's centre at its origin, m
        self.equations = None  # (9, 9), whose solution it is, from the frames so far
        self.to_arm = None  # (3, 3), from there to the arm's base frame
        self.position = None  # (3,), of the camera over the table, m
        self.last: Sighting | None = None

    def update(self, frame: np.ndarray, time: float) -> Sighting | None:
        """Where the sheet is in a frame (H, W, 3) uint8 RGB that was taken at `time`, s; None if it cannot be told."""
        self._find_table(frame)
        found = None
        if self.homography is not None:
            found = self._by_markers(frame) if self.markers else None
            if found is None or found[1] < 0.5:  # a single marker tells the yaw to half a degree
                near = self.last and self.last.pose if found is None else found[0]
                age = 0.0 if found or self.last is None else time - self.last.time
                outline = self._by_outline(frame, near, age)
                if outline and (found is None or np.linalg.norm(outline[0][:2] - near[:2]) < 5 * MM):
                    found = outline
        if found is None:
            return None
        pose, confidence = found
        self.last = Sighting(pose, time, confidence)
        return self.last

    def _find_table(self, frame: np.ndarray) -> None:
        """Find the tape, or take in what is seen of it where it was."""
        red, size = redness(frame), frame.shape[1::-1]
        if self.homography is not None:
            sides, lines, points = tape_edges(red, self.homography, self.tape_half_size, 0.0015)
            if np.bincount(sides, minlength=4).min() >= LEAST_SEEN:
                # Parts that are hidden now were seen before; and a camera that creeps is followed
                self.equations = 0.95 * self.equations + line_equations(lines, points, self.homography)
                self.homography = solve_lines(self.equations)
                self.position = camera_position(self.homography, size)
            if len(sides) > LEAST_SEEN:  # else it is not where it was: somebody has moved the camera
                return
        tape = find_tape(red, self.tape_half_size)
        if tape is None:
            return
        self.homography, self.equations = tape
        self.position = camera_position(self.homography, size)
        # Which side is which, the arm tells
        x, y, yaw = self.square
        to_base = -np.array([x, y]) / np.hypot(x, y)
        fits = []
        for turn in range(4):
            start, end = transform(
                np.linalg.inv(self.homography),
                np.array([[0.0, 0.0], 0.02 * rotation(-turn * np.pi / 2 - yaw) @ to_base]),
            )
            fits.append((end - start) @ DIRECTIONS[self.arm] / np.linalg.norm(end - start))
        self.to_arm = np.eye(3)
        self.to_arm[:2, :2] = rotation(np.argmax(fits) * np.pi / 2 + yaw)
        self.to_arm[:2, 2] = x, y

    def _on_table(self, points: np.ndarray, height: float) -> np.ndarray:
        """Pixels (n, 2) to x and y, m, in the arm's base frame, of what is at a height, m, above the table."""
        points = transform(self.homography, points)
        return transform(self.to_arm, points + (self.position[:2] - points) * height / self.position[2])

    def _by_markers(self, frame: np.ndarray) -> tuple[np.ndarray, float] | None:
        """The pose (3,) and the share of the markers that agree on it."""
        corners, numbers, _ = self.detector.detectMarkers(cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY))
        seen = {int(n): c[0] for n, c in zip(np.ravel(numbers), corners, strict=True) if n < 4} if corners else {}
        at = {n: self._on_table(c, SHEET_HEIGHT) for n, c in seen.items()}
        while at:
            # Each marker's upper left corner comes first, then clockwise
            points = {n: MARKERS[n] + MARKER_SIZE / 2 * np.array([[-1, 1], [1, 1], [1, -1], [-1, -1]]) for n in at}
            pose = rigid_fit(np.concatenate(list(points.values())), np.concatenate(list(at.values())))
            errors = {n: np.linalg.norm(points[n] @ rotation(pose[2]).T + pose[:2] - at[n], axis=1).max() for n in at}
            worst = max(errors, key=errors.get)
            if errors[worst] < 2.5 * MM:  # a marker of another size or sheet, or one half hidden, is farther off
                return pose, len(at) / len(MARKERS)
            del at[worst]
        return None

    def _by_outline(self, frame: np.ndarray, near: np.ndarray | None, age: float) -> tuple[np.ndarray, float] | None:
        """The pose (3,) by the edges of something white, of the sheet's size; and the share of the outline seen.

        Of poses that explain them as well, the one near where it was, (3,), `age` s ago, if that is known.
        """
        x0, y0, x1, y1 = TABLE
        to_map = np.array([[1 / MM, 0, -x0 / MM], [0, 1 / MM, -y0 / MM], [0, 0, 1]])  # a pixel per mm
        size = round((x1 - x0) / MM), round((y1 - y0) / MM)
        table = cv2.warpPerspective(frame, to_map @ self.to_arm @ self.homography, size)
        contours, _ = cv2.findContours(whiteness(table), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
        contours = [contour[:, 0] for contour in contours if cv2.contourArea(contour) > 150]  # mm^2
        if not contours:
            return None
        points = np.concatenate(contours)  # (n, 2), mm, as map pixels
        guesses = corner_poses(contours)
        last = None
        if near is not None:
            last = np.append(transform(to_map, near[:2]), near[2])
            guesses.append(last)
        if not guesses:
            return None
        scores = [outline_score(points, pose, 2.0) for pose in guesses]
        if last is not None:  # where only a corner is seen, its longer side may be either
            scores = [s - 0.5 * min(np.hypot(*(g - last)[:2]), 60) for s, g in zip(scores, guesses, strict=True)]
        fits = [fit_outline(points, guesses[k]) for k in np.argsort(scores)[::-1][:3]]
        fits = [pose for pose in fits if pose is not None]
        if not fits:
            return None
        pose = max(fits, key=lambda pose: outline_score(points, pose, 1.5))
        seen, _ = outline_seen(points, pose, 1.5)
        _, outside = outline_seen(points, pose, 4.0)  # a ragged edge of a noisy picture is not another sheet
        share = min(float(seen.sum() / PERIMETER), 1.0)
        if outside > 0.03 * len(points) or min(seen[:2].max(), seen[2:].max()) < 20 or share < 0.3:
            return None
        # By a corner alone, the long side may be the short one: either much of it is seen, or it is about where it was
        if share < 0.6:
            if last is None or np.hypot(*(pose - last)[:2]) > 40 + 100 * age:
                return None
            if abs((pose[2] - last[2] + np.pi / 2) % np.pi - np.pi / 2) > np.pi / 4:
                return None
        xy = np.linalg.inv(self.to_arm)[:2, :2] @ (transform(np.linalg.inv(to_map), pose[:2]) - self.to_arm[:2, 2])
        xy = transform(self.to_arm, xy + (self.position[:2] - xy) * SHEET_HEIGHT / 2 / self.position[2])
        yaw = pose[2] + np.pi * np.round(((0.0 if near is None else near[2]) - pose[2]) / np.pi)
        yaw = (yaw + np.pi) % (2 * np.pi) - np.pi
        return np.append(xy, yaw), share


# By command


def draw(frame: np.ndarray, camera: SheetCamera, sighting: Sighting | None) -> np.ndarray:
    """The frame with what was found in it: the tape square, the arm's base and its x axis, the sheet."""
    frame = frame.copy()
    if camera.homography is None:
        return frame
    to_pixels = np.linalg.inv(camera.to_arm @ camera.homography)
    x, y, yaw = camera.square
    square = [x, y] + camera.tape_half_size * SQUARE_CORNERS @ rotation(yaw).T
    lines = [(square, (255, 255, 0)), (np.array([[0.0, 0.0], [0.1, 0.0]]), (0, 0, 255))]
    if sighting is not None:
        x, y, yaw = sighting.pose
        corners = SHEET_HALF_SIZE * SQUARE_CORNERS
        lines.append(([x, y] + np.array([*corners, [0.0, 0.0], corners[0]]) @ rotation(yaw).T, (0, 160, 0)))
    for points, colour in lines:
        cv2.polylines(frame, [transform(to_pixels, points).round().astype(np.int32)], True, colour, 2)
    return frame


def watch(args: Args) -> None:
    """Print what a camera sees, and draw it once a second, until Ctrl-C."""
    device = cv2.VideoCapture(args.camera)
    device.set(cv2.CAP_PROP_FRAME_WIDTH, args.width)
    device.set(cv2.CAP_PROP_FRAME_HEIGHT, args.height)
    camera, start, shown = SheetCamera(markers=args.markers, arm=args.arm), time.monotonic(), -np.inf
    try:
        while True:
            read, frame = device.read()
            if not read:
                raise UserError(f"camera {args.camera} gives no frame: is it there, and not in use by another program?")
            now = time.monotonic() - start
            sighting = camera.update(frame[:, :, ::-1].copy(), now)
            if now < shown + 1.0:
                continue
            shown = now
            picture = draw(frame[:, :, ::-1], camera, sighting)[:, :, ::-1]
            encoded = cv2.imencode(".jpg", picture)[1].tobytes()
            write_whole(Path(args.picture), lambda temporary, encoded=encoded: temporary.write_bytes(encoded))
            if camera.homography is None:
                print("no tape square: all four sides must be seen, a fifth of each at least")
            elif camera.last is None:
                print("tape square seen, no sheet")
            else:
                (x, y, yaw), last = camera.last.pose, camera.last
                seen = f"sheet x {1000 * x:.0f} mm, y {1000 * y:.0f} mm, yaw {np.degrees(yaw):.1f} deg"
                print(f"{seen}, {now - last.time:.1f} s ago, confidence {last.confidence:.2f}")
    except KeyboardInterrupt:
        print(f"the last picture is {args.picture}")
    finally:
        device.release()


def worsen(frame: np.ndarray, noise: float, rng: np.random.Generator) -> np.ndarray:
    """A frame (H, W, 3) uint8 as a cheap camera gives it: a blur of 0.8 pixels, noise, JPEG of quality 80."""
    noisy = cv2.GaussianBlur(frame, (0, 0), 0.8) + rng.normal(0.0, noise, frame.shape)
    encoded = cv2.imencode(".jpg", np.clip(noisy, 0, 255).astype(np.uint8), [cv2.IMWRITE_JPEG_QUALITY, 80])[1]
    return cv2.imdecode(encoded, cv2.IMREAD_COLOR)


def measure(args: Args) -> None:
    """Play episodes, look at every so many of their frames, and print how well the sheet was seen."""
    policy, task, _ = load_policy(args.model_path)
    view = {"render_mode": "rgb_array", "camera": args.view, "markers": args.markers}
    envs = task(1, autoreset_mode=AutoresetMode.DISABLED, **view)
    cv2.setNumThreads(1)
    frames, errors, seconds, rng = 0, [], [], np.random.default_rng(0)
    for seed in range(TEST_SEED, TEST_SEED + args.measure):
        camera = SheetCamera(envs.tape_half_size, args.markers, "bottom" if args.view == "top" else "left")
        for step, *_ in run_episode(policy, envs, seed):
            if step % args.stride:
                continue
            frame, frames = envs.render_frame(), frames + 1
            frame = worsen(frame, args.noise, rng) if args.noise else frame
            start = time.process_time()
            sighting = camera.update(frame, step / POLICY_HZ)
            seconds.append(time.process_time() - start)
            if sighting is not None:
                x, y, yaw = sighting.pose - envs.sheet_pose[0]
                errors.append([1000 * np.hypot(x, y), np.degrees(abs((yaw + np.pi) % (2 * np.pi) - np.pi))])
    envs.close()
    print(f"{args.view} camera, {'markers' if args.markers else 'outline'}, {args.measure} episodes, {frames} frames:")
    print(f"with a pose      {100 * len(errors) / frames:.1f} %")
    for name, unit, values in (("position error", "mm", 0), ("yaw error", "deg", 1)):
        middle, high, worst = np.percentile(np.array(errors)[:, values], [50, 95, 100])
        print(f"{name:<16} {middle:.2f} {unit} median, {high:.2f} 95 %, {worst:.2f} largest")
    middle, high = 1000 * np.percentile(seconds, [50, 95])
    print(f"{'time per frame':<16} {middle:.1f} ms median, {high:.1f} 95 %, of one core")


if __name__ == "__main__":
    args = parse(Args)
    if args.print:
        print_sheet(Path(args.print))
        print(f"wrote {args.print}")
    elif args.measure:
        measure(args)
    elif args.camera >= 0:
        watch(args)
    else:
        raise UserError("nothing to do: give --print FILE, --camera NUMBER or --measure EPISODES")
