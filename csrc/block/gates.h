// Channel gates on (N, C): the forms that reference.py calls se_gate, eca_gate and cbam_channel_gate.
//
// A group of samples is done at once, so that a row of weights is read once for all of them; work is split by
// rows and channels, never by threads, so that every sum has one order.
#pragma once

#include "block/block.h"
#include "common/buffer.h"
#include "common/sigmoid.h"
#include "common/vec.h"

namespace mrcn::MRCN_ISA {
namespace {

// The pooled residuals of every sample and, for the backward, what the weights' gradients need of each.
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
  Gates(const BlockShape& shape, const BlockParameters& parameters, bool backward)
      : shape_(shape),
        count_(gates(shape.mode)),
        branches_(shape.gate == Gate::cbam_channel ? 2 : 1),
        N_(shape.samples),
        C_(shape.channels),
        R_(shape.hidden),
        pitch_(C_ + 64 / int64_t(sizeof(A))) {
    for (int i = 0; i < 4; ++i) weights_[i] = static_cast<const A*>(parameters.gate[i]);
    const int64_t pooled = int64_t(modalities(shape.mode)) * N_ * branches_ * C_;
    const int64_t hidden = shape.gate == Gate::eca ? 0 : N_ * count_ * branches_ * R_;
    state.pooled.allocate(pooled);
    state.activation.allocate(hidden);
    state.value.allocate(N_ * count_ * C_);
    if (backward) {
      state.before.allocate(N_ * count_ * C_);
      state.inner.allocate(hidden);
      state.of_pooled.allocate(pooled);
    }
    if (shape.gate != Gate::eca) transpose_excitation();
  }

  // Gate g belongs to the residual of this modality: A_v1, A_n1, A_v2, A_n2.
  static MRCN_INLINE int modality(int g) { return g % 2; }

  MRCN_INLINE A* pooled(int m, int64_t i, int branch = 0) const {
    return state.pooled.data + ((m * N_ + i) * branches_ + branch) * C_;
  }
  MRCN_INLINE A* of_pooled(int m, int64_t i, int branch = 0) const {
    return state.of_pooled.data + ((m * N_ + i) * branches_ + branch) * C_;
  }
  MRCN_INLINE A* value(int64_t i, int g) const { return state.value.data + (i * count_ + g) * C_; }
  MRCN_INLINE A* before(int64_t i, int g) const { return state.before.data + (i * count_ + g) * C_; }

  // Hidden layers of the samples [first, last): value = σ(...) is left to `excite`, a channel at a time.
  void squeeze(ParallelFor pool, int64_t first, int64_t last) const {
    if (shape_.gate == Gate::eca) return;
    const int64_t work = (last - first) * branches_ * C_;
    parallel(pool, count_ * R_, grain(work), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const int64_t g = row / R_, j = row % R_;
        const A* weight = weights_[0] + row * C_;
        for (int64_t i = first; i < last; ++i) {
          for (int b = 0; b < branches_; ++b) {
            const A x = dot(weight, pooled(modality(g), i, b), C_) + weights_[1][row];
            activation(i, g, b)[j] = x < A(0) ? A(0) : x;  // a NaN passes, as in torch.relu
          }
        }
      }
    });
  }

  // s of the channels from c on, as many as V has, for the samples [first, last).
  template <class V>
  MRCN_INLINE void excite(int64_t first, int64_t last, int64_t c) const {
    constexpr int at_once = 4;  // sums that don't wait for one another
    const int64_t all = (last - first) * count_;
    GateOf next{first, 0};
    int64_t done = 0;
    for (; done + at_once <= all; done += at_once) excite_some<V, at_once>(next, c);
    for (; done < all; ++done) excite_some<V, 1>(next, c);
  }

  // From `before` of the samples [first, last) to `of_pooled`.
  void backward(ParallelFor pool, int64_t first, int64_t last) const {
    if (shape_.gate == Gate::eca) return backward_eca(pool, first, last);
    parallel(pool, count_, grain((last - first) * C_ * R_), [&](int64_t begin, int64_t end) {
      for (int64_t g = begin; g < end; ++g) backward_hidden(first, last, int(g));
    });
    constexpr int64_t width = 256;  // channels a unit
    const int64_t units = (C_ + width - 1) / width;
    parallel(pool, units, grain((last - first) * count_ * R_ * width), [&](int64_t begin, int64_t end) {
      const int64_t c0 = begin * width, c1 = least(end * width, C_);
      for (int m = 0; m < modalities(shape_.mode); ++m) {
        for (int64_t i = first; i < last; ++i) {
          for (int b = 0; b < branches_; ++b) {
            for (int64_t c = c0; c < c1; ++c) of_pooled(m, i, b)[c] = A(0);
          }
        }
      }
      for (int g = 0; g < count_; ++g) {
        for (int64_t j = 0; j < R_; ++j) {
          const A* weight = weights_[0] + (g * R_ + j) * C_ + c0;
          for (int64_t i = first; i < last; ++i) {
            for (int b = 0; b < branches_; ++b) {
              add_scaled(of_pooled(modality(g), i, b) + c0, inner(i, g, b)[j], weight, c1 - c0);
            }
          }
        }
      }
    });
  }

  // Gradients of the gates' parameters over all samples, into `out` in the order of gates.py.
  void parameter_gradients(void* const* out) const {
    A* gradient[4];
    for (int i = 0; i < 4; ++i) gradient[i] = static_cast<A*>(out[i]);
    if (shape_.gate == Gate::eca) return eca_gradients(gradient[0]);
    parallel(shape_.parallel, count_ * R_, grain(N_ * C_), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const int64_t g = row / R_, j = row % R_;
        A* weight = gradient[0] + row * C_;
        for (int64_t c = 0; c < C_; ++c) weight[c] = A(0);
        A bias(0);
        for (int64_t i = 0; i < N_; ++i) {
          for (int b = 0; b < branches_; ++b) {
            const A k = inner(i, g, b)[j];
            add_scaled(weight, k, pooled(modality(g), i, b), C_);
            bias += k;
          }
        }
        gradient[1][row] = bias;
      }
    });
    parallel(shape_.parallel, count_ * C_, grain(N_ * R_), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const int64_t g = row / C_, c = row % C_;
        A* weight = gradient[2] + row * R_;
        for (int64_t j = 0; j < R_; ++j) weight[j] = A(0);
        A bias(0);
        for (int64_t i = 0; i < N_; ++i) {
          const A k = before(i, g)[c];
          for (int b = 0; b < branches_; ++b) add_scaled(weight, k, activation(i, g, b), R_);
          bias += A(branches_) * k;
        }
        gradient[3][row] = bias;
      }
    });
  }

  GateState<A> state;

 private:
  // Rows for at least some 16,000 multiplications a thread.
  static int64_t grain(int64_t work) { return most<int64_t>(1, 16384 / most<int64_t>(work, 1)); }

  MRCN_INLINE A* activation(int64_t i, int g, int b) const {
    return state.activation.data + ((i * count_ + g) * branches_ + b) * R_;
  }
  MRCN_INLINE A* inner(int64_t i, int g, int b) const {
    return state.inner.data + ((i * count_ + g) * branches_ + b) * R_;
  }

  void transpose_excitation() {
    constexpr int64_t block = 16;  // channels whose rows stay in the first-level cache
    const int64_t blocks = (C_ + block - 1) / block;
    excitation_.allocate(count_ * R_ * pitch_);
    parallel(shape_.parallel, count_ * blocks, grain(block * R_), [&](int64_t begin, int64_t end) {
      for (int64_t unit = begin; unit < end; ++unit) {
        const int64_t g = unit / blocks, c0 = unit % blocks * block, c1 = least(c0 + block, C_);
        for (int64_t j = 0; j < R_; ++j) {
          A* to = excitation(g, j);
          for (int64_t c = c0; c < c1; ++c) to[c] = weights_[2][(g * C_ + c) * R_ + j];
        }
      }
    });
  }
  // The weights from hidden number j to every channel.
  MRCN_INLINE A* excitation(int g, int64_t j) const { return excitation_.data + (g * R_ + j) * pitch_; }

  struct GateOf {
    int64_t sample;
    int gate;
  };

  // s for n gates from `next` on.
  template <class V, int n>
  MRCN_INLINE void excite_some(GateOf& next, int64_t c) const {
    GateOf of[n];
    V x[n];
    for (GateOf& each : of) {
      each = next;
      if (++next.gate == count_) next = {next.sample + 1, 0};
    }
    logits(of, c, x);
    unroll<n>([&](auto k) MRCN_BODY {
      A* s = value(of[k.v].sample, of[k.v].gate) + c;
      if constexpr (sizeof(V) == sizeof(A)) {
        *s = sigmoid(x[k.v]);
      } else {
        copy_out<false>(s, sigmoids<A>(x[k.v]));
      }
    });
  }

  template <class V, int n>
  MRCN_INLINE void logits(const GateOf (&of)[n], int64_t c, V (&x)[n]) const {
    if (shape_.gate == Gate::eca) {
      for (int k = 0; k < n; ++k) {
        const int g = of[k].gate;
        x[k] = convolved<V>(weights_[0] + g * R_, pooled(modality(g), of[k].sample), c);
      }
      return;
    }
    const A *weight[n], *hidden[n];
    for (int k = 0; k < n; ++k) {
      weight[k] = excitation(of[k].gate, 0) + c;
      x[k] = A(branches_) * copy_in<V>(weights_[3] + of[k].gate * C_ + c);
    }
    for (int b = 0; b < branches_; ++b) {
      for (int k = 0; k < n; ++k) hidden[k] = activation(of[k].sample, of[k].gate, b);
      for (int64_t j = 0; j < R_; ++j) {
        unroll<n>([&](auto k) MRCN_BODY { x[k.v] += hidden[k.v][j] * copy_in<V>(weight[k.v] + j * pitch_); });
      }
    }
  }

  template <class V>
  MRCN_INLINE V convolved(const A* weight, const A* z, int64_t c) const {
    constexpr int64_t width = sizeof(V) / sizeof(A);
    A x[width] = {};
    for (int64_t t = 0; t < R_; ++t) {
      for (int64_t lane = 0; lane < width; ++lane) {
        const int64_t from = c + lane + t - R_ / 2;
        if (from >= 0 && from < C_) x[lane] += weight[t] * z[from];
      }
    }
    return copy_in<V>(x);
  }

  void backward_hidden(int64_t first, int64_t last, int g) const {
    for (int64_t j = 0; j < R_; ++j) {
      for (int64_t i = first; i < last; ++i) inner(i, g, 0)[j] = dot(excitation(g, j), before(i, g), C_);
    }
    for (int64_t i = first; i < last; ++i) {
      // Both branches of CBAM share the weights and so the gradient before their own ReLU.
      for (int b = branches_ - 1; b >= 0; --b) {
        for (int64_t j = 0; j < R_; ++j) {
          const A y = activation(i, g, b)[j];
          inner(i, g, b)[j] = y <= A(0) ? A(0) : inner(i, g, 0)[j];
        }
      }
    }
  }

  void backward_eca(ParallelFor pool, int64_t first, int64_t last) const {
    const int M = modalities(shape_.mode);
    parallel(pool, last - first, grain(count_ * C_ * R_), [&](int64_t begin, int64_t end) {
      for (int64_t i = first + begin; i < first + end; ++i) {
        for (int m = 0; m < M; ++m) {
          for (int64_t c = 0; c < C_; ++c) {
            A total(0);
            for (int g = m; g < count_; g += M) {
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
        for (int64_t i = 0; i < N_ && c0 < c1; ++i) {
          total += dot(before(i, g) + c0, pooled(modality(g), i) + c0 + shift, c1 - c0);
        }
        gradient[g * R_ + t] = total;
      }
    }
  }

  const BlockShape& shape_;
  const A* weights_[4];
  Buffer<A> excitation_;  // (gates, R, pitch): the second layer's weights, transposed
  const int count_, branches_;
  const int64_t N_, C_, R_;
  const int64_t pitch_;  // a line more than C: rows 4 KB apart would push one another out of the cache
};

}  // namespace
}  // namespace mrcn::MRCN_ISA
