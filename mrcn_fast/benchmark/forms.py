"""The forms of the block and of the loss that are compared, with the title and the colour that each has."""

from __future__ import annotations

from typing import Final, NamedTuple


class Form(NamedTuple):
    """A form as charts show it."""

    title: str
    color: str  # from the palette of Okabe and Ito, which colour-blind readers can tell apart


# In the order of the bars. A form has the same colour in every chart, and the fused form is in every chart.
FORMS: Final = {
    "fused": Form("mrcn_fast, fused", "#0072b2"),
    "compile collapsed": Form("torch.compile of the collapsed form", "#e69f00"),
    "compile": Form("torch.compile of the reference", "#009e73"),
    "instance_norm": Form("eager with torch's instance_norm", "#cc79a7"),
    "eager": Form("plain PyTorch, eager", "#d55e00"),
    "unfused": Form("the fused loss after torch's normalize", "#b8a200"),
    "vectorized": Form("the loss vectorized, eager", "#56b4e9"),
    "loop": Form("the loss as a loop over identities", "#7a4a1d"),
}
FLOOR: Final = Form("floor: a copy of the compulsory bytes", "#4d4d4d")
