// OptimizerPlan: one step of an optimizer, on the CPU or on CUDA. The table of tensors is made anew
// for every step, which takes half a microsecond a tensor and more where their objects are not in
// cache.
#include "../kernels/optimizer_step/optimizer_step.h"

#include <algorithm>
#include <cstring>
#include <utility>
#include <vector>

#include "../kernels/optimizer_step/optimizer_numbers.h"
#include "bindings.h"
#include "optimizer_tensors.h"
#include "tensor.h"

namespace pyfast {
namespace {

constexpr int64_t kPieceElements = 65536;  // of work that a CPU thread takes at a time

// What is on the device already, and where.
struct OptimizerTable {
  std::vector<char> bytes;
  const void* memory = nullptr;
};

class OptimizerPlan : public OptimizerTensors {
 public:
  OptimizerPlan(int rule, double gradient_scale, double clip_scale, bool write_gradient,
                OptimizerMemory* memory)
      : OptimizerTensors(rule != static_cast<int>(OptimizerRule::kNone), write_gradient, memory),
        gradient_scale_(gradient_scale),
        clip_scale_(clip_scale) {
    params_.rule = static_cast<OptimizerRule>(rule);
    params_.write_gradient = write_gradient;
  }

  double square_sum(int num_threads) {
    make_items(kPieceElements);
    std::vector<double> sums(pieces_.size());
    SquareSumParams params = {rows().tensors.data(),
                              rows().layouts.data(),
                              items_.data(),
                              pieces_.data(),
                              static_cast<int64_t>(pieces_.size()) - 1,
                              sums.data()};
    run_cpu_kernel(params, useful_threads(num_threads), square_sum_cpu_table);
    double total = 0;
    for (double sum : sums) total += sum;
    return total;
  }

  // Counts the step, and makes it, on the CPU.
  void run(int num_threads) {
    count_steps();
    make_items(kPieceElements);
    std::vector<OptimizerNumbers<double>> numbers;
    for (const OptimizerSource& source : rows().sources) {
      numbers.push_back(
          base::optimizer_numbers(params_.rule, source, gradient_scale_, clip_scale_));
    }
    params_.tensors = rows().tensors.data();
    params_.layouts = rows().layouts.data();
    params_.numbers = numbers.data();
    params_.items = items_.data();
    params_.pieces = pieces_.data();
    params_.num_pieces = static_cast<int64_t>(pieces_.size()) - 1;
    params_.prefetch_bytes = prefetch_distance();
    const int threads = parameters_overlap() ? 1 : useful_threads(num_threads);
    run_cpu_kernel(params_, threads, optimizer_step_cpu_table);
  }

  // The same on CUDA, with a table in `memory`, which holds table_size() bytes. Scalars may be
  // None.
  void run_cuda(OptimizerTable* table, const Tensor& memory, const py::object& gradient_unscale,
                const py::object& clip_scale, const py::object& found_inf) {
    if constexpr (kWithCuda) {
      Tensor holders[3];
      OptimizerCudaParams params = cuda_params(memory);
      params.gradient_unscale = scalar<float>("grad_scale", gradient_unscale, &holders[0], 32);
      params.clip_scale = scalar<double>("clip_scale", clip_scale, &holders[1], 64);
      params.found_inf = scalar<float>("found_inf", found_inf, &holders[2], 32);
      count_steps();
      if (!rows().sources.empty()) launch_cuda(table, memory, params, optimizer_step_cuda);
    }
  }

  // The sum of the squares of all gradients, to the last of `sums` [num_items + 1], float64.
  void square_sum_on_cuda(OptimizerTable* table, const Tensor& memory, const Tensor& sums) {
    if constexpr (kWithCuda) {
      OptimizerCudaParams params = cuda_params(memory);
      if (!sums.has_type(dlpack::kFloat, 64) || sums.num_elements() != num_items() + 1) {
        throw py::value_error("square_sum: sums must be num_items + 1 float64");
      }
      params.sums = static_cast<double*>(sums.data());
      if (!items_.empty()) launch_cuda(table, memory, params, square_sum_cuda);
    }
  }

  bool counts_on_host() const { return !rows().steps.empty(); }

  int64_t num_items() {
    make_cuda_items();
    return static_cast<int64_t>(items_.size());
  }

  // What the table takes on the device: what is brought there, and room for the numbers.
  int64_t table_size() {
    make_cuda_items();
    return table_sections().total;
  }

 private:
  void count_steps() {
    for (const auto& [pointer, is_double] : rows().steps) {
      if (is_double) {
        *static_cast<double*>(pointer) += 1;
      } else {
        *static_cast<float*>(pointer) += 1;
      }
    }
  }

  // Where the parts of the table begin.
  struct Sections {
    int64_t sources, tensors, layouts, items, numbers, total;
  };

  Sections table_sections() const {
    const auto after = [](int64_t begin, size_t count, size_t size) {
      return (begin + static_cast<int64_t>(count * size) + 15) / 16 * 16;
    };
    Sections at = {};
    at.tensors = after(0, rows().sources.size(), sizeof(OptimizerSource));
    at.layouts = after(at.tensors, rows().tensors.size(), sizeof(OptimizerTensor));
    at.items = after(at.layouts, rows().layouts.size(), sizeof(OptimizerLayout));
    at.numbers = after(at.items, items_.size(), sizeof(OptimizerItem));
    at.total = after(at.numbers, rows().sources.size(), sizeof(OptimizerNumbers<double>));
    return at;
  }

  // At most 65536 items, and none smaller than what keeps a block busy.
  void make_cuda_items() {
    int64_t elements = 0;
    for (const OptimizerTensor& t : rows().tensors) elements += t.num_elements;
    const int64_t blocks = elements / 65536 / kOptimizerBlock + 1;
    make_items(std::max<int64_t>(4096, blocks * kOptimizerBlock), true);
  }

  OptimizerCudaParams cuda_params(const Tensor& memory) {
    make_cuda_items();
    const Sections at = table_sections();
    if (memory.num_elements() < at.total || !memory.has_type(dlpack::kUInt, 8)) {
      throw py::value_error("optimizer step: the table does not fit into its memory");
    }
    char* const base = static_cast<char*>(memory.data());
    OptimizerCudaParams params = {};
    params.rule = params_.rule;
    params.sources = reinterpret_cast<const OptimizerSource*>(base);
    params.tensors = reinterpret_cast<OptimizerTensor*>(base + at.tensors);
    params.layouts = reinterpret_cast<const OptimizerLayout*>(base + at.layouts);
    params.items = reinterpret_cast<const OptimizerItem*>(base + at.items);
    params.numbers = reinterpret_cast<OptimizerNumbers<double>*>(base + at.numbers);
    params.num_sources = static_cast<int64_t>(rows().sources.size());
    params.num_items = static_cast<int64_t>(items_.size());
    params.gradient_scale = gradient_scale_;
    params.write_gradient = params_.write_gradient;
    for (const OptimizerTensor& t : rows().tensors) {
      params.is_double = params.is_double || t.dtypes[kParameter] == DType::kFloat64;
    }
    return params;
  }

  template <typename T>
  const T* scalar(const char* name, const py::object& object, Tensor* holder, int bits) {
    if (object.is_none()) return nullptr;
    if (!try_assign(holder, object) || holder->num_elements() != 1 ||
        !holder->has_type(dlpack::kFloat, bits) || holder->device().type != device_.type ||
        holder->device().id != device_.id) {
      throw py::value_error(std::string("optimizer step: ") + name + " must be one float" +
                            std::to_string(bits) + " with the parameters, got " + text_of(*holder));
    }
    return static_cast<const T*>(holder->data());
  }

  void launch_cuda(OptimizerTable* table, const Tensor& memory, const OptimizerCudaParams& params,
                   const char* (*launcher)(const OptimizerCudaParams&, void*)) {
    const Sections at = table_sections();
    std::vector<char> bytes(static_cast<size_t>(at.numbers));
    const auto put = [&](int64_t begin, const auto& items) {
      if (!items.empty())
        memcpy(&bytes[static_cast<size_t>(begin)], items.data(), items.size() * sizeof items[0]);
    };
    put(at.sources, rows().sources);
    put(at.tensors, rows().tensors);
    put(at.layouts, rows().layouts);
    put(at.items, items_);
    const char* before = table->bytes.size() == bytes.size() && table->memory == memory.data()
                             ? table->bytes.data()
                             : nullptr;
    void* stream = kEmulateCuda ? nullptr : memory.current_stream();
    const OptimizerUploadParams upload = {static_cast<char*>(memory.data()), bytes.data(), before,
                                          at.numbers};
    const char* error = nullptr;
    {
      py::gil_scoped_release release;
      const CudaDeviceGuard guard(memory.device().id);
      error = guard.error();
      if (error == nullptr) error = optimizer_upload_cuda(upload, stream);
      if (error == nullptr) error = launcher(params, stream);
    }
    if (error != nullptr) throw_kernel_error("optimizer step", error);
    table->bytes = std::move(bytes);
    table->memory = memory.data();
  }

  // Pieces are cut where a count of elements over all tensors is full, at blocks of a tensor; with
  // `apart`, which is for CUDA, no item is larger than a piece, wherever that began.
  void make_items(int64_t piece_elements, bool apart = false) {
    items_.clear();
    pieces_.assign(1, 0);
    total_elements_ = 0;
    int64_t room = piece_elements;
    for (size_t i = 0; i < rows().tensors.size(); ++i) {
      const int64_t size = rows().tensors[i].num_elements;
      total_elements_ += size;
      for (int64_t begin = 0; begin < size;) {
        if (apart) room = piece_elements;
        const int64_t blocks = (room + kOptimizerBlock - 1) / kOptimizerBlock;
        const int64_t count = std::min(size - begin, blocks * kOptimizerBlock);
        items_.push_back({static_cast<int32_t>(i), static_cast<int32_t>(count), begin});
        begin += count;
        room -= count;
        if (room <= 0) {
          pieces_.push_back(static_cast<int64_t>(items_.size()));
          room = piece_elements;
        }
      }
    }
    if (pieces_.back() != static_cast<int64_t>(items_.size())) {
      pieces_.push_back(static_cast<int64_t>(items_.size()));
    }
  }

  int useful_threads(int num_threads) const {
    return static_cast<int>(std::min<int64_t>(num_threads, 1 + total_elements_ / 32768));
  }

  OptimizerStepParams params_ = {};
  double gradient_scale_, clip_scale_;
  int64_t total_elements_ = 0;
  std::vector<OptimizerItem> items_;
  std::vector<int64_t> pieces_;
};

}  // namespace

void bind_optimizer_step(py::module_& m) {
  py::class_<OptimizerTable>(m, "OptimizerTable").def(py::init<>());
  py::class_<OptimizerMemory>(m, "OptimizerMemory", py::module_local()).def(py::init<>());
  py::class_<OptimizerPlan>(m, "OptimizerPlan")
      .def(py::init<int, double, double, bool, OptimizerMemory*>(), py::keep_alive<1, 6>())
      .def("add_group", &OptimizerPlan::add_group)
      .def("make_rows", &OptimizerPlan::make_rows)
      .def("add_gradients", &OptimizerPlan::add_gradients)
      .def("square_sum", &OptimizerPlan::square_sum)
      .def("bump_versions", &OptimizerPlan::bump_versions)
      .def("run", &OptimizerPlan::run)
      .def("run_cuda", &OptimizerPlan::run_cuda)
      .def("square_sum_on_cuda", &OptimizerPlan::square_sum_on_cuda)
      .def("counts_on_host", &OptimizerPlan::counts_on_host)
      .def("num_items", &OptimizerPlan::num_items)
      .def("table_size", &OptimizerPlan::table_size);
}

}  // namespace pyfast
