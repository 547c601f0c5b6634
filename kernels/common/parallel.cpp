#include "parallel.h"

#include <pthread.h>
#include <sched.h>

namespace pyfast {
namespace {
bool forked_child = false;
}

void install_fork_handler() {
  pthread_atfork(nullptr, nullptr, [] { forked_child = true; });
}

bool is_forked_child() { return forked_child; }

void Counter::yield() { sched_yield(); }

}  // namespace pyfast
