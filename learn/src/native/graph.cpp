// CUDA graphs: what a GPU is given to do, recorded once and replayed. Without CUDA's headers, or with a libtorch that has no
// CUDA half, nothing is available. It calls no function of CUDA's runtime itself and links none.
#include <ATen/ATen.h>

#include <memory>

#include "guarded.h"

#ifdef PIPE_CUDA
#include <ATen/cuda/CUDAGraph.h>
#include <c10/core/StreamGuard.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/cuda/CUDAStream.h>

#include <map>

namespace {

const c10::impl::DeviceGuardImplInterface* gpu() { return c10::impl::getDeviceGuardImpl(c10::DeviceType::CUDA); }

void settle(c10::DeviceIndex device) { gpu()->synchronizeDevice(device); }

// The stream beside the usual one on which this thread records: libtorch's products keep memory of their own for each.
c10::Stream side(c10::DeviceIndex device) {
  thread_local std::map<c10::DeviceIndex, c10::Stream> streams;
  auto found = streams.find(device);
  if (found == streams.end()) {
    c10::Stream stream = c10::cuda::getStreamFromPool(/*isHighPriority=*/false, device);
    found = streams.emplace(device, stream).first;
  }
  return found->second;
}

}  // namespace

// While it lives, this thread's work goes to the side stream. What was begun before is done, and at its end all is.
struct PipeSide {
  c10::DeviceIndex device;
  std::unique_ptr<c10::StreamGuard> guard;
  explicit PipeSide(c10::DeviceIndex device) : device(device) {
    settle(device);
    guard = std::make_unique<c10::StreamGuard>(side(device));
  }
};

struct PipeGraph {
  at::cuda::CUDAGraph graph;
};
#else
struct PipeSide {};
struct PipeGraph {};
#endif

namespace {

[[maybe_unused]] void missing() {
  TORCH_CHECK(false, "this build has no CUDA graphs: libtorch has no CUDA half, or CUDA's headers were not found");
}

}  // namespace

extern "C" {

// Whether graphs were built in. It says nothing of a GPU.
bool pipe_native_graphs() {
#ifdef PIPE_CUDA
  return true;
#else
  return false;
#endif
}

// The name of a new pool of memory that graphs may share, which are replayed one at a time.
bool pipe_native_graph_pool(uint64_t* out) {
  return guarded([&] {
#ifdef PIPE_CUDA
    auto pool = at::cuda::graph_pool_handle();
    out[0] = pool.first;
    out[1] = pool.second;
#else
    missing();
#endif
    return true;
  });
}

PipeSide* pipe_native_side_enter(int8_t device) {
  return guarded([&]() -> PipeSide* {
#ifdef PIPE_CUDA
    return new PipeSide(device);
#else
    missing();
    return nullptr;
#endif
  });
}

bool pipe_native_side_leave(PipeSide* side) {
  return guarded([&] {
    std::unique_ptr<PipeSide> owned(side);
#ifdef PIPE_CUDA
    owned->guard.reset();
    settle(owned->device);
#endif
    return true;
  });
}

// Begins to record what this thread gives its stream, which must be a side stream, into a new graph.
PipeGraph* pipe_native_graph_begin(const uint64_t* pool) {
  return guarded([&]() -> PipeGraph* {
#ifdef PIPE_CUDA
    auto made = std::make_unique<PipeGraph>();
    made->graph.capture_begin({pool[0], pool[1]}, cudaStreamCaptureModeThreadLocal);
    return made.release();
#else
    missing();
    return nullptr;
#endif
  });
}

// Ends to record; nothing of it has been done yet.
bool pipe_native_graph_end([[maybe_unused]] PipeGraph* graph) {
  return guarded([&] {
#ifdef PIPE_CUDA
    graph->graph.capture_end();
#else
    missing();
#endif
    return true;
  });
}

// Does what was recorded, in the order of the current stream.
bool pipe_native_graph_replay([[maybe_unused]] PipeGraph* graph) {
  return guarded([&] {
#ifdef PIPE_CUDA
    graph->graph.replay();
#else
    missing();
#endif
    return true;
  });
}

void pipe_native_graph_free(PipeGraph* graph) { delete graph; }

}  // extern "C"
