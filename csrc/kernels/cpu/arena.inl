// Divides scratch memory into pieces; see simd.inl for how this is compiled.
#pragma once
#include "simd.inl"

#ifdef __has_feature
#if __has_feature(address_sanitizer)
#define __SANITIZE_ADDRESS__
#endif
#endif
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

namespace swinkernels::cpu::SWINKERNELS_ISA {
namespace {

SWINKERNELS_INLINE int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }
SWINKERNELS_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Allocates pieces of the scratch memory; with a null base, only counts the bytes. Under AddressSanitizer, the gaps
// between the pieces are poisoned.
class Arena {
 public:
  explicit Arena(void* base) : base_(static_cast<char*>(base)) {}
  template <class T>
  T* take(int64_t count) {
    T* piece = base_ == nullptr ? nullptr : reinterpret_cast<T*>(base_ + bytes_);
    const int64_t bytes = count * static_cast<int64_t>(sizeof(T));
    int64_t room = round_up(bytes, 64);
#ifdef __SANITIZE_ADDRESS__
    room += 64;
    if (piece != nullptr) {
      ASAN_UNPOISON_MEMORY_REGION(base_ + bytes_, bytes);
      ASAN_POISON_MEMORY_REGION(base_ + bytes_ + bytes, room - bytes);
    }
#endif
    bytes_ += room;
    return piece;
  }
  int64_t bytes() const { return bytes_; }

 private:
  char* base_;
  int64_t bytes_ = 0;
};

}  // namespace
}  // namespace swinkernels::cpu::SWINKERNELS_ISA
