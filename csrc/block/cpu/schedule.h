// What the forward and the backward of the block share on the CPU: the call's shape, maps, statistics and
// gates, and how its work is divided.
//
// The samples are processed in groups, so that the second reading of a group's pixels comes from the cache.
// Where there are enough samples and the cache holds a group for each thread, each thread takes groups of its
// own and waits for no other thread; otherwise the threads share every step of a group. Every group reads the
// gates' weights again: where these are not small compared with its maps, the groups are larger and the
// threads share them. In any case the work is divided into planes, or into chunks of rows whose size depends
// on the shape alone, and partial results are joined in a fixed order. The results are therefore the same
// bits for any number of threads.
#pragma once

#include <type_traits>

#include "block/cpu/gates.h"
#include "block/cpu/pixel_passes.h"
#include "block/params.h"
#include "cpu/buffer.h"

namespace mrcn::MRCN_ISA {
namespace {

// The most bytes of a group's feature maps that stay in the outer cache until they are read again.
constexpr int64_t group_bytes = 4 << 20;
// The most bytes of the groups of all threads that stay there together.
constexpr int64_t cache_bytes = 16 << 20;
// The work is split between threads only where each of them has at least about this many elements.
constexpr int64_t thread_elements = 16384;

inline void serial(int64_t count, int64_t, RangeFunction function, void* context) {
  function(0, count, context);
}

template <class T, class V>
MRCN_INLINE void take_pairs(const T* p, V& first, V& second) {
  if constexpr (sizeof(V) == sizeof(double)) {
    first = p[0];
    second = p[1];
  } else {
    for (int lane = 0; lane < lanes<double>; ++lane) {
      first[lane] = p[2 * lane];
      second[lane] = p[2 * lane + 1];
    }
  }
}
template <class T, class V>
MRCN_INLINE void put_pairs(T* p, V first, V second) {
  if constexpr (sizeof(V) == sizeof(double)) {
    p[0] = T(first);
    p[1] = T(second);
  } else {
    for (int lane = 0; lane < lanes<double>; ++lane) {
      p[2 * lane] = T(first[lane]);
      p[2 * lane + 1] = T(second[lane]);
    }
  }
}
template <int wide>
using one_or_more = std::conditional_t<wide == 1, vec<double>, double>;

inline int64_t element_size(Dtype dtype) { return dtype == Dtype::f64 ? 8 : dtype == Dtype::f32 ? 4 : 2; }

// Samples that are processed together, the threads that share each step, and their scratch memory.
template <class Scratch>
struct Group {
  ParallelFor pool;
  int64_t first, last;
  const Scratch& scratch;

  MRCN_INLINE int64_t samples() const { return last - first; }
};

// P: the pattern of the mode that makes the sets (for concat, the pair's); A: the accumulation type.
template <class P, class A>
class Call {
 public:
  // The size of scratch memory depends on these.
  int64_t channels() const { return C_; }
  int64_t parts() const { return parts_; }
  int64_t array_pitch() const { return array_pitch_; }
  bool seeks_extremes() const { return extremes_; }

 protected:
  // Direction: BlockForward or BlockBackward.
  template <class Direction>
  Call(const Direction& call, const Passes<A>& passes, bool backward)
      : shape_(call.shape),
        passes_(passes),
        all_(sets_of(shape_.mode).all()),
        made_(sets_of(shape_.mode).first_made()),
        N_(shape_.samples),
        C_(shape_.channels),
        L_(shape_.length),
        array_pitch_(shape_.pixels ? C_ : Gates<A>::pitch_of(C_)),
        extremes_(shape_.gate == Gate::cbam_channel),
        chunk_(most<int64_t>(256, (L_ + 63) / 64)),
        chunks_((L_ + chunk_ - 1) / chunk_),
        parts_(shape_.pixels ? chunks_ : 1),
        inputs_(call.inputs),
        gamma_(static_cast<const A*>(call.parameters.norm_weight)),
        beta_(static_cast<const A*>(call.parameters.norm_bias)),
        gates_(shape_, call.parameters, backward) {
    if (extremes_) extreme_values_.allocate(P::inputs * N_ * C_ * 2);
  }

  // Calls f(group) for groups of samples that read `maps` maps. Scratch(call, samples), the memory for a
  // group of that many samples, is made once for consecutive groups.
  template <class Scratch, class F>
  void each_group(int maps, const F& f) const {
    const int64_t threads = shape_.threads, rounds = (N_ + threads - 1) / threads;
    const int64_t sample_bytes = maps * C_ * L_ * element_size(shape_.dtype), fits = samples_of(sample_bytes);
    const bool busy = 4 * rounds * threads <= 5 * N_;  // at most a fifth of the threads' time idle
    const bool own = threads > 1 && busy && threads * sample_bytes <= cache_bytes && light(group_bytes);
    const int64_t most_samples = most<int64_t>(1, own ? fits / threads : fits);
    const auto groups = [&](ParallelFor pool, int64_t begin, int64_t end) {
      const int64_t size = even_share(end - begin, most_samples);
      const Scratch scratch(*this, size);
      for (int64_t first = begin; first < end; first += size) {
        f(Group<Scratch>{pool, first, least(first + size, end), scratch});
      }
    };
    if (!own) return groups(shape_.parallel, 0, N_);
    parallel(shape_.parallel, N_, thread_elements / (C_ * L_),
        [&](int64_t begin, int64_t end) { groups(serial, begin, end); });
  }

  // Whether the gates' weights are small compared with this many bytes of maps.
  bool light(int64_t bytes) const { return 4 * gates_.weight_bytes() <= bytes; }

  // How many samples a group has. Where the weights are not small compared with the cache, it is better to
  // read the maps from memory twice than to read the weights for every few samples.
  int64_t samples_of(int64_t sample_bytes) const {
    constexpr int64_t many = 16;
    if (!light(cache_bytes)) return many;
    return (light(group_bytes) ? group_bytes : cache_bytes) / sample_bytes;
  }

  // The size of groups of `count` samples: as few groups as possible, of similar sizes, none larger than
  // `most_samples`, and multiples of four where possible, because the gates compute four samples at once.
  static int64_t even_share(int64_t count, int64_t most_samples) {
    const int64_t fours = most_samples < 4 ? most_samples : most_samples / 4 * 4;
    const int64_t groups = most<int64_t>(1, (count + fours - 1) / fours),
                  size = (count + groups - 1) / groups;
    return size < 4 ? size : least((size + 3) / 4 * 4, count);
  }

  // Calls f(sample, channel) for every plane, or f(sample, chunk) for every chunk of rows.
  template <class F>
  void each_unit(ParallelFor pool, int64_t first, int64_t last, const F& f) const {
    const int64_t units = shape_.pixels ? chunks_ : C_;
    const int64_t elements = shape_.pixels ? least(chunk_, L_) * C_ : L_;
    parallel(pool, (last - first) * units, thread_elements / elements, [&](int64_t begin, int64_t end) {
      for (int64_t unit = begin; unit < end; ++unit) f(first + unit / units, unit % units);
      stream_fence();
    });
  }

  // For each sample of the group, calls f(sample, first channel, constant<1>) for as many channels as a
  // vector has doubles, and f(sample, channel, constant<0>) for the remaining channels. The number of threads
  // has no influence on which these are.
  template <class Samples, class F>
  void each_channels(const Samples& group, const F& f) const {
    each_block(group.pool, group.samples(), [&](int64_t c0, int64_t c1) { over_channels(group, c0, c1, f); });
  }

  // Computes the gates of a block of channels, and then calls f for it as `each_channels` does.
  template <class Samples, class F>
  void each_channels_gated(const Samples& group, const F& f) const {
    each_block(group.pool, group.samples(), [&](int64_t c0, int64_t c1) {
      gates_.excite(group.first, group.last, c0, c1);
      over_channels(group, c0, c1, f);
    });
  }

  // Calls f(first channel, last channel) for blocks of channels.
  template <class F>
  void each_block(ParallelFor pool, int64_t samples, const F& f) const {
    constexpr int64_t width = Gates<A>::block_channels;
    parallel(pool, (C_ + width - 1) / width, 4096 / (width * most<int64_t>(1, samples)),
        [&](int64_t begin, int64_t end) {
          for (int64_t c = begin * width; c < least(end * width, C_); c += width) f(c, least(c + width, C_));
        });
  }
  template <class Samples, class F>
  static MRCN_INLINE void over_channels(const Samples& group, int64_t c0, int64_t c1, const F& f) {
    for (int64_t i = group.first; i < group.last; ++i) {
      over_vectors(c0, c1, [&](int64_t c, auto wide) MRCN_BODY { f(i, c, wide); });
    }
  }
  template <class F>
  static MRCN_INLINE void over_vectors(int64_t c, int64_t end, const F& f) {
    constexpr int64_t W = lanes<double>;
    for (; c + W <= end; c += W) f(c, constant<1>{});
    for (; c < end; ++c) f(c, constant<0>{});
  }

  MRCN_INLINE int64_t chunk_rows(int64_t chunk) const { return least(chunk_, L_ - chunk * chunk_); }
  MRCN_INLINE int64_t part_pixels(int64_t part) const { return shape_.pixels ? chunk_rows(part) : L_; }
  MRCN_INLINE int64_t at(int j, int64_t i, int64_t c) const { return (j * N_ + i) * C_ + c; }

  // Where a unit of sample i of a map starts: its plane, or its chunk's first row.
  MRCN_INLINE void* unit_of(const FeatureMap& map, int64_t i, int64_t unit) const {
    const int64_t offset = i * map.sample + (shape_.pixels ? unit * chunk_ * map.pixel : unit * map.channel);
    return static_cast<char*>(map.data) + offset * element_size(shape_.dtype);
  }
  MRCN_INLINE void units_of(
      const FeatureMap* maps, int n, int64_t i, int64_t unit, void** at, int64_t* pitch) const {
    for (int k = 0; k < n; ++k) {
      at[k] = unit_of(maps[k], i, unit);
      pitch[k] = maps[k].pixel;
    }
  }

  // The plane of channel c, or (V) of as many channels from c on.
  template <class V = double>
  MRCN_INLINE Plane<V> plane(const A* statistics, int j, int64_t i, int64_t c, V offset = V{}) const {
    V mean{}, r{};
    take_pairs(statistics + at(j, i, c) * 2, mean, r);
    return describe<V>(mean, offset, r, doubles<V>(gamma_ + j * C_ + c), doubles<V>(beta_ + j * C_ + c));
  }

  // Stores the gates' inputs of a plane.
  template <class V>
  MRCN_INLINE void pool(const Plane<V>& p, int j, int64_t i, int64_t c) const {
    put_doubles(gates_.pooled(j, i) + c, pooled_residual<V>(p));
    if (extremes_) put_doubles(gates_.pooled(j, i, 1) + c, residual_at<V>(p, extreme<V>(p, j, i, c)));
  }

  // The largest and the smallest pixel of a plane.
  MRCN_INLINE A* extreme_values(int j, int64_t i, int64_t c) const {
    return extreme_values_.data + at(j, i, c) * 2;
  }
  // The pixel at which M has its maximum.
  template <class V>
  MRCN_INLINE V extreme(const Plane<V>& p, int j, int64_t i, int64_t c) const {
    V maximum{}, minimum{};
    take_pairs(extreme_values(j, i, c), maximum, minimum);
    return extreme_pixel(p, maximum, minimum);
  }

  template <class V>
  MRCN_INLINE void gate_values(int64_t i, int64_t c, V* s) const {
    for (int g = 0; g < P::gate_count; ++g) s[g] = doubles<V>(gates_.value(i, g) + c);
  }

  // Stores the coefficients of one or several channels. Every NaN becomes the one that survives rounding to
  // bf16.
  template <class V, int n>
  MRCN_INLINE void put_coefficients(A* of_sample, int64_t c, const V (&k)[n]) const {
    const V nan = V{} + __builtin_nan("");
    for (int slot = 0; slot < n; ++slot) {
      put_doubles(of_sample + slot * array_pitch_ + c, k[slot] == k[slot] ? k[slot] : nan);
    }
  }

  // Reads the coefficients of one channel.
  template <int n>
  MRCN_INLINE void take_coefficients(const A* of_sample, int64_t c, A (&k)[n]) const {
    for (int slot = 0; slot < n; ++slot) k[slot] = of_sample[slot * array_pitch_ + c];
  }

  const BlockShape& shape_;
  const Passes<A> passes_;
  const int all_;   // how many sets there are, with the inputs that are handed through
  const int made_;  // the first computed set
  const int64_t N_, C_, L_;
  // The stride between the arrays of channels of two coefficients or sums. For rows of pixels it is C, as
  // row_passes.h expects. For planes, which access one element of each array at a time, it is a line more.
  const int64_t array_pitch_;
  const bool extremes_;           // the gate needs GMP(M)
  const int64_t chunk_, chunks_;  // rows per chunk, and chunks per sample
  const int64_t parts_;           // partial sums per plane
  const FeatureMap* inputs_;
  const A* gamma_;
  const A* beta_;
  Gates<A> gates_;
  Buffer<A> extreme_values_;  // (inputs, N, C, 2)
};

// Calls f(Pattern, element) for a call's mode and dtype.
template <class F>
inline void with_types(const BlockShape& shape, const F& f) {
  with_pattern(shape.mode, [&]<class P>(P) { with_element(shape.dtype, [&]<class T>(T) { f(P{}, T{}); }); });
}

}  // namespace
}  // namespace mrcn::MRCN_ISA
