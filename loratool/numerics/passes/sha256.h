/* sha256 (FIPS 180-4) by the SHA extensions of x86-64. Each round waits for the one before, so the rounds of two streams
   in one loop take as long as those of one. */
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("sha,ssse3,sse4.1"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("sha,ssse3,sse4.1")
#endif

/* the first 32 bits of the fractions of the cube roots of the first 64 primes */
static const uint32_t ROUNDS[64] __attribute__((aligned(16))) = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2,
};

/* Hash so many blocks of 64 bytes of each stream into its state, 8 words. The instructions want the words of a state as
   (f, e, b, a) and (h, g, d, c). */
INLINE void hash_streams(const int streams, uint32_t *const *state, const uint8_t *const *data, int64_t blocks) {
  const __m128i big_endian = _mm_set_epi64x(0x0c0d0e0f08090a0b, 0x0405060700010203);
  __m128i abef[2], cdgh[2];
  for (int s = 0; s < streams; s++) {
    const __m128i cdab = _mm_shuffle_epi32(_mm_loadu_si128((const __m128i *)state[s]), 0xb1);
    const __m128i efgh = _mm_shuffle_epi32(_mm_loadu_si128((const __m128i *)(state[s] + 4)), 0x1b);
    abef[s] = _mm_alignr_epi8(cdab, efgh, 8);
    cdgh[s] = _mm_blend_epi16(efgh, cdab, 0xf0);
  }
  for (int64_t block = 0; block < blocks; block++) {
    __m128i words[2][4], abef_before[2], cdgh_before[2];
    for (int s = 0; s < streams; s++) {
      const __m128i *from = (const __m128i *)(data[s] + 64 * block);
      abef_before[s] = abef[s];
      cdgh_before[s] = cdgh[s];
      for (int i = 0; i < 4; i++) words[s][i] = _mm_shuffle_epi8(_mm_loadu_si128(from + i), big_endian);
    }
#pragma GCC unroll 16
    for (int round = 0; round < 16; round++) { /* four of the standard's */
      const __m128i constants = _mm_load_si128((const __m128i *)(ROUNDS + 4 * round));
      for (int s = 0; s < streams; s++) {
        __m128i *const w = words[s], sum = _mm_add_epi32(w[round & 3], constants);
        cdgh[s] = _mm_sha256rnds2_epu32(cdgh[s], abef[s], sum);
        abef[s] = _mm_sha256rnds2_epu32(abef[s], cdgh[s], _mm_shuffle_epi32(sum, 0x0e));
        if (round < 12) {
          const __m128i seven_before = _mm_alignr_epi8(w[(round + 3) & 3], w[(round + 2) & 3], 4);
          const __m128i next = _mm_add_epi32(_mm_sha256msg1_epu32(w[round & 3], w[(round + 1) & 3]), seven_before);
          w[round & 3] = _mm_sha256msg2_epu32(next, w[(round + 3) & 3]);
        }
      }
    }
    for (int s = 0; s < streams; s++) {
      abef[s] = _mm_add_epi32(abef[s], abef_before[s]);
      cdgh[s] = _mm_add_epi32(cdgh[s], cdgh_before[s]);
    }
  }
  for (int s = 0; s < streams; s++) {
    const __m128i feba = _mm_shuffle_epi32(abef[s], 0x1b), dchg = _mm_shuffle_epi32(cdgh[s], 0xb1);
    _mm_storeu_si128((__m128i *)state[s], _mm_blend_epi16(feba, dchg, 0xf0));
    _mm_storeu_si128((__m128i *)(state[s] + 4), _mm_alignr_epi8(dchg, feba, 8));
  }
}

/* states: two, one after the other. Of one stream, `second` is NULL. */
static void hash_blocks(uint32_t *states, const uint8_t *first, const uint8_t *second, int64_t blocks) {
  uint32_t *const state[2] = {states, states + 8};
  const uint8_t *const data[2] = {first, second};
  if (second) hash_streams(2, state, data, blocks);
  else hash_streams(1, state, data, blocks);
}

static int has_sha(void) {
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && b >> 29 & 1;
}

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
