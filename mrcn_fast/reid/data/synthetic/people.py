"""The identities of synthetic people, which don't depend on camera and pose.

An identity consists of the body's proportions, the hair, the cut, pattern and material of the clothes, and
the bag. It also has colours, but only visible cameras see them: the reflectance of a material in the near
infrared doesn't depend on its colour.
"""

from __future__ import annotations

import colorsys
from dataclasses import dataclass
from typing import Final, TypeVar

import numpy as np

T = TypeVar("T")
RGB = tuple[float, float, float]


@dataclass(frozen=True)
class Surface:
    """The reflectance of a material, 0..1, for red, green, blue and the near infrared."""

    visible: RGB
    infrared: float


@dataclass(frozen=True)
class Garment:
    """The cloth of a garment: a `pattern` of `accent` on `base`; `period` and `phase` in body heights."""

    base: Surface
    accent: Surface
    pattern: str
    period: float
    phase: float


@dataclass(frozen=True)
class Body:
    """Proportions in body heights, with half widths; `stature` is relative to the tallest person."""

    stature: float
    head: float
    shoulders: float
    waist: float
    hips: float
    hip_height: float  # from the crown down to the legs
    arm: float
    leg: float


@dataclass(frozen=True)
class Person:
    """An identity. `hem` is the length of the top below the hips, in body heights."""

    body: Body
    skin: Surface
    hair: Surface
    hair_style: str
    hat: Surface | None
    top: Garment
    sleeves: str
    hem: float
    inner: Surface | None  # visible under an open top
    bottom: Garment
    cut: str
    shoes: Surface
    boots: bool
    bag: str
    bag_surface: Surface


HAIR_STYLES: Final = ("short", "bald", "bob", "long", "bun", "ponytail", "afro")
SLEEVES: Final = ("long", "short", "none")
CUTS: Final = ("trousers", "wide", "shorts", "skirt", "long skirt")
BAGS: Final = ("none", "backpack", "shoulder bag", "handbag", "tote")
TOP_PATTERNS: Final = (
    "plain",
    "stripes across",
    "stripes along",
    "checks",
    "diagonal",
    "dots",
    "block",
    "band",
    "halves",
    "disk",
    "square",
    "cross",
)
BOTTOM_PATTERNS: Final = ("plain", "checks", "stripes along", "cuffs")

# Near-infrared reflectance of materials. Most dyes are transparent there, so that cloth has the reflectance
# of its fibre; leather and carbon black stay dark.
_INFRARED_OF_CLOTH: Final = {
    "cotton": (0.60, 0.85),
    "denim": (0.50, 0.75),
    "wool": (0.40, 0.65),
    "polyester": (0.30, 0.90),
    "nylon": (0.25, 0.50),
    "leather": (0.08, 0.20),
    "carbon black": (0.05, 0.15),
}
# Hue, saturation and value of usual clothes: many are black, white, grey or navy.
_CLOTH_COLOURS: Final = (
    (0.00, 0.00, 0.10),
    (0.00, 0.00, 0.45),
    (0.00, 0.00, 0.92),
    (0.62, 0.70, 0.32),
    (0.60, 0.55, 0.75),
    (0.55, 0.35, 0.85),
    (0.00, 0.80, 0.75),
    (0.95, 0.45, 0.85),
    (0.08, 0.75, 0.90),
    (0.14, 0.75, 0.92),
    (0.09, 0.40, 0.60),
    (0.35, 0.60, 0.50),
    (0.45, 0.50, 0.65),
    (0.78, 0.45, 0.55),
)
_SKIN_TONES: Final = ((0.93, 0.77, 0.67), (0.85, 0.65, 0.52), (0.70, 0.49, 0.36), (0.47, 0.31, 0.22))
_HAIR_COLOURS: Final = (
    (0.08, 0.07, 0.07),
    (0.22, 0.14, 0.09),
    (0.42, 0.26, 0.14),
    (0.78, 0.62, 0.38),
    (0.62, 0.62, 0.62),
)
# The least contrast of a pattern in each spectrum, so that cameras of both see it.
_PATTERN_CONTRAST: Final = 0.28


def make_person(generator: np.random.Generator) -> Person:
    """Draw an identity at random."""
    top = _garment(generator, TOP_PATTERNS, plain=0.15)
    hem = float(generator.choice([0.0, 0.02, 0.04, 0.12, 0.22], p=[0.3, 0.25, 0.2, 0.15, 0.1]))
    opened = generator.random() < 0.25
    return Person(
        body=_body(generator),
        skin=Surface(_jittered(_choice(generator, _SKIN_TONES), generator), generator.uniform(0.60, 0.75)),
        # Melanin absorbs little in the near infrared, so that black hair may be bright there.
        hair=Surface(_jittered(_choice(generator, _HAIR_COLOURS), generator), generator.uniform(0.20, 0.60)),
        hair_style=_choice(generator, HAIR_STYLES),
        hat=_cloth(generator) if generator.random() < 0.2 else None,
        top=top,
        sleeves="long" if hem > 0.1 else _choice(generator, SLEEVES, (0.5, 0.4, 0.1)),
        hem=hem,
        inner=_contrasting(generator, top.base) if opened else None,
        bottom=_garment(generator, BOTTOM_PATTERNS, plain=0.6),
        cut=_choice(generator, CUTS, (0.4, 0.15, 0.2, 0.15, 0.1)),
        shoes=_cloth(generator),
        boots=bool(generator.random() < 0.2),
        bag=_choice(generator, BAGS, (0.35, 0.25, 0.15, 0.15, 0.1)),
        bag_surface=_contrasting(generator, top.base),
    )


def _body(generator: np.random.Generator) -> Body:
    # All widths share a breadth, and each has a variation of its own.
    breadth = generator.uniform(0.82, 1.28)
    return Body(
        stature=generator.uniform(0.88, 1.0),
        head=generator.uniform(0.90, 1.15),
        shoulders=0.113 * breadth * generator.uniform(0.88, 1.15),
        waist=0.082 * breadth * generator.uniform(0.85, 1.25),
        hips=0.090 * breadth * generator.uniform(0.88, 1.18),
        hip_height=generator.uniform(0.46, 0.55),
        arm=0.023 * breadth * generator.uniform(0.85, 1.2),
        leg=0.039 * breadth * generator.uniform(0.85, 1.2),
    )


def _garment(generator: np.random.Generator, patterns: tuple[str, ...], plain: float) -> Garment:
    base = _cloth(generator)
    pattern = "plain" if generator.random() < plain else _choice(generator, patterns[1:])
    return Garment(
        base=base,
        accent=_contrasting(generator, base),
        pattern=pattern,
        period=generator.uniform(0.045, 0.10),
        phase=generator.uniform(0.0, 0.10),
    )


def _cloth(generator: np.random.Generator) -> Surface:
    hue, saturation, value = _choice(generator, _CLOTH_COLOURS)
    hue += generator.uniform(-0.03, 0.03)
    colour = colorsys.hsv_to_rgb(hue % 1, saturation, value)
    material = _choice(generator, tuple(_INFRARED_OF_CLOTH))
    return Surface(_jittered(colour, generator), generator.uniform(*_INFRARED_OF_CLOTH[material]))


def _contrasting(generator: np.random.Generator, base: Surface) -> Surface:
    """Draw a cloth that contrasts with `base` in both spectra, brighter or darker in each."""
    while True:
        other = _cloth(generator)
        visible = max(abs(a - b) for a, b in zip(other.visible, base.visible, strict=True))
        if min(visible, abs(other.infrared - base.infrared)) >= _PATTERN_CONTRAST:
            return other


def _jittered(colour: RGB, generator: np.random.Generator) -> RGB:
    red, green, blue = np.clip(np.array(colour) + generator.uniform(-0.05, 0.05, 3), 0.02, 0.98).tolist()
    return red, green, blue


def _choice(
    generator: np.random.Generator, options: tuple[T, ...], probabilities: tuple[float, ...] | None = None
) -> T:
    return options[int(generator.choice(len(options), p=probabilities))]
