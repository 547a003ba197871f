// The block's forward on the CPU, compiled once per instruction set. For each group of samples it computes
// the statistics of every plane, then the gates of every sample, and then, in one pass, every set.
#include <cmath>

#include "block/cpu/schedule.h"

namespace mrcn::MRCN_ISA {
namespace {

template <class P, class A>
class Forward : Call<P, A> {
  using Base = Call<P, A>;

 public:
  Forward(const BlockForward& call, const Passes<A>& passes)
      : Base(call, passes, false), call_(call), statistics_(static_cast<A*>(call.statistics)) {}

  void run() {
    this->template each_group<Scratch>(P::inputs, [&](const auto& group) {
      if (this->shape_.pixels) {
        row_statistics(group);
      } else {
        plane_statistics(group);
      }
      join(group);
      this->gates_.squeeze(group.pool, group.first, group.last);
      coefficients(group);
      make(group);
    });
  }

 private:
  struct Scratch {
    Buffer<double> moments;  // (samples, inputs, parts, 2, C): mean, squares
    Buffer<A> extremes;      // (samples, inputs, parts, 2, C): maximum, minimum
    Buffer<double> offsets;  // (samples, inputs, C): the rounding errors of the means
    Buffer<A> coefficients;  // (samples, slots, C)

    Scratch(const Base& call, int64_t samples)
        : offsets(samples * P::inputs * call.channels()),
          coefficients(samples * P::forward_slots * call.array_pitch()) {
      const int64_t parts = samples * P::inputs * call.parts() * call.channels() * 2;
      moments.allocate(parts);
      if (call.seeks_extremes()) extremes.allocate(parts);
    }
  };
  using Samples = Group<Scratch>;

  MRCN_INLINE A* coefficient(const Samples& group, int64_t i) const {
    return group.scratch.coefficients.data + (i - group.first) * P::forward_slots * this->array_pitch_;
  }
  MRCN_INLINE double* offset(const Samples& group, int j, int64_t i) const {
    return group.scratch.offsets.data + ((i - group.first) * P::inputs + j) * this->C_;
  }

  void plane_statistics(const Samples& group) const {
    this->each_unit(group.pool, group.first, group.last, [&](int64_t i, int64_t c) {
      for (int j = 0; j < P::inputs; ++j) {
        Extremes<A> extremes;
        const void* x = this->unit_of(this->inputs_[j], i, c);
        const Moments m = this->passes_.plane_moments(x, this->L_, this->extremes_ ? &extremes : nullptr);
        if (this->extremes_) {
          A* e = this->extreme_values(j, i, c);
          e[0] = extremes.maximum;
          e[1] = extremes.minimum;
        }
        const ChannelMoments<A> out = partial(group, j, i, 0);
        out.mean[c] = m.mean();
        out.squares[c] = m.squares;
      }
    });
  }

  MRCN_INLINE ChannelMoments<A> partial(const Samples& group, int j, int64_t i, int64_t part) const {
    const int64_t C = this->C_;
    const int64_t at = (((i - group.first) * P::inputs + j) * this->parts_ + part) * 2 * C;
    double* moments = group.scratch.moments.data + at;
    A* extremes = this->extremes_ && this->shape_.pixels ? group.scratch.extremes.data + at : nullptr;
    return {moments, moments + C, extremes, extremes == nullptr ? nullptr : extremes + C};
  }

  void row_statistics(const Samples& group) const {
    const int64_t C = this->C_;
    this->each_unit(group.pool, group.first, group.last, [&](int64_t i, int64_t chunk) {
      Buffer<A> scratch(3 * C);
      for (int j = 0; j < P::inputs; ++j) {
        const FeatureMap& x = this->inputs_[j];
        this->passes_.rows_moments(this->unit_of(x, i, chunk), this->chunk_rows(chunk), x.pixel, C,
            scratch.data, partial(group, j, i, chunk), this->extremes_);
      }
    });
  }

  // Joins the moments of the parts of each plane to its statistics, and computes the gates' inputs.
  void join(const Samples& group) const {
    this->each_channels(group, [&]<int wide>(int64_t i, int64_t c, constant<wide>) {
      using V = one_or_more<wide>;
      for (int j = 0; j < P::inputs; ++j) {
        if (this->extremes_ && this->shape_.pixels) join_extremes(group, j, i, c, sizeof(V) / sizeof(double));
        MomentsOf<V> m;
        for (int64_t part = 0; part < this->parts_; ++part) {
          const ChannelMoments<A> of = partial(group, j, i, part);
          m.join(double(this->part_pixels(part)), doubles<V>(of.mean + c), doubles<V>(of.squares + c));
        }
        A* s = statistics_ + this->at(j, i, c) * 2;
        put_pairs(s, m.mean(), V(1 / root(m.squares / double(this->L_) + call_.eps)));
        const Plane<V> p = this->template plane<V>(statistics_, j, i, c);
        put_doubles(offset(group, j, i) + c, m.beyond(p.mean));
        this->template pool<V>(p, j, i, c);
      }
    });
  }

  // The largest and the smallest pixel of `channels` planes from c on.
  MRCN_INLINE void join_extremes(const Samples& group, int j, int64_t i, int64_t c, int64_t channels) const {
    for (const int64_t to = c + channels; c < to; ++c) {
      A* e = this->extreme_values(j, i, c);
      for (int64_t part = 0; part < this->parts_; ++part) {
        const ChannelMoments<A> of = partial(group, j, i, part);
        e[0] = part == 0 ? of.maximum[c] : most<A>(e[0], of.maximum[c]);
        e[1] = part == 0 ? of.minimum[c] : least<A>(e[1], of.minimum[c]);
      }
    }
  }

  void coefficients(const Samples& group) const {
    this->each_channels_gated(group, [&]<int wide>(int64_t i, int64_t c, constant<wide>) {
      using V = one_or_more<wide>;
      Plane<V> p[P::inputs];
      V s[P::gate_count], k[P::forward_slots];
      for (int j = 0; j < P::inputs; ++j) {
        p[j] = this->template plane<V>(statistics_, j, i, c, doubles<V>(offset(group, j, i) + c));
      }
      this->gate_values(i, c, s);
      make_maps<P>(p, s, this->shape_.to_input, k, true);
      this->put_coefficients(coefficient(group, i), c, k);
    });
  }

  void make(const Samples& group) const {
    this->each_unit(group.pool, group.first, group.last, [&](int64_t i, int64_t unit) {
      void *x[P::inputs], *y[most_sets];
      int64_t x_pitch[P::inputs], y_pitch[most_sets];
      this->units_of(this->inputs_, P::inputs, i, unit, x, x_pitch);
      this->units_of(call_.outputs, this->all_, i, unit, y, y_pitch);
      if (this->shape_.pixels) {
        this->passes_.make_rows(coefficient(group, i), {x, x_pitch}, {y, y_pitch}, this->chunk_rows(unit),
            this->C_, call_.stream);
      } else {
        A k[P::forward_slots];
        this->take_coefficients(coefficient(group, i), unit, k);
        this->passes_.make_plane(k, x, y, this->L_, call_.stream);
      }
    });
  }

  const BlockForward& call_;
  A* statistics_;
};

}  // namespace

void block_forward(const BlockForward& call) {
  with_types(call.shape, [&]<class P, class T>(P, T) {
    Forward<typename P::Made, acc_t<T>>(call, forward_passes<P, T>()).run();
  });
}

}  // namespace mrcn::MRCN_ISA
