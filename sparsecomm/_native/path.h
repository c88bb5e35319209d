// Instantiates all kernels for the instruction set of the including file. That file has defined SC_SIMD and, if SC_SIMD
// is 1, the vector type V.
#pragma once

#include "scratch.h"

#include "dense_wire.h"
#include "index_codecs.h"
#include "norms.h"
#include "scatter.h"
#include "topk.h"
#include "value_codecs.h"

namespace sc {
namespace {

constexpr Kernels table(const char* name, uint32_t (*crc)(const uint8_t*, size_t, uint32_t)) {
  return {name,          accumulate_select, exact_topk,  cut_topk,       encode_indices, decode_indices,
          encode_values, decode_values,     scatter_add, scatter_reduce, add_dense,      pack_dense,
          unpack_dense,  accumulate_norms,  crc};
}

}  // namespace
}  // namespace sc
