// The index codecs. Formats: docs/wire-format.md; truth: kernels/reference/indices.py.
#pragma once

#include "bitpack.h"

namespace sc {
namespace {

// Position of the first index that is not above its predecessor and below numel; nnz if there is none.
inline size_t first_misplaced(const uint32_t* idx, size_t nnz, uint64_t numel) {
  if (nnz == 0) return 0;
  bool bad = idx[0] >= numel;
  size_t i = 1;
  for (; i < nnz && !bad; i += 4096) {  // no early exit inside a stretch, so that it vectorises
    const size_t end = min_of(nnz, i + 4096);
    unsigned wrong = 0;
    for (size_t j = i; j < end; ++j) wrong |= unsigned(idx[j] <= idx[j - 1]);
    bad = wrong != 0 || idx[end - 1] >= numel;
  }
  if (!bad) return nnz;
  for (i = 0; i < nnz; ++i)
    if (idx[i] >= numel || (i && idx[i] <= idx[i - 1])) break;
  return i;
}

// Gaps minus one of up to 128 indices behind `before` (2**32 - 1 at the start); the rest of the block is zero.
inline void block_gaps(const uint32_t* idx, size_t count, uint32_t before, uint32_t* gaps) {
  gaps[0] = idx[0] - before - 1;
  if (count == kBlock) {
    for (size_t i = 1; i < kBlock; ++i) gaps[i] = idx[i] - idx[i - 1] - 1;
  } else {
    for (size_t i = 1; i < count; ++i) gaps[i] = idx[i] - idx[i - 1] - 1;
    std::memset(gaps + count, 0, (kBlock - count) * sizeof *gaps);
  }
}

inline unsigned bit_length(uint64_t v) { return v ? 64u - unsigned(__builtin_clzll(v)) : 0u; }

inline size_t encode_bitpack(const uint32_t* idx, size_t nnz, uint8_t* out) {
  const size_t blocks = (nnz + kBlock - 1) / kBlock;
  uint8_t* to = out + blocks;
  uint32_t before = 0xFFFFFFFFu;
  for (size_t b = 0; b < blocks; ++b, idx += kBlock) {
    const size_t count = min_of(kBlock, nnz - b * kBlock);
    uint32_t gaps[kBlock], all = 0;
    block_gaps(idx, count, before, gaps);
    for (size_t i = 0; i < kBlock; ++i) all |= gaps[i];
    const unsigned width = bit_length(all);
    out[b] = uint8_t(width);
    pack(gaps, count, width, to);
    to += packed_bytes(count, width);
    before = idx[count - 1];
  }
  return size_t(to - out);
}

// Integers only, so that every implementation chooses the same: 45426 / 65536 is ln 2.
inline unsigned rice_parameter(const uint32_t* gaps, size_t count) {
  uint64_t sum = 0;
  for (size_t i = 0; i < kBlock; ++i) sum += gaps[i];
  const uint64_t ratio = (sum * 45426 >> 16) / count;
  const unsigned low = ratio ? bit_length(ratio) - 1 : 0, high = low < 31 ? low + 1 : 31;
  uint64_t at_low = 0, at_high = 0;
  for (size_t i = 0; i < kBlock; ++i) {
    at_low += gaps[i] >> low;
    at_high += gaps[i] >> high;
  }
  return count * (high + 1) + at_high < count * (low + 1) + at_low ? high : low;
}

inline size_t encode_rice(const uint32_t* idx, size_t nnz, uint8_t* out) {
  const size_t blocks = (nnz + kBlock - 1) / kBlock;
  uint8_t* to = out + blocks;
  uint32_t gaps[kBlock], low[kBlock], before = 0xFFFFFFFFu;
  for (size_t b = 0; b < blocks; ++b) {
    const size_t count = min_of(kBlock, nnz - b * kBlock);
    block_gaps(idx + b * kBlock, count, before, gaps);
    const unsigned r = rice_parameter(gaps, count);
    for (size_t i = 0; i < kBlock; ++i) low[i] = gaps[i] & ((uint32_t(1) << r) - 1);
    out[b] = uint8_t(r);
    pack(low, count, r, to);
    to += packed_bytes(count, r);
    before = idx[b * kBlock + count - 1];
  }
  uint64_t word = 0;
  unsigned filled = 0;
  before = 0xFFFFFFFFu;
  for (size_t b = 0; b < blocks; ++b) {
    const size_t count = min_of(kBlock, nnz - b * kBlock);
    const unsigned r = out[b];
    for (size_t i = b * kBlock; i < b * kBlock + count; ++i) {
      uint64_t end = filled + uint64_t((idx[i] - before - 1) >> r);  // bit of the one
      before = idx[i];
      while (end >= 64) {
        store64(to, word);
        to += 8;
        word = 0;
        end -= 64;
      }
      word |= uint64_t(1) << end;
      filled = unsigned(end) + 1;
      if (filled == 64) {
        store64(to, word);
        to += 8;
        word = 0;
        filled = 0;
      }
    }
  }
  for (; filled > 0; filled = filled > 8 ? filled - 8 : 0, word >>= 8) *to++ = uint8_t(word);
  return size_t(to - out);
}

inline size_t encode_bitmap(const uint32_t* idx, size_t nnz, uint64_t numel, uint8_t* out) {
  const size_t bytes = size_t((numel + 7) / 8);
  if (bytes) std::memset(out, 0, bytes);
  for (size_t i = 0; i < nnz;) {
    const size_t at = idx[i] / 64;
    uint64_t word = 0;
    for (; i < nnz && idx[i] / 64 == at; ++i) word |= uint64_t(1) << (idx[i] % 64);
    if (at * 8 + 8 <= bytes)
      store64(out + at * 8, word);
    else
      for (size_t j = at * 8; j < bytes; ++j, word >>= 8) out[j] = uint8_t(word);
  }
  return bytes;
}

// Returns the bytes written, or -1 - the position of an index that is out of order or out of range.
inline int64_t encode_indices(int codec, const uint32_t* idx, size_t nnz, uint64_t numel, uint8_t* out) {
  const size_t misplaced = first_misplaced(idx, nnz, numel);
  if (misplaced != nnz) return -1 - int64_t(misplaced);
  switch (codec) {
    case kRaw:
      for (size_t i = 0; i < nnz; ++i) store32(out + 4 * i, idx[i]);
      return int64_t(4 * nnz);
    case kBitpack: return int64_t(encode_bitpack(idx, nnz, out));
    case kRice: return int64_t(encode_rice(idx, nnz, out));
    case kBitmap: return int64_t(encode_bitmap(idx, nnz, numel, out));
    default: return 0;  // dense
  }
}

inline uint64_t load_up_to(const uint8_t* p, const uint8_t* end) {
  if (end - p >= 8) return load64(p);
  uint64_t word = 0;
  for (unsigned shift = 0; p < end; ++p, shift += 8) word |= uint64_t(*p) << shift;
  return word;
}

inline uint64_t count_ones(const uint8_t* data, size_t nbytes) {
  uint64_t ones = 0;
  const uint8_t* const end = data + nbytes;
  for (; data < end; data += 8) {
    ones += uint64_t(__builtin_popcountll(load_up_to(data, end)));
    if (end - data < 8) break;
  }
  return ones;
}

// Appends base + position of each one of a word and returns their number; may write up to kSurplus entries more.
constexpr size_t kSurplus = 16;
inline size_t append_ones(uint64_t word, uint32_t base, uint32_t* out) {
#if SC_SIMD
  return V::ones(word, base, out);
#else
  const size_t ones = size_t(__builtin_popcountll(word));
  for (size_t i = 0; i < ones; i += 8)
    for (size_t j = 0; j < 8; ++j) {
      out[i + j] = base + uint32_t(word ? __builtin_ctzll(word) : 0);
      word &= word - 1;
    }
  return ones;
#endif
}

inline DecodeOut ok() { return {kOk, 0, 0}; }
inline DecodeOut fail(int status, uint64_t got, uint64_t want) { return {status, double(got), want}; }

inline DecodeOut decode_bitmap(const uint8_t* data, size_t nbytes, size_t nnz, uint64_t numel, uint32_t* out) {
  if (nbytes != (numel + 7) / 8) return fail(kIndexBytes, nbytes, (numel + 7) / 8);
  if (numel % 8 && data[nbytes - 1] >> (numel % 8)) return fail(kPadding, data[nbytes - 1], 0);
  const uint64_t ones = count_ones(data, nbytes);
  if (ones != nnz) return fail(kBitmapOnes, ones, nnz);
  size_t count = 0;
  uint32_t spill[64 + kSurplus];
  for (size_t at = 0; at < nbytes; at += 8) {
    const uint64_t word = load_up_to(data + at, data + nbytes);
    if (nnz - count >= 64 + kSurplus) {
      count += append_ones(word, uint32_t(at * 8), out + count);
    } else {  // no room for surplus writes
      const size_t got = append_ones(word, uint32_t(at * 8), spill);
      if (got) std::memcpy(out + count, spill, got * sizeof *out);
      count += got;
    }
  }
  return ok();
}

// Checks the parameters in front of BITPACK and RICE, one byte for each block, and sums the bytes of the packed blocks.
inline DecodeOut read_block_bytes(const uint8_t* data, size_t nbytes, size_t nnz, unsigned most, size_t& packed) {
  const size_t blocks = (nnz + kBlock - 1) / kBlock;
  if (nbytes < blocks) return fail(kTooShort, nbytes, blocks);
  packed = 0;
  for (size_t b = 0; b < blocks; ++b) {
    if (data[b] > most) return fail(kIndexParam, data[b], most);
    packed += packed_bytes(min_of(kBlock, nnz - b * kBlock), data[b]);
  }
  return ok();
}

inline bool padding_is_zero(const uint8_t* last, size_t nnz, unsigned width) {
  const unsigned used = unsigned(nnz % kBlock * width % 8);
  return used == 0 || *last >> used == 0;
}

// Finds the first index of a block that is out of range, for the error message.
template <class Gap>
DecodeOut out_of_range(uint64_t next, size_t count, uint64_t numel, Gap gap) {
  for (size_t i = 0; i < count; ++i) {
    next += gap(i);
    if (next >= numel) break;
    ++next;
  }
  return fail(kIndexRange, next, numel);
}

inline DecodeOut decode_bitpack(const uint8_t* data, size_t nbytes, size_t nnz, uint64_t numel, uint32_t* out) {
  size_t packed = 0;
  const DecodeOut head = read_block_bytes(data, nbytes, nnz, 32, packed);
  if (head.status) return head;
  const size_t blocks = (nnz + kBlock - 1) / kBlock;
  if (nbytes != blocks + packed) return fail(kIndexBytes, nbytes, blocks + packed);
  if (nnz % kBlock && !padding_is_zero(data + nbytes - 1, nnz, data[blocks - 1]))
    return fail(kPadding, data[nbytes - 1], 0);
  const uint8_t* from = data + blocks;
  uint64_t next = 0;  // one above the last index so far; no block can wrap 64 bits
  alignas(64) uint32_t gaps[kBlock];
#if SC_SIMD
  typename V::I last = V::set1(0xFFFFFFFFu);  // the last index in every lane
  const typename V::I one = V::set1(1u);
#endif
  for (size_t b = 0; b < blocks; ++b) {
    const size_t count = min_of(kBlock, nnz - b * kBlock);
    const unsigned width = data[b];
    const uint64_t start = next;
    uint32_t* const to = out + b * kBlock;
#if SC_SIMD
    // The sum of such a block is below 2**31, so 32 bits are enough.
    if (count == kBlock && width <= 24 && size_t(data + nbytes - from) >= kBlock / 8 * width + kOverread) {
      unpack_each(from, width, [&](size_t i, typename V::I gap) {
        const typename V::I sums = V::prefix_sum(V::add(gap, one));
        V::store_index(to + i, V::add(last, sums));
        last = V::add(last, V::broadcast_last(sums));
      });
      next += uint32_t(to[kBlock - 1] + 1 - uint32_t(start));
      from += kBlock / 8 * width;
      if (next > numel) {
        unpack_vectors(from - kBlock / 8 * width, width, gaps);
        return out_of_range(start, count, numel, [&](size_t i) { return uint64_t(gaps[i]); });
      }
      continue;
    }
#endif
    unpack(from, data + nbytes, count, width, gaps);
    from += packed_bytes(count, width);
    for (size_t i = 0; i < count; ++i) {
      next += gaps[i];
      to[i] = uint32_t(next++);
    }
    if (next > numel) return out_of_range(start, count, numel, [&](size_t i) { return uint64_t(gaps[i]); });
#if SC_SIMD
    last = V::set1(uint32_t(next) - 1);
#endif
  }
  return ok();
}

inline DecodeOut decode_rice(const uint8_t* data, size_t nbytes, size_t nnz, uint64_t numel, uint32_t* out) {
  size_t packed = 0;
  const DecodeOut head = read_block_bytes(data, nbytes, nnz, 31, packed);
  if (head.status) return head;
  const size_t blocks = (nnz + kBlock - 1) / kBlock, start = blocks + packed;
  // Valid quotients sum to at most numel - nnz. This check comes first, so that no sum below wraps.
  if (nbytes < start + (nnz + 7) / 8 || nbytes > start + (numel + 7) / 8)
    return fail(kRiceBytes, nbytes, start + (nnz + 7) / 8);
  if (nnz % kBlock && !padding_is_zero(data + start - 1, nnz, data[blocks - 1]))
    return fail(kPadding, data[start - 1], 0);
  const uint8_t *from = data + blocks, *unary = data + start, *const end = data + nbytes;
  const uint64_t ones = count_ones(unary, size_t(end - unary));
  if (ones != nnz || (unary < end && end[-1] == 0)) return fail(kUnaryOnes, ones, nnz);

  // where[1..have] are the positions of the next ones in the unary stream, modulo 2**32; where[0] is that of the last
  // one used.
  alignas(64) uint32_t where[1 + kBlock + 64 + kSurplus];
  where[0] = 0xFFFFFFFFu;
  size_t have = 0;
  uint64_t base = 0, next = 0;
  alignas(64) uint32_t low[kBlock];
  for (size_t b = 0; b < blocks; ++b) {
    const size_t count = min_of(kBlock, nnz - b * kBlock);
    for (; have < count; unary += 8, base += 64)
      have += append_ones(load_up_to(unary, end), uint32_t(base), where + 1 + have);
    const unsigned r = data[b];
    unpack(from, data + start, count, r, low);
    from += packed_bytes(count, r);
    const uint64_t first = next;
    uint32_t* const to = out + b * kBlock;
    // A quotient below 2**32 is exact in spite of the modulus.
    const auto gap = [&](size_t i) { return (uint64_t(where[i + 1] - where[i] - 1) << r) + low[i]; };
#if SC_SIMD
    if (count == kBlock && r <= 24 && numel <= (uint64_t(1) << 31)) {
      const typename V::I one = V::set1(1u), shift = V::set1(r);
      typename V::I last = V::set1(uint32_t(first) - 1);
      for (size_t i = 0; i < kBlock; i += V::W) {
        const typename V::I steps = V::sub(V::load_index(where + i + 1), V::load_index(where + i));
        const typename V::I high = V::shift_left(V::sub(steps, one), shift);
        const typename V::I sums = V::prefix_sum(V::add(V::add(high, one), V::load_index(low + i)));
        V::store_index(to + i, V::add(last, sums));
        last = V::add(last, V::broadcast_last(sums));
      }
      // The low parts sum to less than 2**31, so the last index, known modulo 2**32, minus the known rest is their sum.
      const uint64_t known = (uint64_t(where[kBlock] - where[0] - kBlock) << r) + kBlock;
      next = first + known + uint32_t(to[kBlock - 1] + 1 - uint32_t(first) - uint32_t(known));
    } else
#endif
      for (size_t i = 0; i < count; ++i) {
        next += gap(i);
        to[i] = uint32_t(next++);
      }
    if (next > numel) return out_of_range(first, count, numel, gap);
    have -= count;
    std::memmove(where, where + count, (have + 1) * sizeof *where);
  }
  return ok();
}

inline DecodeOut decode_indices(int codec, const uint8_t* data, size_t nbytes, size_t nnz, uint64_t numel,
                                uint32_t* out) {
  switch (codec) {
    case kRaw: {
      if (nbytes != 4 * nnz) return fail(kIndexBytes, nbytes, 4 * nnz);
      for (size_t i = 0; i < nnz; ++i) out[i] = load32(data + 4 * i);
      const size_t misplaced = first_misplaced(out, nnz, numel);
      return misplaced == nnz ? ok() : fail(kNotAscending, out[misplaced], numel);
    }
    case kBitpack: return decode_bitpack(data, nbytes, nnz, numel, out);
    case kRice: return decode_rice(data, nbytes, nnz, numel, out);
    case kBitmap: return decode_bitmap(data, nbytes, nnz, numel, out);
    default:
      if (nnz != numel) return fail(kDenseNnz, nnz, numel);
      if (nbytes) return fail(kIndexBytes, nbytes, 0);
      for (size_t i = 0; i < nnz; ++i) out[i] = uint32_t(i);
      return ok();
  }
}

}  // namespace
}  // namespace sc
