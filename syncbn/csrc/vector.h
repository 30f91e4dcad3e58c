// Vectors of SYNCBN_VECTOR_BYTES, written in the vector extensions of gcc and clang, and what moves them to and from
// memory. Everything has internal linkage: each translation unit compiles it for an instruction set of its own, and
// the linker must never choose another's.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define SYNCBN_INLINE inline __attribute__((always_inline))

namespace {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// The precision that a type is computed in, and the integer of its width.
template <class T>
struct Compute {
  using type = float;
  using integer = int32_t;
  using natural = uint32_t;
};
template <>
struct Compute<double> {
  using type = double;
  using integer = int64_t;
  using natural = uint64_t;
};
template <class T>
using ComputeType = typename Compute<T>::type;

// A vector of the computation's type A, and vectors of as many lanes of other types.
template <class A>
struct Vectors {
  static constexpr int width = SYNCBN_VECTOR_BYTES / sizeof(A);
  typedef A Real __attribute__((vector_size(SYNCBN_VECTOR_BYTES)));
  typedef typename Compute<A>::integer Int __attribute__((vector_size(SYNCBN_VECTOR_BYTES)));
  typedef typename Compute<A>::natural Nat __attribute__((vector_size(SYNCBN_VECTOR_BYTES)));
  typedef uint16_t Short __attribute__((vector_size(2 * width)));
  typedef uint8_t Byte __attribute__((vector_size(width)));
};
template <class A>
using Real = typename Vectors<A>::Real;
template <class A>
using Int = typename Vectors<A>::Int;
template <class A>
using Nat = typename Vectors<A>::Nat;
template <class A>
constexpr int kWidth = Vectors<A>::width;

typedef double HalfOfDoubles __attribute__((vector_size(SYNCBN_VECTOR_BYTES)));  // the lower or upper lanes of floats
typedef float HalfOfFloats __attribute__((vector_size(SYNCBN_VECTOR_BYTES / 2)));

// Which lanes of a vector are meant: all of them, the first few where a span ends, or the last few.
struct All {};
struct First {
  int count;
};
struct Last {
  int count;
};

template <class To, class From>
SYNCBN_INLINE To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

template <class A>
SYNCBN_INLINE Real<A> broadcast(A value) {
  return value - Real<A>{};  // not 0 + value, which would make a zero of −0
}

template <class A>
SYNCBN_INLINE Int<A> lanes_before(int count) {
  Int<A> index;
  for (int i = 0; i < kWidth<A>; ++i) index[i] = i;
  return index < static_cast<typename Compute<A>::integer>(count);
}

// Plain memory, by lanes. U is a vector of elements E.
template <class U, class E>
SYNCBN_INLINE U load_lanes(const E* p, All) {
  U u;
  memcpy(&u, p, sizeof(u));
  return u;
}
template <class U, class E>
SYNCBN_INLINE U load_lanes(const E* p, First lanes) {
#if defined(SYNCBN_AVX512)
  if constexpr (sizeof(E) == 8) {
    return bit_cast<U>(_mm512_maskz_loadu_epi64(static_cast<__mmask8>((1u << lanes.count) - 1), p));
  } else if constexpr (sizeof(E) == 4) {
    return bit_cast<U>(_mm512_maskz_loadu_epi32(static_cast<__mmask16>((1u << lanes.count) - 1), p));
  } else if constexpr (sizeof(U) == 32) {
    return bit_cast<U>(_mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << lanes.count) - 1), p));
  } else if constexpr (sizeof(U) == 16 && sizeof(E) == 1) {
    return bit_cast<U>(_mm_maskz_loadu_epi8(static_cast<__mmask16>((1u << lanes.count) - 1), p));
  }
#elif defined(SYNCBN_AVX2)
  if constexpr (sizeof(E) == 8) {
    const auto meant = bit_cast<__m256i>(lanes_before<double>(lanes.count));
    return bit_cast<U>(_mm256_maskload_epi64(reinterpret_cast<const long long*>(p), meant));
  } else if constexpr (sizeof(E) == 4) {
    const auto meant = bit_cast<__m256i>(lanes_before<float>(lanes.count));
    return bit_cast<U>(_mm256_maskload_epi32(reinterpret_cast<const int*>(p), meant));
  }
#endif
  E values[sizeof(U) / sizeof(E)] = {};
  for (int i = 0; i < lanes.count; ++i) values[i] = p[i];
  return load_lanes<U>(values, All{});
}

template <class U, class E>
SYNCBN_INLINE void store_lanes(E* p, U u, All) {
  memcpy(p, &u, sizeof(u));
}
template <class U, class E>
SYNCBN_INLINE void store_lanes(E* p, U u, First lanes) {
#if defined(SYNCBN_AVX512)
  if constexpr (sizeof(E) == 8) {
    return _mm512_mask_storeu_epi64(p, static_cast<__mmask8>((1u << lanes.count) - 1), bit_cast<__m512i>(u));
  } else if constexpr (sizeof(E) == 4) {
    return _mm512_mask_storeu_epi32(p, static_cast<__mmask16>((1u << lanes.count) - 1), bit_cast<__m512i>(u));
  } else {
    return _mm256_mask_storeu_epi16(p, static_cast<__mmask16>((1u << lanes.count) - 1), bit_cast<__m256i>(u));
  }
#elif defined(SYNCBN_AVX2)
  if constexpr (sizeof(E) == 8) {
    return _mm256_maskstore_epi64(
        reinterpret_cast<long long*>(p), bit_cast<__m256i>(lanes_before<double>(lanes.count)), bit_cast<__m256i>(u));
  } else if constexpr (sizeof(E) == 4) {
    return _mm256_maskstore_epi32(
        reinterpret_cast<int*>(p), bit_cast<__m256i>(lanes_before<float>(lanes.count)), bit_cast<__m256i>(u));
  }
#endif
  E values[sizeof(U) / sizeof(E)];
  store_lanes(values, u, All{});
  for (int i = 0; i < lanes.count; ++i) p[i] = values[i];
}

// float16 without an instruction for it: what the exponent's range does not cover is settled by a multiplication
// (subnormals) or by selection (Inf, NaN).
SYNCBN_INLINE Real<float> from_half(Nat<float> half) {
  const Nat<float> sign = (half & 0x8000u) << 16;
  const Nat<float> magnitude = (half & 0x7fffu) << 13;
  const Nat<float> scaled = bit_cast<Nat<float>>(bit_cast<Real<float>>(magnitude) * 0x1p112f);  // re-biases
  const Nat<float> special = magnitude | 0x7f800000u;
  return bit_cast<Real<float>>((magnitude >= 0x0f800000u ? special : scaled) | sign);
}

// Round to nearest even: subnormals by the rounding of an addition, normal numbers by a carry.
SYNCBN_INLINE Nat<float> to_half(Real<float> value) {
  const Nat<float> bits = bit_cast<Nat<float>>(value);
  const Nat<float> sign = bits & 0x80000000u;
  const Nat<float> magnitude = bits ^ sign;
  const Nat<float> subnormal = bit_cast<Nat<float>>(bit_cast<Real<float>>(magnitude) + 0.5f) - 0x3f000000u;
  const Nat<float> normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const Nat<float> infinite = Nat<float>{} + 0x7c00u;
  const Nat<float> nan = Nat<float>{} + 0x7e00u;
  Nat<float> half = magnitude < 0x38800000u ? subnormal : normal;
  half = magnitude >= 0x477ff000u ? infinite : half;
  half = magnitude > 0x7f800000u ? nan : half;
  return half | (sign >> 16);
}

// Elements of a batch, as vectors of the computation's precision.
template <class L>
SYNCBN_INLINE Real<double> load(const double* p, L lanes) {
  return load_lanes<Real<double>>(p, lanes);
}
template <class L>
SYNCBN_INLINE Real<float> load(const float* p, L lanes) {
  return load_lanes<Real<float>>(p, lanes);
}
template <class L>
SYNCBN_INLINE Real<float> load(const BFloat16* p, L lanes) {
  const auto shorts = load_lanes<Vectors<float>::Short>(&p->bits, lanes);
  return bit_cast<Real<float>>(__builtin_convertvector(shorts, Nat<float>) << 16);
}
template <class L>
SYNCBN_INLINE Real<float> load(const Float16* p, L lanes) {
  const auto shorts = load_lanes<Vectors<float>::Short>(&p->bits, lanes);
#if defined(SYNCBN_AVX512)
  return bit_cast<Real<float>>(_mm512_cvtph_ps(bit_cast<__m256i>(shorts)));
#elif defined(SYNCBN_AVX2)
  return bit_cast<Real<float>>(_mm256_cvtph_ps(bit_cast<__m128i>(shorts)));
#else
  return from_half(__builtin_convertvector(shorts, Nat<float>));
#endif
}

template <class L>
SYNCBN_INLINE void store(double* p, Real<double> value, L lanes) {
  store_lanes(p, value, lanes);
}
template <class L>
SYNCBN_INLINE void store(float* p, Real<float> value, L lanes) {
  store_lanes(p, value, lanes);
}
template <class L>
SYNCBN_INLINE void store(BFloat16* p, Real<float> value, L lanes) {
  const Nat<float> bits = bit_cast<Nat<float>>(value);
  const Nat<float> rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const Nat<float> nan = Nat<float>{} + 0x7fc0u;  // the carry of a NaN could end as an Inf
  store_lanes(&p->bits, __builtin_convertvector(value == value ? rounded : nan, Vectors<float>::Short), lanes);
}
#if defined(SYNCBN_AVX512) || defined(SYNCBN_AVX2)
constexpr int kToNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
#endif

template <class L>
SYNCBN_INLINE void store(Float16* p, Real<float> value, L lanes) {
#if defined(SYNCBN_AVX512)
  const auto shorts = bit_cast<Vectors<float>::Short>(_mm512_cvtps_ph(bit_cast<__m512>(value), kToNearest));
#elif defined(SYNCBN_AVX2)
  const auto shorts = bit_cast<Vectors<float>::Short>(_mm256_cvtps_ph(bit_cast<__m256>(value), kToNearest));
#else
  const auto shorts = __builtin_convertvector(to_half(value), Vectors<float>::Short);
#endif
  store_lanes(&p->bits, shorts, lanes);
}

// Which lanes count: those whose byte of the mask is not 0; beyond the span none.
template <class A, class L>
SYNCBN_INLINE Int<A> load_mask(const uint8_t* p, L lanes) {
  const auto bytes = load_lanes<typename Vectors<A>::Byte>(p, lanes);
  return __builtin_convertvector(bytes, Int<A>) != 0;
}

template <class A>
SYNCBN_INLINE Real<A> select(Int<A> condition, Real<A> yes, Real<A> no) {
  return condition ? yes : no;
}

// Zeros in the lanes that are not meant.
template <class A>
SYNCBN_INLINE Real<A> keep(Real<A> value, All) {
  return value;
}
template <class A>
SYNCBN_INLINE Real<A> keep(Real<A> value, First lanes) {
  return select<A>(lanes_before<A>(lanes.count), value, Real<A>{});
}
template <class A>
SYNCBN_INLINE Real<A> keep(Real<A> value, Last lanes) {
  return select<A>(lanes_before<A>(kWidth<A> - lanes.count), Real<A>{}, value);
}

SYNCBN_INLINE HalfOfDoubles widen(Real<float> value, int half) {
  HalfOfFloats part;
  memcpy(&part, reinterpret_cast<const char*>(&value) + half * sizeof(part), sizeof(part));
  return __builtin_convertvector(part, HalfOfDoubles);
}

// The sum of all lanes, in float64.
SYNCBN_INLINE double sum_lanes(Real<double> value) {
  double sum = 0;
  for (int i = 0; i < kWidth<double>; ++i) sum += value[i];
  return sum;
}
SYNCBN_INLINE double sum_lanes(Real<float> value) { return sum_lanes(widen(value, 0) + widen(value, 1)); }

// e^x to about 1 ulp: x = n·ln 2 + r, |r| ≤ ln 2 / 2, and the Taylor series of e^r to where its rest is below half an
// ulp. The factor 2^n goes in two halves, so that overflow ends in Inf and underflow in subnormals. NaN stays NaN.
SYNCBN_INLINE Real<float> exp(Real<float> x) {
  x = select<float>(x > 89.0f, broadcast(89.0f), x);
  x = select<float>(x < -104.0f, broadcast(-104.0f), x);
  const Real<float> shifted = x * 0x1.715476p+0f + 0x1.8p23f;  // the integer nearest to x / ln 2 in its low bits
  const Real<float> n = shifted - 0x1.8p23f;
  const Real<float> r = (x - n * 0x1.63p-1f) + n * 0x1.bd0106p-13f;  // ln 2 as a part of few bits and a rest
  Real<float> p = r * (1.0f / 5040) + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r * r + r + 1.0f;
  const Int<float> exponent = bit_cast<Int<float>>(shifted) - 0x4b400000;
  const Int<float> half = exponent >> 1;
  return p * bit_cast<Real<float>>((half + 127) << 23) * bit_cast<Real<float>>((exponent - half + 127) << 23);
}
SYNCBN_INLINE Real<double> exp(Real<double> x) {
  x = select<double>(x > 710.0, broadcast(710.0), x);
  x = select<double>(x < -746.0, broadcast(-746.0), x);
  const Real<double> shifted = x * 0x1.71547652b82fep+0 + 0x1.8p52;
  const Real<double> n = shifted - 0x1.8p52;
  const Real<double> r = (x - n * 0x1.62e4p-1) - n * 0x1.7f7d1cf79abcap-20;
  Real<double> p = r * (1.0 / 6227020800) + 1.0 / 479001600;
  p = p * r + 1.0 / 39916800;
  p = p * r + 1.0 / 3628800;
  p = p * r + 1.0 / 362880;
  p = p * r + 1.0 / 40320;
  p = p * r + 1.0 / 5040;
  p = p * r + 1.0 / 720;
  p = p * r + 1.0 / 120;
  p = p * r + 1.0 / 24;
  p = p * r + 1.0 / 6;
  p = p * r + 0.5;
  p = p * r * r + r + 1.0;
  const Int<double> exponent = bit_cast<Int<double>>(shifted) - 0x4338000000000000;
  const Int<double> half = exponent >> 1;
  return p * bit_cast<Real<double>>((half + 1023) << 52) * bit_cast<Real<double>>((exponent - half + 1023) << 52);
}

}  // namespace
