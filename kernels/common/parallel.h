// The thread rule of the CPU kernels: work is cut into pieces that do not depend on the number of
// threads, thread t of n takes the contiguous share t of the pieces, and n == 1 never enters the
// OpenMP runtime. num_threads() also answers 1 in a forked child: the threads of the parent's
// OpenMP pool do not exist there, and a parallel region would wait for them forever.
#pragma once

#include <cstdint>

namespace pyfast {

// Installs the fork handler; called once when the module is loaded.
void install_fork_handler();

// True in a child of a process that had loaded this module.
bool is_forked_child();

// A count that threads raise and wait for. (<atomic> is not for kernels: they are compiled for
// several instruction sets, and what it defines inline would be linked from any of them.)
class Counter {
 public:
  // Raises the count; returns what it was.
  __attribute__((always_inline)) int64_t next() {
    return __atomic_fetch_add(&count_, 1, __ATOMIC_ACQ_REL);
  }
  // Returns once the count is above `value`.
  __attribute__((always_inline)) void wait_above(int64_t value) const {
    while (__atomic_load_n(&count_, __ATOMIC_ACQUIRE) <= value) yield();
  }

 private:
  static void yield();
  int64_t count_ = 0;
};

}  // namespace pyfast

#ifdef _OPENMP
namespace pyfast::PYFAST_ISA {

// Calls f(begin, end, thread) on every thread that gets a share of [0, num_pieces).
template <typename F>
inline void parallel_for(int64_t num_pieces, int64_t num_threads, const F& f) {
  if (num_threads > num_pieces) num_threads = num_pieces;
  if (num_threads <= 1) {
    if (num_pieces > 0) f(int64_t{0}, num_pieces, int64_t{0});
    return;
  }
#pragma omp parallel for num_threads(static_cast<int>(num_threads)) schedule(static, 1)
  for (int64_t thread = 0; thread < num_threads; ++thread) {
    const int64_t begin = num_pieces * thread / num_threads;
    const int64_t end = num_pieces * (thread + 1) / num_threads;
    if (begin < end) f(begin, end, thread);
  }
}

// Calls f(piece) for every piece, on whichever thread is free: for pieces that differ in cost, and
// whose results do not depend on who computes them. They are begun in order, so that a piece may
// wait for an earlier one.
template <typename F>
inline void parallel_for_each(int64_t num_pieces, int64_t num_threads, const F& f) {
  if (num_threads > num_pieces) num_threads = num_pieces;
  if (num_threads <= 1) {
    for (int64_t piece = 0; piece < num_pieces; ++piece) f(piece);
    return;
  }
  Counter begun;
#pragma omp parallel num_threads(static_cast<int>(num_threads))
  for (int64_t piece = begun.next(); piece < num_pieces; piece = begun.next()) f(piece);
}

}  // namespace pyfast::PYFAST_ISA
#endif
