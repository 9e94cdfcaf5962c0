// The CUDA kernels' launchers, for csrc/cuda/table.cu.
#pragma once

#include <cuda_runtime.h>

#include "core/status.h"
#include "core/storage.h"
#include "cuda/launch_table.h"

// 1 if middle and large tables are compiled: the toolkit must pass them, and FUSED_SAM_SMALL_TABLES halves the time of
// a build.
#if CUDART_VERSION >= 12010 && !defined(FUSED_SAM_SMALL_TABLES)
#define FUSED_SAM_LARGE_TABLES 1
#else
#define FUSED_SAM_LARGE_TABLES 0
#endif

namespace fused_sam {

struct Dtypes {
  Dtype param;
  Dtype grad;
  Dtype master;  // fp32 masters of bf16 or fp16 params; the params' own dtype where there are none

  bool has_masters() const { return master != param; }
};

struct VectorDtypes {
  Dtype x, y, out;
};

// Scratch memory of a reduction on the device: a ticket counter, 0 between launches, and a sum per block.
struct Slots {
  float* sums;  // [sum][block]
  unsigned int* ticket;
  int32_t first;  // slot of this launch's first block
  int32_t count;  // blocks of all launches
  bool last;      // True if this launch adds up the slots of all launches
};

// What a norm does with the table's sum of squares.
struct NormCall {
  bool reset;      // True if the sum starts from zero with this table
  bool finish;     // True if this table is the last one, so that finish_norm (core/status.h) follows
  FinishNorm how;  // with `ascent`, the sum is of T_w g, else of g
  float eps;
};

// Numbers per tensor are those of the launch's tensors.
struct SquaresCall {
  const float* unbias;     // null, or T_w is made of the second moments, see preconditioner() in core/formulas.h
  float* sums;             // of T_w g, and `rows` further on of the weights
  int32_t rows;
  uint8_t weights_column;  // of params or masters
  bool weights;            // True if the weights' squares are asked for
};

struct PerturbCall {
  const StatusOf<float>* status;
  uint64_t seed;
  const float* factors;  // null, or what multiplies each tensor's length
  const float* unbias;   // as in SquaresCall
  bool stochastic_rounding;  // True if bf16 and fp16 params are rounded at random, else to nearest
};

// What every update reads besides its table.
struct UpdateCall {
  const StatusOf<float>* status;
  const float* grad_scale;  // null: 1
  uint64_t seed;
  float max_norm;            // that the gradients' global norm is clipped to; infinite: no clipping
  bool stochastic_rounding;  // as in PerturbCall
};

// The numbers a and b of axpby: on the device, or here where the address is null.
struct Coefficients {
  const float* device;
  float a, b;
};

// Each launcher throws std::runtime_error with the kernel's name if a launch fails. `blocks` is the grid: the launch's
// chunks, and fewer in reductions. Table is SmallTable, MiddleTable or LargeTable; for Adam SmallAdamTable and so on.
//
// `load` loads the kernels onto the current device, which the driver otherwise does at the first launch. It might then
// wait for the device, which a capture does not allow. `fitting` returns how many blocks of a reduction an SM can hold.
template <class Table>
struct NormKernels {
  static void load(Dtypes);
  static int fitting(Dtypes);
  static void norm(Dtypes, const Table&, int32_t blocks, Slots, StatusOf<float>*, const NormCall&, cudaStream_t);
  static void squares(Dtypes, const Table&, int32_t blocks, Slots, const SquaresCall&, cudaStream_t);
};
template <class Table>
struct PerturbKernels {
  static void load(Dtypes);
  // random: True if a group has a mask, params are rounded stochastically, or T_w is made of the second moments.
  static void perturb(Dtypes, const Table&, int32_t blocks, const PerturbCall&, bool random, cudaStream_t);
  static void restore(Dtypes, const Table&, int32_t blocks, cudaStream_t);
};
template <class Table>
struct SgdKernels {
  static void load(Dtypes);
  static void sgd(Dtypes, const Table&, int32_t blocks, const UpdateCall&, cudaStream_t);
};
template <class Table>
struct AdamKernels {
  static void load(Dtypes);
  // ticket: 0 between launches.
  static void adam(Dtypes, const Table&, int32_t blocks, const UpdateCall&, unsigned int* ticket, cudaStream_t);
};
// Of a rule in core/rules.h.
template <class Rule, class Table>
struct ElementKernels {
  static void load(Dtypes);
  static void update(Dtypes, const Table&, int32_t blocks, const UpdateCall&, cudaStream_t);
};
template <class Table>
struct VectorKernels {
  static void load(VectorDtypes);
  static int fitting(VectorDtypes);
  // reset: True if `sums` start from zero.
  static void dot(VectorDtypes, const Table&, int32_t blocks, Slots, float* sums, bool reset, cudaStream_t);
  // status: null, or nothing is written where skip is set.
  static void axpby(VectorDtypes, const Table&, int32_t blocks, Coefficients, const StatusOf<float>* status,
                    cudaStream_t);
};

// finish_norm in a launch of its own, for a sum over several processes.
void launch_finish_norm(StatusOf<float>*, float eps, FinishNorm, cudaStream_t);

// Return true if kernels are compiled for these dtypes.
static inline bool has_cuda_instance(Dtypes d) {
  const bool known = d.param == Dtype::f32 || d.param == Dtype::bf16 || d.param == Dtype::f16;
  return known && (d.master == d.param || d.master == Dtype::f32) && (d.grad == d.param || d.grad == Dtype::f32);
}
static inline bool has_cuda_instance(VectorDtypes d) {
  const bool known = d.x != Dtype::f64 && d.y != Dtype::f64;
  return known && (d.x == d.y || d.x == Dtype::f32 || d.y == Dtype::f32) && (d.out == d.x || d.out == d.y);
}

// cudaSuccess if the module has machine code or PTX that the current device can run.
cudaError_t kernels_fit_device();

}  // namespace fused_sam
