// Scalar functions that a compiler vectorises: no branches, no library calls for float. Included once per instruction
// set inside an unnamed namespace, so that no copy compiled for a newer processor can be shared with an older one.

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <class T> struct ComputeOf {
  using type = float;
};
template <> struct ComputeOf<double> {
  using type = double;
};
template <class T> using Compute = typename ComputeOf<T>::type;

inline float as_float(uint32_t bits) {
  float x;
  __builtin_memcpy(&x, &bits, 4);
  return x;
}
inline uint32_t as_bits(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  return bits;
}

inline float load(float x) { return x; }
inline double load(double x) { return x; }
inline float load(BFloat16 x) { return as_float(uint32_t(x.bits) << 16); }
inline float load(Float16 x) {
  uint32_t magnitude = uint32_t(x.bits & 0x7fffu) << 13, sign = uint32_t(x.bits & 0x8000u) << 16;
  uint32_t finite = as_bits(as_float(magnitude) * 0x1p112f);  // moves the exponent bias from 15 to 127
  return as_float(sign | (magnitude >= 0x0f800000u ? magnitude | 0x7f800000u : finite));
}

inline void store(float& out, float x) { out = x; }
inline void store(double& out, double x) { out = x; }
inline void store(BFloat16& out, float x) {  // to nearest, ties to even
  uint32_t u = as_bits(x), rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  out.bits = uint16_t(x != x ? 0x7fc0u : rounded);
}
inline void store(Float16& out, float x) {  // to nearest, ties to even
  uint32_t u = as_bits(x), sign = (u >> 16) & 0x8000u, a = u & 0x7fffffffu;
  uint32_t normal = ((a + 0xfffu + ((a >> 13) & 1u)) >> 13) - (112u << 10);
  uint32_t subnormal = as_bits(as_float(a) + 0.5f) - 0x3f000000u;  // 0.5's last place is half's smallest step
  uint32_t h = a < 0x38800000u ? subnormal : normal;
  h = a >= 0x477ff000u ? 0x7c00u : h;
  h = a > 0x7f800000u ? 0x7e00u : h;
  out.bits = uint16_t(sign | h);
}

// exp(r) - 1 - r over r * r, for |r| <= 0.35 (Cephes' minimax polynomial; the error of exp is about 1e-7 relative).
inline float exp_tail(float r) {
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  return p * r + 5.0000001201e-1f;
}

// exp, exactly 0 below -87.3 (no denormals) and infinite above 88.7. NaN stays NaN.
inline float vexp(float x) {
  float c = x < -88.0f ? -88.0f : x;
  c = c > 88.72283f ? 88.72283f : c;
  float n = c * 1.44269504088896341f + 12582912.0f;  // 1.5 * 2^23: rounds to the nearest integer
  n -= 12582912.0f;
  float r = (c - n * 0.693359375f) + n * 2.12194440e-4f;  // log 2 in two parts
  float y = exp_tail(r) * r * r + r + 1.0f;
  int32_t k = int32_t(n) - 1;  // in two steps, so that 2^128 is never formed
  y = y * as_float(uint32_t(k + 127) << 23) * 2.0f;
  y = x < -87.3365f ? 0.0f : y;
  return x > 88.72283f ? __builtin_inff() : y;
}
inline double vexp(double x) { return __builtin_exp(x); }

// exp(x) - 1 - x without cancellation near 0; y is exp(x).
inline float exp_minus_line(float x, float y) {
  float inside = x > -0.35f ? (x < 0.35f ? x : 0.35f) : -0.35f;
  return x == inside ? exp_tail(x) * x * x : y - 1.0f - x;
}
inline double exp_minus_line(double x, double) { return __builtin_expm1(x) - x; }

inline float vtanh(float x) {
  float a = x < 0.0f ? -x : x, s = x * x;
  float p = -5.70498872745e-3f;  // Cephes' odd polynomial below 0.625
  p = p * s + 2.06390887954e-2f;
  p = p * s - 5.37397155531e-2f;
  p = p * s + 1.33314422036e-1f;
  p = p * s - 3.33332819422e-1f;
  float small = p * s * x + x;
  float t = 1.0f - 2.0f / (vexp(2.0f * a) + 1.0f);
  float large = x < 0.0f ? -t : t;
  return a < 0.625f ? small : large;
}
inline double vtanh(double x) { return __builtin_tanh(x); }

template <class C> inline C smaller(C a, C b) { return b < a ? b : a; }
template <class C> inline C larger(C a, C b) { return b > a ? b : a; }
template <class C> inline C clamp(C x, C low, C high) {  // NaN stays NaN
  x = x < low ? low : x;
  return x > high ? high : x;
}
