// Notes the status with which this process is about to leave Python.
#pragma once

#include <Python.h>

namespace sc {

// Begins to note every SystemExit that a thread makes, given by its identifier in Python. Idempotent.
void watch_exit_status(unsigned long thread);

// The code of the newest SystemExit in a tuple: a new reference, to an empty tuple if there was none.
PyObject* noted_exit_status();

}  // namespace sc
