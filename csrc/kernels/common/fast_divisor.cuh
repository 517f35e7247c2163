// Division by divisors that are known at launch, without division instructions.
#pragma once

#include <cstdint>

namespace swinkernels {

// Divides numbers below 2^31 with a multiplication, an addition and a shift (Granlund and Montgomery, 1994).
struct FastDivisor {
  uint32_t divisor, multiplier, shift;

  static FastDivisor of(uint32_t divisor) {
    uint32_t shift = 0;
    while ((uint64_t{1} << shift) < divisor) ++shift;
    const uint64_t multiplier = ((uint64_t{1} << 32) * ((uint64_t{1} << shift) - divisor)) / divisor + 1;
    return {divisor, static_cast<uint32_t>(multiplier), shift};
  }
  __device__ __forceinline__ uint32_t divide(uint32_t x, uint32_t* remainder) const {
    const uint32_t high = static_cast<uint32_t>((static_cast<uint64_t>(x) * multiplier) >> 32);
    const uint32_t quotient = (high + x) >> shift;
    *remainder = x - quotient * divisor;
    return quotient;
  }
};

// Converts row-major indices of an array (any, extent[0], extent[1], extent[2]) to coordinates.
struct RowMajorDivisor {
  FastDivisor volume, slab, row;

  static RowMajorDivisor of(const int32_t (&extent)[3]) {
    const uint32_t row = extent[2], slab = row * extent[1];
    return {FastDivisor::of(slab * extent[0]), FastDivisor::of(slab), FastDivisor::of(row)};
  }
  // Returns the first coordinate and stores the other three.
  __device__ __forceinline__ uint32_t divide(uint32_t number, uint32_t (&coordinate)[3]) const {
    uint32_t rest;
    const uint32_t first = volume.divide(number, &rest);
    coordinate[0] = slab.divide(rest, &rest);
    coordinate[1] = row.divide(rest, &coordinate[2]);
    return first;
  }
};

}  // namespace swinkernels
