/* Vectors by NEON, which every 64-bit ARM has: the functions of avx2.h. */
#include <arm_neon.h>

#define VECTORS "neon"
enum { WIDTH = 4 };
typedef uint32_t words __attribute__((vector_size(16)));
typedef float floats __attribute__((vector_size(16)));
typedef double doubles __attribute__((vector_size(16)));
typedef int32_t ints __attribute__((vector_size(16)));
typedef int64_t longs __attribute__((vector_size(16)));

INLINE double rounded(double x) { __asm__("" : "+w"(x)); return x; }

INLINE float value_fp16(uint32_t pattern) {
  return vgetq_lane_f32(vcvt_f32_f16(vreinterpret_f16_u16(vdup_n_u16((uint16_t)pattern))), 0);
}
INLINE uint32_t nearest_fp16(double x) {
  return vget_lane_u16(vreinterpret_u16_f16(vcvt_f16_f32(vdupq_n_f32((float)x))), 0);
}

INLINE words load_16(const uint16_t *from) { return (words)vmovl_u16(vld1_u16(from)); }
INLINE void store_16(uint16_t *to, words x) { vst1_u16(to, vmovn_u32((uint32x4_t)x)); }

INLINE floats load_fp16(const uint16_t *from, words *patterns) {
  const uint16x4_t x = vld1_u16(from);
  *patterns = (words)vmovl_u16(x);
  return (floats)vcvt_f32_f16(vreinterpret_f16_u16(x));
}
INLINE words nearests_fp16(floats x) {
  return (words)vmovl_u16(vreinterpret_u16_f16(vcvt_f16_f32((float32x4_t)x)));
}
INLINE floats store_fp16(uint16_t *to, floats x, words *patterns) {
  vst1_u16(to, vreinterpret_u16_f16(vcvt_f16_f32((float32x4_t)x)));
  return load_fp16(to, patterns);
}

INLINE void to_double(floats x, doubles *to) {
  to[0] = (doubles)vcvt_f64_f32(vget_low_f32((float32x4_t)x));
  to[1] = (doubles)vcvt_high_f64_f32((float32x4_t)x);
}
INLINE floats of_double(const doubles *x) {
  return (floats)vcvt_high_f32_f64(vcvt_f32_f64((float64x2_t)x[0]), (float64x2_t)x[1]);
}

INLINE words larger(words x, words y) { return (words)vmaxq_u32((uint32x4_t)x, (uint32x4_t)y); }

INLINE uint32_t mask_of(words x) {
  const int32x4_t place = {0, 1, 2, 3};
  return vaddvq_u32(vshlq_u32((uint32x4_t)(x >> 31), place));
}

/* The order of bytes follows from that of words: 4 places for each. */
INLINE words permute(words x, words order) {
  return (words)vqtbl1q_u8((uint8x16_t)x, (uint8x16_t)(order * 0x04040404u + 0x03020100u));
}

typedef uint64_t modes;
INLINE modes get_modes(void) {
  modes x;
  __asm__ volatile("mrs %0, fpcr" : "=r"(x) : : "memory");
  return x;
}
INLINE void set_modes(modes x) { __asm__ volatile("msr fpcr, %0" : : "r"(x) : "memory"); }
enum { MODES = 0 };

static const char *missing(void) { return NULL; }
static int has_sha(void) { return 0; }
