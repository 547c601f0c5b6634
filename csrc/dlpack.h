// The part of the DLPack 1.x ABI (https://dmlc.github.io/dlpack) that crosses this boundary.
#pragma once

#include <cstdint>

namespace pyfast::dlpack {

enum DeviceType : int32_t { kCpu = 1, kCuda = 2, kCudaHost = 3 };
enum TypeCode : uint8_t { kInt = 0, kUInt = 1, kFloat = 2, kBFloat = 4, kBool = 6 };

struct Device {
  int32_t type;
  int32_t id;
};

struct DataType {
  uint8_t code;
  uint8_t bits;
  uint16_t lanes;
};

struct Tensor {
  void* data;
  Device device;
  int32_t ndim;
  DataType dtype;
  int64_t* shape;
  int64_t* strides;  // elements; null means contiguous
  uint64_t byte_offset;
};

struct ManagedTensor {  // what an unversioned "dltensor" capsule holds
  Tensor tensor;
  void* manager_context;
  void (*deleter)(ManagedTensor*);
};

struct Version {
  uint32_t major;
  uint32_t minor;
};

struct VersionedManagedTensor {
  Version version;
  void* manager_context;
  void (*deleter)(VersionedManagedTensor*);
  uint64_t flags;
  Tensor tensor;
};

// The C function table that a tensor type offers as __dlpack_c_exchange_api__ (DLPack 1.2).
struct ExchangeApi {
  Version version;
  ExchangeApi* previous;
  void* managed_tensor_allocator;
  void* managed_tensor_from_py_object;
  int (*managed_tensor_to_py_object)(VersionedManagedTensor* tensor, void** out);
  int (*tensor_from_py_object)(void* object, Tensor* out);
  int (*current_work_stream)(int32_t device_type, int32_t device_id, void** out);
};

}  // namespace pyfast::dlpack
