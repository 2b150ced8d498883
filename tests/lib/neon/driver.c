/* Call kernel.c's functions as asked on stdin, and answer on stdout: `remote_module.py` asks. All numbers are int64. */
#include "kernel.c"

static void take(void *to, size_t size) {
  if (fread(to, 1, size, stdin) != size) exit(0);
}

static int64_t number(void) {
  int64_t x;
  take(&x, 8);
  return x;
}

enum { MOST = 24 };

/* A request: the function; buffers with their lengths; pointers as (buffer, place in it, buffer that it points to);
   arguments as (buffer or -1, number). The answer: the result, and the buffers. */
static void answer(void) {
  char *buffers[MOST];
  int64_t lengths[MOST];
  PyObject values[MOST], *given[MOST];
  const int64_t function = number(), count = number();
  for (int64_t i = 0; i < count; i++) {
    lengths[i] = number();
    take(buffers[i] = malloc((size_t)lengths[i]), (size_t)lengths[i]);
  }
  for (int64_t pointers = number(); pointers; pointers--) {
    char *place = buffers[number()];
    place += number();
    memcpy(place, &buffers[number()], 8);
  }
  const int64_t arguments = number();
  for (int64_t i = 0; i < arguments; i++) {
    const int64_t buffer = number(), value = number();
    values[i].value = buffer < 0 ? value : (int64_t)(uintptr_t)buffers[buffer];
    given[i] = values + i;
  }
  OBJECT.value = 0;
  const int64_t result = METHODS[function].call(NULL, given, arguments)->value;
  fwrite(&result, 8, 1, stdout);
  for (int64_t i = 0; i < count; i++) {
    fwrite(buffers[i], 1, (size_t)lengths[i], stdout);
    free(buffers[i]);
  }
  fflush(stdout);
}

int main(void) {
  PyInit__native();
  set_modes(1 << 24 | 3 << 22); /* subnormals flushed, rounding toward 0: the passes set what they need */
  puts(VECTORS);
  printf("%zu\n", sizeof(struct block));
  for (const PyMethodDef *method = METHODS; method->name; method++) puts(method->name);
  puts("");
  fflush(stdout);
  for (;;) answer();
}
