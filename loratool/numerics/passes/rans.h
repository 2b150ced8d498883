/* Steps between numbers, their classes, and the entropy coder of `numerics.rans`: integers alone, so that these are
   functions of their input, and the bytes are those of numpy. */

enum { CODE_BITS = 12, TOTAL = 1 << CODE_BITS, SYMBOLS = 256, MOST_CLASSES = 16 };

/* Of numbers of one width: the step from `from` to `to` in the order of the numbers, away from zero, zigzag; the number
   at a step from `from`, or (back) the one that is a step before it, if it has the sign of `from`; and how many of
   `bounds`, magnitudes, are larger than a number's. */
#define DEFINE_STEPS(NAME_OF, U, S, BITS)                                                                        \
  INLINE U JOIN(sign, NAME_OF)(U x) { return (U)((S)x >> (BITS - 1)); }                                          \
  INLINE U JOIN(place, NAME_OF)(U x) { return (U)((x & (U)((U)-1 >> 1)) ^ JOIN(sign, NAME_OF)(x)); }             \
  static void JOIN(make_steps, NAME_OF)(const U *from, const U *to, int64_t n, U *steps) {                       \
    for (int64_t i = 0; i < n; i++) {                                                                            \
      const U sign = JOIN(sign, NAME_OF)(from[i]);                                                               \
      const U up = (U)(JOIN(place, NAME_OF)(to[i]) - JOIN(place, NAME_OF)(from[i]));                             \
      const U away = (U)((up ^ sign) - sign);                                                                    \
      steps[i] = (U)((U)(away << 1) ^ JOIN(sign, NAME_OF)(away));                                                \
    }                                                                                                            \
  }                                                                                                              \
  static void JOIN(take_steps, NAME_OF)(const U *from, const U *steps, int64_t n, int back, U *to) {             \
    const U turn = back ? (U)-1 : 0;                                                                             \
    for (int64_t i = 0; i < n; i++) {                                                                            \
      const U sign = (U)(JOIN(sign, NAME_OF)(from[i]) ^ turn);                                                   \
      const U away = (U)((U)(steps[i] >> 1) ^ (U)(0 - (U)(steps[i] & 1)));                                       \
      const U place = (U)(JOIN(place, NAME_OF)(from[i]) + (U)((away ^ sign) - sign));                            \
      const U below = JOIN(sign, NAME_OF)(place);                                                                \
      to[i] = (U)((place ^ below) | (below & (U)~(U)((U)-1 >> 1)));                                              \
    }                                                                                                            \
  }                                                                                                              \
  static void JOIN(classify, NAME_OF)(                                                                           \
      const U *x, int64_t n, const uint64_t *bounds, int64_t count, uint8_t *classes) {                          \
    U limits[MOST_CLASSES];                                                                                      \
    for (int64_t k = 0; k < count; k++) limits[k] = (U)bounds[k];                                                \
    for (int64_t start = 0; start < n; start += 256) {                                                           \
      const int64_t size = n - start < 256 ? n - start : 256;                                                    \
      U above[256] = {0};                                                                                        \
      for (int64_t k = 0; k < count; k++)                                                                        \
        for (int64_t i = 0; i < size; i++)                                                                       \
          above[i] = (U)(above[i] + ((U)(x[start + i] & (U)((U)-1 >> 1)) < limits[k]));                          \
      for (int64_t i = 0; i < size; i++) classes[start + i] = (uint8_t)above[i];                                 \
    }                                                                                                            \
  }

DEFINE_STEPS(of_1, uint8_t, int8_t, 8)
DEFINE_STEPS(of_2, uint16_t, int16_t, 16)
DEFINE_STEPS(of_4, uint32_t, int32_t, 32)
DEFINE_STEPS(of_8, uint64_t, int64_t, 64)

static void make_steps(int64_t width, const void *from, const void *to, int64_t n, void *steps) {
  if (width == 1) make_steps_of_1(from, to, n, steps);
  else if (width == 2) make_steps_of_2(from, to, n, steps);
  else if (width == 4) make_steps_of_4(from, to, n, steps);
  else make_steps_of_8(from, to, n, steps);
}

static void take_steps(int64_t width, const void *from, const void *steps, int64_t n, int64_t back, void *to) {
  if (width == 1) take_steps_of_1(from, steps, n, back != 0, to);
  else if (width == 2) take_steps_of_2(from, steps, n, back != 0, to);
  else if (width == 4) take_steps_of_4(from, steps, n, back != 0, to);
  else take_steps_of_8(from, steps, n, back != 0, to);
}

static void classify(
    int64_t width, const void *x, int64_t n, const uint64_t *bounds, int64_t count, uint8_t *classes) {
  if (width == 1) classify_of_1(x, n, bounds, count, classes);
  else if (width == 2) classify_of_2(x, n, bounds, count, classes);
  else if (width == 4) classify_of_4(x, n, bounds, count, classes);
  else classify_of_8(x, n, bounds, count, classes);
}

/* The row of the table that a symbol is coded by; without classes there is one. */
#define AT(i) ((classes ? (int64_t)classes[i] << 8 : 0) | symbols[i])

/* Add up how often each symbol is in each class. Equal neighbours go to different counts, as one would wait for the
   other. */
static void count_symbols(const uint8_t *symbols, const uint8_t *classes, int64_t n, uint32_t *counts, int64_t rows) {
  uint32_t each[4][MOST_CLASSES * SYMBOLS];
  int64_t i = 0;
  for (int k = 0; k < 4; k++) memset(each[k], 0, sizeof(uint32_t) * (size_t)rows * SYMBOLS);
  for (; i + 4 <= n; i += 4) {
    each[0][AT(i)]++;
    each[1][AT(i + 1)]++;
    each[2][AT(i + 2)]++;
    each[3][AT(i + 3)]++;
  }
  for (; i < n; i++) each[0][AT(i)]++;
  for (i = 0; i < rows * SYMBOLS; i++) counts[i] = each[0][i] + each[1][i] + each[2][i] + each[3][i];
}

/* Change the marked symbols of each class to the last one; write the positions of all that are it, and return how many
   these are. */
static int64_t mark_symbols(
    uint8_t *symbols, const uint8_t *classes, int64_t n, const uint8_t *marks, uint32_t *positions) {
  int64_t found = 0;
  for (int64_t i = 0; i < n; i++) {
    const uint8_t mark = marks[AT(i)];
    positions[found] = (uint32_t)i;
    symbols[i] |= (uint8_t)-mark;
    found += mark;
  }
  return found;
}

struct code {
  uint64_t inverse; /* 2^44 / frequency, rounded up: exact for what a state is before a symbol, below frequency 2^20 */
  uint32_t frequency, start;
};

/* Code the symbols into the states of the lanes and into 16-bit words, which fill `words` from its end, where `n` have
   room. Return how many they are. */
static int64_t encode_symbols(
    const uint8_t *symbols, const uint8_t *classes, int64_t n, int64_t lanes, const uint32_t *table, int64_t rows,
    uint32_t *states, uint16_t *words) {
  struct code codes[MOST_CLASSES * SYMBOLS];
  uint16_t *to = words + n;
  for (int64_t row = 0; row < rows; row++) {
    uint32_t start = 0;
    for (int64_t i = row * SYMBOLS; i < (row + 1) * SYMBOLS; i++) {
      const uint64_t frequency = table[i];
      codes[i].frequency = table[i];
      codes[i].start = start;
      codes[i].inverse = frequency ? (((uint64_t)1 << 44) + frequency - 1) / frequency : 0;
      start += table[i];
    }
  }
  for (int64_t row = (n + lanes - 1) / lanes - 1; row >= 0; row--) {
    const int64_t first = row * lanes, size = n - first < lanes ? n - first : lanes;
    for (int64_t lane = size - 1; lane >= 0; lane--) {
      const struct code code = codes[AT(first + lane)];
      uint32_t x = states[lane];
      const int is_full = x >> (32 - CODE_BITS) >= code.frequency;
      to[-1] = (uint16_t)x;
      to -= is_full;
      x = is_full ? x >> 16 : x;
      states[lane] = x + (uint32_t)(x * code.inverse >> 44) * (TOTAL - code.frequency) + code.start;
    }
  }
  return words + n - to;
}

/* Decode the symbol of a lane, and return the state without the word that it may be short of. */
INLINE uint32_t take_symbol(uint32_t x, uint32_t class, const uint32_t *table, uint8_t *symbol) {
  const uint32_t entry = table[class << CODE_BITS | (x & (TOTAL - 1))];
  *symbol = (uint8_t)entry;
  return ((entry >> 20) + 1) * (x >> CODE_BITS) + (entry >> 8 & (TOTAL - 1));
}

/* Decode symbols by a table of TOTAL entries a class: frequency less 1 (12 bits), place in the symbol's part (12) and
   symbol (8). Return how many words were used, -1 if they are too few. */
INLINE int64_t decode_rows(
    const int has_classes, const uint8_t *classes, int64_t n, int64_t lanes, const uint32_t *table, uint32_t *states,
    const uint8_t *words, int64_t count, uint8_t *symbols) {
  int64_t at = 0;
  for (int64_t first = 0; first < n; first += lanes) {
    const int64_t size = n - first < lanes ? n - first : lanes;
    if (count - at >= size) {
      for (int64_t lane = 0; lane < size; lane++) { /* without branches: none could be foretold */
        const int64_t i = first + lane;
        const uint32_t x = take_symbol(states[lane], has_classes ? classes[i] : 0, table, symbols + i);
        const uint32_t is_short = x < 1u << 16;
        uint16_t word;
        memcpy(&word, words + 2 * at, 2);
        states[lane] = x << (is_short << 4) | (word & (0 - is_short));
        at += is_short;
      }
    } else {
      for (int64_t lane = 0; lane < size; lane++) {
        const int64_t i = first + lane;
        const uint32_t x = take_symbol(states[lane], has_classes ? classes[i] : 0, table, symbols + i);
        uint16_t word;
        states[lane] = x;
        if (x >> 16) continue;
        if (at == count) return -1;
        memcpy(&word, words + 2 * at++, 2);
        states[lane] = x << 16 | word;
      }
    }
  }
  return at;
}

static int64_t decode_symbols(
    const uint8_t *classes, int64_t n, int64_t lanes, const uint32_t *table, uint32_t *states, const uint8_t *words,
    int64_t count, uint8_t *symbols) {
  return classes ? decode_rows(1, classes, n, lanes, table, states, words, count, symbols)
                 : decode_rows(0, classes, n, lanes, table, states, words, count, symbols);
}
