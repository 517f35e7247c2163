// Functions for all PTX instructions that the kernels use. No other file contains inline assembly.
//
// Fragment layouts (PTX ISA, "Matrix Fragments for mma") are given by lane; throughout, with lane = threadIdx.x % 32,
//   g = lane / 4  and  t = lane % 4.
// Two 16-bit elements share a register; the one with the lower column (A) or row (B) is in the low half.
//
// The include guard is a macro instead of #pragma once, because tests/emulation replaces this file with its own
// version, which implements the same functions on the CPU. An instruction added here must also be added there.
#ifndef SWINKERNELS_KERNELS_COMMON_PTX_CUH_
#define SWINKERNELS_KERNELS_COMMON_PTX_CUH_

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace swinkernels::ptx {

// A shared-memory address in the form that PTX instructions accept. For speed, compute a base address once and add
// offsets to it.
using SharedAddress = uint32_t;
__device__ __forceinline__ SharedAddress shared_address(const void* smem) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(smem));
}

// d += a * b for A 16 x 16 (row-major), B 16 x 8 (column-major), D 16 x 8 in float.
//   a[0]  A[g    ][2t, 2t + 1]        a[2]  A[g    ][2t + 8, 2t + 9]
//   a[1]  A[g + 8][2t, 2t + 1]        a[3]  A[g + 8][2t + 8, 2t + 9]
//   b[0]  B[2t, 2t + 1][g]            b[1]  B[2t + 8, 2t + 9][g]
//   d[0], d[1]  D[g][2t], D[g][2t + 1]        d[2], d[3]  D[g + 8][2t], D[g + 8][2t + 1]
// Therefore, the D fragments of two neighbouring 16 x 8 tiles, packed to 16 bits, form the A fragment of the 16 x 16
// tile: a[0] = tile0.d[0, 1], a[1] = tile0.d[2, 3], a[2] = tile1.d[0, 1], a[3] = tile1.d[2, 3].
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], __half) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                             __nv_bfloat16) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// d += a * b for A 16 x 8 (row-major), B 8 x 8 (column-major), D 16 x 8 as above.
//   a[0]  A[g][2t, 2t + 1]        a[1]  A[g + 8][2t, 2t + 1]        b[0]  B[2t, 2t + 1][g]
__device__ __forceinline__ void mma_m16n8k8(float (&d)[4], const uint32_t (&a)[2], const uint32_t (&b)[1], __half) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(b[0]));
}

__device__ __forceinline__ void mma_m16n8k8(float (&d)[4], const uint32_t (&a)[2], const uint32_t (&b)[1],
                                            __nv_bfloat16) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(b[0]));
}

// d += a * b for A 16 x 8 (row-major), B 8 x 8 (column-major), D 16 x 8 as above. Operands are the bits of floats. The
// hardware ignores the low 13 bits, so round the floats with to_tf32 first.
//   a[0]  A[g    ][t]        a[2]  A[g    ][t + 4]        b[0]  B[t    ][g]
//   a[1]  A[g + 8][t]        a[3]  A[g + 8][t + 4]        b[1]  B[t + 4][g]
__device__ __forceinline__ void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Loads four (x4) or two (x2) 8 x 8 matrices of 16-bit elements from shared memory. Lane 8 * i + r passes the address
// of row r of matrix i as smem_row (x2: lanes 16..31 pass any valid address). Rows are 16 bytes and 16-byte aligned.
//   ldmatrix_x*        r[i] holds M_i[g][2t, 2t + 1]
//   ldmatrix_x*_trans  r[i] holds M_i[2t, 2t + 1][g]
// Use the plain form for matrices whose column index is contracted (q, and k in q k^T), and the transposed form for
// matrices whose row index is contracted (v in p v).
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* smem_row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(smem_row))
               : "memory");
}

__device__ __forceinline__ void ldmatrix_x2(uint32_t (&r)[2], const void* smem_row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(smem_row))
               : "memory");
}

__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], const void* smem_row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(smem_row))
               : "memory");
}

__device__ __forceinline__ void ldmatrix_x2_trans(uint32_t (&r)[2], const void* smem_row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(smem_row))
               : "memory");
}

// True for sm_100 and newer, for which ptxas allocates registers differently.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr bool kIsBlackwell = true;
#else
constexpr bool kIsBlackwell = false;
#endif

// Stores four (x4) or two (x2) 8 x 8 matrices of 16-bit elements to shared memory, the inverse of ldmatrix_x*: row r of
// matrix i goes to the smem_row of lane 8 * i + r. Available for sm_90 and newer.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
constexpr bool kHasStmatrix = true;
#else
constexpr bool kHasStmatrix = false;
#endif
__device__ __forceinline__ void stmatrix_x4(void* smem_row, const uint32_t (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};"
               :
               : "r"(shared_address(smem_row)), "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
}

__device__ __forceinline__ void stmatrix_x2(void* smem_row, const uint32_t (&r)[2]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x2.shared.b16 [%0], {%1, %2};"
               :
               : "r"(shared_address(smem_row)), "r"(r[0]), "r"(r[1])
               : "memory");
}

// Transposes an 8 x 8 matrix of 16-bit elements across the warp: in M[g][2t, 2t + 1], out M[2t, 2t + 1][g].
__device__ __forceinline__ uint32_t movmatrix_trans(uint32_t m) {
  uint32_t r;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(r) : "r"(m));
  return r;
}

// Copies 16 bytes from global to shared memory in the background, bypassing L1 (.cg). Both addresses are 16-byte
// aligned. If !valid, writes zeros and does not read gmem. The bytes are visible to the calling thread after the
// cp_async_wait for their group, and to other threads after a subsequent barrier.
__device__ __forceinline__ void cp_async_16(void* smem, const void* gmem, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               :
               : "r"(shared_address(smem)), "l"(__cvta_generic_to_global(gmem)), "r"(valid ? 16 : 0)
               : "memory");
}

// Like the function above with valid = true. The size is known at compile time, which saves three instructions.
__device__ __forceinline__ void cp_async_16(SharedAddress smem, const void* gmem) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;"
               :
               : "r"(smem), "l"(__cvta_generic_to_global(gmem))
               : "memory");
}

// Writes 16 bytes to a 16-byte aligned address in global memory. Without this function, a store to an address that is
// computed as an integer would compile to a generic store.
__device__ __forceinline__ void store_global_16(void* gmem, uint4 x) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};"
               :
               : "l"(__cvta_generic_to_global(gmem)), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w)
               : "memory");
}

// Like cp_async_16 with `valid`, for 4 bytes. Both addresses are 4-byte aligned, and the copy is cached in L1 (.ca).
__device__ __forceinline__ void cp_async_4(void* smem, const void* gmem, bool valid) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;"
               :
               : "r"(shared_address(smem)), "l"(__cvta_generic_to_global(gmem)), "r"(valid ? 4 : 0)
               : "memory");
}

// Combines this thread's copies since the last commit into a group, which may be empty.
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most the N most recent groups of this thread are still in flight.
template <int N>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// Returns 2 ** x with a relative error of at most 2 ** -22. Denormals are flushed to zero, and exp2_approx(-inf) = 0.
__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Return 1 / x and log2(x) with a relative error of about 2 ** -23; near 1, log2 has an absolute error of 2 ** -22.
// Denormal arguments are treated as zero.
__device__ __forceinline__ float reciprocal_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float log2_approx(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Returns the bits of x rounded to TF32 (10 bits of mantissa), to nearest, with ties away from zero.
__device__ __forceinline__ uint32_t to_tf32(float x) {
  uint32_t y;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
  return y;
}

// Returns a * b + c. Compiles to one instruction, however a and b were computed.
__device__ __forceinline__ uint64_t multiply_add_wide(uint32_t a, uint32_t b, uint64_t c) {
  uint64_t d;
  asm("mad.wide.u32 %0, %1, %2, %3;" : "=l"(d) : "r"(a), "r"(b), "l"(c));
  return d;
}

// Returns x, but hides its value from the compiler. In a loop, the compiler then recomputes values derived from x
// instead of keeping them in registers between iterations, which is faster if accumulators take most registers.
__device__ __forceinline__ int opaque(int x) {
  asm volatile("" : "+r"(x));
  return x;
}
__device__ __forceinline__ uint32_t opaque(uint32_t x) {
  asm volatile("" : "+r"(x));
  return x;
}
__device__ __forceinline__ float opaque(float x) {
  asm volatile("" : "+f"(x));
  return x;
}

}  // namespace swinkernels::ptx

#endif  // SWINKERNELS_KERNELS_COMMON_PTX_CUH_
