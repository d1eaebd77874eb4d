// What the convolution kernels need of sm_90a: barriers, asynchronous copies, warpgroup MMA.
#pragma once

#include <cstdint>

namespace int8_conv {

constexpr int kWarpgroup = 128;

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

__device__ __forceinline__ void barrier_init(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals));
}

__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Wait for the end of the phase of this parity.
__device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "WAIT:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra DONE;\n"
      "bra WAIT;\n"
      "DONE:\n"
      "}\n" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// A value that all threads of a warp agree on. Taken from one of them, so that the compiler knows,
// and keeps what depends on it in uniform registers, where the MMA takes its descriptors from.
__device__ __forceinline__ int uniform(int value) { return __shfl_sync(0xFFFFFFFF, value, 0); }

// Ordinary writes to shared memory become visible to the tensor cores.
__device__ __forceinline__ void fence_to_async() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

__device__ __forceinline__ void warpgroup_sync(int warpgroup) {
  asm volatile("bar.sync %0, 128;" ::"r"(warpgroup + 1) : "memory");
}

template <int kRegisters>
__device__ __forceinline__ void more_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
__device__ __forceinline__ void fewer_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// 16 bytes; zeros where not `valid`.
__device__ __forceinline__ void copy_async(uint32_t target, const void* source, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(target), "l"(source),
               "r"(valid ? 16 : 0)
               : "memory");
}

__device__ __forceinline__ void copies_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

template <int kPending>
__device__ __forceinline__ void copies_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Two 8x8 matrices of pairs of channels, turned: a row in shared memory is a pixel's 16 bytes.
__device__ __forceinline__ void load_pixels(uint32_t address, uint32_t (&value)[2]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared::cta.b16 {%0, %1}, [%2];"
               : "=r"(value[0]), "=r"(value[1])
               : "r"(address)
               : "memory");
}

__device__ __forceinline__ void store_pixels(uint32_t address, const uint32_t (&value)[2]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared::cta.b16 [%0], {%1, %2};" ::"r"(address),
               "r"(value[0]), "r"(value[1])
               : "memory");
}

__device__ __forceinline__ uint4 load_shared(uint32_t address) {
  uint4 value;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "r"(address)
               : "memory");
  return value;
}

// Sums that a warpgroup leaves for another one, for its thread of the same number: four of a
// thread, then those of the next thread.
constexpr int kSumsPitch = 4 * kWarpgroup;  // bytes of one sum of all threads

template <int kCount>
__device__ __forceinline__ void store_sums(uint32_t address, const int32_t (&sum)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; i += 4) {
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(address + i * kSumsPitch),
                 "r"(sum[i]), "r"(sum[i + 1]), "r"(sum[i + 2]), "r"(sum[i + 3])
                 : "memory");
  }
}

template <int kCount>
__device__ __forceinline__ void add_sums(uint32_t address, int32_t (&sum)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; i += 4) {
    const uint4 other = load_shared(address + i * kSumsPitch);
    sum[i] += other.x, sum[i + 1] += other.y, sum[i + 2] += other.z, sum[i + 3] += other.w;
  }
}

// Operand B without swizzle: core matrices of 8 pixels x 16 bytes, the pixels 16 bytes apart;
// `chunk` bytes to the next 16 bytes of K, `group` bytes to the next 8 pixels.
__device__ __forceinline__ uint64_t pixels_descriptor(uint32_t address, int chunk, int group) {
  return static_cast<uint64_t>(address >> 4) | static_cast<uint64_t>(chunk >> 4) << 16 |
         static_cast<uint64_t>(group >> 4) << 32;
}

// Operand B with rows of kRow = 64 or 128 bytes, swizzled; `group` bytes to the next 8 rows. The
// swizzle goes by the address itself, so `address` may be that of any row.
template <int kRow>
__device__ __forceinline__ uint64_t swizzled_descriptor(uint32_t address, int group) {
  static_assert(kRow == 64 || kRow == 128);
  return static_cast<uint64_t>(address >> 4) | static_cast<uint64_t>(1) << 16 |
         static_cast<uint64_t>(group >> 4) << 32 | static_cast<uint64_t>(kRow == 64 ? 2 : 1) << 62;
}

// The descriptor of an operand so many bytes further on. One addition: an MMA that waits for a
// chain of operations starts late.
__device__ __forceinline__ uint64_t advance(uint64_t descriptor, int bytes) {
  const uint32_t low = static_cast<uint32_t>(descriptor) + bytes / 16;
  return descriptor >> 32 << 32 | low;
}

// Where the byte at `offset` from an address aligned to 1024 lies in that layout.
template <int kRow>
__device__ __forceinline__ uint32_t swizzle(uint32_t offset) {
  return offset ^ (offset >> 7 & (kRow / 16 - 1)) << 4;
}

__device__ __forceinline__ void mma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void mma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

template <int kCount>
__device__ __forceinline__ void mma_wait(int32_t (&sum)[kCount]) {
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+r"(sum[i])::"memory");
}

// D[64 x N] (+)= A[64 x 32] of registers * B[32 x N] of shared memory, signed bytes, int32 sums.
// A thread holds rows lane / 4 and lane / 4 + 8 of its warp's 16, of every 8 columns two from
// 2 * (lane % 4).
template <int kColumns>
struct Mma;

#define TEN(t) \
  "%" #t "0,%" #t "1,%" #t "2,%" #t "3,%" #t "4,%" #t "5,%" #t "6,%" #t "7,%" #t "8,%" #t "9,"
#define SUM4(i) "+r"(d[i]), "+r"(d[i + 1]), "+r"(d[i + 2]), "+r"(d[i + 3])
#define SUM8(i) SUM4(i), SUM4(i + 4)
#define SUM56 SUM8(0), SUM8(8), SUM8(16), SUM8(24), SUM8(32), SUM8(40), SUM8(48)
#define SUM64 SUM56, SUM8(56)
#define SUM120 SUM64, SUM8(64), SUM8(72), SUM8(80), SUM8(88), SUM8(96), SUM8(104), SUM8(112)
#define MMA(COLUMNS, SUMS, SUM_NAMES, A_NAMES, B_NAME, ADD_NAME)                             \
  template <>                                                                                \
  struct Mma<COLUMNS> {                                                                      \
    static __device__ __forceinline__ void run(int32_t (&d)[COLUMNS / 2], const uint32_t* a, \
                                               uint64_t b, int add) {                        \
      asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, " ADD_NAME                          \
                   ", 0;\n"                                                                  \
                   "wgmma.mma_async.sync.aligned.m64n" #COLUMNS "k32.s32.s8.s8 {" SUM_NAMES  \
                   "}, {" A_NAMES "}, " B_NAME ", add;\n}\n"                                 \
                   : SUMS                                                                    \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));          \
    }                                                                                        \
  };

MMA(112, SUM56, TEN() TEN(1) TEN(2) TEN(3) TEN(4) "%50,%51,%52,%53,%54,%55", "%56,%57,%58,%59",
    "%60", "%61")
MMA(128, SUM64, TEN() TEN(1) TEN(2) TEN(3) TEN(4) TEN(5) "%60,%61,%62,%63", "%64,%65,%66,%67",
    "%68", "%69")
MMA(240, SUM120,
    TEN() TEN(1) TEN(2) TEN(3) TEN(4) TEN(5) TEN(6) TEN(7) TEN(8) TEN(9)
        TEN(10) "%110,%111,%112,%113,%114,%115,%116,%117,%118,%119",
    "%120,%121,%122,%123", "%124", "%125")

#undef MMA
#undef SUM120
#undef SUM64
#undef SUM56
#undef SUM8
#undef SUM4
#undef TEN

// Adding 1.5 * 2^23 rounds a float of magnitude below 2^22 to the nearest integer, ties to even,
// and leaves it in the low bits.
constexpr float kRounder = 12582912.0f;

// Byte 0 of four words as one word.
__device__ __forceinline__ uint32_t low_bytes(float b0, float b1, float b2, float b3) {
  const uint32_t low = __byte_perm(__float_as_uint(b0), __float_as_uint(b1), 0x0040);
  const uint32_t high = __byte_perm(__float_as_uint(b2), __float_as_uint(b3), 0x0040);
  return __byte_perm(low, high, 0x5410);
}

}  // namespace int8_conv
