// The block on the CPU, compiled once an instruction set.
//
// A group of samples at a time, so that the second read of its pixels comes from cache: statistics of every plane, gates
// of every sample, then one elementwise pass; backward likewise with sums of the gradients in place of statistics. The
// threads share each group. Work is cut into planes, or into chunks of rows whose size depends on the shape alone, and
// partial results are joined in a fixed order: any number of threads gives the same bits.
#include <cmath>

#include "block/block.h"
#include "block/gates.h"
#include "block/moments.h"
#include "block/pattern.h"
#include "common/buffer.h"
#include "common/vec.h"

namespace mrcn::MRCN_ISA {
namespace {

// Bytes of a group's feature maps that are to stay in the outer cache until they are read again.
constexpr int64_t group_bytes = 8 << 20;
// Elements a thread should have to do before another one is woken.
constexpr int64_t thread_elements = 16384;

template <class T>
struct Map {
  T* data;
  int64_t sample, channel, pixel;

  explicit Map(const FeatureMap& map)
      : data(static_cast<T*>(map.data)), sample(map.sample), channel(map.channel), pixel(map.pixel) {}
  Map() = default;
  MRCN_INLINE T* plane(int64_t i, int64_t c) const { return data + i * sample + c * channel; }
  MRCN_INLINE T* row(int64_t i, int64_t l) const { return data + i * sample + l * pixel; }
};

// --- elementwise and reduction passes over one contiguous plane ---------------------------------------------

template <class T>
constexpr int64_t store_bytes = lanes<acc_t<T>> * sizeof(T);

// Elements until `p` is a whole vector's address, or -1 where it never is.
template <class T>
MRCN_INLINE int64_t until_aligned(const T* p) {
  const int64_t off = reinterpret_cast<uintptr_t>(p) % store_bytes<T>;
  if (off % sizeof(T) != 0) return -1;
  return off == 0 ? 0 : (store_bytes<T> - off) / sizeof(T);
}

template <class T, int n>
MRCN_INLINE int64_t until_all_aligned(T* const* p, int64_t length) {
  const int64_t head = until_aligned(p[0]);
  for (int k = 1; k < n; ++k) {
    if (until_aligned(p[k]) != head) return -1;
  }
  return head < 0 || head > length ? -1 : head;
}

template <class P, class T, bool stream>
MRCN_INLINE void make_plane(const acc_t<T>* k, T* const* x, T* const* y, int64_t head, int64_t n) {
  using A = acc_t<T>;
  const auto one = [&](int64_t l) {
    A in[P::inputs], out[P::sets];
    unroll<P::inputs>([&](auto j) { in[j.v] = get(x[j.v] + l); });
    make_sets<P, A>(k, in, out);
    unroll<P::sets>([&](auto s) { put(y[s.v + P::first] + l, out[s.v]); });
    if constexpr (P::passes) {
      y[0][l] = x[0][l];
      y[P::all - 1][l] = x[1][l];
    }
  };
  vec<A> kv[P::forward_slots];
  unroll<P::forward_slots>([&](auto s) { kv[s.v] = all<A>(k[s.v]); });
  int64_t l = 0;
  for (; l < head; ++l) one(l);
  for (; l + lanes<A> <= n; l += lanes<A>) {
    vec<A> in[P::inputs], out[P::sets];
    unroll<P::inputs>([&](auto j) { in[j.v] = load(x[j.v] + l); });
    make_sets<P, vec<A>>(kv, in, out);
    unroll<P::sets>([&](auto s) { store<stream>(y[s.v + P::first] + l, out[s.v]); });
    if constexpr (P::passes) {
      store<stream>(y[0] + l, in[0]);
      store<stream>(y[P::all - 1] + l, in[1]);
    }
  }
  for (; l < n; ++l) one(l);
}

template <class P, class T>
MRCN_INLINE void sum_plane(const acc_t<T>* mean, T* const* x, T* const* g, int64_t n, double* sums) {
  using A = acc_t<T>;
  constexpr int64_t part = 4096;  // beyond that the lanes' own rounding would show
  for (int s = 0; s < P::sums; ++s) sums[s] = 0.0;
  vec<A> mv[P::inputs];
  unroll<P::inputs>([&](auto j) { mv[j.v] = all<A>(mean[j.v]); });
  for (int64_t first = 0; first < n; first += part) {
    const int64_t last = least(first + part, n);
    vec<A> acc[P::sums] = {};
    A rest[P::sums] = {};
    int64_t l = first;
    for (; l + lanes<A> <= last; l += lanes<A>) {
      vec<A> in[P::inputs], of[P::sets];
      unroll<P::inputs>([&](auto j) { in[j.v] = load(x[j.v] + l); });
      unroll<P::sets>([&](auto s) { of[s.v] = load(g[s.v + P::first] + l); });
      add_sums<P, vec<A>>(mv, in, of, acc);
    }
    for (; l < last; ++l) {
      A in[P::inputs], of[P::sets];
      unroll<P::inputs>([&](auto j) { in[j.v] = get(x[j.v] + l); });
      unroll<P::sets>([&](auto s) { of[s.v] = get(g[s.v + P::first] + l); });
      add_sums<P, A>(mean, in, of, rest);
    }
    unroll<P::sums>([&](auto s) { sums[s.v] += double(sum<A>(acc[s.v])) + double(rest[s.v]); });
  }
}

template <class P, class T, bool stream, bool extremes>
MRCN_INLINE void gradient_plane(
    const acc_t<T>* k, T* const* x, T* const* g, T* const* dx, int64_t head, int64_t n) {
  using A = acc_t<T>;
  const auto one = [&](int64_t l) {
    A in[P::inputs], of[P::sets], out[P::inputs];
    unroll<P::inputs>([&](auto j) { in[j.v] = get(x[j.v] + l); });
    unroll<P::sets>([&](auto s) { of[s.v] = get(g[s.v + P::first] + l); });
    make_gradients<P, A>(k, in, of, out);
    if constexpr (P::passes) {
      out[0] += get(g[0] + l);
      out[1] += get(g[P::all - 1] + l);
    }
    unroll<P::inputs>([&](auto j) {
      if constexpr (extremes) {
        if (in[j.v] == k[P::extreme(j.v)]) out[j.v] += k[P::k3(j.v)];
      }
      put(dx[j.v] + l, out[j.v]);
    });
  };
  constexpr int slots = extremes ? P::backward_slots : P::extreme(0);
  vec<A> kv[slots];
  unroll<slots>([&](auto s) { kv[s.v] = all<A>(k[s.v]); });
  int64_t l = 0;
  for (; l < head; ++l) one(l);
  for (; l + lanes<A> <= n; l += lanes<A>) {
    vec<A> in[P::inputs], of[P::sets], out[P::inputs];
    unroll<P::inputs>([&](auto j) { in[j.v] = load(x[j.v] + l); });
    unroll<P::sets>([&](auto s) { of[s.v] = load(g[s.v + P::first] + l); });
    make_gradients<P, vec<A>>(kv, in, of, out);
    if constexpr (P::passes) {
      out[0] += load(g[0] + l);
      out[1] += load(g[P::all - 1] + l);
    }
    unroll<P::inputs>([&](auto j) {
      if constexpr (extremes) {
        const vec<A> more = out[j.v] + kv[P::k3(j.v)];
        out[j.v] = in[j.v] == kv[P::extreme(j.v)] ? more : out[j.v];
      }
      store<stream>(dx[j.v] + l, out[j.v]);
    });
  }
  for (; l < n; ++l) one(l);
}

// --- the same over rows of pixels, coefficients and sums as arrays over the channels -------------------------------

template <class P, class T, bool stream>
MRCN_INLINE void make_row(const acc_t<T>* k, T* const* x, T* const* y, int64_t channels) {
  using A = acc_t<T>;
  over_channels<A>(channels, [&](int64_t c, auto w) {
    using V = decltype(fetch(k, w));
    V kv[P::forward_slots], in[P::inputs], out[P::sets];
    unroll<P::forward_slots>([&](auto s) { kv[s.v] = fetch(k + s.v * channels + c, w); });
    unroll<P::inputs>([&](auto j) { in[j.v] = fetch(x[j.v] + c, w); });
    make_sets<P, V>(kv, in, out);
    unroll<P::sets>([&](auto s) { keep<stream>(y[s.v + P::first] + c, out[s.v], w); });
    if constexpr (P::passes) {
      keep<stream>(y[0] + c, in[0], w);
      keep<stream>(y[P::all - 1] + c, in[1], w);
    }
  });
}

template <class P, class T>
MRCN_INLINE void sum_row(const acc_t<T>* mean, T* const* x, T* const* g, int64_t channels, acc_t<T>* sums) {
  using A = acc_t<T>;
  over_channels<A>(channels, [&](int64_t c, auto w) {
    using V = decltype(fetch(mean, w));
    V mv[P::inputs], in[P::inputs], of[P::sets], acc[P::sums];
    unroll<P::inputs>([&](auto j) { mv[j.v] = fetch(mean + j.v * channels + c, w); });
    unroll<P::inputs>([&](auto j) { in[j.v] = fetch(x[j.v] + c, w); });
    unroll<P::sets>([&](auto s) { of[s.v] = fetch(g[s.v + P::first] + c, w); });
    unroll<P::sums>([&](auto s) { acc[s.v] = fetch(sums + s.v * channels + c, w); });
    add_sums<P, V>(mv, in, of, acc);
    unroll<P::sums>([&](auto s) { keep(sums + s.v * channels + c, acc[s.v], w); });
  });
}

template <class P, class T, bool stream, bool extremes>
MRCN_INLINE void gradient_row(
    const acc_t<T>* k, T* const* x, T* const* g, T* const* dx, int64_t channels) {
  using A = acc_t<T>;
  over_channels<A>(channels, [&](int64_t c, auto w) {
    using V = decltype(fetch(k, w));
    constexpr int slots = extremes ? P::backward_slots : P::extreme(0);
    V kv[slots], in[P::inputs], of[P::sets], out[P::inputs];
    unroll<slots>([&](auto s) { kv[s.v] = fetch(k + s.v * channels + c, w); });
    unroll<P::inputs>([&](auto j) { in[j.v] = fetch(x[j.v] + c, w); });
    unroll<P::sets>([&](auto s) { of[s.v] = fetch(g[s.v + P::first] + c, w); });
    make_gradients<P, V>(kv, in, of, out);
    if constexpr (P::passes) {
      out[0] += fetch(g[0] + c, w);
      out[1] += fetch(g[P::all - 1] + c, w);
    }
    unroll<P::inputs>([&](auto j) {
      if constexpr (extremes) {
        const V more = out[j.v] + kv[P::k3(j.v)];
        out[j.v] = in[j.v] == kv[P::extreme(j.v)] ? more : out[j.v];
      }
      keep<stream>(dx[j.v] + c, out[j.v], w);
    });
  });
}

// --- one call -------------------------------------------------------------------------------------------

// What the forward and the backward of a call share: shapes, maps of the inputs, statistics, gates, units of work.
template <class P, class T>
class Call {
 public:
  using A = acc_t<T>;

 protected:
  Call(const BlockShape& shape, const BlockParameters& parameters, const FeatureMap* inputs, bool backward)
      : shape_(shape),
        N_(shape.samples),
        C_(shape.channels),
        L_(shape.length),
        fields_(shape.gate == Gate::cbam_channel ? 4 : 2),
        chunk_(most<int64_t>(256, (L_ + 63) / 64)),
        chunks_((L_ + chunk_ - 1) / chunk_),
        gamma_(static_cast<const A*>(parameters.norm_weight)),
        beta_(static_cast<const A*>(parameters.norm_bias)),
        gates_(shape, parameters, backward) {
    for (int j = 0; j < P::inputs; ++j) x_[j] = Map<T>(inputs[j]);
  }

  int64_t group_size(int maps) const {
    return least(N_, most<int64_t>(1, group_bytes / (maps * C_ * L_ * int64_t(sizeof(T)))));
  }

  // f(sample, channel) over planes, or f(sample, chunk of rows).
  template <class F>
  void each_unit(int64_t first, int64_t last, const F& f) const {
    const int64_t units = shape_.pixels ? chunks_ : C_;
    const int64_t elements = shape_.pixels ? least(chunk_, L_) * C_ : L_;
    parallel(shape_.parallel, (last - first) * units, thread_elements / elements, [&](int64_t begin, int64_t end) {
      for (int64_t unit = begin; unit < end; ++unit) f(first + unit / units, unit % units);
    });
  }

  // f(sample, channel) with few operations each, for every plane of a group.
  template <class F>
  void each_plane(int64_t first, int64_t last, const F& f) const {
    parallel(shape_.parallel, C_, 4096 / most<int64_t>(1, last - first), [&](int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; ++c) f(c);
    });
  }

  MRCN_INLINE int64_t chunk_begin(int64_t chunk) const { return chunk * chunk_; }
  MRCN_INLINE int64_t chunk_end(int64_t chunk) const { return least(chunk * chunk_ + chunk_, L_); }
  MRCN_INLINE int64_t at(int j, int64_t i, int64_t c) const { return (j * N_ + i) * C_ + c; }

  MRCN_INLINE Plane<double> plane(const A* statistics, int j, int64_t i, int64_t c, double offset = 0) const {
    const A* s = statistics + at(j, i, c) * fields_;
    return describe<double>(s[0], offset, s[1], gamma_[j * C_ + c], beta_[j * C_ + c]);
  }

  // What the gates see of a plane.
  MRCN_INLINE void pool(const A* statistics, int j, int64_t i, int64_t c) const {
    const A* s = statistics + at(j, i, c) * fields_;
    gates_.pooled(j, i)[c] = A(pooled_residual<double>(s[0], s[1], beta_[j * C_ + c]));
    if (fields_ == 4) {
      const Plane<double> p = plane(statistics, j, i, c);
      gates_.pooled(j, i, 1)[c] = A(residual_at<double>(p, extreme_pixel<double>(p, s[2], s[3])));
    }
  }

  MRCN_INLINE void gate_values(int64_t i, int64_t c, double* s) const {
    for (int g = 0; g < P::gate_count; ++g) s[g] = gates_.value(i, g)[c];
  }

  const BlockShape& shape_;
  const int64_t N_, C_, L_;
  const int fields_;              // statistics of a plane
  const int64_t chunk_, chunks_;  // rows of pixels a unit, and how many units a sample
  const A* gamma_;
  const A* beta_;
  Map<T> x_[P::inputs];
  Gates<A> gates_;
};

template <class P, class T>
class Forward : Call<P, T> {
  using Base = Call<P, T>;
  using A = acc_t<T>;

 public:
  explicit Forward(const BlockForward& call)
      : Base(call.shape, call.parameters, call.inputs, false),
        eps_(call.eps),
        stream_(call.stream),
        statistics_(static_cast<A*>(call.statistics)),
        group_(this->group_size(P::inputs)),
        offsets_(P::inputs * group_ * this->C_),
        coefficients_(group_ * P::forward_slots * this->C_) {
    for (int k = 0; k < P::all; ++k) y_[k] = Map<T>(call.outputs[k]);
    if (this->shape_.pixels) partial_.allocate(P::inputs * group_ * this->chunks_ * this->C_ * 2);
    if (this->shape_.pixels && this->fields_ == 4) {
      partial_extremes_.allocate(P::inputs * group_ * this->chunks_ * this->C_ * 2);
    }
  }

  void run() {
    for (int64_t first = 0; first < this->N_; first += group_) {
      const int64_t last = least(first + group_, this->N_);
      if (this->shape_.pixels) {
        row_statistics(first, last);
      } else {
        plane_statistics(first, last);
      }
      this->gates_.squeeze(first, last);
      coefficients(first, last);
      if (stream_) {
        make<true>(first, last);
      } else {
        make<false>(first, last);
      }
    }
  }

 private:
  MRCN_INLINE A* coefficient(int64_t i) const { return coefficients_.data + i % group_ * P::forward_slots * this->C_; }
  MRCN_INLINE double& offset(int j, int64_t i, int64_t c) const {
    return offsets_.data[(j * group_ + i % group_) * this->C_ + c];
  }

  MRCN_INLINE void keep_statistics(int j, int64_t i, int64_t c, double mean, double squares) const {
    A* s = statistics_ + this->at(j, i, c) * this->fields_;
    s[0] = A(mean);
    s[1] = A(1.0 / std::sqrt(squares / double(this->L_) + eps_));
    offset(j, i, c) = mean - double(s[0]);
  }

  void plane_statistics(int64_t first, int64_t last) const {
    this->each_unit(first, last, [&](int64_t i, int64_t c) {
      for (int j = 0; j < P::inputs; ++j) {
        Extremes<A> extremes;
        const T* x = this->x_[j].plane(i, c);
        Moments m;
        if (this->fields_ == 4) {
          m = plane_moments<T, true>(x, this->L_, extremes);
          A* s = statistics_ + this->at(j, i, c) * 4;
          s[2] = extremes.maximum;
          s[3] = extremes.minimum;
        } else {
          m = plane_moments<T, false>(x, this->L_, extremes);
        }
        keep_statistics(j, i, c, m.mean, m.squares);
        this->pool(statistics_, j, i, c);
      }
    });
  }

  MRCN_INLINE ChannelMoments<A> partial(int j, int64_t i, int64_t chunk) const {
    const int64_t at = ((j * group_ + i % group_) * this->chunks_ + chunk) * this->C_ * 2;
    A* extremes = this->fields_ == 4 ? partial_extremes_.data + at : nullptr;
    return {partial_.data + at, partial_.data + at + this->C_, extremes, extremes + (extremes ? this->C_ : 0)};
  }

  void row_statistics(int64_t first, int64_t last) const {
    const int64_t C = this->C_;
    this->each_unit(first, last, [&](int64_t i, int64_t chunk) {
      Buffer<A> scratch(3 * C);
      const int64_t begin = this->chunk_begin(chunk), rows = this->chunk_end(chunk) - begin;
      for (int j = 0; j < P::inputs; ++j) {
        const Map<T>& x = this->x_[j];
        if (this->fields_ == 4) {
          rows_moments<T, true>(x.row(i, begin), rows, x.pixel, C, scratch.data, partial(j, i, chunk));
        } else {
          rows_moments<T, false>(x.row(i, begin), rows, x.pixel, C, scratch.data, partial(j, i, chunk));
        }
      }
    });
    this->each_plane(first, last, [&](int64_t c) {
      for (int64_t i = first; i < last; ++i) {
        for (int j = 0; j < P::inputs; ++j) {
          Moments m;
          A* s = statistics_ + this->at(j, i, c) * this->fields_;
          for (int64_t chunk = 0; chunk < this->chunks_; ++chunk) {
            const ChannelMoments<A> part = partial(j, i, chunk);
            m.join(double(this->chunk_end(chunk) - this->chunk_begin(chunk)), part.mean[c], part.squares[c]);
            if (this->fields_ == 4) {
              s[2] = chunk == 0 ? part.maximum[c] : most<A>(s[2], part.maximum[c]);
              s[3] = chunk == 0 ? part.minimum[c] : least<A>(s[3], part.minimum[c]);
            }
          }
          keep_statistics(j, i, c, m.mean, m.squares);
          this->pool(statistics_, j, i, c);
        }
      }
    });
  }

  void coefficients(int64_t first, int64_t last) const {
    this->each_plane(first, last, [&](int64_t c) {
      this->gates_.excite(first, last, c);
      for (int64_t i = first; i < last; ++i) {
        Plane<double> p[P::inputs];
        double s[P::gate_count], k[P::forward_slots];
        for (int j = 0; j < P::inputs; ++j) p[j] = this->plane(statistics_, j, i, c, offset(j, i, c));
        this->gate_values(i, c, s);
        make_maps<P>(p, s, this->shape_.to_input, k, true);
        for (int slot = 0; slot < P::forward_slots; ++slot) coefficient(i)[slot * this->C_ + c] = A(k[slot]);
      }
    });
  }

  template <bool stream>
  void make(int64_t first, int64_t last) const {
    this->each_unit(first, last, [&](int64_t i, int64_t unit) {
      T* x[P::inputs];
      T* y[P::all];
      if (this->shape_.pixels) {
        for (int64_t l = this->chunk_begin(unit); l < this->chunk_end(unit); ++l) {
          for (int j = 0; j < P::inputs; ++j) x[j] = this->x_[j].row(i, l);
          for (int k = 0; k < P::all; ++k) y[k] = y_[k].row(i, l);
          make_row<P, T, stream>(coefficient(i), x, y, this->C_);
        }
      } else {
        A k[P::forward_slots];
        for (int slot = 0; slot < P::forward_slots; ++slot) k[slot] = coefficient(i)[slot * this->C_ + unit];
        for (int j = 0; j < P::inputs; ++j) x[j] = this->x_[j].plane(i, unit);
        for (int s = 0; s < P::all; ++s) y[s] = y_[s].plane(i, unit);
        const int64_t head = stream ? until_all_aligned<T, P::all>(y, this->L_) : 0;
        if (stream && head >= 0) {
          make_plane<P, T, stream>(k, x, y, head, this->L_);
        } else {
          make_plane<P, T, false>(k, x, y, 0, this->L_);
        }
      }
      if constexpr (stream) stream_fence();
    });
  }

  const double eps_;
  const bool stream_;
  A* statistics_;
  const int64_t group_;
  Buffer<double> offsets_;          // (inputs, group, C): what rounding left of the means
  Buffer<A> coefficients_;          // (group, slots, C)
  Buffer<double> partial_;          // (inputs, group, chunks, 2, C): mean, squares
  Buffer<A> partial_extremes_;      // (inputs, group, chunks, 2, C): maximum, minimum
  Map<T> y_[P::all];
};

template <class P, class T>
class Backward : Call<P, T> {
  using Base = Call<P, T>;
  using A = acc_t<T>;

 public:
  explicit Backward(const BlockBackward& call)
      : Base(call.shape, call.parameters, call.inputs, true),
        call_(call),
        statistics_(static_cast<const A*>(call.statistics)),
        group_(this->group_size(P::inputs + P::all)),
        sums_(group_ * P::sums * this->C_),
        coefficients_(group_ * P::backward_slots * this->C_),
        norm_(P::inputs * this->N_ * this->C_ * 2) {
    for (int k = 0; k < P::all; ++k) g_[k] = Map<T>(call.gradients[k]);
    for (int j = 0; j < P::inputs; ++j) dx_[j] = Map<T>(call.input_gradients[j]);
    if (this->shape_.pixels) partial_.allocate(group_ * this->chunks_ * P::sums * this->C_);
    if (this->fields_ == 4) ties_.allocate(group_ * P::inputs * this->C_ * (this->shape_.pixels ? this->chunks_ : 1));
    read_missing_as_zero();
  }

  void run() {
    for (int64_t first = 0; first < this->N_; first += group_) {
      const int64_t last = least(first + group_, this->N_);
      this->each_plane(first, last, [&](int64_t c) {
        for (int64_t i = first; i < last; ++i) {
          for (int j = 0; j < P::inputs; ++j) this->pool(statistics_, j, i, c);
        }
      });
      if (this->shape_.pixels) {
        row_sums(first, last);
      } else {
        plane_sums(first, last);
      }
      this->gates_.squeeze(first, last);
      gate_gradients(first, last);
      this->gates_.backward(first, last);
      coefficients(first, last);
      if (call_.stream) {
        make<true>(first, last);
      } else {
        make<false>(first, last);
      }
    }
    this->gates_.parameter_gradients(call_.gate_gradient);
    norm_gradients();
  }

 private:
  MRCN_INLINE double* sums(int64_t i) const { return sums_.data + i % group_ * P::sums * this->C_; }
  MRCN_INLINE A* coefficient(int64_t i) const { return coefficients_.data + i % group_ * P::backward_slots * this->C_; }
  MRCN_INLINE A* partial(int64_t i, int64_t chunk) const {
    return partial_.data + (i % group_ * this->chunks_ + chunk) * P::sums * this->C_;
  }
  MRCN_INLINE double* norm(int j, int64_t i, int64_t c) const { return norm_.data + this->at(j, i, c) * 2; }

  // A gradient that was not given is read as one plane or row of zeros, over and over.
  void read_missing_as_zero() {
    bool missing = false;
    for (int k = 0; k < P::all; ++k) missing = missing || g_[k].data == nullptr;
    if (!missing) return;
    const int64_t length = this->shape_.pixels ? this->C_ : this->L_;
    zeros_.allocate(length);
    std::memset(static_cast<void*>(zeros_.data), 0, length * sizeof(T));
    for (int k = 0; k < P::all; ++k) {
      if (g_[k].data == nullptr) g_[k] = Map<T>(FeatureMap{zeros_.data, 0, 0, 0});
    }
  }

  MRCN_INLINE A extreme(int j, int64_t i, int64_t c) const {
    const A* s = statistics_ + this->at(j, i, c) * this->fields_;
    return A(extreme_pixel<double>(this->plane(statistics_, j, i, c), s[2], s[3]));
  }

  void plane_sums(int64_t first, int64_t last) const {
    this->each_unit(first, last, [&](int64_t i, int64_t c) {
      A mean[P::inputs];
      T* x[P::inputs];
      T* g[P::all];
      double found[P::sums];
      for (int j = 0; j < P::inputs; ++j) {
        mean[j] = statistics_[this->at(j, i, c) * this->fields_];
        x[j] = this->x_[j].plane(i, c);
      }
      for (int k = 0; k < P::all; ++k) g[k] = g_[k].plane(i, c);
      sum_plane<P, T>(mean, x, g, this->L_, found);
      for (int s = 0; s < P::sums; ++s) sums(i)[s * this->C_ + c] = found[s];
      if (this->fields_ == 4) {
        for (int j = 0; j < P::inputs; ++j) {
          const A at = extreme(j, i, c);
          int64_t count = 0;
          for (int64_t l = 0; l < this->L_; ++l) count += get(x[j] + l) == at ? 1 : 0;
          ties_.data[(i % group_ * P::inputs + j) * this->C_ + c] = double(count);
        }
      }
    });
  }

  void row_sums(int64_t first, int64_t last) const {
    const int64_t C = this->C_;
    this->each_unit(first, last, [&](int64_t i, int64_t chunk) {
      constexpr int64_t part = 64;  // rows, before the sums' own rounding would show
      Buffer<A> acc(P::sums * C), mean(P::inputs * C), extremes(P::inputs * C);
      A* total = partial(i, chunk);
      for (int64_t n = 0; n < P::sums * C; ++n) total[n] = A(0);
      for (int j = 0; j < P::inputs; ++j) {
        for (int64_t c = 0; c < C; ++c) {
          mean.data[j * C + c] = statistics_[this->at(j, i, c) * this->fields_];
          if (this->fields_ == 4) {
            extremes.data[j * C + c] = extreme(j, i, c);
            tie(i, chunk, j)[c] = 0;
          }
        }
      }
      const int64_t end = this->chunk_end(chunk);
      for (int64_t top = this->chunk_begin(chunk); top < end; top += part) {
        for (int64_t n = 0; n < P::sums * C; ++n) acc.data[n] = A(0);
        for (int64_t l = top; l < least(top + part, end); ++l) {
          T* x[P::inputs];
          T* g[P::all];
          for (int j = 0; j < P::inputs; ++j) x[j] = this->x_[j].row(i, l);
          for (int k = 0; k < P::all; ++k) g[k] = g_[k].row(i, l);
          sum_row<P, T>(mean.data, x, g, C, acc.data);
          if (this->fields_ == 4) {
            for (int j = 0; j < P::inputs; ++j) {
              for (int64_t c = 0; c < C; ++c) tie(i, chunk, j)[c] += get(x[j] + c) == extremes.data[j * C + c] ? 1 : 0;
            }
          }
        }
        for (int64_t n = 0; n < P::sums * C; ++n) total[n] += acc.data[n];
      }
    });
    this->each_plane(first, last, [&](int64_t c) {
      for (int64_t i = first; i < last; ++i) {
        for (int s = 0; s < P::sums; ++s) {
          double total = 0;
          for (int64_t chunk = 0; chunk < this->chunks_; ++chunk) total += double(partial(i, chunk)[s * C + c]);
          sums(i)[s * C + c] = total;
        }
      }
    });
  }

  // How often the extreme of a plane occurs: by chunk of rows, or once a plane.
  MRCN_INLINE double* tie(int64_t i, int64_t chunk, int j) const {
    const int64_t chunks = this->shape_.pixels ? this->chunks_ : 1;
    return ties_.data + ((i % group_ * chunks + chunk) * P::inputs + j) * this->C_;
  }
  MRCN_INLINE double ties(int64_t i, int j, int64_t c) const {
    double count = 0;
    for (int64_t chunk = 0; chunk < (this->shape_.pixels ? this->chunks_ : 1); ++chunk) count += tie(i, chunk, j)[c];
    return count;
  }

  void gather(int64_t i, int64_t c, Plane<double>* p, double* s, double* found) const {
    for (int j = 0; j < P::inputs; ++j) p[j] = this->plane(statistics_, j, i, c);
    this->gate_values(i, c, s);
    for (int n = 0; n < P::sums; ++n) found[n] = sums(i)[n * this->C_ + c];
  }

  void gate_gradients(int64_t first, int64_t last) const {
    this->each_plane(first, last, [&](int64_t c) {
      this->gates_.excite(first, last, c);
      for (int64_t i = first; i < last; ++i) {
        Plane<double> p[P::inputs];
        double s[P::gate_count], found[P::sums], ds[P::gate_count];
        gather(i, c, p, s, found);
        make_gate_gradients<P>(p, found, ds);
        for (int g = 0; g < P::gate_count; ++g) this->gates_.set_gradient(i, g, c, A(ds[g]));
      }
    });
  }

  void coefficients(int64_t first, int64_t last) const {
    this->each_plane(first, last, [&](int64_t c) {
      for (int64_t i = first; i < last; ++i) {
        Plane<double> p[P::inputs];
        double s[P::gate_count], found[P::sums], U[P::inputs], V[P::inputs], k[P::backward_slots];
        gather(i, c, p, s, found);
        make_maps<P>(p, s, this->shape_.to_input, k, false);
        make_moments<P>(s, this->shape_.to_input, found, U, V);
        unroll<P::inputs>([&](auto j) {
          if (this->fields_ == 4) {
            // The gradient of GMP(M) goes to M where its maximum is, evenly where several pixels share it.
            const double at = extreme(j.v, i, c), gradient = this->gates_.of_pooled(j.v, i, 1)[c];
            U[j.v] -= (at - p[j.v].mean) * gradient;
            V[j.v] -= gradient;
            k[P::extreme(j.v)] = at;
            k[P::k3(j.v)] = (1.0 - p[j.v].a) * gradient / ties(i, j.v, c);
          } else {
            k[P::extreme(j.v)] = k[P::k3(j.v)] = 0.0;
          }
          const PlaneGradient<double> of =
              plane_gradient<double>(p[j.v], U[j.v], V[j.v], this->gates_.of_pooled(j.v, i)[c], double(this->L_));
          k[P::k1(j.v)] = of.k1;
          k[P::k2(j.v)] = of.k2;
          norm(j.v, i, c)[0] = of.gamma;
          norm(j.v, i, c)[1] = of.beta;
        });
        for (int slot = 0; slot < P::backward_slots; ++slot) coefficient(i)[slot * this->C_ + c] = A(k[slot]);
      }
    });
  }

  template <bool stream>
  void make(int64_t first, int64_t last) const {
    if (this->fields_ == 4) {
      make<stream, true>(first, last);
    } else {
      make<stream, false>(first, last);
    }
  }

  template <bool stream, bool extremes>
  void make(int64_t first, int64_t last) const {
    this->each_unit(first, last, [&](int64_t i, int64_t unit) {
      T* x[P::inputs];
      T* g[P::all];
      T* dx[P::inputs];
      if (this->shape_.pixels) {
        for (int64_t l = this->chunk_begin(unit); l < this->chunk_end(unit); ++l) {
          for (int j = 0; j < P::inputs; ++j) x[j] = this->x_[j].row(i, l);
          for (int s = 0; s < P::all; ++s) g[s] = g_[s].row(i, l);
          for (int j = 0; j < P::inputs; ++j) dx[j] = dx_[j].row(i, l);
          gradient_row<P, T, stream, extremes>(coefficient(i), x, g, dx, this->C_);
        }
      } else {
        A k[P::backward_slots];
        for (int slot = 0; slot < P::backward_slots; ++slot) k[slot] = coefficient(i)[slot * this->C_ + unit];
        for (int j = 0; j < P::inputs; ++j) x[j] = this->x_[j].plane(i, unit);
        for (int s = 0; s < P::all; ++s) g[s] = g_[s].plane(i, unit);
        for (int j = 0; j < P::inputs; ++j) dx[j] = dx_[j].plane(i, unit);
        const int64_t head = stream ? until_all_aligned<T, P::inputs>(dx, this->L_) : 0;
        if (stream && head >= 0) {
          gradient_plane<P, T, stream, extremes>(k, x, g, dx, head, this->L_);
        } else {
          gradient_plane<P, T, false, extremes>(k, x, g, dx, 0, this->L_);
        }
      }
      if constexpr (stream) stream_fence();
    });
  }

  void norm_gradients() const {
    A* gamma = static_cast<A*>(call_.norm_weight_gradient);
    A* beta = static_cast<A*>(call_.norm_bias_gradient);
    this->each_plane(0, this->N_, [&](int64_t c) {
      for (int j = 0; j < P::inputs; ++j) {
        double of_gamma = 0, of_beta = 0;
        for (int64_t i = 0; i < this->N_; ++i) {
          of_gamma += norm(j, i, c)[0];
          of_beta += norm(j, i, c)[1];
        }
        gamma[j * this->C_ + c] = A(of_gamma);
        beta[j * this->C_ + c] = A(of_beta);
      }
    });
  }

  const BlockBackward& call_;
  const A* statistics_;
  const int64_t group_;
  Buffer<double> sums_;     // (group, sums, C)
  Buffer<A> coefficients_;  // (group, slots, C)
  Buffer<double> norm_;     // (inputs, N, C, 2): gradients of γ and β
  Buffer<A> partial_;       // (group, chunks, sums, C)
  Buffer<double> ties_;     // (group, chunks or 1, inputs, C)
  Buffer<T> zeros_;
  Map<T> g_[P::all];
  Map<T> dx_[P::inputs];
};

// --- from a call's mode and dtype to the code for it --------------------------------------------------------

template <template <class, class> class Direction, Mode mode, class Arguments>
void by_dtype(const Arguments& call) {
  switch (call.shape.dtype) {
    case Dtype::f32:
      return Direction<Pattern<mode>, float>(call).run();
    case Dtype::f64:
      return Direction<Pattern<mode>, double>(call).run();
    case Dtype::bf16:
      return Direction<Pattern<mode>, bf16>(call).run();
    case Dtype::f16:
      return Direction<Pattern<mode>, f16>(call).run();
  }
}

template <template <class, class> class Direction, class Arguments>
void by_mode(const Arguments& call) {
  switch (call.shape.mode) {
    case Mode::pair:
      return by_dtype<Direction, Mode::pair>(call);
    case Mode::concat:
      return by_dtype<Direction, Mode::concat>(call);
    case Mode::restitute:
      return by_dtype<Direction, Mode::restitute>(call);
    case Mode::snr:
      return by_dtype<Direction, Mode::snr>(call);
  }
}

}  // namespace

void block_forward(const BlockForward& call) { by_mode<Forward>(call); }
void block_backward(const BlockBackward& call) { by_mode<Backward>(call); }

}  // namespace mrcn::MRCN_ISA
