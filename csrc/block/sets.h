// Which feature sets each operation makes, of which inputs and by which gates: one table, which the checks of
// arguments, the kernels for the CPU and those for CUDA read.
#pragma once

namespace mrcn {

// The operations, in the order of `set_table`.
enum class Mode {
  pair,       // (v, n) -> v+, v-, n-, n+
  concat,     // (v, n) -> v, v+, v-, n-, n+, n
  restitute,  // x -> x+
  snr,        // x -> restituted, contaminated, normalized
};

constexpr int modes = 4, most_inputs = 2, most_made_sets = 4, most_sets = 6;

// What an input adds to a set, with the gate's value s. formulas.h has the formulas.
enum class Term {
  none,
  normalized,    // F̃
  restituted,    // F̃ + s M, or F + s M
  contaminated,  // F̃ + (1 - s) M
  distilled,     // s M
};

// What one input adds to one set.
struct Part {
  Term term;
  int gate = -1;  // the gate whose value is s; -1 for a term without s
};

// The sets of a mode.
struct Sets {
  const char* name;                         // of its operations: NAME_forward and NAME_backward
  Mode made_as;                             // the mode whose kernels make the same sets
  int inputs;                               // feature maps, one per modality
  int gates;                                // gate g sees the residual of input g % inputs
  int made;                                 // sets that are computed
  Part parts[most_made_sets][most_inputs];  // of each made set, what each input adds to it
  bool restitutes = true;  // whether M₊ may be added to the input, as the argument to_input says
  bool concat = false;  // all sets are one tensor, in which the inputs stand before and after the made sets

  constexpr int first_made() const { return concat ? 1 : 0; }  // among all sets
  constexpr int all() const { return made + (concat ? inputs : 0); }
  constexpr int stacked() const { return concat ? all() : 1; }  // sets per tensor of the results
};

namespace {  // one copy per translation unit: files differ in their instruction set

constexpr Sets concatenated(Sets sets, const char* name) {
  sets.name = name;
  sets.concat = true;
  return sets;
}

constexpr Sets pair_sets = {
    .name = "block",
    .made_as = Mode::pair,
    .inputs = 2,
    .gates = 4,
    .made = 4,
    .parts = {{{Term::restituted, 0}, {Term::none}},  // v+
        {{Term::normalized}, {Term::distilled, 3}},   // v-
        {{Term::distilled, 2}, {Term::normalized}},   // n-
        {{Term::none}, {Term::restituted, 1}}},       // n+
};

constexpr Sets set_table[modes] = {
    pair_sets,
    concatenated(pair_sets, "block_concat"),
    {
        .name = "restitute",
        .made_as = Mode::restitute,
        .inputs = 1,
        .gates = 1,
        .made = 1,
        .parts = {{{Term::restituted, 0}}},
    },
    {
        .name = "snr",
        .made_as = Mode::snr,
        .inputs = 1,
        .gates = 1,
        .made = 3,
        .parts = {{{Term::restituted, 0}}, {{Term::contaminated, 0}}, {{Term::normalized}}},
        .restitutes = false,
    },
};

constexpr const Sets& sets_of(Mode mode) { return set_table[int(mode)]; }

}  // namespace
}  // namespace mrcn
