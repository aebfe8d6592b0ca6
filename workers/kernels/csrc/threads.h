// Threads that share the tasks of one phase of a kernel.
#pragma once

#include <cstddef>

namespace xy {

using Task = void (*)(void* context, int task);

// Run tasks 0 .. num_tasks - 1 on the caller and the helpers, and return when all are done. Tasks
// are handed out one by one in ascending order, so a thread that loses its core delays only the
// task it holds. If another call is in progress, the caller runs its tasks alone.
void parallel(int num_tasks, Task task, void* context);

// Number of threads from now on, including the caller's.
void set_num_threads(int num_threads);
int num_threads();

// Memory of the calling thread, 64-byte aligned; its contents are lost at the next call. The first
// is for use inside a task, the second for the caller of `parallel`, which may run tasks itself.
float* task_scratch(size_t num_floats);
float* caller_scratch(size_t num_floats);

}  // namespace xy
