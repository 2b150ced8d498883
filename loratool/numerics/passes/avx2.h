/* Vectors by AVX2, FMA and F16C. What is plain arithmetic is written with the compiler's vectors. */
#include <cpuid.h>
#include <immintrin.h>
/* for the functions of the passes only: the module is also loaded where the processor lacks them, and says so */
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,bmi,bmi2,popcnt"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi,bmi2,popcnt")
#endif

#define VECTORS "avx2"
enum { WIDTH = 8 }; /* numbers of 32 bits in a vector */
typedef uint32_t words __attribute__((vector_size(32)));
typedef float floats __attribute__((vector_size(32)));
typedef double doubles __attribute__((vector_size(32)));
typedef int32_t ints __attribute__((vector_size(32)));
typedef int64_t longs __attribute__((vector_size(32)));

/* Put a double through a register, so that it is rounded there and not made part of an FMA. */
INLINE double rounded(double x) { __asm__("" : "+x"(x)); return x; }

INLINE float value_fp16(uint32_t pattern) { return _cvtsh_ss((unsigned short)pattern); }
INLINE uint32_t nearest_fp16(double x) { return _cvtss_sh((float)x, _MM_FROUND_TO_NEAREST_INT); }

/* Patterns of 16 bits, each as a word */
INLINE words load_16(const uint16_t *from) {
  return (words)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)from));
}
INLINE void store_16(uint16_t *to, words x) {
  const __m128i low = _mm256_castsi256_si128((__m256i)x), high = _mm256_extracti128_si256((__m256i)x, 1);
  _mm_storeu_si128((__m128i *)to, _mm_packus_epi32(low, high));
}

/* Numbers of fp16: read them and their patterns; round to them; and write what they are rounded to */
INLINE floats load_fp16(const uint16_t *from, words *patterns) {
  const __m128i x = _mm_loadu_si128((const __m128i *)from);
  *patterns = (words)_mm256_cvtepu16_epi32(x);
  return (floats)_mm256_cvtph_ps(x);
}
INLINE words nearests_fp16(floats x) {
  return (words)_mm256_cvtepu16_epi32(_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT));
}
INLINE floats store_fp16(uint16_t *to, floats x, words *patterns) {
  _mm_storeu_si128((__m128i *)to, _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT));
  return load_fp16(to, patterns);
}

INLINE void to_double(floats x, doubles *to) {
  to[0] = (doubles)_mm256_cvtps_pd(_mm256_castps256_ps128((__m256)x));
  to[1] = (doubles)_mm256_cvtps_pd(_mm256_extractf128_ps((__m256)x, 1));
}
INLINE floats of_double(const doubles *x) {
  return (floats)_mm256_set_m128(_mm256_cvtpd_ps((__m256d)x[1]), _mm256_cvtpd_ps((__m256d)x[0]));
}

INLINE words larger(words x, words y) { return (words)_mm256_max_epu32((__m256i)x, (__m256i)y); }

/* The highest bit of each word */
INLINE uint32_t mask_of(words x) { return (uint32_t)_mm256_movemask_ps((__m256)x); }

/* x[order[0]], x[order[1]], ... */
INLINE words permute(words x, words order) {
  return (words)_mm256_permutevar8x32_epi32((__m256i)x, (__m256i)order);
}

typedef unsigned modes;
INLINE modes get_modes(void) { return _mm_getcsr(); }
INLINE void set_modes(modes x) { _mm_setcsr(x); }
/* rounding to nearest, no subnormal flushed, no trap */
enum { MODES = 0x1f80 };

static const char *missing(void) {
  unsigned a, b, c, d;
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2")) return "no AVX2";
  if (!__builtin_cpu_supports("fma")) return "no FMA";
  if (!__builtin_cpu_supports("bmi2")) return "no BMI2";
  return __get_cpuid(1, &a, &b, &c, &d) && c & bit_F16C ? NULL : "no F16C";
}
