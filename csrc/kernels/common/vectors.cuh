// Vectors of neighbouring elements in global memory. The element type is known at compile time or passed to the kernel.
//
// A vector is loaded without conversion and converted on use, so a load in flight occupies only as many registers as
// the unconverted elements need.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../../params/dtype.h"
#include "dtype.cuh"

namespace swinkernels {

// Marks an element type that is passed to the kernel at run time. Branches on the type are uniform, and cheap compared
// with the memory accesses.
struct AnyElement {};

// Loads, stores and converts vectors of kVec elements. Offsets are in elements; the offset of a vector in its row is a
// multiple of kVec.
template <class T, int kVec>
struct Vectors {
  static constexpr int kWords = kVec * static_cast<int>(sizeof(T)) / 4;
  using Access = std::conditional_t<kWords == 2, uint2, uint4>;
  static constexpr int kAccesses = kWords * 4 / static_cast<int>(sizeof(Access));
  static_assert(kAccesses * sizeof(Access) == kVec * sizeof(T), "a vector is 8 bytes, or several times 16");
  struct Raw {
    uint32_t word[kWords];
  };

  __device__ static __forceinline__ const void* row(const void* data, uint64_t offset, DType) {
    return static_cast<const T*>(data) + offset;
  }
  __device__ static __forceinline__ void* row(void* data, uint64_t offset, DType) {
    return static_cast<T*>(data) + offset;
  }

  __device__ static __forceinline__ Raw load(const void* row, uint32_t offset, DType) {
    const Access* source = reinterpret_cast<const Access*>(static_cast<const T*>(row) + offset);
    Raw raw;
#pragma unroll
    for (int i = 0; i < kAccesses; ++i) {
      const Access words = source[i];
      memcpy(raw.word + i * kWords / kAccesses, &words, sizeof(words));
    }
    return raw;
  }

  __device__ static __forceinline__ void store(void* row, uint32_t offset, const Raw& raw, DType) {
    Access* destination = reinterpret_cast<Access*>(static_cast<T*>(row) + offset);
#pragma unroll
    for (int i = 0; i < kAccesses; ++i) {
      Access words;
      memcpy(&words, raw.word + i * kWords / kAccesses, sizeof(words));
      destination[i] = words;
    }
  }

  __device__ static __forceinline__ void unpack(const Raw& raw, float (&x)[kVec], DType) {
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      if constexpr (sizeof(T) == 4) {
        x[i] = __uint_as_float(raw.word[i]);
      } else {
        const float2 pair = unpack2<T>(raw.word[i]);
        x[2 * i] = pair.x;
        x[2 * i + 1] = pair.y;
      }
    }
  }

  __device__ static __forceinline__ Raw pack(const float (&x)[kVec], DType) {
    Raw raw;
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      if constexpr (sizeof(T) == 4) {
        raw.word[i] = __float_as_uint(x[i]);
      } else {
        raw.word[i] = pack2<T>(x[2 * i], x[2 * i + 1]);
      }
    }
    return raw;
  }
};

// Specialisation for an element type that is passed at run time: vectors of one element, or of four (8 or 16 bytes).
template <int kVec>
struct Vectors<AnyElement, kVec> {
  static_assert(kVec == 1 || kVec == 4);
  static constexpr int kWords = kVec;  // four 16-bit elements occupy only half of the words
  struct Raw {
    uint32_t word[kWords];
  };

  __device__ static __forceinline__ const void* row(const void* data, uint64_t offset, DType dtype) {
    return static_cast<const char*>(data) + (dtype == DType::kFloat32 ? 4 * offset : 2 * offset);
  }
  __device__ static __forceinline__ void* row(void* data, uint64_t offset, DType dtype) {
    return static_cast<char*>(data) + (dtype == DType::kFloat32 ? 4 * offset : 2 * offset);
  }

  __device__ static __forceinline__ Raw load(const void* row, uint32_t offset, DType dtype) {
    if constexpr (kVec == 1) {
      if (dtype == DType::kFloat32) return {{static_cast<const uint32_t*>(row)[offset]}};
      return {{static_cast<const uint16_t*>(row)[offset]}};
    } else {
      if (dtype == DType::kFloat32) {
        const uint4 words = static_cast<const uint4*>(row)[offset / 4];
        return {{words.x, words.y, words.z, words.w}};
      }
      const uint2 words = static_cast<const uint2*>(row)[offset / 4];
      return {{words.x, words.y, 0, 0}};
    }
  }

  __device__ static __forceinline__ void store(void* row, uint32_t offset, const Raw& raw, DType dtype) {
    if constexpr (kVec == 1) {
      if (dtype == DType::kFloat32) {
        static_cast<uint32_t*>(row)[offset] = raw.word[0];
      } else {
        static_cast<uint16_t*>(row)[offset] = static_cast<uint16_t>(raw.word[0]);
      }
    } else if (dtype == DType::kFloat32) {
      static_cast<uint4*>(row)[offset / 4] = make_uint4(raw.word[0], raw.word[1], raw.word[2], raw.word[3]);
    } else {
      static_cast<uint2*>(row)[offset / 4] = make_uint2(raw.word[0], raw.word[1]);
    }
  }

  __device__ static __forceinline__ void unpack(const Raw& raw, float (&x)[kVec], DType dtype) {
    if (dtype == DType::kFloat32) {
#pragma unroll
      for (int i = 0; i < kVec; ++i) x[i] = __uint_as_float(raw.word[i]);
    } else if (dtype == DType::kFloat16) {
      unpack_pairs<__half>(raw, x);
    } else {
      unpack_pairs<__nv_bfloat16>(raw, x);
    }
  }

  __device__ static __forceinline__ Raw pack(const float (&x)[kVec], DType dtype) {
    Raw raw = {};
    if (dtype == DType::kFloat32) {
#pragma unroll
      for (int i = 0; i < kVec; ++i) raw.word[i] = __float_as_uint(x[i]);
    } else if (dtype == DType::kFloat16) {
      pack_pairs<__half>(x, raw);
    } else {
      pack_pairs<__nv_bfloat16>(x, raw);
    }
    return raw;
  }

 private:
  template <class T>
  __device__ static __forceinline__ void unpack_pairs(const Raw& raw, float (&x)[kVec]) {
#pragma unroll
    for (int i = 0; i < kVec; i += 2) {
      const float2 pair = unpack2<T>(raw.word[i / 2]);
      x[i] = pair.x;
      if (i + 1 < kVec) x[i + 1] = pair.y;
    }
  }

  template <class T>
  __device__ static __forceinline__ void pack_pairs(const float (&x)[kVec], Raw& raw) {
#pragma unroll
    for (int i = 0; i < kVec; i += 2) raw.word[i / 2] = pack2<T>(x[i], i + 1 < kVec ? x[i + 1] : 0.0f);
  }
};

}  // namespace swinkernels
