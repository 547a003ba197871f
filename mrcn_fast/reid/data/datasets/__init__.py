"""The published data sets, each read from the tree that its owners ship.

sysu_mm01.py, regdb.py and llcm.py read one data set each: its training set and the searches of its protocol.
registry.py opens a data set by name and recognizes a tree. The readers share trees.py for folders and
lists.py for lists of images and identities. permutations.py reads SYSU-MM01's official gallery draw, over
matlab.py.
"""

from mrcn_fast.reid.data.datasets.registry import DATASETS, is_whole, open_dataset, recognize

__all__ = ["DATASETS", "is_whole", "open_dataset", "recognize"]
