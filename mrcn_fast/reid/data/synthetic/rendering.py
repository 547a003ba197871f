"""The rendering of synthetic people: identity, camera and pose -> image, for any data set.

The figure is drawn before the background of the camera's room, and then passes the camera's light, lens and
sensor.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from PIL import Image, ImageFilter

from mrcn_fast.reid.data.synthetic.body import (
    NEAR_INFRARED,
    SUPERSAMPLING,
    VISIBLE,
    Figure,
    Floats,
    Pose,
    Spectrum,
    seen,
)
from mrcn_fast.reid.data.synthetic.people import RGB, Person, Surface
from mrcn_fast.reid.data.types import Modality

# The number of light levels for which a camera's gamma curve is tabulated.
_TONES: Final = 1024


@dataclass(frozen=True)
class Camera:
    """The properties of a camera: its spectrum, light, lens, sensor, view and room. See `make_camera`."""

    modality: Modality
    spectrum: Spectrum
    gain: float
    cast: RGB
    gradient: tuple[float, float]  # change of light across the image, to the right and downwards
    vignette: float
    gamma: float
    blur: float  # pixels at an image height of 128
    noise: float
    room: Floats  # (height, wider than the image, 3), in the camera's spectrum
    yaw: float  # radians, 0 faces the camera
    yaw_spread: float
    away: float  # share of the people that walk away from the camera
    fill: float  # height of the tallest person as a share of the image's
    offset: float  # of the figure, in image widths


def make_camera(
    generator: np.random.Generator,
    modality: Modality,
    image_size: tuple[int, int],
    room_generator: np.random.Generator,
    *,
    infrared_spectrum: Spectrum = NEAR_INFRARED,
    camera_style: float = 1.0,
    pose_spread: float = 1.0,
) -> Camera:
    """Draw a camera at random. Cameras with equal `room_generator` streams stand in the same room.

    `infrared_spectrum` is what infrared cameras see; with `VISIBLE`, they see the same as visible ones. At
    camera_style 0, all cameras have the same even light, noiseless sensor and plain room. At pose_spread 0,
    all people stand upright, face the camera and have the same size in the image.
    """
    infrared = modality == "infrared"
    spectrum = infrared_spectrum if infrared else VISIBLE
    style = camera_style

    def around(middle: float, spread: float) -> float:
        return float(middle + style * spread * generator.uniform(-1, 1))

    gain = around(1.0, 0.2) + (0.1 * style if infrared else 0.0)
    cast = (around(1.0, 0.13), around(1.0, 0.07), around(1.0, 0.13))
    return Camera(
        modality=modality,
        spectrum=spectrum,
        gain=gain,
        # An infrared sensor has one channel, and so no colour shift.
        cast=cast if spectrum == VISIBLE else (1.0, 1.0, 1.0),
        gradient=(around(0, 0.3), around(0, 0.25)),
        # The infrared lamp stands beside the lens, so that the middle is brighter.
        vignette=style * generator.uniform(0.25, 0.5) if infrared else style * generator.uniform(0, 0.15),
        gamma=around(1.0, 0.2),
        blur=style * generator.uniform(0.2, 0.7),
        noise=style * (generator.uniform(0.02, 0.05) if infrared else generator.uniform(0.01, 0.03)),
        room=_make_room(room_generator, image_size, spectrum, style),
        yaw=pose_spread * generator.uniform(-0.5, 0.5),
        yaw_spread=pose_spread * generator.uniform(0.2, 0.6),
        away=min(1.0, pose_spread * generator.uniform(0.1, 0.7)),
        fill=0.93 + pose_spread * generator.uniform(-0.05, 0.03),
        offset=pose_spread * generator.uniform(-0.05, 0.05),
    )


def make_pose(
    generator: np.random.Generator, camera: Camera, *, camera_style: float = 1.0, pose_spread: float = 1.0
) -> Pose:
    """Draw a pose in front of `camera` at random."""
    spread = pose_spread
    turned = np.pi if generator.random() < camera.away else 0.0
    return Pose(
        yaw=turned + camera.yaw + camera.yaw_spread * generator.standard_normal(),
        stride=spread * generator.uniform(-0.13, 0.13),
        swing=spread * generator.uniform(-0.10, 0.10),
        lean=spread * generator.uniform(-0.03, 0.03),
        scale=camera.fill * (1 + spread * generator.uniform(-0.05, 0.05)),
        shift=(
            camera.offset + spread * generator.uniform(-0.07, 0.07),
            spread * generator.uniform(-0.025, 0.025),
        ),
        light=1 + camera_style * generator.uniform(-0.12, 0.12),
        room_shift=camera_style * generator.uniform(0, 1),
    )


def render(
    person: Person, camera: Camera, pose: Pose, image_size: tuple[int, int], generator: np.random.Generator
) -> Image.Image:
    """Render the RGB image of `person` for `camera`; `generator` makes the noise."""
    width = image_size[1]
    figure = Figure(person, pose, image_size, camera.spectrum)
    figure.draw()
    colour = _reduced(figure.reflectance())
    covered = _reduced(figure.covered()[..., None].astype(np.float32))
    left = round(pose.room_shift * (camera.room.shape[1] - width))
    scene = colour + (1 - covered) * camera.room[:, left : left + width]
    return _photograph(scene, camera, pose, generator)


def _reduced(image: Floats) -> Floats:
    """Average supersampled pixels (H, W, C) to the pixels of the image."""
    # Sums of strided slices are several times faster than NumPy's mean over two axes.
    steps = range(SUPERSAMPLING)
    slices = [image[row::SUPERSAMPLING, column::SUPERSAMPLING] for row in steps for column in steps]
    total = slices[0].copy()
    for part in slices[1:]:
        total += part
    return total * np.float32(1 / len(slices))


def _make_room(
    generator: np.random.Generator, image_size: tuple[int, int], spectrum: Spectrum, style: float
) -> Floats:
    """Draw the background, twice as wide as an image: wall, floor, joints, and a few flat objects."""
    height, width = image_size[0], 2 * image_size[1]
    room = np.empty((height, width, 3), dtype=np.float32)

    def paint(rows: slice, columns: slice) -> None:
        colour = generator.uniform(0.25, 0.8) + generator.uniform(-0.12, 0.12, 3)
        red, green, blue = np.clip(colour, 0.05, 0.95).tolist()
        room[rows, columns] = seen(Surface((red, green, blue), generator.uniform(0.1, 0.6)), spectrum)

    horizon = round(height * generator.uniform(0.55, 0.82))
    everything = slice(0, width)
    paint(slice(0, horizon), everything)
    paint(slice(horizon, height), everything)
    for _ in range(generator.integers(3, 7)):
        left, wide = generator.uniform(0, width), generator.uniform(0.06, 0.3) * width
        top, tall = generator.uniform(0, 0.5) * horizon, generator.uniform(0.2, 1.0) * horizon
        columns = slice(round(left), round(left + wide))
        paint(slice(round(top), min(horizon, round(top + tall))), columns)
    joint = max(4, round(height * generator.uniform(0.06, 0.2)))
    room[horizon::joint] *= 0.85
    if generator.random() < 0.5:
        room[:horizon, :: max(4, round(1.5 * joint))] *= 0.88
    stains = Image.fromarray(generator.uniform(0.85, 1.12, (12, 12)).astype(np.float32))
    room *= np.asarray(stains.resize((width, height), Image.Resampling.BICUBIC))[..., None]
    plain = np.float32(0.45)
    return plain + np.float32(min(style, 1.0)) * (room - plain)


def _photograph(scene: Floats, camera: Camera, pose: Pose, generator: np.random.Generator) -> Image.Image:
    """Apply light, lens and sensor."""
    height, width, _ = scene.shape
    y, x = np.linspace(-1, 1, height)[:, None], np.linspace(-1, 1, width)[None, :]
    light = 1 + camera.gradient[0] * x / 2 + camera.gradient[1] * y / 2 - camera.vignette * (x**2 + y**2) / 2
    gain = np.array(camera.cast, dtype=np.float32) * np.float32(camera.gain * pose.light)
    exposed = scene * light[..., None].astype(np.float32)
    exposed *= gain * np.float32(_TONES - 1)
    tones = (np.linspace(0, 1, _TONES) ** camera.gamma * 255).astype(np.uint8)
    image = Image.fromarray(np.take(tones, exposed.astype(np.int32), mode="clip"))
    if camera.blur:
        image = image.filter(ImageFilter.GaussianBlur(camera.blur * height / 128))
    if not camera.noise:
        return image
    # An infrared sensor has one channel, and so one noise.
    channels = 3 if camera.spectrum == VISIBLE else 1
    noise = generator.standard_normal((height, width, channels), dtype=np.float32)
    noise *= np.float32(255 * camera.noise)
    return Image.fromarray(np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8))
