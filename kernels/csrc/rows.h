// Row kernels over logits: one read for log-probability and entropy, and the gradient, possibly over its own input.

constexpr int64_t kBlock = 2048;  // entries of a row that are transformed at once: 8 KiB of fp32, inside L1
constexpr int64_t kSummed = 256;  // entries added up in C before double takes over: a lane that holds 1 rounds each later one
constexpr int64_t kManyEntries = 1 << 20;  // half a millisecond: below it a thread team costs more than it saves

template <class C> struct Transform {  // logits -> z, and dz -> dlogits
  C factor, cap, inner, outer;  // z = factor * x, or outer * tanh(inner * x)
  explicit Transform(const LogitOptions& o)
      : factor(C(o.scale / o.temperature)), cap(C(o.softcap)), inner(C(o.softcap > 0 ? o.scale / o.softcap : 0)),
        outer(C(o.softcap / o.temperature)) {}
  inline C z(C x) const { return cap > 0 ? outer * vtanh(inner * x) : factor * x; }
};

// z of one block, and its largest value (NaN never is).
template <class T, class C> inline C transform_block(const T* x, int64_t n, const Transform<C>& f, C* z) {
  C top = -__builtin_inff();
  if (f.cap > 0) {
#pragma omp simd reduction(max : top)
    for (int64_t j = 0; j < n; ++j) {
      z[j] = f.outer * vtanh(f.inner * load(x[j]));
      top = z[j] > top ? z[j] : top;
    }
  } else {
#pragma omp simd reduction(max : top)
    for (int64_t j = 0; j < n; ++j) {
      z[j] = f.factor * load(x[j]);
      top = z[j] > top ? z[j] : top;
    }
  }
  return top;
}

template <class C> struct RowResult {
  C logp, entropy, lse;
};

// With m the largest z: s = sum exp(z - m) and w = sum exp(z - m) (z - m), rescaled whenever a block raises m.
template <class T> inline RowResult<Compute<T>> forward_row(const T* x, int64_t vocab, int64_t y, Transform<Compute<T>> f) {
  using C = Compute<T>;
  if (y == kIgnored) return {0, 0, 0};
  C z[kBlock];
  C m = -__builtin_inff();
  double s = 0.0, w = 0.0;
  for (int64_t b = 0; b < vocab; b += kBlock) {
    int64_t n = smaller(kBlock, vocab - b);
    C top = transform_block(x + b, n, f, z);
    if (top > m) {
      double shift = double(m) - double(top), scale = s > 0.0 ? __builtin_exp(shift) : 1.0;
      if (s > 0.0) w = scale * (w + s * shift);
      s *= scale;  // 0 stays 0 and NaN stays NaN
      m = top;
    }
    C origin = m > -__builtin_inff() ? m : C(0);  // a block of -inf adds 0, a NaN adds NaN
    for (int64_t first = 0; first < n; first += kSummed) {
      C bs = 0, bw = 0;
#pragma omp simd reduction(+ : bs, bw)
      for (int64_t j = first; j < smaller(first + kSummed, n); ++j) {
        C d = z[j] - origin, e = vexp(d);
        bs += e;
        bw += e * (d < C(-1e3) ? C(-1e3) : d);  // 0 * -inf is 0 here
      }
      s += double(bs);
      w += double(bw);
    }
  }
  double log_s = __builtin_log(s);  // -inf for a row of -inf: every output is then NaN, as in the reference
  return {C(double(f.z(load(x[y])) - m) - log_s), C(log_s - w / s), C(double(m) + log_s)};
}

// dx_j = dz_j dz/dx with dz_j = c (1[j = y] - p_j) - e p_j (log p_j + H); a row that is ignored, or has
// c = e = 0, is exactly 0.
template <class T>
inline void backward_row(const T* x, int64_t vocab, int64_t y, RowResult<Compute<T>> row, Compute<T> c, Compute<T> e,
                         Transform<Compute<T>> f, T* out) {
  using C = Compute<T>;
  if ((c == 0 && e == 0) || y == kIgnored) {
    for (int64_t j = 0; j < vocab; ++j) store(out[j], C(0));
    return;
  }
  const C xy = load(x[y]), offset = c + e * row.entropy, lse = row.lse;
  if (f.cap > 0) {
    const C slope = f.inner * f.outer;
#pragma omp simd
    for (int64_t j = 0; j < vocab; ++j) {
      C t = vtanh(f.inner * load(x[j])), d = f.outer * t - lse;
      d = d < C(-1e3) ? C(-1e3) : d;
      store(out[j], -vexp(d) * (offset + e * d) * slope * (1 - t * t));
    }
  } else {
    const C slope = f.factor;
#pragma omp simd
    for (int64_t j = 0; j < vocab; ++j) {
      C d = f.factor * load(x[j]) - lse;
      d = d < C(-1e3) ? C(-1e3) : d;
      store(out[j], -vexp(d) * (offset + e * d) * slope);
    }
  }
  C t = f.cap > 0 ? vtanh(f.inner * xy) : C(0), slope = f.cap > 0 ? f.inner * f.outer * (1 - t * t) : f.factor;
  C logp = row.logp < C(-1e3) ? C(-1e3) : row.logp;  // the target: 1 - p without cancellation
  store(out[y], slope * C(-double(c) * __builtin_expm1(double(logp)) - double(e * vexp(logp) * (logp + row.entropy))));
}

// Returns the first row whose target is outside of the vocabulary, or -1.
template <class T>
int64_t row_forward_of(Logits in, const int64_t* targets, void* logp, void* entropy, void* lse, LogitOptions options, int threads) {
  using C = Compute<T>;
  for (int64_t i = 0; i < in.rows; ++i)
    if (targets[i] != kIgnored && (targets[i] < 0 || targets[i] >= in.vocab)) return i;
  const Transform<C> f(options);
#pragma omp parallel for schedule(static) num_threads(threads) if (in.rows * in.vocab > kManyEntries)
  for (int64_t i = 0; i < in.rows; ++i) {
    auto row = forward_row(static_cast<const T*>(in.data) + i * in.stride, in.vocab, targets[i], f);
    static_cast<C*>(logp)[i] = row.logp;
    static_cast<C*>(entropy)[i] = row.entropy;
    static_cast<C*>(lse)[i] = row.lse;
  }
  return -1;
}

template <class T>
void row_backward_of(Logits in, const int64_t* targets, const void* logp, const void* entropy, const void* lse,
                     const void* grad_logp, const void* grad_entropy, Logits out, LogitOptions options, int threads) {
  using C = Compute<T>;
  const Transform<C> f(options);
  auto at = [](const void* p, int64_t i) { return p ? static_cast<const C*>(p)[i] : C(0); };
#pragma omp parallel for schedule(static) num_threads(threads) if (in.rows * in.vocab > kManyEntries)
  for (int64_t i = 0; i < in.rows; ++i) {
    RowResult<C> row{at(logp, i), at(entropy, i), at(lse, i)};
    backward_row(static_cast<const T*>(in.data) + i * in.stride, in.vocab, targets[i], row, at(grad_logp, i),
                 at(grad_entropy, i), f, static_cast<T*>(out.data) + i * out.stride);
  }
}
