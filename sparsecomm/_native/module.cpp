// The Python module sparsecomm._core. Kernels: addresses and sizes in, counts out; Python makes all checks. And the
// status with which the process exits.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "exit_status.h"
#include "kernels.h"
#include "scratch.h"

namespace nb = nanobind;
using Address = uint64_t;

namespace {

std::atomic<const sc::Kernels*> current{sc::portable_kernels()};

const sc::Kernels& kernels() { return *current.load(std::memory_order_relaxed); }

// Releases the GIL while a kernel works, so that other Python threads run. Short work keeps it, because releasing it
// for a microsecond can cost milliseconds until another thread gives it back.
class FreeGil {
 public:
  explicit FreeGil(size_t bytes) {
    if (bytes >= kWorthIt) released_.emplace();
  }

 private:
  static constexpr size_t kWorthIt = size_t{1} << 16;
  std::optional<nb::gil_scoped_release> released_;
};

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(static_cast<uintptr_t>(address));
}

std::vector<const sc::Kernels*> supported() {
  std::vector<const sc::Kernels*> out;
  for (const sc::Kernels* k : {sc::avx512_kernels(), sc::avx2_kernels(), sc::portable_kernels()})
    if (k) out.push_back(k);
  return out;
}

// Bits of the smallest float that is not below the threshold, so that rounding never lets more through.
uint32_t threshold_bits(double threshold) {
  float rounded = static_cast<float>(threshold);
  if (static_cast<double>(rounded) < threshold) rounded = std::nextafter(rounded, std::numeric_limits<float>::infinity());
  uint32_t bits;
  std::memcpy(&bits, &rounded, 4);
  return bits & sc::kMagnitude;
}

std::tuple<uint64_t, uint64_t, uint64_t> accumulate_select(Address grad, int type, Address residual, size_t n,
                                                           double threshold, Address out_indices, Address out_values,
                                                           size_t capacity, double scale) {
  const FreeGil free(n * 4);
  const sc::SelectOut r = kernels().accumulate_select(at<void>(grad), type, at<float>(residual), n,
                                                      threshold_bits(threshold), at<uint32_t>(out_indices),
                                                      at<float>(out_values), capacity, static_cast<float>(scale));
  return {r.stored, r.total, r.nonfinite};
}

std::tuple<uint64_t, double, uint64_t> exact_topk(Address grad, int type, Address residual, size_t n, size_t k,
                                                  Address out_indices, Address out_values, size_t capacity,
                                                  double scale) {
  const FreeGil free(n * 4);
  const sc::TopKOut r =
      kernels().exact_topk(at<void>(grad), type, at<float>(residual), n, k, at<uint32_t>(out_indices),
                           at<float>(out_values), capacity, static_cast<float>(scale));
  return {r.stored, static_cast<double>(r.threshold), r.nonfinite};
}

size_t cut_topk(Address indices, Address values, size_t count, size_t k, Address residual) {
  const FreeGil free(count * 8);
  return kernels().cut_topk(at<uint32_t>(indices), at<float>(values), count, k, at<float>(residual));
}

int64_t encode_indices(int codec, Address indices, size_t nnz, uint64_t numel, Address out) {
  const FreeGil free(nnz * 4 + (codec == sc::kBitmap ? numel / 8 : 0));
  return kernels().encode_indices(codec, at<const uint32_t>(indices), nnz, numel, at<uint8_t>(out));
}

std::tuple<int, double, uint64_t> decode_indices(int codec, Address data, size_t nbytes, size_t nnz, uint64_t numel,
                                                 Address out) {
  const FreeGil free(nbytes);
  const sc::DecodeOut r =
      kernels().decode_indices(codec, at<const uint8_t>(data), nbytes, nnz, numel, at<uint32_t>(out));
  return {r.status, r.got, r.want};
}

std::tuple<size_t, double> encode_values(int codec, Address values, size_t nnz, Address out, Address error) {
  const FreeGil free(nnz * 4);
  float scale = 1.0f;
  const size_t bytes =
      kernels().encode_values(codec, at<const float>(values), nnz, at<uint8_t>(out), at<float>(error), &scale);
  return {bytes, static_cast<double>(scale)};
}

std::tuple<int, double, uint64_t> decode_values(int codec, Address data, size_t nbytes, size_t nnz, double scale,
                                                Address out) {
  const FreeGil free(nnz * 4);
  const sc::DecodeOut r = kernels().decode_values(codec, at<const uint8_t>(data), nbytes, nnz,
                                                  static_cast<float>(scale), at<float>(out));
  return {r.status, r.got, r.want};
}

// Writes positions, then values, and returns the checksum of both, so that a bucket is encoded in one call.
std::tuple<int64_t, size_t, double, uint32_t> encode_body(int index_codec, int value_codec, Address indices,
                                                          Address values, size_t nnz, uint64_t numel, Address out,
                                                          Address error) {
  const FreeGil free(nnz * 8 + (index_codec == sc::kBitmap ? numel / 8 : 0));
  const sc::Kernels& k = kernels();
  uint8_t* const body = at<uint8_t>(out);
  const int64_t index_bytes = k.encode_indices(index_codec, at<const uint32_t>(indices), nnz, numel, body);
  if (index_bytes < 0) return {index_bytes, 0, 1.0, 0};
  float scale = 1.0f;
  const size_t value_bytes = k.encode_values(value_codec, at<const float>(values), nnz, body + index_bytes,
                                             at<float>(error), &scale);
  return {index_bytes, value_bytes, static_cast<double>(scale), k.crc32c(body, size_t(index_bytes) + value_bytes, 0)};
}

// Reads a body that `encode_body` wrote; skips positions that are known.
std::tuple<int, double, uint64_t> decode_body(int index_codec, int value_codec, Address data, size_t nbytes,
                                              size_t index_bytes, size_t nnz, uint64_t numel, double scale,
                                              bool known, Address out_indices, Address out_values) {
  const FreeGil free(nbytes);
  const sc::Kernels& k = kernels();
  const uint8_t* const body = at<const uint8_t>(data);
  if (!known) {
    const sc::DecodeOut r =
        k.decode_indices(index_codec, body, index_bytes, nnz, numel, at<uint32_t>(out_indices));
    if (r.status) return {r.status, r.got, r.want};
  }
  const sc::DecodeOut r = k.decode_values(value_codec, body + index_bytes, nbytes - index_bytes, nnz,
                                          static_cast<float>(scale), at<float>(out_values));
  return {r.status, r.got, r.want};
}

void scatter_add(Address out, Address indices, Address values, size_t nnz) {
  const FreeGil free(nnz * 8);
  kernels().scatter_add(at<float>(out), at<const uint32_t>(indices), at<const float>(values), nnz);
}

void scatter_reduce(Address out, int type, size_t n, const std::vector<std::tuple<Address, Address, size_t>>& parts,
                    double scale) {
  std::vector<sc::Part> list;
  list.reserve(parts.size());
  for (const auto& [indices, values, nnz] : parts)
    list.push_back({at<const uint32_t>(indices), at<const float>(values), nnz});
  const FreeGil free(n * 4);
  kernels().scatter_reduce(at<void>(out), type, n, list.data(), list.size(), static_cast<float>(scale));
}

void add_dense(Address out, Address data, size_t n) {
  const FreeGil free(n * 4);
  kernels().add_dense(at<float>(out), at<const uint8_t>(data), n);
}

void pack_dense(int codec, Address values, size_t n, Address out, Address error) {
  const FreeGil free(n * 4);
  kernels().pack_dense(codec, at<const float>(values), n, at<uint8_t>(out), at<float>(error));
}

void unpack_dense(int codec, Address data, size_t n, Address out, bool add) {
  const FreeGil free(n * 4);
  kernels().unpack_dense(codec, at<const uint8_t>(data), n, at<float>(out), add);
}

uint64_t accumulate_dense(Address grad, int type, Address residual, size_t n, double scale) {
  const FreeGil free(n * 4);
  return kernels()
      .accumulate_select(at<void>(grad), type, at<float>(residual), n, sc::kInfBits, nullptr, nullptr, 0,
                         static_cast<float>(scale))
      .nonfinite;
}

uint64_t accumulate_norms(Address grad, int type, Address residual, size_t n, double scale, size_t chunk,
                          Address norms) {
  const FreeGil free(n * 4);
  return kernels().accumulate_norms(at<void>(grad), type, at<float>(residual), n, static_cast<float>(scale), chunk,
                                    at<float>(norms));
}

uint32_t crc32c(Address data, size_t nbytes, uint32_t seed) {
  const FreeGil free(nbytes);
  return kernels().crc32c(at<const uint8_t>(data), nbytes, seed);
}

}  // namespace

NB_MODULE(_core, m) {
  m.doc() = "C++ kernels of sparsecomm. Unchecked: use sparsecomm.kernels.";
  m.def("paths", [] {
    std::vector<std::string> names;
    for (const sc::Kernels* k : supported()) names.emplace_back(k->name);
    return names;
  });
  m.def("set_path", [](const std::string& name) {
    for (const sc::Kernels* k : supported())
      if (name == k->name) {
        current = k;
        return;
      }
    throw nb::value_error(("no such path here: " + name).c_str());
  });
  m.def("accumulate_select", accumulate_select);
  m.def("exact_topk", exact_topk);
  m.def("cut_topk", cut_topk);
  m.def("encode_indices", encode_indices);
  m.def("decode_indices", decode_indices);
  m.def("encode_values", encode_values);
  m.def("decode_values", decode_values);
  m.def("encode_body", encode_body);
  m.def("decode_body", decode_body);
  m.def("scatter_add", scatter_add);
  m.def("scatter_reduce", scatter_reduce);
  m.def("add_dense", add_dense);
  m.def("pack_dense", pack_dense);
  m.def("unpack_dense", unpack_dense);
  m.def("accumulate_dense", accumulate_dense);
  m.def("accumulate_norms", accumulate_norms);
  m.def("crc32c", crc32c);
  m.def("scratch_bytes", sc::scratch_bytes);
  m.def("watch_exit_status", sc::watch_exit_status);
  m.def("noted_exit_status", [] { return nb::steal<nb::object>(sc::noted_exit_status()); });
  m.def("release_scratch", sc::release_scratch);
}
