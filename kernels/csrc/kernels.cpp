// One instruction set's kernels. CMake compiles this file once per set, with TPPO_SET naming the table it defines.
#include "api.h"

namespace {
#include "simd_math.h"
#include "rows.h"
#include "scans.h"
#include "ppo.h"

int64_t row_forward(Logits in, const int64_t* targets, void* logp, void* entropy, void* lse, LogitOptions o, int threads) {
  switch (in.dtype) {
    case kFloat64: return row_forward_of<double>(in, targets, logp, entropy, lse, o, threads);
    case kBFloat16: return row_forward_of<BFloat16>(in, targets, logp, entropy, lse, o, threads);
    case kFloat16: return row_forward_of<Float16>(in, targets, logp, entropy, lse, o, threads);
    default: return row_forward_of<float>(in, targets, logp, entropy, lse, o, threads);
  }
}

void row_backward(Logits in, const int64_t* targets, const void* logp, const void* entropy, const void* lse,
                  const void* grad_logp, const void* grad_entropy, Logits out, LogitOptions o, int threads) {
  switch (in.dtype) {
    case kFloat64: return row_backward_of<double>(in, targets, logp, entropy, lse, grad_logp, grad_entropy, out, o, threads);
    case kBFloat16: return row_backward_of<BFloat16>(in, targets, logp, entropy, lse, grad_logp, grad_entropy, out, o, threads);
    case kFloat16: return row_backward_of<Float16>(in, targets, logp, entropy, lse, grad_logp, grad_entropy, out, o, threads);
    default: return row_backward_of<float>(in, targets, logp, entropy, lse, grad_logp, grad_entropy, out, o, threads);
  }
}

int64_t gae(int32_t dtype, const void* rewards, const void* values, const int64_t* starts, const void* lams,
            const void* bootstrap, const uint8_t* mask, double gamma, double lam, int64_t sequences, int64_t actions,
            void* advantages, void* returns, int threads) {
  auto run = dtype == kFloat64 ? gae_of<double> : gae_of<float>;
  return run(rewards, values, starts, lams, bootstrap, mask, gamma, lam, sequences, actions, advantages, returns, threads);
}

void stats(int32_t dtype, const void* x, const uint8_t* mask, int64_t count, void* out, int threads) {
  (dtype == kFloat64 ? stats_of<double> : stats_of<float>)(x, mask, count, out, threads);
}

void ppo(int32_t dtype, PpoInputs in, int64_t actions, PpoOptions o, double inverse, void* loss, void* metrics, void* grad_logp,
         void* grad_values, int threads) {
  (dtype == kFloat64 ? ppo_of<double> : ppo_of<float>)(in, actions, o, inverse, loss, metrics, grad_logp, grad_values, threads);
}
}  // namespace

extern const Kernels TPPO_SET;
const Kernels TPPO_SET = {row_forward, row_backward, gae, stats, ppo};
