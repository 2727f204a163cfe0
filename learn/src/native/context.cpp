// libtorch's switches and its memory on a GPU, which its C interface for Rust does not have. No header of CUDA is needed.
#include <ATen/Context.h>
#include <ATen/DeviceAccelerator.h>
#include <c10/core/CachingDeviceAllocator.h>

#include "guarded.h"

namespace {

// The allocator of the GPUs; an error where there is none.
c10::DeviceAllocator& allocator() {
  at::globalContext().lazyInitDevice(c10::DeviceType::CUDA);
  return *c10::getDeviceAllocator(c10::DeviceType::CUDA);
}

}  // namespace

extern "C" {

struct PipeExactness {
  bool deterministic, strict, fills, tf32_products, tf32_convolutions;
};

// fp32 is fp32, and what has a deterministic form takes it; `strict` makes an error of what has none, else it is a warning.
bool pipe_native_exact(bool strict) {
  return guarded([&] {
    auto& context = at::globalContext();
    context.setFloat32MatmulPrecision("highest");
    context.setAllowTF32CuBLAS(false);
    context.setAllowTF32CuDNN(false);
    context.setDeterministicCuDNN(true);
    context.setBenchmarkCuDNN(false);
    context.setDeterministicAlgorithms(true, !strict);
    // Otherwise every new tensor is filled first, in case somebody reads what nobody wrote.
    context.setDeterministicFillUninitializedMemory(false);
    return true;
  });
}

// The switches as they stand.
bool pipe_native_exactness(PipeExactness* out) {
  return guarded([&] {
    auto& context = at::globalContext();
    out->deterministic = context.deterministicAlgorithms();
    out->strict = context.deterministicAlgorithms() && !context.deterministicAlgorithmsWarnOnly();
    out->fills = context.deterministicFillUninitializedMemory();
    out->tf32_products = context.allowTF32CuBLAS();
    out->tf32_convolutions = context.allowTF32CuDNN();
    return true;
  });
}

// Bytes of a GPU that no process holds.
bool pipe_native_device_free(int8_t device, uint64_t* out) {
  return guarded([&] {
    *out = allocator().getMemoryInfo(device).first;
    return true;
  });
}

// The most bytes that tensors of this process have held on a GPU since the mark was last reset.
bool pipe_native_device_peak(int8_t device, uint64_t* out) {
  return guarded([&] {
    auto bytes = allocator().getDeviceStats(device).allocated_bytes;
    *out = (uint64_t)bytes[(size_t)c10::CachingAllocator::StatType::AGGREGATE].peak;
    return true;
  });
}

// Gives unused memory back and resets the mark.
bool pipe_native_device_reset(int8_t device) {
  return guarded([&] {
    allocator().emptyCache();
    allocator().resetPeakStats(device);
    return true;
  });
}

}  // extern "C"
