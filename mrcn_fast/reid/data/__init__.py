"""Person images of two spectra: the published data sets, synthetic ones, and training batches of them.

`datasets` reads the published trees and `synthetic` writes trees like them. types.py has the types that all
data sets share, and checks.py what their readers check and log. images.py decodes and resizes images of the
formats in formats.py, cache.py keeps them in a memory-mapped file, sampler.py pairs the modalities,
loading.py makes batches in worker processes, and augment.py augments and normalizes whole batches.
"""

from mrcn_fast.reid.data.augment import Augmentation, normalize
from mrcn_fast.reid.data.datasets.llcm import LLCM
from mrcn_fast.reid.data.datasets.regdb import RegDB
from mrcn_fast.reid.data.datasets.registry import DATASETS, is_whole, open_dataset, recognize
from mrcn_fast.reid.data.datasets.sysu_mm01 import SYSUMM01
from mrcn_fast.reid.data.images import PersonImages
from mrcn_fast.reid.data.sampler import PairedIdentitySampler
from mrcn_fast.reid.data.synthetic.writers import WRITERS, write_llcm, write_regdb, write_sysu
from mrcn_fast.reid.data.types import DatasetError, Modality, PersonDataset, Sample, Search, TrainingSet

__all__ = [
    "DATASETS",
    "LLCM",
    "SYSUMM01",
    "WRITERS",
    "Augmentation",
    "DatasetError",
    "Modality",
    "PairedIdentitySampler",
    "PersonDataset",
    "PersonImages",
    "RegDB",
    "Sample",
    "Search",
    "TrainingSet",
    "is_whole",
    "normalize",
    "open_dataset",
    "recognize",
    "write_llcm",
    "write_regdb",
    "write_sysu",
]
