// Every operation's schema, once.
#pragma once

#include <torch/csrc/stable/library.h>

namespace mrcn {

template <class Library>
void define_operations(Library& library) {
  // Blocks. norm_weight, norm_bias: (modalities, C); gate_parameters: those of mrcn_fast/gates.py; gate: the
  // number of `Gate` in block/params.h. No argument is a string, because torch's stable headers copy one at
  // every call and never free the copy. The last result of a forward is what its backward takes of it, in a
  // shape of the kernels' own. A gradient may be missing.
  //
  // A backward gives the gradients of the inputs, of norm_weight and norm_bias, and of four gate parameters;
  // those that the gate does not have are tensors without elements. The results are no list, which Inductor's
  // cpp_wrapper refuses.
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
  // The loss. features: the six sets, or all stacked in one; normalize: their rows are divided by their
  // lengths first. Results of the forward: the sum; a slot for each visible sample with a loss and its
  // identity, in any order, those left over with loss 0 and the largest int64; how many identities there are;
  // and what the backward wants. It gives the gradient of all sets, stacked.
  library.def(
      "cqc_forward(Tensor[] features, Tensor labels, Tensor infrared_labels, float margin, "
      "bool detach_negative, bool normalize) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  library.def(
      "cqc_backward(Tensor gradient, Tensor[] features, Tensor labels, Tensor infrared_labels, Tensor saved, "
      "bool detach_negative, bool normalize) -> Tensor");
}

}  // namespace mrcn
