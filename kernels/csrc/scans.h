// Packed generalised advantage estimation and whitening statistics.

constexpr int64_t kManyActions = 1 << 17;  // as kManyEntries: half a millisecond

constexpr int64_t kLinks = 16;    // entries in a vector of the widest set
constexpr int64_t kPiece = 1024;  // entries that stay in the first cache

// One sequence, without a mask. a[t] = delta[t] + decay a[t + 1] is a chain that waits for every multiplication. Four rounds of
// delta[t] += decay^s delta[t + s], s = 1, 2, 4, 8, leave a[t] = delta[t] + decay^16 a[t + 16]: sixteen chains side by side.
template <class C>
void gae_sequence(const C* rewards, const C* values, int64_t count, C gamma, C decay, C next_value, C* advantages, C* returns) {
  C delta[kPiece + kLinks], advantage = 0;
  for (int64_t end = count; end > 0;) {
    const int64_t begin = larger(end - kPiece, int64_t(0)), n = end - begin;
    const C *r = rewards + begin, *v = values + begin;
    for (int64_t i = 0; i < n - 1; ++i) delta[i] = (r[i] + gamma * v[i + 1]) - v[i];
    delta[n - 1] = (r[n - 1] + gamma * next_value - v[n - 1]) + decay * advantage;
    for (int64_t i = n; i < n + kLinks; ++i) delta[i] = 0;
    C power = decay;
    for (int64_t step = 1; step < kLinks; step *= 2, power *= power) {
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) delta[i] += power * delta[i + step];  // ahead: not yet changed
    }
    int64_t i = n - kLinks;
    for (; i >= 0; i -= kLinks) {
#pragma omp simd
      for (int64_t j = 0; j < kLinks; ++j) delta[i + j] += power * delta[i + kLinks + j];
    }
    for (int64_t j = 0; j < i + kLinks; ++j) delta[j] += power * delta[j + kLinks];
    advantage = delta[0];
    next_value = v[0];
    for (i = 0; i < n; ++i) {
      advantages[begin + i] = delta[i];
      returns[begin + i] = delta[i] + v[i];
    }
    end = begin;
  }
}

// Masked entries are transparent: their neighbours see each other across them.
template <class C>
void gae_masked(const C* rewards, const C* values, const uint8_t* mask, int64_t count, C gamma, C decay, C next_value,
                C* advantages, C* returns) {
  C advantage = 0;
  for (int64_t t = count - 1; t >= 0; --t) {
    const C value = values[t];
    if (mask[t]) {
      advantage = (rewards[t] + gamma * next_value - value) + decay * advantage;
      next_value = value;
    }
    advantages[t] = mask[t] ? advantage : C(0);
    returns[t] = advantages[t] + value;
  }
}

// Returns the first sequence that ends before it starts, or outside of the actions; -1 when there is none and all was computed.
template <class C>
int64_t gae_of(const void* rewards_, const void* values_, const int64_t* starts, const void* lams_, const void* bootstrap_,
               const uint8_t* mask, double gamma_, double lam, int64_t sequences, int64_t actions, void* advantages_,
               void* returns_, int threads) {
  auto rewards = static_cast<const C*>(rewards_), values = static_cast<const C*>(values_);
  auto lams = static_cast<const C*>(lams_), bootstrap = static_cast<const C*>(bootstrap_);
  auto advantages = static_cast<C*>(advantages_), returns = static_cast<C*>(returns_);
  if (starts[0] != 0 || starts[sequences] != actions) return 0;
  for (int64_t b = 0; b < sequences; ++b)
    if (starts[b] > starts[b + 1]) return b;
  const C gamma = C(gamma_);
#pragma omp parallel for schedule(dynamic, 4) num_threads(threads) if (actions > kManyActions)
  for (int64_t b = 0; b < sequences; ++b) {
    const int64_t first = starts[b], count = starts[b + 1] - first;
    const C decay = gamma * (lams ? lams[b] : C(lam)), end = bootstrap ? bootstrap[b] : C(0);
    if (mask)
      gae_masked(rewards + first, values + first, mask + first, count, gamma, decay, end, advantages + first, returns + first);
    else
      gae_sequence(rewards + first, values + first, count, gamma, decay, end, advantages + first, returns + first);
  }
  return -1;
}

// sum over i of f(i) in blocks of fixed size, added up in order: the same bits for any number of threads.
template <class F> double blocked_sum(int64_t count, int threads, F f) {
  constexpr int64_t block = 8192;
  const int64_t blocks = (count + block - 1) / block;
  double* partial = new double[blocks > 0 ? blocks : 1];
#pragma omp parallel for schedule(static) num_threads(threads) if (count > kManyActions)
  for (int64_t k = 0; k < blocks; ++k) {
    double sum = 0;
    const int64_t end = smaller(count, (k + 1) * block);
#pragma omp simd reduction(+ : sum)
    for (int64_t i = k * block; i < end; ++i) sum += f(i);
    partial[k] = sum;
  }
  double total = 0;
  for (int64_t k = 0; k < blocks; ++k) total += partial[k];
  delete[] partial;
  return total;
}

// out = (count, mean, sum of squared deviations) of the unmasked entries.
template <class C> void stats_of(const void* x_, const uint8_t* mask, int64_t count, void* out_, int threads) {
  auto x = static_cast<const C*>(x_);
  auto out = static_cast<C*>(out_);
  double kept = mask ? blocked_sum(count, threads, [=](int64_t i) { return mask[i] ? 1.0 : 0.0; }) : double(count);
  auto entry = [=](int64_t i) { return mask && !mask[i] ? 0.0 : double(x[i]); };
  const double mean = blocked_sum(count, threads, entry) / larger(kept, 1.0);
  auto squared = [=](int64_t i) {
    double d = double(x[i]) - mean;
    return mask && !mask[i] ? 0.0 : d * d;
  };
  out[0] = C(kept);
  out[1] = C(mean);
  out[2] = C(blocked_sum(count, threads, squared));
}
