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

// The norm's scratch memory on the device: a ticket counter, 0 between launches, then a sum for each chunk.
struct NormSlots {
  float* sums;
  unsigned int* ticket;
  int64_t first;  // slot of this launch's first chunk
  int64_t count;  // of all launches of the table
};

// Each throws std::runtime_error with the kernel's name where the launch fails. Table is SmallTable or LargeTable.
// blocks is the grid: the launch's chunks.
template <class Table>
struct Launchers {
  // last: the table's last launch, which adds up the slots of all of them.
  static void norm(Dtypes, const Table&, int32_t blocks, NormSlots, StatusOf<float>*, float eps, NormFlags, bool last,
                   cudaStream_t);
  static void perturb(Dtypes, const Table&, int32_t blocks, const StatusOf<float>*, cudaStream_t);
  static void sgd(Dtypes, const Table&, int32_t blocks, const StatusOf<float>*, const float* grad_scale, cudaStream_t);
  static void restore(Dtypes, const Table&, int32_t blocks, cudaStream_t);
};

bool has_cuda_instance(Dtypes);     // are kernels compiled for these dtypes?
bool large_tables_compiled();       // was the toolkit new enough for LargeTable?
cudaError_t kernels_fit_device();   // does the current device find machine code or PTX that it can run?

}  // namespace fused_sam
