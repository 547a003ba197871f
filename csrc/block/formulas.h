// The coefficient formulas of the block, written once for every backend (host and device).
//
// A plane of L pixels x with mean μ, r = 1/sqrt(var + ε), a = γ r, z = mean(M) = μ - β. With the centered
// pixel c = x - μ everything the block makes is affine in c with coefficients a (sample, channel):
//
//   F̃      = a c + β                                                                     (eq. 1, 2)
//   M      = (1 - a) c + z                                                               (eq. 3)
//   F_{v+} = F̃_v + s1 M_v      = p c_v + s1 μ_v + (1 - s1) β_v,  p = a + s1 (1 - a)       (eq. 4, 5)
//   F_{v-} = F̃_v + s2_n M_n    = a_v c_v + R_n c_n + β_v + s2_n z_n,  R = s2 (1 - a)      (eq. 6, 7)
//
// Centered, nothing cancels where a is large (a flat plane far from zero), as a x + (β - a μ) would.
//
// Backward: H is the gradient that reaches F̃, S the plane's sum of a gradient G, T that of G c. With U = Σ H
// c and V = Σ H over the plane, without the part that comes through z,
//
//   ∂x = (the affine map transposed) + k1 + k2 c,   k1 = (∂z - a V) / L,   k2 = -a r² U / L
//   ∂γ = r U,   ∂β = V - ∂z
//
// R is the type these few operations a plane are done in: on the host double, or a vector of doubles for as
// many planes.
#pragma once

#if defined(__CUDACC__) || defined(__HIPCC__)
#define MRCN_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define MRCN_HOST_DEVICE inline __attribute__((always_inline))
#endif

namespace mrcn {
namespace {  // one copy a translation unit: files differ in their instruction set

template <class R>
struct Plane {
  R mean;    // μ as the elementwise pass subtracts it
  R offset;  // what rounding left of it: the true mean is mean + offset
  R r;       // 1/σ
  R a;       // γ r
  R beta;
  R z;  // μ - β, the pooled residual
};

template <class R>
MRCN_HOST_DEVICE Plane<R> describe(R mean, R offset, R r, R gamma, R beta) {
  return {mean, offset, r, gamma * r, beta, (mean - beta) + offset};
}

// Not a number where x is not finite, else 0: added where the closed forms here drop a term that cancels in
// exact arithmetic, and with it what is not finite in the literal equations.
template <class R>
MRCN_HOST_DEVICE R nothing_if_finite(R x) {
  return 0 * x;
}

// What a gate sees of the plane, GAP(M).
template <class R>
MRCN_HOST_DEVICE R pooled_residual(const Plane<R>& p) {
  return p.mean - p.beta + nothing_if_finite(p.a);
}

// The share of a map's shift that makes up for the rounding of the mean.
template <class R>
MRCN_HOST_DEVICE R correction(const Plane<R>& p, R scale) {
  const R term = scale * p.offset;
  return term - term == 0 ? term : R{};
}

// GMP(M): M is affine in x, so its maximum lies at the plane's maximum or minimum, whichever way it slopes.
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

// F̃, as a function of its own input (eq. 1, 2).
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

// s M, what the other modality's F̃ is compensated with (eq. 6, 7).
template <class R>
MRCN_HOST_DEVICE Affine<R> distilled(const Plane<R>& p, R s) {
  const R scale = s * (1 - p.a);
  return {scale, s * p.z - correction(p, scale)};
}

// Gradient sums of a plane.
template <class R>
struct Sums {
  R S;  // Σ G
  R T;  // Σ G c
};

// ∂s of s M, where G is the gradient of what s M was added to.
template <class R>
MRCN_HOST_DEVICE R gate_gradient(const Plane<R>& p, Sums<R> g) {
  return (1 - p.a) * g.T + p.z * g.S;
}

// Share of the gradient of F₊ that reaches F̃ (the rest goes to x directly).
template <class R>
MRCN_HOST_DEVICE R share_of_normalized(R s, bool to_input) {
  return to_input ? -s : 1 - s;
}

// The terms of ∂x that are no map of the gradients, and the instance norm's parameter gradients.
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
