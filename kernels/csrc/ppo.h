// The PPO objective of all terms with its metrics and gradients, in one pass over the actions.

constexpr int64_t kPpoBlock = 1024;

template <class C> struct PpoBlock {  // one block's inputs; terms that are not used point at neutral entries
  const C *logp, *old_logp, *advantages, *weights, *ref_logp, *entropy, *values, *old_values, *returns;
  const C* kept;  // 1, or 0 where masked: there the inputs are 0 and only ratios and gradients must be told
};

template <class C>
void ppo_block(PpoBlock<C> in, int64_t n, const PpoOptions& o, C inverse, double* sums, C* grad_logp, C* grad_values) {
  const C low = C(1 - o.clip_low), high = C(1 + o.clip_high), dual_clip = C(o.dual_clip), near_by = C(o.value_clip);
  const C kl_coef = C(o.kl_coef), value_scale = C(o.value_coef) * inverse;
  const C k1 = C(o.kl_estimator == 1), k2 = C(o.kl_estimator == 2), with_kl = C(o.kl_coef != 0);
  C policy = 0, value = 0, kl = 0, entropy = 0, ratios = 0, squares = 0, approx = 0, lows = 0, highs = 0, duals = 0, fars = 0;
  // What is chosen from is computed first: a compiler that must not raise floating-point exceptions vectorises only that.
#pragma omp simd reduction(+ : policy, value, kl, entropy, ratios, squares, approx, lows, highs, duals, fars)
  for (int64_t i = 0; i < n; ++i) {
    const C a = in.advantages[i], w = in.weights[i], log_ratio = in.logp[i] - in.old_logp[i], ratio = vexp(log_ratio);
    const C is_low = ratio < low ? C(1) : C(0), is_high = ratio > high ? C(1) : C(0);
    const C up = a > 0 ? C(1) : C(0), down = a < 0 ? C(1) : C(0);
    C term = -smaller(ratio * a, clamp(ratio, low, high) * a);
    C slope = up * is_high + down * is_low > 0 ? C(0) : -ratio * a;
    const C bound = -dual_clip * a, is_dual = down > 0 && term > bound ? C(1) : C(0);
    term = is_dual > 0 ? bound : term;
    slope = is_dual > 0 ? C(0) : slope;

    const C d = in.logp[i] - in.ref_logp[i], shrunk = vexp(-d), tail = exp_minus_line(-d, shrunk);  // exp(-d) - 1 + d
    const C half_square = C(0.5) * d * d, near_slope = d - tail, far_slope = C(1) - shrunk;  // 1 - exp(-d), also of infinite d
    const C other_term = k2 > 0 ? half_square : tail, kl_term = k1 > 0 ? d : other_term;
    const C k3_slope = d * d < C(0.25) ? near_slope : far_slope;
    const C other_slope = k2 > 0 ? d : k3_slope, kl_slope = k1 > 0 ? C(1) : other_slope;

    const C v = in.values[i], r = in.returns[i], moved = v - in.old_values[i];
    const C near_v = in.old_values[i] + clamp(moved, -near_by, near_by), far = (v - r) * (v - r), close = (near_v - r) * (near_v - r);
    const C outside = moved > near_by || moved < -near_by ? C(1) : C(0), clipped = close > far ? outside : C(0);
    // torch.maximum gives each side half of the gradient where they are equal; inside the clip both sides are V
    const C tie = close == far ? outside * C(0.5) : C(0);

    const C kl_grad = kl_coef * kl_slope, used_kl_grad = with_kl > 0 ? kl_grad : C(0);
    grad_logp[i] = in.kept[i] * inverse * (w * slope + used_kl_grad);
    grad_values[i] = value_scale * (v - r) * (C(1) - clipped - tie);
    policy += w * term;
    value += C(0.5) * larger(close, far);  // where V_old is NaN, close is
    kl += kl_term;
    entropy += in.entropy[i];
    ratios += in.kept[i] * ratio;
    squares += in.kept[i] * ratio * ratio;
    approx += exp_minus_line(log_ratio, ratio);
    lows += is_low * down;
    highs += is_high * up;
    duals += is_dual;
    fars += clipped;
  }
  const C metrics[kPpoSums - 1] = {policy, value, kl, entropy, ratios, squares, approx, lows, highs, duals, fars};
  for (int k = 0; k + 1 < kPpoSums; ++k) sums[k + 1] = double(metrics[k]);
  sums[0] = sums[1] + o.value_coef * sums[2] + (o.kl_coef ? o.kl_coef * sums[3] : 0.0) -
            (o.entropy_coef ? o.entropy_coef * sums[4] : 0.0);
}

template <class C>
void ppo_of(PpoInputs in, int64_t actions, PpoOptions o, double inverse, void* loss, void* metrics, void* grad_logp,
            void* grad_values, int threads) {
  const int64_t blocks = (actions + kPpoBlock - 1) / kPpoBlock;
  double* partial = new double[(blocks > 0 ? blocks : 1) * kPpoSums];
  static const C zeros[kPpoBlock] = {};
  C ones[kPpoBlock];
  for (int64_t i = 0; i < kPpoBlock; ++i) ones[i] = 1;
#pragma omp parallel for schedule(static) num_threads(threads) if (actions > kManyActions / 2)
  for (int64_t k = 0; k < blocks; ++k) {
    const int64_t b = k * kPpoBlock, n = smaller(kPpoBlock, actions - b);
    C unmasked[10][kPpoBlock];  // an input's copy with 0 where it is masked, whatever stands there
    int copies = 0;
    auto part = [&](const void* p, const C* neutral) {
      if (!p) return neutral;
      const C* x = static_cast<const C*>(p) + b;
      if (!in.mask) return x;
      C* copy = unmasked[copies++];
      for (int64_t i = 0; i < n; ++i) copy[i] = in.mask[b + i] ? x[i] : C(0);
      return static_cast<const C*>(copy);
    };
    const C *logp = part(in.logp, zeros), *values = part(in.values, zeros);
    PpoBlock<C> block{logp, part(in.old_logp, zeros), part(in.advantages, zeros), part(in.weights, ones),
                      part(in.ref_logp, logp), part(in.entropy, zeros), values, part(in.old_values, zeros),
                      part(in.returns, values), ones};
    if (in.mask) {
      for (int64_t i = 0; i < n; ++i) unmasked[copies][i] = in.mask[b + i] ? C(1) : C(0);
      block.kept = unmasked[copies];
    }
    C unused[kPpoBlock];
    C* to_values = grad_values ? static_cast<C*>(grad_values) + b : unused;
    ppo_block(block, n, o, C(inverse), partial + k * kPpoSums,
              static_cast<C*>(grad_logp) + b, to_values);
  }
  for (int j = 0; j < kPpoSums; ++j) {  // in order: the same bits for any number of threads
    double total = 0;
    for (int64_t k = 0; k < blocks; ++k) total += partial[k * kPpoSums + j];
    if (j == 0)
      *static_cast<C*>(loss) = C(total * inverse);
    else
      static_cast<C*>(metrics)[j - 1] = C(total);
  }
  delete[] partial;
}
