// The CUDA backend's own source, compiled by the host's compiler against the stand-in for cuda_runtime.h beside this file.
#include "cuda/kernels.cu"
#include "cuda/table.cu"
