// The CUDA backend's own source, compiled by the host's compiler against this folder's cuda_runtime.h.
#include "cuda/norm.cu"
#include "cuda/perturb.cu"
#include "cuda/sgd.cu"
#include "cuda/adam.cu"
#include "cuda/element.cu"
#include "cuda/vectors.cu"
#include "cuda/device.cu"
#include "cuda/table.cu"
