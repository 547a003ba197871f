// The gates that have kernels, and the shapes of their parameters: one table, which the checks of arguments
// and the kernels for the CPU read.
#pragma once

namespace mrcn {

// In the order of `gate_table` and of FUSED in mrcn_fast/gates.py: an operation takes the number.
enum class Gate { se, eca, cbam_channel };

constexpr int gate_kinds = 3, most_gate_parameters = 4;

// A dimension of a parameter: the channels, or the gate's width, which is that of its hidden layer (SE, CBAM)
// or of its convolution (ECA).
enum class Size { none, channels, width };

struct GateEntry {
  int parameters;
  Size sizes[most_gate_parameters][2];  // of each parameter, behind the number of gates; as in gates.py
  bool hidden_layer = false;
  bool odd_width = false;
};

namespace {  // one copy per translation unit: files differ in their instruction set

constexpr GateEntry perceptron = {
    .parameters = 4,
    .sizes = {{Size::width, Size::channels}, {Size::width}, {Size::channels, Size::width}, {Size::channels}},
    .hidden_layer = true,
};

constexpr GateEntry gate_table[gate_kinds] = {
    perceptron,
    {.parameters = 1, .sizes = {{Size::width}}, .odd_width = true},
    perceptron,
};

constexpr const GateEntry& entry_of(Gate gate) { return gate_table[int(gate)]; }

}  // namespace
}  // namespace mrcn
