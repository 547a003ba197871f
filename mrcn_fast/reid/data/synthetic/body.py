"""The drawing of a synthetic person in a pose: the places and reflectances of all parts.

A figure is drawn larger than the image, as a map of parts and a map of shade. Each part then gets the
reflectance of its material in the camera's spectrum.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from mrcn_fast.reid.data.synthetic.people import Garment, Person, Surface

Floats = NDArray[np.float32]
Point = tuple[float, float]

# The factor by which figures are drawn larger than the image.
SUPERSAMPLING: Final = 2
_LUMINANCE: Final = np.array([0.299, 0.587, 0.114], dtype=np.float32)
# The value in the shade map that doesn't change a reflectance.
_FULL_LIGHT: Final = 200


@dataclass(frozen=True)
class Pose:
    """How a person stands in an image, and how the detector cropped it."""

    yaw: float
    stride: float
    swing: float
    lean: float
    scale: float
    shift: Point
    light: float
    room_shift: float


class _Part(IntEnum):
    NOTHING = 0
    SKIN = 1
    HAIR = 2
    HAT = 3
    TOP = 4
    INNER = 5
    BOTTOM = 6
    SHOES = 7
    BAG = 8
    FACE = 9


class Spectrum(NamedTuple):
    """What a camera sees of a surface: how far from the visible response, and how much of the colour."""

    gap: float
    colour: float


VISIBLE: Final = Spectrum(gap=0.0, colour=1.0)
NEAR_INFRARED: Final = Spectrum(gap=1.0, colour=0.0)


def seen(surface: Surface, spectrum: Spectrum) -> Floats:
    """The reflectance of a surface, (3,): its luminance at gap 0, its near-infrared response at gap 1.

    To both, the share `spectrum.colour` of the surface's colour is added; without it, the result is grey.
    """
    colour = np.array(surface.visible, dtype=np.float32)
    luminance = colour @ _LUMINANCE
    response = luminance + spectrum.gap * (surface.infrared - luminance)
    chroma = spectrum.colour * (colour - luminance)
    return np.clip(response + chroma, 0.02, 1.0).astype(np.float32)


class Figure:
    """The drawing of a person: a map of parts and a map of shade, both supersampled.

    Points are in body heights, with x to the right from the middle and y down from the crown.
    """

    def __init__(self, person: Person, pose: Pose, image_size: tuple[int, int], spectrum: Spectrum) -> None:
        self.person, self.pose, self.spectrum = person, pose, spectrum
        height, width = (side * SUPERSAMPLING for side in image_size)
        self._size = (width, height)
        self._parts = Image.new("L", self._size, _Part.NOTHING)
        self._shade = Image.new("L", self._size, _FULL_LIGHT)
        self._drawings = (ImageDraw.Draw(self._parts), ImageDraw.Draw(self._shade))
        self._unit = height * pose.scale * person.body.stature
        self._middle = width * (0.5 + pose.shift[0])
        # All people stand on the same ground, and the stature decides about the height of the crown.
        self._crown = height * (0.975 + pose.shift[1]) - self._unit
        facing = np.cos(pose.yaw)
        self._front = bool(facing > 0)
        self._sideways = float(np.sin(pose.yaw))
        self._breadth = 0.62 + 0.38 * abs(float(facing))

    def parts(self) -> NDArray[np.uint8]:
        """The part at each supersampled pixel, (H, W)."""
        return np.asarray(self._parts)

    def covered(self) -> NDArray[np.bool_]:
        """Whether the figure covers each supersampled pixel, (H, W)."""
        return self.parts() != _Part.NOTHING

    def reflectance(self) -> Floats:
        """The reflectance of each supersampled pixel, (H, W, 3); 0 outside the figure."""
        person, spectrum = self.person, self.spectrum
        parts = self.parts()
        surfaces = {
            _Part.SKIN: person.skin,
            _Part.FACE: person.skin,
            _Part.HAIR: person.hair,
            _Part.HAT: person.hat or person.hair,
            _Part.TOP: person.top.base,
            _Part.INNER: person.inner or person.top.base,
            _Part.BOTTOM: person.bottom.base,
            _Part.SHOES: person.shoes,
            _Part.BAG: person.bag_surface,
        }
        table = np.zeros((len(_Part), 3), dtype=np.float32)
        for part, surface in surfaces.items():
            table[part] = seen(surface, spectrum)
        result = np.take(table, parts, axis=0)
        self._print(result, parts == _Part.TOP, person.top, 0.16)
        self._print(result, parts == _Part.BOTTOM, person.bottom, person.body.hip_height)
        result *= self._light()[..., None]
        return result

    def draw(self) -> None:
        """Draw all parts, the farthest first."""
        near = 1 if self._sideways > 0 else -1
        self._leg(-near, 0.86)
        self._leg(near, 1.0)
        self._skirt()
        self._arm(-near, 0.84)
        if self.person.bag == "backpack" and self._front:
            self._backpack()
        self._torso()
        self._head()
        if self.person.bag == "backpack":
            self._straps() if self._front else self._backpack()
        if self.person.bag == "shoulder bag":
            self._shoulder_bag()
        self._arm(near, 0.92)
        if self.person.bag in ("handbag", "tote"):
            self._carried_bag()

    # Parts of the body and its clothes

    def _leg(self, side: int, shade: float) -> None:
        person, body = self.person, self.person.body
        top = body.hip_height - 0.01
        knee_y, ankle_y = (top + 0.96) / 2, 0.955
        hip_x = side * body.hips * 0.52 * self._breadth
        step = side * self.pose.stride
        across = step * (0.25 + 0.75 * abs(self._sideways))
        hip, knee, ankle = (hip_x, top), (hip_x + 0.6 * across, knee_y), (hip_x + across, ankle_y)
        lifted = 0.02 * max(0.0, step / 0.13)
        ankle = (ankle[0], ankle[1] - lifted)
        thick, thin = body.leg * 1.15, body.leg * 0.62
        wide = 1.35 if person.cut == "wide" else 1.0
        covered = {"trousers": 1.0, "wide": 1.0, "shorts": 0.45}.get(person.cut, 0.0)
        self._limb((hip, knee, ankle), (thick, body.leg * 0.85, thin), _Part.SKIN, shade)
        if covered:
            widths = (thick * 1.06, body.leg * 0.98 * wide, thin * 1.25 * wide**2)
            self._limb(_along((hip, knee, ankle), covered), widths, _Part.BOTTOM, shade)
        self._shoe(ankle, thin, shade)

    def _shoe(self, ankle: Point, thin: float, shade: float) -> None:
        x, y = ankle
        if self.person.boots:
            self._limb(((x, y - 0.10), (x, y - 0.05), (x, y)), (thin * 1.35,) * 3, _Part.SHOES, shade)
        toe = 0.035 * self._sideways
        reach = 0.028 + 0.01 * abs(self._sideways)
        self._ellipse((x + toe - reach, y - 0.012, x + toe + reach, y + 0.04), _Part.SHOES, shade)

    def _skirt(self) -> None:
        body = self.person.body
        lengths = {"skirt": 0.20, "long skirt": 0.38}
        if self.person.cut not in lengths:
            return
        top, bottom = body.hip_height - 0.06, body.hip_height + lengths[self.person.cut]
        narrow = body.waist * self._breadth
        flare = body.hips * (1.25 if self.person.cut == "skirt" else 1.35) * self._breadth
        flare += 0.3 * abs(self.pose.stride)
        self._polygon([(-narrow, top), (narrow, top), (flare, bottom), (-flare, bottom)], _Part.BOTTOM)

    def _torso(self) -> None:
        person, body, breadth = self.person, self.person.body, self._breadth
        shoulders, waist, hips = (w * breadth for w in (body.shoulders, body.waist, body.hips))
        waist_y, hip_y = 0.17 + 0.62 * (body.hip_height - 0.17), body.hip_height
        self._polygon([(-0.028, 0.11), (0.028, 0.11), (0.034, 0.18), (-0.034, 0.18)], _Part.SKIN, 0.8)
        if person.cut in ("trousers", "wide", "shorts"):
            self._polygon(
                [(-waist, waist_y), (waist, waist_y), (hips, hip_y + 0.035), (-hips, hip_y + 0.035)],
                _Part.BOTTOM,
            )
        end = hip_y - 0.02 + person.hem
        lower = hips * (1.06 if person.hem < 0.1 else 1.2)
        outline = [(0.035, 0.152), (shoulders * 0.9, 0.172), (shoulders, 0.2), (waist * 1.04, waist_y)]
        outline += [(lower, end)]
        self._polygon([*outline, *[(-x, y) for x, y in reversed(outline)]], _Part.TOP)
        if person.inner and self._front:
            middle, half = 0.6 * self._sideways * shoulders, 0.30 * shoulders
            self._polygon(
                [(middle - half, 0.155), (middle + half, 0.155), (middle + half, end), (middle - half, end)],
                _Part.INNER,
                0.95,
            )

    def _arm(self, side: int, shade: float) -> None:
        person, body = self.person, self.person.body
        shoulder_x = side * (body.shoulders - body.arm * 0.6) * self._breadth
        swing = side * self.pose.swing * (0.3 + 0.7 * abs(self._sideways))
        outwards = side * 0.025 * self._breadth
        joints = (
            (shoulder_x, 0.195),
            (shoulder_x + outwards + 0.6 * swing, 0.335),
            (shoulder_x + outwards + 1.4 * swing, 0.475),
        )
        widths = (body.arm * 1.2, body.arm, body.arm * 0.75)
        self._limb(joints, widths, _Part.SKIN, shade)
        covered = {"long": 0.9, "short": 0.42, "none": 0.0}[person.sleeves]
        if covered:
            self._limb(_along(joints, covered), [1.22 * w for w in widths], _Part.TOP, shade)
        self._hands = {**getattr(self, "_hands", {}), side: joints[-1]}

    def _head(self) -> None:
        person = self.person
        half = 0.046 * person.body.head * (1.08 - 0.08 * self._breadth)
        bottom = 0.132
        top = bottom - 0.125 * person.body.head
        turn = self._sideways * half
        long_hair = {"bob": 0.15, "long": 0.26}.get(person.hair_style)
        if long_hair and self._front:
            self._ellipse(
                (-1.25 * half - 0.3 * turn, top, 1.25 * half - 0.3 * turn, long_hair), _Part.HAIR, 0.85
            )
        if person.hair_style == "afro":
            self._ellipse((-1.7 * half, top - 0.035, 1.7 * half, top + 0.085), _Part.HAIR)
        self._ellipse((-half, top, half, bottom), _Part.FACE)
        if person.hair_style != "bald":
            self._hair(half, top, bottom, turn, long_hair)
        elif not self._front:
            self._ellipse((-half, top, half, bottom), _Part.FACE, 0.85)
        if person.hat:
            self._hat(half, top, turn)

    def _hair(self, half: float, top: float, bottom: float, turn: float, long_hair: float | None) -> None:
        style = self.person.hair_style
        if self._front:
            # A cap of hair, and the side of the head that faces the camera.
            self._chord((-1.06 * half, top - 0.006, 1.06 * half, bottom - 0.02), 180, 360, _Part.HAIR)
            behind = -np.sign(turn) * half
            edge = behind + turn * 0.9
            low, high = min(behind, edge), max(behind, edge)
            if high - low > 0.2 * half:
                self._ellipse((low * 1.06, top + 0.02, high * 1.06, bottom - 0.02), _Part.HAIR, 0.9)
        else:
            self._ellipse((-1.06 * half, top - 0.006, 1.06 * half, bottom - 0.012), _Part.HAIR)
            if long_hair:
                self._ellipse((-1.2 * half, top + 0.01, 1.2 * half, long_hair), _Part.HAIR, 0.95)
        if style == "bun":
            self._ellipse((-0.026 - turn, top - 0.035, 0.026 - turn, top + 0.017), _Part.HAIR, 0.9)
        if style == "ponytail":
            x = -1.3 * turn if self._front else -0.6 * turn
            if not self._front or abs(self._sideways) > 0.3:
                self._ellipse((x - 0.02, top + 0.04, x + 0.02, 0.24), _Part.HAIR, 0.85)

    def _hat(self, half: float, top: float, turn: float) -> None:
        self._chord((-1.12 * half, top - 0.015, 1.12 * half, top + 0.085), 180, 360, _Part.HAT)
        brim_y = top + 0.03
        if self._front or abs(self._sideways) > 0.5:
            reach = turn * 1.1
            self._ellipse((reach - 1.1 * half, brim_y, reach + 1.1 * half, brim_y + 0.016), _Part.HAT, 0.8)

    # Bags

    def _backpack(self) -> None:
        wide = 0.8 * self.person.body.shoulders * self._breadth
        # Seen from the front, it only projects at the sides.
        middle = -self._sideways * (0.75 if self._front else 0.45) * self.person.body.shoulders
        self._rounded((middle - wide, 0.19, middle + wide, 0.41), _Part.BAG, 0.95)
        if not self._front:
            self._rounded((middle - 0.7 * wide, 0.31, middle + 0.7 * wide, 0.385), _Part.BAG, 0.75)

    def _straps(self) -> None:
        for side in (-1, 1):
            x = side * 0.55 * self.person.body.shoulders * self._breadth + 0.02 * self._sideways
            self._limb(((x, 0.165), (x, 0.26), (x * 1.25, 0.36)), (0.012,) * 3, _Part.BAG, 0.85)

    def _shoulder_bag(self) -> None:
        body = self.person.body
        # It hangs at the person's left, which is right in the image from the front, and left from the back.
        side = 1 if self._front else -1
        shoulder = (-side * 0.6 * body.shoulders * self._breadth, 0.17)
        hip = (side * 0.95 * body.hips * self._breadth, body.hip_height - 0.03)
        middle = ((shoulder[0] + hip[0]) / 2, (shoulder[1] + hip[1]) / 2)
        self._limb((shoulder, middle, hip), (0.010,) * 3, _Part.BAG, 0.8)
        self._rounded((hip[0] - 0.055, hip[1] - 0.02, hip[0] + 0.055, hip[1] + 0.085), _Part.BAG)

    def _carried_bag(self) -> None:
        side = 1 if self._front else -1
        x, y = self._hands[side]
        half, drop = (0.045, 0.085) if self.person.bag == "handbag" else (0.06, 0.19)
        self._limb(((x - 0.02, y + 0.05), (x, y), (x + 0.02, y + 0.05)), (0.006,) * 3, _Part.BAG, 0.8)
        self._rounded((x - half, y + 0.04, x + half, y + 0.04 + drop), _Part.BAG)

    # Cloth and light

    def _print(self, result: Floats, worn: NDArray[np.bool_], garment: Garment, top: float) -> None:
        """Give the accent to the `worn` pixels on the pattern; `top` is the upper end of the garment."""
        if garment.pattern == "plain":
            return
        rows, columns = np.nonzero(worn)
        v = (rows - self._crown) / self._unit
        u = (columns - self._middle - self.pose.lean * self._unit * (1 - v)) / (self._unit * self._breadth)
        # A print in the middle turns with the body, and is on the back as well as on the front.
        printed = _pattern(garment, u, v - top, 0.05 * self._sideways)
        result[rows[printed], columns[printed]] = seen(garment.accent, self.spectrum)

    def _light(self) -> Floats:
        """Shade the parts, darker towards the outline as on round bodies."""
        outline = Image.fromarray((self.covered() * 255).astype(np.uint8))
        radius = 0.03 * self._unit
        roundness = np.asarray(outline.filter(ImageFilter.BoxBlur(radius))) * np.float32(1 / 255)
        roundness *= 0.45 / _FULL_LIGHT
        roundness += 0.55 / _FULL_LIGHT
        roundness *= np.asarray(self._shade)
        return roundness

    # Drawing in body heights

    def _pixel(self, point: Point) -> Point:
        x, y = point
        lean = self.pose.lean * (1 - y)
        return self._middle + self._unit * (x + lean), self._crown + self._unit * y

    def _box(self, box: tuple[float, float, float, float]) -> list[Point]:
        (x0, y0), (x1, y1) = self._pixel(box[:2]), self._pixel(box[2:])
        return [(min(x0, x1), min(y0, y1)), (max(x0, x1), max(y0, y1))]

    def _polygon(self, points: list[Point], part: _Part, shade: float = 1.0) -> None:
        pixels = [self._pixel(point) for point in points]
        for drawing, fill in zip(self._drawings, _fills(part, shade), strict=True):
            drawing.polygon(pixels, fill=fill)

    def _ellipse(self, box: tuple[float, float, float, float], part: _Part, shade: float = 1.0) -> None:
        for drawing, fill in zip(self._drawings, _fills(part, shade), strict=True):
            drawing.ellipse(self._box(box), fill=fill)

    def _chord(
        self,
        box: tuple[float, float, float, float],
        start: float,
        end: float,
        part: _Part,
        shade: float = 1.0,
    ) -> None:
        for drawing, fill in zip(self._drawings, _fills(part, shade), strict=True):
            drawing.chord(self._box(box), start, end, fill=fill)

    def _rounded(self, box: tuple[float, float, float, float], part: _Part, shade: float = 1.0) -> None:
        for drawing, fill in zip(self._drawings, _fills(part, shade), strict=True):
            drawing.rounded_rectangle(self._box(box), radius=0.02 * self._unit, fill=fill)

    def _limb(
        self, joints: tuple[Point, ...], widths: tuple[float, ...] | list[float], part: _Part, shade: float
    ) -> None:
        """Draw a limb through `joints`, with the half widths `widths` there."""
        for (x0, y0), (x1, y1), w0, w1 in zip(joints, joints[1:], widths, widths[1:], strict=False):
            self._polygon([(x0 - w0, y0), (x0 + w0, y0), (x1 + w1, y1), (x1 - w1, y1)], part, shade)
        for (x, y), w in zip(joints[:-1], widths, strict=False):
            self._ellipse((x - w, y - w, x + w, y + w), part, shade)


def _fills(part: _Part, shade: float) -> tuple[int, int]:
    return int(part), round(_FULL_LIGHT * shade)


def _along(joints: tuple[Point, ...], share: float) -> tuple[Point, ...]:
    """Cut a limb of three joints to its first `share`, with three joints again."""
    first, second, third = joints
    if share <= 0.5:
        end = _between(first, second, 2 * share)
        return first, _between(first, end, 0.5), end
    return first, second, _between(second, third, 2 * share - 1)


def _between(start: Point, end: Point, share: float) -> Point:
    return start[0] + share * (end[0] - start[0]), start[1] + share * (end[1] - start[1])


def _pattern(garment: Garment, u: NDArray, v: NDArray, middle: float) -> NDArray[np.bool_]:
    """Whether points have the accent; u is across, v down from the garment's upper end, in body heights."""
    period, phase = garment.period, garment.phase
    across = ((v + phase) / period) % 1 < 0.5
    along = ((u + phase) / period) % 1 < 0.5
    x, y = u - middle, v - 0.11
    patterns = {
        "stripes across": lambda: across,
        "stripes along": lambda: along,
        "checks": lambda: across ^ along,
        "diagonal": lambda: ((u + v + phase) / (1.3 * period)) % 1 < 0.5,
        "dots": lambda: (((u / period) % 1 - 0.5) ** 2 + ((v / period) % 1 - 0.5) ** 2) < 0.09,
        "block": lambda: v > 0.08 + phase,
        "band": lambda: np.abs(v - 0.10 - phase / 2) < 0.25 * period + 0.015,
        "halves": lambda: u > 0,
        "disk": lambda: x**2 + y**2 < (0.6 * period + 0.02) ** 2,
        "square": lambda: np.maximum(np.abs(x), np.abs(y)) < 0.45 * period + 0.02,
        "cross": lambda: (
            (np.minimum(np.abs(x), np.abs(y)) < 0.016) & (np.maximum(np.abs(x), np.abs(y)) < 0.075)
        ),
        "cuffs": lambda: v > 0.16 + phase,
    }
    return patterns[garment.pattern]()
