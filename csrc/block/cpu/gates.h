// The channel gates on (N, C), forward and backward: se_gate, eca_gate and cbam_channel_gate of reference.py.
//
// A group of samples is processed at once, so that each row of weights is read once for all of them. The work
// is split by rows and channels, independently of the number of threads, so that every sum has a fixed order.
#pragma once

#include "block/cpu/matmul.h"
#include "block/params.h"
#include "cpu/buffer.h"
#include "cpu/sigmoid.h"
#include "cpu/simd.h"

namespace mrcn::MRCN_ISA {
namespace {

// The pooled residuals of every sample and, for the backward, what the gradients of the weights need. The
// stride between arrays of C channels is `Gates::pitch_of(C)`, between arrays of R hidden units
// `Gates::pitch_of(R)`.
template <class A>
struct GateState {
  Buffer<A> pooled;      // (modalities, N, branches, C): GAP(M), (CBAM) GMP(M)
  Buffer<A> activation;  // (N, gates, branches, R): ReLU of the hidden layer
  Buffer<A> value;       // (N, gates, C): s
  Buffer<A> before;      // (N, gates, C): gradient before the sigmoid
  Buffer<A> inner;       // (N, gates, branches, R): gradient before the ReLU
  Buffer<A> of_pooled;   // (modalities, N, branches, C): gradient of `pooled`
};

template <class A>
class Gates {
 public:
  // Channels per block: their weights stay in the first-level cache for all samples of a group.
  static constexpr int64_t block_channels = 64;

  Gates(const BlockShape& shape, const BlockParameters& parameters, bool backward)
      : shape_(shape),
        count_(sets_of(shape.mode).gates),
        branches_(shape.gate == Gate::cbam_channel ? 2 : 1),
        N_(shape.samples),
        C_(shape.channels),
        pitch_(pitch_of(shape.channels)),
        R_(shape.hidden),
        hidden_pitch_(pitch_of(shape.hidden)),
        blocks_((C_ + block_channels - 1) / block_channels) {
    for (int i = 0; i < 4; ++i) weights_[i] = static_cast<const A*>(parameters.gate[i]);
    const int64_t pooled = int64_t(sets_of(shape.mode).inputs) * N_ * branches_ * pitch_;
    const int64_t hidden = has_hidden() ? N_ * count_ * branches_ * hidden_pitch_ : 0;
    state.pooled.allocate(pooled);
    state.activation.allocate(hidden);
    state.value.allocate(N_ * count_ * pitch_);
    if (backward) {
      state.before.allocate(N_ * count_ * pitch_);
      state.inner.allocate(hidden);
      state.of_pooled.allocate(pooled);
    }
  }

  // Restricts the backward to the gates that have a gradient (by default all); the others get zeros.
  void use_only(const bool* used) {
    for (int g = 0; g < count_; ++g) used_[g] = used[g];
  }

  // The bytes of weights that every group of samples reads again.
  int64_t weight_bytes() const { return has_hidden() ? 2 * count_ * R_ * C_ * int64_t(sizeof(A)) : 0; }

  // The modality whose residual gate g sees; the gates are A_v1, A_n1, A_v2, A_n2.
  static MRCN_INLINE int modality(int g) { return g % 2; }

  MRCN_INLINE A* pooled(int m, int64_t i, int branch = 0) const {
    return state.pooled.data + ((m * N_ + i) * branches_ + branch) * pitch_;
  }
  MRCN_INLINE A* of_pooled(int m, int64_t i, int branch = 0) const {
    return state.of_pooled.data + ((m * N_ + i) * branches_ + branch) * pitch_;
  }
  MRCN_INLINE A* value(int64_t i, int g) const { return state.value.data + (i * count_ + g) * pitch_; }
  MRCN_INLINE A* before(int64_t i, int g) const { return state.before.data + (i * count_ + g) * pitch_; }

  // The stride between arrays of `count` elements, a line more than they need. Otherwise arrays of 1024
  // channels would all begin at the same place of a page and evict one another from the first-level cache.
  static int64_t pitch_of(int64_t count) {
    constexpr int64_t line = line_bytes / sizeof(A);
    return (count + line - 1) / line * line + line;
  }

  // Computes the hidden layers of the samples [first, last). `excite` computes the gates from them.
  void squeeze(ParallelFor pool, int64_t first, int64_t last) const {
    if (!has_hidden()) return;
    const int64_t samples = last - first, units = row_units();
    parallel(
        pool, count_ * units, grain(unit_rows * samples * branches_ * C_), [&](int64_t begin, int64_t end) {
          for (int64_t unit = begin; unit < end; ++unit) {
            const int g = int(unit / units);
            const int64_t j0 = unit % units * unit_rows, row = g * R_ + j0;
            for (int b = 0; b < branches_; ++b) {
              const int64_t rows = least(unit_rows, R_ - j0);
              for (int64_t i = first; i < last; ++i) copy(activation(i, g, b) + j0, weights_[1] + row, rows);
              add_dot_products<A>({weights_[0] + row * C_, C_}, rows,
                  {pooled(modality(g), first, b), branches_ * pitch_}, samples, C_,
                  {activation(first, g, b) + j0, count_ * branches_ * hidden_pitch_});
              for (int64_t i = first; i < last; ++i) rectify(activation(i, g, b) + j0, rows);
            }
          }
        });
  }

  // Computes s of the channels [c0, c1) of the samples [first, last); c0 is a multiple of `block_channels`.
  void excite(int64_t first, int64_t last, int64_t c0, int64_t c1) const {
    for (; c0 < c1; c0 += block_channels) {
      for (int g = 0; g < count_; ++g) excite_block(first, last, g, c0, least(c0 + block_channels, c1));
    }
  }

  // Computes `of_pooled` of the samples [first, last) from `before`.
  void backward(ParallelFor pool, int64_t first, int64_t last) const {
    if (shape_.gate == Gate::eca) return backward_eca(pool, first, last);
    const int64_t samples = last - first, units = (R_ + unit_columns - 1) / unit_columns;
    parallel(pool, count_ * units, grain(unit_columns * samples * C_), [&](int64_t begin, int64_t end) {
      for (int64_t unit = begin; unit < end; ++unit) {
        const int64_t j0 = unit % units * unit_columns;
        backward_hidden(first, last, int(unit / units), j0, least(j0 + unit_columns, R_));
      }
    });
    parallel(pool, blocks_, grain(samples * count_ * R_ * block_channels), [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block) {
        const int64_t c0 = block * block_channels;
        backward_pooled(first, last, c0, least(c0 + block_channels, C_));
      }
    });
  }

  // Writes the gradients of the gates' parameters over all samples to `out`, in the order of gates.py.
  void parameter_gradients(void* const* out) const {
    A* gradient[4];
    for (int i = 0; i < 4; ++i) gradient[i] = static_cast<A*>(out[i]);
    if (shape_.gate == Gate::eca) return eca_gradients(gradient[0]);
    const int64_t units = row_units();
    parallel(shape_.parallel, count_ * units, grain(unit_rows * N_ * C_), [&](int64_t begin, int64_t end) {
      for (int64_t unit = begin; unit < end; ++unit) {
        const int g = int(unit / units);
        const int64_t j0 = unit % units * unit_rows, rows = least(unit_rows, R_ - j0), row = g * R_ + j0;
        if (!used_[g]) {
          clear(gradient[0] + row * C_, rows * C_);
          clear(gradient[1] + row, rows);
          continue;
        }
        const auto k = [&](int b) {
          return Factors<A>{inner(0, g, b) + j0, 1, count_ * branches_ * hidden_pitch_};
        };
        const auto z = [&](int b) { return Matrix<const A>{pooled(modality(g), 0, b), branches_ * pitch_}; };
        outer_products(k, z, {gradient[0] + row * C_, C_}, rows, C_, gradient[1] + row);
      }
    });
    parallel(
        shape_.parallel, count_ * blocks_, grain(block_channels * N_ * R_), [&](int64_t begin, int64_t end) {
          for (int64_t unit = begin; unit < end; ++unit) {
            const int g = int(unit / blocks_);
            const int64_t c0 = unit % blocks_ * block_channels, rows = least(block_channels, C_ - c0);
            const int64_t row = g * C_ + c0;
            if (!used_[g]) {
              clear(gradient[2] + row * R_, rows * R_);
              clear(gradient[3] + row, rows);
              continue;
            }
            const auto k = [&](int) { return Factors<A>{before(0, g) + c0, 1, count_ * pitch_}; };
            const auto y = [&](int b) {
              return Matrix<const A>{activation(0, g, b), count_ * branches_ * hidden_pitch_};
            };
            outer_products(k, y, {gradient[2] + row * R_, R_}, rows, R_, gradient[3] + row);
          }
        });
  }

  GateState<A> state;

 private:
  bool has_hidden() const { return entry_of(shape_.gate).hidden_layer; }

  // Units of work for at least about 16,000 multiplications per thread.
  static int64_t grain(int64_t work) { return most<int64_t>(1, 16384 / most<int64_t>(work, 1)); }

  MRCN_INLINE A* activation(int64_t i, int g, int b) const {
    return state.activation.data + ((i * count_ + g) * branches_ + b) * hidden_pitch_;
  }
  MRCN_INLINE A* inner(int64_t i, int g, int b) const {
    return state.inner.data + ((i * count_ + g) * branches_ + b) * hidden_pitch_;
  }

  // How many rows of a matrix with R rows, or columns of a matrix with R columns, make a unit of work.
  static constexpr int64_t unit_rows = 16, unit_columns = 64;
  int64_t row_units() const { return (R_ + unit_rows - 1) / unit_rows; }

  void excite_block(int64_t first, int64_t last, int g, int64_t c0, int64_t c1) const {
    if (shape_.gate == Gate::eca) {
      for (int64_t i = first; i < last; ++i)
        convolve(weights_[0] + g * R_, pooled(modality(g), i), c0, c1, value(i, g));
    } else {
      const int64_t row = g * C_ + c0;
      for (int64_t i = first; i < last; ++i) {
        for (int64_t c = c0; c < c1; ++c) value(i, g)[c] = A(branches_) * weights_[3][g * C_ + c];
      }
      for (int b = 0; b < branches_; ++b) {
        add_dot_products<A>({weights_[2] + row * R_, R_}, c1 - c0,
            {activation(first, g, b), count_ * branches_ * hidden_pitch_}, last - first, R_,
            {value(first, g) + c0, count_ * pitch_});
      }
    }
    for (int64_t i = first; i < last; ++i) {
      A* s = value(i, g);
      int64_t c = c0;
      for (; c + lanes<A> <= c1; c += lanes<A>) store(s + c, sigmoids<A>(load(s + c)));
      for (; c < c1; ++c) s[c] = sigmoid(s[c]);
    }
  }

  // The gradients of a layer's weights, Σ k x, and biases, Σ k, over samples and branches.
  template <class K, class X>
  void outer_products(
      const K& k, const X& x, Matrix<A> weights, int64_t rows, int64_t columns, A* biases) const {
    for (int64_t row = 0; row < rows; ++row) {
      biases[row] = A(0);
      for (int b = 0; b < branches_; ++b) {
        for (int64_t i = 0; i < N_; ++i) biases[row] += k(b)(row, i);
      }
    }
    for (int b = 0; b < branches_; ++b) add_products<A>(k(b), x(b), N_, weights, rows, columns, b == 0);
  }

  static void clear(A* to, int64_t count) {
    for (int64_t n = 0; n < count; ++n) to[n] = A(0);
  }
  static void copy(A* to, const A* from, int64_t count) {
    for (int64_t n = 0; n < count; ++n) to[n] = from[n];
  }
  // A NaN passes, as in torch.relu.
  static void rectify(A* x, int64_t count) {
    for (int64_t n = 0; n < count; ++n) x[n] = x[n] < A(0) ? A(0) : x[n];
  }

  void convolve(const A* weight, const A* z, int64_t c0, int64_t c1, A* to) const {
    for (int64_t c = c0; c < c1; ++c) to[c] = A(0);
    for (int64_t t = 0; t < R_; ++t) {
      const int64_t shift = t - R_ / 2, begin = most(c0, -shift), end = least(c1, C_ - shift);
      if (begin < end) add_scaled(to + begin, weight[t], z + begin + shift, end - begin);
      // The zeros of the padding count too: a weight that is not finite makes them NaN.
      const A nothing = weight[t] * A(0);
      for (int64_t c = c0; c < least(begin, c1); ++c) to[c] += nothing;
      for (int64_t c = most(end, c0); c < c1; ++c) to[c] += nothing;
    }
  }

  // Computes the gradient before the ReLU of the hidden units [j0, j1).
  void backward_hidden(int64_t first, int64_t last, int g, int64_t j0, int64_t j1) const {
    if (!used_[g]) return;
    add_products<A>({before(first, g), count_ * pitch_, 1}, {weights_[2] + g * C_ * R_ + j0, R_}, C_,
        {inner(first, g, 0) + j0, count_ * branches_ * hidden_pitch_}, last - first, j1 - j0, true);
    for (int64_t i = first; i < last; ++i) {
      // Both branches of CBAM share the weights and so the gradient before their own ReLU.
      for (int b = branches_ - 1; b >= 0; --b) {
        for (int64_t j = j0; j < j1; ++j) {
          const A y = activation(i, g, b)[j];
          inner(i, g, b)[j] = y <= A(0) ? A(0) : inner(i, g, 0)[j];
        }
      }
    }
  }

  // Computes `of_pooled` of the channels [c0, c1).
  void backward_pooled(int64_t first, int64_t last, int64_t c0, int64_t c1) const {
    for (int g = 0; g < count_; ++g) {
      for (int b = 0; b < branches_; ++b) {
        if (!used_[g]) {
          if (g != modality(g)) continue;
          for (int64_t i = first; i < last; ++i) clear(of_pooled(g, i, b) + c0, c1 - c0);
          continue;
        }
        add_products<A>({inner(first, g, b), count_ * branches_ * hidden_pitch_, 1},
            {weights_[0] + g * R_ * C_ + c0, C_}, R_,
            {of_pooled(modality(g), first, b) + c0, branches_ * pitch_}, last - first, c1 - c0,
            g == modality(g));
      }
    }
  }

  void backward_eca(ParallelFor pool, int64_t first, int64_t last) const {
    const int M = sets_of(shape_.mode).inputs;
    parallel(pool, last - first, grain(count_ * C_ * R_), [&](int64_t begin, int64_t end) {
      for (int64_t i = first + begin; i < first + end; ++i) {
        for (int m = 0; m < M; ++m) {
          for (int64_t c = 0; c < C_; ++c) {
            A total(0);
            for (int g = m; g < count_; g += M) {
              if (!used_[g]) continue;
              for (int64_t t = 0; t < R_; ++t) {
                const int64_t to = c - t + R_ / 2;
                if (to >= 0 && to < C_) total += weights_[0][g * R_ + t] * before(i, g)[to];
              }
            }
            of_pooled(m, i)[c] = total;
          }
        }
      }
    });
  }

  void eca_gradients(A* gradient) const {
    for (int g = 0; g < count_; ++g) {
      for (int64_t t = 0; t < R_; ++t) {
        const int64_t shift = t - R_ / 2;
        const int64_t c0 = most<int64_t>(0, -shift), c1 = least(C_, C_ - shift);
        A total(0);
        for (int64_t i = 0; i < N_ && used_[g]; ++i) {
          const A* gradient = before(i, g);
          if (c0 < c1) total += dot(gradient + c0, pooled(modality(g), i) + c0 + shift, c1 - c0);
          // The zeros of the padding count too: a gradient that is not finite makes them NaN.
          for (int64_t c = 0; c < least(c0, C_); ++c) total += gradient[c] * A(0);
          for (int64_t c = most<int64_t>(c1, 0); c < C_; ++c) total += gradient[c] * A(0);
        }
        gradient[g * R_ + t] = total;
      }
    }
  }

  const BlockShape& shape_;
  const A* weights_[4];
  const int count_, branches_;
  const int64_t N_, C_;
  const int64_t pitch_;  // between arrays of channels
  const int64_t R_;
  const int64_t hidden_pitch_;  // between arrays of hidden units
  const int64_t blocks_;        // of channels
  bool used_[4] = {true, true, true, true};
};

}  // namespace
}  // namespace mrcn::MRCN_ISA
