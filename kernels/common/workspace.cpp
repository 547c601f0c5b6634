#include "workspace.h"

#include <cstdio>
#include <cstdlib>

namespace pyfast {
namespace {

struct Block {
  void* data = nullptr;
  int64_t bytes = 0;
  ~Block() { std::free(data); }
};

}  // namespace

void* thread_workspace(int64_t bytes) {
  static thread_local Block block;
  if (block.bytes < bytes) {
    std::free(block.data);
    const int64_t rounded = (bytes + 4095) / 4096 * 4096;
    block.data = std::aligned_alloc(4096, static_cast<size_t>(rounded));
    if (block.data == nullptr) {
      std::fprintf(stderr, "pyfast: no memory for a workspace of %lld bytes\n",
                   static_cast<long long>(rounded));
      std::abort();
    }
    block.bytes = rounded;
  }
  return block.data;
}

}  // namespace pyfast
