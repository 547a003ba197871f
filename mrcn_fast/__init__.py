"""MRCN's modality restitution and compensation block and its CQC loss as fused kernels."""

from mrcn_fast import reference
from mrcn_fast.backends.cpu import release_memory
from mrcn_fast.block import (
    MRCNAttention,
    MRCNBlock,
    MRCNFeatures,
    SNRBlock,
    SNRFeatures,
    mrcn_block,
    mrcn_restitution,
    snr_block,
)
from mrcn_fast.cqc import CQCLoss, cqc_loss
from mrcn_fast.dispatch import backends
from mrcn_fast.tuning import tune

__version__ = "0.1.0"

__all__ = [
    "CQCLoss",
    "MRCNAttention",
    "MRCNBlock",
    "MRCNFeatures",
    "SNRBlock",
    "SNRFeatures",
    "backends",
    "cqc_loss",
    "mrcn_block",
    "mrcn_restitution",
    "reference",
    "release_memory",
    "snr_block",
    "tune",
]
