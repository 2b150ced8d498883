/* What kernel.c needs of Python.h, for `driver.c`, which runs it where there is no Python. A PyObject is an integer. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/types.h>

typedef struct { int64_t value; } PyObject;
typedef ssize_t Py_ssize_t;
typedef PyObject *(*PyCFunction)(PyObject *module, PyObject *const *given, Py_ssize_t count);
typedef struct { const char *name; PyCFunction call; int flags; const char *doc; } PyMethodDef;
struct PyModuleDef { int head; const char *name, *doc; long size; PyMethodDef *methods; void *rest[4]; };

#define PyModuleDef_HEAD_INIT 0
#define METH_FASTCALL 0
#define PyMODINIT_FUNC PyObject *
#define Py_BEGIN_ALLOW_THREADS
#define Py_END_ALLOW_THREADS
#define Py_RETURN_NONE return &OBJECT
#define Py_DECREF(x)

enum { PyExc_TypeError, PyExc_ImportError };
static PyObject OBJECT;

static PyObject *PyLong_FromLongLong(int64_t value) { OBJECT.value = value; return &OBJECT; }
static int64_t PyLong_AsLongLong(const PyObject *x) { return x->value; }
static int PyErr_Occurred(void) { return 0; }
#define PyErr_Format(kind, ...) (fprintf(stderr, __VA_ARGS__), exit(1))
#define PyErr_SetString(kind, text) (fputs(text, stderr), exit(1))
#define PyModule_Create(definition) (&OBJECT)
#define PyModule_AddIntConstant(module, name, value) ((void)(value), 0)
#define PyModule_AddStringConstant(module, name, value) ((void)(value), 0)
