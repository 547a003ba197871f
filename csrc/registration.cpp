// Registers the names of the operations, and defines the Python module _C with all other functions.
//
// The shapes for tracing (mrcn_fast/backends/cpu.py) and the derivatives (mrcn_fast/autograd.py) are in
// Python.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/isa.h"
#include "cpu/output_memory.h"
#include "schemas.h"

STABLE_TORCH_LIBRARY(mrcn_fast, library) { mrcn::define_operations(library); }

PYBIND11_MODULE(_C, module) {
  module.def("build_info", [] {
    pybind11::dict info;
    info["isa"] = mrcn::kernels().isa;
    info["isas"] = mrcn::carried_isas();
    info["compiler"] = __VERSION__;
    return info;
  });
  module.def("connect_storage", &mrcn::connect_storage);
  module.def("release_memory", &mrcn::release_memory);
  module.def("memory_in_use", [] {
    const mrcn::MemoryInUse in_use = mrcn::memory_in_use();
    return std::pair(in_use.live, in_use.kept);
  });
}
