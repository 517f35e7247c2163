// Weight and bias as floats in shared memory. In registers they would need as much space as the row itself.
#pragma once

#include <cstdint>

#include "../../../params/dtype.h"
#include "../../common/vectors.cuh"

namespace swinkernels::cuda {

struct Parameter {
  const void* data;  // if null, every element equals `absent`
  DType dtype;
  float absent;
};

// One parameter for all columns of a group of threads, in vectors of kVec elements. Vectors of eight are stored as two
// separate halves, so that neighbouring lanes read neighbouring blocks of 16 bytes.
template <int kVec>
class SharedParameter {
 public:
  __device__ __forceinline__ SharedParameter(float* smem, uint32_t vectors) : smem_(smem), vectors_(vectors) {}

  static constexpr size_t bytes(uint32_t vectors) { return size_t{vectors} * kVec * sizeof(float); }

  // Copies a parameter to shared memory. All threads of the block must call this, and a barrier must follow. Columns
  // past the end of the row are set to zero.
  __device__ __forceinline__ void fill(const Parameter& parameter, uint32_t length) {
    for (uint32_t column = threadIdx.x; column < vectors_ * kVec; column += blockDim.x) {
      float value = column < length ? parameter.absent : 0.0f;
      if (parameter.data != nullptr && column < length) {
        const Vectors<AnyElement, 1>::Raw raw = Vectors<AnyElement, 1>::load(parameter.data, column, parameter.dtype);
        float x[1];
        Vectors<AnyElement, 1>::unpack(raw, x, parameter.dtype);
        value = x[0];
      }
      smem_[index(column / kVec, column % kVec)] = value;
    }
  }

  __device__ __forceinline__ void read(uint32_t vector, float (&x)[kVec]) const {
    if constexpr (kVec == 1) {
      x[0] = smem_[vector];
    } else {
#pragma unroll
      for (int i = 0; i < kVec; i += 4) {
        const float4 four = *reinterpret_cast<const float4*>(smem_ + index(vector, i));
        x[i] = four.x;
        x[i + 1] = four.y;
        x[i + 2] = four.z;
        x[i + 3] = four.w;
      }
    }
  }

 private:
  __device__ __forceinline__ uint32_t index(uint32_t vector, uint32_t element) const {
    if constexpr (kVec == 1) return vector;
    return (element / 4 * vectors_ + vector) * 4 + element % 4;
  }

  float* smem_;
  uint32_t vectors_;
};

}  // namespace swinkernels::cuda
