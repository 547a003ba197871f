// The schema of every operation. No other file spells one.
#pragma once

#include <torch/csrc/stable/library.h>

namespace mrcn {

template <class Library>
void define_operations(Library& library) {
  // The blocks. norm_weight and norm_bias have the shape (modalities, C). gate_parameters are the parameters
  // of a gate in mrcn_fast/gates.py, and gate is its number in `Gate` (block/gate_table.h). No argument is a
  // string, because torch's stable headers copy a string at every call and never free the copy. The last
  // result of a forward is what its backward needs; each backend chooses its shape. Any gradient may be
  // missing.
  //
  // A backward returns the gradients of the inputs, of norm_weight and norm_bias, and of four gate
  // parameters. Where the gate has fewer, the others are tensors without elements. The results are separate
  // tensors, because Inductor's cpp_wrapper refuses a list.
  library.def(
      "block_forward(Tensor visible, Tensor infrared, Tensor norm_weight, Tensor norm_bias, "
      "Tensor[] gate_parameters, int gate, float eps, bool to_input) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  library.def(
      "block_backward(Tensor? visible_restituted, Tensor? visible_compensated, Tensor? infrared_compensated, "
      "Tensor? infrared_restituted, Tensor visible, Tensor infrared, Tensor statistics, Tensor norm_weight, "
      "Tensor norm_bias, Tensor[] gate_parameters, int gate, bool to_input) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  library.def(
      "block_concat_forward(Tensor visible, Tensor infrared, Tensor norm_weight, Tensor norm_bias, "
      "Tensor[] gate_parameters, int gate, float eps, bool to_input) -> (Tensor, Tensor)");
  library.def(
      "block_concat_backward(Tensor? features, Tensor visible, Tensor infrared, Tensor statistics, "
      "Tensor norm_weight, Tensor norm_bias, Tensor[] gate_parameters, int gate, bool to_input) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  library.def(
      "restitute_forward(Tensor features, Tensor norm_weight, Tensor norm_bias, Tensor[] gate_parameters, "
      "int gate, float eps, bool to_input) -> (Tensor, Tensor)");
  library.def(
      "restitute_backward(Tensor? restituted, Tensor features, Tensor statistics, Tensor norm_weight, "
      "Tensor norm_bias, Tensor[] gate_parameters, int gate, bool to_input) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  library.def(
      "snr_forward(Tensor features, Tensor norm_weight, Tensor norm_bias, Tensor[] gate_parameters, "
      "int gate, float eps) -> (Tensor, Tensor, Tensor, Tensor)");
  library.def(
      "snr_backward(Tensor? restituted, Tensor? contaminated, Tensor? normalized, Tensor features, "
      "Tensor statistics, Tensor norm_weight, Tensor norm_bias, Tensor[] gate_parameters, int gate) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  // The CQC loss. features are the six sets, or one tensor that stacks them. With normalize, each row is
  // first divided by its length. The forward returns the sum of the losses; the loss of each identity and the
  // identity, in one slot for each visible sample (in any order; unused slots hold the loss 0 and the largest
  // int64); the number of identities; and what the backward needs. The backward returns the gradient of all
  // sets, stacked.
  library.def(
      "cqc_forward(Tensor[] features, Tensor labels, Tensor infrared_labels, float margin, "
      "bool detach_negative, bool normalize) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  library.def(
      "cqc_backward(Tensor gradient, Tensor[] features, Tensor labels, Tensor infrared_labels, Tensor saved, "
      "bool detach_negative, bool normalize) -> Tensor");
  // For a device, which of its planes the CUDA kernels hold in shared memory, in place of what was said for
  // it before. There are seven numbers for each: the gate, the dtype (`Dtype`), whether the layout is
  // channels_last, the channels, the pixels, and whether the forward holds them, and the backward.
  library.def("set_held(int device, int[] planes) -> ()");
}

}  // namespace mrcn
