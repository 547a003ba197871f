// The block's backward on the CPU, compiled once per instruction set. For each group of samples it computes
// the sums of the gradients over every plane, then the gradients of the gates, and then, in one pass, those
// of the inputs.
#include "block/cpu/schedule.h"

namespace mrcn::MRCN_ISA {
namespace {

template <class P, class A>
class Backward : Call<P, A> {
  using Base = Call<P, A>;

 public:
  Backward(const BlockBackward& call, const Passes<A>& passes)
      : Base(call, passes, true),
        call_(call),
        statistics_(static_cast<const A*>(call.statistics)),
        norm_(P::inputs * this->N_ * this->C_ * 2),
        given_([&](int set) { return call.gradients[this->made_ + set].data != nullptr; }) {
    for (int k = 0; k < this->all_; ++k) gradients_[k] = call.gradients[k];
    this->gates_.use_only(given_.gates);
    read_missing_as_zero();
  }

  void run() {
    this->template each_group<Scratch>(P::inputs + this->all_, [&](const auto& group) {
      if (this->extremes_) find_extremes(group);
      this->each_channels(group, [&]<int wide>(int64_t i, int64_t c, constant<wide>) {
        using V = one_or_more<wide>;
        for (int j = 0; j < P::inputs; ++j) {
          this->template pool<V>(this->template plane<V>(statistics_, j, i, c), j, i, c);
        }
      });
      if (this->shape_.pixels) {
        row_sums(group);
      } else {
        plane_sums(group);
      }
      this->gates_.squeeze(group.pool, group.first, group.last);
      gate_gradients(group);
      this->gates_.backward(group.pool, group.first, group.last);
      coefficients(group);
      make(group);
    });
    this->gates_.parameter_gradients(call_.gate_gradient);
    norm_gradients();
  }

 private:
  struct Scratch {
    Buffer<double> sums;     // (samples, parts, sums, C)
    Buffer<double> counts;   // (samples, parts, inputs, C)
    Buffer<A> extremes;      // (samples, parts, inputs, 2, C)
    Buffer<A> coefficients;  // (samples, slots, C)

    Scratch(const Base& call, int64_t samples)
        : coefficients(samples * P::backward_slots * call.array_pitch()) {
      const int64_t parts = call.parts() * samples * call.channels();
      sums.allocate(call.parts() * samples * call.array_pitch() * P::sums);
      if (!call.seeks_extremes()) return;
      counts.allocate(parts * P::inputs);
      extremes.allocate(parts * P::inputs * 2);
    }
  };
  using Samples = Group<Scratch>;

  // The sums over a part of a sample: a chunk of rows, or (part 0) whole planes.
  MRCN_INLINE double* sums(const Samples& group, int64_t i, int64_t part = 0) const {
    return group.scratch.sums.data + ((i - group.first) * this->parts_ + part) * P::sums * this->array_pitch_;
  }
  // How often the extreme of a plane occurs in the part.
  MRCN_INLINE double* counts(const Samples& group, int64_t i, int64_t part, int j) const {
    return group.scratch.counts.data + (((i - group.first) * this->parts_ + part) * P::inputs + j) * this->C_;
  }
  // The largest pixel of every channel in the part, then the smallest.
  MRCN_INLINE A* part_extremes(const Samples& group, int64_t i, int64_t part, int j) const {
    return group.scratch.extremes.data +
           (((i - group.first) * this->parts_ + part) * P::inputs + j) * 2 * this->C_;
  }
  MRCN_INLINE A* coefficient(const Samples& group, int64_t i) const {
    return group.scratch.coefficients.data + (i - group.first) * P::backward_slots * this->array_pitch_;
  }
  MRCN_INLINE double* norm(int j, int64_t i, int which) const {
    return norm_.data + ((j * this->N_ + i) * 2 + which) * this->C_;
  }

  // In place of a missing gradient, one plane or row of zeros is read again and again.
  void read_missing_as_zero() {
    bool missing = false;
    for (int k = 0; k < this->all_; ++k) missing = missing || gradients_[k].data == nullptr;
    if (!missing) return;
    const int64_t bytes = (this->shape_.pixels ? this->C_ : this->L_) * element_size(this->shape_.dtype);
    zeros_.allocate(bytes);
    std::memset(zeros_.data, 0, bytes);
    for (int k = 0; k < this->all_; ++k) {
      if (gradients_[k].data == nullptr) gradients_[k] = {zeros_.data, 0, 0, 0};
    }
  }

  MRCN_INLINE A extreme_of(int j, int64_t i, int64_t c) const {
    return A(this->extreme(this->plane(statistics_, j, i, c), j, i, c));
  }

  // The extremes are found again: if the forward saved them, it would save twice as much.
  void find_extremes(const Samples& group) const {
    const int64_t C = this->C_;
    this->each_unit(group.pool, group.first, group.last, [&](int64_t i, int64_t unit) {
      Buffer<A> scratch(3 * C);
      Buffer<double> moments(2 * C);
      for (int j = 0; j < P::inputs; ++j) {
        const FeatureMap& map = this->inputs_[j];
        const void* x = this->unit_of(map, i, unit);
        if (this->shape_.pixels) {
          A* found = part_extremes(group, i, unit, j);
          this->passes_.rows_moments(x, this->chunk_rows(unit), map.pixel, C, scratch.data,
              {moments.data, moments.data + C, found, found + C}, true);
        } else {
          Extremes<A> found;
          this->passes_.plane_moments(x, this->L_, &found);
          this->extreme_values(j, i, unit)[0] = found.maximum;
          this->extreme_values(j, i, unit)[1] = found.minimum;
        }
      }
    });
    if (!this->shape_.pixels) return;
    this->each_channels(group, [&]<int wide>(int64_t i, int64_t c0, constant<wide>) {
      constexpr int64_t channels = sizeof(one_or_more<wide>) / sizeof(double);
      for (int64_t c = c0; c < c0 + channels; ++c) {
        for (int j = 0; j < P::inputs; ++j) {
          A* e = this->extreme_values(j, i, c);
          for (int64_t part = 0; part < this->parts_; ++part) {
            const A* found = part_extremes(group, i, part, j);
            e[0] = part == 0 ? found[c] : most<A>(e[0], found[c]);
            e[1] = part == 0 ? found[C + c] : least<A>(e[1], found[C + c]);
          }
        }
      }
    });
  }

  void plane_sums(const Samples& group) const {
    this->each_unit(group.pool, group.first, group.last, [&](int64_t i, int64_t c) {
      A mean[P::inputs];
      void *x[P::inputs], *g[most_sets];
      int64_t unused[most_sets];
      double found[P::sums];
      this->units_of(this->inputs_, P::inputs, i, c, x, unused);
      this->units_of(gradients_ + this->made_, P::sets, i, c, g, unused);
      for (int j = 0; j < P::inputs; ++j) mean[j] = statistics_[this->at(j, i, c) * 2];
      this->passes_.sum_plane(mean, x, g, this->L_, found);
      for (int s = 0; s < P::sums; ++s) sums(group, i)[s * this->array_pitch_ + c] = found[s];
      if (this->extremes_) {
        for (int j = 0; j < P::inputs; ++j) {
          counts(group, i, 0, j)[c] = this->passes_.plane_count(x[j], this->L_, extreme_of(j, i, c));
        }
      }
    });
  }

  void row_sums(const Samples& group) const {
    const int64_t C = this->C_;
    this->each_unit(group.pool, group.first, group.last, [&](int64_t i, int64_t chunk) {
      Buffer<A> mean(P::inputs * C);
      void *x[P::inputs], *g[most_sets];
      int64_t x_pitch[P::inputs], g_pitch[most_sets];
      this->units_of(this->inputs_, P::inputs, i, chunk, x, x_pitch);
      this->units_of(gradients_ + this->made_, P::sets, i, chunk, g, g_pitch);
      for (int j = 0; j < P::inputs; ++j) {
        for (int64_t c = 0; c < C; ++c) mean.data[j * C + c] = statistics_[this->at(j, i, c) * 2];
      }
      const int64_t rows = this->chunk_rows(chunk);
      for (int64_t n = 0; n < P::sums * C; ++n) sums(group, i, chunk)[n] = 0.0;
      this->passes_.sum_rows(mean.data, {x, x_pitch}, {g, g_pitch}, rows, C, sums(group, i, chunk));
      if (this->extremes_) {
        for (int j = 0; j < P::inputs; ++j) {
          for (int64_t c = 0; c < C; ++c) {
            mean.data[j * C + c] = extreme_of(j, i, c);
            counts(group, i, chunk, j)[c] = 0.0;
          }
          this->passes_.rows_count(x[j], rows, x_pitch[j], C, mean.data + j * C, counts(group, i, chunk, j));
        }
      }
    });
    this->each_channels(group, [&]<int wide>(int64_t i, int64_t c, constant<wide>) {
      using V = one_or_more<wide>;
      for (int s = 0; s < P::sums; ++s) {
        Total<V> total;
        for (int64_t part = 0; part < this->parts_; ++part) {
          total += doubles<V>(sums(group, i, part) + s * C + c);
        }
        put_doubles(sums(group, i) + s * C + c, total.get());
      }
      for (int64_t part = 1; part < this->parts_ && this->extremes_; ++part) {
        for (int j = 0; j < P::inputs; ++j) {
          double* count = counts(group, i, 0, j) + c;
          put_doubles(count, doubles<V>(count) + doubles<V>(counts(group, i, part, j) + c));
        }
      }
    });
  }

  template <class V>
  MRCN_INLINE void gather(const Samples& group, int64_t i, int64_t c, Plane<V>* p, V* s, V* found) const {
    for (int j = 0; j < P::inputs; ++j) p[j] = this->template plane<V>(statistics_, j, i, c);
    this->gate_values(i, c, s);
    for (int n = 0; n < P::sums; ++n) found[n] = doubles<V>(sums(group, i) + n * this->array_pitch_ + c);
    leave_out_missing(found, s);
  }

  // Sets zero in place of the sums of missing gradients, and of the gates that only sets without a gradient
  // use.
  template <class V>
  MRCN_INLINE void leave_out_missing(V* found, V* s) const {
    unroll<P::sets>([&](auto set) MRCN_BODY {
      if (given_.sets[set.v]) return;
      found[P::S(set.v)] = V{};
      unroll<P::inputs>([&](auto j) MRCN_BODY {
        if constexpr (P::uses(set.v, j.v)) found[P::T(set.v, j.v)] = V{};
      });
    });
    for (int g = 0; g < P::gate_count; ++g) {
      if (!given_.gates[g]) s[g] = V{};
    }
  }

  void gate_gradients(const Samples& group) const {
    this->each_channels_gated(group, [&]<int wide>(int64_t i, int64_t c, constant<wide>) {
      using V = one_or_more<wide>;
      Plane<V> p[P::inputs];
      V s[P::gate_count], found[P::sums], ds[P::gate_count];
      gather(group, i, c, p, s, found);
      make_gate_gradients<P>(p, found, ds);
      for (int g = 0; g < P::gate_count; ++g) {
        if (given_.gates[g]) put_doubles(this->gates_.before(i, g) + c, ds[g] * s[g] * (1 - s[g]));
      }
    });
  }

  void coefficients(const Samples& group) const {
    this->each_channels(group, [&]<int wide>(int64_t i, int64_t c, constant<wide>) {
      using R = one_or_more<wide>;
      Plane<R> p[P::inputs];
      R s[P::gate_count], found[P::sums], U[P::inputs], V[P::inputs], k[P::backward_slots];
      gather(group, i, c, p, s, found);
      make_maps<P>(p, s, this->shape_.to_input, k, false);
      unroll<P::sets>([&](auto set) MRCN_BODY {
        if (given_.sets[set.v]) return;
        unroll<P::inputs>([&](auto j) MRCN_BODY {
          if constexpr (P::uses(set.v, j.v)) k[P::scale(set.v, j.v)] = R{};
        });
      });
      make_moments<P>(s, this->shape_.to_input, found, U, V);
      for (int j = 0; j < P::inputs; ++j) {
        k[P::extreme(j)] = k[P::k3(j)] = R{};
        if (!given_.inputs[j]) {
          k[P::k1(j)] = k[P::k2(j)] = R{};
          put_doubles(norm(j, i, 0) + c, R{});
          put_doubles(norm(j, i, 1) + c, R{});
          continue;
        }
        if (this->extremes_) add_extreme(group, p[j], i, j, c, k, U[j], V[j]);
        const R dz = doubles<R>(this->gates_.of_pooled(j, i) + c), length = R{} + double(this->L_);
        const PlaneGradient<R> of = plane_gradient<R>(p[j], U[j], V[j], dz, length);
        k[P::k1(j)] = of.k1;
        k[P::k2(j)] = of.k2;
        put_doubles(norm(j, i, 0) + c, of.gamma);
        put_doubles(norm(j, i, 1) + c, of.beta);
      }
      this->put_coefficients(coefficient(group, i), c, k);
    });
  }

  // The gradient of GMP(M) goes to the pixel at which M has its maximum, in equal parts if there are several.
  template <class R>
  MRCN_INLINE void add_extreme(
      const Samples& group, const Plane<R>& p, int64_t i, int j, int64_t c, R* k, R& U, R& V) const {
    const R at = this->extreme(p, j, i, c), gradient = doubles<R>(this->gates_.of_pooled(j, i, 1) + c);
    U -= (at - p.mean) * gradient;
    V -= gradient;
    k[P::extreme(j)] = at;
    k[P::k3(j)] = (1.0 - p.a) * gradient / doubles<R>(counts(group, i, 0, j) + c);
  }

  void make(const Samples& group) const {
    this->each_unit(group.pool, group.first, group.last, [&](int64_t i, int64_t unit) {
      void *x[P::inputs], *g[most_sets], *dx[P::inputs];
      int64_t x_pitch[P::inputs], g_pitch[most_sets], dx_pitch[P::inputs];
      this->units_of(this->inputs_, P::inputs, i, unit, x, x_pitch);
      this->units_of(gradients_, this->all_, i, unit, g, g_pitch);
      this->units_of(call_.input_gradients, P::inputs, i, unit, dx, dx_pitch);
      if (this->shape_.pixels) {
        this->passes_.gradient_rows(coefficient(group, i), {x, x_pitch}, {g, g_pitch}, {dx, dx_pitch},
            this->chunk_rows(unit), this->C_, call_.stream, this->extremes_);
      } else {
        A k[P::backward_slots];
        this->take_coefficients(coefficient(group, i), unit, k);
        this->passes_.gradient_plane(k, x, g, dx, this->L_, call_.stream, this->extremes_);
      }
    });
  }

  void norm_gradients() const {
    A* gamma = static_cast<A*>(call_.norm_weight_gradient);
    A* beta = static_cast<A*>(call_.norm_bias_gradient);
    this->each_block(this->shape_.parallel, this->N_, [&](int64_t c0, int64_t c1) {
      this->over_vectors(c0, c1, [&]<int wide>(int64_t c, constant<wide>) {
        using V = one_or_more<wide>;
        for (int j = 0; j < P::inputs; ++j) {
          V of_gamma{}, of_beta{};
          for (int64_t i = 0; i < this->N_; ++i) {
            of_gamma += doubles<V>(norm(j, i, 0) + c);
            of_beta += doubles<V>(norm(j, i, 1) + c);
          }
          put_doubles(gamma + j * this->C_ + c, of_gamma);
          put_doubles(beta + j * this->C_ + c, of_beta);
        }
      });
    });
  }

  const BlockBackward& call_;
  const A* statistics_;
  Buffer<double> norm_;  // (inputs, N, 2, C): gradients of γ and β
  const Given<P> given_;
  Buffer<char> zeros_;
  FeatureMap gradients_[most_sets];
};

}  // namespace

void block_backward(const BlockBackward& call) {
  with_types(call.shape, [&]<class P, class T>(P, T) {
    Backward<typename P::Made, acc_t<T>>(call, backward_passes<P, T>()).run();
  });
}

}  // namespace mrcn::MRCN_ISA
