// The CUDA kernels' launchers: what csrc/cuda/table.cu asks of csrc/cuda/kernels.cu.
#pragma once

#include <cuda_runtime.h>

#include "core/status.h"
#include "core/storage.h"
#include "cuda/launch_table.h"

namespace fused_sam {

struct Dtypes {
  Dtype weight;
  Dtype gradient;
};

struct ListDtypes {
  Dtype x, y, out;
};

// A reduction's scratch memory on the device: a ticket counter, 0 between launches, then the sums of each chunk.
struct Slots {
  float* sums;  // [sum][chunk]
  unsigned int* ticket;
  int64_t first;  // slot of this launch's first chunk
  int64_t count;  // chunks of all launches
  bool last;      // this is the last launch, which adds up the slots of all of them
};

// P5's a and b: on the device, or as numbers where the address is null.
struct Coefficients {
  const float* device;
  float a, b;
};

// Each throws std::runtime_error with the kernel's name where the launch fails. Table is SmallTable or LargeTable.
// blocks is the grid: the launch's chunks.
template <class Table>
struct Launchers {
  static void norm(Dtypes, const Table&, int32_t blocks, Slots, StatusOf<float>*, float eps, NormFlags, cudaStream_t);
  static void perturb(Dtypes, const Table&, int32_t blocks, const StatusOf<float>*, cudaStream_t);
  static void sgd(Dtypes, const Table&, int32_t blocks, const StatusOf<float>*, const float* grad_scale, cudaStream_t);
  static void restore(Dtypes, const Table&, int32_t blocks, cudaStream_t);
  static void dots(ListDtypes, const Table&, int32_t blocks, Slots, float* sums, bool begin, cudaStream_t);
  static void combine(ListDtypes, const Table&, int32_t blocks, Coefficients, cudaStream_t);
};

// Are kernels compiled for these dtypes?
bool has_cuda_instance(Dtypes);
bool has_cuda_instance(ListDtypes);

bool large_tables_compiled();      // was the toolkit new enough for LargeTable?
cudaError_t kernels_fit_device();  // does the current device find machine code or PTX that it can run?

}  // namespace fused_sam
