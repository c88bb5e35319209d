// Table of functions that every path (AVX-512, AVX2, portable) provides to module.cpp.
//
// Sizes and pointers are trusted, because Python has checked them; the content of encoded bytes is not.
#pragma once

#include <cstddef>
#include <cstdint>

namespace sc {

constexpr size_t kBlock = 128;  // entries in a block of the BITPACK, RICE and INT8 codecs
constexpr uint32_t kInfBits = 0x7F800000u;
constexpr uint32_t kMagnitude = 0x7FFFFFFFu;

enum GradType : int { kNoGrad = -1, kF32 = 0, kF16 = 1, kBf16 = 2 };
enum IndexCodec : int { kDense = 0, kRaw = 1, kBitpack = 2, kRice = 3, kBitmap = 4 };
enum ValueCodec : int { kValF32 = 0, kValF16 = 1, kValBf16 = 2, kValInt8 = 3 };

// kernels/native.py turns these numbers into WireErrors.
enum Status : int {
  kOk = 0,
  kIndexBytes = 1,
  kDenseNnz = 2,
  kNotAscending = 3,
  kPadding = 4,
  kBitmapOnes = 5,
  kIndexParam = 6,
  kIndexRange = 7,
  kTooShort = 8,
  kRiceBytes = 9,
  kUnaryOnes = 10,
  kValueBytes = 20,
  kValueScale = 21,
  kBlockScale = 22,
  kInt8Min = 23,
  kNotFinite = 24,
};

struct SelectOut {
  uint64_t stored, total, nonfinite;
};
struct TopKOut {
  uint64_t stored;
  float threshold;
  uint64_t nonfinite;
};
struct DecodeOut {
  int status;
  double got;  // exact below 2**53; only absurd indices are larger, and they are only shown
  uint64_t want;
};
struct Part {
  const uint32_t* indices;
  const float* values;
  size_t nnz;
};

struct Kernels {
  const char* name;
  SelectOut (*accumulate_select)(const void* grad, int type, float* residual, size_t n, uint32_t threshold_bits,
                                 uint32_t* out_indices, float* out_values, size_t capacity, float scale);
  TopKOut (*exact_topk)(const void* grad, int type, float* residual, size_t n, size_t k, uint32_t* out_indices,
                        float* out_values, size_t capacity, float scale);
  size_t (*cut_topk)(uint32_t* indices, float* values, size_t count, size_t k, float* residual);
  int64_t (*encode_indices)(int codec, const uint32_t* indices, size_t nnz, uint64_t numel, uint8_t* out);
  DecodeOut (*decode_indices)(int codec, const uint8_t* data, size_t nbytes, size_t nnz, uint64_t numel,
                              uint32_t* out);
  size_t (*encode_values)(int codec, const float* values, size_t nnz, uint8_t* out, float* error, float* scale);
  DecodeOut (*decode_values)(int codec, const uint8_t* data, size_t nbytes, size_t nnz, float scale, float* out);
  void (*scatter_add)(float* out, const uint32_t* indices, const float* values, size_t nnz);
  void (*scatter_reduce)(void* out, int type, size_t n, Part* parts, size_t nparts, float scale);
  void (*add_dense)(float* out, const uint8_t* data, size_t n);
  void (*pack_dense)(int codec, const float* values, size_t n, uint8_t* out, float* error);
  void (*unpack_dense)(int codec, const uint8_t* data, size_t n, float* out, bool add);
  uint64_t (*accumulate_norms)(const void* grad, int type, float* residual, size_t n, float scale, size_t chunk,
                               float* norms);
  uint32_t (*crc32c)(const uint8_t* data, size_t nbytes, uint32_t seed);
};

// Null if this build or this CPU cannot run the path.
const Kernels* avx512_kernels();
const Kernels* avx2_kernels();
const Kernels* portable_kernels();

uint32_t crc32c_portable(const uint8_t* data, size_t nbytes, uint32_t seed);
uint32_t crc32c_sse42(const uint8_t* data, size_t nbytes, uint32_t seed);

}  // namespace sc
