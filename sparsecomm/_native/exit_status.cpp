// Python tells nobody the status with which it exits: SystemExit passes no hook, and it is gone when atexit runs.
// Replacing sys.exit from Python is too late for sys.exit(main()), where Python looks sys.exit up before it calls main.
// So this hooks the two places that every way of leaving passes: the initialization of a SystemExit, and the C function
// behind sys.exit, which makes no exception object before Python 3.12.
#include "exit_status.h"

namespace sc {
namespace {

using Function = PyObject* (*)(PyObject*, PyObject* const*, Py_ssize_t);

initproc plain_init = nullptr;
Function plain_exit = nullptr;
unsigned long watched_thread = 0;
PyObject* noted = nullptr;

void note(PyObject* code) {
  if (PyThread_get_thread_ident() != watched_thread) return;  // it ends that thread alone
  PyObject* before = noted;
  noted = Py_NewRef(code);
  Py_XDECREF(before);
}

int init_and_note(PyObject* self, PyObject* args, PyObject* kwargs) {
  const int failed = plain_init(self, args, kwargs);
  PyObject* code = reinterpret_cast<PySystemExitObject*>(self)->code;
  if (!failed) note(code ? code : Py_None);
  return failed;
}

PyObject* exit_and_note(PyObject* module, PyObject* const* args, Py_ssize_t count) {
  if (count < 2) note(count ? args[0] : Py_None);
  return plain_exit(module, args, count);
}

// A class has copied its base's function when it was made, so that existing subclasses need the new one, too.
void hook(PyObject* type) {
  auto* fields = reinterpret_cast<PyTypeObject*>(type);
  if (fields->tp_init == plain_init) fields->tp_init = init_and_note;
  PyObject* subclasses = PyObject_CallMethod(type, "__subclasses__", nullptr);
  for (Py_ssize_t i = 0; subclasses && i < PyList_GET_SIZE(subclasses); ++i) hook(PyList_GET_ITEM(subclasses, i));
  Py_XDECREF(subclasses);
}

}  // namespace

void watch_exit_status(unsigned long thread) {
  watched_thread = thread;
  if (plain_init) return;
  plain_init = reinterpret_cast<PyTypeObject*>(PyExc_SystemExit)->tp_init;
  hook(PyExc_SystemExit);
  PyObject* exit = PySys_GetObject("exit");
  if (!exit || !PyCFunction_Check(exit)) return;
  PyMethodDef* method = reinterpret_cast<PyCFunctionObject*>(exit)->m_ml;
  if (method->ml_flags != METH_FASTCALL) return;
  plain_exit = reinterpret_cast<Function>(reinterpret_cast<void*>(method->ml_meth));
  method->ml_meth = reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(exit_and_note));
}

PyObject* noted_exit_status() { return noted ? PyTuple_Pack(1, noted) : PyTuple_New(0); }

}  // namespace sc
