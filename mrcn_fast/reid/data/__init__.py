"""Person images of two spectra: the published data sets, synthetic ones, sampling, augmentation."""

from mrcn_fast.reid.data.augment import Augmentation, normalize
from mrcn_fast.reid.data.images import PersonImages
from mrcn_fast.reid.data.sampler import PairedIdentitySampler
from mrcn_fast.reid.data.samples import DatasetError, Modality, Sample, TrainingSet
from mrcn_fast.reid.data.synthetic import write_sysu
from mrcn_fast.reid.data.sysu_mm01 import SYSUMM01

__all__ = [
    "SYSUMM01",
    "Augmentation",
    "DatasetError",
    "Modality",
    "PairedIdentitySampler",
    "PersonImages",
    "Sample",
    "TrainingSet",
    "normalize",
    "write_sysu",
]
