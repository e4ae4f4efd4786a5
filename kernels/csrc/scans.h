// Packed generalised advantage estimation and whitening statistics.

constexpr int64_t kManyActions = 1 << 17;  // as kManyEntries: half a millisecond

template <class C>
void gae_of(const void* rewards_, const void* values_, const int64_t* starts, const void* lam_, const void* bootstrap_,
            const uint8_t* mask, double gamma_, int64_t sequences, void* advantages_, void* returns_, int threads) {
  auto rewards = static_cast<const C*>(rewards_), values = static_cast<const C*>(values_);
  auto lam = static_cast<const C*>(lam_), bootstrap = static_cast<const C*>(bootstrap_);
  auto advantages = static_cast<C*>(advantages_), returns = static_cast<C*>(returns_);
  const C gamma = C(gamma_);
#pragma omp parallel for schedule(dynamic, 4) num_threads(threads) if (starts[sequences] > kManyActions)
  for (int64_t b = 0; b < sequences; ++b) {
    const C decay = gamma * lam[b];
    C next_value = bootstrap ? bootstrap[b] : C(0), advantage = 0;
    for (int64_t t = starts[b + 1] - 1; t >= starts[b]; --t) {
      if (mask && !mask[t]) {  // transparent: its neighbours see each other across it
        advantages[t] = 0;
        returns[t] = values[t];
        continue;
      }
      advantage = (rewards[t] + gamma * next_value - values[t]) + decay * advantage;
      advantages[t] = advantage;
      returns[t] = advantage + values[t];
      next_value = values[t];
    }
  }
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
