/* fastclip.kernels.native: Python bindings of the kernels in cpu.h and adapt.h. The method table at the end documents them.
 *
 * The module trusts its only caller, fastclip/backends/native.py: a table is the bytes that `lay_out` there returns,
 * and an address is valid. It is built against the stable ABI, and links only libc and libm. The thread pool is
 * torch's: `use_threads` takes its entry point.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <math.h>
#include <stdlib.h>
#ifndef _WIN32
#include <pthread.h>
#endif

#include "adapt.h"
#include "cpu.h"

static const Level *level;
static Parallel parallel;

#ifndef _WIN32
/* A fork does not copy OpenMP's threads. The child would wait for them for ever. */
static void drop_thread_pool(void) { parallel = NULL; }
#endif

enum { RELEASE_GIL_ABOVE = 1 << 14 }; /* elements: a call on more takes longer than to release and re-acquire the GIL */

/* The arguments that all kernels share: a table, and the addresses of its gradients. */
typedef struct {
    Table table;
    char **address;
    char *on_stack[64];
    Team team;
    PyThreadState *state;
} Call;

static int begin(Call *call, PyObject *bytes, PyObject *addresses, PyObject *threads) {
    const int64_t *layout = (const int64_t *)PyBytes_AsString(bytes);
    Py_ssize_t count = PyList_Size(addresses);
    if (!layout || count < 0) return -1;
    Table *table = &call->table;
    table->rows = layout[0], table->chunks = layout[1], table->tasks = layout[2];
    table->row = (const Row *)(layout + 4);
    table->chunk = (const Chunk *)(table->row + table->rows);
    table->task = (const int64_t *)(table->chunk + table->chunks);
    if (count != table->rows) {
        PyErr_Format(PyExc_ValueError, "a table of %lld gradients was given %zd addresses", table->rows, count);
        return -1;
    }
    call->team.parallel = parallel;
    call->team.threads = (unsigned)PyLong_AsUnsignedLong(threads);
    call->address = call->on_stack;
    if (count > 64 && !(call->address = malloc((size_t)count * sizeof *call->address))) {
        PyErr_NoMemory();
        return -1;
    }
    for (Py_ssize_t i = 0; i < count; i++) call->address[i] = PyLong_AsVoidPtr(PyList_GetItem(addresses, i));
    if (PyErr_Occurred()) {
        if (call->address != call->on_stack) free(call->address);
        return -1;
    }
    call->state = layout[3] > RELEASE_GIL_ABOVE ? PyEval_SaveThread() : NULL;
    return 0;
}

static void end(Call *call) {
    if (call->state) PyEval_RestoreThread(call->state);
    if (call->address != call->on_stack) free(call->address);
}

static PyObject *native_reduce(PyObject *self, PyObject *const *arguments, Py_ssize_t count) {
    (void)self;
    if (count != 5) return PyErr_Format(PyExc_TypeError, "reduce takes 5 arguments, not %zd", count);
    double p = PyFloat_AsDouble(arguments[2]), total;
    double *norms = PyLong_AsVoidPtr(arguments[3]);
    if (PyErr_Occurred()) return NULL;
    Call call;
    if (begin(&call, arguments[0], arguments[1], arguments[4])) return NULL;
    int failed = reduce(level, &call.table, call.address, p, call.team, &total, norms);
    end(&call);
    return failed ? PyErr_NoMemory() : PyFloat_FromDouble(total);
}

static PyObject *native_clip(PyObject *self, PyObject *const *arguments, Py_ssize_t count) {
    (void)self;
    if (count != 7) return PyErr_Format(PyExc_TypeError, "clip takes 7 arguments, not %zd", count);
    double p = PyFloat_AsDouble(arguments[2]), max_norm = PyFloat_AsDouble(arguments[3]);
    void *norm = PyLong_AsVoidPtr(arguments[4]);
    int type = (int)PyLong_AsLong(arguments[5]);
    if (PyErr_Occurred()) return NULL;
    Call call;
    if (begin(&call, arguments[0], arguments[1], arguments[6])) return NULL;
    int failed = clip(level, &call.table, call.address, p, max_norm, call.team, norm, type);
    end(&call);
    if (failed) return PyErr_NoMemory();
    Py_RETURN_NONE;
}

static PyObject *native_apply(PyObject *self, PyObject *const *arguments, Py_ssize_t count) {
    (void)self;
    if (count != 4) return PyErr_Format(PyExc_TypeError, "apply takes 4 arguments, not %zd", count);
    int is_shared = PyFloat_Check(arguments[2]);
    double shared = is_shared ? PyFloat_AsDouble(arguments[2]) : 0;
    const double *coefficients = is_shared ? &shared : PyLong_AsVoidPtr(arguments[2]);
    if (PyErr_Occurred()) return NULL;
    Call call;
    if (begin(&call, arguments[0], arguments[1], arguments[3])) return NULL;
    apply(level, &call.table, call.address, coefficients, !is_shared, call.team);
    end(&call);
    Py_RETURN_NONE;
}

static PyObject *native_clamp(PyObject *self, PyObject *const *arguments, Py_ssize_t count) {
    (void)self;
    if (count != 5) return PyErr_Format(PyExc_TypeError, "clamp takes 5 arguments, not %zd", count);
    int is_shared = PyFloat_Check(arguments[2]);
    double bounds[2] = {0, 0};
    const double *low = bounds, *high = bounds + 1;
    if (is_shared) {
        bounds[0] = PyFloat_AsDouble(arguments[2]), bounds[1] = PyFloat_AsDouble(arguments[3]);
    } else {
        low = PyLong_AsVoidPtr(arguments[2]), high = PyLong_AsVoidPtr(arguments[3]);
    }
    if (PyErr_Occurred()) return NULL;
    Call call;
    if (begin(&call, arguments[0], arguments[1], arguments[4])) return NULL;
    int was_outside = clamp(level, &call.table, call.address, low, high, !is_shared, call.team);
    end(&call);
    return PyBool_FromLong(was_outside);
}

static PyObject *native_clip_units(PyObject *self, PyObject *const *arguments, Py_ssize_t count) {
    (void)self;
    if (count != 6) return PyErr_Format(PyExc_TypeError, "clip_units takes 6 arguments, not %zd", count);
    char *const *weights = PyLong_AsVoidPtr(arguments[2]);
    const double *ratios = PyLong_AsVoidPtr(arguments[3]);
    double eps = PyFloat_AsDouble(arguments[4]);
    if (PyErr_Occurred()) return NULL;
    Call call;
    if (begin(&call, arguments[0], arguments[1], arguments[5])) return NULL;
    int was_above = clip_units(level, &call.table, call.address, weights, ratios, eps, call.team);
    end(&call);
    return PyBool_FromLong(was_above);
}

static PyObject *native_adapt(PyObject *self, PyObject *const *arguments, Py_ssize_t count) {
    (void)self;
    if (count != 8) return PyErr_Format(PyExc_TypeError, "adapt takes 8 arguments, not %zd", count);
    int kind = (int)PyLong_AsLong(arguments[0]);
    double *state = PyLong_AsVoidPtr(arguments[1]), *results = PyLong_AsVoidPtr(arguments[7]), numbers[8];
    const double *norms = PyLong_AsVoidPtr(arguments[3]);
    int64_t width = PyLong_AsLongLong(arguments[2]), groups = PyLong_AsLongLong(arguments[4]);
    double total = PyFloat_AsDouble(arguments[5]);
    Py_ssize_t size = PyTuple_Size(arguments[6]);
    if (size > 8) return PyErr_Format(PyExc_ValueError, "a rule has 8 numbers at most, not %zd", size);
    for (Py_ssize_t i = 0; i < size; i++) numbers[i] = PyFloat_AsDouble(PyTuple_GetItem(arguments[6], i));
    if (PyErr_Occurred()) return NULL;
    adapt(kind, state, width, norms, groups, total, numbers, results);
    Py_RETURN_NONE;
}

static PyObject *native_are_apart(PyObject *self, PyObject *const *arguments, Py_ssize_t count) {
    (void)self;
    if (count != 2) return PyErr_Format(PyExc_TypeError, "are_apart takes 2 arguments, not %zd", count);
    PyObject *one = PyLong_FromLong(1);
    Call call;
    int failed = !one || begin(&call, arguments[0], arguments[1], one);
    Py_XDECREF(one);
    if (failed) return NULL;
    int apart = are_apart(&call.table, call.address);
    end(&call);
    return apart < 0 ? PyErr_NoMemory() : PyBool_FromLong(apart);
}

static PyObject *grad_name, *data_ptr_name;

/* Whether the type of an object is exactly one of two types, not a subclass. */
static int is_one_of(PyObject *object, PyObject *const types[2]) {
    PyObject *type = (PyObject *)Py_TYPE(object);
    return type == types[0] || type == types[1];
}

/* Returns 1 and stores a gradient and its address; 0 if `gather` does not support it; -1 with an exception set. */
static int gather_one(PyObject *owner, PyObject *const types[2], PyObject **grad, PyObject **address) {
    if (!owner || !is_one_of(owner, types)) return owner ? 0 : -1;
    if (!(*grad = PyObject_GetAttr(owner, grad_name))) return -1;
    if (!is_one_of(*grad, types)) return 0;
    if ((*address = PyObject_CallMethodObjArgs(*grad, data_ptr_name, NULL))) return 1;
    if (!PyErr_ExceptionMatches(PyExc_RuntimeError)) return -1;
    PyErr_Clear(); /* it has no address: it is sparse, or belongs to a transform */
    return 0;
}

static PyObject *native_gather(PyObject *self, PyObject *const *arguments, Py_ssize_t count) {
    (void)self;
    if (count != 2) return PyErr_Format(PyExc_TypeError, "gather takes 2 arguments, not %zd", count);
    PyObject *owners = arguments[0], *found = NULL;
    PyObject *const types[2] = {PyTuple_GetItem(arguments[1], 0), PyTuple_GetItem(arguments[1], 1)};
    Py_ssize_t size = PyList_Size(owners);
    if (size < 0 || !types[0] || !types[1]) return NULL;
    PyObject *grads = PyList_New(size), *addresses = PyList_New(size);
    int outcome = grads && addresses ? 1 : -1;
    for (Py_ssize_t i = 0; outcome == 1 && i < size; i++) {
        PyObject *grad = NULL, *address = NULL;
        outcome = gather_one(PyList_GetItem(owners, i), types, &grad, &address);
        PyList_SetItem(grads, i, grad); /* steals the reference */
        PyList_SetItem(addresses, i, address);
    }
    if (outcome == 1) found = PyTuple_Pack(2, grads, addresses);
    Py_XDECREF(grads);
    Py_XDECREF(addresses);
    if (outcome == 0) Py_RETURN_NONE;
    return found;
}

static PyObject *native_levels(PyObject *self, PyObject *unused) {
    (void)self, (void)unused;
    PyObject *names = PyList_New(0);
    for (const Level *const *each = levels(); names && *each; each++) {
        PyObject *name = PyUnicode_FromString((*each)->name);
        if (!name || PyList_Append(names, name)) Py_CLEAR(names);
        Py_XDECREF(name);
    }
    return names;
}

static PyObject *native_use_level(PyObject *self, PyObject *name) {
    (void)self;
    for (const Level *const *each = levels(); *each; each++) {
        PyObject *own = PyUnicode_FromString((*each)->name);
        if (!own) return NULL;
        int matches = PyUnicode_Compare(own, name) == 0;
        Py_DECREF(own);
        if (PyErr_Occurred()) return NULL;
        if (matches) {
            level = *each;
            Py_RETURN_NONE;
        }
    }
    return PyErr_Format(PyExc_ValueError, "%R is no instruction set of this processor", name);
}

static PyObject *native_use_threads(PyObject *self, PyObject *address) {
    (void)self;
    void *entry = PyLong_AsVoidPtr(address);
    if (PyErr_Occurred()) return NULL;
    memcpy(&parallel, &entry, sizeof parallel);
    Py_RETURN_NONE;
}

#define FAST(name) ((PyCFunction)(void (*)(void))(name))

static PyMethodDef methods[] = {
    {"reduce", FAST(native_reduce), METH_FASTCALL,
     "reduce(table, addresses, p, norms, threads)\n--\n\n"
     "Return the p-norm of all gradients. Store the norm of each as fp64 at the address `norms`, unless that is 0."},
    {"clip", FAST(native_clip), METH_FASTCALL,
     "clip(table, addresses, p, max_norm, norm, type, threads)\n--\n\n"
     "Clip by the p-norm of all gradients, and store it at the address `norm`, rounded to an element type."},
    {"apply", FAST(native_apply), METH_FASTCALL,
     "apply(table, addresses, coefficient, threads)\n--\n\n"
     "Multiply all gradients by a float, or each by its own coefficient, fp64 at an address."},
    {"clamp", FAST(native_clamp), METH_FASTCALL,
     "clamp(table, addresses, low, high, threads)\n--\n\n"
     "Clamp all gradients to two floats, or each to its own bounds, fp64 at two addresses. Return whether any\n"
     "element was outside."},
    {"clip_units", FAST(native_clip_units), METH_FASTCALL,
     "clip_units(table, addresses, weights, ratios, eps, threads)\n--\n\n"
     "Clip each chunk by the norm of the weights there. `weights` is the address of their addresses, and `ratios` that\n"
     "of a number for each gradient. Return whether any was clipped."},
    {"adapt", FAST(native_adapt), METH_FASTCALL,
     "adapt(kind, state, width, norms, groups, total, numbers, results)\n--\n\n"
     "Update the state of an adaptive rule, and store coefficients and thresholds. Memory is given by addresses."},
    {"are_apart", FAST(native_are_apart), METH_FASTCALL,
     "are_apart(table, addresses)\n--\n\n"
     "Return whether every gradient has memory, it is aligned to the element size, and no two overlap."},
    {"gather", FAST(native_gather), METH_FASTCALL,
     "gather(owners, types)\n--\n\n"
     "Return the gradients of a list of tensors and their addresses. Return None if a gradient is missing or has no\n"
     "address, or if a tensor or a gradient is not of exactly one of the two types."},
    {"levels", native_levels, METH_NOARGS,
     "levels()\n--\n\nReturn the names of the instruction sets that this processor supports, best first."},
    {"use_level", native_use_level, METH_O, "use_level(name)\n--\n\nUse this instruction set from now on."},
    {"use_threads", native_use_threads, METH_O,
     "use_threads(address)\n--\n\nUse an OpenMP's thread pool: the address of its GOMP_parallel, or 0 for one thread."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "fastclip.kernels.native", "The kernels for CPUs; see kernels/cpu.h.", -1, methods,
    NULL, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit_native(void) {
    level = *levels();
    grad_name = PyUnicode_InternFromString("grad");
    data_ptr_name = PyUnicode_InternFromString("data_ptr");
    if (!grad_name || !data_ptr_name) return NULL;
#ifndef _WIN32
    if (pthread_atfork(NULL, NULL, drop_thread_pool)) return PyErr_NoMemory();
#endif
    return PyModule_Create(&definition);
}
