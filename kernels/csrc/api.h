// The C ABI of the native backend: plain pointers and sizes, so that one library serves every Python and torch.
// Compute is fp32, or fp64 for fp64 inputs. Equations: tppo_kernels/reference.py.
#pragma once
#include <cstdint>

enum Dtype : int32_t { kFloat32 = 0, kFloat64 = 1, kBFloat16 = 2, kFloat16 = 3 };
constexpr int64_t kBytes[] = {4, 8, 2, 2};

// z = softcap * tanh(scale * x / softcap) / temperature; softcap 0 means none.
struct LogitOptions {
  double temperature, softcap, scale;
};

struct Logits {
  void* data;
  int64_t rows, vocab, stride;  // stride in entries between rows; a row is contiguous
  int32_t dtype;
};

struct PpoInputs {  // all [actions]; null where the term is not used
  const void *logp, *old_logp, *advantages, *weights, *ref_logp, *entropy, *values, *old_values, *returns;
  const uint8_t* mask;
};

struct PpoOptions {
  double clip_low, clip_high, dual_clip, kl_coef, entropy_coef, value_coef, value_clip;
  int32_t kl_estimator;  // 1, 2 or 3
};

constexpr int64_t kIgnored = -100;  // a target: the row's results and gradient are 0

constexpr int kPpoSums = 12;  // the loss, then the metrics in the reference's order

// One instruction set's kernels. Row pointers have the compute type: double for fp64 logits, else float.
struct Kernels {
  int64_t (*row_forward)(Logits, const int64_t* targets, void* logp, void* entropy, void* lse, LogitOptions, int threads);
  void (*row_backward)(Logits, const int64_t* targets, const void* logp, const void* entropy, const void* lse,
                       const void* grad_logp, const void* grad_entropy, Logits out, LogitOptions, int threads);
  int64_t (*gae)(int32_t dtype, const void* rewards, const void* values, const int64_t* starts, const void* lams,
                 const void* bootstrap, const uint8_t* mask, double gamma, double lam, int64_t sequences, int64_t actions,
                 void* advantages, void* returns, int threads);  // lams null: lam for all
  void (*stats)(int32_t dtype, const void* x, const uint8_t* mask, int64_t count, void* out, int threads);
  void (*ppo)(int32_t dtype, PpoInputs, int64_t actions, PpoOptions, double inverse_normalizer, void* loss, void* metrics,
              void* grad_logp, void* grad_values, int threads);
};
