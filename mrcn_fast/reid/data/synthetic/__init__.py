"""Synthetic person images in the trees of the published data sets, for tests, the demo and the study.

writers.py writes a tree per layout, with one options dataclass each. tree.py marks a tree as synthetic and
decides what may be replaced. people.py draws identities, body.py draws a person in a pose, and rendering.py
makes the image that a camera takes.
"""

from mrcn_fast.reid.data.synthetic.writers import WRITERS, write_llcm, write_regdb, write_sysu

__all__ = ["WRITERS", "write_llcm", "write_regdb", "write_sysu"]
