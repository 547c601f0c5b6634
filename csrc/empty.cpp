// empty_like(x) for large CPU tensors. malloc gives large blocks back to the system (above 32 MiB
// always, below whenever the top of the heap is free), so that every such output is mapped and
// zeroed page by page again: measured 25 ms for 64 MB, where the dropout that fills it takes 3.5
// ms. This keeps the blocks of freed outputs, at most an eighth of the machine's memory, and hands
// them out again. The tensor is torch's own, made from DLPack.
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

#include "bindings.h"
#include "tensor.h"

namespace pyfast {
namespace {

constexpr size_t kHugePage = size_t{2} << 20;
constexpr size_t kGranularity = size_t{256} << 10;

class BlockPool {
 public:
  // Returns a block of at least `bytes` and stores its true size, or null when memory is short.
  void* take(size_t bytes, size_t* block_bytes) {
    const size_t wanted = (bytes + kGranularity - 1) / kGranularity * kGranularity;
    // A lock that another thread holds (in a forked child: forever) only costs the reuse.
    std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
    if (lock.owns_lock()) {
      auto found = idle_.lower_bound(wanted);
      if (found != idle_.end() && found->first <= wanted + wanted / 8) {
        void* block = found->second;
        *block_bytes = found->first;
        idle_bytes_ -= found->first;
        idle_.erase(found);
        return block;
      }
      lock.unlock();
    }
    void* block = mmap(nullptr, wanted, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (block == MAP_FAILED) return nullptr;
    if (wanted >= 2 * kHugePage) madvise(block, wanted, MADV_HUGEPAGE);
    *block_bytes = wanted;
    return block;
  }

  void give(void* block, size_t block_bytes) {
    std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
    if (lock.owns_lock() && idle_bytes_ + block_bytes <= limit_) {
      idle_.emplace(block_bytes, block);
      idle_bytes_ += block_bytes;
      return;
    }
    munmap(block, block_bytes);
  }

 private:
  std::mutex mutex_;
  std::multimap<size_t, void*> idle_;
  size_t idle_bytes_ = 0;
  const size_t limit_ = static_cast<size_t>(sysconf(_SC_PHYS_PAGES)) *
                        static_cast<size_t>(sysconf(_SC_PAGE_SIZE)) / 8;
};

BlockPool& pool() {
  static BlockPool* const instance = new BlockPool;  // outlives every tensor
  return *instance;
}

struct Output {
  dlpack::VersionedManagedTensor managed = {};
  std::vector<int64_t> shape, strides;
  size_t block_bytes = 0;
};

// A tensor of the type of `like`, or None where torch should make it.
py::object make(const Tensor& like, std::vector<int64_t> shape, std::vector<int64_t> strides) {
  const dlpack::ExchangeApi* api = like.api();
  int64_t num_elements = 1;
  for (const int64_t size : shape) num_elements *= size;
  if (api == nullptr || !like.is_cpu() || num_elements == 0) return py::none();
  auto output = std::make_unique<Output>();
  dlpack::Tensor& tensor = output->managed.tensor;
  tensor = like.view();
  void* block =
      pool().take(static_cast<size_t>(num_elements) * tensor.dtype.bits / 8, &output->block_bytes);
  if (block == nullptr) return py::none();
  output->shape = std::move(shape);
  output->strides = std::move(strides);
  tensor.data = block;
  tensor.byte_offset = 0;
  tensor.ndim = static_cast<int>(output->shape.size());
  tensor.shape = output->shape.data();
  tensor.strides = output->strides.data();
  output->managed.version = {1, 0};
  output->managed.manager_context = output.get();
  output->managed.deleter = [](dlpack::VersionedManagedTensor* self) {
    std::unique_ptr<Output> owner(static_cast<Output*>(self->manager_context));
    pool().give(self->tensor.data, owner->block_bytes);
  };
  void* object = nullptr;
  dlpack::VersionedManagedTensor* managed = &output.release()->managed;
  if (api->managed_tensor_to_py_object(managed, &object) != 0) {
    managed->deleter(managed);
    throw py::error_already_set();
  }
  return py::reinterpret_steal<py::object>(static_cast<PyObject*>(object));
}

// A tensor of x's type, shape and strides.
py::object empty_like(const Tensor& x) {
  if (!x.is_dense()) return py::none();
  std::vector<int64_t> shape, strides;
  for (int d = 0; d < x.ndim(); ++d) {
    shape.push_back(x.size(d));
    strides.push_back(x.stride(d));
  }
  return make(x, std::move(shape), std::move(strides));
}

// A contiguous tensor of another shape.
py::object empty(const Tensor& like, const py::tuple& sizes) {
  std::vector<int64_t> shape, strides(sizes.size());
  for (const py::handle& size : sizes) shape.push_back(size.cast<int64_t>());
  int64_t stride = 1;
  for (size_t d = shape.size(); d-- > 0; stride *= shape[d]) strides[d] = stride;
  return make(like, std::move(shape), std::move(strides));
}

}  // namespace

ScratchBlock::ScratchBlock(int64_t bytes) {
  if (bytes == 0) return;
  data_ = pool().take(static_cast<size_t>(bytes), &bytes_);
  if (data_ == nullptr) throw std::bad_alloc();
}

ScratchBlock::~ScratchBlock() {
  if (data_ != nullptr) pool().give(data_, bytes_);
}

void bind_empty(py::module_& m) {
  m.def("empty_like", &empty_like);
  m.def("empty", &empty);
}

}  // namespace pyfast
