// Threads that share the tasks of one phase of a kernel.
#pragma once

#include <cstddef>

namespace xy {

using Task = void (*)(void* context, int task);

// Run task 0 .. num_tasks - 1 on the caller and the helpers, and return when all are done. Tasks
// are handed out one by one in ascending order, so a thread that the system takes off its core
// holds up the task it has and no other. A second caller at the same time runs its tasks by itself.
void parallel(int num_tasks, Task task, void* context);

// Number of threads from now on, the caller's own included.
void set_num_threads(int num_threads);
int num_threads();

// Memory of the calling thread, 64-byte aligned, its contents lost at the next call: the one for
// use inside a task, the other for the caller of `parallel`, who may run tasks itself.
float* task_scratch(size_t num_floats);
float* caller_scratch(size_t num_floats);

}  // namespace xy
