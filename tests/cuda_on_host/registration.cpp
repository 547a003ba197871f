// The operations' names in the namespace of tests.
#include "cuda/tensors.h"
#include "schemas.h"

#define MRCN_DEFINE_IN(name) \
  STABLE_TORCH_LIBRARY(name, library) { mrcn::define_operations(library); }
MRCN_DEFINE_IN(mrcn_fast_cuda_on_host)
