#include "cuda_emulation.h"

#include <ucontext.h>

#include <cstdlib>
#include <random>
#include <string>
#include <vector>

namespace cuda_emulation {

ThreadState* current = nullptr;

namespace {

constexpr size_t kStackBytes = 128 << 10;

enum class Wait { kNothing, kBlock, kWarp, kEnded };

struct Fiber {
  ThreadState state;
  ucontext_t context;
  std::vector<char> stack;
  Wait wait = Wait::kNothing;
  unsigned mask = 0;   // of the shuffle that it waits in
  uint64_t value = 0;  // what it gave to the shuffle
};

std::vector<Fiber> fibers;
ucontext_t scheduler;
const std::function<void()>* kernel_body;
std::string error;

void fail(const std::string& text) {
  if (error.empty()) error = text;
}

Fiber& running() { return *reinterpret_cast<Fiber*>(current); }

void yield(Wait wait) {
  Fiber& fiber = running();
  fiber.wait = wait;
  swapcontext(&fiber.context, &scheduler);
}

void fiber_main() {
  (*kernel_body)();
  running().wait = Wait::kEnded;
  swapcontext(&running().context, &scheduler);
}

std::string where(const Fiber& fiber) {
  return "thread " + std::to_string(fiber.state.thread_idx.x) + " of block " +
         std::to_string(fiber.state.block_idx.x);
}

// Lets fibers go on whose barrier is complete; false when none can.
bool release() {
  bool released = false;
  bool all_at_block = true;
  for (const Fiber& fiber : fibers) {
    all_at_block &= fiber.wait == Wait::kBlock || fiber.wait == Wait::kEnded;
  }
  for (size_t first = 0; first < fibers.size(); first += 32) {
    const size_t end = first + 32 < fibers.size() ? first + 32 : fibers.size();
    unsigned waiting = 0, mask = 0;
    for (size_t i = first; i < end; ++i) {
      if (fibers[i].wait != Wait::kWarp) continue;
      waiting |= 1u << (i - first);
      mask |= fibers[i].mask;
    }
    if (waiting == 0 || waiting != mask) continue;
    for (size_t i = first; i < end; ++i) {
      if (fibers[i].wait == Wait::kWarp) fibers[i].wait = Wait::kNothing, released = true;
    }
  }
  if (!released && all_at_block) {
    for (Fiber& fiber : fibers) {
      if (fiber.wait == Wait::kBlock) fiber.wait = Wait::kNothing, released = true;
    }
  }
  return released;
}

void run_block(int order, std::mt19937& random) {
  std::vector<size_t> turn(fibers.size());
  for (;;) {
    for (size_t i = 0; i < turn.size(); ++i) {
      turn[i] = order == 1 ? turn.size() - 1 - i : i;
    }
    if (order == 2) {
      for (size_t i = turn.size(); i > 1; --i) std::swap(turn[i - 1], turn[random() % i]);
    }
    bool ran = false;
    for (size_t i : turn) {
      Fiber& fiber = fibers[i];
      if (fiber.wait != Wait::kNothing) continue;
      ran = true;
      current = &fiber.state;
      swapcontext(&scheduler, &fiber.context);
    }
    if (!ran && !release()) return;
  }
}

}  // namespace

const char* run(dim3 grid, int block_threads, const std::function<void()>& body) {
  static std::string reported;
  error.clear();
  const char* text = std::getenv("PYFAST_EMULATION_ORDER");
  const int order = text != nullptr ? std::atoi(text) : 0;
  std::mt19937 random(0);
  kernel_body = &body;
  fibers.clear();
  fibers.resize(static_cast<size_t>(block_threads));
  for (Fiber& fiber : fibers) fiber.stack.resize(kStackBytes);
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        for (size_t i = 0; i < fibers.size(); ++i) {
          Fiber& fiber = fibers[i];
          fiber.state = {dim3(static_cast<unsigned>(i)), dim3(x, y, z),
                         dim3(static_cast<unsigned>(block_threads)), grid};
          fiber.wait = Wait::kNothing;
          getcontext(&fiber.context);
          fiber.context.uc_stack.ss_sp = fiber.stack.data();
          fiber.context.uc_stack.ss_size = fiber.stack.size();
          fiber.context.uc_link = nullptr;
          makecontext(&fiber.context, fiber_main, 0);
        }
        run_block(order, random);
        for (const Fiber& fiber : fibers) {
          if (fiber.wait != Wait::kEnded) fail(where(fiber) + " waits at a barrier for ever");
        }
        if (!error.empty()) {
          reported = error;
          return reported.c_str();
        }
      }
    }
  }
  return nullptr;
}

void synchronize() { yield(Wait::kBlock); }

uint64_t exchange(unsigned mask, uint64_t value, unsigned source_lane) {
  Fiber& fiber = running();
  fiber.mask = mask;
  fiber.value = value;
  yield(Wait::kWarp);
  const size_t warp = fiber.state.thread_idx.x / 32 * 32;
  if (warp + source_lane >= fibers.size()) {
    fail(where(fiber) + " shuffles with a lane outside of the block");
    return 0;
  }
  const uint64_t received = fibers[warp + source_lane].value;
  yield(Wait::kWarp);  // nobody overwrites a value before all have read
  return received;
}

void copy_aligned(void* to, const void* from, const void* device, unsigned size) {
  memcpy(to, from, size);
  if (reinterpret_cast<uintptr_t>(device) % size == 0) return;
  fail(where(running()) + " accesses " + std::to_string(size) +
       " bytes at an address that is not aligned to them");
}

}  // namespace cuda_emulation
