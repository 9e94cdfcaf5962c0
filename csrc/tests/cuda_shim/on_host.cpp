// The CUDA backend's own source, compiled by the host's compiler against the stand-in for cuda_runtime.h beside this file.
#include "cuda/norm.cu"
#include "cuda/move.cu"
#include "cuda/sgd.cu"
#include "cuda/adam.cu"
#include "cuda/lists.cu"
#include "cuda/device.cu"
#include "cuda/table.cu"
