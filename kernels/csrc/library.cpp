// The exported functions: the best instruction set this processor has, chosen when the library is loaded.
#include <atomic>
#include <cstring>

#include "api.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

#if defined(_WIN32)
#define EXPORT extern "C" __declspec(dllexport)
#else
#define EXPORT extern "C" __attribute__((visibility("default")))
#endif

extern const Kernels kernels_baseline;
#ifdef TPPO_X86
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
#endif

namespace {
struct Set {
  const char* name;
  const Kernels* kernels;
};

bool supported(const char* name) {
#ifdef TPPO_X86
  __builtin_cpu_init();
  bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (!std::strcmp(name, "avx2")) return avx2;
  if (!std::strcmp(name, "avx512"))
    return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512cd");
#endif
  return !std::strcmp(name, "baseline");
}

const Set kSets[] = {
#ifdef TPPO_X86
    {"avx512", &kernels_avx512},
    {"avx2", &kernels_avx2},
#endif
    {"baseline", &kernels_baseline},
};

const Set* best() {
  for (const Set& set : kSets)
    if (supported(set.name)) return &set;
  return nullptr;
}

// Large new memory comes without pages: the first write to each 4 KiB of it stops in the kernel, which took three times
// as long as computing a gradient. Pages of 2 MiB stop 512 times less often. A hint: refusing it changes nothing.
void prefer_large_pages(void* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = 4096;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kPage - 1) / kPage * kPage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + uintptr_t(bytes)) / kPage * kPage;
  if (bytes >= int64_t(1) << 23) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

std::atomic<const Set*> chosen{best()};
const Kernels& kernels() { return *chosen.load()->kernels; }
}  // namespace

EXPORT int tppo_abi_version() { return 3; }
EXPORT const char* tppo_simd() { return chosen.load()->name; }

// Chooses an instruction set by name; returns 0 when this processor or build does not have it.
EXPORT int tppo_select_simd(const char* name) {
  for (const Set& set : kSets) {
    if (!std::strcmp(set.name, name) && supported(name)) {
      chosen.store(&set);
      return 1;
    }
  }
  return 0;
}

EXPORT int64_t tppo_row_forward(const Logits* in, const int64_t* targets, void* logp, void* entropy, void* lse,
                                const LogitOptions* options, int threads) {
  return kernels().row_forward(*in, targets, logp, entropy, lse, *options, threads);
}

EXPORT void tppo_row_backward(const Logits* in, const int64_t* targets, const void* logp, const void* entropy, const void* lse,
                              const void* grad_logp, const void* grad_entropy, const Logits* out, const LogitOptions* options,
                              int threads) {
  if (out->data != in->data) prefer_large_pages(out->data, (out->rows - 1) * out->stride * kBytes[out->dtype]);
  kernels().row_backward(*in, targets, logp, entropy, lse, grad_logp, grad_entropy, *out, *options, threads);
}

EXPORT int64_t tppo_gae(int32_t dtype, const void* rewards, const void* values, const int64_t* starts, const void* lams,
                        const void* bootstrap, const uint8_t* mask, double gamma, double lam, int64_t sequences,
                        int64_t actions, void* advantages, void* returns, int threads) {
  return kernels().gae(dtype, rewards, values, starts, lams, bootstrap, mask, gamma, lam, sequences, actions, advantages,
                       returns, threads);
}

EXPORT void tppo_stats(int32_t dtype, const void* x, const uint8_t* mask, int64_t count, void* out, int threads) {
  kernels().stats(dtype, x, mask, count, out, threads);
}

EXPORT void tppo_ppo(int32_t dtype, const PpoInputs* in, int64_t actions, const PpoOptions* options, double inverse_normalizer,
                     void* loss, void* metrics, void* grad_logp, void* grad_values, int threads) {
  kernels().ppo(dtype, *in, actions, *options, inverse_normalizer, loss, metrics, grad_logp, grad_values, threads);
}
