// The formulas of the block's coefficients, for the CPU (host) and for CUDA (device).
//
// Let a plane of L pixels x have the mean μ; let r = 1/sqrt(var + ε), a = γ r and z = mean(M) = μ - β. Then
// everything that the block makes is affine in the centered pixel c = x - μ, with coefficients that are
// constant within a sample's channel:
//
//   F̃      = a c + β                                                                     (eq. 1, 2)
//   M      = (1 - a) c + z                                                               (eq. 3)
//   F_{v+} = F̃_v + s1 M_v      = p c_v + s1 μ_v + (1 - s1) β_v,  p = a + s1 (1 - a)       (eq. 4, 5)
//   F_{v-} = F̃_v + s2_n M_n    = a_v c_v + R_n c_n + β_v + s2_n z_n,  R = s2 (1 - a)      (eq. 6, 7)
//
// Where a is large (a flat plane far from zero), a x + (β - a μ) would cancel; the centered form does not.
//
// Backward: G is the gradient of a set, with the sums S = Σ G and T = Σ G c over the plane. H is the gradient
// that reaches F̃, and U = Σ H c and V = Σ H are its sums, without the part that comes through z. Then
//
//   ∂x = (the transposed affine maps of every G) + k1 + k2 c,   k1 = (∂z - a V) / L,   k2 = -a r² U / L
//   ∂γ = r U,   ∂β = V - ∂z
//
// R is the type in which these few operations per plane are computed. On the host it is double, or a vector
// of doubles, one per plane.
#pragma once

#if defined(__CUDACC__) || defined(__HIPCC__)
#define MRCN_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define MRCN_HOST_DEVICE inline __attribute__((always_inline))
#endif

namespace mrcn {
namespace {  // one copy per translation unit: files differ in their instruction set

template <class R>
struct Plane {
  R mean;    // μ, rounded to the type in which the elementwise pass subtracts it
  R offset;  // the rounding error: the true mean is mean + offset
  R r;       // 1/σ
  R a;       // γ r
  R beta;
  R z;  // μ - β, the pooled residual
};

template <class R>
MRCN_HOST_DEVICE Plane<R> describe(R mean, R offset, R r, R gamma, R beta) {
  return {mean, offset, r, gamma * r, beta, (mean - beta) + offset};
}

// NaN where x is not finite, otherwise 0. It is added where a closed form below has dropped a term that
// cancels in exact arithmetic: in the literal equations, a term that is not finite makes the result NaN.
template <class R>
MRCN_HOST_DEVICE R nothing_if_finite(R x) {
  return 0 * x;
}

// GAP(M), the input of a gate.
template <class R>
MRCN_HOST_DEVICE R pooled_residual(const Plane<R>& p) {
  return p.mean - p.beta + nothing_if_finite(p.a);
}

// What a map's shift must subtract because the elementwise pass subtracts a rounded mean.
template <class R>
MRCN_HOST_DEVICE R correction(const Plane<R>& p, R scale) {
  const R term = scale * p.offset;
  return term - term == 0 ? term : R{};
}

// GMP(M) = residual_at(extreme_pixel): M is affine in x, so its maximum lies at the plane's maximum or
// minimum, depending on the sign of its slope.
template <class R>
MRCN_HOST_DEVICE R extreme_pixel(const Plane<R>& p, R maximum, R minimum) {
  return 1 - p.a >= 0 ? maximum : minimum;
}
template <class R>
MRCN_HOST_DEVICE R residual_at(const Plane<R>& p, R x) {
  return (1 - p.a) * (x - p.mean) + (p.mean - p.beta);
}

// y = scale · (x - mean) + shift
template <class R>
struct Affine {
  R scale;
  R shift;
};

// F̃ (eq. 1, 2).
template <class R>
MRCN_HOST_DEVICE Affine<R> normalized(const Plane<R>& p) {
  return {p.a, p.beta - correction(p, p.a)};
}

// F₊ = F̃ + s M, or F + s M (eq. 4, 5).
template <class R>
MRCN_HOST_DEVICE Affine<R> restituted(const Plane<R>& p, R s, bool to_input) {
  const R scale = to_input ? 1 + s * (1 - p.a) : p.a + s * (1 - p.a);
  const R mean = p.mean + p.offset;
  const R shift = to_input ? mean + s * p.z : s * mean + (1 - s) * p.beta + nothing_if_finite(p.beta);
  return {scale, shift - correction(p, scale)};
}

// s M, which compensates F̃ of the other modality (eq. 6, 7).
template <class R>
MRCN_HOST_DEVICE Affine<R> distilled(const Plane<R>& p, R s) {
  const R scale = s * (1 - p.a);
  return {scale, s * p.z - correction(p, scale)};
}

// The sums of a set's gradient over a plane.
template <class R>
struct Sums {
  R S;  // Σ G
  R T;  // Σ G c
};

// ∂s, where G is the gradient of the set to which s M was added.
template <class R>
MRCN_HOST_DEVICE R gate_gradient(const Plane<R>& p, Sums<R> g) {
  return (1 - p.a) * g.T + p.z * g.S;
}

// The share of the gradient of F₊ that reaches F̃; the remainder goes to x directly.
template <class R>
MRCN_HOST_DEVICE R share_of_normalized(R s, bool to_input) {
  return to_input ? -s : 1 - s;
}

// The terms of ∂x that come through the statistics, and the gradients of the instance norm's parameters.
template <class R>
struct PlaneGradient {
  R k1;
  R k2;
  R gamma;
  R beta;
};

template <class R>
MRCN_HOST_DEVICE PlaneGradient<R> plane_gradient(const Plane<R>& p, R U, R V, R dz, R length) {
  return {(dz - p.a * V) / length, -p.a * p.r * p.r * U / length, p.r * U + nothing_if_finite(dz), V - dz};
}

}  // namespace
}  // namespace mrcn
