// q, k, v, out and their gradients are (batch, heads, length, size) with any strides but in the
// last dimension.
#include "../kernels/attention/attention.h"

#include "bindings.h"
#include "tensor.h"

namespace pyfast {
namespace {

constexpr const char* kName = "attention";

void require(bool holds, const char* argument, const char* expected, const Tensor& tensor) {
  if (holds) return;
  throw py::value_error(std::string(kName) + ": " + argument + " must be " + expected + ", got " +
                        tensor.describe());
}

HeadsView heads_view(const char* argument, const Tensor& t) {
  require(t.ndim() == 4 && (t.size(3) <= 1 || t.stride(3) == 1 || t.num_elements() == 0), argument,
          "four-dimensional with a contiguous last dimension", t);
  return {t.data(), t.stride(0), t.stride(1), t.stride(2)};
}

void require_size(const char* argument, const Tensor& t, int64_t a, int64_t b, int64_t c,
                  int64_t d) {
  require(t.size(0) == a && t.size(1) == b && t.size(2) == c && t.size(3) == d, argument,
          "of the size that goes with the others", t);
}

// A contiguous vector or matrix of float that may be None.
const float* float_array(const char* argument, py::handle object, Tensor* holder, int64_t size,
                         bool at_least = false) {
  if (object.is_none()) return nullptr;
  require(holder->assign(object) && holder->is_cpu() && holder->is_contiguous() &&
              holder->has_type(dlpack::kFloat, 32) &&
              (at_least ? holder->num_elements() >= size : holder->num_elements() == size),
          argument, "a contiguous float32 tensor of the size that goes with the others", *holder);
  return static_cast<const float*>(holder->data());
}

const int64_t* int64_array(const char* argument, py::handle object, Tensor* holder, int64_t size) {
  if (object.is_none()) return nullptr;
  require(holder->assign(object) && holder->is_cpu() && holder->is_contiguous() &&
              holder->has_type(dlpack::kInt, 64) && (size < 0 || holder->num_elements() == size),
          argument, "a contiguous int64 tensor of the size that goes with the others", *holder);
  return static_cast<const int64_t*>(holder->data());
}

void set_mask(py::handle object, Tensor* holder, AttentionParams* p) {
  p->mask_type = MaskType::kNone;
  if (object.is_none()) return;
  require(holder->assign(object) && holder->ndim() == 4 && holder->is_cpu(), "mask",
          "four-dimensional", *holder);
  const int64_t sizes[] = {p->batch, p->heads, p->num_queries, p->num_keys};
  for (int d = 0; d < 4; ++d) {
    require(holder->size(d) == sizes[d] || holder->size(d) == 1, "mask",
            "broadcastable to the scores", *holder);
    p->mask_stride[d] = holder->size(d) == 1 ? 0 : holder->stride(d);
  }
  p->mask = holder->data();
  if (holder->view().dtype.code == dlpack::kBool) {
    p->mask_type = MaskType::kBool;
    return;
  }
  const DType dtype = holder->dtype("attention: mask");
  require(dtype != DType::kFloat64, "mask", "bool, float32, bfloat16 or float16", *holder);
  p->mask_type = dtype == DType::kFloat32    ? MaskType::kFloat32
                 : dtype == DType::kBFloat16 ? MaskType::kBFloat16
                                             : MaskType::kFloat16;
}

void require_bounds(const char* argument, const int64_t* bounds, int64_t count, int64_t total,
                    const Tensor& tensor) {
  bool rises = count > 0 && bounds[0] == 0 && bounds[count - 1] == total;
  for (int64_t i = 1; rises && i < count; ++i) rises = bounds[i] >= bounds[i - 1];
  require(rises, argument, "bounds that rise from 0 to the number of packed tokens", tensor);
}

// The tensors that a call may have, alive as long as it.
struct Holders {
  Tensor mask, slopes, sinks, cu_q, cu_k, lengths, k_scale, v_scale, seed;
};

void fill(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& lse,
          py::handle mask, py::handle slopes, py::handle sinks, py::handle cu_seqlens_q,
          py::handle cu_seqlens_k, py::handle seed, int64_t threshold, double scale, double softcap,
          int64_t left, int64_t right, bool bottom_right, Holders* holders, AttentionParams* p) {
  p->dtype = q.dtype("attention: q");
  require(p->dtype != DType::kFloat64, "q", "float32, bfloat16 or float16", q);
  p->q = heads_view("q", q);
  p->k = heads_view("k", k);
  p->v = heads_view("v", v);
  p->out = heads_view("out", out);
  p->batch = q.size(0);
  p->heads = q.size(1);
  p->num_queries = q.size(2);
  p->head_size = q.size(3);
  p->key_heads = k.size(1);
  p->num_keys = k.size(2);
  p->value_size = v.size(3);
  require_size("k", k, p->batch, p->key_heads, p->num_keys, p->head_size);
  require_size("v", v, p->batch, p->key_heads, p->num_keys, p->value_size);
  require_size("out", out, p->batch, p->heads, p->num_queries, p->value_size);
  require(p->heads == 0 || (p->key_heads > 0 && p->heads % p->key_heads == 0), "k",
          "of heads that divide those of q", k);
  require(p->head_size > 0 && p->head_size <= kMaxHeadSize && p->value_size <= kMaxHeadSize, "q",
          "of head size 1 to 256", q);
  for (const Tensor* t : {&k, &v, &out}) {
    require(t->is_cpu() && q.is_cpu(), "every tensor", "on the CPU", *t);
  }
  require(out.dtype("attention: out") == p->dtype, "out", "of q's dtype", out);
  const int64_t rows = p->batch * p->heads * p->num_queries;
  require(lse.has_type(dlpack::kFloat, 32) && lse.is_contiguous() && lse.num_elements() == rows,
          "lse", "contiguous float32 with a value for each query", lse);
  p->lse = static_cast<float*>(lse.data());
  set_mask(mask, &holders->mask, p);
  p->cu_seqlens_q = int64_array("cu_seqlens_q", cu_seqlens_q, &holders->cu_q, -1);
  if (p->cu_seqlens_q != nullptr) {
    const int64_t count = holders->cu_q.num_elements();
    p->cu_seqlens_k = int64_array("cu_seqlens_k", cu_seqlens_k, &holders->cu_k, count);
    require(p->cu_seqlens_k != nullptr && p->batch == 1, "cu_seqlens_k", "with cu_seqlens_q", q);
    require_bounds("cu_seqlens_q", p->cu_seqlens_q, count, p->num_queries, holders->cu_q);
    require_bounds("cu_seqlens_k", p->cu_seqlens_k, count, p->num_keys, holders->cu_k);
    p->num_sequences = count - 1;
  }
  const int64_t sequences = p->cu_seqlens_q != nullptr ? p->num_sequences : p->batch;
  p->alibi_slopes = float_array("alibi_slopes", slopes, &holders->slopes, p->heads, true);
  if (p->alibi_slopes != nullptr && holders->slopes.num_elements() != p->heads) {
    require(holders->slopes.num_elements() == sequences * p->heads, "alibi_slopes",
            "(heads,) or (batch, heads)", holders->slopes);
    p->slopes_batch_stride = p->heads;
  }
  p->sinks = float_array("sinks", sinks, &holders->sinks, p->heads);
  int64_t step = p->heads;
  p->seed = seed_from(seed, &holders->seed, q, 1, &step);
  p->seed.step = step;
  p->threshold = static_cast<uint32_t>(threshold);
  p->scale = static_cast<float>(scale);
  p->softcap = static_cast<float>(softcap);
  p->left = left < 0 ? kFar : left < kFar ? left : kFar;
  p->right = right < 0 ? kFar : right < kFar ? right : kFar;
  p->bottom_right = bottom_right;
}

HeadsView scale_view(const char* argument, py::handle object, Tensor* holder,
                     const AttentionParams& p) {
  if (object.is_none()) return {};
  require(holder->assign(object) && holder->is_cpu() && holder->has_type(dlpack::kFloat, 32) &&
              holder->ndim() == 3 && holder->size(0) == p.batch && holder->size(1) == p.key_heads &&
              holder->size(2) == p.num_keys,
          argument, "(batch, key heads, keys) float32", *holder);
  return {holder->data(), holder->stride(0), holder->stride(1), holder->stride(2)};
}

void attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
               const Tensor& lse, py::object mask, py::object slopes, py::object sinks,
               py::object cu_seqlens_q, py::object cu_seqlens_k, py::object lengths,
               py::object k_scale, py::object v_scale, py::object seed, int64_t threshold,
               double scale, double softcap, int64_t left, int64_t right, bool bottom_right,
               int num_threads) {
  AttentionParams p = {};
  Holders holders;
  fill(q, k, v, out, lse, mask, slopes, sinks, cu_seqlens_q, cu_seqlens_k, seed, threshold, scale,
       softcap, left, right, bottom_right, &holders, &p);
  p.k_scale = scale_view("k_scale", k_scale, &holders.k_scale, p);
  p.v_scale = scale_view("v_scale", v_scale, &holders.v_scale, p);
  const bool is_int8 = p.k_scale.data != nullptr;
  require(is_int8 == (p.v_scale.data != nullptr), "v_scale", "given with k_scale", v);
  for (const Tensor* t : {&k, &v}) {
    require(is_int8 ? t->has_type(dlpack::kInt, 8) : t->dtype("attention: k") == p.dtype, "k and v",
            is_int8 ? "int8 where there are scales" : "of q's dtype", *t);
  }
  p.lengths = int64_array("lengths", lengths, &holders.lengths, p.batch);
  for (int64_t b = 0; p.lengths != nullptr && b < p.batch; ++b) {
    require(p.lengths[b] >= 0 && p.lengths[b] <= p.num_keys, "lengths", "within the cache",
            holders.lengths);
  }
  if (lse.num_elements() == 0) return;
  if (!is_decode(p) || p.batch == 0) return run_cpu_kernel(p, num_threads, attention_cpu_table);
  const ScratchBlock block(decode_scratch_size(p) * static_cast<int64_t>(sizeof(float)));
  p.scratch = static_cast<float*>(block.data());
  run_cpu_kernel(p, num_threads, attention_decode_cpu_table);
}

void attention_backward(const Tensor& grad_out, const Tensor& grad_lse, const Tensor& q,
                        const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& lse,
                        const Tensor& delta, py::object mask, py::object slopes, py::object sinks,
                        py::object cu_seqlens_q, py::object cu_seqlens_k, const Tensor& grad_q,
                        const Tensor& grad_k, const Tensor& grad_v, py::object grad_mask,
                        py::object seed, int64_t threshold, double scale, double softcap,
                        int64_t left, int64_t right, bool bottom_right, int num_threads) {
  AttentionBackwardParams params = {};
  AttentionParams& p = params.forward;
  Holders holders;
  fill(q, k, v, out, lse, mask, slopes, sinks, cu_seqlens_q, cu_seqlens_k, seed, threshold, scale,
       softcap, left, right, bottom_right, &holders, &p);
  const Tensor* const tensors[] = {&k, &v, &grad_out, &grad_q, &grad_k, &grad_v};
  for (const Tensor* t : tensors) {
    require(t->dtype("attention: k") == p.dtype && t->is_cpu(), "every tensor", "of q's dtype", *t);
  }
  params.grad_out = heads_view("grad_out", grad_out);
  params.grad_q = heads_view("grad_q", grad_q);
  params.grad_k = heads_view("grad_k", grad_k);
  params.grad_v = heads_view("grad_v", grad_v);
  require_size("grad_out", grad_out, p.batch, p.heads, p.num_queries, p.value_size);
  require_size("grad_q", grad_q, p.batch, p.heads, p.num_queries, p.head_size);
  require_size("grad_k", grad_k, p.batch, p.key_heads, p.num_keys, p.head_size);
  require_size("grad_v", grad_v, p.batch, p.key_heads, p.num_keys, p.value_size);
  for (const Tensor* t : {&grad_lse, &delta}) {
    require(t->has_type(dlpack::kFloat, 32) && t->is_contiguous() && t->is_cpu() &&
                t->num_elements() == lse.num_elements(),
            "grad_lse and delta", "contiguous float32 with a value for each query", *t);
  }
  params.grad_lse = static_cast<const float*>(grad_lse.data());
  params.delta = static_cast<float*>(delta.data());
  Tensor mask_tensor;
  if (!grad_mask.is_none()) {
    params.grad_mask = const_cast<float*>(
        float_array("grad_mask", grad_mask, &mask_tensor, holders.mask.num_elements()));
    for (int d = 0; d < 4; ++d) params.grad_mask_size[d] = holders.mask.size(d);
  }
  const int64_t scratch = attention_backward_scratch_size(p);
  const ScratchBlock block(scratch * static_cast<int64_t>(sizeof(float)));
  params.scratch = static_cast<float*>(block.data());
  const ScratchBlock steps(params.grad_mask == nullptr
                               ? 0
                               : num_backward_pieces(p) * static_cast<int64_t>(sizeof(Counter)));
  params.mask_steps = static_cast<Counter*>(steps.data());
  run_cpu_kernel(params, num_threads, attention_backward_cpu_table);
}

}  // namespace

void bind_attention(py::module_& m) {
  m.def("attention", &attention);
  m.def("attention_backward", &attention_backward);
}

}  // namespace pyfast
