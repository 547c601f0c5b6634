// The thread rule of the CPU kernels: work is cut into pieces that do not depend on the number of
// threads, thread t of n takes the contiguous share t of the pieces, and n == 1 never enters the
// OpenMP runtime. num_threads() also answers 1 in a forked child: the threads of the parent's
// OpenMP pool do not exist there, and a parallel region would wait for them forever.
#pragma once

#include <atomic>
#include <cstdint>

namespace pyfast {

// Installs the fork handler; called once when the module is loaded.
void install_fork_handler();

// True in a child of a process that had loaded this module.
bool is_forked_child();

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
  std::atomic<int64_t> next{0};
#pragma omp parallel num_threads(static_cast<int>(num_threads))
  for (int64_t piece = next++; piece < num_pieces; piece = next++) f(piece);
}

}  // namespace pyfast::PYFAST_ISA
#endif
